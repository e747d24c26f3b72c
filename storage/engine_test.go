package storage_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"sheepdog/storage"
	"sheepdog/storage/disk"
	"sheepdog/storage/disk/disktest"
	"sheepdog/storage/object"
)

func quietConfig(disks ...disk.FS) storage.Config {
	return storage.Config{Disks: disks, Node: "n1", Cluster: "c1", LogLimit: 2 << 20, Reserve: -1, Checkpoint: -1, ScrubRate: -1}
}

func mustOpen(t *testing.T, cfg storage.Config) *storage.Store {
	t.Helper()
	s, err := storage.Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func mustCheckpoint(t *testing.T, s *storage.Store) {
	t.Helper()
	if err := s.Checkpoint(context.Background()); err != nil {
		t.Fatal(err)
	}
}

// req is a request for object number i of 1 MiB.
func req(op object.Op, i, off uint32, data []byte) *object.Request {
	return &object.Request{
		Op: op, ID: object.DataID(1, i), Partition: 7, SizeShift: 20, Off: off, Len: uint32(len(data)), Data: data,
		Version: object.Version{Epoch: 1, Seq: uint64(i) + 1},
	}
}

func keyOf(i uint32) object.Key {
	return object.Key{Group: object.Group{Partition: 7}, ID: object.DataID(1, i)}
}

func filled(n int, seq uint64) []byte {
	b := make([]byte, n)
	pattern(b, seq)
	return b
}

func expect(t *testing.T, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) || want == nil && err != nil {
		t.Fatalf("%s: %v, want %v", what, err, want)
	}
}

// flipIn flips a bit of a file under a prefix.
func flipIn(t *testing.T, d *disktest.Disk, dir, sub string, off int64) {
	t.Helper()
	names, err := d.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		if strings.Contains(name, sub) {
			if err := d.Flip(dir+"/"+name, off, 4); err != nil {
				t.Fatal(err)
			}
			return
		}
	}
	t.Fatalf("no file like %s in %s: %v", sub, dir, names)
}

func TestRotIsReportedAndHealed(t *testing.T) {
	d := disktest.New("d")
	s := mustOpen(t, quietConfig(d))
	expect(t, "write", call(s, req(object.OpWrite, 1, 0, filled(1<<20, 1))), nil)
	mustCheckpoint(t, s)
	flipIn(t, d, "objects/00-0007", keyOf(1).ID.String(), 5*4096+77)

	buf := make([]byte, 16*4096)
	err := call(s, req(object.OpRead, 1, 0, buf))
	expect(t, "read of a rotten block", err, object.ErrCorrupt)
	var corrupt *object.CorruptError
	if !errors.As(err, &corrupt) || !slices.Equal(corrupt.Blocks, []uint32{5}) || corrupt.Key != keyOf(1) {
		t.Fatalf("it says %+v", corrupt)
	}
	expect(t, "read of a sound block", call(s, req(object.OpRead, 1, 6*4096, buf[:4096])), nil)
	if st := s.Status().Disks[0]; len(st.Corrupt) != 1 || st.CorruptEvents == 0 || st.State != storage.StateOK {
		t.Fatalf("status: %+v", st)
	}
	expect(t, "scrub", s.Scrub(context.Background()), object.ErrCorrupt)
	expect(t, "copy", s.Copy(context.Background(), keyOf(2), keyOf(1), 20, object.Version{Epoch: 1, Seq: 9}), object.ErrCorrupt)
	if _, err := s.Stat(context.Background(), keyOf(2)); !errors.Is(err, object.ErrNotFound) {
		t.Fatalf("half a copy is there: %v", err)
	}
	expect(t, "partial write into rot", call(s, req(object.OpWrite, 1, 5*4096+1, []byte("x"))), object.ErrCorrupt)
	expect(t, "whole write", call(s, req(object.OpWrite, 1, 5*4096, filled(4096, 2))), nil)
	expect(t, "read after healing", call(s, req(object.OpRead, 1, 0, buf)), nil)
	if st := s.Status().Disks[0]; len(st.Corrupt) != 0 {
		t.Fatalf("still listed: %+v", st.Corrupt)
	}
	expect(t, "scrub", s.Scrub(context.Background()), nil)
}

