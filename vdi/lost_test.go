package vdi_test

import (
	"errors"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"time"

	"sheepdog/storage/object"
	"sheepdog/vdi"
	"sheepdog/vdi/vditest"
)

// Who keeps the objects loses its power and comes back, while the gateways go on: what was not flushed may be lost.

var luck = rand.New(rand.NewPCG(1, 1))

// familyOf is a VDI of four objects with a snapshot, all of it flushed.
func familyOf(t *testing.T, w *vditest.World, s *vdi.Service) *vdi.Volume {
	t.Helper()
	v := create(t, s, "v", 4<<20)
	write(t, v, 0, 2<<20, 'a')
	if err := v.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	must[vdi.Info](t)(s.Snapshot(ctx, "v", "base"))
	return v
}

// A flush says that something may be lost, and then the map is what is stored, not what it was in memory: what is written and flushed
// afterwards is there after the end of the process.
func TestMapIsReadAgainWhenWritesAreLost(t *testing.T) {
	for _, fua := range []vdi.Flags{0, vdi.FlagFUA} {
		w := vditest.NewWorld(t)
		s := w.Service()
		v := familyOf(t, w, s)
		write(t, v, 0, 4096, 'b')
		write(t, v, 3<<20, 4096, 'n')
		w.Objects.Restart(luck, 0)
		if err := v.Flush(ctx); !errors.Is(err, vdi.ErrIO) {
			t.Fatalf("flush: %v, want a %v", err, vdi.ErrIO)
		}
		done := make(chan error)
		r := vdi.Request{Op: vdi.OpWrite, Flags: fua, Off: 8192, Len: 4096, Data: make([]byte, 4096), Done: func(r *vdi.Request) { done <- r.Err }}
		r.Data[0] = 'c'
		go func() { v.Submit(&r); v.Kick() }()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		if fua == 0 {
			if err := v.Flush(ctx); err != nil {
				t.Fatal(err)
			}
		}
		if b := byteAt(t, v, 3<<20); b != 0 {
			t.Errorf("what was lost over a hole is %q", b)
		}
		w.Crash(luck, 0)
		again := open(t, w.Service(), "v")
		if b := byteAt(t, again, 8192); b != 'c' {
			t.Errorf("flags %d: what was made durable after the loss is %q", fua, b)
		}
		if b := byteAt(t, again, 0); b != 'a' && b != 'b' {
			t.Errorf("flags %d: what was lost is %q", fua, b)
		}
	}
}

// Whoever finds out first that something may be lost, be it the volume itself: the client's next flush says so, once.
func TestLossIsToldByNextFlush(t *testing.T) {
	for _, c := range []struct {
		name string
		sync func(s *vdi.Service, v *vdi.Volume) error
		// closed: it closes the volume.
		closed bool
	}{
		{name: "copy on write", sync: func(_ *vdi.Service, v *vdi.Volume) error {
			_, err := v.WriteAt(ctx, []byte("c"), 1<<20)
			return err
		}},
		{name: "snapshot", sync: func(s *vdi.Service, _ *vdi.Volume) error {
			_, err := s.Snapshot(ctx, "v", "two")
			return err
		}},
		{name: "shrink", sync: func(s *vdi.Service, _ *vdi.Volume) error {
			_, err := s.Resize(ctx, "v", 4<<20-4096)
			return err
		}},
		{name: "in the background", sync: func(s *vdi.Service, _ *vdi.Volume) error { return s.Collect(ctx) }},
		{name: "in the background, with nobody there", closed: true, sync: func(s *vdi.Service, v *vdi.Volume) error {
			v.Close()
			return s.Collect(ctx)
		}},
		{name: "another client's flush", sync: func(s *vdi.Service, _ *vdi.Volume) error {
			o, err := s.Open(ctx, "v", "", vdi.OpenOptions{Client: "another"})
			if err != nil {
				return err
			}
			defer o.Close()
			return o.Flush(ctx)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := vditest.NewWorld(t)
			s := w.Service()
			v := familyOf(t, w, s)
			write(t, v, 3<<20, 4096, 'n')
			w.Objects.Restart(luck, 0)
			if err := c.sync(s, v); !errors.Is(err, vdi.ErrIO) {
				t.Fatalf("%v, want a %v", err, vdi.ErrIO)
			}
			if c.closed {
				v = open(t, s, "v")
			}
			if err := v.Flush(ctx); !errors.Is(err, vdi.ErrIO) {
				t.Errorf("flush: %v, want a %v", err, vdi.ErrIO)
			}
			if err := v.Flush(ctx); err != nil {
				t.Errorf("the flush after it: %v", err)
			}
			if err := open(t, s, "v").Flush(ctx); err != nil {
				t.Errorf("who comes later: %v", err)
			}
		})
	}
}

