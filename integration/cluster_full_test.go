package integration

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"sheepdog/integration/client"
	"sheepdog/integration/rig"
)

const (
	// fullReserve is what nodes keep free of the disks of these tests, in bytes: what a small disk with a node's state needs.
	fullReserve = 16 << 20
	// brim is what others leave of that.
	brim = 12 << 20
)

// ballast is a file by which others take space on a sheep's disk.
type ballast struct {
	t    *testing.T
	path string
}

func ballastOn(t *testing.T, s *rig.Sheep) ballast {
	return ballast{t, filepath.Join(s.Disks[0], "ballast")}
}

// leave has the ballast be such that so many bytes of the disk are free.
func (b ballast) leave(bytes int64) {
	b.t.Helper()
	f, err := os.OpenFile(b.path, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		b.t.Fatal(err)
	}
	defer f.Close()
	var space syscall.Statfs_t
	var own syscall.Stat_t
	if err = syscall.Fstatfs(int(f.Fd()), &space); err == nil {
		err = syscall.Fstat(int(f.Fd()), &own)
	}
	size := own.Size + int64(space.Bavail)*space.Bsize - bytes
	if err == nil && size > own.Size {
		err = syscall.Fallocate(int(f.Fd()), 0, 0, size)
	} else if err == nil {
		err = f.Truncate(max(size, 0))
	}
	if err != nil {
		b.t.Fatal(err)
	}
}

// freeOn is how many bytes of a sheep's disk are free.
func freeOn(t *testing.T, s *rig.Sheep) int64 {
	t.Helper()
	var space syscall.Statfs_t
	if err := syscall.Statfs(s.Disks[0], &space); err != nil {
		t.Fatal(err)
	}
	return int64(space.Bavail) * space.Bsize
}

// writePieces writes pieces of a volume, the given number of each plus shift, so that what is there is known to be new.
func writePieces(t *testing.T, s *rig.Sheep, volume string, pieces []int, shift int) {
	t.Helper()
	conn := s.Dial(volume)
	defer conn.Close()
	for _, i := range pieces {
		if err := conn.Write(piece(i+shift), uint64(i)<<20, 0); err != nil {
			t.Fatalf("write over piece %d of %s: %v", i, volume, err)
		}
	}
	if err := conn.Flush(); err != nil {
		t.Fatal(err)
	}
}

// samePieces reads them back.
func samePieces(t *testing.T, s *rig.Sheep, volume string, pieces []int, shift int) {
	t.Helper()
	conn := s.Dial(volume)
	defer conn.Close()
	buf := make([]byte, 1<<20)
	for _, i := range pieces {
		if err := conn.Read(buf, uint64(i)<<20); err != nil || !bytes.Equal(buf, piece(i+shift)) {
			t.Fatalf("through %s, piece %d of %s is not what was written: %v", s.Host(), i, volume, err)
		}
	}
}

// checkFull has a node check the cluster, of which it must find something, and nothing wrong but that disks are full.
func checkFull(t *testing.T, s *rig.Sheep, when string) {
	t.Helper()
	var r checkReport
	out := s.DogRun("-o", "json", "cluster", "check")
	if err := json.Unmarshal([]byte(out.Stdout), &r); err != nil || r.Objects == 0 {
		t.Fatalf("%s: a check finds %d objects and ends with %v: %s", when, r.Objects, err, out.Stderr)
	}
	for _, p := range r.Problems {
		if p.Kind != "leftover" && (p.Kind != "disk" || !strings.Contains(p.Text, "is full")) {
			t.Errorf("%s: a check finds %+v", when, p)
		}
	}
}

