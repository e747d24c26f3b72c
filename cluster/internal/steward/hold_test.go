package steward

import (
	"slices"
	"testing"
	"time"

	"sheepdog/cluster/state"
)

// On hold nothing is moved, whatever becomes of nodes; afterwards all is made good for. A policy
// that is new is placed nevertheless.
func TestHold(t *testing.T) {
	w := newWorld(t, 16, 2, 3)
	w.sync()
	w.apply(state.Command{SetHold: &state.SetHold{Hold: true}})
	before := w.targets(3)
	w.start("n4")
	w.quiet["n3"] = true
	w.pass(15 * time.Minute)
	if w.targets(4) != 0 || w.targets(3) != before {
		t.Errorf("on hold n4 came to %d targets and n3 went from %d to %d", w.targets(4), before, w.targets(3))
	}
	w.apply(state.Command{AddPolicy: &state.AddPolicy{Copies: 1}})
	w.pass(5 * time.Second)
	if len(w.view().Policies[1].Partitions) == 0 {
		t.Error("on hold a new policy has no place")
	}
	w.apply(state.Command{SetHold: &state.SetHold{}})
	w.pass(11 * time.Minute)
	if w.targets(4) == 0 || w.targets(3) != 0 {
		t.Errorf("afterwards n4 has %d targets, and n3, which is down, %d", w.targets(4), w.targets(3))
	}
}

// Thousands of partitions get other targets some at a time, those that the first plan had for them.
func TestMovesAreSpread(t *testing.T) {
	w := newWorld(t, 2048, 2, 3)
	w.sync()
	w.start("n4")
	w.pass(3 * time.Second)
	w.said = nil
	plan := w.s.plans[1]
	w.pass(10 * time.Second)
	for i, p := range w.view().Policies[0].Partitions {
		if !slices.Equal(p.Targets, plan[i]) {
			t.Fatalf("partition %d shall be held by %v, the plan was %v", i, p.Targets, plan[i])
		}
	}
	if n := w.targets(4); n < 900 || n > 1150 {
		t.Errorf("n4 has %d targets, its share is 1024", n)
	}
	before := w.view()
	w.apply(state.Command{Drain: &state.Drain{Node: 4, Drain: true}})
	w.step()
	moved := 0
	for i, p := range w.view().Policies[0].Partitions {
		if !slices.Equal(p.Targets, before.Policies[0].Partitions[i].Targets) {
			moved++
		}
	}
	if moved == 0 || moved > options.Moves {
		t.Errorf("%d partitions have got other targets at once", moved)
	}
	w.pass(5 * time.Second)
	if w.targets(4) != 0 {
		t.Errorf("n4 is drained and has %d targets", w.targets(4))
	}
}

// Who comes back learns what it shall hold some at a time.
func TestReturnIsSpread(t *testing.T) {
	w := newWorld(t, 2048, 2, 3)
	w.sync()
	learns := func() (n int) {
		for _, p := range w.view().Policies[0].Partitions {
			n += len(p.Learners)
		}
		return n
	}
	shall := w.targets(3)
	w.quiet["n3"] = true
	w.pass(limit + time.Second)
	w.quiet["n3"] = false
	w.start("n3")
	w.step()
	last := learns()
	if n := w.view().Node(3); n.State != state.NodeUp || last == 0 {
		t.Fatalf("n3 is %s and learns %d partitions", n.State, last)
	}
	for w.view(); learns() < shall; w.pass(100 * time.Millisecond) {
		n := learns()
		if n > last+2*options.Moves || last > 0 && n < last {
			t.Fatalf("n3 learns %d partitions, and soon %d", last, n)
		}
		last = n
		if w.now.Sub(begin) > time.Minute {
			t.Fatalf("n3 learns %d of %d partitions", n, shall)
		}
	}
	w.said = nil
	w.pass(time.Second)
	w.expect()
}
