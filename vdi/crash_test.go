package vdi_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"

	"sheepdog/storage/object"
	"sheepdog/vdi"
	"sheepdog/vdi/vditest"
)

// A procedure is crashed at each of its steps. Before it, VDI v has four objects of 'a' and two
// holes, flushed, its snapshot "base" has the same, and after it the first half of v was
// written with 'b', flushed.
type procedure struct {
	name string
	run  func(s *vdi.Service, v *vdi.Volume) error
	// may says what a byte of v may be after a crash, by its object.
	may func(object int) string
	// gone: v may be deleted.
	gone bool
	// every: of its many steps, every so many-th is tried; 0 is 1.
	every int64
	// also lists names that may have come to be, with what they then have.
	also map[string]string
}

const (
	crashSize    = 6 << 20
	crashWritten = 4 << 20  // the rest is holes
	looked       = 64 << 10 // bytes of each object that are written before, and looked at after
)

var procedures = []procedure{
	{name: "copy on write", may: func(o int) string { return [...]string{"b", "b", "a", "aw", "\x00", "\x00"}[o] }, run: func(s *vdi.Service, v *vdi.Volume) error {
		_, err := v.WriteAt(ctx, bytes.Repeat([]byte("w"), 1<<20), 3<<20)
		return err
	}},
	{name: "partial copy on write", may: func(o int) string { return [...]string{"b", "b", "a", "aw", "\x00", "\x00"}[o] }, run: func(s *vdi.Service, v *vdi.Volume) error {
		_, err := v.WriteAt(ctx, bytes.Repeat([]byte("w"), 5000), 3<<20+1000)
		return err
	}},
	{name: "discard", may: func(o int) string { return [...]string{"b\x00", "b", "a", "a\x00", "\x00", "\x00"}[o] }, run: func(s *vdi.Service, v *vdi.Volume) error {
		return errors.Join(v.Discard(ctx, 0, 1<<20), v.Discard(ctx, 3<<20, 1<<20), s.Collect(ctx), v.Flush(ctx))
	}},
	{name: "discard and write again", may: func(o int) string { return [...]string{"bw\x00", "b", "a", "aw\x00", "\x00", "\x00"}[o] }, run: func(s *vdi.Service, v *vdi.Volume) error {
		err := errors.Join(v.Discard(ctx, 0, 1<<20), v.Discard(ctx, 3<<20, 1<<20), v.Flush(ctx), s.Collect(ctx))
		_, err1 := v.WriteAt(ctx, bytes.Repeat([]byte("w"), 5000), 0)
		_, err2 := v.WriteAt(ctx, bytes.Repeat([]byte("w"), 5000), 3<<20)
		return errors.Join(err, err1, err2, v.Flush(ctx))
	}},
	{name: "write holes", may: func(o int) string { return [...]string{"b", "b", "a", "a", "w\x00", "w\x00"}[o] }, run: func(s *vdi.Service, v *vdi.Volume) error {
		_, err := v.WriteAt(ctx, bytes.Repeat([]byte("w"), 100), 4<<20+1000)
		_, err2 := v.WriteAt(ctx, bytes.Repeat([]byte("w"), 4096), 5<<20)
		return errors.Join(err, err2, v.Flush(ctx), s.Collect(ctx))
	}},
	{name: "write holes and snapshot", may: func(o int) string { return [...]string{"b", "b", "a", "a", "w\x00", "w\x00"}[o] }, run: func(s *vdi.Service, v *vdi.Volume) error {
		_, err := v.WriteAt(ctx, bytes.Repeat([]byte("w"), 100), 4<<20+1000)
		_, err2 := s.Snapshot(ctx, "v", "two")
		_, err3 := v.WriteAt(ctx, bytes.Repeat([]byte("w"), 4096), 5<<20)
		return errors.Join(err, err2, err3)
	}},
	{name: "snapshot", may: func(o int) string { return [...]string{"b", "b", "a", "a", "\x00", "\x00"}[o] }, also: map[string]string{"v@two": "bbaa\x00\x00"}, run: func(s *vdi.Service, v *vdi.Volume) error {
		_, err := s.Snapshot(ctx, "v", "two")
		return err
	}},
	{name: "clone", may: func(o int) string { return [...]string{"b", "b", "a", "a", "\x00", "\x00"}[o] }, also: map[string]string{"c": "aaaa\x00\x00"}, run: func(s *vdi.Service, v *vdi.Volume) error {
		_, err := s.Clone(ctx, "v", "base", "c")
		return err
	}},
	{name: "rollback", may: func(o int) string { return [...]string{"ab", "ab", "a", "a", "\x00", "\x00"}[o] }, run: func(s *vdi.Service, v *vdi.Volume) error {
		_, err := s.Rollback(ctx, "v", "base")
		return errors.Join(err, s.Collect(ctx))
	}},
	{name: "shrink and grow", may: func(o int) string { return [...]string{"b", "b\x00", "a\x00", "a\x00", "\x00", "\x00"}[o] }, run: func(s *vdi.Service, v *vdi.Volume) error {
		_, err := s.Resize(ctx, "v", 1<<20+5000)
		_, err2 := s.Resize(ctx, "v", crashSize)
		return errors.Join(err, err2)
	}},
	{name: "alter copies", may: func(o int) string { return [...]string{"b", "b", "a", "a", "\x00", "\x00"}[o] }, run: func(s *vdi.Service, v *vdi.Volume) error {
		_, err := s.AlterCopies(ctx, "v", 3, nil, nil)
		return errors.Join(err, s.Collect(ctx))
	}},
	{name: "alter copies there and back", every: 2, may: func(o int) string { return [...]string{"b", "bw", "a", "aw", "w\x00", "\x00"}[o] }, also: map[string]string{"c": "aaaa\x00\x00"}, run: func(s *vdi.Service, v *vdi.Volume) error {
		_, err := s.Clone(ctx, "v", "base", "c")
		err = errors.Join(err, v.Discard(ctx, 5<<20, 1<<20))
		_, err1 := s.AlterCopies(ctx, "v", 2, nil, nil)
		_, err2 := v.WriteAt(ctx, bytes.Repeat([]byte("w"), 5000), 1<<20)
		_, err3 := v.WriteAt(ctx, bytes.Repeat([]byte("w"), 5000), 4<<20)
		_, err4 := s.AlterCopies(ctx, "c", 1, nil, nil)
		_, err5 := v.WriteAt(ctx, bytes.Repeat([]byte("w"), 5000), 3<<20)
		return errors.Join(err, err1, err2, err3, err4, err5, s.Collect(ctx))
	}},
	{name: "alter copies and snapshot", every: 5, may: func(o int) string { return [...]string{"b", "b", "aw", "a", "w\x00", "\x00"}[o] }, run: func(s *vdi.Service, v *vdi.Volume) error {
		_, err := v.WriteAt(ctx, bytes.Repeat([]byte("w"), 5000), 2<<20)
		_, err1 := s.AlterCopies(ctx, "v", 3, nil, nil)
		_, err2 := s.Snapshot(ctx, "v", "two")
		_, err3 := v.WriteAt(ctx, bytes.Repeat([]byte("w"), 5000), 4<<20)
		err4 := s.Delete(ctx, "v", "two")
		_, err5 := s.AlterCopies(ctx, "v", 2, nil, nil)
		return errors.Join(err, err1, err2, err3, err4, err5, s.Collect(ctx), s.Sweep(ctx))
	}},
	{name: "delete", gone: true, may: func(o int) string { return [...]string{"b", "b", "a", "a", "\x00", "\x00"}[o] }, run: func(s *vdi.Service, v *vdi.Volume) error {
		v.Close()
		return errors.Join(s.Delete(ctx, "v", ""), s.Collect(ctx), s.Sweep(ctx))
	}},
	{name: "delete base", may: func(o int) string { return [...]string{"b", "b", "a", "aw", "\x00", "\x00"}[o] }, run: func(s *vdi.Service, v *vdi.Volume) error {
		err := errors.Join(s.Delete(ctx, "v", "base"), s.Collect(ctx))
		_, err2 := v.WriteAt(ctx, bytes.Repeat([]byte("w"), 5000), 3<<20)
		return errors.Join(err, err2, s.Collect(ctx), s.Sweep(ctx))
	}},
}