// TestSumsThatComeWithAWrite: they are the ones that are stored, whichever way the write goes, so that what has
// happened to the content between its arrival and the disk is found when it is read. Where blocks are still
// pending in the log a large write is laid around them.
func TestSumsThatComeWithAWrite(t *testing.T) {
	const size = 1 << 20
	for _, n := range []uint32{4096, 32 << 10, 256 << 10} {
		for damaged := range n / 4096 {
			if damaged%5 != 0 {
				continue
			}
			s := mustOpen(t, quietConfig(disktest.New("d")))
			expect(t, "write", call(s, req(object.OpWrite, 1, 0, filled(size, 1))), nil)
			expect(t, "write of a block that stays pending", call(s, req(object.OpWrite, 1, size/2+2*4096, filled(4096, 2))), nil)
			w := req(object.OpWrite, 1, size/2, filled(int(n), 3))
			w.Sums = object.AppendSums(nil, w.Data)
			w.Data[damaged*4096+17] ^= 1
			expect(t, "write", call(s, w), nil)
			buf := make([]byte, n)
			var corrupt *object.CorruptError
			if err := call(s, req(object.OpRead, 1, size/2, buf)); !errors.As(err, &corrupt) || !slices.Equal(corrupt.Blocks, []uint32{size/2/4096 + damaged}) {
				t.Errorf("%d bytes, block %d was damaged: %v", n, damaged, err)
			}
			w = req(object.OpWrite, 1, 1, w.Data[1:]) // not of whole blocks: then they are not used
			w.Sums = make([]uint64, n/4096)
			expect(t, "write", call(s, w), nil)
			expect(t, "read", call(s, req(object.OpRead, 1, 0, buf)), nil)
			if !bytes.Equal(buf[1:], w.Data) {
				t.Errorf("%d bytes at 1: not what was written", n-1)
			}
		}
	}
}

func TestRotInLogTableAndHeader(t *testing.T) {
	for _, c := range []struct {
		name       string
		dir, file  string
		off        int64
		checkpoint bool
		whole      bool // all blocks of the object suffer
	}{
		{"log payload", "wal", "segment-000", 512 + 64 + 48 + 4096*3, false, false},
		{"table sector", "objects/00-0007", "", 1<<20 + 4096 + 3, true, false},
		{"header", "objects/00-0007", "", 1<<20 + 30, true, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := disktest.New("d")
			s := mustOpen(t, quietConfig(d))
			expect(t, "write", call(s, req(object.OpWrite, 1, 0, filled(8*4096, 1))), nil)
			if c.checkpoint {
				mustCheckpoint(t, s)
				expect(t, "close", s.Close(), nil)
				flipIn(t, d, c.dir, c.file, c.off)
				s = mustOpen(t, quietConfig(d))
			} else {
				flipIn(t, d, c.dir, c.file, c.off)
			}
			buf := make([]byte, 8*4096)
			expect(t, "read", call(s, req(object.OpRead, 1, 0, buf)), object.ErrCorrupt)
			if c.whole {
				expect(t, "delete", s.Delete(context.Background(), keyOf(1)), nil)
			}
			expect(t, "write", call(s, req(object.OpWrite, 1, 0, filled(8*4096, 2))), nil)
			expect(t, "read", call(s, req(object.OpRead, 1, 0, buf)), nil)
			if !bytes.Equal(buf, filled(8*4096, 2)) {
				t.Fatal("other content")
			}
		})
	}
}

// TestLostDirectories: a disk that lost its log or its objects is not taken for one
// that never had any.
func TestLostDirectories(t *testing.T) {
	for _, dir := range []string{"wal", "objects"} {
		t.Run(dir, func(t *testing.T) {
			d := disktest.New("d")
			s := mustOpen(t, quietConfig(d))
			expect(t, "write", call(s, req(object.OpWrite, 1, 0, filled(4096, 1))), nil)
			expect(t, "close", s.Close(), nil)
			removeAll(t, d, dir)
			if s, err := storage.Open(quietConfig(d)); err == nil {
				_ = s.Close()
				t.Fatal("it was opened")
			} else if !strings.Contains(err.Error(), dir) || !strings.Contains(err.Error(), "restore") {
				t.Fatal(err)
			}
		})
	}
}

func removeAll(t *testing.T, d *disktest.Disk, path string) {
	t.Helper()
	names, err := d.ReadDir(path)
	if err == nil { // a directory
		for _, name := range names {
			removeAll(t, d, path+"/"+name)
		}
	}
	if err := d.Remove(path); err != nil {
		t.Fatal(err)
	}
}

// fillUp writes objects of so many bytes, from index n on, until there is no space for one, and returns which one that is.
// A full disk is checkpointed by itself, whenever it comes to it, and gets back what was promised and not needed: it stays
// full if there is no space right after a checkpoint.
func fillUp(t *testing.T, s *storage.Store, n uint32, size int) uint32 {
	t.Helper()
	write := func() error { return call(s, req(object.OpWrite, n, 0, filled(size, uint64(n)))) }
	for ; ; n++ {
		err := write()
		if err != nil {
			expect(t, "write to a full disk", err, object.ErrNoSpace)
			mustCheckpoint(t, s)
			err = write()
		}
		if err != nil {
			expect(t, "write after a checkpoint", err, object.ErrNoSpace)
			return n
		}
	}
}

