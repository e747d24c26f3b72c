package wal

import (
	"errors"
	"slices"
	"syscall"
	"testing"

	"sheepdog/storage/disk/disktest"
	"sheepdog/storage/object"
)

func options(d *disktest.Disk) Options {
	return Options{FS: d, Dir: "wal", SegmentBytes: MinSegmentBytes, MaxSegments: 6}
}

// reopen opens a log and returns the blocks of the records that it replayed, in order.
func reopen(d *disktest.Disk) (*Log, []uint32, error) {
	l, err := Open(options(d))
	if err != nil {
		return nil, nil, err
	}
	if err := d.SyncDir("."); err != nil {
		_ = l.Close()
		return nil, nil, err
	}
	var blocks []uint32
	err = l.Replay(func(r *Record, _ Pos) error {
		blocks = append(blocks, r.Block)
		return nil
	})
	if err == nil {
		err = l.Start()
	}
	if err != nil {
		_ = l.Close()
		return nil, nil, err
	}
	return l, blocks, nil
}

func mustReopen(t *testing.T, d *disktest.Disk, want ...uint32) *Log {
	t.Helper()
	l, blocks, err := reopen(d)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	if !slices.Equal(blocks, want) {
		t.Fatalf("records %v, want %v", blocks, want)
	}
	return l
}

