package storage_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"sheepdog/storage"
	"sheepdog/storage/disk"
	"sheepdog/storage/disk/disktest"
	"sheepdog/storage/object"
)

// tellNobody takes note of a disk that is added.
func tellNobody(storage.DiskStatus) error { return nil }

// plug adds a new disk, whose power goes at its operation of the given number, to the store.
func (r *rig) plug(at int64) (err error) {
	r.t.Helper()
	d := disktest.New(fmt.Sprintf("disk%d", len(r.disks)))
	if r.hook != nil {
		d.Hook(r.hook)
	}
	d.CrashAt(at)
	r.disks = append(r.disks, d)
	r.within("Plug", func() { _, err = r.store.Plug(d, tellNobody) })
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
		go func() { _, err := r.store.Plug(d, tellNobody); done <- err }()
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
	t.Parallel()
	for seed := range uint64(rounds(2)) {
		t.Run(fmt.Sprintf("seed %d", seed), func(t *testing.T) {
			t.Parallel()
			within, after, stride := 0, 0, int64(1)
			if hurried(t) {
				stride = 7
			}
			for at := int64(1); ; at += stride {
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
				switch {
				case !crashed && after == 0 && stride > 1: // a step led past all that came afterwards
					at, stride = at-stride, 1
					continue
				case !crashed:
				case err != nil:
					within++
					continue
				default:
					after++
					continue
				}
				break
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
		if _, err := r.store.Plug(d, tellNobody); !errors.Is(err, object.ErrInvalid) {
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
	if _, err := r.store.Plug(r.disks[1], tellNobody); err == nil {
		t.Error("a disk was added twice")
	}
	r.work(10)
	r.verify(closed)
	if _, err := r.store.Plug(r.disks[0], tellNobody); !errors.Is(err, object.ErrInvalid) || !strings.Contains(err.Error(), "in use already") {
		t.Errorf("a disk that is in use, with objects: %v", err)
	}
	s := r.store
	r.mustClose()
	if _, err := s.Plug(disktest.New("late"), tellNobody); !errors.Is(err, object.ErrClosed) {
		t.Errorf("a closed store takes a disk: %v", err)
	}
	r.reborn((*disktest.Disk).Restart)
	r.mustOpen()
	r.verify(closed)
}

// A disk that was released gives its groups away one by one, and is closed then: its directory is free, what
// other disks have is there, and what it had is nowhere.
func TestUnplug(t *testing.T) {
	for seed := range uint64(rounds(4)) {
		r := newRig(t, seed, 2)
		r.cfg.MoveRate = -1
		r.mustOpen()
		r.work(40)
		s := r.store
		id := s.Status().Disks[0].ID
		if err := s.Unplug(id); !errors.Is(err, object.ErrInvalid) {
			t.Errorf("a disk in use is taken out: %v", err)
		}
		if err := s.Release(id); !errors.Is(err, object.ErrInvalid) {
			t.Errorf("a disk in use is released: %v", err)
		}
		if err := s.Retire("ghost"); !errors.Is(err, object.ErrNotFound) {
			t.Errorf("a disk that is not there is retired: %v", err)
		}
		if err := s.Retire(id); err != nil {
			t.Fatal(err)
		}
		if err := s.Retire(s.Status().Disks[1].ID); !errors.Is(err, object.ErrInvalid) {
			t.Errorf("the last disk is retired: %v", err)
		}
		r.work(10) // it still works
		if err := s.Release(id); err != nil {
			t.Fatal(err)
		}
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

// The power of one disk or both goes at every operation while groups leave a disk, some of which get new content and some
// none: what has left has left for good, what has not is as it was, and the disk can be taken out afterwards.
func TestUnplugCrashes(t *testing.T) {
	const groups = 12
	request := func(op object.Op, i uint32, data []byte) *object.Request {
		q := req(op, i, 0, data)
		q.Partition = object.Partition(i)
		return q
	}
	const (
		nothing = -1
		empty   = -2 // an object without content
		other   = -3 // neither the old content, 0, nor the new, 1
	)
	read := func(s *storage.Store, i uint32) (seq int) {
		q := request(object.OpRead, i, make([]byte, 9000))
		switch err := call(s, q); {
		case errors.Is(err, object.ErrNotFound):
			return nothing
		case err != nil:
			t.Fatalf("object %d: %v", i, err)
		}
		for seq := range 2 {
			if string(q.Data) == string(filled(9000, uint64(seq)<<32|uint64(i))) {
				return seq
			}
		}
		if isZero(q.Data) {
			return empty
		}
		return other
	}
	const (
		stays = -10 - iota // it may not have left: it is as it was, or there is nothing
		first              // its first write was not answered, or not durable when the power of its disk went
	)
	for victim := range 3 { // the last is both
		for n := int64(1); ; n++ {
			disks := []*disktest.Disk{disktest.New("old"), disktest.New("new")}
			open := func() *storage.Store {
				cfg := quietConfig()
				cfg.MoveRate = -1
				for _, d := range disks {
					cfg.Disks = append(cfg.Disks, d)
				}
				return mustOpen(t, cfg)
			}
			s := open()
			marks := map[object.Group]object.Version{}
			for i := range uint32(groups) {
				if err := call(s, request(object.OpWrite, i, filled(9000, uint64(i)))); err != nil {
					t.Fatal(err)
				}
				marks[object.Group{Partition: object.Partition(i)}] = object.Version{Epoch: 1}
			}
			if i := n % 3; i == 1 {
				mustCheckpoint(t, s)
			}
			if err := errors.Join(call(s, &object.Request{Op: object.OpSync}), s.KeepMarks(marks)); err != nil {
				t.Fatal(err)
			}
			for i, d := range disks {
				if victim == i || victim == 2 {
					d.CrashAt(n)
				}
			}
			held, err := s.Held("old")
			if err != nil {
				t.Fatal(err)
			}
			retired := errors.Join(s.Retire("old"), s.Release("old")) == nil
			left := map[uint32]int{} // what they have since
			var answered []uint32    // whose first write was, though no sync
			for at, g := range held {
				if !retired || at%3 == 2 {
					continue
				}
				i := uint32(g.Partition)
				if !s.Abandon(g) || disks[1].Crashed() {
					left[i] = stays // it did not leave, or nobody knows: nothing comes to it on either disk
					continue
				}
				left[i] = nothing
				if at%3 != 0 {
					continue
				}
				left[i] = first
				if call(s, request(object.OpWrite, i, filled(9000, 1<<32|uint64(i)))) != nil {
					continue
				}
				if answered = append(answered, i); call(s, &object.Request{Op: object.OpSync}) == nil {
					left[i] = 1
				}
			}
			crashed := disks[0].Crashed() || disks[1].Crashed()
			if !crashed {
				for _, d := range disks {
					d.Crash()
				}
			}
			_ = s.Close()
			if !disks[1].Crashed() { // a disk that only lost its process has what was answered
				for _, i := range answered {
					left[i] = 1
				}
			}
			for i, d := range disks {
				if d.Crashed() {
					disks[i] = d.Reopen(uint64(n) % 7)
				} else {
					disks[i] = d.Restart()
				}
			}
			s = open()
			kept := s.Marks()
			check := func(also string) {
				t.Helper()
				for i := range uint32(groups) {
					has := read(s, i)
					want, away := left[i]
					ok := has == 0
					switch {
					case away && want == stays:
						ok = has == 0 || has == nothing
					case away && want == first: // see TestFirstWriteInTwoFrames
						ok = has == nothing || has == empty || has == 1
					case away:
						ok = has == want
					}
					if !ok {
						t.Fatalf("crash at %d of disk %d: object %d has %d%s", n, victim, i, has, also)
					}
					if _, marked := kept[object.Group{Partition: object.Partition(i)}]; marked && has != 0 {
						t.Fatalf("crash at %d of disk %d: the mark of what was left behind is that of group %d", n, victim, i)
					}
				}
			}
			check("")
			if retired && !s.Status().Disks[0].Retired {
				t.Fatalf("crash at %d of disk %d: the disk is not to be taken out any more", n, victim)
			}
			if err := errors.Join(s.Retire("old"), s.Release("old")); err != nil {
				t.Fatal(err)
			}
			held, err = s.Held("old")
			if err != nil {
				t.Fatal(err)
			}
			for _, g := range held {
				if !s.Abandon(g) {
					t.Fatalf("group %s does not leave", g)
				}
				left[uint32(g.Partition)] = nothing
			}
			if err := s.Unplug("old"); err != nil {
				t.Fatal(err)
			}
			kept = nil
			check(" after all")
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			for i, d := range disks {
				disks[i] = d.Restart()
			}
			s = open() // though it is out
			check(" with the disk that was taken out")
			_ = s.Close()
			disks = disks[1:]
			s = open()
			check(" without the disk")
			_ = s.Close()
			if !crashed {
				if n < 5 {
					t.Errorf("only %d operations of disk %d", n, victim)
				}
				break
			}
		}
	}
}

// What a disk says of itself changes while the store works: with requests for groups that have no place yet, and
// somebody who looks at the disks.
func TestIdentityChangesAtWork(t *testing.T) {
	cfg := quietConfig(disktest.New("disk0"), disktest.New("disk1"))
	cfg.Cluster = ""
	s := mustOpen(t, cfg)
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for i := uint32(0); ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			q := req(object.OpWrite, i, 0, filled(512, 1))
			q.Partition = object.Partition(i)
			if err := call(s, q); err != nil {
				t.Error(err)
				return
			}
			s.Status()
		}
	}()
	err := errors.Join(s.SetIdentity("c1", "n1"), s.Retire("disk0"))
	close(stop)
	<-done
	if err != nil || s.Cluster() != "c1" || !s.Status().Disks[0].Retired {
		t.Errorf("the store belongs to %q, %+v: %v", s.Cluster(), s.Status().Disks, err)
	}
}
