package integration

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"sheepdog/integration/rig"
)

// A volume of one copy with a snapshot gets three while a client writes and verifies it through another node than the one
// that is asked. Then a node that is killed takes nothing. It gets two while it is written, and of what was before nothing
// is left.
func TestAlterCopies(t *testing.T) {
	f, h, before := beingWritten(t, 1, 0)
	n1, n2, n3 := f.Nodes[0], f.Nodes[1], f.Nodes[2]
	reportStall(t, h, "undisturbed", stallLimit)

	alter(t, n2, 1, "3")
	expectAlteredBy(t, n1, 1)
	reportStall(t, h, "one copy becomes three", movingLimit())
	expectCopies(t, f, 3)

	n3.Kill()
	time.Sleep(time.Second)
	reportStall(t, h, "n3 is killed", stallLimit)
	h.end()
	h.verify(n2, false)
	if now := rig.ImageSum(t, n2.URI("v@before")); now != before {
		t.Error("the snapshot has changed")
	}
	f.Back(wholeLimit, 2)

	h.start(n2)
	time.Sleep(500 * time.Millisecond)
	alter(t, n3, 3, "2")
	expectAlteredBy(t, n2, 1)
	h.end()
	expectAltered(t, f, h, 2, before)
	for _, s := range f.Nodes {
		rig.Contains(t, s.Dog("cluster", "check"), "objects are as they should be")
	}
}

// A node that is killed while it alters the copies has changed nothing. Another one begins anew, and what the first one
// has left is removed. Writes that it was carrying out may have left objects where the volume is, until the next sweep.
func TestAlterCopiesInterrupted(t *testing.T) {
	f, h, before := beingWritten(t, 2, 0)
	n1, n2 := f.Nodes[0], f.Nodes[1]
	h.mayFail.Store(true)
	ended := make(chan rig.Result, 1)
	go func() { ended <- n1.DogRun("vdi", "alter-copy", "v", "-c", "3") }()
	time.Sleep(150 * time.Millisecond)
	n1.Kill()
	if r := <-ended; r.Code == 0 {
		t.Log("it was through before it was killed")
	}
	h.end()
	h.mayFail.Store(false)
	h.verify(n2, false)

	h.start(n2)
	n2.Dog("vdi", "alter-copy", "v", "-c", "3")
	h.end()
	f.Back(wholeLimit, 0)
	expectAltered(t, f, h, 3, before)
}

// alterAsked is what a node logs that alters copies because another one was asked to.
const alterAsked = `copies are to be altered`

func expectAlteredBy(t *testing.T, s *rig.Sheep, times int) {
	t.Helper()
	if n := strings.Count(s.Log(), alterAsked); n != times {
		t.Errorf("%s has altered copies %d times that another node was asked for, want %d", s.Host(), n, times)
	}
}

// The node that writes a volume is killed while it alters the copies for another one. That says so at once; nothing is
// changed or lost, and asked again it does so itself.
func TestAlterCopiesWriterKilled(t *testing.T) {
	f, h, before := beingWritten(t, 2, 1)
	n1, n2 := f.Nodes[0], f.Nodes[1]
	time.Sleep(500 * time.Millisecond) // n2 owns it again
	h.mayFail.Store(true)
	ended := make(chan rig.Result, 1)
	go func() { ended <- n1.DogRun("vdi", "alter-copy", "v", "-c", "3") }()
	for deadline := time.Now().Add(10 * time.Second); !strings.Contains(n2.Log(), alterAsked); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("n2 is not asked: %+v", <-ended)
		}
	}
	n2.Kill()
	killed := time.Now()
	r := <-ended
	t.Logf("%v after n2 was killed: %s%s", time.Since(killed).Round(time.Millisecond), r.Stdout, r.Stderr)
	if r.Code != 1 || !strings.Contains(r.Stderr, `"n2"`) || !strings.Contains(r.Stderr, "ask again") {
		t.Errorf("status %d", r.Code)
	}
	h.end()
	h.mayFail.Store(false)
	h.verify(n1, false)

	h.start(f.Nodes[2])
	n1.Dog("vdi", "alter-copy", "v", "-c", "3")
	h.end()
	f.Back(wholeLimit, 1)
	expectAltered(t, f, h, 3, before)
}

