package sim

import (
	"slices"
	"testing"
	"testing/synctest"

	"sheepdog/cluster/state"
)

// What simulations have found, told again.

// tale runs something in a world that works, until it fails or has ended.
func tale(t *testing.T, s setup, fn func(w *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(s, "")
		w.tracing = testing.Verbose()
		w.bring()
		if w.run(w.converged, 20*second) {
			w.populate()
			w.run(nil, second)
			fn(w)
		} else {
			w.fail("the cluster does not begin to work: %s", w.situation())
		}
		w.finish()
		if w.failure != nil {
			t.Error(w.failure)
		}
	})
}

// rest waits until all is quiet, and checks everything.
func (w *world) rest() {
	for _, v := range w.volumes {
		v.stop = true
	}
	if !w.run(func() bool { return w.idle() && w.converged() }, 60*second) {
		w.fail("no convergence: %s", w.situation())
		return
	}
	w.readBack()
	if err := w.history.check(); err != nil {
		w.fail("%v", err)
	}
	w.compare()
}

// A member is stopped while it takes a repair from the primary. Meanwhile that is none any
// more, and removes what others hold. The member, which has not heard of it, asks on, and must
// not remove its own because the other one has nothing. (Story 461 about rot.)
func TestRepairFromWhoHoldsNothingAnyMore(t *testing.T) {
	for seed := range some(4) {
		s := calm(seed + 1)
		s.nodes, s.partitions, s.volumes, s.objects, s.depth, s.contend, s.beat = 3, 1, 2, 2, 4, 1000*second, 2*ms
		tale(t, s, func(w *world) {
			part := func() state.Partition { return w.oracle.View().Policies[0].Partitions[0] }
			primary := w.nodes[part().ISR[0]-1]
			var member *node
			var asked []*flight
			w.called = func(f *flight) bool { // as if it had been stopped before it has asked
				if member == nil && f.c.Op == opSums && f.to == primary && slices.Contains(part().ISR, f.from.n.id) && f.from.reign == nil {
					member = f.from.n
					member.hang()
				}
				if f.c.Op == opSums && f.from.n == member {
					asked = append(asked, f)
				}
				return f.from.n == member
			}
			for range 20 { // until something is under way when an epoch ends
				w.renewOne()
				if w.run(func() bool { return member != nil }, 200*ms) {
					break
				}
			}
			w.called = nil
			if member == nil {
				w.fail("nothing was repaired")
				return
			}
			var targets []state.NodeID
			for _, n := range w.nodes {
				if n != primary {
					targets = append(targets, n.id)
				}
			}
			w.order(state.Command{SetTargets: &state.SetTargets{Policy: policy, Since: w.oracle.View().Epoch, Targets: [][]state.NodeID{targets}}})
			w.run(nil, second)
			member.wake()
			for _, f := range asked {
				f.arrive()
			}
			w.settle()
			w.run(nil, second)
			w.rest()
		})
	}
}
