package vdi_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"sheepdog/storage/object"
	"sheepdog/vdi"
	"sheepdog/vdi/catalog"
	"sheepdog/vdi/vditest"
)

// alterable returns a VDI with a snapshot, a clone of that which was written, an object that is empty, and a deleted
// snapshot whose objects others use.
func alterable(t *testing.T) (*vditest.World, *vdi.Service, *vdi.Volume) {
	t.Helper()
	w, s, v := prepareCrash(t)
	_, err := s.Clone(ctx, "v", "base", "c")
	c, err1 := s.Open(ctx, "c", "", vdi.OpenOptions{Client: "test"})
	if err := errors.Join(err, err1); err != nil {
		t.Fatal(err)
	}
	write(t, c, 3<<20, looked, 'c')
	write(t, v, 4<<20, 100, 'e')
	_, err = s.Snapshot(ctx, "v", "two")
	err = errors.Join(err, v.Discard(ctx, 4<<20, 1<<20), v.Flush(ctx), c.Close(), s.Delete(ctx, "v", "two"))
	err = errors.Join(err, s.WriteVMState(ctx, vdi.VMState{VID: vidOf(t, s, "c"), Index: 2}, []byte("state"), true, 0))
	if err != nil {
		t.Fatal(err)
	}
	return w, s, v
}

func vidOf(t *testing.T, s *vdi.Service, name string) object.VID {
	t.Helper()
	i, err := s.Info(ctx, name, "")
	if err != nil {
		t.Fatal(err)
	}
	return i.VID
}

// inspectAltered verifies what alterable has made, and that all of it is in one policy when garbage is collected.
func inspectAltered(t *testing.T, w *vditest.World, s *vdi.Service, copies int) {
	t.Helper()
	for name, want := range map[string]string{"v": "bbaa\x00\x00", "v@base": "aaaa\x00\x00", "c": "aaac\x00\x00"} {
		base, tag, _ := strings.Cut(name, "@")
		got, err := content(s, base, tag)
		if err == nil {
			err = onlyBytes(got, func(o int) string { return want[o : o+1] })
		}
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if i, err := s.Info(ctx, base, tag); err != nil || i.Copies != copies {
			t.Fatalf("%s has %d copies, want %d (%v)", name, i.Copies, copies, err)
		}
	}
	p := make([]byte, 5)
	if err := s.ReadVMState(ctx, vdi.VMState{VID: vidOf(t, s, "c"), Index: 2}, p); err != nil || string(p) != "state" {
		t.Fatalf("the machine's state is %q (%v)", p, err)
	}
	if err := s.Collect(ctx); err != nil {
		t.Fatal(err)
	}
	for n := 1; n <= vditest.MaxCopies; n++ {
		if ids := w.Objects.In(vditest.Policy + object.PolicyID(n-1)); (len(ids) > 0) != (n == copies) {
			t.Fatalf("with %d copies, the policy of %d has the objects %v", copies, n, ids)
		}
	}
	for _, name := range []string{"v", "c"} {
		if r, err := s.Check(ctx, name, vdi.CheckOptions{}, nil); err != nil || len(r.Problems) > 0 {
			t.Fatalf("check %s: %v %+v", name, err, r.Problems)
		}
	}
}

// A VDI gets another number of copies, and all that shares objects with it; of what was before nothing is left.
func TestAlterCopies(t *testing.T) {
	w, s, v := alterable(t)
	for _, copies := range []int{3, 1, 2} {
		var last, all int64
		a, err := s.AlterCopies(ctx, "v", copies, nil, func(done, total int64) { last, all = done, total })
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, i := range a.Volumes {
			names = append(names, i.Name+"@"+i.Tag)
		}
		if a.To != copies || a.Bytes == 0 || last > all || all == 0 || !slices.Equal(names, []string{"c@", "v@", "v@base"}) {
			t.Errorf("altered to %d copies: %+v, %v, progress %d of %d", copies, a, names, last, all)
		}
		inspectAltered(t, w, s, copies)
	}
	if a, err := s.AlterCopies(ctx, "v", 2, nil, nil); err != nil || a.Bytes != 0 {
		t.Errorf("altered to what it is: %+v, %v", a, err)
	}
	_, err := s.AlterCopies(ctx, "v", 9, nil, nil)
	_, err1 := s.AlterCopies(ctx, "none", 2, nil, nil)
	if !errors.Is(err, vdi.ErrInvalid) || !errors.Is(err1, vdi.ErrNotFound) {
		t.Errorf("9 copies: %v; of nothing: %v", err, err1)
	}
	v.Close()
	emptyOut(t, w, s, "in the end")
}

