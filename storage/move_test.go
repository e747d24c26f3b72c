package storage_test

import (
	"context"
	"errors"
	"fmt"
	"path"
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

// awaitMoves waits until every disk has its share, and disks that were retired nothing.
func awaitMoves(t testing.TB, s *storage.Store) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		if movesDone(s) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("partitions do not move: %+v", s.Status().Disks)
		}
	}
}

func movesDone(s *storage.Store) bool {
	for _, d := range s.Status().Disks {
		if d.Filling || d.Retired && d.Partitions > 0 || d.PartitionsToGo > 0 {
			return false
		}
	}
	return true
}

// grouped is req for an object of group i.
func grouped(op object.Op, i uint32, data []byte) *object.Request {
	q := req(op, i, 0, data)
	q.Partition = object.Partition(i)
	return q
}

// putGroups writes version v of objects 0 to n-1, each of a group of its own.
func putGroups(t testing.TB, s *storage.Store, n uint32, v uint64) {
	t.Helper()
	for i := range n {
		if err := call(s, grouped(object.OpWrite, i, filled(9000, v<<32|uint64(i)))); err != nil {
			t.Fatalf("object %d: %v", i, err)
		}
	}
	if err := call(s, &object.Request{Op: object.OpSync}); err != nil {
		t.Fatal(err)
	}
}

// checkGroups looks whether they are there.
func checkGroups(t testing.TB, s *storage.Store, n uint32, v uint64) {
	t.Helper()
	for i := range n {
		q := grouped(object.OpRead, i, make([]byte, 9000))
		if err := call(s, q); err != nil || string(q.Data) != string(filled(9000, v<<32|uint64(i))) {
			t.Fatalf("object %d: %v, or other content", i, err)
		}
	}
}

// lookAt has groups n to m-1, which have nothing, live somewhere.
func lookAt(t testing.TB, s *storage.Store, n, m uint32) {
	t.Helper()
	for i := n; i < m; i++ {
		if err := call(s, grouped(object.OpRead, i, make([]byte, 512))); !errors.Is(err, object.ErrNotFound) {
			t.Fatalf("object %d: %v", i, err)
		}
	}
}

// restarted are disks after the end of a store.
func restarted(disks []*disktest.Disk) []*disktest.Disk {
	for i, d := range disks {
		disks[i] = d.Restart()
	}
	return disks
}

func openDisks(t *testing.T, disks ...*disktest.Disk) *storage.Store {
	t.Helper()
	cfg := quietConfig()
	for _, d := range disks {
		cfg.Disks = append(cfg.Disks, d)
	}
	return mustOpen(t, cfg)
}

// A disk that is added, or is among the node's disks for the first time, takes its share; one that is taken out gives what
// it has to the others. Many partitions share each sync, and those that have nothing need none.
func TestMoves(t *testing.T) {
	for _, how := range []string{"plugged", "configured"} {
		t.Run(how, func(t *testing.T) {
			const full, all = 300, 4096
			disks := []*disktest.Disk{disktest.New("a")}
			s := openDisks(t, disks...)
			putGroups(t, s, full, 1)
			lookAt(t, s, full, all)
			disks = append(disks, disktest.New("b"))
			if how == "plugged" {
				if _, err := s.Plug(disks[1], tellNobody); err != nil {
					t.Fatal(err)
				}
			} else {
				if err := s.Close(); err != nil {
					t.Fatal(err)
				}
				disks = restarted(disks)
				s = openDisks(t, disks...)
				lookAt(t, s, full, all)
			}
			awaitMoves(t, s)
			st := s.Status().Disks
			if n := st[1].Partitions; how == "plugged" && (n < all*45/100 || n > all*55/100) || st[0].Partitions+n != all {
				t.Errorf("of %d partitions the disks have %d and %d", all, st[0].Partitions, n)
			}
			if n := st[1].Objects; n < full*40/100 || n > full*60/100 || st[0].Objects+n != full {
				t.Errorf("of %d objects the disks have %d and %d", full, st[0].Objects, n)
			}
			checkGroups(t, s, full, 1)
			putGroups(t, s, full, 2)
			if err := s.Retire("a"); err != nil {
				t.Fatal(err)
			}
			before := disks[1].Count(disktest.OpRename)
			awaitMoves(t, s)
			if n := disks[1].Count(disktest.OpRename) - before; n > 12 {
				t.Errorf("%d notes were made", n)
			}
			checkGroups(t, s, full, 2)
			if err := s.Unplug("a"); err != nil {
				t.Fatal(err)
			}
			if names, err := disks[0].ReadDir("objects"); err != nil || len(names) > 0 {
				t.Errorf("the disk that was taken out has %v: %v", names, err)
			}
			checkGroups(t, s, full, 2)
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			disks = restarted(disks)
			s = openDisks(t, disks[1])
			checkGroups(t, s, full, 2)
			if _, err := s.Plug(disks[0], tellNobody); err != nil { // it is empty
				t.Fatal(err)
			}
			awaitMoves(t, s)
			checkGroups(t, s, full, 2)
		})
	}
}

