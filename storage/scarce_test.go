package storage_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"sheepdog/storage"
	"sheepdog/storage/disk/disktest"
	"sheepdog/storage/object"
)

// faults let single operations of disks fail, at random. What is tried again may succeed.
type faults struct {
	mu    sync.Mutex
	rng   *rand.Rand
	odds  int // one of so many operations that match fails
	left  int // so many more do
	err   error
	match func(disktest.Op) bool
	hits  int
}

// set has n operations fail, each one of so many that match.
func (f *faults) set(n, odds int, err error, match func(disktest.Op) bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.left, f.odds, f.err, f.match = n, odds, err, match
}

// end has no more fail.
func (f *faults) end() { f.set(0, 1, nil, nil) }

func (f *faults) hook(op disktest.Op) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.left == 0 || !f.match(op) || f.rng.IntN(f.odds) > 0 {
		return nil
	}
	f.left--
	f.hits++
	return f.err
}

// needsSpace: operations for which a file system may lack space, and which have not been done then. Segments of the log have theirs
// before they are written.
func needsSpace(op disktest.Op) bool {
	switch op.Kind {
	case disktest.OpCreate, disktest.OpMkdir, disktest.OpRemove, disktest.OpAllocate, disktest.OpPunch:
		return true
	case disktest.OpRename: // of notes: see TestMoveFindsNoSpaceForNotes; one that cannot be made, nor the other disk's taken back, ends a disk's service
		return strings.HasPrefix(op.Name, "new/")
	case disktest.OpWrite:
		return !strings.HasPrefix(op.Name, "wal/")
	}
	return false
}

// losesSpace: operations for which a file system may find that it has no space for what it had taken, as one that looks for it
// only when it writes, or that copies what it overwrites.
func losesSpace(op disktest.Op) bool {
	switch op.Kind {
	case disktest.OpSync, disktest.OpSyncDir:
		return true
	case disktest.OpWrite:
		return strings.HasPrefix(op.Name, "wal/")
	}
	return false
}

// breaks: operations with which a disk goes out of service if they fail.
func breaks(op disktest.Op) bool { return op.Kind.Changes() || op.Kind == disktest.OpRead }

// newScarceRig is a rig whose operations the faults may hit.
func newScarceRig(t *testing.T, seed uint64, disks int) (*rig, *faults) {
	objects := testKeys()
	for i := range uint32(8) { // so that checkpoints have others to do than those before
		key := object.Key{Group: object.Group{Policy: 1, Partition: object.Partition(20 + i)}, ID: object.DataID(20, i)}
		objects = append(objects, &testObject{key: key, shift: object.MinSizeShift})
	}
	r := newRigOf(t, seed, disks, objects)
	f := &faults{rng: rand.New(rand.NewPCG(seed, 2))}
	t.Cleanup(r.crash) // where the test fails: the bubble waits for what is left of the store
	cold := r.hook
	r.hook = func(op disktest.Op) error {
		if err := f.hook(op); err != nil {
			r.trace.add("%s: %v", op, err)
			return err
		}
		return cold(op)
	}
	return r, f
}

// strained is work with checkpoints, marks and pauses in between; steps may find no space. It ends early when a disk is out of service.
func (r *rig) strained(steps int) {
	r.t.Helper()
	for i := range steps {
		var err error
		switch k := r.rng.IntN(40); {
		case k < 5:
			err = r.checkpoint()
		case k == 5:
			err = r.store.KeepMarks(r.marks())
		case k < 8:
			time.Sleep(time.Duration(r.rng.Int64N(int64(2 * time.Second))))
		default:
			err = r.step()
		}
		switch {
		case errors.Is(err, object.ErrIO), err != nil && r.broken():
			return
		case errors.Is(err, object.ErrNoSpace):
			r.verify(killed) // what failed may have happened in part
		case err != nil:
			r.fatalf("step %d: %v", i, err)
		}
	}
}

// broken reports whether a disk is out of service.
func (r *rig) broken() bool {
	return slices.ContainsFunc(r.store.Status().Disks, func(d storage.DiskStatus) bool { return d.State == storage.StateFailed })
}

func (r *rig) checkpoint() (err error) {
	r.t.Helper()
	r.within("Checkpoint", func() { err = r.store.Checkpoint(context.Background()) })
	r.trace.add("checkpoint: %v", err)
	return err
}

// marks are some, of all groups.
func (r *rig) marks() map[object.Group]object.Version {
	marks := map[object.Group]object.Version{}
	for _, o := range r.model.objects {
		marks[o.key.Group] = object.Version{Epoch: 1, Seq: r.model.seq}
	}
	return marks
}