func TestFullDisk(t *testing.T) {
	d := disktest.New("d")
	d.SetCapacity(24 << 20)
	cfg := quietConfig(d)
	cfg.Reserve = 4 << 20
	log := new(trace)
	cfg.Logger = slog.New(slog.NewTextHandler(log, nil))
	s := mustOpen(t, cfg)
	n := fillUp(t, s, 0, 1<<20)
	if n < 8 {
		t.Fatalf("full after %d objects", n)
	}
	if st := s.Status().Disks[0]; st.State != storage.StateFull {
		t.Fatalf("state %s", st.State)
	}
	for start := time.Now(); !strings.Contains(log.String(), "disk is full"); time.Sleep(time.Millisecond) {
		if time.Since(start) > patience {
			t.Fatal("nobody is told")
		}
	}
	fillUp(t, s, 1000, 4096) // what is left is less than an object
	// Writes of both kinds fail where they need space, and nothing is changed.
	expect(t, "small write", call(s, req(object.OpWrite, n+1, 0, filled(4096, 1))), object.ErrNoSpace)
	if _, err := s.Stat(context.Background(), keyOf(n+1)); !errors.Is(err, object.ErrNotFound) {
		t.Fatalf("it exists: %v", err)
	}
	expect(t, "copy", s.Copy(context.Background(), keyOf(n+1), keyOf(0), 20, object.Version{}), object.ErrNoSpace)
	// Everything else goes on.
	buf := make([]byte, 1<<20)
	expect(t, "overwrite", call(s, req(object.OpWrite, 0, 0, filled(1<<20, 77))), nil)
	for i := range uint32(400) {
		expect(t, "small overwrite", call(s, req(object.OpWrite, 1, i%256*4096, filled(4096, uint64(i)))), nil)
	}
	expect(t, "sync", call(s, &object.Request{Op: object.OpSync}), nil)
	expect(t, "close", s.Close(), nil)

	s = mustOpen(t, cfg)
	expect(t, "read", call(s, req(object.OpRead, 0, 0, buf)), nil)
	if !bytes.Equal(buf, filled(1<<20, 77)) {
		t.Fatal("other content")
	}
	// How much of it the log has is not the same as before.
	var err error
	for err == nil && n < 24 {
		n++
		err = call(s, req(object.OpWrite, n, 0, filled(1<<20, 1)))
	}
	expect(t, "write", err, object.ErrNoSpace)
	for i := range uint32(3) { // the log took some space meanwhile
		expect(t, "delete", s.Delete(context.Background(), keyOf(2+i)), nil)
	}
	discard := req(object.OpDiscard, 5, 0, nil)
	discard.Len = 1 << 20
	expect(t, "discard", call(s, discard), nil)
	mustCheckpoint(t, s)
	expect(t, "write where space was given back", call(s, req(object.OpWrite, n+1, 0, filled(1<<20, 1))), nil)
	expect(t, "close", s.Close(), nil)
}

// tight is a store on a small disk, some of which is to be left free.
type tight struct {
	s   *storage.Store
	d   *disktest.Disk
	cfg storage.Config
}

const tightSize = 64 << 20

func newTight(t *testing.T, reserve int64) *tight {
	d := disktest.New("d")
	d.SetCapacity(tightSize)
	w := &tight{d: d, cfg: quietConfig(d)}
	w.cfg.LogLimit, w.cfg.Reserve = 8<<20, reserve
	w.s = mustOpen(t, w.cfg)
	return w
}

// kill kills the store, and starts it anew.
func (w *tight) kill(t *testing.T) {
	w.d = w.d.Restart()
	_ = w.s.Close()
	w.cfg.Disks = []disk.FS{w.d}
	w.s = mustOpen(t, w.cfg)
}

func (w *tight) free() int64 { return tightSize - w.d.Used() }

// TestLogLeavesReserve: the log does not grow into the reserve, nor into what was promised to what it has. When a disk
// has filled up, what needs no space goes on, however much of it, and after a restart too.
func TestLogLeavesReserve(t *testing.T) {
	w := newTight(t, 1<<20)
	n := uint32(0)
	var err error
	for {
		if err = call(w.s, req(object.OpWrite, n, 0, filled(64<<10, uint64(n)))); err != nil {
			mustCheckpoint(t, w.s) // it shows what is really taken
			err = call(w.s, req(object.OpWrite, n, 0, filled(64<<10, uint64(n))))
		}
		if err != nil {
			break
		}
		n++
	}
	expect(t, "write to a full disk", err, object.ErrNoSpace)
	if n < 500 {
		t.Fatalf("full after %d objects", n)
	}
	work := func() {
		t.Helper()
		for i := range uint32(3000) {
			if err := call(w.s, req(object.OpWrite, i%n, i/n%16*4096, filled(4096, uint64(i)))); err != nil {
				t.Fatalf("small overwrite %d: %v", i, err)
			}
			if free := w.free(); free < w.cfg.Reserve {
				t.Fatalf("%d bytes are free after %d overwrites, less than the reserve of %d", free, i, w.cfg.Reserve)
			}
		}
	}
	work()
	w.kill(t)
	work()
	for i := range uint32(8) {
		expect(t, "delete", w.s.Delete(context.Background(), keyOf(i)), nil)
	}
	mustCheckpoint(t, w.s)
	expect(t, "write where space was given back", call(w.s, req(object.OpWrite, 0, 0, filled(64<<10, 1))), nil)
	expect(t, "close", w.s.Close(), nil)
}