// Snapshots of a deleted VDI are altered like others.
func TestAlterCopiesOfSnapshots(t *testing.T) {
	w, s, v := prepareCrash(t)
	v.Close()
	err := s.Delete(ctx, "v", "")
	_, err1 := s.AlterCopies(ctx, "v", 3, nil, nil)
	if err := errors.Join(err, err1, s.Collect(ctx)); err != nil {
		t.Fatal(err)
	}
	if ids := w.Objects.In(vditest.Policy); len(ids) > 0 {
		t.Errorf("there still are %v", ids)
	}
	got, err := content(s, "v", "base")
	if err == nil {
		err = onlyBytes(got, func(o int) string { return "aaaa\x00\x00"[o : o+1] })
	}
	if err != nil {
		t.Error(err)
	}
}

// Given up in the middle, or when a disk is full, everything is as before, and nothing is left of the copies; asked
// again it is carried out.
func TestAlterCopiesGivenUp(t *testing.T) {
	for _, why := range []string{"canceled", "full"} {
		t.Run(why, func(t *testing.T) {
			w, s, v := alterable(t)
			ctx, cancel := context.WithCancel(ctx)
			defer cancel()
			count := 0
			fault := func(what string, id object.ID) error {
				if what == "write" {
					count++
				}
				switch {
				case count < 4 || what != "write":
				case why == "canceled":
					cancel()
				case why == "full":
					return fmt.Errorf("a disk is full: %w", object.ErrNoSpace)
				}
				return nil
			}
			var mu sync.Mutex
			w.Objects.Fault = func(what string, id object.ID) error { mu.Lock(); defer mu.Unlock(); return fault(what, id) }
			_, err := s.AlterCopies(ctx, "v", 3, nil, nil)
			w.Objects.Fault = nil
			if want := map[string]error{"canceled": vdi.ErrUnavailable, "full": vdi.ErrNoSpace}[why]; !errors.Is(err, want) {
				t.Fatalf("%v, want a %v", err, want)
			}
			inspectAltered(t, w, s, 1)
			if _, err := s.AlterCopies(context.Background(), "v", 3, nil, nil); err != nil {
				t.Fatal(err)
			}
			inspectAltered(t, w, s, 3)
			v.Close()
			emptyOut(t, w, s, why)
		})
	}
}

// What is known to have no room is not begun.
func TestAlterCopiesWithoutRoom(t *testing.T) {
	w, _, _ := alterable(t)
	w.Config = func(c *vdi.Config) {
		c.Room = func(_ context.Context, p object.PolicyID, bytes int64) error {
			if p != vditest.Policy+2 || bytes < 6*looked {
				t.Errorf("asked for room for %d bytes in policy %d", bytes, p)
			}
			return fmt.Errorf("there is no room: %w", object.ErrNoSpace)
		}
	}
	s := w.Service()
	if _, err := s.AlterCopies(ctx, "v", 3, nil, nil); !errors.Is(err, vdi.ErrNoSpace) {
		t.Errorf("%v", err)
	}
	w.Config = nil
	inspectAltered(t, w, s, 1)
}

// What is in a policy that is not its VDI's is left over, of whatever kind: it is reported, and removed by the sweep
// and by a check that repairs.
func TestMisplacedObjects(t *testing.T) {
	for _, repair := range []bool{false, true} {
		w, s, v := alterable(t)
		block := bytes.Repeat([]byte("x"), object.BlockSize)
		w.Objects.Put(vditest.Policy+1, object.DataID(v.VID(), 0), 20, 0, block)
		w.Objects.Put(vditest.Policy+1, object.NewID(object.KindMap, v.VID(), 0), 22, 0, block)
		r, err := s.Check(ctx, "v", vdi.CheckOptions{Repair: repair}, nil)
		if err != nil || len(r.Problems) != 2 && !repair {
			t.Fatalf("check: %v %+v", err, r.Problems)
		}
		for _, p := range r.Problems {
			if p.Kind != vdi.ProblemLeftover {
				t.Errorf("%+v", p)
			}
		}
		if !repair {
			err = s.Sweep(ctx)
		}
		if err := errors.Join(err, s.Collect(ctx)); err != nil {
			t.Fatal(err)
		}
		inspectAltered(t, w, s, 1)
	}
}

