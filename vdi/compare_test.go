package vdi_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"sheepdog/vdi"
	"sheepdog/vdi/vditest"
)

// scenario is a VDI with snapshots t0, t1, … and what each had.
type scenario struct {
	s       *vdi.Service
	w       *vditest.World
	content map[string][]byte // by tag, "" the VDI itself
	size    int64
}

const scenarioSize = 3<<20 + 12345

func newScenario(t *testing.T, seed uint64) *scenario {
	w := vditest.NewWorld(t)
	x := &scenario{s: w.Service(), w: w, content: map[string][]byte{}, size: scenarioSize}
	rng := rand.New(rand.NewPCG(seed, 3))
	if _, err := x.s.Create(ctx, vdi.CreateOptions{Name: "v", Size: x.size, ObjectSizeShift: 20}); err != nil {
		t.Fatal(err)
	}
	v := x.open(t, "")
	now := make([]byte, x.size)
	for k := range 4 {
		for range 1 + rng.IntN(6) {
			off := rng.Int64N(x.size)
			n := 1 + rng.Int64N(min(x.size-off, 300000))
			var err error
			if rng.IntN(3) == 0 {
				clear(now[off:][:n])
				err = v.Discard(ctx, off, n)
			} else {
				for i := range now[off:][:n] {
					now[off:][i] = byte(rng.Uint32())
				}
				_, err = v.WriteAt(ctx, now[off:][:n], off)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		if k < 3 {
			tag := fmt.Sprint("t", k)
			if _, err := x.s.Snapshot(ctx, "v", tag); err != nil {
				t.Fatal(err)
			}
			x.content[tag] = bytes.Clone(now)
		}
	}
	x.content[""] = now
	return x
}

func (x *scenario) open(t *testing.T, tag string) *vdi.Volume {
	v, err := x.s.Open(ctx, "v", tag, vdi.OpenOptions{Client: "test"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { v.Close() })
	return v
}

// What Changed calls unchanged is unchanged, and what it calls changed has changed in
// every block of 4 KiB; the extents cover the range, in order, and neighbours differ.
func TestChanged(t *testing.T) {
	for seed := range uint64(8) {
		x := newScenario(t, seed)
		rng := rand.New(rand.NewPCG(seed, 4))
		for _, to := range []string{"", "t1", "t2"} {
			for _, from := range []string{"t0", "t1", "t2"} {
				off := rng.Int64N(x.size)
				n := rng.Int64N(x.size - off + 1)
				if rng.IntN(2) == 0 {
					off, n = 0, x.size
				}
				checkChanged(t, x, from, to, off, n)
			}
		}
	}
}

func checkChanged(t *testing.T, x *scenario, from, to string, off, n int64) {
	t.Helper()
	v := x.open(t, to)
	at, last := off, -1
	err := v.Changed(ctx, from, off, n, func(e vdi.ChangedExtent) bool {
		changed := 0
		if e.Changed {
			changed = 1
		}
		if e.Off != at || e.Len <= 0 || changed == last {
			t.Fatalf("extent %+v after %d", e, at)
		}
		at, last = e.Off+e.Len, changed
		for b := e.Off; b < at; b = b/4096*4096 + 4096 {
			// The whole block, of which the range may have a part only.
			start, end := b/4096*4096, min(b/4096*4096+4096, x.size)
			same := bytes.Equal(x.content[from][start:end], x.content[to][start:end])
			if same == e.Changed {
				t.Fatalf("from %q to %q: block at %d is in %+v, same: %v", from, to, start, e, same)
			}
		}
		return true
	})
	if err != nil || at != off+n {
		t.Fatalf("%v: covered up to %d of %d", err, at, off+n)
	}
}

func TestDiff(t *testing.T) {
	for seed := range uint64(8) {
		x := newScenario(t, seed)
		for _, to := range []string{"", "t1", "t2"} {
			for _, from := range []string{"", "t0", "t1"} {
				if from == to && from != "" {
					continue
				}
				was := make([]byte, x.size)
				if from != "" {
					was = bytes.Clone(x.content[from])
				}
				at := int64(-1)
				err := x.s.Diff(ctx, "v", from, to, func(e vdi.Extent) bool {
					if e.Off <= at && at >= 0 && e.Off < at {
						t.Fatalf("extent %+v after %d", e, at)
					}
					at = e.Off + e.Len
					piece := x.content[to][e.Off:at]
					if e.Zero && !bytes.Equal(piece, make([]byte, len(piece))) {
						t.Fatalf("extent %+v is not zero", e)
					}
					copy(was[e.Off:], piece)
					return true
				})
				if err != nil || !bytes.Equal(was, x.content[to]) {
					t.Fatalf("from %q to %q: %v, or the difference is not complete", from, to, err)
				}
			}
		}
	}
}

// Holes are zero; what has data is no hole; a new volume is one hole.
func TestExtents(t *testing.T) {
	for seed := range uint64(8) {
		x := newScenario(t, seed)
		for _, tag := range []string{"", "t0"} {
			v := x.open(t, tag)
			at := int64(100)
			err := v.Extents(ctx, 100, x.size-100, func(e vdi.Extent) bool {
				if e.Off != at || e.Len <= 0 {
					t.Fatalf("extent %+v after %d", e, at)
				}
				at += e.Len
				if zeros := make([]byte, e.Len); e.Hole && !bytes.Equal(zeros, x.content[tag][e.Off:at]) {
					t.Fatalf("hole %+v has data", e)
				}
				return true
			})
			if err != nil || at != x.size {
				t.Fatalf("%v: covered up to %d", err, at)
			}
		}
	}
	s := vditest.New(t)
	if _, err := s.Create(ctx, vdi.CreateOptions{Name: "big", Size: vdi.MaxSize, ObjectSizeShift: 20}); err != nil {
		t.Fatal(err)
	}
	v, err := s.Open(ctx, "big", "", vdi.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	count := 0
	err = v.Extents(ctx, 0, vdi.MaxSize, func(e vdi.Extent) bool {
		if count++; !e.Hole || e.Len != vdi.MaxSize {
			t.Errorf("extent %+v", e)
		}
		return true
	})
	if err != nil || count != 1 {
		t.Errorf("%v, %d extents", err, count)
	}
}

// Backups bring back each snapshot, full or as a chain of increments; damaged, cut off,
// or on another base they are refused and leave the VDI as it was.
func TestBackup(t *testing.T) {
	x := newScenario(t, 1)
	stream := func(from, tag string) []byte {
		var b bytes.Buffer
		if err := x.s.Backup(ctx, "v", from, tag, &b, nil); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	full, inc, inc2 := stream("", "t0"), stream("t0", "t1"), stream("t1", "t2")
	restore := func(name string, b []byte) error {
		_, err := x.s.Restore(ctx, name, bytes.NewReader(b), nil)
		return err
	}
	same := func(name, tag, want string) {
		t.Helper()
		v, err := x.s.Open(ctx, name, tag, vdi.OpenOptions{ReadOnly: true})
		if err != nil {
			t.Fatal(err)
		}
		defer v.Close()
		p := make([]byte, v.Size())
		if _, err := v.ReadAt(ctx, p, 0); err != nil || !bytes.Equal(p, x.content[want]) {
			t.Fatalf("%s@%s is not %s: %v", name, tag, want, err)
		}
	}
	if err := restore("n", inc); !errors.Is(err, vdi.ErrNotFound) {
		t.Errorf("increment into nothing: %v", err)
	}
	if err := restore("n", full[:len(full)-1]); !errors.Is(err, vdi.ErrInvalid) {
		t.Errorf("cut off: %v", err)
	}
	if _, err := x.s.Info(ctx, "n", ""); !errors.Is(err, vdi.ErrNotFound) {
		t.Errorf("a failed restore leaves a VDI: %v", err)
	}
	if err := restore("n", full); err != nil {
		t.Fatal(err)
	}
	if err := restore("n", full); !errors.Is(err, vdi.ErrExists) {
		t.Errorf("full into an existing VDI: %v", err)
	}
	if err := restore("n", inc2); !errors.Is(err, vdi.ErrNotFound) {
		t.Errorf("an increment was left out: %v", err)
	}
	bad := bytes.Clone(inc)
	bad[len(bad)-40] ^= 1
	if err := restore("n", bad); !errors.Is(err, vdi.ErrInvalid) {
		t.Errorf("damaged: %v", err)
	}
	same("n", "", "t0")
	if err := restore("n", inc); err != nil {
		t.Fatal(err)
	}
	if err := restore("n", inc2); err != nil {
		t.Fatal(err)
	}
	same("n", "t0", "t0")
	same("n", "t1", "t1")
	same("n", "", "t2")
	v, err := x.s.Open(ctx, "n", "", vdi.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := v.WriteAt(ctx, []byte("changed"), 5); err != nil {
		t.Fatal(err)
	}
	v.Close()
	if _, err := x.s.Snapshot(ctx, "v", "t3"); err != nil {
		t.Fatal(err)
	}
	if err := restore("n", stream("t2", "t3")); !errors.Is(err, vdi.ErrInvalid) {
		t.Errorf("the VDI was changed since: %v", err)
	}
	if _, err := x.s.Rollback(ctx, "n", "t2"); err != nil {
		t.Fatal(err)
	}
	if err := restore("n", stream("t2", "t3")); err != nil {
		t.Error(err)
	}
	same("n", "t3", "")
}