// TestPromisedAfterRestart: what the log had when it was opened finds its place, though others ask for space first.
func TestPromisedAfterRestart(t *testing.T) {
	w := newTight(t, 4<<20)
	for i := range uint32(96) {
		expect(t, "small write", call(w.s, req(object.OpWrite, i/32, i%32*32<<10, filled(32<<10, 1))), nil)
	}
	w.kill(t)
	var err error
	for n := uint32(100); err == nil; n++ {
		err = call(w.s, req(object.OpWrite, n, 0, filled(1<<20, 1)))
	}
	expect(t, "write to a full disk", err, object.ErrNoSpace)
	mustCheckpoint(t, w.s)
	if free := w.free(); free < w.cfg.Reserve-64<<10 {
		t.Fatalf("%d bytes are free, less than the reserve of %d", free, w.cfg.Reserve)
	}
	expect(t, "close", w.s.Close(), nil)
}

// TestRefusedGetsWhatWasGivenBack: who is refused without asking for the last space gets what deletes have given back too.
func TestRefusedGetsWhatWasGivenBack(t *testing.T) {
	d := disktest.New("d")
	s := mustOpen(t, quietConfig(d))
	expect(t, "write", call(s, req(object.OpWrite, 0, 0, filled(1<<20, 1))), nil)
	mustCheckpoint(t, s)
	used := d.Used()
	expect(t, "delete", s.Delete(context.Background(), keyOf(0)), nil)
	r := req(object.OpWrite, 1, 0, filled(4096, 1))
	r.Flags = object.FlagNoGrow
	expect(t, "write that shall take no space", call(s, r), object.ErrNoSpace)
	for start := time.Now(); d.Used() > used-1<<20; time.Sleep(time.Millisecond) {
		if time.Since(start) > patience {
			t.Fatal("what was deleted still takes its space")
		}
	}
}

// TestNearlyFullGetsWhatWasGivenBack: who stays away because the disk is nearly full hears soon that it is not any more, though
// nobody was refused.
func TestNearlyFullGetsWhatWasGivenBack(t *testing.T) {
	for what, give := range map[string]func(s *storage.Store, i uint32) error{
		"delete": func(s *storage.Store, i uint32) error { return s.Delete(context.Background(), keyOf(i)) },
		"discard": func(s *storage.Store, i uint32) error {
			r := req(object.OpDiscard, i, 0, nil)
			r.Len = 1 << 20
			return call(s, r)
		},
	} {
		t.Run(what, func(t *testing.T) {
			d := disktest.New("d")
			s := mustOpen(t, quietConfig(d))
			for i := range uint32(8) {
				expect(t, "write", call(s, req(object.OpWrite, i, 0, filled(1<<20, 1))), nil)
			}
			mustCheckpoint(t, s)
			d.SetCapacity(d.Used() * 33 / 32)
			g := keyOf(0).Group
			for start := time.Now(); !s.Tight(g); time.Sleep(time.Millisecond) { // it remembers for a while what there was
				if time.Since(start) > patience {
					t.Fatal("it is not nearly full")
				}
			}
			for i := range uint32(4) {
				expect(t, what, give(s, i), nil)
			}
			for start := time.Now(); s.Tight(g); time.Sleep(time.Millisecond) {
				if time.Since(start) > patience {
					t.Fatal("it still is nearly full")
				}
			}
		})
	}
}

// TestTouch: an object gets a version without taking space, though it has no content that could be written over.
func TestTouch(t *testing.T) {
	d := disktest.New("d")
	s := mustOpen(t, quietConfig(d))
	expect(t, "write", call(s, req(object.OpWrite, 1, 0, filled(4096, 1))), nil)
	empty := req(object.OpDiscard, 1, 0, nil)
	empty.Len = 1 << 20
	expect(t, "discard", call(s, empty), nil)
	mustCheckpoint(t, s)
	d.SetCapacity(d.Used())
	touch := func(i uint32, seq uint64, flags object.Flags) {
		t.Helper()
		r := req(object.OpDiscard, i, 0, nil)
		r.Len, r.Flags, r.Version.Seq = 4096, flags, seq
		expect(t, "discard", call(s, r), nil)
	}
	touch(1, 50, 0)
	touch(1, 60, object.FlagTouch|object.FlagNoGrow)
	touch(2, 60, object.FlagTouch)
	mustCheckpoint(t, s)
	expect(t, "close", s.Close(), nil)
	s = mustOpen(t, quietConfig(d))
	if i, err := s.Stat(context.Background(), keyOf(1)); err != nil || i.Version.Seq != 60 || i.Allocated != 0 {
		t.Errorf("it is %+v, %v", i, err)
	}
	if _, err := s.Stat(context.Background(), keyOf(2)); !errors.Is(err, object.ErrNotFound) {
		t.Errorf("a missing object is there: %v", err)
	}
}