// On disks without any space left, nodes that were away become whole: what was written over meanwhile needs no space,
// and what was deleted gives way to what came in its place. What needs space waits for it, and says so.
func TestFlockReturnsToFullDisks(t *testing.T) {
	besideOthers(t)
	f := rig.NewFlockOf(t, 3, 3, rig.FlockOptions{
		Disks:  func(int) []string { return []string{rig.Tmpfs(t, "256M")} },
		Config: fmt.Sprintf("storage:\n  log_limit: 16M\n  reserve: %d\n", fullReserve),
	})
	a, b, c := f.Nodes[0], f.Nodes[1], f.Nodes[2]
	for _, s := range f.Nodes {
		ballastOn(t, s).leave(176 << 20)
	}
	a.Dog("vdi", "create", "gone", "256M")
	f.Know("gone")
	// What comes in its place is so much less that clients find space whatever the nodes have needed themselves by then: 4 MiB
	// below the reserve, 8 for the cluster's log, 14 for the rest of the disk's. From 20 MiB above the reserve on they are let in
	// again, down to 16.
	all := make([]int, 64)
	for i := range all {
		all[i] = i
	}
	half := all[:32]
	writePieces(t, a, "gone", all, 0)
	a.Dog("vdi", "create", "kept", "2G")
	f.Know("kept")
	kept := fillFlock(t, a, "kept", 0, 2000)
	t.Logf("%d MiB fit", len(all)+len(kept))
	for _, s := range f.Nodes {
		ballastOn(t, s).leave(brim)
	}
	next := uint64(1500)
	full := func() { // nobody takes a write that needs space, once it is known
		t.Helper()
		conn := b.Dial("kept")
		defer conn.Close()
		eventually(t, 5*time.Second, "what needs space is refused", func() error {
			next++
			if err := conn.Write(piece(0)[:4096], next<<20, 0); err != client.ENOSPC {
				return fmt.Errorf("it has ended with %v", err)
			}
			return nil
		})
	}
	full()
	shift := 0
	again := func(when string) {
		t.Helper()
		for _, s := range f.Nodes {
			samePieces(t, s, "kept", kept, shift)
		}
		checkFull(t, a, when)
		full()
	}

	c.Kill()
	shift++
	writePieces(t, a, "kept", kept, shift)
	t.Logf("whole after %v", f.Back(wholeLimit, 2))
	again("after a node was killed")

	for i, s := range f.Nodes {
		s.Stop()
		shift++
		writePieces(t, f.Nodes[(i+1)%3], "kept", kept, shift)
		t.Logf("whole after %v", f.Back(wholeLimit, i))
	}
	again("after every node was stopped once")

	for _, s := range f.Nodes {
		s.Kill()
	}
	f.Back(wholeLimit, 0, 1, 2)
	again("after all were killed")

	// What the third node has of "gone" is in the way of what the others have of "new".
	c.Kill()
	a.Dog("vdi", "delete", "gone")
	a.Dog("vdi", "create", "new", "256M")
	fresh := half[:10]
	eventually(t, 40*time.Second, "the space of a volume is used again", func() error {
		conn := a.Dial("new")
		defer conn.Close()
		for _, i := range fresh {
			if err := conn.Write(piece(i), uint64(i)<<20, 0); err != nil {
				return err
			}
		}
		return conn.Flush()
	})
	t.Logf("whole after %v", f.Back(wholeLimit, 2))
	for _, s := range f.Nodes {
		samePieces(t, s, "new", fresh, 0)
		samePieces(t, s, "kept", kept, shift)
	}
	checkFull(t, a, "after a volume had taken the place of another")

	// Others leave no space for what is new. What needs none is brought. What the disk has given back counts, not what it will.
	eventually(t, time.Minute, "the space of the deleted volume is given back", func() error {
		if free := freeOn(t, c); free < brim+40<<20 {
			return fmt.Errorf("%d MiB are free", free>>20)
		}
		return nil
	})
	c.Kill()
	for _, s := range []*rig.Sheep{a, b} {
		ballastOn(t, s).leave(100 << 20)
	}
	ballastOn(t, c).leave(brim)
	more := half[10:]
	eventually(t, 40*time.Second, "there is space", func() error {
		conn := b.Dial("new")
		defer conn.Close()
		for _, i := range more {
			if err := conn.Write(piece(i), uint64(i)<<20, 0); err != nil {
				return err
			}
		}
		return conn.Flush()
	})
	shift++
	writePieces(t, b, "kept", kept, shift)
	c.Start()
	var p struct {
		Transfers []struct{ Node, Waits string }
	}
	eventually(t, wholeLimit, "recovery waits for space", func() error {
		a.DogJSON(&p, "node", "recovery")
		for _, x := range p.Transfers {
			if x.Node == "n3" && strings.Contains(x.Waits, "space") {
				return nil
			}
		}
		return fmt.Errorf("%+v", p)
	})
	rig.Contains(t, a.Dog("node", "recovery"), "n3 waits: the node has no space for some of it")
	if logs := a.Log() + b.Log(); !strings.Contains(logs, "recovery of a node waits for space") {
		t.Error("no log says that recovery waits for space")
	}
	ballastOn(t, c).leave(80 << 20)
	f.WaitWhole(wholeLimit)
	for _, s := range f.Nodes {
		samePieces(t, s, "new", half, 0)
		samePieces(t, s, "kept", kept, shift)
		noPanic(t, s)
	}
	checkFull(t, a, "after there was space again")
}