func prepareCrash(t *testing.T) (*vditest.World, *vdi.Service, *vdi.Volume) {
	w := vditest.NewWorld(t)
	s := w.Service()
	_, err := s.Create(ctx, vdi.CreateOptions{Name: "v", Size: crashSize, ObjectSizeShift: 20})
	if err != nil {
		t.Fatal(err)
	}
	v, err := s.Open(ctx, "v", "", vdi.OpenOptions{Client: "test"})
	if err != nil {
		t.Fatal(err)
	}
	fill := func(b string, end int64) {
		for off := int64(0); off < end; off += 1 << 20 {
			if _, err := v.WriteAt(ctx, bytes.Repeat([]byte(b), looked), off); err != nil {
				t.Fatal(err)
			}
		}
	}
	fill("a", crashWritten)
	_, err = s.Snapshot(ctx, "v", "base")
	fill("b", crashWritten/2)
	if err := errors.Join(err, v.Flush(ctx)); err != nil {
		t.Fatal(err)
	}
	return w, s, v
}

func TestCrashAtEveryStep(t *testing.T) {
	for _, p := range procedures {
		t.Run(p.name, func(t *testing.T) {
			t.Parallel()
			for step := int64(1); ; step += slow * max(1, p.every) {
				finished := true
				for seed := uint64(0); seed < 4; seed += slow {
					finished = crashOnce(t, p, step, (seed+uint64(step/slow))%4) && finished
				}
				if finished {
					if step < 3 {
						t.Errorf("only %d steps: the test tests nothing", step)
					}
					return
				}
			}
		})
	}
}