// TestDiskThatFills fills the disk under the store's feet, its reserve included: the
// checkpoint cannot go on, and nothing that was answered may be lost.
func TestDiskThatFills(t *testing.T) {
	d := disktest.New("d")
	s := mustOpen(t, quietConfig(d))
	for i := range uint32(8) {
		expect(t, "write", call(s, req(object.OpWrite, i, 0, filled(16*4096, uint64(i)))), nil)
	}
	d.SetCapacity(d.Used())
	expect(t, "checkpoint", s.Checkpoint(context.Background()), object.ErrNoSpace)
	expect(t, "sync", call(s, &object.Request{Op: object.OpSync}), nil)
	_ = s.Close()
	s = mustOpen(t, quietConfig(d))
	buf := make([]byte, 16*4096)
	for i := range uint32(8) {
		expect(t, "read", call(s, req(object.OpRead, i, 0, buf)), nil)
		if !bytes.Equal(buf, filled(16*4096, uint64(i))) {
			t.Fatal("other content")
		}
	}
	expect(t, "delete", s.Delete(context.Background(), keyOf(0)), nil)
	d.SetCapacity(1 << 30)
	mustCheckpoint(t, s)
	expect(t, "write", call(s, req(object.OpWrite, 99, 0, filled(1<<20, 1))), nil)
}

// TestEveryFault lets each single operation of a workload fail, with EIO and with
// ENOSPC. Nothing may hang, panic or return wrong data, and after EIO on a write the
// disk is out of service.
func TestEveryFault(t *testing.T) {
	for _, fault := range []syscall.Errno{syscall.EIO, syscall.ENOSPC} {
		t.Run(fault.Error(), func(t *testing.T) {
			for at := int64(1); ; at += 1 {
				if !faultAt(t, fault, at) {
					return
				}
			}
		})
	}
}

func faultAt(t *testing.T, fault syscall.Errno, at int64) (reached bool) {
	d := disktest.New("d")
	var count atomic.Int64
	d.Hook(func(op disktest.Op) error {
		switch op.Kind {
		case disktest.OpWrite, disktest.OpCreate, disktest.OpMkdir, disktest.OpSync, disktest.OpSyncDir, disktest.OpRename, disktest.OpRead, disktest.OpReadNowait, disktest.OpPunch:
		default:
			return nil
		}
		if fault == syscall.ENOSPC && op.Kind != disktest.OpWrite && op.Kind != disktest.OpCreate && op.Kind != disktest.OpMkdir {
			return nil
		}
		if count.Add(1) == at {
			return fault
		}
		return nil
	})
	defer func() { reached = count.Load() >= at }()
	s, err := storage.Open(quietConfig(d))
	if err != nil {
		return
	}
	for i := range uint32(3) {
		_ = call(s, req(object.OpWrite, i, 0, filled(8192, uint64(i))))
		_ = call(s, req(object.OpWrite, i, 128<<10, filled(256<<10, uint64(i))))
	}
	_ = s.Copy(context.Background(), keyOf(9), keyOf(0), 20, object.Version{})
	_ = call(s, &object.Request{Op: object.OpSync})
	_ = s.Checkpoint(context.Background())
	discard := req(object.OpDiscard, 1, 0, nil)
	discard.Len = 64 << 10
	_ = call(s, discard)
	_ = s.Delete(context.Background(), keyOf(2))
	overwrite := req(object.OpWrite, 0, 128<<10, filled(256<<10, 5))
	overwrite.Flags = object.FlagFUA
	_ = call(s, overwrite)
	_ = s.Checkpoint(context.Background())
	buf := make([]byte, 8192)
	err = call(s, req(object.OpRead, 0, 0, buf))
	if err == nil && !bytes.Equal(buf, filled(8192, 0)) {
		t.Fatalf("fault at %d: other content", at)
	}
	if errors.Is(err, object.ErrCorrupt) {
		t.Fatalf("fault at %d: %v", at, err)
	}
	_ = s.Close()
	return
}

func TestEIOTakesTheDiskOutOfService(t *testing.T) {
	good, bad := disktest.New("good"), disktest.New("bad")
	s := mustOpen(t, quietConfig(good, bad))
	at := func(p int) *object.Request {
		r := req(object.OpWrite, uint32(p), 0, filled(4096, 1))
		r.Partition = object.Partition(p)
		return r
	}
	for p := range 32 {
		expect(t, "write", call(s, at(p)), nil)
	}
	bad.Hook(func(op disktest.Op) error {
		if op.Kind == disktest.OpSync {
			return syscall.EIO
		}
		return nil
	})
	expect(t, "sync", call(s, &object.Request{Op: object.OpSync}), object.ErrIO)
	expect(t, "sync again", call(s, &object.Request{Op: object.OpSync}), object.ErrIO)
	ok, failed := 0, 0
	for p := range 32 {
		switch err := call(s, at(p)); {
		case err == nil:
			ok++
		case errors.Is(err, object.ErrIO):
			failed++
		default:
			t.Fatal(err)
		}
	}
	if ok == 0 || failed == 0 {
		t.Fatalf("%d worked, %d failed", ok, failed)
	}
	st := s.Status()
	if st.Disks[0].State != storage.StateOK || st.Disks[1].State != storage.StateFailed || st.Disks[1].IOErrors == 0 {
		t.Fatalf("%+v", st)
	}
}

