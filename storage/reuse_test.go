package storage_test

import (
	"context"
	"errors"
	"testing"

	"sheepdog/storage/disk/disktest"
	"sheepdog/storage/object"
)

// newReturning is a disk of the node that has objects, and was not there when the store was opened.
func newReturning(t *testing.T) *rig {
	old := newRig(t, 2, 1)
	old.mustOpen()
	old.work(12)
	old.mustClose()
	old.reborn((*disktest.Disk).Restart)
	return old
}

// A disk that the node went on without comes back empty, and is used like a new one.
func TestReuse(t *testing.T) {
	r, old := newRig(t, 1, 1), newReturning(t)
	r.mustOpen()
	r.work(10)
	if _, err := r.store.Plug(old.disks[0], tellNobody); !errors.Is(err, object.ErrInvalid) {
		t.Errorf("a disk with objects is added as if it were empty: %v", err)
	}
	if _, err := r.store.Reuse(old.disks[0], tellNobody); err != nil {
		t.Fatal(err)
	}
	if _, err := r.store.Reuse(old.disks[0], tellNobody); !errors.Is(err, object.ErrInvalid) {
		t.Errorf("a disk in use is emptied: %v", err)
	}
	r.disks = append(r.disks, old.disks[0])
	r.work(20)
	r.verify(closed)
	r.mustClose()
	r.reborn((*disktest.Disk).Restart)
	r.mustOpen()
	r.verify(closed)
	r.mustClose()
}

// Disks of others keep what they have.
func TestReuseRefuses(t *testing.T) {
	r := newRig(t, 1, 1)
	r.mustOpen()
	for what, change := range map[string]func(*rig){
		"another cluster": func(o *rig) { o.cfg.Cluster = "cluster2" }, "another node": func(o *rig) { o.cfg.Node = "node2" },
		"no cluster": func(o *rig) { o.cfg.Cluster = "" },
	} {
		other := newRig(t, 2, 1)
		change(other)
		other.mustOpen()
		other.work(10)
		if _, err := r.store.Reuse(other.disks[0], tellNobody); !errors.Is(err, object.ErrInvalid) {
			t.Errorf("the disk of %s, in use: %v", what, err)
		}
		other.mustClose()
		other.reborn((*disktest.Disk).Restart)
		if _, err := r.store.Reuse(other.disks[0], tellNobody); !errors.Is(err, object.ErrInvalid) {
			t.Errorf("the disk of %s: %v", what, err)
		}
		other.mustOpen()
		other.verify(closed)
		other.mustClose()
	}
	r.mustClose()
}

// The power goes at every operation while a disk is emptied: it has all that it had, or nothing, or is
// refused until it is emptied again. Never is a part of what it had taken for the whole.
func TestReuseCrashes(t *testing.T) {
	t.Parallel()
	whole, partly, empty, stride := 0, 0, 0, int64(1)
	if hurried(t) {
		stride = 23
	}
	for at := int64(1); ; at += stride {
		r, old := newRig(t, 1, 1), newReturning(t)
		r.mustOpen()
		r.work(5)
		old.disks[0].CrashAt(at)
		_, err := r.store.Reuse(old.disks[0], tellNobody)
		if err == nil {
			r.disks = append(r.disks, old.disks[0])
			r.crash()
			break
		}
		for _, s := range survivors {
			reopen := func(_ int, d *disktest.Disk) *disktest.Disk { return d.Reopen(s + uint64(at)<<2) }
			switch f := old.fork(s, reopen); f.open() {
			case nil:
				groups, err := f.store.Groups(context.Background())
				if err != nil {
					t.Fatal(err)
				}
				if len(groups) > 0 {
					whole++
					f.verify(closed)
				} else {
					empty++
				}
				f.mustClose()
			default:
				partly++
				again := old.fork(s, reopen)
				n := newRig(t, 3, 1)
				n.mustOpen()
				if _, err := n.store.Reuse(again.disks[0], tellNobody); err != nil {
					t.Errorf("crash at %d: the disk is not emptied the second time: %v", at, err)
				}
				n.disks = append(n.disks, again.disks[0])
				n.work(4)
				n.verify(closed)
				n.mustClose()
			}
		}
		r.mustClose()
	}
	t.Logf("after power cuts the disk was %d times whole, %d times refused, %d times empty", whole, partly, empty)
	if whole == 0 || partly == 0 || empty == 0 {
		t.Error("the cuts missed what they were for")
	}
}
