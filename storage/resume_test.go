package storage_test

import (
	"bytes"
	"errors"
	"slices"
	"syscall"
	"testing"

	"sheepdog/storage"
	"sheepdog/storage/disk/disktest"
	"sheepdog/storage/object"
)

// failsOnce lets a checkpoint fail for want of space at the first operation that matches, and then another one succeed.
func failsOnce(t *testing.T, d *disktest.Disk, s *storage.Store, match func(disktest.Op) bool) {
	t.Helper()
	d.Hook(disktest.FailNth(1, false, syscall.ENOSPC, match))
	expect(t, "the checkpoint that finds no space", s.Checkpoint(t.Context()), object.ErrNoSpace)
	d.Hook(nil)
	expect(t, "the next one", s.Checkpoint(t.Context()), nil)
}

// A checkpoint that fails has written tables of some objects, and not made them durable. The next one finds nothing to be written
// in them: nevertheless it makes them durable before it retires the marks that their checksums would be made anew by.
func TestTablesOfAFailedCheckpoint(t *testing.T) {
	d := disktest.New("d")
	s := mustOpen(t, quietConfig(d))
	for v := range uint64(2) { // what is there is overwritten in its place
		q := req(object.OpWrite, 1, 0, filled(256<<10, v))
		q.Flags = object.FlagFUA
		if v == 0 {
			expect(t, "write", call(s, q), nil)
			mustCheckpoint(t, s)
			continue
		}
		expect(t, "overwrite", call(s, q), nil)
	}
	expect(t, "write another object", call(s, req(object.OpWrite, 2, 0, filled(4096, 7))), nil)
	failsOnce(t, d, s, disktest.Named("new/*", disktest.OpCreate))
	d.Crash()
	_ = s.Close()
	s = mustOpen(t, quietConfig(d.Reopen(0)))
	q := req(object.OpRead, 1, 0, make([]byte, 256<<10))
	expect(t, "read after a power cut", call(s, q), nil)
	if !bytes.Equal(q.Data, filled(256<<10, 1)) {
		t.Error("what was durable is not there")
	}
}

// A checkpoint that fails has removed files of deleted objects, and not made that durable. The next one finds them removed, and
// does so before it retires the records of the deletion.
func TestDeletesOfAFailedCheckpoint(t *testing.T) {
	d := disktest.New("d")
	s := mustOpen(t, quietConfig(d))
	for i := range uint32(2) {
		expect(t, "write", call(s, req(object.OpWrite, i, 0, filled(4096, 7))), nil)
	}
	mustCheckpoint(t, s)
	expect(t, "delete", s.Delete(t.Context(), keyOf(1)), nil)
	elsewhere := grouped(object.OpWrite, 2, filled(4096, 7)) // its directory is another one
	expect(t, "write another object", call(s, elsewhere), nil)
	expect(t, "sync", call(s, &object.Request{Op: object.OpSync}), nil)
	failsOnce(t, d, s, disktest.Named("new/*", disktest.OpCreate))
	d.Crash()
	_ = s.Close()
	s = mustOpen(t, quietConfig(d.Reopen(0)))
	if _, err := s.Stat(t.Context(), keyOf(1)); !errors.Is(err, object.ErrNotFound) {
		t.Errorf("what was deleted, durably, is back: %v", err)
	}
	expect(t, "read one that was not", call(s, req(object.OpRead, 0, 0, make([]byte, 4096))), nil)
	expect(t, "read the new one", call(s, grouped(object.OpRead, 2, make([]byte, 4096))), nil)
}

// An object is in its place, and the log still has its Create record, for the checkpoint has not ended. If its header rots then it is
// corrupt, not empty, also where the log has records of an earlier object of that name, which had the same file; and when it is
// deleted its file goes.
func TestRotInHeaderOfPlaced(t *testing.T) {
	for name, earlier := range map[string]bool{"the first of its name": false, "made anew": true} {
		t.Run(name, func(t *testing.T) { rotInHeaderOfPlaced(t, earlier) })
	}
}

func rotInHeaderOfPlaced(t *testing.T, earlier bool) {
	d := disktest.New("d")
	s := mustOpen(t, quietConfig(d))
	if earlier {
		expect(t, "write", call(s, req(object.OpWrite, 1, 0, filled(4096, 1))), nil)
		mustCheckpoint(t, s)
		expect(t, "delete", s.Delete(t.Context(), keyOf(1)), nil)
	}
	write := req(object.OpWrite, 1, 0, filled(256<<10, 1))
	write.Flags = object.FlagFUA
	expect(t, "write", call(s, write), nil)
	d.Hook(disktest.FailNth(1, false, syscall.EIO, disktest.Named("wal/head", disktest.OpWrite)))
	if err := s.Checkpoint(t.Context()); err == nil {
		t.Fatal("the checkpoint has ended")
	}
	_ = s.Close()
	d = d.Restart()
	name := objectFile(t, d)
	if err := d.Flip(name, 1<<20+20, 4); err != nil {
		t.Fatal(err)
	}
	s = mustOpen(t, quietConfig(d))
	expect(t, "read with a rotten header", call(s, req(object.OpRead, 1, 0, make([]byte, 256<<10))), object.ErrCorrupt)
	expect(t, "delete", s.Delete(t.Context(), keyOf(1)), nil)
	mustCheckpoint(t, s)
	if left := objectFile(t, d); left != "" {
		t.Errorf("%s is left", left)
	}
	_ = s.Close()
}

