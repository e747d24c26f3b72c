package replica_test

import (
	"errors"
	"testing"

	"sheepdog/cluster/internal/replica"
)

// What nobody can carry out or answer for long is refused, so that who asked for it may give it up. Of what some have made nothing is
// seen before a new epoch.
func TestLateOpsAreRefused(t *testing.T) {
	self, other := replica.Peer{Node: 1, Incarnation: 1}, replica.Peer{Node: 2, Incarnation: 1}
	const patience = 6000
	start := func(v replica.View) *replica.Partition {
		p := replica.New(replica.Options{Self: self, AckTimeout: 3000, LearnerTimeout: 1000, Resend: 20, Patience: patience}, replica.Report{})
		v.Epoch = 1
		p.SetView(0, v)
		for _, m := range v.ISR[1:] {
			p.Surveyed(0, m, 1, replica.Report{}, nil)
		}
		p.Effects()
		return p
	}
	write, read := func() *replica.Op { return &replica.Op{ID: 1, Len: 4096} }, func() *replica.Op { return &replica.Op{ID: 1, Len: 4096, Read: true} }
	// answered lists what was, in order, and what begins in the store.
	answered := func(p *replica.Partition) (ops, applied []*replica.Op) {
		for _, e := range p.Effects() {
			switch e.Kind {
			case replica.Answer:
				if !errors.Is(e.Op.Err, replica.ErrRetry) {
					t.Errorf("an op is answered with %v", e.Op.Err)
				}
				ops = append(ops, e.Op)
			case replica.Apply:
				applied = append(applied, e.Op)
			}
		}
		return ops, applied
	}
	expect := func(what string, p *replica.Partition, want ...*replica.Op) (applied []*replica.Op) {
		t.Helper()
		got, applied := answered(p)
		same := len(got) == len(want)
		for i := range want {
			same = same && got[i] == want[i]
		}
		if !same {
			t.Errorf("%s: %d ops are refused, not these %d", what, len(got), len(want))
		}
		return applied
	}

	// There is no lease.
	p := start(replica.View{ISR: []replica.Peer{self}, MinInSync: 1})
	a, b, c := read(), write(), write()
	p.Submit(1, 1, a)
	p.Submit(1, 1, b)
	p.Submit(5, 1, c)
	p.Tick(patience)
	expect("early", p)
	p.Tick(1 + patience)
	expect("late", p, a, b)
	p.Tick(5 + patience)
	expect("last", p, c)
	if !p.Idle() {
		t.Error("nothing is left, and it is not idle")
	}

	// There are too few in sync for changes.
	p = start(replica.View{ISR: []replica.Peer{self}, MinInSync: 2})
	p.SetLease(0, 1<<60)
	a, b = write(), read()
	p.Submit(1, 1, a)
	p.Submit(1, 1, b)
	p.Tick(1 + patience)
	if applied := expect("without members", p, a); len(applied) != 1 || applied[0] != b {
		t.Errorf("the read behind the change does not begin")
	}

	// A member does not answer, and nobody says that it is none any more.
	p = start(replica.View{ISR: []replica.Peer{self, other}, MinInSync: 1})
	p.SetLease(0, 1<<60)
	a, b, c = write(), write(), read()
	p.Submit(1, 1, a)
	p.Submit(1, 1, b)
	p.Submit(1, 1, c)
	p.Applied(2, a, 1, nil)
	p.Acked(2, a, 1, other, replica.ErrRetry)
	answered(p)
	p.Tick(1 + patience)
	expect("behind a change that is on one of two", p, b, c)
	d := read()
	p.Submit(2+patience, 1, d)
	if applied := expect("what comes then", p); len(applied) > 0 {
		t.Error("what is on one of two is read")
	}
	p.Acked(3+patience, a, 1, other, replica.ErrRetry)
	p.Tick(4 + patience) // it is not sent again yet, and nothing uses it
	effects := p.Effects()
	if len(effects) != 2 || effects[0].Kind != replica.Renew || effects[1].Op != a || !errors.Is(a.Err, replica.ErrRetry) || !a.Open {
		t.Fatalf("a change that is on one of two ends with %+v", effects)
	}
	e := write()
	e.Off = 8192
	p.Submit(4+patience, 1, e)
	p.Tick(100 + patience)
	if applied := expect("after it", p); len(applied) > 0 {
		t.Error("something begins before it is decided what became of a change")
	}
	if m := p.Mark(); m.Seq > 0 {
		t.Errorf("everything up to %+v is said to be on all members", m)
	}
	p.SetView(101+patience, replica.View{Epoch: 2, ISR: []replica.Peer{self, other}, MinInSync: 1})
	expect("what waited", p, d, e)
	p.Surveyed(102+patience, other, 2, replica.Report{}, nil)
	if effects = p.Effects(); len(effects) != 1 || effects[0].Kind != replica.Repair || effects[0].ID != 1 {
		t.Fatalf("the next epoch makes members equal by %+v", effects)
	}
	p.Repaired(103+patience, nil, other, 1, 2, nil)
	if m := p.Mark(); !p.Serving() || m != (replica.Mark{Epoch: 2}) {
		t.Errorf("then everything up to %+v is on all members", m)
	}

	// All have made a change, and there is no lease to say so.
	p = start(replica.View{ISR: []replica.Peer{self, other}, MinInSync: 1})
	p.SetLease(0, 100)
	a = write()
	p.Submit(1, 1, a)
	p.Applied(200, a, 1, nil)
	p.Acked(200, a, 1, other, nil)
	answered(p)
	p.Tick(1 + patience)
	expect("without a lease", p, a)
}
