package integration

import (
	"fmt"
	"testing"
	"time"

	"sheepdog/integration/rig"
)

// A node that gets a twentieth of the time that the others have is not one that hangs: it answers, late. Clients of the others go
// on without errors, whether it stays in sync or not, and so do they when it has its time again; whether it leads or not.
func TestFlockBearsSlowNode(t *testing.T) {
	besideOthers(t)
	f := rig.NewFlock(t, 3, 3)
	h := newHerder(t, f, "v")
	slow := []int{f.Leader()}
	slow = append(slow, (slow[0]+1)%3)
	long := 5 * time.Second
	if soaking() {
		long = 30 * time.Second
	}
	for _, i := range slow {
		h.start(f.Nodes[(i+1)%3])
		time.Sleep(time.Second)
		h.stall()
		h.strain.longest()
		before := h.ops.Load()
		for end := time.Now().Add(long); time.Now().Before(end); {
			f.Nodes[i].Freeze()
			time.Sleep(95 * time.Millisecond)
			f.Nodes[i].Thaw()
			time.Sleep(5 * time.Millisecond)
		}
		ops := h.ops.Load() - before
		f.WaitWhole(wholeLimit)
		reportStall(t, h, fmt.Sprintf("n%d was slow for %v, in which %d requests were answered", i+1, long, ops), stallLimit)
		if ops == 0 {
			t.Errorf("nothing was answered while n%d was slow", i+1)
		}
		h.end()
	}
	for _, s := range f.Nodes {
		h.verify(s, false)
	}
	checkClean(t, f.Nodes[0], "a node was slow")
}