// The header of an object rots that was deleted and made anew, before its file has gone: what the log has of the new one is there.
func TestRotInHeaderOfEarlierObject(t *testing.T) {
	d := disktest.New("d")
	s := mustOpen(t, quietConfig(d))
	expect(t, "write", call(s, req(object.OpWrite, 1, 0, filled(256<<10, 1))), nil)
	mustCheckpoint(t, s)
	expect(t, "delete", s.Delete(t.Context(), keyOf(1)), nil)
	expect(t, "write anew", call(s, req(object.OpWrite, 1, 4096, filled(4096, 2))), nil)
	d.Crash()
	_ = s.Close()
	d = d.Restart()
	if err := d.Flip(objectFile(t, d), 1<<20+20, 4); err != nil {
		t.Fatal(err)
	}
	want := append(make([]byte, 4096), filled(4096, 2)...)
	for range 2 {
		s = mustOpen(t, quietConfig(d))
		q := req(object.OpRead, 1, 0, make([]byte, 8192))
		expect(t, "read", call(s, q), nil)
		if !bytes.Equal(q.Data, want) {
			t.Error("it is not what was written")
		}
		expect(t, "close", s.Close(), nil)
		d = d.Restart()
	}
}

// objectFile is the file of the only object that is in its place; "": none is.
func objectFile(t testing.TB, d *disktest.Disk) (name string) {
	t.Helper()
	groups, err := d.ReadDir("objects")
	if err != nil {
		t.Fatal(err)
	}
	for _, g := range groups {
		files, err := d.ReadDir("objects/" + g)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			name = "objects/" + g + "/" + f
		}
	}
	return name
}

// While a checkpoint forgets what it has merged, the groups that only the log has are there.
func TestGroupsDuringCheckpoints(t *testing.T) {
	s := mustOpen(t, quietConfig(disktest.New("d")))
	defer s.Close()
	for i := range uint32(2000) { // so that it takes a while
		expect(t, "write", call(s, req(object.OpWrite, i, 0, filled(512, 7))), nil)
	}
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for i := uint32(0); ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			_ = call(s, req(object.OpWrite, i%2000, 0, filled(512, 7)))
			if i%100 == 0 {
				_ = s.Checkpoint(t.Context())
			}
		}
	}()
	for i := uint32(1); i < 2048; i++ {
		w := grouped(object.OpWrite, i, filled(512, 7))
		expect(t, "write", call(s, w), nil)
		groups, err := s.Groups(t.Context())
		if g := (object.Group{Policy: w.Policy, Partition: w.Partition}); err != nil || !slices.Contains(groups, g) {
			t.Fatalf("%s is not among %d groups: %v", g, len(groups), err)
		}
	}
	close(stop)
	<-done
}

// There is no space for a new file's table, and none to remove the file either: the next attempt takes it, and with the object, or
// the copy, that came to nothing it goes.
func TestFileThatCannotBeRemoved(t *testing.T) {
	d := disktest.New("d")
	s := mustOpen(t, quietConfig(d))
	noSpace := func(op disktest.Op) error {
		if disktest.Named("new/*", disktest.OpWrite, disktest.OpRemove)(op) {
			return syscall.ENOSPC
		}
		return nil
	}
	left := func() int {
		t.Helper()
		names, err := d.ReadDir("new")
		expect(t, "list new", err, nil)
		return len(names)
	}
	for i := range uint32(2) {
		expect(t, "write", call(s, req(object.OpWrite, i, 0, filled(4096, 7))), nil)
		d.Hook(noSpace)
		expect(t, "the checkpoint that finds no space", s.Checkpoint(t.Context()), object.ErrNoSpace)
		d.Hook(nil)
		if left() != 1 {
			t.Fatal("no file is left")
		}
		if i == 1 {
			expect(t, "delete", s.Delete(t.Context(), keyOf(1)), nil)
		}
		expect(t, "the next checkpoint", s.Checkpoint(t.Context()), nil)
		if n := left(); n > 0 {
			t.Errorf("object %d: %d files are left", i, n)
		}
	}
	d.Hook(noSpace)
	expect(t, "copy", s.Copy(t.Context(), keyOf(2), keyOf(0), object.MinSizeShift, object.Version{Epoch: 1, Seq: 1}), object.ErrNoSpace)
	d.Hook(nil)
	if left() != 1 {
		t.Fatal("no file of the copy is left")
	}
	expect(t, "the last checkpoint", s.Checkpoint(t.Context()), nil)
	if n := left(); n > 0 {
		t.Errorf("%d files of a copy are left", n)
	}
	_ = s.Close()
	s = mustOpen(t, quietConfig(d.Reopen(0)))
	expect(t, "read after a power cut", call(s, req(object.OpRead, 0, 0, make([]byte, 4096))), nil)
	_ = s.Close()
}
