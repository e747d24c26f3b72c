package storage_test

import (
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"sheepdog/storage"
	"sheepdog/storage/disk/disktest"
	"sheepdog/storage/object"
)

// movesSettle waits until groups have moved, and for the notes of that to be forgotten. It is for tests whose time is not that
// of the world.
func movesSettle(t *testing.T, s *storage.Store) {
	t.Helper()
	for deadline := time.Now().Add(time.Hour); !movesDone(s); time.Sleep(moveLook) {
		if time.Now().After(deadline) {
			t.Fatalf("partitions do not move: %+v", s.Status().Disks)
		}
	}
	time.Sleep(30 * time.Minute)
}

// moveLook is how often movesSettle looks: to look takes long, as against what is tried again after seconds.
const moveLook = 250 * time.Millisecond

// A disk has no space for one of the notes or marks that are made while groups go from one disk to the other, whichever it is:
// they are there all the time, and after a restart. It is so if there is no space for the new file, and if there is none for its name: then
// a note has not been made. No disk goes out of service for that, and what waits says why.
func TestMoveFindsNoSpaceForNotes(t *testing.T) {
	for what, match := range map[string]func(disktest.Op) bool{
		"file": func(op disktest.Op) bool {
			return op.Kind == disktest.OpCreate && (op.Name == "moves.tmp" || op.Name == "marks.tmp")
		},
		"name": func(op disktest.Op) bool {
			return op.Kind == disktest.OpRename && (op.NewName == "moves" || op.NewName == "marks")
		},
	} {
		for victim, name := range []string{"old", "new"} {
			for n := int64(1); ; n++ {
				reached := false
				t.Run(fmt.Sprintf("%s of note %d of disk %s", what, n, name), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) { reached = noSpaceForNote(t, victim, n, match) })
				})
				if !reached {
					if n < 3 {
						t.Errorf("disk %s makes %d notes", name, n-1)
					}
					break
				}
			}
		}
	}
}

func noSpaceForNote(t *testing.T, victim int, n int64, match func(disktest.Op) bool) (reached bool) {
	disks := []*disktest.Disk{disktest.New("old"), disktest.New("new")}
	s := openDisks(t, disks...)
	putGroups(t, s, moveGroups, 1)
	mustCheckpoint(t, s)
	marks := map[object.Group]object.Version{}
	for i := range moveGroups {
		marks[object.Group{Partition: object.Partition(i)}] = object.Version{Epoch: 1, Seq: 1}
	}
	expect(t, "keep marks", s.KeepMarks(marks), nil)
	var count atomic.Int64
	disks[victim].Hook(func(op disktest.Op) error {
		if match(op) && count.Add(1) == n {
			return syscall.ENOSPC
		}
		return nil
	})
	expect(t, "retire", s.Retire("old"), nil)
	time.Sleep(time.Second) // the first attempt has ended, and the next has not begun
	if st := s.Status().Disks[0]; count.Load() == n && st.Partitions > 0 && !strings.Contains(st.MoveBlocked, "no space") {
		t.Errorf("partitions do not move, for want of space, and what is said of that is %q", st.MoveBlocked)
	}
	movesSettle(t, s)
	for _, st := range s.Status().Disks {
		if st.State != storage.StateOK {
			t.Errorf("disk %s is %s: %s", st.Dir, st.State, st.Error)
		}
	}
	checkGroups(t, s, moveGroups, 1)
	putGroups(t, s, moveGroups, 2)
	expect(t, "close", s.Close(), nil)
	reached = count.Load() >= n
	disks[victim].Hook(nil)
	disks = restarted(disks)
	s = openDisks(t, disks...)
	checkGroups(t, s, moveGroups, 2)
	movesSettle(t, s)
	checkGroups(t, s, moveGroups, 2)
	expect(t, "unplug", s.Unplug("old"), nil)
	expect(t, "close", s.Close(), nil)
	s = openDisks(t, disks[1].Restart())
	checkGroups(t, s, moveGroups, 2)
	expect(t, "close", s.Close(), nil)
	return reached
}