func add(t *testing.T, l *Log, blocks ...uint32) {
	t.Helper()
	for _, b := range blocks {
		r := Record{Type: Hole, SizeShift: 22, Key: object.Key{ID: 3}, Block: b, Count: 1}
		if _, err := l.Append(&r, nil, true, nil); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Sync(); err != nil {
		t.Fatal(err)
	}
}

func rotate(t *testing.T, l *Log) uint32 {
	t.Helper()
	first, err := l.Rotate()
	if err != nil {
		t.Fatal(err)
	}
	return first
}

func retire(t *testing.T, l *Log, first uint32) {
	t.Helper()
	if err := l.Retire(first); err != nil {
		t.Fatal(err)
	}
	l.Recycle(first)
}

// TestKilledWhileRetiring: a process is killed after it wrote the head and before that
// was synced, and the power goes at any moment of the next opening.
func TestKilledWhileRetiring(t *testing.T) {
	for at := int64(1); ; at++ {
		d := disktest.New("d")
		l := mustReopen(t, d)
		add(t, l, 1, 2)
		first := rotate(t, l)
		add(t, l, 3)
		d.Hook(func(op disktest.Op) error {
			if op.Kind == disktest.OpSync && op.Name == "wal/head" {
				return syscall.EINTR
			}
			return nil
		})
		if err := l.Retire(first); err == nil {
			t.Fatal("the head was not synced")
		}
		_ = l.Close()
		d = d.Restart()
		d.CrashAt(at)
		if l, _, err := reopen(d); err == nil {
			_ = l.Close()
		}
		reached := d.Crashed()
		for seed := range uint64(8) {
			l, blocks, err := reopen(d.Reopen(seed))
			if err != nil {
				t.Fatalf("crash at %d, seed %d: %v", at, seed, err)
			}
			_ = l.Close()
			if !slices.Equal(blocks, []uint32{3}) && !slices.Equal(blocks, []uint32{1, 2, 3}) {
				t.Fatalf("crash at %d, seed %d: records %v", at, seed, blocks)
			}
		}
		if !reached {
			return
		}
	}
}

// TestRotInHead: one rotten sector of the head changes nothing; without it, records
// that were retired would come back and undo what was written since.
func TestRotInHead(t *testing.T) {
	for _, off := range []int64{0, 20, 30, 511, 512, 532, 542, 1023} {
		d := disktest.New("d")
		l := mustReopen(t, d)
		for range 2 {
			add(t, l, 1, 2)
			retire(t, l, rotate(t, l))
		}
		add(t, l, 3)
		_ = l.Close()
		if err := d.Flip("wal/head", off, 1); err != nil {
			t.Fatal(err)
		}
		mustReopen(t, d.Restart(), 3)
	}
}

// TestRotInHeadAltogether: without a head there is no telling what was retired.
func TestRotInHeadAltogether(t *testing.T) {
	d := disktest.New("d")
	l := mustReopen(t, d)
	add(t, l, 1)
	_ = l.Close()
	for _, off := range []int64{20, 532} {
		if err := d.Flip("wal/head", off, 1); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, err := reopen(d.Restart()); !errors.Is(err, ErrDamaged) {
		t.Fatal(err)
	}
}

// TestCutOffSegment: a segment that lost its end lost records that were durable.
func TestCutOffSegment(t *testing.T) {
	d := disktest.New("d")
	l := mustReopen(t, d)
	add(t, l, 1)
	add(t, l, 2)
	f, name := l.seg.file, segmentName("wal", l.seg.slot)
	if err := f.Truncate(segmentStart + sectorBytes); err != nil {
		t.Fatal(err)
	}
	_ = l.Close()
	if _, blocks, err := reopen(d.Restart()); !errors.Is(err, ErrDamaged) {
		t.Fatalf("%s is cut off: records %v, %v", name, blocks, err)
	}
}

// TestRotInRecords: whatever bit of the log rots, it is refused or nothing is missing
// but the last frame, of which no other knows that it was durable.
func TestRotInRecords(t *testing.T) {
	d := disktest.New("d")
	l := mustReopen(t, d)
	for b := range uint32(4) {
		add(t, l, b)
	}
	end, name := l.off, segmentName("wal", l.seg.slot)
	_ = l.Close()
	refused := 0
	for off := int64(0); off < end; off += 3 {
		rotten := d.Restart()
		if err := rotten.Flip(name, off, 2); err != nil {
			t.Fatal(err)
		}
		l, blocks, err := reopen(rotten)
		if errors.Is(err, ErrDamaged) {
			refused++
			continue
		}
		if err != nil {
			t.Fatalf("rot at %d: %v", off, err)
		}
		_ = l.Close()
		if all := []uint32{0, 1, 2, 3}; len(blocks) < 3 || !slices.Equal(blocks, all[:len(blocks)]) {
			t.Fatalf("rot at %d: records %v", off, blocks)
		}
	}
	if refused == 0 {
		t.Error("nothing was refused")
	}
}

// TestKilledAfterStartFailed: a log is found after the power went, whole or not; any sync of its opening fails, which the system says
// once, and its process is killed. The next opening finds in the page cache what that sync was to make durable, and goes on. When the power goes again,
// what was durable then is there, and nothing else.
func TestKilledAfterStartFailed(t *testing.T) {
	voided := false
	for seed := range uint64(12) {
		d := disktest.New("d")
		l := mustReopen(t, d)
		add(t, l, 1)
		for _, b := range []uint32{2, 3} { // written and not synced
			r := Record{Type: Hole, SizeShift: 22, Key: object.Key{ID: 3}, Block: b, Count: 1}
			if _, err := l.Append(&r, nil, true, nil); err != nil {
				t.Fatal(err)
			}
			rotate(t, l)
		}
		found := d.Reopen(seed)
		for at := 1; ; at++ {
			d := found.Restart()
			n := 0
			d.Hook(func(op disktest.Op) error {
				if op.Kind != disktest.OpSync {
					return nil
				}
				if n++; n == at {
					return syscall.EIO
				}
				return nil
			})
			l, _, err := reopen(d)
			if err == nil {
				_ = l.Close()
				break
			}
			d = d.Restart()
			l, blocks, err := reopen(d)
			if err != nil {
				t.Fatalf("seed %d, sync %d: %v", seed, at, err)
			}
			voided = voided || len(blocks) < 3
			add(t, l, 4)
			for second := range uint64(4) {
				got, after, err := reopen(d.Reopen(second))
				if err != nil {
					t.Fatalf("seed %d, sync %d, %d: %v", seed, at, second, err)
				}
				_ = got.Close()
				if !slices.Equal(after, append(slices.Clone(blocks), 4)) {
					t.Fatalf("seed %d, sync %d, %d: records %v after %v and 4", seed, at, second, after, blocks)
				}
			}
			_ = l.Close()
		}
	}
	if !voided {
		t.Error("the log was always whole")
	}
}