// Random work goes on while disks come and go, with kills and power cuts in between.
func TestMovesUnderLoad(t *testing.T) {
	for seed := range uint64(rounds(8)) {
		t.Run(fmt.Sprintf("seed %d", seed), func(t *testing.T) {
			t.Parallel()
			r := newRig(t, seed+9000, 2)
			r.mustOpen()
			r.work(30)
			for round := range 6 {
				old := r.disks[0]
				d := disktest.New(fmt.Sprintf("extra%d", round))
				d.Hook(r.hook)
				if _, err := r.store.Plug(d, tellNobody); err != nil {
					r.fatalf("plug: %v", err)
				}
				r.disks = append(r.disks, d)
				r.work(20)
				if err := r.store.Retire(old.String()); err != nil {
					r.fatalf("retire: %v", err)
				}
				r.work(r.rng.IntN(30))
				f := fate(r.rng.IntN(4))
				if f <= cut {
					r.end(f)
					r.mustOpen()
				} else {
					f = closed
				}
				r.verify(f)
				r.work(10)
				awaitMoves(t, r.store)
				r.verify(closed)
				if err := r.store.Unplug(r.disks[0].String()); err != nil {
					r.fatalf("round %d: unplug: %v", round, err)
				}
				r.disks = r.disks[1:]
				r.work(10)
				r.verify(closed)
			}
			r.mustClose()
			r.reborn((*disktest.Disk).Restart)
			r.mustOpen()
			r.verify(closed)
			if err := r.store.Scrub(context.Background()); err != nil {
				r.fatalf("scrub: %v", err)
			}
			r.mustClose()
		})
	}
}

// Writers, readers, syncs, copies and scrubs run against one another and against groups that move all the time.
func TestMovesRace(t *testing.T) {
	r := newRig(t, 7100, 1)
	r.cfg.Checkpoint = time.Millisecond
	r.mustOpen()
	stop, done := make(chan struct{}), make(chan struct{})
	var moved atomic.Int64
	go func() {
		defer close(done)
		for i := 1; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			d := disktest.New(fmt.Sprintf("disk%d", i))
			d.Hook(coldReads())
			if _, err := r.store.Plug(d, tellNobody); err != nil {
				t.Errorf("plug: %v", err)
				return
			}
			old := fmt.Sprintf("disk%d", i-1)
			if err := r.store.Retire(old); err != nil {
				t.Errorf("retire: %v", err)
				return
			}
			awaitMoves(t, r.store)
			if err := r.store.Unplug(old); err != nil {
				t.Errorf("unplug: %v", err)
				return
			}
			moved.Add(1)
		}
	}()
	runRaces(t, r.store, 4*time.Second*time.Duration(rounds(1)))
	close(stop)
	<-done
	t.Logf("all partitions went from one disk to another %d times", moved.Load())
	if moved.Load() == 0 {
		t.Error("they do not move")
	}
	if err := r.store.Close(); err != nil {
		t.Error(err)
	}
}

// moveCase is a store whose power goes at an operation of one disk, or both, while groups move from one to the other.
type moveCase struct {
	t      *testing.T
	disks  []*disktest.Disk
	s      *storage.Store
	synced []uint64 // versions of objects that are durable
	begun  []uint64
}

const moveGroups = 14

func (c *moveCase) write(i uint32) {
	c.begun[i]++
	q := grouped(object.OpWrite, i, filled(9000, c.begun[i]<<32|uint64(i)))
	q.Flags = object.FlagFUA
	if call(c.s, q) == nil {
		c.synced[i] = c.begun[i]
	}
}

