package vdi_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"sheepdog/storage/object"
	"sheepdog/vdi"
	"sheepdog/vdi/vditest"
)

func create(t *testing.T, s *vdi.Service, name string, size int64) *vdi.Volume {
	t.Helper()
	if _, err := s.Create(ctx, vdi.CreateOptions{Name: name, Size: size, ObjectSizeShift: 20}); err != nil {
		t.Fatal(err)
	}
	return open(t, s, name)
}

func open(t *testing.T, s *vdi.Service, name string) *vdi.Volume {
	t.Helper()
	v, err := s.Open(ctx, name, "", vdi.OpenOptions{Client: "test"})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func must[T any](t *testing.T) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func write(t *testing.T, v *vdi.Volume, off, n int64, b byte) {
	t.Helper()
	if _, err := v.WriteAt(ctx, bytes.Repeat([]byte{b}, int(n)), off); err != nil {
		t.Fatal(err)
	}
}

// Space comes back when a clone has overwritten what only it used of a deleted snapshot.
func TestOrphans(t *testing.T) {
	w := vditest.NewWorld(t)
	s := w.Service()
	v := create(t, s, "base", 2<<20)
	write(t, v, 0, 2<<20, 1)
	must[vdi.Info](t)(s.Snapshot(ctx, "base", "one"))
	must[vdi.Info](t)(s.Clone(ctx, "base", "one", "copy"))
	v.Close()
	if err := errors.Join(s.Delete(ctx, "base", ""), s.Delete(ctx, "base", "one"), s.Collect(ctx)); err != nil {
		t.Fatal(err)
	}
	if n := w.Objects.Count(); n != 3 { // two of the snapshot, and the clone's map
		t.Fatalf("%d objects: %v", n, w.Objects.IDs())
	}
	c := open(t, s, "copy")
	write(t, c, 0, 100, 2)
	if err := c.Discard(ctx, 1<<20, 1<<20); err != nil {
		t.Fatal(err)
	}
	if err := s.Collect(ctx); err != nil {
		t.Fatal(err)
	}
	if n := w.Objects.Count(); n != 2 { // its own and its map
		t.Errorf("%d objects: %v", n, w.Objects.IDs())
	}
	if err := s.Sweep(ctx); err != nil {
		t.Fatal(err)
	}
	if list := w.Catalog.InState("deleted"); len(list) > 0 {
		t.Errorf("the catalog still has %v", list)
	}
}

func TestUsage(t *testing.T) {
	w := vditest.NewWorld(t)
	s := w.Service()
	v := create(t, s, "v", 8<<20)
	write(t, v, 0, 8192, 1)
	write(t, v, 1<<20, 1<<20, 1)
	must[vdi.Info](t)(s.Snapshot(ctx, "v", "one"))
	write(t, v, 4096, 4096, 2)
	check := func(tag string, used, shared int64) {
		t.Helper()
		i := must[vdi.Info](t)(s.Info(ctx, "v", tag))
		if !i.Exact || i.Used != used || i.Shared != shared {
			t.Errorf("%q: %+v, want %d used and %d shared", tag, i, used, shared)
		}
	}
	check("", 8192, 1<<20)
	check("one", 8192+1<<20, 0)
	for range 2 {
		list := must[[]vdi.Info](t)(s.List(ctx))
		if len(list) != 2 || !list[0].Known || list[0].Used != 1<<20 || list[0].Shared != 1<<20 || list[1].Used != 2<<20 || list[1].Tag != "one" {
			t.Errorf("list: %+v", list)
		}
	}
	write(t, v, 5<<20, 1, 1)
	if list := must[[]vdi.Info](t)(s.List(ctx)); list[0].Used != 2<<20 {
		t.Errorf("after a new object: %+v", list[0])
	}
}

func TestCheck(t *testing.T) {
	w := vditest.NewWorld(t)
	s := w.Service()
	v := create(t, s, "v", 8<<20)
	write(t, v, 0, 4<<20, 1)
	if err := v.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	must[vdi.Info](t)(s.Snapshot(ctx, "v", "one"))
	write(t, v, 0, 1, 2)
	first := must[vdi.Info](t)(s.Info(ctx, "v", "one")).VID
	r := must[vdi.CheckReport](t)(s.Check(ctx, "v", vdi.CheckOptions{}, nil))
	if len(r.Problems) > 0 || r.Objects != 8 {
		t.Fatalf("a sound VDI: %+v", r)
	}
	w.Objects.Remove(vditest.Policy, object.DataID(first, 2))
	w.Objects.Put(vditest.Policy, object.DataID(v.VID(), 7), 20, 0, []byte("x"))
	vid := must[vdi.Info](t)(s.Info(ctx, "v", "")).VID
	w.Objects.Put(vditest.Policy, object.DataID(vid, 7), 20, 0, []byte("x"))
	r = must[vdi.CheckReport](t)(s.Check(ctx, "v", vdi.CheckOptions{Repair: true}, nil))
	var kinds []string
	for _, p := range r.Problems {
		kinds = append(kinds, p.Kind)
		if p.Repaired != (p.Kind == vdi.ProblemLeftover) {
			t.Errorf("%+v", p)
		}
	}
	slices.Sort(kinds)
	if want := []string{"leftover", "leftover", "missing"}; !slices.Equal(kinds, want) {
		t.Errorf("found %+v", r.Problems)
	}
	var list []vdi.ObjectInfo
	err := s.Objects(ctx, "v", "", func(o vdi.ObjectInfo) bool { list = append(list, o); return len(list) < 3 })
	if err != nil || len(list) != 3 || list[0].Owner != vid || list[1].Owner != first || !list[2].Missing || list[1].Allocated != 1<<20 || list[2].Index != 2 {
		t.Errorf("objects: %+v, %v", list, err)
	}
	w.Objects.Fault = func(what string, id object.ID) error {
		if what == "read" && id == object.DataID(first, 1) {
			return &object.CorruptError{Key: object.Key{ID: id}}
		}
		return nil
	}
	r = must[vdi.CheckReport](t)(s.Check(ctx, "v", vdi.CheckOptions{}, nil))
	found := false
	for _, p := range r.Problems {
		found = found || p.Kind == vdi.ProblemCorrupt && p.Object == object.DataID(first, 1)
	}
	if !found {
		t.Errorf("rot is not found: %+v", r)
	}
	if _, err := v.ReadAt(ctx, make([]byte, 10), 2<<20); !errors.Is(err, vdi.ErrCorrupt) {
		t.Errorf("reading what is lost: %v", err)
	}
	if _, err := v.ReadAt(ctx, make([]byte, 10), 3<<20); err != nil {
		t.Errorf("reading the rest: %v", err)
	}
}

// Many first writes of one object make one copy, and all of them are in it.
func TestWritesOfOneObject(t *testing.T) {
	w := vditest.NewWorld(t)
	w.Objects.Async = true
	s := w.Service()
	v := create(t, s, "v", 4<<20)
	for round := range 20 {
		write(t, v, 0, 1<<20, 7)
		must[vdi.Info](t)(s.Snapshot(ctx, "v", ""))
		var wg sync.WaitGroup
		for k := range 16 {
			wg.Go(func() {
				if _, err := v.WriteAt(ctx, []byte{byte(k)}, int64(k)*5000); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		p := make([]byte, 1<<20)
		if _, err := v.ReadAt(ctx, p, 0); err != nil {
			t.Fatal(err)
		}
		want := bytes.Repeat([]byte{7}, 1<<20)
		for k := range 16 {
			want[k*5000] = byte(k)
		}
		if !bytes.Equal(p, want) {
			t.Fatalf("round %d: writes are lost", round)
		}
	}
}

// Objects refuse an old generation: the volume asks for ownership anew, and gives up in the end.
func TestStale(t *testing.T) {
	w := vditest.NewWorld(t)
	w.Config = func(cfg *vdi.Config) { cfg.OwnWithin = 200 * time.Millisecond }
	s := w.Service()
	v := create(t, s, "v", 4<<20)
	write(t, v, 0, 100, 1)
	w.Objects.SetGeneration(v.VID(), 1<<40)
	if _, err := v.WriteAt(ctx, []byte{1}, 0); !errors.Is(err, vdi.ErrStale) {
		t.Errorf("write under an old generation: %v", err)
	}
}

// Another start of the node takes the VDI over: the old one's writes fail or are its own
// again, but never come over newer ones.
func TestTakeOver(t *testing.T) {
	w := vditest.NewWorld(t)
	s1 := w.Service()
	v1 := create(t, s1, "v", 4<<20)
	write(t, v1, 0, 100, 1)
	s2 := w.Service()
	v2 := open(t, s2, "v")
	write(t, v2, 0, 100, 2)
	write(t, v2, 1<<20, 100, 2)
	p := make([]byte, 100)
	write(t, v1, 50, 50, 3) // refused, asks again, goes on with a fresh map
	must[int](t)(v1.ReadAt(ctx, p, 1<<20))
	if p[0] != 2 {
		t.Errorf("an old map is used after the VDI was elsewhere: %d", p[0])
	}
	must[int](t)(v1.ReadAt(ctx, p, 0))
	if p[0] != 2 || p[99] != 3 {
		t.Errorf("read %v", p)
	}
}

// A volume goes on through a snapshot, and sees what was written before it.
func TestVolumeGoesOn(t *testing.T) {
	s := vditest.New(t)
	v := create(t, s, "v", 4<<20)
	other := open(t, s, "v")
	write(t, v, 0, 1<<20, 1)
	must[vdi.Info](t)(s.Snapshot(ctx, "v", "one"))
	write(t, other, 10, 10, 2)
	p := make([]byte, 30)
	must[int](t)(v.ReadAt(ctx, p, 0))
	if want := append(append(bytes.Repeat([]byte{1}, 10), bytes.Repeat([]byte{2}, 10)...), bytes.Repeat([]byte{1}, 10)...); !bytes.Equal(p, want) {
		t.Errorf("read %v", p)
	}
	must[vdi.Info](t)(s.Rollback(ctx, "v", "one"))
	must[int](t)(other.ReadAt(ctx, p, 0))
	if !bytes.Equal(p, bytes.Repeat([]byte{1}, 30)) {
		t.Errorf("after the rollback: %v", p)
	}
	must[vdi.Info](t)(s.Resize(ctx, "v", 1<<20))
	if err := v.Discard(ctx, 1<<20, 1); !errors.Is(err, vdi.ErrInvalid) {
		t.Errorf("beyond the new end: %v", err)
	}
	if v.Size() != 4<<20 || open(t, s, "v").Size() != 1<<20 {
		t.Error("the new size shall be seen by new opens")
	}
}

// Long requests go through volumes of the largest size without memory for each object.
func TestLongRequests(t *testing.T) {
	w := vditest.NewWorld(t)
	s := w.Service()
	if _, err := s.Create(ctx, vdi.CreateOptions{Name: "v", Size: vdi.MaxSize, ObjectSizeShift: 20}); err != nil {
		t.Fatal(err)
	}
	v := open(t, s, "v")
	far := int64(vdi.MaxSize - 3<<20)
	write(t, v, far, 100, 1)
	write(t, v, 77<<20, 100, 1)
	if err := errors.Join(v.Discard(ctx, 0, vdi.MaxSize), v.Zero(ctx, 0, vdi.MaxSize, vdi.FlagFUA), s.Collect(ctx)); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 100)
	must[int](t)(v.ReadAt(ctx, p, far))
	if !bytes.Equal(p, make([]byte, 100)) {
		t.Error("discarded data is still there")
	}
	for _, id := range w.Objects.IDs() {
		if k, _ := id.Kind(); k == object.KindData {
			t.Errorf("object %s is still there", id)
		}
	}
	q := make([]byte, 70<<20)
	q[0], q[len(q)-1] = 1, 1
	must[int](t)(v.ReadAt(ctx, q, 10<<20+5))
	if !bytes.Equal(q, make([]byte, len(q))) {
		t.Error("a long read of holes")
	}
}

func TestPreallocate(t *testing.T) {
	w := vditest.NewWorld(t)
	s := w.Service()
	if _, err := s.Create(ctx, vdi.CreateOptions{Name: "v", Size: 5<<20 + 1, ObjectSizeShift: 20, Preallocate: true}); err != nil {
		t.Fatal(err)
	}
	u := must[vdi.Usage](t)(s.Usage(ctx, "v", ""))
	if u.Used != 5<<20+4096 {
		t.Errorf("preallocated %d bytes", u.Used)
	}
}

// Deleting what is open says by whom it is.
func TestBusy(t *testing.T) {
	s := vditest.New(t)
	v := create(t, s, "v", 1<<20)
	err := s.Delete(ctx, "v", "")
	if !errors.Is(err, vdi.ErrBusy) || !bytes.Contains([]byte(err.Error()), []byte("test")) {
		t.Errorf("delete: %v", err)
	}
	v.Close()
	if err := s.Delete(ctx, "v", ""); err != nil {
		t.Error(err)
	}
}

// The garbage of many VDIs is collected in the background.
func TestRun(t *testing.T) {
	w := vditest.NewWorld(t)
	s := w.Start()
	for n := range 20 {
		v := create(t, s, fmt.Sprint("v", n), 2<<20)
		write(t, v, 0, 2<<20, 1)
		v.Close()
		must[vdi.Info](t)(s.Snapshot(ctx, fmt.Sprint("v", n), "one"))
		if err := errors.Join(s.Delete(ctx, fmt.Sprint("v", n), "one"), s.Delete(ctx, fmt.Sprint("v", n), "")); err != nil {
			t.Fatal(err)
		}
	}
	wait(t, "all objects are removed", func() bool { return w.Objects.Count() == 0 && s.GC().Pending == 0 })
}

// wait polls for what happens in the background, for 20 s at most.
func wait(t *testing.T, what string, ok func() bool) {
	t.Helper()
	c, cancel := context.WithTimeout(ctx, waitFor)
	defer cancel()
	for !ok() {
		select {
		case <-c.Done():
			t.Fatalf("not after %v: %s", waitFor, what)
		case <-time.After(time.Millisecond):
		}
	}
}

const waitFor = 2 * time.Minute

// unsure is a log whose next command is applied, but seems to have failed.
type unsure struct {
	*vditest.World
	armed bool
	later [][]byte // applied with the next command that succeeds
	delay bool
}

func (u *unsure) Propose(ctx context.Context, machine string, command []byte) ([]byte, error) {
	if u.armed && bytes.Contains(command, []byte(`{"snapshot":`)) {
		u.armed = false
		if u.delay {
			u.later = append(u.later, command)
		} else if _, err := u.World.Propose(ctx, machine, command); err != nil {
			return nil, err
		}
		return nil, context.DeadlineExceeded
	}
	if u.later != nil && bytes.Contains(command, []byte(`{"cancel":`)) {
		return nil, context.DeadlineExceeded
	}
	for _, c := range u.later {
		if _, err := u.World.Propose(ctx, machine, c); err != nil {
			return nil, err
		}
	}
	u.later = nil
	return u.World.Propose(ctx, machine, command)
}

// A snapshot whose command seems to fail, but is applied, at once or later, does not get
// the writes that come after it.
func TestUnsureSnapshot(t *testing.T) {
	for _, delay := range []bool{false, true} {
		w := vditest.NewWorld(t)
		log := &unsure{World: w, delay: delay}
		w.Config = func(c *vdi.Config) { c.Log = log }
		s := w.Service()
		v := create(t, s, "v", 4<<20)
		write(t, v, 0, 100, 1)
		log.armed = true
		if _, err := s.Snapshot(ctx, "v", "one"); !errors.Is(err, vdi.ErrUnavailable) {
			t.Fatalf("snapshot: %v", err)
		}
		write(t, v, 0, 100, 2)
		write(t, v, 1<<20, 100, 2)
		o := must[*vdi.Volume](t)(s.Open(ctx, "v", "one", vdi.OpenOptions{}))
		p := make([]byte, 100)
		must[int](t)(o.ReadAt(ctx, p, 0))
		if p[0] != 1 {
			t.Errorf("delay %v: the snapshot has a later write", delay)
		}
		must[int](t)(o.ReadAt(ctx, p, 1<<20))
		if p[0] != 0 {
			t.Errorf("delay %v: the snapshot has a later object", delay)
		}
		must[int](t)(v.ReadAt(ctx, p, 0))
		if p[0] != 2 {
			t.Errorf("delay %v: a write is lost", delay)
		}
		o.Close()
		v.Close()
		emptyOut(t, w, s, "unsure")
	}
}

// A VDI that is deleted while its map is still to be settled gets nothing stored any more.
func TestDeleteUnsettled(t *testing.T) {
	w := vditest.NewWorld(t)
	s := w.Start()
	for n := range 50 {
		v := create(t, s, "v", 4<<20)
		write(t, v, 0, 4<<20, byte(n))
		if err := v.Flush(ctx); err != nil {
			t.Fatal(err)
		}
		v.Close()
		if err := s.Delete(ctx, "v", ""); err != nil {
			t.Fatal(err)
		}
	}
	wait(t, "all objects are removed", func() bool { return w.Objects.Count() == 0 && s.GC().Pending == 0 })
}

// A node of a cluster that is not formatted waits, and says so.
func TestUnformatted(t *testing.T) {
	w := vditest.NewWorld(t)
	asked := make(chan struct{}, 1000)
	w.Config = func(c *vdi.Config) {
		c.DefaultPolicy = func() object.PolicyID {
			asked <- struct{}{}
			return 0
		}
	}
	s := w.Start()
	if _, err := s.Create(ctx, vdi.CreateOptions{Name: "v"}); !errors.Is(err, vdi.ErrUnavailable) {
		t.Errorf("create: %v", err)
	}
	time.Sleep(200 * time.Millisecond)
	if n := len(asked); n > 10 {
		t.Errorf("the collector looked %d times", n)
	}
}

// A VDI that is rolled back to a snapshot of a former one of its name, with objects of another size, is that
// one; who has the later one open finds it deleted.
func TestRollbackToFormerLife(t *testing.T) {
	w := vditest.NewWorld(t)
	s := w.Start()
	made := func(shift uint8, b byte) *vdi.Volume {
		must[vdi.Info](t)(s.Create(ctx, vdi.CreateOptions{Name: "v", Size: 8 << 20, ObjectSizeShift: shift}))
		v := open(t, s, "v")
		write(t, v, 5<<20, 512, b)
		return v
	}
	v := made(20, 1)
	must[vdi.Info](t)(s.Snapshot(ctx, "v", "s"))
	v.Close()
	if err := s.Delete(ctx, "v", ""); err != nil {
		t.Fatal(err)
	}
	v = made(22, 2)
	must[vdi.Info](t)(s.Rollback(ctx, "v", "s"))
	if _, err := v.ReadAt(ctx, []byte{0}, 5<<20); !errors.Is(err, vdi.ErrNotFound) {
		t.Errorf("the later one reads: %v", err)
	}
	if _, err := v.WriteAt(ctx, []byte{3}, 5<<20); !errors.Is(err, vdi.ErrNotFound) {
		t.Errorf("the later one writes: %v", err)
	}
	v.Close()
	v = open(t, s, "v")
	write(t, v, 6<<20, 512, 4)
	for off, want := range map[int64]byte{5 << 20: 1, 6 << 20: 4, 7 << 20: 0} {
		if b := byteAt(t, v, off); b != want {
			t.Errorf("at %d it has %d, want %d", off, b, want)
		}
	}
	v.Close()
	if err := s.Collect(ctx); err != nil {
		t.Fatal(err)
	}
	if r := must[vdi.CheckReport](t)(s.Check(ctx, "v", vdi.CheckOptions{}, nil)); len(r.Problems) > 0 {
		t.Errorf("%+v", r.Problems)
	}
}
