package storage_test

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"sheepdog/storage/disk/disktest"
	"sheepdog/storage/object"
)

// crashCase is one workload with one power cut in it. A case that failed once stays
// in TestCrashRegressions with its numbers.
type crashCase struct {
	seed  uint64 // of the workload
	disks int
	steps int
	shift uint8 // of all objects; 0: objects of several sizes
	at    int64 // operation of the victim disk at which the power goes; 0: after the last step
}

func (c crashCase) String() string {
	return fmt.Sprintf("seed %d, %d disks, %d steps, shift %d, crash at %d", c.seed, c.disks, c.steps, c.shift, c.at)
}

// run carries out the workload up to the crash. It reports whether the power went
// while it ran.
func (c crashCase) run(t testing.TB) (*rig, bool) {
	t.Helper()
	objects := testKeys()
	if c.shift != 0 {
		objects = sizedKeys(c.shift)
	}
	r := newRigOf(t, c.seed, c.disks, objects)
	victim := r.disks[c.seed%uint64(c.disks)]
	victim.CrashAt(c.at)
	if err := r.open(); err != nil {
		if !r.crashed() {
			r.fatalf("%v: open: %v", c, err)
		}
	} else {
		r.work(c.steps)
	}
	early := r.crashed()
	r.crash()
	return r, early
}

// work carries out steps until they are done or the power is gone.
func (r *rig) work(steps int) {
	r.t.Helper()
	for i := 0; i < steps && !r.crashed(); i++ {
		if err := r.step(); err != nil && !r.crashed() {
			r.fatalf("step %d: %v", i, err)
		}
	}
}

// outcomes is how many power cuts of each kind follow one crash: with nothing, with
// everything and with some of what was not synced.
var survivors = []uint64{0, 1, 2, 3}

// recover checks what may come of a crash: each survivor is opened and checked, then
// it loses power again while it recovers, and again after it has gone on working.
func (c crashCase) recover(t testing.TB, r *rig) {
	t.Helper()
	for _, s := range survivors {
		if s > 1 {
			s += c.seed<<20 + uint64(c.at)<<2
		}
		f := r.fork(s, func(_ int, d *disktest.Disk) *disktest.Disk { return d.Reopen(s) })
		f.trace.add("power cut, seed %d", s)
		f.survive(c, cut)
	}
	f := r.fork(uint64(c.at), func(_ int, d *disktest.Disk) *disktest.Disk { return d.Restart() })
	f.trace.add("killed")
	f.survive(c, killed)
}

// survive opens a rig whose disks have just been through something.
func (r *rig) survive(c crashCase, f fate) {
	r.t.Helper()
	if r.rng.IntN(2) == 0 {
		// Once more, while it recovers.
		r.disks[r.rng.IntN(len(r.disks))].CrashAt(1 + r.rng.Int64N(12))
		err := r.open()
		if err != nil && !r.crashed() {
			r.fatalf("%v: open: %v", c, err)
		}
		r.crash()
		s := r.rng.Uint64N(6)
		r.trace.add("power cut in recovery, seed %d", s)
		*r = *r.fork(s, func(_ int, d *disktest.Disk) *disktest.Disk { return d.Reopen(s) })
		f = cut
	}
	if err := r.open(); err != nil {
		r.fatalf("%v: open after the crash: %v", c, err)
	}
	r.verify(f)
	r.work(6)
	switch r.rng.IntN(4) {
	case 0:
		r.mustClose()
		r.reborn((*disktest.Disk).Restart)
		f = closed
	default:
		r.crash()
		s := r.rng.Uint64N(6)
		r.trace.add("power cut after recovery, seed %d", s)
		r.reborn(func(d *disktest.Disk) *disktest.Disk { return d.Reopen(s) })
		f = cut
	}
	if err := r.open(); err != nil {
		r.fatalf("%v: open after the second crash: %v", c, err)
	}
	r.verify(f)
	r.mustClose()
}

// reborn replaces the disks by what is made of them.
func (r *rig) reborn(make func(*disktest.Disk) *disktest.Disk) {
	for i, d := range r.disks {
		r.disks[i] = make(d)
	}
}

// TestCrashEverywhere cuts the power at every single operation that changes the disk;
// in a short run only at each second one of the longer workloads.
func TestCrashEverywhere(t *testing.T) {
	t.Parallel()
	for seed := range uint64(rounds(4)) {
		c := crashCase{seed: seed, disks: 1, steps: 30}
		if seed%4 == 3 {
			c.disks = 2
		}
		most := int64(1)
		if seed%4 == 1 || seed%4 == 2 {
			most = stride(2)
		}
		t.Run(fmt.Sprintf("seed %d", seed), func(t *testing.T) {
			t.Parallel()
			c.everywhere(t, most, 67)
		})
	}
}

// TestCrashEverySize does the same to objects of each size there is, at the places
// where regions and pages of the table meet.
func TestCrashEverySize(t *testing.T) {
	t.Parallel()
	largest := uint8(object.MaxSizeShift)
	if hurried(t) {
		largest = 26 // what is longer takes its time to be copied, and is no other case for the detector
	}
	for shift := uint8(object.MinSizeShift); shift <= largest; shift++ {
		for seed := range uint64(rounds(1)) {
			c := crashCase{seed: 2000 + seed*100 + uint64(shift), disks: 1, steps: 15, shift: shift}
			most := int64(4)
			switch {
			case shift >= 30: // tables of megabytes
				most = 50
			case shift >= 27:
				most = 12
			}
			t.Run(fmt.Sprintf("shift %d seed %d", shift, c.seed), func(t *testing.T) {
				t.Parallel()
				c.everywhere(t, stride(most), 60*most)
			})
		}
	}
}

