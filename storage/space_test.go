package storage

import (
	"bytes"
	"context"
	"testing"

	"sheepdog/storage/disk"
	"sheepdog/storage/disk/disktest"
	"sheepdog/storage/object"
)

// What large writes and copies have put into files is not promised space for a second time; what of it went through the
// log is, and finds its place.
func TestFilesCountOnce(t *testing.T) {
	const size = 128 << 20
	files := disktest.New("d")
	files.SetCapacity(size)
	s, err := Open(Config{Disks: []disk.FS{files}, Node: "n", LogLimit: 2 << 20, Reserve: -1, Checkpoint: -1, ScrubRate: -1})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	data := bytes.Repeat([]byte{1}, 1<<20)
	write := func(id object.ID, off, n uint32) {
		do(t, s, &object.Request{Op: object.OpWrite, SizeShift: 20, ID: id, Policy: 1, Off: off, Len: n, Data: data[:n]})
	}
	d := s.routes.drives()[0]
	taken := func() int64 {
		d.space.mu.Lock()
		defer d.space.mu.Unlock()
		if err := d.space.ask(); err != nil {
			t.Fatal(err)
		}
		return size - d.space.free
	}
	for i := range object.ID(24) {
		write(i+1, 0, 1<<20)
	}
	for i := range object.ID(8) {
		g := object.Group{Policy: 1}
		if err := s.Copy(context.Background(), object.Key{Group: g, ID: 100 + i}, object.Key{Group: g, ID: 1 + i}, 20, object.Version{}); err != nil {
			t.Fatal(err)
		}
	}
	write(200, 100, 1<<19)
	if n := d.count.checkpoints.Load(); n != 0 {
		t.Fatalf("%d checkpoints", n)
	}
	if used, known := files.Used(), taken(); known < used+2*blockSize || known > used+1<<20 {
		t.Errorf("%d bytes of files count as %d", used, known)
	}
	known := taken()
	if err := s.Checkpoint(context.Background()); err != nil {
		t.Fatal(err)
	}
	if used := files.Used(); used > known {
		t.Errorf("a checkpoint has made %d bytes of %d that were promised", used, known)
	}
	d.space.mu.Lock()
	defer d.space.mu.Unlock()
	if len(d.space.pending) > 0 {
		t.Errorf("what is promised to the log, which is empty: %v", d.space.pending)
	}
}
