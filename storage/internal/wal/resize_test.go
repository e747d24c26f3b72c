package wal

import (
	"errors"
	"testing"

	"sheepdog/storage/disk/disktest"
	"sheepdog/storage/object"
)

// begin opens a log and returns how many records it had.
func begin(d *disktest.Disk, o Options) (l *Log, n int, err error) {
	o.FS = d
	if l, err = Open(o); err != nil {
		return nil, 0, err
	}
	if err = d.SyncDir("."); err == nil {
		err = l.Replay(func(*Record, Pos) error { n++; return nil })
	}
	if err == nil {
		err = l.Start()
	}
	if err != nil {
		_ = l.Close()
		return nil, 0, err
	}
	return l, n, nil
}

// sized opens a log with segments of a size that may be another than they have.
func sized(t *testing.T, d *disktest.Disk, bytes int64, want int) *Log {
	t.Helper()
	o := options(d)
	o.SegmentBytes = bytes
	l, n, err := begin(d, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	if n != want {
		t.Fatalf("%d records, want %d", n, want)
	}
	return l
}

// TestOtherSegmentSize: what the log has from times when its limit was another one is used again, and what is written
// there is found.
func TestOtherSegmentSize(t *testing.T) {
	for _, sizes := range [][2]int64{{MinSegmentBytes, 2 * MinSegmentBytes}, {2 * MinSegmentBytes, MinSegmentBytes}} {
		for turns := range 8 {
			d := disktest.New("d")
			l := sized(t, d, sizes[0], 0)
			add(t, l, 1)
			rotate(t, l)
			add(t, l, 2)
			_ = l.Close()
			d = d.Restart()
			l = sized(t, d, sizes[1], 2)
			for range turns {
				retire(t, l, rotate(t, l))
			}
			add(t, l, 3)
			_ = l.Close()
			want := 1
			if turns == 0 {
				want = 3
			}
			_ = sized(t, d.Restart(), sizes[1], want).Close()
		}
	}
}

// TestCrashWhileResizing: the power goes at any moment while a log is opened whose segments get another size.
func TestCrashWhileResizing(t *testing.T) {
	for _, sizes := range [][2]int64{{MinSegmentBytes, 2 * MinSegmentBytes}, {2 * MinSegmentBytes, MinSegmentBytes}} {
		for at := int64(1); ; at++ {
			d := disktest.New("d")
			l := sized(t, d, sizes[0], 0)
			add(t, l, 1)
			retire(t, l, rotate(t, l))
			add(t, l, 2)
			rotate(t, l)
			add(t, l, 3)
			_ = l.Close()
			d = d.Restart()
			d.CrashAt(at)
			o := options(d)
			o.SegmentBytes = sizes[1]
			o.MaxSegments = MinSegments
			if l, _, err := begin(d, o); err == nil {
				_ = l.Close()
			}
			reached := d.Crashed()
			for seed := range uint64(6) {
				o.SegmentBytes = sizes[seed%2]
				l, n, err := begin(d.Reopen(seed), o)
				if err != nil || n != 2 {
					t.Fatalf("crash at %d, seed %d: %d records, %v", at, seed, n, err)
				}
				_ = l.Close()
			}
			if !reached {
				break
			}
		}
	}
}

// TestNoRoomToGrow: a log that gets no more space goes on with what it has, also when it is opened again and was to have
// longer segments. A new one that gets none is refused.
func TestNoRoomToGrow(t *testing.T) {
	d := disktest.New("d")
	o := options(d)
	left := int64(MinSegments * MinSegmentBytes)
	o.Take = func(n int64) bool {
		if n > left {
			return false
		}
		left -= n
		return true
	}
	o.Give = func(int64) {}
	o.MaxSegments = 16
	for _, factor := range []int64{1, 1, 4} {
		o.SegmentBytes = factor * MinSegmentBytes
		l, _, err := begin(d, o)
		if err != nil {
			t.Fatal(err)
		}
		for range 20 {
			if made, err := l.Prepare(); made || err != nil {
				t.Fatalf("made is %v, %v", made, err)
			}
			for range 2 {
				r := Record{Type: Hole, SizeShift: 22, Key: object.Key{ID: 3}, Count: 1}
				if _, err := l.Append(&r, nil, false, nil); err != nil {
					t.Fatal(err)
				}
				retire(t, l, rotate(t, l))
			}
			if l.Room() <= 0 {
				t.Fatal("no room")
			}
		}
		if used := d.Used(); used > MinSegments*MinSegmentBytes+64<<10 {
			t.Fatalf("%d bytes are used", used)
		}
		_ = l.Close()
		d = d.Restart()
	}
	left--
	if _, _, err := begin(disktest.New("new"), o); !errors.Is(err, ErrNoRoom) {
		t.Fatalf("a new log without space: %v", err)
	}
}
