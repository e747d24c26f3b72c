package storage_test

import (
	"bytes"
	"testing"
	"time"

	"sheepdog/storage/disk/disktest"
	"sheepdog/storage/object"
)

// TestScrubInTheBackground: rot that nobody reads is found, at no more than the given
// rate, with progress to be seen, and nothing else is held up or reported.
func TestScrubInTheBackground(t *testing.T) {
	d := disktest.New("d")
	s := mustOpen(t, quietConfig(d))
	const objects, size = 24, 256 << 10
	for i := range uint32(objects) {
		r := req(object.OpWrite, i, 0, filled(size, uint64(i)))
		r.Partition = object.Partition(i)
		expect(t, "write", call(s, r), nil)
	}
	expect(t, "close", s.Close(), nil)
	flipIn(t, d, "objects/00-0005", keyOf(5).ID.String(), 7*4096)

	cfg := quietConfig(d)
	cfg.ScrubEvery, cfg.ScrubRate = 10*time.Millisecond, 16<<20
	start := time.Now()
	s = mustOpen(t, cfg)
	progress := false
	for st := s.Status().Disks[0]; st.ScrubEnd.IsZero(); st = s.Status().Disks[0] {
		if st.ScrubProgress < 0 || st.ScrubProgress > 1 {
			t.Fatalf("progress %v", st.ScrubProgress)
		}
		progress = progress || st.ScrubProgress > 0 && st.ScrubProgress < 1
		if time.Since(start) > patience {
			t.Fatalf("no end: %+v", st)
		}
		time.Sleep(time.Millisecond)
	}
	took := time.Since(start)
	if least := time.Second * objects * size / (16 << 20) * 3 / 4; took < least {
		t.Errorf("%d bytes took %v, at 16 MiB/s", objects*size, took)
	}
	st := s.Status().Disks[0]
	if len(st.Corrupt) != 1 || st.Corrupt[0].Key.ID != keyOf(5).ID || st.CorruptEvents == 0 {
		t.Errorf("found: %+v", st.Corrupt)
	}
	if !progress || st.ScrubBytes < objects*size-4096 {
		t.Errorf("progress seen: %v; %d bytes verified", progress, st.ScrubBytes)
	}
}

// TestScrubMendsTables: a header or table that rots on disk while memory has what it was is written
// anew, by the next checkpoint; a restart then finds nothing wrong.
func TestScrubMendsTables(t *testing.T) {
	d := disktest.New("d")
	s := mustOpen(t, quietConfig(d))
	content := filled(1<<20, 1)
	for i := range uint32(3) {
		expect(t, "write", call(s, req(object.OpWrite, i, 0, content)), nil)
	}
	mustCheckpoint(t, s)
	size := int64(1) << req(object.OpRead, 0, 0, nil).SizeShift
	rotten := []int64{size + 40, size + 4096 + 85, size + 2*4096 - 9} // the header; the first sector of the table, and the last
	for i, off := range rotten {
		flipIn(t, d, "objects/00-0007", keyOf(uint32(i)).ID.String(), off)
	}
	expect(t, "scrub", s.Scrub(t.Context()), nil)
	if st := s.Status().Disks[0]; st.CorruptEvents != uint64(len(rotten)) || len(st.Corrupt) != 0 {
		t.Errorf("found: %d, %+v", st.CorruptEvents, st.Corrupt)
	}
	mustCheckpoint(t, s)
	expect(t, "scrub", s.Scrub(t.Context()), nil)
	if st := s.Status().Disks[0]; st.CorruptEvents != uint64(len(rotten)) {
		t.Errorf("found again after it was mended: %d", st.CorruptEvents)
	}
	expect(t, "close", s.Close(), nil)
	s = mustOpen(t, quietConfig(d))
	for i := range uint32(3) {
		got := make([]byte, len(content))
		expect(t, "read", call(s, req(object.OpRead, i, 0, got)), nil)
		if !bytes.Equal(got, content) {
			t.Errorf("object %d has other content", i)
		}
	}
	expect(t, "scrub", s.Scrub(t.Context()), nil)
}