func (c *moveCase) delete(i uint32) {
	c.begun[i] = (c.begun[i] + 100) / 100 * 100 // a multiple of 100 is nothing
	k := grouped(object.OpRead, i, nil).Key()
	if errors.Join(c.s.Delete(context.Background(), k), call(c.s, &object.Request{Op: object.OpSync})) == nil {
		c.synced[i] = c.begun[i]
	}
}

// check looks whether each object has its last durable version, or a later one.
func (c *moveCase) check(what string) {
	c.t.Helper()
	for i := range uint32(moveGroups) {
		q := grouped(object.OpRead, i, make([]byte, 9000))
		err := call(c.s, q)
		ok := false
		for v := c.synced[i]; v <= c.begun[i]; v++ {
			if v%100 == 0 {
				// An unanswered first write may leave an object without content.
				ok = ok || errors.Is(err, object.ErrNotFound) || err == nil && v < c.begun[i] && isZero(q.Data)
			} else {
				ok = ok || err == nil && string(q.Data) == string(filled(9000, v<<32|uint64(i)))
			}
		}
		if !ok {
			c.t.Fatalf("%s: object %d is not of a version from %d to %d: %v", what, i, c.synced[i], c.begun[i], err)
		}
	}
}

func (c *moveCase) reopen(seed uint64) *moveCase {
	f := *c
	f.synced, f.begun = append([]uint64(nil), c.synced...), append([]uint64(nil), c.begun...)
	f.disks = nil
	for _, d := range c.disks {
		f.disks = append(f.disks, d.Reopen(seed))
	}
	f.s = openDisks(c.t, f.disks...)
	return &f
}

// The power goes at every operation of a disk while groups leave it, or come to it: each is on one of the two disks
// afterwards, with all that was durable, the other one has nothing of it, and moving goes on.
func TestMoveCrashes(t *testing.T) {
	t.Parallel()
	for victim := range 3 { // the last is both
		t.Run(fmt.Sprintf("disk %d", victim), func(t *testing.T) {
			t.Parallel()
			stride := int64(1)
			if hurried(t) {
				stride = 29
			}
			cuts := int64(0)
			for n := int64(1); ; n += stride {
				if !moveCrash(t, victim, n) {
					break
				}
				cuts++
			}
			t.Logf("%d power cuts", cuts)
			if cuts < 40/stride {
				t.Error("the cuts missed what they were for")
			}
		})
	}
}

func moveCrash(t *testing.T, victim int, n int64) (crashed bool) {
	c := &moveCase{t: t, disks: []*disktest.Disk{disktest.New("old"), disktest.New("new")}, synced: make([]uint64, moveGroups), begun: make([]uint64, moveGroups)}
	c.s = openDisks(t, c.disks...)
	for i := range uint32(moveGroups) {
		c.write(i)
	}
	if n%2 == 0 {
		mustCheckpoint(t, c.s)
	}
	c.write(1)
	c.delete(2)
	for i, d := range c.disks {
		if victim == i || victim == 2 {
			d.CrashAt(n)
		}
	}
	gone := func() bool { return c.disks[0].Crashed() || c.disks[1].Crashed() }
	if c.s.Retire("old") == nil {
		for i := uint32(0); !gone() && !movesDone(c.s); i++ {
			if i%7 == 3 {
				c.delete(i % moveGroups)
			} else {
				c.write(i % moveGroups)
			}
		}
		if !gone() {
			_ = c.s.Unplug("old")
		}
	}
	crashed = gone()
	for _, d := range c.disks {
		d.Crash()
	}
	_ = c.s.Close()
	for _, seed := range survivors {
		if seed > 1 {
			seed += uint64(n) << 2
		}
		f := c.reopen(seed)
		what := fmt.Sprintf("crash at %d of disk %d, seed %d", n, victim, seed)
		f.check(what)
		f.write(uint32(n) % moveGroups)
		if err := f.s.Retire("old"); err != nil {
			t.Fatal(err)
		}
		if n%3 == 0 { // once more, while it goes on
			time.Sleep(time.Duration(n%5) * 100 * time.Microsecond)
			for _, d := range f.disks {
				d.Crash()
			}
			_ = f.s.Close()
			f = f.reopen(seed)
			f.check(what + ", and again")
			if err := f.s.Retire("old"); err != nil {
				t.Fatal(err)
			}
		}
		awaitMoves(t, f.s)
		f.check(what + ", moved")
		if err := f.s.Unplug("old"); err != nil {
			t.Fatal(err)
		}
		if names, _ := f.disks[0].ReadDir("objects"); len(names) > 0 {
			t.Fatalf("%s: the disk that was taken out has %v", what, names)
		}
		if err := f.s.Close(); err != nil {
			t.Fatal(err)
		}
		f.disks = restarted(f.disks)
		f.s = openDisks(t, f.disks[1])
		f.check(what + ", without the disk")
		_ = f.s.Close()
	}
	return crashed
}

