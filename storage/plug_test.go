package storage_test

import (
	"errors"
	"fmt"
	"testing"

	"sheepdog/storage/disk"
	"sheepdog/storage/disk/disktest"
	"sheepdog/storage/object"
)

// plug adds a new disk, whose power goes at its operation of the given number, to the store.
func (r *rig) plug(at int64) (err error) {
	r.t.Helper()
	d := disktest.New(fmt.Sprintf("disk%d", len(r.disks)))
	if r.hook != nil {
		d.Hook(r.hook)
	}
	d.CrashAt(at)
	r.disks = append(r.disks, d)
	r.within("Plug", func() { _, err = r.store.Plug(d) })
	return err
}

// A disk that is added while the store works gets objects, and keeps them.
func TestPlugUnderLoad(t *testing.T) {
	for seed := range uint64(rounds(6)) {
		r := newRig(t, seed, 1)
		r.mustOpen()
		r.work(20)
		d := disktest.New("disk1")
		d.Hook(r.hook)
		done := make(chan error, 1)
		go func() { _, err := r.store.Plug(d); done <- err }()
		r.work(20)
		if err := <-done; err != nil {
			r.fatalf("seed %d: plug: %v", seed, err)
		}
		r.disks = append(r.disks, d)
		r.work(40)
		r.verify(closed)
		if n := len(r.store.Status().Disks); n != 2 {
			r.fatalf("seed %d: there are %d disks", seed, n)
		}
		r.mustClose()
		r.reborn((*disktest.Disk).Restart)
		r.mustOpen()
		r.verify(closed)
		r.mustClose()
	}
}

// The power goes at every operation of a disk that is being added, or has just been: nothing that was
// there is lost, whether the disk is among the node's disks afterwards or, if adding it did not
// succeed, is not.
func TestPlugCrashes(t *testing.T) {
	for seed := range uint64(rounds(2)) {
		t.Run(fmt.Sprintf("seed %d", seed), func(t *testing.T) {
			t.Parallel()
			within, after := 0, 0
			for at := int64(1); ; at++ {
				r := newRig(t, seed, 1)
				r.mustOpen()
				r.work(10)
				err := r.plug(at)
				if err != nil && !r.crashed() {
					r.fatalf("crash at %d: plug: %v", at, err)
				}
				if err == nil {
					r.work(10)
				}
				crashed := r.crashed()
				r.crash()
				for _, s := range survivors {
					f := r.fork(s, func(_ int, d *disktest.Disk) *disktest.Disk { return d.Reopen(s + uint64(at)<<2) })
					f.mustOpen()
					f.verify(cut)
					f.work(4)
					f.mustClose()
					if err != nil {
						f := r.fork(s, func(_ int, d *disktest.Disk) *disktest.Disk { return d.Reopen(s + uint64(at)<<2) })
						f.disks = f.disks[:1]
						f.mustOpen()
						f.verify(cut)
						f.mustClose()
					}
				}
				if !crashed {
					break
				}
				if err != nil {
					within++
				} else {
					after++
				}
			}
			t.Logf("%d power cuts while the disk was being added, %d afterwards", within, after)
			if within == 0 || after == 0 {
				t.Error("the cuts missed what they were for")
			}
		})
	}
}

// What is not an empty disk of nobody's is refused, and stays as it is.
func TestPlugRefuses(t *testing.T) {
	r := newRig(t, 1, 1)
	r.mustOpen()
	r.work(5)
	defer r.mustClose()

	used := newRig(t, 2, 1)
	used.mustOpen()
	used.work(20)
	used.mustClose()
	used.reborn((*disktest.Disk).Restart)

	foreign := newRig(t, 3, 1)
	foreign.cfg.Cluster = "cluster2"
	foreign.mustOpen()
	foreign.mustClose()
	foreign.reborn((*disktest.Disk).Restart)

	for what, d := range map[string]disk.FS{"a disk with objects": used.disks[0], "a disk of another cluster": foreign.disks[0]} {
		if _, err := r.store.Plug(d); !errors.Is(err, object.ErrInvalid) {
			t.Errorf("%s: %v", what, err)
		}
	}
	used.mustOpen() // its lock was given back
	used.verify(closed)
	used.mustClose()
	foreign.mustOpen()
	foreign.mustClose()

	if err := r.plug(0); err != nil {
		t.Fatal(err)
	}
	if _, err := r.store.Plug(r.disks[1]); err == nil {
		t.Error("a disk was added twice")
	}
	r.work(10)
	r.verify(closed)
	s := r.store
	r.mustClose()
	if _, err := s.Plug(disktest.New("late")); !errors.Is(err, object.ErrClosed) {
		t.Errorf("a closed store takes a disk: %v", err)
	}
	r.reborn((*disktest.Disk).Restart)
	r.mustOpen()
	r.verify(closed)
}

// A disk that was retired gives its groups away one by one, and is closed then: its directory is free, what
// other disks have is there, and what it had is nowhere.
func TestUnplug(t *testing.T) {
	for seed := range uint64(rounds(4)) {
		r := newRig(t, seed, 2)
		r.mustOpen()
		r.work(40)
		s := r.store
		id := s.Status().Disks[0].ID
		if err := s.Unplug(id); !errors.Is(err, object.ErrInvalid) {
			t.Errorf("a disk in use is taken out: %v", err)
		}
		if err := s.Retire("ghost", true); !errors.Is(err, object.ErrNotFound) {
			t.Errorf("a disk that is not there is retired: %v", err)
		}
		if err := s.Retire(id, true); err != nil {
			t.Fatal(err)
		}
		if err := s.Retire(s.Status().Disks[1].ID, true); !errors.Is(err, object.ErrInvalid) {
			t.Errorf("the last disk is retired: %v", err)
		}
		r.work(10) // it still works
		held, err := s.Held(id)
		if err != nil {
			t.Fatal(err)
		}
		gone := map[object.Group]bool{}
		for _, g := range held {
			gone[g] = true
			if !s.Failed(g) || !s.Abandon(g) || s.Failed(g) {
				t.Errorf("seed %d: group %s does not leave the disk", seed, g)
			}
		}
		if held, _ = s.Held(id); len(held) > 0 {
			t.Errorf("seed %d: %v are left on the disk", seed, held)
		}
		for _, o := range r.model.objects {
			if gone[o.key.Group] {
				if _, err := s.Stat(t.Context(), o.key); !errors.Is(err, object.ErrNotFound) {
					t.Errorf("seed %d: %s is there after its group has left the disk: %v", seed, o.key, err)
				}
			}
		}
		if err := s.Unplug(id); err != nil {
			t.Errorf("seed %d: unplug: %v", seed, err)
		}
		if n := len(s.Status().Disks); n != 1 {
			t.Errorf("seed %d: %d disks are left", seed, n)
		}
		lock, err := r.disks[0].Lock()
		if err != nil {
			t.Errorf("seed %d: the disk is still locked: %v", seed, err)
		} else {
			lock.Close()
		}
		r.mustClose()
	}
}