// TestCheckpointWaitsForDirectWrites: what a direct write has put into the file before a
// crash must find its mark in the log, however many checkpoints were begun meanwhile.
func TestCheckpointWaitsForDirectWrites(t *testing.T) {
	const size = 32 * 4096
	d := disktest.New("d")
	s := mustOpen(t, quietConfig(d))
	expect(t, "write", call(s, req(object.OpWrite, 1, 0, filled(size, 1))), nil)
	mustCheckpoint(t, s)
	// A pending block in the middle makes two writes of it, of which the second hangs.
	expect(t, "write", call(s, req(object.OpWrite, 1, 16*4096, filled(4096, 2))), nil)
	hangs, release := make(chan struct{}), make(chan struct{})
	d.Hook(func(op disktest.Op) error {
		if op.Kind == disktest.OpWrite && op.Off == 17*4096 && op.Len == size-17*4096 {
			close(hangs)
			<-release
		}
		return nil
	})
	over := make(chan error, 1)
	go func() { over <- call(s, req(object.OpWrite, 1, 0, filled(size, 3))) }()
	<-hangs
	checkpoint := make(chan error, 1)
	go func() { checkpoint <- s.Checkpoint(context.Background()) }()
	select {
	case <-checkpoint:
		t.Fatal("the checkpoint ended before the write did")
	case <-time.After(300 * time.Millisecond):
	}
	after := d.Reopen(1)
	close(release)
	<-over // the power is off
	<-checkpoint
	_ = s.Close()

	s = mustOpen(t, quietConfig(after))
	buf := make([]byte, size)
	expect(t, "read", call(s, req(object.OpRead, 1, 0, buf)), nil)
	for b := range size / 4096 {
		if got := buf[b*4096:][:4096]; !bytes.Equal(got, filled(size, 1)[b*4096:][:4096]) && !bytes.Equal(got, filled(size, 3)[b*4096:][:4096]) && !bytes.Equal(got, filled(4096, 2)) {
			t.Fatalf("block %d has other content", b)
		}
	}
}

func TestIdentity(t *testing.T) {
	a, b := disktest.New("a"), disktest.New("b")
	cfg := quietConfig(a, b)
	cfg.Cluster = ""
	s := mustOpen(t, cfg)
	r := req(object.OpWrite, 1, 0, filled(4096, 1))
	for p := range 16 {
		r.Partition = object.Partition(p)
		expect(t, "write", call(s, r), nil)
	}
	expect(t, "set identity", s.SetIdentity("c1", "n1"), nil)
	expect(t, "set another identity", s.SetIdentity("c2", "n1"), object.ErrInvalid)
	if s.Cluster() != "c1" {
		t.Fatal(s.Cluster())
	}
	if _, err := storage.Open(quietConfig(a)); err == nil {
		t.Fatal("a disk was opened twice")
	}
	expect(t, "close", s.Close(), nil)

	for name, change := range map[string]func(*storage.Config){
		"node":    func(c *storage.Config) { c.Node = "n2" },
		"cluster": func(c *storage.Config) { c.Cluster = "c2" },
	} {
		cfg := quietConfig(a, b)
		change(&cfg)
		if _, err := storage.Open(cfg); !errors.Is(err, object.ErrInvalid) {
			t.Fatalf("other %s: %v", name, err)
		}
	}
	// The order of the disks means nothing, and more disks move nothing.
	s = mustOpen(t, quietConfig(disktest.New("c"), b, a))
	for p := range 16 {
		read := req(object.OpRead, 1, 0, make([]byte, 4096))
		read.Partition = object.Partition(p)
		expect(t, fmt.Sprintf("read of partition %d", p), call(s, read), nil)
	}
}

// TestDiskLeftOut: while a disk is away others take its place; when it comes back its
// old content is not served.
func TestDiskLeftOut(t *testing.T) {
	a, b := disktest.New("a"), disktest.New("b")
	write := func(seq uint64, disks ...disk.FS) string {
		log := new(trace)
		cfg := quietConfig(disks...)
		cfg.Logger = slog.New(slog.NewTextHandler(log, nil))
		s := mustOpen(t, cfg)
		r := req(object.OpWrite, 1, 0, filled(4096, seq))
		for p := range 16 {
			r.Partition = object.Partition(p)
			expect(t, "write", call(s, r), nil)
		}
		expect(t, "close", s.Close(), nil)
		return log.String()
	}
	if log := write(1, a, b); strings.Contains(log, "missing") {
		t.Fatal(log)
	}
	if log := write(2, a); !strings.Contains(log, "a disk is missing") {
		t.Fatalf("nothing is said of the disk that is away: %s", log)
	}
	for _, disks := range [][]disk.FS{{a, b}, {b, a}} {
		s, err := storage.Open(quietConfig(disks...))
		if err == nil {
			_ = s.Close()
			t.Fatal("it was opened")
		}
		if !errors.Is(err, object.ErrInvalid) || !strings.Contains(err.Error(), "both have objects") {
			t.Fatal(err)
		}
	}
	write(3, a) // goes on
	write(4, a, disktest.New("c"))
}

