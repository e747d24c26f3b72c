package replica_test

import (
	"errors"
	"testing"

	"sheepdog/cluster/internal/replica"
	"sheepdog/cluster/state"
)

// What comes under an epoch that this node does not know yet waits for it, and is refused if the epoch
// is passed over, or does not come for long.
func TestEarlyMessages(t *testing.T) {
	self, other := replica.Peer{Node: 1, Incarnation: 1}, replica.Peer{Node: 2, Incarnation: 1}
	const resend = 20
	view := func(epoch state.Epoch, isr ...replica.Peer) replica.View {
		return replica.View{Epoch: epoch, ISR: isr, MinInSync: 1}
	}
	start := func(v replica.View) *replica.Partition {
		p := replica.New(replica.Options{Self: self, AckTimeout: 3000, LearnerTimeout: 1000, Resend: resend, Patience: 6000}, replica.Report{})
		p.SetLease(0, 1<<60)
		p.SetView(0, v)
		p.Effects()
		return p
	}
	outcome := func(p *replica.Partition, kind replica.EffectKind) (err error, found bool) {
		for _, e := range p.Effects() {
			if e.Kind == kind {
				if kind == replica.Answer {
					return e.Op.Err, true
				}
				return e.Err, true
			}
		}
		return nil, false
	}
	read := func() *replica.Op { return &replica.Op{ID: 1, Len: 4096, Read: true} }

	p := start(view(1, other, self))
	p.Submit(1, 3, read())
	p.SetView(2, view(2, other, self))
	if _, found := outcome(p, replica.Answer); found {
		t.Error("an op of epoch 3 is answered in epoch 2")
	}
	p.SetView(3, view(3, self))
	if _, found := outcome(p, replica.Apply); !found {
		t.Error("an op of epoch 3 does not begin in epoch 3")
	}

	p = start(view(1, other, self))
	p.Submit(1, 3, read())
	p.SetView(2, view(4, self))
	if err, found := outcome(p, replica.Answer); !found || !errors.Is(err, replica.ErrRetry) {
		t.Errorf("an op of epoch 3 in epoch 4: %v, answered %v", err, found)
	}

	p = start(view(1, self, other))
	p.AnswerSurvey(other, 2, "survey")
	if _, found := outcome(p, replica.Reply); found {
		t.Error("the survey of an epoch that is not known is answered")
	}
	p.SetView(1, view(2, other, self))
	if err, found := outcome(p, replica.Reply); !found || err != nil {
		t.Errorf("the survey of the epoch that has come: %v, answered %v", err, found)
	}

	p = start(view(1, other, self))
	p.Submit(1, 2, read())
	p.AnswerAsk(other, 2, 1, "ask")
	if p.Idle() {
		t.Error("a partition in which something waits for a time is idle")
	}
	p.Tick(10)
	p.Tick(10 + 10*resend - 1)
	if len(p.Effects()) > 0 {
		t.Error("what has come early is refused too soon")
	}
	p.Tick(10 + 10*resend)
	effects := p.Effects()
	if len(effects) != 2 || effects[0].Kind != replica.Answer || !errors.Is(effects[0].Op.Err, replica.ErrRetry) ||
		effects[1].Kind != replica.Reply || !errors.Is(effects[1].Err, replica.ErrEpoch) {
		t.Errorf("what has waited for long: %+v", effects)
	}
	if !p.Idle() {
		t.Error("nothing waits, and the partition is not idle")
	}
}