// scarce is work with little space, and then with enough, perhaps on a disk that breaks. Then the store comes to an end.
func (r *rig) scarce(f *faults) {
	r.t.Helper()
	f.set(1+r.rng.IntN(12), 1<<r.rng.IntN(8), syscall.ENOSPC, needsSpace)
	r.strained(5 + r.rng.IntN(30))
	f.set(1, 1<<r.rng.IntN(6), syscall.ENOSPC, needsSpace)
	if err := r.checkpoint(); err != nil && !errors.Is(err, object.ErrNoSpace) {
		r.fatalf("checkpoint: %v", err)
	}
	f.end()
	if r.rng.IntN(4) > 0 {
		if err := r.checkpoint(); err != nil {
			r.fatalf("checkpoint with enough space: %v", err)
		}
	}
	if r.rng.IntN(3) == 0 {
		r.work(1 + r.rng.IntN(20))
	}
	end := cut
	switch r.rng.IntN(10) {
	case 0:
		end = closed
	case 1:
		end = killed
	case 2, 3:
		f.set(1, 1+r.rng.IntN(50), syscall.EIO, breaks)
		r.strained(30)
		f.end()
	case 4, 5, 6:
		f.set(1, 1+r.rng.IntN(50), syscall.ENOSPC, losesSpace)
		r.strained(30)
		f.end()
	}
	r.end(end)
	if r.rng.IntN(2) == 0 {
		end = max(end, r.openScarce(f))
	}
	r.mustOpen()
	r.verify(end)
}

// openScarce opens the disks while they have no space for something, whether that fails or not, and has them found as they are
// then. It returns what the store went through.
func (r *rig) openScarce(f *faults) fate {
	r.t.Helper()
	f.set(1+r.rng.IntN(3), 1<<r.rng.IntN(5), syscall.ENOSPC, func(op disktest.Op) bool { return op.Kind.Changes() })
	err := r.open()
	r.trace.add("open without space: %v", err)
	if r.rng.IntN(2) == 0 {
		time.Sleep(time.Duration(r.rng.Int64N(int64(time.Second))))
	}
	f.end()
	end := fate(1 + r.rng.IntN(2)) // killed or cut
	r.end(end)
	return end
}

// plugScarce adds a disk that has no space for something, again and again until it has.
func (r *rig) plugScarce(f *faults, name string) *disktest.Disk {
	r.t.Helper()
	d := disktest.New(name)
	d.Hook(r.hook)
	for range r.rng.IntN(3) {
		f.set(1, 1<<r.rng.IntN(6), syscall.ENOSPC, func(op disktest.Op) bool { return needsSpace(op) || losesSpace(op) })
		_, err := r.store.Plug(d, tellNobody)
		f.end()
		r.trace.add("plug without space: %v", err)
		if r.broken() {
			r.fatalf("a disk is out of service: %+v", r.store.Status().Disks)
		}
		if err == nil {
			return d
		}
		r.verify(closed)
	}
	if _, err := r.store.Plug(d, tellNobody); err != nil {
		r.fatalf("plug: %v", err)
	}
	return d
}

// clear deletes everything: then nothing of it is on a disk, and no space is promised to it.
func (r *rig) clear() {
	r.t.Helper()
	for _, o := range r.model.objects {
		if err := r.delete(o); err != nil {
			r.fatalf("delete: %v", err)
		}
	}
	if err := errors.Join(r.sync(), r.checkpoint()); err != nil {
		r.fatalf("checkpoint: %v", err)
	}
	time.Sleep(time.Minute) // segments of the log are prepared, and how much is free asked again
	r.verify(closed)
	for i, st := range r.store.Status().Disks {
		d := r.disks[i]
		names, err := d.ReadDir("new")
		if name := objectFile(r.t, d); err != nil || len(names) > 0 || name != "" {
			r.fatalf("%s still has %q and, unplaced, %q: %v", d, name, names, err)
		}
		if known := int64(st.TotalBytes - st.FreeBytes); known != d.Used() {
			r.fatalf("%s: %d bytes count as %d", d, d.Used(), known)
		}
	}
}

// TestModelScarce is TestModel on disks that now and then have no space for a single operation, and have it for the next, until the
// store is killed or the power goes.
func TestModelScarce(t *testing.T) {
	t.Parallel()
	n, times := rounds(12), 10
	if hurried(t) {
		n, times = n/4, 3
	}
	for seed := range uint64(n) {
		t.Run(fmt.Sprintf("seed %d", seed), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) { // what finds no space is tried again after seconds
				r, f := newScarceRig(t, seed+12000, 1+int(seed%2))
				r.mustOpen()
				for range times {
					r.scarce(f)
				}
				r.clear()
				r.mustClose()
				if f.hits == 0 {
					t.Error("nothing has failed")
				}
			})
		})
	}
}

