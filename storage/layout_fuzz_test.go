package storage_test

import (
	"bytes"
	"errors"
	"testing"

	"sheepdog/storage"
	"sheepdog/storage/disk"
	"sheepdog/storage/disk/disktest"
	"sheepdog/storage/object"
)

// FuzzObjectFile: whatever happens to the header, the table or the length of an
// object's file, readers get what was written or ErrCorrupt, other objects go on, and
// the object can be deleted and made anew.
func FuzzObjectFile(f *testing.F) {
	const size, blocks = 1 << 20, 16
	d := disktest.New("d")
	s, err := storage.Open(quietConfig(d))
	if err != nil {
		f.Fatal(err)
	}
	content := filled(blocks*4096, 1)
	for i := range uint32(2) {
		if err := call(s, req(object.OpWrite, i, 0, content)); err != nil {
			f.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		f.Fatal(err)
	}
	f.Add(uint16(0), []byte{0}, int32(0))
	f.Add(uint16(21), []byte{31}, int32(0))                        // size in the header
	f.Add(uint16(4096+5), []byte("~~~~~~~~"), int32(0))            // an entry of the table
	f.Add(uint16(4096), make([]byte, 4096), int32(0))              // a table of zeros
	f.Add(uint16(0), make([]byte, 8192), int32(0))                 // no header
	f.Add(uint16(0), []byte(nil), int32(-4096))                    // a short table
	f.Add(uint16(0), []byte(nil), int32(-size))                    // an empty file, nearly
	f.Add(uint16(0), []byte(nil), int32(1<<20))                    // too long
	f.Add(uint16(4096), bytes.Repeat([]byte{255}, 4096), int32(0)) // the mark of rotten entries
	f.Fuzz(func(t *testing.T, off uint16, patch []byte, longer int32) {
		d := d.Restart()
		if !damage(t, d, size+int64(off), patch, longer) {
			t.Skip()
		}
		s := mustOpen(t, quietConfig(d))
		buf := make([]byte, blocks*4096)
		for b := range uint32(blocks) {
			part := buf[b*4096:][:4096]
			err := call(s, req(object.OpRead, 0, b*4096, part))
			if err != nil && !errors.Is(err, object.ErrCorrupt) {
				t.Fatalf("read: %v", err)
			}
			if err == nil && !bytes.Equal(part, content[b*4096:][:4096]) {
				t.Fatalf("block %d has other content", b)
			}
		}
		_, _ = s.Extents(t.Context(), keyOf(0), 0, size)
		if err := s.Scrub(t.Context()); err != nil && !errors.Is(err, object.ErrCorrupt) {
			t.Fatalf("scrub: %v", err)
		}
		expect(t, "read of another object", call(s, req(object.OpRead, 1, 0, buf)), nil)
		expect(t, "delete", s.Delete(t.Context(), keyOf(0)), nil)
		expect(t, "write", call(s, req(object.OpWrite, 0, 0, content)), nil)
		mustCheckpoint(t, s)
		expect(t, "read", call(s, req(object.OpRead, 0, 0, buf)), nil)
		if !bytes.Equal(buf, content) {
			t.Fatal("other content")
		}
		expect(t, "close", s.Close(), nil)
	})
}

// damage patches the file of object 0 and changes its length.
func damage(t *testing.T, d *disktest.Disk, off int64, patch []byte, longer int32) bool {
	t.Helper()
	file, err := d.OpenFile("objects/"+keyOf(0).String(), disk.Flag(0))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	length, err := file.Size()
	if err != nil {
		t.Fatal(err)
	}
	if off+int64(len(patch)) > length || length+int64(longer) < 0 || longer > 8<<20 {
		return false
	}
	if _, err := file.WriteAt(patch, off); err != nil {
		t.Fatal(err)
	}
	if err := file.Truncate(length + int64(longer)); err != nil {
		t.Fatal(err)
	}
	return true
}