// crashOnce reports whether the procedure was through before the crash.
func crashOnce(t *testing.T, p procedure, step int64, seed uint64) bool {
	w, s, v := prepareCrash(t)
	w.Objects.CrashAfter(step)
	err := p.run(s, v)
	if err != nil && !errors.Is(err, vdi.ErrClosed) {
		t.Fatalf("step %d: %v", step, err)
	}
	rng := rand.New(rand.NewPCG(seed, uint64(step)))
	w.Crash(rng, []float64{0, 0.3, 0.7, 1}[seed])
	s = w.Service()
	startAnew(t, s, step)
	if seed%2 == 0 {
		s = snapshotAfter(t, w, s, step)
	}
	for range 2 { // what is read stays, also through collection
		inspect(t, s, p, step)
		if err := errors.Join(s.Collect(ctx), s.Sweep(ctx), s.Collect(ctx)); err != nil {
			t.Fatalf("step %d: collect: %v", step, err)
		}
	}
	emptyOut(t, w, s, fmt.Sprintf("step %d", step))
	return err == nil
}

// startAnew makes a VDI of the name again if it is gone: its vid, which may be the same,
// must bring nothing back.
func startAnew(t *testing.T, s *vdi.Service, step int64) {
	t.Helper()
	if _, err := s.Info(ctx, "v", ""); !errors.Is(err, vdi.ErrNotFound) {
		return
	}
	v := create(t, s, "v", crashSize)
	write(t, v, 0, 1, 0)
	v.Close()
	got, err := content(s, "v", "")
	if err == nil {
		err = onlyBytes(got, func(int) string { return "\x00" })
	}
	if err != nil {
		t.Fatalf("step %d: a new VDI: %v", step, err)
	}
	if err := s.Delete(ctx, "v", ""); err != nil {
		t.Fatal(err)
	}
}

// snapshotAfter takes a snapshot of what the crash has left, and cuts the power once
// more: the snapshot is durable, and its map has no entry whose object may be missing.
func snapshotAfter(t *testing.T, w *vditest.World, s *vdi.Service, step int64) *vdi.Service {
	t.Helper()
	if _, err := s.Info(ctx, "v", ""); err != nil {
		return s
	}
	info, err := s.Snapshot(ctx, "v", "after")
	if err != nil {
		t.Fatalf("step %d: snapshot after the crash: %v", step, err)
	}
	want, err := content(s, "v", "after")
	if err != nil {
		t.Fatalf("step %d: %v", step, err)
	}
	w.Crash(rand.New(rand.NewPCG(1, 1)), 0)
	s = w.Service()
	got, err := content(s, "v", "after")
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("step %d: the snapshot after the crash has changed, or %v", step, err)
	}
	entries := w.Objects.Block(info.Policy, object.NewID(object.KindMap, info.VID, 0), 0)
	for i := 0; i < len(entries); i += 4 {
		if entries[i+3]&0x80 != 0 {
			t.Fatalf("step %d: entry %d of the snapshot's map is unsettled", step, i/4)
		}
	}
	return s
}

// inspect verifies v, its snapshot and what may have come to be, and that v can be
// written, with nothing of the crash coming back.
func inspect(t *testing.T, s *vdi.Service, p procedure, step int64) {
	t.Helper()
	if got, err := content(s, "v", "base"); err == nil {
		if err := onlyBytes(got, func(o int) string { return "aaaa\x00\x00"[o : o+1] }); err != nil {
			t.Fatalf("step %d: the snapshot has changed: %v", step, err)
		}
	} else if !errors.Is(err, vdi.ErrNotFound) {
		t.Fatalf("step %d: %v", step, err)
	}
	got, err := content(s, "v", "")
	if err != nil && !(p.gone && errors.Is(err, vdi.ErrNotFound)) {
		t.Fatalf("step %d: %v", step, err)
	}
	if err := onlyBytes(got, p.may); err != nil {
		t.Fatalf("step %d: %v", step, err)
	}
	for name, want := range p.also {
		base, tag, _ := strings.Cut(name, "@")
		got, err := content(s, base, tag)
		if errors.Is(err, vdi.ErrNotFound) {
			continue
		}
		if err == nil {
			err = onlyBytes(got, func(o int) string { return want[o : o+1] })
		}
		if err != nil {
			t.Fatalf("step %d: %s: %v", step, name, err)
		}
	}
	if got == nil {
		return
	}
	v, err := s.Open(ctx, "v", "", vdi.OpenOptions{Client: "test"})
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	for o := range v.Size() >> 20 {
		if _, err := v.WriteAt(ctx, got[o*looked:][:1], o<<20); err != nil {
			t.Fatalf("step %d: write again: %v", step, err)
		}
	}
	again, err := content(s, "v", "")
	if err != nil || !bytes.Equal(got, again) {
		t.Fatalf("step %d: writing one byte of each object changes others (%v)", step, err)
	}
}

