package sim

import (
	"slices"
	"testing"
	"testing/synctest"
)

// Two nodes do not reach each other, while the leader reaches both: one of them goes, clients
// of the others notice a pause, and it stays away until the link is mended.
func TestSimulationOfLink(t *testing.T) {
	seeds := some(3)
	if *simSeeds >= 500 {
		seeds = 20
	}
	for seed := range seeds {
		s := calm(seed + 1)
		s.nodes, s.partitions, s.volumes, s.objects, s.depth = 3+int(seed%3), 4, 3, 4, 2
		s.contend = 1000 * second
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(s, "")
			w.cutOneLink(t)
			w.finish()
			if w.failure != nil {
				t.Errorf("seed %d: %v", s.seed, w.failure)
			}
		})
	}
}

func (w *world) cutOneLink(t *testing.T) {
	w.bring()
	if !w.run(w.converged, 20*second) {
		w.fail("the cluster does not begin to work")
		return
	}
	w.populate()
	w.run(nil, 4*second)
	if w.reign() == nil {
		w.fail("nobody leads")
		return
	}
	var pair []*node
	for _, n := range w.nodes {
		if n.life.reign == nil && len(pair) < 2 {
			pair = append(pair, n)
		}
	}
	w.cutLink(pair[0], pair[1], true)
	w.longest = 0
	down := func() *node {
		for _, n := range pair {
			if w.oracle.View().Node(n.id).State != up {
				return n
			}
		}
		return nil
	}
	if !w.run(func() bool { return down() != nil }, 4*second) {
		w.fail("both nodes stay up")
		return
	}
	gone, took := down(), w.now()-w.cut[[2]nodeID{pair[0].id, pair[1].id}]
	w.run(nil, 2*second)
	stall := w.longest
	downs := w.seen["node is down"]
	w.run(nil, 20*second)
	if down() != gone || w.seen["node is down"] != downs || slices.ContainsFunc(w.nodes, func(n *node) bool { return n != gone && w.oracle.View().Node(n.id).State != up }) {
		w.fail("it does not stay so: %s", w.situation())
	}
	w.mend()
	if !w.run(func() bool { return down() == nil && w.converged() }, 15*second) {
		w.fail("it does not come back: %s", w.situation())
	}
	t.Logf("%d nodes: agreed after %v, longest request of others %v", len(w.nodes), took, stall)
	if stall > 4*second {
		w.fail("clients waited for %v", stall)
	}
	for _, v := range w.volumes {
		v.stop = true
	}
	if !w.run(w.idle, 10*second) {
		w.fail("requests were not answered")
	}
	if err := w.history.check(); err != nil {
		w.fail("%v", err)
	}
}

// mend ends all cuts.
func (w *world) mend() { clear(w.cut) }
