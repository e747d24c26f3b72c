package steward

import (
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
