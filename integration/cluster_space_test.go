package integration

import (
	"bytes"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"sheepdog/integration/client"
	"sheepdog/integration/rig"
)

// smallFlock has disks of so many bytes, in memory.
func smallFlock(t *testing.T, n, copies int, size string) *rig.Flock {
	return rig.NewFlockOf(t, n, copies, rig.FlockOptions{
		Disks:  func(int) []string { return []string{rig.Tmpfs(t, size)} },
		Config: "storage:\n  log_limit: 16M\n",
	})
}

// fillFlock writes 1 MiB pieces of a volume, each once, several at a time, until there is no space, and
// returns which were answered. What else fails fails the test.
func fillFlock(t *testing.T, s *rig.Sheep, volume string, first, count int) (written []int) {
	t.Helper()
	conn := s.Dial(volume)
	defer conn.Close()
	var mu sync.Mutex
	var wg sync.WaitGroup
	next, full := first, 0
	for range 8 {
		wg.Go(func() {
			for {
				mu.Lock()
				i := next
				next++
				stop := i >= first+count || full > 16
				mu.Unlock()
				if stop {
					return
				}
				err := conn.Write(piece(i), uint64(i)<<20, 0)
				mu.Lock()
				switch {
				case err == nil:
					written = append(written, i)
				case errors.Is(err, client.ENOSPC):
					full++
				default:
					t.Errorf("write piece %d of %s: %v", i, volume, err)
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if full == 0 {
		t.Fatalf("%d MiB were written to %s, and there is still space", count, volume)
	}
	return written
}

func piece(i int) []byte { return bytes.Repeat([]byte{byte(i), byte(i >> 8), 7, 1}, 1<<18) }

func verifyPieces(t *testing.T, s *rig.Sheep, volume string, written []int) {
	t.Helper()
	conn := s.Dial(volume)
	defer conn.Close()
	buf := make([]byte, 1<<20)
	for _, i := range written {
		if err := conn.Read(buf, uint64(i)<<20); err != nil {
			t.Fatalf("read piece %d of %s: %v", i, volume, err)
		}
		if !bytes.Equal(buf, piece(i)) {
			t.Fatalf("piece %d of %s is not what was written", i, volume)
		}
	}
}

// A full cluster refuses what needs space before any node has it, and stays whole: everything else goes
// on, nodes restart, and space that is given back is used.
func TestFlockFull(t *testing.T) {
	besideOthers(t)
	f := smallFlock(t, 3, 3, "320M")
	f.Nodes[0].Dog("vdi", "create", "kept", "8M")
	kept := f.Nodes[0].Dial("kept")
	defer kept.Close()
	for i := range 8 {
		if err := kept.Write(piece(i), uint64(i)<<20, 0); err != nil {
			t.Fatal(err)
		}
	}
	f.Nodes[0].Dog("vdi", "create", "a", "2G")
	f.Nodes[1].Dog("vdi", "create", "b", "2G")
	var a, b []int
	var wg sync.WaitGroup
	wg.Go(func() { a = fillFlock(t, f.Nodes[0], "a", 0, 2000) })
	wg.Go(func() { b = fillFlock(t, f.Nodes[1], "b", 0, 2000) })
	wg.Wait()
	if t.Failed() {
		t.FailNow()
	}
	t.Logf("%d MiB fit", len(a)+len(b))
	for _, p := range f.Partitions(f.Nodes[0]) {
		if len(p.InSync) != 3 {
			t.Fatalf("a full disk has taken its node out of a partition: %+v", p)
		}
	}
	for i := range 8 { // over what is there already
		if err := kept.Write(piece(i+100), uint64(i)<<20, 0); err != nil {
			t.Fatalf("overwrite in place: %v", err)
		}
	}
	if err := kept.Flush(); err != nil {
		t.Fatal(err)
	}
	for i := range f.Nodes {
		f.Nodes[i].Stop()
		f.Back(wholeLimit, i)
	}
	for _, s := range f.Nodes {
		s.Kill()
	}
	f.Back(wholeLimit, 0, 1, 2)
	for i, s := range f.Nodes {
		verifyPieces(t, s, []string{"a", "b", "a"}[i], [][]int{a, b, a}[i])
	}
	again := f.Nodes[2].Dial("kept")
	defer again.Close()
	buf := make([]byte, 1<<20)
	for i := range 8 {
		if err := again.Read(buf, uint64(i)<<20); err != nil || !bytes.Equal(buf, piece(i+100)) {
			t.Fatalf("what was written over kept is not there: %v", err)
		}
	}
	f.Nodes[2].Dog("vdi", "delete", "a")
	deadline := time.Now().Add(40 * time.Second * patience())
	conn := f.Nodes[2].Dial("b")
	defer conn.Close()
	for i := 1500; i < 1520; {
		switch err := conn.Write(piece(i), uint64(i)<<20, 0); {
		case err == nil:
			i++
		case !errors.Is(err, client.ENOSPC):
			t.Fatal(err)
		case time.Now().After(deadline):
			t.Fatal("a volume was deleted, and there is no space")
		default:
			time.Sleep(200 * time.Millisecond)
		}
	}
	for _, s := range f.Nodes {
		if bad := s.Log(); bytes.Contains([]byte(bad), []byte("panic")) {
			t.Error(fmt.Sprint("a node panicked:\n", bad))
		}
	}
}