// A gateway tells its client also if others have given the VDI another vid meanwhile.
func TestLossIsToldUnderAnotherVID(t *testing.T) {
	for _, writes := range []bool{false, true} {
		c := vditest.NewCluster(t, 1)
		a, b := c.Gateway("a"), c.Gateway("b")
		v := create(t, a.Service, "v", 4<<20)
		write(t, v, 0, 4096, 'n')
		c.Objects.Restart(luck, 0)
		b.CatchUp()
		must[vdi.Info](t)(b.Snapshot(ctx, "v", "base"))
		if writes {
			write(t, v, 1<<20, 4096, 'w')
		}
		if err := v.Flush(ctx); !errors.Is(err, vdi.ErrIO) {
			t.Errorf("written in between: %v, flush: %v, want a %v", writes, err, vdi.ErrIO)
		}
	}
}

// A client that goes on through another gateway, or the same one anew, when its own was killed finds what it had written, and its flush
// makes that durable: an initiator with several paths flushes through one what it has written through another.
func TestFlushCoversWhatGoneGatewayWrote(t *testing.T) {
	for _, name := range []string{"b", "a"} {
		c := vditest.NewCluster(t, 1)
		a := c.Gateway("a")
		other := c.Gateway("b")
		v := create(t, a.Service, "v", 4<<20)
		write(t, v, 0, 4096, 'w')
		a.Kill()
		if name == "a" {
			other = c.Gateway("a")
		}
		other.CatchUp()
		v = open(t, other.Service, "v")
		if b := byteAt(t, v, 0); b != 'w' {
			t.Fatalf("through %s: %q", name, b)
		}
		if err := v.Flush(ctx); err != nil {
			t.Fatal(err)
		}
		other.Kill()
		c.Crash(0)
		g := c.Gateway("c")
		g.CatchUp()
		if b := byteAt(t, open(t, g.Service, "v"), 0); b != 'w' {
			t.Errorf("flushed through %s: %q", name, b)
		}
	}
}

// A collector that has read in a map that an object is not needed removes it only if that is durable: a power cut in between brings the
// entry back.
func TestGarbageIsWhatDurableMapsDoNotName(t *testing.T) {
	for _, keep := range []float64{0, 1} {
		c := vditest.NewCluster(t, 1)
		a, b := c.Gateway("a"), c.Gateway("b")
		v := create(t, a.Service, "v", 4<<20)
		write(t, v, 0, 4096, 'a')
		must[vdi.Info](t)(a.Snapshot(ctx, "v", "base"))
		write(t, v, 0, 1, 'b') // its entry is not durable
		if err := a.Delete(ctx, "v", "base"); err != nil {
			t.Fatal(err)
		}
		b.CatchUp()
		now, err := a.Info(ctx, "v", "")
		if err != nil {
			t.Fatal(err)
		}
		var read, cut atomic.Bool
		c.Objects.Fault = func(what string, id object.ID) error {
			switch kind, _ := id.Kind(); {
			case what == "read" && kind == object.KindMap && id.VID() == now.VID:
				read.Store(true)
			case what == "sync" && read.Load() && cut.CompareAndSwap(false, true):
				c.Objects.Restart(luck, keep)
			}
			return nil
		}
		if err := b.Collect(ctx); err != nil || !cut.Load() {
			t.Fatalf("collect: %v, the power was cut: %v", err, cut.Load())
		}
		if b := byteAt(t, v, 1); b != 'a' {
			t.Errorf("keeping %v: what was copied on write is %q", keep, b)
		}
		if err := v.Flush(ctx); !errors.Is(err, vdi.ErrIO) {
			t.Errorf("keeping %v: flush: %v", keep, err)
		}
		if b := byteAt(t, v, 1); b != 'a' {
			t.Errorf("keeping %v: what was copied on write is %q, by the stored map", keep, b)
		}
	}
}

// What a flush has said to nobody, for its client has gone meanwhile, is said again to who opens the VDI; what was heard is not, however
// it is opened.
func TestUnheardLossIsToldAgain(t *testing.T) {
	for _, heard := range []bool{false, true} {
		w := vditest.NewWorld(t)
		s := w.Service()
		v := familyOf(t, w, s)
		write(t, v, 3<<20, 4096, 'n')
		w.Objects.Restart(luck, 0)
		done := make(chan error, 1)
		r := vdi.Request{Op: vdi.OpFlush, Done: func(r *vdi.Request) { done <- r.Err }}
		v.Submit(&r)
		v.Kick()
		if err := <-done; !errors.Is(err, vdi.ErrIO) {
			t.Fatalf("flush: %v, want a %v", err, vdi.ErrIO)
		}
		if heard {
			v.Heard()
		}
		vid := open(t, s, "v").VID()
		for i, quiet := range []bool{false, true, false} {
			o, err := s.OpenVID(vid, "native", quiet)
			if err != nil {
				t.Fatal(err)
			}
			if err := o.Flush(ctx); errors.Is(err, vdi.ErrIO) != (!heard && i == 0) {
				t.Errorf("heard %v: flush %d of who comes later: %v", heard, i, err)
			}
			o.Close()
		}
		if err := open(t, s, "v").Flush(ctx); err != nil {
			t.Errorf("heard %v: flush of who comes last: %v", heard, err)
		}
	}
}

