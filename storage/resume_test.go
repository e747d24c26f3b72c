package storage_test

import (
	"bytes"
	"errors"
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