// What is not reachable, where no VDI need be, keeps a check from nothing else. It says so, and who has heard it waits for
// it no more.
func TestCheckPassesOverWhatIsNotReachable(t *testing.T) {
	w, _, v := alterable(t)
	u := unreachable{policy: vditest.Policy + 1}
	w.Config = u.within
	w.Objects.Put(vditest.Policy+2, object.DataID(v.VID(), 0), 20, 0, bytes.Repeat([]byte("x"), object.BlockSize))
	s := w.Service()
	r := must[vdi.CheckReport](t)(s.Check(ctx, "v", vdi.CheckOptions{}, nil))
	if len(r.Problems) != 1 || r.Problems[0].Kind != vdi.ProblemLeftover {
		t.Errorf("found %+v", r.Problems)
	}
	if len(r.Unsearched) != 1 || r.Unsearched[0].Policy != vditest.Policy+1 || r.Unsearched[0].Copies != 2 || !strings.Contains(r.Unsearched[0].Reason, "7 is away") {
		t.Errorf("not searched: %+v", r.Unsearched)
	}
	r = must[vdi.CheckReport](t)(s.Check(ctx, "v", vdi.CheckOptions{PassOver: []object.PolicyID{vditest.Policy + 1}}, nil))
	if asked := u.asked.Load(); asked != 1 || len(r.Problems) != 1 || len(r.Unsearched) != 0 {
		t.Errorf("the second time: asked %d times, found %+v", asked, r)
	}
}