// A disk to which partitions go fills up: those that find no space stay where they are, nobody gets an error, and who asks
// hears why. It goes on when there is space.
func TestMoveToFullDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // the disk is tried again after seconds
		disks := []*disktest.Disk{disktest.New("old"), disktest.New("new")}
		for _, d := range disks {
			d.SetCapacity(64 << 20)
		}
		s := openDisks(t, disks...)
		const groups = 60
		putGroups(t, s, groups, 1)
		disks[1].SetCapacity(disks[1].Used() + 256<<10)
		if err := s.Retire("old"); err != nil {
			t.Fatal(err)
		}
		blocked := func() string { return s.Status().Disks[0].MoveBlocked }
		for deadline := time.Now().Add(patience); !strings.Contains(blocked(), "space"); time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("the disk is full, and nobody says so: %+v", s.Status().Disks)
			}
		}
		checkGroups(t, s, groups, 1)
		for i := range uint32(groups) {
			if err := call(s, grouped(object.OpWrite, i, filled(9000, 2<<32|uint64(i)))); err != nil && !errors.Is(err, object.ErrNoSpace) {
				t.Fatalf("object %d: %v", i, err)
			} else if err != nil {
				t.Fatalf("object %d has its space: %v", i, err)
			}
		}
		disks[1].SetCapacity(64 << 20)
		awaitMoves(t, s)
		checkGroups(t, s, groups, 2)
	})
}

// The disk to which groups go fails at any of its operations: what had not gone is as it was, and can be changed; nothing is
// lost should the disk be readable again.
func TestMoveToFailingDisk(t *testing.T) {
	t.Parallel()
	stride := int64(1)
	if hurried(t) {
		stride = 17
	}
	for n := int64(1); ; n += stride {
		disks := []*disktest.Disk{disktest.New("old"), disktest.New("new")}
		s := openDisks(t, disks...)
		putGroups(t, s, moveGroups, 1)
		mustCheckpoint(t, s)
		// What lives on the new disk from the beginning is lost with it.
		lives := map[object.Group]bool{}
		version := [moveGroups]uint64{}
		for i := range version {
			version[i] = 1
		}
		held, err := s.Held("old")
		if err != nil {
			t.Fatal(err)
		}
		for _, g := range held {
			lives[g] = true
		}
		all := len(lives) // as many as the disks' identities have it, which may be few
		check := func() {
			t.Helper()
			for i := range uint32(moveGroups) {
				q := grouped(object.OpRead, i, make([]byte, 9000))
				if err := call(s, q); err != nil || string(q.Data) != string(filled(9000, version[i]<<32|uint64(i))) {
					t.Fatalf("operation %d: object %d is not of version %d: %v", n, i, version[i], err)
				}
			}
		}
		disks[1].Hook(disktest.FailNth(n, true, syscall.EIO, func(op disktest.Op) bool { return op.Kind.Changes() }))
		if err := s.Retire("old"); err != nil {
			t.Fatal(err)
		}
		for deadline := time.Now().Add(patience); !movesDone(s) && s.Status().Disks[1].State != storage.StateFailed; time.Sleep(100 * time.Microsecond) {
			if time.Now().After(deadline) {
				t.Fatalf("operation %d: %+v", n, s.Status().Disks)
			}
		}
		failed := s.Status().Disks[1].State == storage.StateFailed
		held, err = s.Held("old")
		if err != nil {
			t.Fatal(err)
		}
		for _, g := range held {
			i := uint32(g.Partition)
			if err := call(s, grouped(object.OpWrite, i, filled(9000, 2<<32|uint64(i)))); err != nil {
				t.Fatalf("operation %d: object %d is on the disk that works: %v", n, i, err)
			}
			version[i] = 2
			delete(lives, g)
		}
		if failed && len(lives) > 0 && len(lives) < all {
			t.Errorf("operation %d: of %d groups %d went alone", n, all, len(lives))
		}
		_ = s.Close()
		disks[1].Hook(nil)
		disks = restarted(disks)
		s = openDisks(t, disks...)
		check()
		awaitMoves(t, s)
		check()
		_ = s.Close()
		if !failed {
			if n < 40 {
				t.Errorf("only %d operations", n)
			}
			return
		}
	}
}