func TestSizes(t *testing.T) {
	s := mustOpen(t, quietConfig(disktest.New("d")))
	ctx := context.Background()
	for shift := uint8(object.MinSizeShift); shift <= object.MaxSizeShift; shift++ {
		k := object.Key{Group: object.Group{Policy: 1, Partition: 2}, ID: object.DataID(3, uint32(shift))}
		at := uint32(1)<<shift - 8192
		r := &object.Request{Op: object.OpWrite, Policy: 1, Partition: 2, ID: k.ID, SizeShift: shift, Off: at + 4000, Len: 4192, Data: filled(4192, 3)}
		expect(t, "write", call(s, r), nil)
		mustCheckpoint(t, s)
		buf := make([]byte, 8192)
		expect(t, "read", call(s, &object.Request{Op: object.OpRead, Policy: 1, Partition: 2, ID: k.ID, SizeShift: shift, Off: at, Len: 8192, Data: buf}), nil)
		if !bytes.Equal(buf[4000:], filled(4192, 3)) || !isZero(buf[:4000]) {
			t.Fatalf("shift %d: other content", shift)
		}
		list, err := s.Extents(ctx, k, 0, 1<<shift)
		want := []object.Extent{{Off: 0, Len: at, Hole: true}, {Off: at, Len: 8192}}
		if err != nil || !slices.Equal(list, want) {
			t.Fatalf("shift %d: extents %v, %v", shift, list, err)
		}
		info, err := s.Stat(ctx, k)
		if err != nil || info.Allocated != 8192 || info.SizeShift != shift {
			t.Fatalf("shift %d: %+v, %v", shift, info, err)
		}
	}
	r := req(object.OpRead, 0, 1<<20-1, make([]byte, 2))
	expect(t, "read past the end", call(s, r), object.ErrInvalid)
	r = req(object.OpRead, 0, 0, make([]byte, 2))
	r.SizeShift = 32
	expect(t, "read of too large an object", call(s, r), object.ErrInvalid)
}

// TestLargestObject zeroes and discards all of the largest object with one request, and
// reads more of it at once than any frontend asks for.
func TestLargestObject(t *testing.T) {
	s := mustOpen(t, quietConfig(disktest.New("d")))
	const shift, size, most = object.MaxSizeShift, uint32(1) << object.MaxSizeShift, uint32(128 << 20)
	request := func(op object.Op, off, n uint32, data []byte) *object.Request {
		return &object.Request{Op: op, Policy: 1, Partition: 2, ID: object.DataID(3, 0), SizeShift: shift, Off: off, Len: n, Data: data}
	}
	allocated := func() uint64 {
		t.Helper()
		info, err := s.Stat(context.Background(), object.Key{Group: object.Group{Policy: 1, Partition: 2}, ID: object.DataID(3, 0)})
		expect(t, "stat", err, nil)
		return info.Allocated
	}
	zero := request(object.OpZero, 0, size, nil)
	zero.Flags = object.FlagNoHole
	expect(t, "zero", call(s, zero), nil)
	mustCheckpoint(t, s)
	if n := allocated(); n != uint64(size) {
		t.Fatalf("zeros without holes take %d bytes", n)
	}
	last := filled(4096, 3)
	expect(t, "write", call(s, request(object.OpWrite, size-4096, 4096, last)), nil)
	buf := make([]byte, most)
	expect(t, "read", call(s, request(object.OpRead, size-most, most, buf)), nil)
	if !isZero(buf[:most-4096]) || !bytes.Equal(buf[most-4096:], last) {
		t.Fatal("other content")
	}
	expect(t, "discard", call(s, request(object.OpDiscard, 0, size, nil)), nil)
	mustCheckpoint(t, s)
	expect(t, "read", call(s, request(object.OpRead, size-most, most, buf)), nil)
	if n := allocated(); n != 0 || !isZero(buf) {
		t.Fatalf("after a discard %d bytes are there, zeros: %v", n, isZero(buf))
	}
}

// TestOpeningReadsNoObjects shows what makes a restart independent of the number of
// objects.
func TestOpeningReadsNoObjects(t *testing.T) {
	d := disktest.New("d")
	s := mustOpen(t, quietConfig(d))
	for i := range uint32(50) {
		expect(t, "write", call(s, req(object.OpWrite, i, 0, filled(4096, 1))), nil)
	}
	expect(t, "close", s.Close(), nil)
	var opened atomic.Int64
	d.Hook(func(op disktest.Op) error {
		if op.Kind == disktest.OpOpen && strings.HasPrefix(op.Name, "objects/") {
			opened.Add(1)
		}
		return nil
	})
	s = mustOpen(t, quietConfig(d))
	if n := opened.Load(); n != 0 {
		t.Fatalf("%d object files were opened", n)
	}
	n := 0
	err := s.List(context.Background(), keyOf(0).Group, func(object.Info) error { n++; return nil })
	if err != nil || n != 50 {
		t.Fatalf("%d objects, %v", n, err)
	}
}