// A gateway forgets who holds what it has written and not flushed of a VDI that another one deletes, when nobody has it open any more.
func TestUnflushedOfDeletedIsForgotten(t *testing.T) {
	c := vditest.NewCluster(t, 1)
	a, b := c.Gateway("a"), c.Gateway("b")
	v := create(t, a.Service, "v", 4<<20)
	write(t, v, 0, 4096, 'a')
	if err := b.Delete(ctx, "v", ""); err != nil {
		t.Fatal(err)
	}
	a.CatchUp()
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	if err := b.Collect(ctx); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); len(c.Objects.Unflushed()) > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("who holds changes of %v is still to be remembered", c.Objects.Unflushed())
		}
	}
}

// toldToAnother cuts the power when something is done to an object for the n-th time, and has another client hear of what is lost by its flush
// before that goes on.
func toldToAnother(t *testing.T, w *vditest.World, other *vdi.Volume, what string, kind object.Kind, n int) *atomic.Bool {
	var cut atomic.Bool
	count := 0
	w.Objects.Fault = func(now string, id object.ID) error {
		k, _ := id.Kind()
		if now != what || k != kind || cut.Load() {
			return nil
		}
		if count++; count == n {
			cut.Store(true)
			w.Objects.Restart(luck, 0)
			if err := other.Flush(ctx); !errors.Is(err, object.ErrLost) {
				t.Errorf("flush: %v, want %v", err, object.ErrLost)
			}
		}
		return nil
	}
	return &cut
}

// A shrink whose discards a power cut has undone goes on with them, also if somebody else has heard of the loss: what was cut off never comes
// back.
func TestTrimThatWasLostIsDoneAgain(t *testing.T) {
	w := vditest.NewWorld(t)
	s := w.Service()
	v := create(t, s, "v", 4<<20)
	write(t, v, 0, 4<<20, 'a')
	must[vdi.Info](t)(s.Snapshot(ctx, "v", "base"))
	write(t, v, 2<<20, 1<<20, 'b')
	if err := v.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	cut := toldToAnother(t, w, open(t, s, "v"), "write", object.KindMap, 1) // the entry of what is the snapshot's
	const size = 2<<20 + 4096
	if _, err := s.Resize(ctx, "v", size); err != nil || !cut.Load() {
		t.Fatalf("shrink: %v, the power was cut: %v", err, cut.Load())
	}
	if _, err := s.Resize(ctx, "v", 4<<20); err != nil {
		t.Fatal(err)
	}
	for _, off := range []int64{size, 3 << 20} {
		if b := byteAt(t, open(t, s, "v"), off); b != 0 {
			t.Errorf("at %d, which was cut off, is %q", off, b)
		}
	}
}

// An object that was discarded goes only when its hole in the map is durable. A power cut that has undone that, of which somebody else has heard,
// brings back an entry: its object is there.
func TestObjectStaysWhenItsHoleWasLost(t *testing.T) {
	w := vditest.NewWorld(t)
	s := w.Service()
	const far = 2000 << 20 // in another page of the map
	v := create(t, s, "v", far+1<<20)
	for _, off := range []int64{0, far} {
		write(t, v, off, 4096, 'a')
	}
	if err := errors.Join(v.Flush(ctx), s.Collect(ctx), v.Discard(ctx, 0, 1<<20), v.Discard(ctx, far, 1<<20), v.Flush(ctx)); err != nil {
		t.Fatal(err)
	}
	cut := toldToAnother(t, w, open(t, s, "v"), "write", object.KindMap, 2)
	if err := s.Collect(ctx); err != nil && !errors.Is(err, vdi.ErrStale) && !errors.Is(err, vdi.ErrIO) || !cut.Load() {
		t.Fatalf("collect: %v, the power was cut: %v", err, cut.Load())
	}
	for _, off := range []int64{0, far} {
		if b := byteAt(t, v, off); b != 0 {
			t.Errorf("at %d, which was discarded, is %q", off, b)
		}
	}
}

// A write with FUA to an object that is new is durable when it is answered, also if a power cut has taken the object's entry meanwhile and
// somebody else has heard of that.
func TestFUARenewsEntryThatWasLost(t *testing.T) {
	w := vditest.NewWorld(t)
	s := w.Service()
	v := create(t, s, "v", 4<<20)
	write(t, v, 0, 4096, 'n')
	cut := toldToAnother(t, w, open(t, s, "v"), "write", object.KindData, 1)
	done := make(chan error, 1)
	r := vdi.Request{Op: vdi.OpWrite, Flags: vdi.FlagFUA, Off: 8192, Len: 1, Data: []byte("f"), Done: func(r *vdi.Request) { done <- r.Err }}
	v.Submit(&r)
	v.Kick()
	if err := <-done; err != nil || !cut.Load() {
		t.Fatalf("write with FUA: %v, the power was cut: %v", err, cut.Load())
	}
	w.Crash(luck, 0)
	if b := byteAt(t, open(t, w.Service(), "v"), 8192); b != 'f' {
		t.Errorf("what was written with FUA is %q", b)
	}
}
