package wal

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"testing"

	"github.com/zeebo/xxh3"

	"sheepdog/storage/disk"
	"sheepdog/storage/disk/disktest"
	"sheepdog/storage/object"
)

// image is what a small log leaves on a disk: its head and its first segment.
func image(f *testing.F) (head, segment []byte) {
	d := disktest.New("memory")
	l, err := Open(Options{FS: d, Dir: "wal", SegmentBytes: MinSegmentBytes, MaxSegments: MinSegments})
	if err != nil {
		f.Fatal(err)
	}
	if err := l.Replay(func(*Record, Pos) error { return nil }); err != nil {
		f.Fatal(err)
	}
	if err := l.Start(); err != nil {
		f.Fatal(err)
	}
	key := object.Key{Group: object.Group{Policy: 1, Partition: 2}, ID: 3}
	block := bytes.Repeat([]byte{1}, object.BlockSize)
	for _, r := range []Record{
		{Type: Create, SizeShift: 22, Key: key, Generation: 7},
		{Type: Write, SizeShift: 22, Key: key, Block: 5, Count: 1, Sums: []uint64{object.Sum(block)}},
		{Type: Hole, SizeShift: 22, Key: key, Block: 1, Count: 1000},
		{Type: Direct, SizeShift: 22, Key: key, Count: 1},
		{Type: Delete, SizeShift: 22, Key: key},
	} {
		if _, err := l.Append(&r, block[:r.payload()], true, nil); err != nil {
			f.Fatal(err)
		}
		if _, err := l.Flush(); err != nil {
			f.Fatal(err)
		}
		if err := l.Sync(); err != nil {
			f.Fatal(err)
		}
	}
	segment = readFile(f, d, "wal/segment-000")[:l.off]
	return readFile(f, d, "wal/head"), segment
}

func readFile(t testing.TB, d disk.FS, name string) []byte {
	t.Helper()
	f, err := d.OpenFile(name, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.NewSectionReader(f, 0, 1<<30))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func writeFile(t testing.TB, d disk.FS, name string, b []byte) {
	t.Helper()
	f, err := d.OpenFile(name, disk.Create)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(b, 0); err != nil {
		t.Fatal(err)
	}
}

// reseal makes the checksums of a segment right again, so that what they guard is
// looked at as well.
func reseal(seg []byte) {
	le := binary.LittleEndian
	if len(seg) < sectorBytes {
		return
	}
	le.PutUint64(seg[8:], xxh3.Hash(seg[16:sectorBytes]))
	for off := int64(segmentStart); off+frameHeaderBytes <= int64(len(seg)); {
		b := seg[off:]
		payload, desc := int64(le.Uint32(b[40:])), int64(le.Uint32(b[44:]))
		end := frameHeaderBytes + payload + desc
		if end <= int64(len(b)) {
			le.PutUint64(b[48:], xxh3.Hash(b[frameHeaderBytes+payload:end]))
		}
		le.PutUint64(b[8:], xxh3.Hash(b[16:frameHeaderBytes]))
		off += roundUp(end)
	}
}

// FuzzReplay: whatever the files hold, a log is opened or refused, without a panic;
// records that are delivered are well formed, and what is opened can be worked with.
func FuzzReplay(f *testing.F) {
	head, segment := image(f)
	f.Add(head, segment, []byte{}, false)
	f.Add(head, segment, segment, true)
	f.Add([]byte{}, segment, []byte{}, true)
	f.Add(head[:600], segment[:700], []byte("x"), true)
	f.Fuzz(func(t *testing.T, head, first, second []byte, seal bool) {
		if len(first) > MinSegmentBytes || len(second) > MinSegmentBytes {
			t.Skip("longer than a segment")
		}
		first, second = bytes.Clone(first), bytes.Clone(second)
		if seal {
			reseal(first)
			reseal(second)
		}
		d := disktest.New("memory")
		if err := d.MkdirAll("wal"); err != nil {
			t.Fatal(err)
		}
		writeFile(t, d, "wal/head", head)
		writeFile(t, d, "wal/segment-000", first)
		writeFile(t, d, "wal/segment-001", second)
		d = d.Reopen(1) // all that is durable
		key := object.Key{ID: 42}
		if !replays(t, d, func(l *Log) {
			rec := Record{Type: Create, SizeShift: 22, Key: key}
			if _, err := l.Append(&rec, nil, true, nil); err != nil {
				t.Fatalf("append to a log that was opened: %v", err)
			}
			if err := l.Sync(); err != nil {
				t.Fatalf("sync a log that was opened: %v", err)
			}
		}, nil) {
			return
		}
		var last Record
		if !replays(t, d.Reopen(0), nil, func(r *Record) { last = *r }) {
			t.Fatal("a log that was opened cannot be opened again")
		}
		if last.Type != Create || last.Key != key {
			t.Fatalf("the record that was synced last is %+v", last)
		}
	})
}

// replays opens a log and works with it. It returns false if the log is refused.
func replays(t *testing.T, d disk.FS, use func(*Log), each func(*Record)) bool {
	t.Helper()
	l, err := Open(Options{FS: d, Dir: "wal", SegmentBytes: MinSegmentBytes, MaxSegments: MinSegments})
	if err != nil {
		return false
	}
	defer l.Close()
	bytesSeen := 0
	err = l.Replay(func(r *Record, pos Pos) error {
		if !r.wellFormed() || r.Type == Write && len(r.Sums) != int(r.Count) {
			t.Fatalf("record %+v", r)
		}
		bytesSeen += r.payload()
		if pos.offset() > MinSegmentBytes {
			t.Fatalf("position %x", pos)
		}
		if each != nil {
			each(r)
		}
		return nil
	})
	if err != nil {
		if !errors.Is(err, ErrDamaged) {
			t.Fatalf("replay: %v", err)
		}
		return false
	}
	if bytesSeen > 2*MinSegmentBytes {
		t.Fatalf("%d bytes of payload in two segments", bytesSeen)
	}
	if err := l.Start(); err != nil {
		t.Fatalf("start: %v", err)
	}
	if use != nil {
		use(l)
	}
	return true
}

// FuzzRecord: what is decoded is well formed and is encoded as it was.
func FuzzRecord(f *testing.F) {
	for _, r := range []Record{
		{Type: Create, SizeShift: 22, Generation: 7},
		{Type: Write, SizeShift: 20, Block: 5, Count: 2, Sums: []uint64{1, 2}},
		{Type: Hole, SizeShift: 31, Block: 1, Count: 1000},
	} {
		f.Add(r.append(nil))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var r Record
		rest, ok := r.decode(b)
		if !ok {
			return
		}
		used := b[:len(b)-len(rest)]
		again := r.append(nil)
		// Two bytes of padding are not looked at.
		again[6], again[7] = used[6], used[7]
		if !r.wellFormed() || !bytes.Equal(again, used) {
			t.Fatalf("%+v of %x", r, used)
		}
	})
}