// TestManyObjectsFewFiles keeps to the bound on open files.
func TestManyObjectsFewFiles(t *testing.T) {
	cfg := quietConfig(disktest.New("d"))
	cfg.OpenObjects = 16
	s := mustOpen(t, cfg)
	for i := range uint32(200) {
		expect(t, "write", call(s, req(object.OpWrite, i, 0, filled(128<<10, uint64(i)))), nil)
	}
	buf := make([]byte, 128<<10)
	for i := range uint32(200) {
		expect(t, "read", call(s, req(object.OpRead, i, 0, buf)), nil)
		if !bytes.Equal(buf, filled(128<<10, uint64(i))) {
			t.Fatalf("object %d: other content", i)
		}
	}
	if st := s.Status().Disks[0]; st.Objects != 200 || st.Checkpoints == 0 {
		t.Fatalf("%+v", st)
	}
	expect(t, "close", s.Close(), nil)
	expect(t, "submit after close", call(s, req(object.OpRead, 0, 0, buf)), object.ErrClosed)
}

// patient is a context that is cancelled when it has been asked so many times.
type patient struct {
	context.Context
	left int
}

func (p *patient) Err() error {
	if p.left--; p.left < 0 {
		return context.Canceled
	}
	return nil
}

// A copy that is cancelled, wherever it is, is no failure of the disk.
func TestCopyCancelled(t *testing.T) {
	s := mustOpen(t, quietConfig(disktest.New("disk")))
	expect(t, "write", call(s, req(object.OpWrite, 1, 0, filled(1<<20, 1))), nil)
	for n := 0; ; n++ {
		err := s.Copy(&patient{context.Background(), n}, keyOf(2), keyOf(1), 20, object.Version{Epoch: 1})
		if st := s.Status().Disks[0]; st.State != storage.StateOK {
			t.Fatalf("cancelled when asked for the %dth time: the disk is %s: %s", n+1, st.State, st.Error)
		}
		if err == nil {
			if n < 2 {
				t.Errorf("a copy asks %d times whether it is wanted", n)
			}
			return
		}
		expect(t, "copy", err, context.Canceled)
	}
}

// TestKickWritesAlone: a long write that nothing else is done beside, and that needs nothing of the disk first, is carried
// out by the kick itself; others are left to the workers. Either way it is read back.
func TestKickWritesAlone(t *testing.T) {
	d := disktest.New("d")
	cfg := quietConfig(d)
	cfg.SmallWrite = 16 << 10
	s := mustOpen(t, cfg)
	expect(t, "make the object", call(s, req(object.OpWrite, 1, 0, filled(256<<10, 1))), nil)
	expect(t, "sync", call(s, &object.Request{Op: object.OpSync}), nil)
	expect(t, "mark it", call(s, req(object.OpWrite, 1, 0, filled(64<<10, 2))), nil) // the first one after a checkpoint waits for its mark

	for _, size := range []int{20 << 10, 64 << 10, 128 << 10} {
		content := filled(size, uint64(size))
		for deadline := time.Now().Add(patience); ; {
			q := req(object.OpWrite, 1, 4096, content)
			done := make(chan struct{})
			q.Done = func(*object.Request) { close(done) }
			s.Submit(q)
			s.Kick()
			byKick := false
			select {
			case <-done:
				byKick = true
			default:
				<-done
			}
			expect(t, "write", q.Err, nil)
			if byKick {
				break
			}
			if time.Now().After(deadline) { // the worker of the last one may not have come to rest at first
				t.Fatalf("%d bytes are left to a worker", size)
			}
		}
		got := make([]byte, size)
		expect(t, "read", call(s, req(object.OpRead, 1, 4096, got)), nil)
		if !bytes.Equal(got, content) {
			t.Errorf("%d bytes: something else is read", size)
		}
	}

	// Three at a time: one is the kick's, the others are workers'.
	content := filled(64<<10, 7)
	var all sync.WaitGroup
	all.Add(3)
	for i := range uint32(3) {
		q := req(object.OpWrite, 1, i*64<<10, content)
		q.Done = func(q *object.Request) {
			if q.Err != nil {
				t.Error(q.Err)
			}
			all.Done()
		}
		s.Submit(q)
	}
	s.Kick()
	all.Wait()
	expect(t, "close", s.Close(), nil)
	s = mustOpen(t, cfg)
	got := make([]byte, 3*64<<10)
	expect(t, "read", call(s, req(object.OpRead, 1, 0, got)), nil)
	if !bytes.Equal(got, bytes.Repeat(content, 3)) {
		t.Error("something else is read after a restart")
	}
}