// What is rotten is known to be rotten on the other disk too, and heals there from the right content.
func TestMoveKeepsRot(t *testing.T) {
	disks := []*disktest.Disk{disktest.New("old"), disktest.New("new")}
	s := openDisks(t, disks[0])
	putGroups(t, s, 4, 1)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	disks = restarted(disks)
	name := func(i uint32) string { return path.Join("objects", grouped(object.OpRead, i, nil).Key().String()) }
	for i, off := range []int64{5000, 1<<20 + 4096, 1<<20 + 8} { // content, table, header
		if err := disks[0].Flip(name(uint32(i)), off, 4); err != nil {
			t.Fatal(err)
		}
	}
	s = openDisks(t, disks[0])
	if _, err := s.Plug(disks[1], tellNobody); err != nil {
		t.Fatal(err)
	}
	if err := s.Retire("old"); err != nil {
		t.Fatal(err)
	}
	awaitMoves(t, s)
	if err := s.Unplug("old"); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		for i := range uint32(4) {
			q := grouped(object.OpRead, i, make([]byte, 9000))
			if err := call(s, q); errors.Is(err, object.ErrCorrupt) != (i < 3) || i == 3 && err != nil {
				t.Errorf("object %d: %v", i, err)
			}
		}
		if n := len(s.Rotten()); n != 3 {
			t.Errorf("%d objects are known to be corrupt: %v", n, s.Rotten())
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		disks = restarted(disks)
		s = openDisks(t, disks[1])
	}
	content := filled(9000, 1<<32)
	if err := s.Heal(context.Background(), grouped(object.OpRead, 0, nil).Key(), 1, content[4096:8192]); err != nil {
		t.Errorf("heal: %v", err)
	}
	q := grouped(object.OpRead, 0, make([]byte, 9000))
	if err := call(s, q); err != nil || string(q.Data) != string(content) {
		t.Errorf("the healed object: %v", err)
	}
}

// Marks go with their partitions, whether those have anything or not.
func TestMovesTakeMarks(t *testing.T) {
	disks := []*disktest.Disk{disktest.New("old"), disktest.New("new")}
	s := openDisks(t, disks[0])
	putGroups(t, s, 4, 1)
	lookAt(t, s, 4, 8)
	marks := map[object.Group]object.Version{}
	for i := range 8 {
		marks[object.Group{Partition: object.Partition(i)}] = object.Version{Epoch: 3, Seq: uint64(i)}
	}
	if err := s.KeepMarks(marks); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Plug(disks[1], tellNobody); err != nil {
		t.Fatal(err)
	}
	if err := s.Retire("old"); err != nil {
		t.Fatal(err)
	}
	awaitMoves(t, s)
	if err := errors.Join(s.Unplug("old"), s.Close()); err != nil {
		t.Fatal(err)
	}
	disks = restarted(disks)
	s = openDisks(t, disks[1])
	for g, v := range marks {
		if got := s.Marks()[g]; got != v {
			t.Errorf("the mark of %s is %v, was %v", g, got, v)
		}
	}
}

// The files of moves that are damaged are not believed.
func TestDamagedNotesOfMoves(t *testing.T) {
	d := disktest.New("disk")
	cfg := quietConfig(d)
	s := mustOpen(t, cfg)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	d = d.Restart()
	f, err := d.OpenFile("moves", 1)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("sheep moves 1 0000000000000000\n{}"), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := storage.Open(quietConfig(d)); err == nil || !strings.Contains(err.Error(), "moves") {
		t.Errorf("damaged notes are believed: %v", err)
	}
}
