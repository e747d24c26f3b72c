package integration

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sheepdog/integration/rig"
)

// twoDisks gives each node two disks in a directory of the test's.
func twoDisks(t *testing.T) func(number int) []string {
	t.Helper()
	dir := t.TempDir()
	return func(number int) (disks []string) {
		for i := range 2 {
			d := filepath.Join(dir, fmt.Sprint(number), fmt.Sprint(i))
			if err := os.MkdirAll(d, 0o755); err != nil {
				t.Fatal(err)
			}
			disks = append(disks, d)
		}
		return disks
	}
}

// available waits until no partition is without a node that serves it.
func available(t *testing.T, f *rig.Flock, s *rig.Sheep) {
	t.Helper()
	var c struct {
		Policies []struct{ Unavailable int }
	}
	for deadline := time.Now().Add(wholeLimit); ; time.Sleep(50 * time.Millisecond) {
		s.DogJSON(&c, "cluster", "info")
		unavailable := 0
		for _, p := range c.Policies {
			unavailable += p.Unavailable
		}
		if len(c.Policies) > 0 && unavailable == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d partitions are not available", unavailable)
		}
	}
}

// A disk is taken out, and nothing is waited for from it, whatever the node has kept of what is on the other
// one: neither when the node is killed right away and is the only one left that has what it has, nor later.
func TestFlockUnplugsThenDies(t *testing.T) {
	besideOthers(t)
	f := rig.NewFlockOf(t, 3, 2, rig.FlockOptions{Disks: twoDisks(t)})
	spread(t, f.Nodes[2], 32) // most partitions are empty: nothing but marks, which are kept now and then, tells that a node has them
	n1, n2, n3 := f.Nodes[0], f.Nodes[1], f.Nodes[2]
	out := n2.Disks[1]
	n3.Dog("node", "md", "unplug", out, "--node", "n2")
	f.WaitWhole(wholeLimit)
	n1.Kill()
	awaitMember(t, f, n3, "n1", func(m rig.Member) bool { return m.State == "down" })
	n2.Kill()
	if err := os.Remove(filepath.Join(n2.Disks[0], "marks")); err != nil && !errors.Is(err, fs.ErrNotExist) { // as if they were not kept yet
		t.Fatal(err)
	}
	n2.DropDisk(out)
	n2.Start()
	awaitMember(t, f, n3, "n2", func(m rig.Member) bool { return m.State == "up" && m.Incarnation == 2 })
	available(t, f, n3)
	f.Back(wholeLimit, 0)
	checkSpread(t, n3, 32)
	f.Nodes[0].Dog("cluster", "check")
}

// A node is killed while a disk is taken out, at any time, and starts with that disk, or without it if it was
// told that it is out: it comes back, has what it had, and the disk can be taken out.
func TestFlockDiesWhileItUnplugs(t *testing.T) {
	besideOthers(t)
	f := rig.NewFlockOf(t, 3, 2, rig.FlockOptions{Disks: twoDisks(t)})
	spread(t, f.Nodes[2], 64)
	n2 := f.Nodes[1]
	out := n2.Disks[1]
	longest := 2 * time.Second
	for round := range max(4, crashRounds(0)) {
		if round > 0 {
			n2.Dog("node", "md", "plug", "--empty", out)
			n2.AddDisk(out)
			f.WaitWhole(wholeLimit)
		}
		done := make(chan int, 1)
		began := time.Now()
		go func() { done <- f.Nodes[0].DogRun("node", "md", "unplug", out, "--node", "n2").Code }()
		time.Sleep(longest * time.Duration(round%4) / 4)
		n2.Kill()
		code := <-done
		t.Logf("round %d: killed after %v, status %d", round, time.Since(began).Round(time.Millisecond), code)
		f.Back(wholeLimit, 1)
		f.Nodes[0].Dog("cluster", "check")
		checkSpread(t, f.Nodes[2], 64)
		n2.Dog("node", "md", "unplug", out)
		n2.Kill()
		n2.DropDisk(out)
		f.Back(wholeLimit, 1)
		f.Nodes[0].Dog("cluster", "check")
		checkSpread(t, f.Nodes[2], 64)
	}
}