// TestModelScarceMoves is the same while disks come and go.
func TestModelScarceMoves(t *testing.T) {
	t.Parallel()
	n, times := rounds(12), 6
	if hurried(t) {
		n, times = n/4, 2
	}
	for seed := range uint64(n) {
		t.Run(fmt.Sprintf("seed %d", seed), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r, f := newScarceRig(t, seed+13000, 2)
				r.mustOpen()
				r.work(30)
				for round := range times {
					d := r.plugScarce(f, fmt.Sprintf("extra%d", round))
					old := r.disks[0].String()
					r.disks = append(r.disks, d)
					if err := r.store.Retire(old); err != nil {
						r.fatalf("retire: %v", err)
					}
					r.scarce(f)
					if r.rng.IntN(2) == 0 {
						r.scarce(f)
					}
					awaitMoves(t, r.store)
					r.verify(closed)
					if err := r.store.Unplug(old); err != nil {
						r.fatalf("round %d: unplug: %v", round, err)
					}
					r.disks = r.disks[1:]
					r.verify(closed)
				}
				r.clear()
				r.mustClose()
				if f.hits == 0 {
					t.Error("nothing has failed")
				}
			})
		})
	}
}

// A file system that finds only when it writes that it has no space for what it had taken says so to a sync, once. What that was to
// make durable may be lost, whatever becomes of the space: so the disk goes out of service, as with any other failure, and
// nobody is told to delete something. What was durable before is there when it is opened again.
func TestSyncFindsNoSpace(t *testing.T) {
	for name, match := range map[string]func(disktest.Op) bool{
		"log":        disktest.Named("wal/segment-*", disktest.OpSync),
		"frame":      disktest.Named("wal/segment-*", disktest.OpWrite),
		"head":       disktest.Named("wal/head", disktest.OpSync),
		"head write": disktest.Named("wal/head", disktest.OpWrite),
		"object":     disktest.Named("new/*", disktest.OpSync),
		"new":        disktest.Named("new", disktest.OpSyncDir),
		"objects":    disktest.Named("objects", disktest.OpSyncDir),
		"group":      disktest.Named("objects/*", disktest.OpSyncDir),
		"marks":      disktest.Named(".", disktest.OpSyncDir),
	} {
		for _, first := range []string{"checkpoint", "sync", "copy"} {
			if first == "copy" && name != "new" {
				continue // a copy whose content finds no place has not been made
			}
			t.Run(name+", "+first, func(t *testing.T) {
				d := disktest.New("d")
				s := mustOpen(t, quietConfig(d))
				content := filled(256<<10, 1)
				expect(t, "write", call(s, req(object.OpWrite, 1, 0, content)), nil)
				mustCheckpoint(t, s)
				durable := req(object.OpWrite, 2, 0, content)
				durable.Flags = object.FlagFUA
				expect(t, "write", call(s, durable), nil)
				q := req(object.OpWrite, 3, 0, content)
				q.Partition++
				expect(t, "write", call(s, q), nil)
				expect(t, "overwrite", call(s, req(object.OpWrite, 1, 0, filled(4096, 2))), nil)
				expect(t, "overwrite", call(s, req(object.OpWrite, 1, 64<<10, filled(128<<10, 2))), nil)
				hits := 0
				d.Hook(func(op disktest.Op) error {
					if hits == 0 && match(op) {
						hits++
						return syscall.ENOSPC
					}
					return nil
				})
				var errs []error
				expectIO := func(err error) {
					if err != nil {
						errs = append(errs, err)
					}
				}
				for _, what := range []string{first, "write", "checkpoint", "marks"} {
					switch what {
					case "checkpoint":
						expectIO(s.Checkpoint(t.Context()))
					case "sync":
						expectIO(call(s, &object.Request{Op: object.OpSync}))
					case "copy":
						expectIO(s.Copy(t.Context(), keyOf(9), keyOf(1), 20, object.Version{Epoch: 1, Seq: 9}))
					case "write":
						expectIO(call(s, req(object.OpWrite, 1, 0, filled(4096, 3))))
					case "marks":
						expectIO(s.KeepMarks(map[object.Group]object.Version{keyOf(1).Group: {Epoch: 1, Seq: 1}}))
					}
				}
				if hits == 0 {
					t.Fatal("nothing has failed")
				}
				d.Hook(nil)
				for _, err := range errs {
					if errors.Is(err, object.ErrNoSpace) || !errors.Is(err, object.ErrIO) {
						t.Errorf("who asked heard: %v", err)
					}
				}
				if st := s.Status().Disks[0]; st.State != storage.StateFailed || !strings.Contains(st.Error, "no space left on device") {
					t.Errorf("the disk is %s: %s", st.State, st.Error)
				}
				_ = s.Close()
				for seed := range uint64(4) {
					s := mustOpen(t, quietConfig(d.Reopen(seed)))
					for i := range uint32(2) {
						q := req(object.OpRead, 1+i, 192<<10, make([]byte, 64<<10))
						expect(t, "read", call(s, q), nil)
						if !bytes.Equal(q.Data, content[192<<10:]) {
							t.Errorf("seed %d: object %d is not what was durable", seed, 1+i)
						}
					}
					expect(t, "close", s.Close(), nil)
				}
			})
		}
	}
}
