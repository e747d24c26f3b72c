package integration

import (
	"fmt"
	"testing"
	"time"

	"sheepdog/integration/rig"
)

// While a node is away, what only it has of deleted volumes waits for it, and nothing else does: others give their space back. A check
// says where it has not looked, and finds nothing wrong.
func TestGarbageWhileNodeIsAway(t *testing.T) {
	besideOthers(t)
	f := rig.NewFlockOf(t, 3, 3, rig.FlockOptions{IOTimeout: 3 * time.Second})
	a, c := f.Nodes[0], f.Nodes[2]
	write := func(name, copies string) {
		a.Dog("vdi", "create", name, "64M", "-c", copies)
		f.Know(name)
		writePieces(t, a, name, []int{0, 8, 16, 24, 32, 40, 48, 56}, 0)
	}
	const deleted = 8
	for i := range deleted { // their ids, by which they are collected, are hashes of the names
		write(fmt.Sprint("v", i), []string{"1", "3"}[i%2])
	}
	write("kept", "3")
	c.Kill()
	for i := range deleted {
		a.Dog("vdi", "delete", fmt.Sprint("v", i))
	}
	eventually(t, 30*time.Second, "what others have is collected", func() error {
		for _, s := range f.Nodes[:2] {
			if n := pendingGarbage(s); n != deleted/2 {
				return fmt.Errorf("%s has %d to remove", s.Host(), n)
			}
		}
		return nil
	})
	r := a.DogRun("vdi", "check", "kept")
	if r.Code != 0 {
		t.Errorf("a check ends with %d: %s%s", r.Code, r.Stdout, r.Stderr)
	}
	rig.Contains(t, r.Stdout, "unsearched")
	rig.Contains(t, r.Stdout, "with 1 copies")

	f.Back(wholeLimit, 2)
	eventually(t, time.Minute, "the rest is collected", func() error {
		if n := pendingGarbage(a); n != 0 {
			return fmt.Errorf("%d are left", n)
		}
		return nil
	})
	rig.Contains(t, a.Dog("cluster", "check"), "objects are as they should be")
}

// pendingGarbage is how many deleted volumes a node knows whose space is not free yet.
func pendingGarbage(s *rig.Sheep) int {
	var n struct {
		GC struct{ Pending int } `json:"gc"`
	}
	s.DogJSON(&n, "node", "info")
	return n.GC.Pending
}