// A volume and its clone are written through two nodes all the time. Copies are altered nevertheless, through one of them or
// a third one: writes wait, and none fails.
func TestAlterCopiesWrittenThroughTwo(t *testing.T) {
	f := rig.NewFlock(t, 3, 2)
	n1, n2, n3 := f.Nodes[0], f.Nodes[1], f.Nodes[2]
	v := newHerder(t, f, "v")
	n1.Dog("vdi", "snapshot", "v", "-s", "empty")
	n1.Dog("vdi", "clone", "v", "c", "-s", "empty")
	f.Know("c")
	c := herderOf(t, f, "c")
	v.start(n1)
	c.start(n2)
	time.Sleep(time.Second)
	reportStall(t, v, "undisturbed", stallLimit)
	for i, s := range []*rig.Sheep{n3, n2, n1} {
		began := time.Now()
		// A machine too busy for the others to wait so long refuses it: what is copied by then is made use of.
		eventually(t, time.Minute, "copies are altered", func() error {
			r := s.DogRun("vdi", "alter-copy", "v", "-c", fmt.Sprint(3-i%2))
			if r.Code != 0 && !strings.Contains(r.Stderr, "is written") {
				t.Fatalf("status %d: %s", r.Code, r.Stderr)
			}
			if r.Code != 0 {
				return errors.New(r.Stderr)
			}
			t.Logf("%s%v", r.Stdout, time.Since(began).Round(time.Millisecond))
			return nil
		})
		reportStall(t, v, "through n1", 2*time.Second)
		reportStall(t, c, "through n2", 2*time.Second)
	}
	v.end()
	c.end()
	awaitCollected(t, f)
	for _, s := range f.Nodes {
		v.verify(s, false)
		c.verify(s, false)
		rig.Contains(t, s.Dog("cluster", "check"), "objects are as they should be")
	}
}

// beingWritten returns three nodes and a client that writes a volume v of so many copies through one of them, and the sum
// of its snapshot "before".
func beingWritten(t *testing.T, copies, through int) (f *rig.Flock, h *herder, before string) {
	t.Helper()
	f = rig.NewFlock(t, 3, copies)
	h = newHerder(t, f, "v")
	h.start(f.Nodes[through])
	time.Sleep(time.Second)
	f.Nodes[0].Dog("vdi", "snapshot", "v", "-s", "before")
	return f, h, rig.ImageSum(t, f.Nodes[1-through].URI("v@before"))
}

// expectAltered fails unless v has so many copies, its content and that of its snapshot are what they were through every
// node, and no check finds anything but what a cut write has left.
func expectAltered(t *testing.T, f *rig.Flock, h *herder, copies int, before string) {
	t.Helper()
	expectCopies(t, f, copies)
	for _, s := range f.Nodes {
		h.verify(s, false)
		if now := rig.ImageSum(t, s.URI("v@before")); now != before {
			t.Errorf("the snapshot has changed, through %s", s.Host())
		}
	}
	awaitCollected(t, f)
	for _, s := range f.Nodes {
		var r checkReport
		s.DogJSON(&r, "cluster", "check")
		for _, p := range r.Problems {
			// What is left in a policy that is not the volume's is of this kind, too, and said in other words.
			if p.Kind != "leftover" || !strings.HasPrefix(p.Text, "no map names object") {
				t.Errorf("through %s a check finds %+v", s.Host(), p)
			}
		}
		if r.Objects == 0 {
			t.Errorf("through %s a check finds no objects", s.Host())
		}
	}
}

// alter has a node alter the copies of v, which it must say are so many.
func alter(t *testing.T, s *rig.Sheep, from int, to string) {
	t.Helper()
	var a struct {
		From, To int
		VDIs     []string `json:"vdis"`
		Copied   int64
		Pause    float64
	}
	s.DogJSON(&a, "vdi", "alter-copy", "v", "-c", to)
	t.Logf("from %d copies to %d: %d MiB were copied, writes waited for %.0f ms", a.From, a.To, a.Copied>>20, 1000*a.Pause)
	if a.From != from || a.Copied == 0 || !slices.Equal(a.VDIs, []string{"v", "v@before"}) {
		t.Errorf("altered to %s copies: %+v", to, a)
	}
}

func expectCopies(t *testing.T, f *rig.Flock, want int) {
	t.Helper()
	for _, s := range f.Nodes {
		for _, snapshot := range []string{"", "before"} {
			var v struct{ Copies int }
			what := []string{"vdi", "info", "v"}
			if snapshot != "" {
				what = append(what, "-s", snapshot)
			}
			if s.DogJSON(&v, what...); v.Copies != want {
				t.Errorf("%s says that v %s has %d copies, want %d", s.Host(), snapshot, v.Copies, want)
			}
		}
	}
}

// awaitCollected waits until garbage is collected, as every node knows.
func awaitCollected(t *testing.T, f *rig.Flock) {
	t.Helper()
	for _, s := range f.Nodes {
		eventually(t, 15*time.Second, "what is not used any more is removed", func() error {
			if n := pendingGarbage(s); n > 0 {
				return fmt.Errorf("%s has %d to remove", s.Host(), n)
			}
			return nil
		})
	}
}