// A node that is alone keeps all that it has when a disk is added to it, and when one is taken out, under load, killed
// in between or not.
func TestLonelyNodeUnplugs(t *testing.T) {
	besideOthers(t)
	f := rig.NewFlockOf(t, 1, 1, rig.FlockOptions{Disks: twoDisks(t)})
	n := f.Nodes[0]
	spread(t, n, 64)
	h := newHerder(t, f, "v")
	h.start(n)
	time.Sleep(time.Second)
	h.stall()
	out := n.Disks[1]
	n.Dog("node", "md", "unplug", out)
	reportStall(t, h, "a disk is taken out of the only node", stallLimit)
	if names, err := os.ReadDir(filepath.Join(out, "objects")); err != nil || len(names) > 0 {
		t.Errorf("the disk that is out has %d partitions: %v", len(names), err)
	}
	h.end()
	n.Kill()
	n.DropDisk(out)
	n.Start()
	checkSpread(t, n, 64)
	h.verify(n, false)
	n.Dog("node", "md", "plug", out)
	n.AddDisk(out)
	time.Sleep(time.Duration(time.Now().UnixNano()%50) * time.Millisecond) // somewhere in the midst of the moves
	n.Kill()
	n.Start()
	awaitEven(t, n, "n1")
	checkSpread(t, n, 64)
	h.verify(n, false)
	n.Dog("cluster", "check")
}

// A disk has what only this node has, and the node's other disk has no room for it: that is said, with what to do, nothing
// is lost, and the disk works on. After a volume was deleted there is room, and the disk can be taken out.
func TestUnplugNeedsRoom(t *testing.T) {
	besideOthers(t)
	small, large := rig.Tmpfs(t, "256M"), rig.Tmpfs(t, "1G")
	f := rig.NewFlockOf(t, 1, 1, rig.FlockOptions{
		Disks:  func(int) []string { return []string{small, large} },
		Config: "storage:\n  log_limit: 16M\n",
	})
	n := f.Nodes[0]
	n.Dog("vdi", "create", "kept", "400M")
	n.Dog("vdi", "create", "other", "400M")
	write := func(volume string, count int) (written []int) {
		conn := n.Dial(volume)
		defer conn.Close()
		for i := range count {
			if err := conn.Write(piece(i), uint64(i)<<20, 0); err != nil {
				t.Fatalf("write piece %d of %s: %v", i, volume, err)
			}
			written = append(written, i)
		}
		if err := conn.Flush(); err != nil {
			t.Fatal(err)
		}
		return written
	}
	kept, other := write("kept", 80), write("other", 240)

	for range 2 { // asked again it is no other
		r := n.DogRun("node", "md", "unplug", large)
		if r.Code != 1 || !strings.Contains(r.Stderr, "this node alone has") || !strings.Contains(r.Stderr, "space") || !strings.Contains(r.Stderr, "dog node md plug") {
			t.Fatalf("a disk is taken out for whose content there is no room: status %d, %s%s", r.Code, r.Stdout, r.Stderr)
		}
	}
	verifyPieces(t, n, "kept", kept)
	verifyPieces(t, n, "other", other)
	conn := n.Dial("kept")
	for _, i := range kept { // over what is there: that needs no space
		if err := conn.Write(piece(i), uint64(i)<<20, 0); err != nil {
			t.Fatalf("overwrite piece %d: %v", i, err)
		}
	}
	conn.Close()
	n.Kill()
	n.Start()
	verifyPieces(t, n, "kept", kept)
	verifyPieces(t, n, "other", other)
	n.Dog("cluster", "check")

	n.Dog("vdi", "delete", "other")
	eventually(t, wholeLimit, "the disk can be taken out", func() error {
		if r := n.DogRun("node", "md", "unplug", large); r.Code != 0 {
			return errors.New(r.Stderr)
		}
		return nil
	})
	verifyPieces(t, n, "kept", kept)
	n.Kill()
	n.DropDisk(large)
	n.Start()
	verifyPieces(t, n, "kept", kept)
	n.Dog("cluster", "check")
}

// checkSpread looks whether all is there that spread has written.
func checkSpread(t *testing.T, s *rig.Sheep, objects int) {
	t.Helper()
	conn := s.Dial("spread")
	defer conn.Close()
	want, got := make([]byte, blockSize), make([]byte, blockSize)
	for i := range objects {
		content(want, uint64(i), 1)
		if err := conn.Read(got, uint64(i)<<22); err != nil || string(got) != string(want) {
			t.Fatalf("object %d: %v, or other content", i, err)
		}
	}
}
