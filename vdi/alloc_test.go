//go:build !race

package vdi_test

import (
	"fmt"
	"testing"

	"sheepdog/storage/object"
	"sheepdog/vdi"
	"sheepdog/vdi/vditest"
)

// silent completes everything at once; only maps are kept.
type silent struct {
	*vditest.Objects
	held *object.Request
}

func (s *silent) Submit(r *object.Request) {
	if k, _ := r.ID.Kind(); k != object.KindData {
		s.Objects.Submit(r)
		return
	}
	if r.Op == object.OpRead {
		r.Complete(nil)
		return
	}
	r.Next, s.held = s.held, r
}

func (s *silent) Kick() {
	s.Objects.Kick()
	for s.held != nil {
		r := s.held
		s.held = r.Next
		r.Complete(nil)
	}
}

func prepared(t testing.TB, size int64) *vdi.Volume {
	w := vditest.NewWorld(t)
	w.Config = func(c *vdi.Config) { c.Objects = &silent{Objects: w.Objects} }
	s := w.Service()
	if _, err := s.Create(ctx, vdi.CreateOptions{Name: "v", Size: size}); err != nil {
		t.Fatal(err)
	}
	v, err := s.Open(ctx, "v", "", vdi.OpenOptions{Client: "test"})
	if err != nil {
		t.Fatal(err)
	}
	for off := int64(0); off < 64<<20; off += v.ObjectSize() {
		if _, err := v.WriteAt(ctx, []byte{1}, off); err != nil {
			t.Fatal(err)
		}
	}
	if err := v.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	if err := s.Collect(ctx); err != nil { // settles the map
		t.Fatal(err)
	}
	return v
}

var usual = []struct {
	name string
	r    vdi.Request
}{
	{"read", vdi.Request{Op: vdi.OpRead, Off: 4096, Len: 4096, Data: make([]byte, 4096)}},
	{"read hole", vdi.Request{Op: vdi.OpRead, Off: 1 << 30, Len: 4096, Data: make([]byte, 4096)}},
	{"read of two objects", vdi.Request{Op: vdi.OpRead, Off: 4<<20 - 2048, Len: 4096, Data: make([]byte, 4096)}},
	{"write", vdi.Request{Op: vdi.OpWrite, Off: 4096, Len: 4096, Data: make([]byte, 4096)}},
	{"write of two objects", vdi.Request{Op: vdi.OpWrite, Off: 4<<20 - 2048, Len: 4096, Data: make([]byte, 4096)}},
	{"write FUA", vdi.Request{Op: vdi.OpWrite, Flags: vdi.FlagFUA, Off: 4096, Len: 4096, Data: make([]byte, 4096)}},
	{"zero", vdi.Request{Op: vdi.OpZero, Off: 4096, Len: 4096}},
	{"discard", vdi.Request{Op: vdi.OpDiscard, Off: 4096, Len: 4096}},
	{"discard hole", vdi.Request{Op: vdi.OpDiscard, Off: 1 << 30, Len: 4 << 20}},
}

// The usual request allocates nothing and is done when Kick returns: no goroutine takes part.
func TestFastPath(t *testing.T) {
	v := prepared(t, 4<<30)
	for _, c := range usual {
		t.Run(c.name, func(t *testing.T) {
			r := c.r
			done := 0
			r.Done = func(*vdi.Request) { done++ }
			want := 0
			got := testing.AllocsPerRun(200, func() {
				want++
				v.Submit(&r)
				v.Kick()
				if done != want {
					t.Error("the request waits for another goroutine")
				}
			})
			if r.Err != nil || got != 0 {
				t.Errorf("%v allocations, error %v", got, r.Err)
			}
		})
	}
}

func BenchmarkFastPath(b *testing.B) {
	v := prepared(b, 4<<30)
	for _, c := range usual {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			r := c.r
			r.Done = func(*vdi.Request) {}
			for b.Loop() {
				v.Submit(&r)
				v.Kick()
			}
		})
	}
}

// Thin: a new VDI costs no objects, whatever its size.
func BenchmarkCreate(b *testing.B) {
	b.ReportAllocs()
	w := vditest.NewWorld(b)
	s := w.Service()
	n := 0
	for b.Loop() {
		n++
		if _, err := s.Create(ctx, vdi.CreateOptions{Name: fmt.Sprint("v", n), Size: 1 << 40}); err != nil {
			b.Fatal(err)
		}
	}
	if c := w.Objects.Count(); c > 0 {
		b.Fatalf("%d objects", c)
	}
}

// A snapshot of 256 GiB in 65536 objects.
func BenchmarkSnapshot(b *testing.B) {
	w := vditest.NewWorld(b)
	w.Config = func(c *vdi.Config) { c.Objects = &silent{Objects: w.Objects} }
	s := w.Service()
	if _, err := s.Create(ctx, vdi.CreateOptions{Name: "v", Size: 256 << 30}); err != nil {
		b.Fatal(err)
	}
	v, err := s.Open(ctx, "v", "", vdi.OpenOptions{Client: "benchmark"})
	if err != nil {
		b.Fatal(err)
	}
	for off := int64(0); off < v.Size(); off += v.ObjectSize() {
		if _, err := v.WriteAt(ctx, []byte{1}, off); err != nil {
			b.Fatal(err)
		}
	}
	for b.Loop() {
		if _, err := s.Snapshot(ctx, "v", ""); err != nil {
			b.Fatal(err)
		}
	}
}