// A node that ends in the middle leaves what another one removes, or goes on with.
func TestAlterCopiesLeft(t *testing.T) {
	for _, again := range []bool{false, true} {
		w, s, _ := alterable(t)
		steps := w.Objects.Steps()
		all, err := s.AlterCopies(ctx, "c", 3, nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		steps = w.Objects.Steps() - steps
		w, s, _ = alterable(t)
		w.Objects.CrashAfter(steps / 2)
		if _, err := s.AlterCopies(ctx, "c", 3, nil, nil); err == nil {
			t.Fatal("it did not end in the middle")
		}
		w.Objects.CrashAfter(1 << 40)
		if len(w.Objects.In(vditest.Policy+2)) == 0 {
			t.Fatal("nothing was copied before it ended")
		}
		s = w.Service()
		if again {
			a, err := s.AlterCopies(ctx, "v", 3, nil, nil)
			if err != nil {
				t.Fatal(err)
			}
			if a.Bytes >= all.Bytes {
				t.Errorf("%d bytes of %d were copied, though some of them had been", a.Bytes, all.Bytes)
			}
		}
		inspectAltered(t, w, s, map[bool]int{false: 1, true: 3}[again])
	}
}

// Clients go on while copies are altered back and forth, snapshots come and go, and garbage is collected.
func TestAlterCopiesConcurrently(t *testing.T) {
	w := vditest.NewWorld(t)
	w.Objects.Async = true
	s := w.Start()
	if _, err := s.Create(ctx, vdi.CreateOptions{Name: "v", Size: 8 << 20, ObjectSizeShift: 20}); err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for k := range 4 {
		wg.Go(func() { submitter(t, s, k, stop, time.Millisecond) })
	}
	snap := func(n int) {
		if _, err := s.Snapshot(ctx, "v", fmt.Sprint("s", n)); err != nil {
			t.Error(err)
		}
		if n >= 2 {
			if err := s.Delete(ctx, "v", fmt.Sprint("s", n-2)); err != nil {
				t.Error(err)
			}
		}
	}
	wg.Go(func() {
		for n := 0; ; n++ {
			select {
			case <-stop:
				return
			case <-time.After(300 * time.Millisecond):
				snap(n)
			}
		}
	})
	altered := 0
	began := time.Now()
	for enough := false; !enough; enough = altered >= 4 && time.Since(began) > 2*time.Second || time.Since(began) > time.Minute {
		// On a busy machine writes may be too many, and others delete what is looked at.
		_, err := s.AlterCopies(ctx, "v", 1+altered%vditest.MaxCopies, nil, nil)
		if err == nil {
			altered++
			err = s.Collect(ctx) // which waits while copies are altered
		}
		if err != nil && !errors.Is(err, vdi.ErrUnavailable) {
			t.Error(err)
			break
		}
	}
	close(stop)
	wg.Wait()
	if altered < 2 {
		t.Errorf("altered %d times", altered)
	}
}

// A node that removes what was left in a policy, and goes on when another one has done that and the family has come
// back there, removes nothing of it.
func TestAlterCopiesAndLateCollector(t *testing.T) {
	c := vditest.NewCluster(t, 1)
	h := holdNext(c.Objects, "delete")
	a, b := c.Gateway("a"), c.Gateway("b")
	v := create(t, a.Service, "v", 4<<20)
	write(t, v, 0, 4<<20, 1)
	must[vdi.Altered](t)(a.AlterCopies(ctx, "v", 2, nil, nil))
	b.CatchUp()
	h.on.Store(true)
	late := make(chan error, 1)
	go func() { late <- b.Collect(ctx) }()
	<-h.began
	if err := a.Collect(ctx); err != nil {
		t.Fatal(err)
	}
	must[vdi.Altered](t)(a.AlterCopies(ctx, "v", 1, nil, nil))
	close(h.release)
	if err := <-late; err != nil && !errors.Is(err, vdi.ErrUnavailable) {
		t.Error(err)
	}
	for off := int64(0); off < 4<<20; off += 1 << 20 {
		if got := byteAt(t, v, off); got != 1 {
			t.Errorf("at %d there is %d", off, got)
		}
	}
	if r := must[vdi.CheckReport](t)(a.Check(ctx, "v", vdi.CheckOptions{}, nil)); len(r.Problems) > 0 {
		t.Errorf("%+v", r.Problems)
	}
}

// A clone that is made, and written, while the node that copies waits for ownership of what it was made of, is copied
// like the rest.
func TestAlterCopiesAndNewClone(t *testing.T) {
	c := vditest.NewCluster(t, 1)
	var waits func() // called when a waits for the former owner, which b is
	c.Config = func(cfg *vdi.Config) {
		settled := cfg.Settled
		if cfg.Node == "a" {
			cfg.Settled = func(ctx context.Context, n catalog.Node, vid object.VID, generation uint64) error {
				if waits != nil {
					waits()
				}
				return settled(ctx, n, vid, generation)
			}
		}
	}
	a, b := c.Gateway("a"), c.Gateway("b")
	v := create(t, a.Service, "v", 4<<20)
	write(t, v, 0, 4<<20, 1)
	must[vdi.Info](t)(a.Snapshot(ctx, "v", "s"))
	there := openAll(t, []*vditest.Gateway{b}, "v")[0]
	var taken, cloned sync.Once
	c.Objects.Fault = func(what string, _ object.ID) error {
		if what == "sums" {
			taken.Do(func() { write(t, there, 0, 512, 2) }) // the first round is under way
		}
		return nil
	}
	var clone *vdi.Volume
	var last [4]byte
	var wg sync.WaitGroup
	stop := make(chan struct{})
	waits = func() {
		cloned.Do(func() {
			must[vdi.Info](t)(a.Clone(ctx, "v", "s", "c"))
			clone = open(t, a.Service, "c")
			write(t, clone, 0, 512, 9)
			wg.Go(func() {
				for n := 0; ; n++ {
					select {
					case <-stop:
						return
					default:
						last[n%4] = byte(n/4%200) + 10
						write(t, clone, int64(n%4)<<20, 512, last[n%4])
					}
				}
			})
		})
	}
	_, err := a.AlterCopies(ctx, "v", 2, nil, nil)
	close(stop)
	wg.Wait()
	if err != nil || clone == nil {
		t.Fatalf("altered: %v; cloned meanwhile: %v", err, clone != nil)
	}
	if err := a.Collect(ctx); err != nil {
		t.Fatal(err)
	}
	for n, want := range last {
		if got := byteAt(t, clone, int64(n)<<20); got != want {
			t.Errorf("object %d of the clone has %d, want %d", n, got, want)
		}
	}
	if got := byteAt(t, v, 0); got != 2 {
		t.Errorf("the VDI has %d", got)
	}
}
