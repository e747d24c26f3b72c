package replica_test

import (
	"errors"
	"testing"

	"sheepdog/cluster/internal/replica"
	"sheepdog/storage/object"
)

// A partition that is closed refuses what is under way and what comes. What uses somebody's data ends first.
func TestClose(t *testing.T) {
	self, other := replica.Peer{Node: 1, Incarnation: 1}, replica.Peer{Node: 2, Incarnation: 1}
	start := func(isr ...replica.Peer) *replica.Partition {
		p := replica.New(replica.Options{Self: self, AckTimeout: 3000, LearnerTimeout: 1000, Resend: 20, Patience: 6000}, replica.Report{})
		p.SetView(0, replica.View{Epoch: 1, ISR: isr, MinInSync: 1})
		p.Effects()
		return p
	}
	// answers are how ops and questions were answered since.
	answers := func(p *replica.Partition) (errs []error) {
		for _, e := range p.Effects() {
			switch e.Kind {
			case replica.Answer:
				errs = append(errs, e.Op.Err)
			case replica.Reply:
				errs = append(errs, e.Err)
			case replica.Abandon:
			default:
				t.Errorf("effect %+v", e)
			}
		}
		return errs
	}
	expect := func(what string, got []error, want ...error) {
		t.Helper()
		same := len(got) == len(want)
		for i := range want {
			same = same && errors.Is(got[i], want[i])
		}
		if !same {
			t.Errorf("%s: %v, want %v", what, got, want)
		}
	}

	p := start(self, other)
	p.SetLease(0, 1<<60)
	p.Surveyed(1, other, 1, replica.Report{}, nil)
	change, behind := &replica.Op{ID: 1, Len: 4096}, &replica.Op{ID: 1, Len: 4096}
	p.Submit(1, 1, change)
	p.Submit(1, 1, behind)
	p.Submit(1, 5, &replica.Op{ID: 2, Len: 4096, Read: true})
	if e := p.Effects(); len(e) != 2 || e[0].Kind != replica.Send || e[1].Kind != replica.Apply {
		t.Fatalf("a change begins with %+v", e)
	}
	p.Close()
	expect("what waits for its turn, and for an epoch", answers(p), replica.ErrRetry, replica.ErrRetry)
	p.Applied(2, change, 1, nil)
	expect("what the other one has not answered", answers(p))
	p.Acked(2, change, 1, other, nil)
	expect("what nobody uses any more", answers(p), replica.ErrRetry)
	p.Submit(3, 1, &replica.Op{ID: 1, Len: 4096})
	p.Submit(3, 9, &replica.Op{ID: 1, Len: 4096, Read: true})
	p.AnswerSurvey(other, 9, "survey")
	expect("what comes", answers(p), replica.ErrRetry, replica.ErrRetry, replica.ErrEpoch)
	p.SetView(4, replica.View{Epoch: 2, ISR: []replica.Peer{other, self}, MinInSync: 1})
	p.Tick(1 << 40)
	expect("a new epoch", answers(p))
	if !p.Idle() {
		t.Error("it is not idle")
	}

	p = start(other, self)
	p.Receive(other, 1, 0, object.Version{Epoch: 1, Seq: 1}, 1, replica.Mark{}, "change")
	e := p.Effects()
	if len(e) != 1 || e[0].Kind != replica.Apply {
		t.Fatalf("a member takes a change with %+v", e)
	}
	apply := e[0]
	p.Close()
	p.Receive(other, 1, 0, object.Version{Epoch: 1, Seq: 2}, 1, replica.Mark{}, "next")
	p.AnswerSurvey(other, 1, "survey") // an answer would have to name what was received
	expect("of the primary", answers(p), replica.ErrEpoch, replica.ErrEpoch)
	p.Stored(2, apply, nil)
	expect("what is stored", answers(p), nil)
}