// onlyBytes says which bytes of each object are other than they may be.
func onlyBytes(got []byte, may func(object int) string) error {
	for o := 0; o*looked < len(got); o++ {
		p := got[o*looked : min(len(got), (o+1)*looked)]
		n := 0
		for _, b := range []byte(may(o)) {
			n += bytes.Count(p, []byte{b})
		}
		if n != len(p) {
			return fmt.Errorf("object %d has %d bytes that are none of %q, and begins with %q", o, len(p)-n, may(o), p[:1])
		}
	}
	return nil
}

func content(s *vdi.Service, name, tag string) ([]byte, error) {
	v, err := s.Open(ctx, name, tag, vdi.OpenOptions{ReadOnly: true, Client: "test"})
	if err != nil {
		return nil, err
	}
	defer v.Close()
	var p []byte
	for off := int64(0); off < v.Size(); off += 1 << 20 {
		b := make([]byte, min(looked, v.Size()-off))
		if _, err := v.ReadAt(ctx, b, off); err != nil {
			return nil, err
		}
		p = append(p, b...)
	}
	return p, nil
}

// emptyOut deletes everything and looks whether anything is left.
func emptyOut(t *testing.T, w *vditest.World, s *vdi.Service, when string) {
	t.Helper()
	list, err := s.List(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range list {
		tag := ""
		if i.Snapshot {
			tag = fmt.Sprint(i.SnapshotID)
		}
		if err := s.Delete(ctx, i.Name, tag); err != nil {
			t.Fatalf("%s: %v", when, err)
		}
	}
	if err := errors.Join(s.Collect(ctx), s.Sweep(ctx), s.Collect(ctx)); err != nil {
		t.Fatalf("%s: %v", when, err)
	}
	if ids := w.Objects.IDs(); len(ids) > 0 {
		t.Fatalf("%s: everything is deleted, but there are objects %v", when, ids)
	}
	if b, _ := w.Catalog.Snapshot(); !bytes.Contains(b, []byte(`"vdis":null`)) {
		t.Fatalf("%s: the catalog still has %s", when, b)
	}
}

// One operation on the objects fails, each in turn: the request or call says so with the
// right kind, nothing else is harmed, and trying again works.
func TestFaultAtEveryStep(t *testing.T) {
	for _, p := range procedures {
		t.Run(p.name, func(t *testing.T) {
			t.Parallel()
			for n := 1; ; n += slow * int(max(1, p.every)) {
				w, s, v := prepareCrash(t)
				var mu sync.Mutex
				count := 0
				w.Objects.Fault = func(what string, id object.ID) error {
					mu.Lock()
					defer mu.Unlock()
					if what == "list" {
						return nil
					}
					if count++; count == n {
						return fmt.Errorf("no room: %w", object.ErrNoSpace)
					}
					return nil
				}
				err := p.run(s, v)
				last := count < n
				count = n + 1 // no fault any more
				if err != nil && !errors.Is(err, vdi.ErrNoSpace) {
					t.Fatalf("fault %d: %v", n, err)
				}
				inspect(t, s, p, int64(n))
				v.Close()
				emptyOut(t, w, s, fmt.Sprintf("fault %d", n))
				if last {
					return
				}
			}
		})
	}
}

// What a crash left under the id of an object is never read as content, whatever the
// next crash keeps.
func TestGarbageStaysGarbage(t *testing.T) {
	for seed := range uint64(100 / slow) {
		w := vditest.NewWorld(t)
		s := w.Service()
		v := create(t, s, "v", 4<<20)
		w.Objects.Put(vditest.Policy, object.DataID(v.VID(), 0), 20, 5, bytes.Repeat([]byte("g"), 4096))
		write(t, v, 0, 100, 'w')
		w.Crash(rand.New(rand.NewPCG(seed, 9)), 0.5)
		got, err := content(w.Service(), "v", "")
		if err == nil {
			err = onlyBytes(got, func(int) string { return "w\x00" })
		}
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
	}
}
