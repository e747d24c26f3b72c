package integration

import (
	"fmt"
	"testing"
	"time"

	"sheepdog/integration/rig"
)

// wholeLimit bounds how long a small cluster may take to be whole after everything is back.
const wholeLimit = time.Minute

// stallLimit bounds how long a request may take because of one failure.
const stallLimit = 5 * time.Second

// patience is what a limit is multiplied by where other work shares the processors: make
// soak measures, the short run finds what never ends.
func patience() time.Duration {
	if crashRounds(0) > 0 {
		return 1
	}
	return 4
}

func reportStall(t *testing.T, h *herder, what string, limit time.Duration) {
	t.Helper()
	stall := h.stall()
	t.Logf("%s: longest stall %v", what, stall.Round(time.Millisecond))
	if limit *= patience(); stall > limit {
		t.Errorf("%s: a request took %v, at most %v is allowed", what, stall, limit)
	}
}

// Nodes that die, hang or are stopped are not noticed by clients of others, but for a moment.
func TestFlockSurvivesNodes(t *testing.T) {
	f := rig.NewFlock(t, 3, 3)
	h := newHerder(t, f, "v")
	h.start(f.Nodes[0])
	time.Sleep(time.Second)
	reportStall(t, h, "undisturbed", stallLimit)
	for _, i := range []int{1, 2} {
		f.Nodes[i].Kill()
		time.Sleep(3 * time.Second)
		took := f.Back(wholeLimit, i)
		reportStall(t, h, fmt.Sprintf("kill -9 of n%d, whole %v after its start", i+1, took.Round(time.Millisecond)), stallLimit)
	}
	hangs := []time.Duration{time.Second, 5 * time.Second}
	if crashRounds(0) > 0 {
		hangs = append(hangs, 15*time.Second)
	}
	for _, hang := range hangs {
		f.Nodes[2].Freeze()
		time.Sleep(hang)
		f.Nodes[2].Thaw()
		time.Sleep(time.Second)
		f.WaitWhole(wholeLimit)
		reportStall(t, h, fmt.Sprintf("n3 hung for %v", hang), stallLimit)
	}
	for _, i := range []int{2, 1} {
		f.Nodes[i].Stop()
		f.Back(wholeLimit, i)
		reportStall(t, h, fmt.Sprintf("n%d restarted with SIGTERM", i+1), stallLimit)
	}
	h.end()
	for _, s := range f.Nodes {
		h.verify(s, false)
	}
	t.Logf("%d requests", h.ops.Load())
}

// The leader and the node that is primary of most may die like any other.
func TestFlockSurvivesLeader(t *testing.T) {
	f := rig.NewFlock(t, 3, 3)
	h := newHerder(t, f, "v")
	for _, who := range []struct {
		what string
		of   func() int
	}{{"leader", f.Leader}, {"busiest primary", f.Busiest}} {
		i := who.of()
		h.start(f.Nodes[(i+1)%3])
		time.Sleep(time.Second)
		h.stall()
		f.Nodes[i].Kill()
		time.Sleep(3 * time.Second)
		f.Back(wholeLimit, i)
		reportStall(t, h, "kill -9 of the "+who.what, stallLimit)
		h.end()
	}
	for _, s := range f.Nodes {
		h.verify(s, false)
	}
}

// All nodes die at once: what was flushed is there afterwards, and each node shows the same.
func TestFlockSurvivesPowerCut(t *testing.T) {
	f := rig.NewFlock(t, 3, 3)
	h := newHerder(t, f, "v")
	for round := range max(2, crashRounds(0)) {
		h.mayFail.Store(false)
		h.start(f.Nodes[round%3])
		time.Sleep(2 * time.Second)
		h.mayFail.Store(true)
		for _, s := range f.Nodes {
			s.Kill()
		}
		h.end()
		took := f.Back(wholeLimit, 0, 1, 2)
		t.Logf("round %d: whole after %v", round, took.Round(time.Millisecond))
		h.verify(f.Nodes[(round+1)%3], true)
		for _, s := range f.Nodes {
			h.verify(s, false)
		}
	}
}
