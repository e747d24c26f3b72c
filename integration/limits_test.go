package integration

import (
	"fmt"
	"testing"
	"time"

	"sheepdog/integration/client"
	"sheepdog/integration/rig"
)

// Volumes are thin: a new one of a terabyte, or of 64, costs next to nothing.
func TestThinVolumes(t *testing.T) {
	s := rig.Start(t, rig.Options{})
	s.Dog("vdi", "create", "warm", "1G")
	before := rig.DiskUsage(t, s.Disks[0])
	const most = 50 * time.Millisecond
	volumes := 0
	best := quickest(5, most, func() { // includes starting dog
		volumes++
		s.Dog("vdi", "create", fmt.Sprint("thin", volumes), "1T")
	})
	used := (rig.DiskUsage(t, s.Disks[0]) - before) / int64(volumes)
	t.Logf("create of 1 TiB: %v with dog's start, %d bytes each", best, used)
	if best > most*patience() {
		t.Errorf("creating 1 TiB took %v, want under %v", best, most*patience())
	}
	if used > 1<<20 {
		t.Errorf("thin volumes take %d bytes each, want under 1 MiB", used)
	}
	s.Dog("vdi", "create", "huge", "64T")
	p := rig.Random(1, 70_000)
	const off = 64<<40 - 70_000
	mustWrite(t, s, "huge", off, p)
	mustRead(t, s, "huge", off, p)
	mustRead(t, s, "huge", 17<<40, make([]byte, 4096))
}

// A snapshot of a volume of 256 GiB, one block written in every object (in every fourth one outside make soak), takes under 200 ms, and so does a
// clone; and the daemon is back in under 2 s with all those objects.
func TestSnapshotOfLargeVolume(t *testing.T) {
	s := rig.Start(t, rig.Options{})
	s.Dog("vdi", "create", "vm", "256G")
	c := s.Dial("vm")
	objects := uint64(256 << 30 / (4 << 20))
	if !soaking() {
		objects /= 4
	}
	p := rig.Random(1, 4096)
	window := make(chan (<-chan error), 64)
	failed := make(chan error, 1)
	go func() {
		defer close(failed)
		for r := range window {
			if err := <-r; err != nil {
				select {
				case failed <- err:
				default: // the first one is enough
				}
			}
		}
	}()
	began := time.Now()
	for i := range objects {
		window <- c.Start(client.CmdWrite, 0, i<<22, 4096, p)
	}
	close(window)
	for err := range failed {
		t.Fatal(err)
	}
	if err := c.Flush(); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d objects made in %v", objects, time.Since(began))
	const most = 200 * time.Millisecond
	snapshots := uint64(0)
	best := quickest(5, most, func() {
		snapshots++
		p = rig.Random(snapshots, 4096)
		mustWrite(t, s, "vm", snapshots<<22, p)
		s.Dog("vdi", "snapshot", "vm", "-s", fmt.Sprint("s", snapshots))
	})
	t.Logf("a write and a snapshot: %v with dog's start", best)
	if best > most*patience() {
		t.Errorf("the quickest of %d snapshots took %v, want under %v", snapshots, best, most*patience())
	}
	began = time.Now()
	s.Dog("vdi", "clone", "vm", "copy", "-s", fmt.Sprint("s", snapshots))
	t.Logf("clone: %v with dog's start", time.Since(began))
	mustRestart(t, s, fmt.Sprintf("after a crash with %d objects", objects), s.Kill)
	mustRestart(t, s, "after a clean stop", s.Stop)
	mustRead(t, s, "vm", snapshots<<22, p)
	mustRead(t, s, "copy", snapshots<<22, p)
}

// quickest is how long something takes at best, of so many times, or some more until it is as quick as it shall be: the machine may have
// other things to do, but hardly all the time.
func quickest(times int, shall time.Duration, do func()) time.Duration {
	best := time.Hour
	for i := 0; i < times || i < 4*times && best > shall; i++ {
		began := time.Now()
		do()
		best = min(best, time.Since(began))
	}
	return best
}

// mustRestart ends the daemon and checks that it answers again in under 2 s, as make soak measures it. The disk is shared with others: the
// quickest of a few attempts counts.
func mustRestart(t *testing.T, s *rig.Sheep, what string, end func()) {
	t.Helper()
	const attempts = 4
	limit := 2 * time.Second * patience()
	best := time.Hour
	for i := 0; i < attempts && best > limit; i++ {
		end()
		took := s.Start()
		t.Logf("restart %s: %v", what, took)
		best = min(best, took)
	}
	if best > limit {
		t.Errorf("the quickest of %d restarts %s took %v, want under %v", attempts, what, best, limit)
	}
}