// stride is 1 in a long run: there nothing is left out.
func stride(n int64) int64 {
	if rounds(1) > 1 {
		return 1
	}
	return n
}

// everywhere goes through the workload's operations with the given stride.
func (c crashCase) everywhere(t *testing.T, stride, raceStride int64) {
	if hurried(t) {
		stride = raceStride
	}
	for c.at = 1 + int64(c.seed)%stride; ; c.at += stride {
		r, early := c.run(t)
		c.recover(t, r)
		if !early {
			t.Logf("%d operations", c.at-1)
			return
		}
	}
}

// TestCrashAfterMuch cuts the power of disks that have long histories.
func TestCrashAfterMuch(t *testing.T) {
	t.Parallel()
	n := rounds(20)
	if hurried(t) {
		n /= 4
	}
	for seed := range uint64(n) {
		c := crashCase{seed: 1000 + seed, disks: 1 + int(seed%3), steps: 300}
		c.at = int64(200 + seed*97%1500)
		t.Run(fmt.Sprintf("seed %d", c.seed), func(t *testing.T) {
			t.Parallel()
			r, _ := c.run(t)
			c.recover(t, r)
		})
	}
}

// TestCrashRegressions holds the cases that failed once.
func TestCrashRegressions(t *testing.T) {
	for _, c := range []struct {
		name string
		crashCase
	}{
		// The head was written but not synced when the process was killed, and the next
		// opening used the segment that it retired before it synced the head.
		{"head not synced at kill", crashCase{seed: 1, disks: 1, steps: 30, at: 78}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, _ := c.run(t)
			c.recover(t, r)
		})
	}
}

// A first write is two records, that there is an object and its content, and the log may end between them: the daemon is
// killed, or the power goes, when one frame is full and the next not written. What nobody was answered then leaves an
// object without content, of zeros like its absence, which nothing takes for rot.
func TestFirstWriteInTwoFrames(t *testing.T) {
	const frameBlocks = 32 // a frame holds less, for its records
	content := filled(9000, 7)
	between := 0
	for fill := frameBlocks - 6; fill < frameBlocks; fill++ {
		d := disktest.New("d")
		s := mustOpen(t, quietConfig(d))
		for i := range uint32(2) { // what is known not to exist is written within Submit: nobody else has a part in it
			if _, err := s.Stat(t.Context(), keyOf(i)); !errors.Is(err, object.ErrNotFound) {
				t.Fatal(err)
			}
		}
		var frames atomic.Int64
		frame := disktest.Named("wal/segment-000", disktest.OpWrite) // the others are being prepared
		d.Hook(func(op disktest.Op) error {
			if frame(op) && frames.Add(1) == 2 {
				d.Crash()
				return disktest.ErrCrashed
			}
			return nil
		})
		var done sync.WaitGroup
		submit := func(q *object.Request) {
			done.Add(1)
			q.Done = func(*object.Request) { done.Done() }
			s.Submit(q)
		}
		for i := range uint32(fill) {
			submit(req(object.OpWrite, 0, i*4096, filled(4096, uint64(i))))
		}
		first := req(object.OpWrite, 1, 0, content)
		submit(first)
		s.Kick()
		done.Wait()
		d.Hook(nil)
		for name, found := range map[string]*disktest.Disk{"killed": d.Restart(), "cut, all is there": d.Reopen(1), "cut": d.Reopen(uint64(fill))} {
			what := fmt.Sprintf("%d blocks before it, %s", fill, name)
			s := mustOpen(t, quietConfig(found))
			q := req(object.OpRead, 1, 0, make([]byte, len(content)))
			switch err := call(s, q); {
			case errors.Is(err, object.ErrNotFound):
				if first.Err == nil && name == "killed" {
					t.Errorf("%s: the write was answered, and is lost", what)
				}
			case err != nil:
				t.Errorf("%s: %v", what, err)
			case isZero(q.Data):
				between++
				if first.Err == nil && name == "killed" {
					t.Errorf("%s: the content of a write that was answered is lost", what)
				}
				sums, err := s.Sums(t.Context(), keyOf(1))
				if err != nil || slices.ContainsFunc(sums, func(sum uint64) bool { return sum != 0 }) {
					t.Errorf("%s: it is no object of holes: %v", what, err)
				}
			case !bytes.Equal(q.Data, content):
				t.Errorf("%s: there is something else", what)
			}
			if err := call(s, req(object.OpWrite, 1, 0, content)); err != nil {
				t.Errorf("%s: write again: %v", what, err)
			}
			if err := call(s, q); err != nil || !bytes.Equal(q.Data, content) {
				t.Errorf("%s: read again: %v", what, err)
			}
			if err := s.Close(); err != nil {
				t.Errorf("%s: %v", what, err)
			}
		}
	}
	if between == 0 {
		t.Error("no frame ended between the records")
	}
}
