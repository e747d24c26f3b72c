package storage_test

import (
	"testing"

	"sheepdog/storage/disk/disktest"
	"sheepdog/storage/object"
)

// What is written straight into an object's file while a checkpoint is at work on the object may find its checksums in the table that
// this checkpoint writes. Its version must come to the file as well, though the next checkpoint has nothing else to write there: who
// compares replicas asks for what has changed since a version.
func TestVersionOfWriteDuringCheckpoint(t *testing.T) {
	d := disktest.New("d")
	s := mustOpen(t, quietConfig(d))
	write := func(seq uint64, off uint32, n int) {
		t.Helper()
		q := req(object.OpWrite, 1, off, filled(n, seq))
		q.Version, q.Flags = object.Version{Epoch: 1, Seq: seq}, object.FlagFUA
		expect(t, "write", call(s, q), nil)
	}
	write(1, 0, 128<<10)
	mustCheckpoint(t, s)
	write(2, 0, 4096) // to be merged
	began, merged := false, disktest.Named("new/*", disktest.OpWrite)
	d.Hook(func(op disktest.Op) error {
		if !began && merged(op) && op.Off == 0 {
			began = true
			write(3, 64<<10, 64<<10)
		}
		return nil
	})
	mustCheckpoint(t, s)
	d.Hook(nil)
	if !began {
		t.Fatal("the checkpoint did not write what was to be merged")
	}
	mustCheckpoint(t, s) // nothing of the object is in the log any more
	expect(t, "close", s.Close(), nil)
	s = mustOpen(t, quietConfig(d))
	defer s.Close()
	if info, err := s.Stat(t.Context(), keyOf(1)); err != nil || info.Version != (object.Version{Epoch: 1, Seq: 3}) || info.Uncertain {
		t.Errorf("of the write while the checkpoint was at work: %+v, %v", info, err)
	}
}