// The new disk fails at the note that groups have come, and the old one has no space to take back that they have left: then nothing
// is answered there any more that would be lost if both could be read again.
func TestLeavingCannotBeTakenBack(t *testing.T) {
	disks := []*disktest.Disk{disktest.New("old"), disktest.New("new")}
	s := openDisks(t, disks...)
	putGroups(t, s, moveGroups, 1)
	var left atomic.Bool
	disks[0].Hook(func(op disktest.Op) error {
		if op.Kind == disktest.OpRename && op.NewName == "moves" {
			left.Store(true)
		}
		if left.Load() && op.Kind == disktest.OpCreate && op.Name == "moves.tmp" {
			return syscall.ENOSPC
		}
		return nil
	})
	disks[1].Hook(func(op disktest.Op) error {
		if left.Load() && op.Kind == disktest.OpRename && op.NewName == "moves" {
			return syscall.EIO
		}
		return nil
	})
	expect(t, "retire", s.Retire("old"), nil)
	for deadline := time.Now().Add(patience); s.Status().Disks[1].State != storage.StateFailed; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("nothing fails: %+v", s.Status().Disks)
		}
	}
	version := [moveGroups]uint64{}
	for i := range uint32(moveGroups) {
		version[i] = 1
		if call(s, grouped(object.OpWrite, i, filled(9000, 2<<32|uint64(i)))) == nil {
			version[i] = 2
		}
	}
	_ = s.Close()
	for _, d := range disks {
		d.Hook(nil)
	}
	s = openDisks(t, restarted(disks)...)
	for i, v := range version {
		q := grouped(object.OpRead, uint32(i), make([]byte, 9000))
		if err := call(s, q); err != nil || string(q.Data) != string(filled(9000, v<<32|uint64(i))) {
			t.Errorf("object %d is not of version %d, which was answered: %v", i, v, err)
		}
	}
}

// Groups whose move could not even begin can be given another place when their disk fails.
func TestAbandonWhatCouldNotBeMoved(t *testing.T) {
	disks := []*disktest.Disk{disktest.New("old"), disktest.New("new")}
	s := openDisks(t, disks...)
	putGroups(t, s, moveGroups, 1)
	held, err := s.Held("old")
	if err != nil || len(held) == 0 {
		t.Fatalf("the disk has %v: %v", held, err)
	}
	tried := make(chan struct{}, 100)
	disks[1].Hook(func(op disktest.Op) error {
		if op.Kind == disktest.OpCreate && op.Name == "moves.tmp" {
			tried <- struct{}{}
			return syscall.ENOSPC
		}
		return nil
	})
	expect(t, "retire", s.Retire("old"), nil)
	select {
	case <-tried:
	case <-time.After(patience):
		t.Fatalf("they do not begin to move: %+v", s.Status().Disks)
	}
	disks[0].Hook(func(op disktest.Op) error {
		if op.Kind.Changes() {
			return syscall.EIO
		}
		return nil
	})
	q := grouped(object.OpWrite, uint32(held[0].Partition), filled(9000, 3))
	q.Flags = object.FlagFUA
	expect(t, "write", call(s, q), object.ErrIO)
	if s.Abandon(held[0]) {
		t.Error("it gets a place where notes cannot be made: after a restart what it has there would not count")
	}
	disks[1].Hook(nil)
	for _, g := range held {
		for deadline := time.Now().Add(10 * time.Second); !s.Abandon(g); time.Sleep(time.Millisecond) { // the attempt that fails may be ending
			if time.Now().After(deadline) {
				t.Fatalf("partition %s gets no other place", g)
			}
		}
	}
	for _, g := range held {
		expect(t, "write", call(s, grouped(object.OpWrite, uint32(g.Partition), filled(9000, 3))), nil)
	}
	_ = s.Close()
	s = openDisks(t, disks[1].Restart())
	for _, g := range held {
		q := grouped(object.OpRead, uint32(g.Partition), make([]byte, 9000))
		if err := call(s, q); errors.Is(err, object.ErrNotFound) || string(q.Data) != string(filled(9000, 3)) {
			t.Errorf("what partition %s has got in its new place: %v", g, err)
		}
	}
}
