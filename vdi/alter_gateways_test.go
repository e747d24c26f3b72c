package vdi_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sheepdog/storage/object"
	"sheepdog/vdi"
	"sheepdog/vdi/catalog"
	"sheepdog/vdi/vditest"
)

// scribe writes a VDI through a gateway all the time, and knows what must be in each of its blocks.
type scribe struct {
	v    *vdi.Volume
	want []uint64 // by block of 4 KiB, one in each MiB
	slow time.Duration
}

func (w *scribe) write(t *testing.T, stop chan struct{}) {
	buf := make([]byte, 4096)
	for n := uint64(1); ; n++ {
		select {
		case <-stop:
			return
		default:
		}
		i := int(n*7) % len(w.want)
		binary.LittleEndian.PutUint64(buf, n)
		began := time.Now()
		if _, err := w.v.WriteAt(ctx, buf, int64(i)<<20); err != nil {
			t.Errorf("write %d of %s: %v", n, w.v.Name(), err)
			return
		}
		w.slow = max(w.slow, time.Since(began))
		w.want[i] = n
	}
}

func (w *scribe) verify(t *testing.T, s *vdi.Service) {
	t.Helper()
	v := open(t, s, w.v.Name())
	defer v.Close()
	got := make([]byte, 4096)
	for i, n := range w.want {
		want := make([]byte, 4096)
		binary.LittleEndian.PutUint64(want, n)
		if _, err := v.ReadAt(ctx, got, int64(i)<<20); err != nil || !bytes.Equal(got, want) {
			t.Errorf("block %d of %s has %x (%v), want %d", i, w.v.Name(), got[:8], err, n)
		}
	}
}

// slowSums has objects compared so slowly that who writes has taken the family back meanwhile.
func slowSums(c *vditest.Cluster) {
	c.Objects.Fault = func(what string, _ object.ID) error {
		if what == "sums" {
			time.Sleep(3 * time.Millisecond)
		}
		return nil
	}
}

// twoWriters makes a VDI and a clone of a snapshot of it, which are written through two gateways until the returned
// function is called.
func twoWriters(t *testing.T, a, b *vditest.Gateway) (list []*scribe, end func()) {
	t.Helper()
	const objects = 16
	create(t, a.Service, "v", objects<<20).Close()
	must[vdi.Info](t)(a.Snapshot(ctx, "v", "base"))
	must[vdi.Info](t)(a.Clone(ctx, "v", "base", "c"))
	catchUp([]*vditest.Gateway{a, b})
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for i, g := range []*vditest.Gateway{a, b} {
		w := &scribe{v: open(t, g.Service, []string{"v", "c"}[i]), want: make([]uint64, objects)}
		list = append(list, w)
		wg.Go(func() { w.write(t, stop) })
	}
	return list, func() {
		close(stop)
		wg.Wait()
		for _, w := range list {
			w.v.Close()
		}
	}
}

// The VDIs of a family are written through two gateways all the time: their copies are altered through either of them, and
// through a third one, and none of the writes fails or is lost.
func TestAlterCopiesWrittenElsewhere(t *testing.T) {
	c := vditest.NewCluster(t, 1)
	slowSums(c)
	list := []*vditest.Gateway{c.Gateway("a"), c.Gateway("b"), c.Gateway("c")}
	writers, end := twoWriters(t, list[0], list[1])
	for i, g := range list {
		time.Sleep(50 * time.Millisecond)
		began := time.Now()
		a, err := g.AlterCopies(ctx, "v", 2+i%2, nil, nil)
		if err != nil || a.To != 2+i%2 || a.Bytes == 0 {
			t.Errorf("through %s: %+v, %v", g.Name, a, err)
		}
		t.Logf("through %s: %v, writes waited for %v", g.Name, time.Since(began).Round(time.Millisecond), a.Pause.Round(time.Millisecond))
	}
	end()
	catchUp(list)
	for _, w := range writers {
		t.Logf("the longest write of %s took %v", w.v.Name(), w.slow.Round(time.Millisecond))
		for _, g := range list {
			w.verify(t, g.Service)
		}
		if r := must[vdi.CheckReport](t)(list[2].Check(ctx, w.v.Name(), vdi.CheckOptions{}, nil)); len(r.Problems) > 0 {
			t.Errorf("%+v", r.Problems)
		}
	}
}

// A family that takes too long to be compared for others to be kept from it so long stays as it is, and it is said who
// writes it where.
func TestAlterCopiesTooLargeToHold(t *testing.T) {
	c := vditest.NewCluster(t, 1)
	slowSums(c)
	a, b, third := c.Gateway("a"), c.Gateway("b"), (*vditest.Gateway)(nil)
	c.Config = func(cfg *vdi.Config) { cfg.ResendWithin = 1 } // ns: nobody is made to wait
	third = c.Gateway("c")
	writers, end := twoWriters(t, a, b)
	time.Sleep(50 * time.Millisecond)
	_, err := third.AlterCopies(ctx, "v", 2, nil, nil)
	end()
	e, ok := errors.AsType[*vdi.Elsewhere](err)
	if !ok || !errors.Is(err, vdi.ErrBusy) || e.Node != "a" && e.Node != "b" || !strings.Contains(err.Error(), fmt.Sprintf("is written through node %q", e.Node)) {
		t.Errorf("%v", err)
	}
	t.Log(err)
	for _, w := range writers {
		w.verify(t, third.Service)
		if i := must[vdi.Info](t)(third.Info(ctx, w.v.Name(), "")); i.Copies != 1 {
			t.Errorf("%s has %d copies", w.v.Name(), i.Copies)
		}
	}
}

// Who alters copies best is another gateway that writes all that is written of a family.
func TestWriter(t *testing.T) {
	c := vditest.NewCluster(t, 1)
	list := []*vditest.Gateway{c.Gateway("a"), c.Gateway("b"), c.Gateway("c")}
	a, b := list[0], list[1]
	expect := func(what, name string, want ...string) {
		t.Helper()
		for i, w := range want {
			if got, err := list[i].Writer(ctx, name); err != nil || got != w {
				t.Errorf("%s: to %s, %s is written through %q (%v), want %q", what, list[i].Name, name, got, err, w)
			}
		}
	}
	create(t, a.Service, "v", 1<<20).Close()
	must[vdi.Info](t)(a.Snapshot(ctx, "v", "base"))
	must[vdi.Info](t)(a.Clone(ctx, "v", "base", "c"))
	expect("one owner", "v", "", "a", "a")
	expect("the clone has none", "c", "", "a", "a")
	v := open(t, b.Service, "c")
	write(t, v, 0, 512, 1)
	v.Close()
	expect("two owners", "v", "", "", "a")
	expect("two owners", "c", "", "", "b")
	a.Kill()
	if got, err := b.Writer(ctx, "v"); err != nil || got != "" {
		t.Errorf("a is dead: %q, %v", got, err)
	}
	if got, err := list[2].Writer(ctx, "v"); err != nil || got != "b" {
		t.Errorf("a is dead: %q, %v", got, err)
	}
	if _, err := b.Writer(ctx, "none"); !errors.Is(err, vdi.ErrNotFound) {
		t.Errorf("of nothing: %v", err)
	}
}

// Only snapshots are left of a VDI, and catalogs are behind. Whatever others do while they are copied, what there is then
// has its content and one policy; a reader that has one open finds it at any time.
func TestAlterCopiesOfSnapshotsBehind(t *testing.T) {
	for seed, x := range []struct {
		what string
		do   func(g *vdi.Service) error
		left []string // volumes, of which each has what its name says
		err  error
	}{
		{"nothing", func(*vdi.Service) error { return nil }, []string{"v@1", "v@2"}, nil},
		{"delete one", func(g *vdi.Service) error { return g.Delete(ctx, "v", "2") }, []string{"v@1"}, nil},
		{"delete all", func(g *vdi.Service) error {
			return errors.Join(g.Delete(ctx, "v", "1"), g.Delete(ctx, "v", "2"), g.Collect(ctx))
		}, nil, vdi.ErrNotFound},
		{"clone, write", func(g *vdi.Service) error {
			_, err := g.Clone(ctx, "v", "1", "w")
			return errors.Join(err, fill(g, "w", '3'))
		}, []string{"v@1", "v@2", "w@3"}, nil},
		{"go back to one, write, delete that", func(g *vdi.Service) error {
			_, err := g.Rollback(ctx, "v", "1")
			return errors.Join(err, fill(g, "v", '3'), g.Delete(ctx, "v", "1"), g.Collect(ctx))
		}, []string{"v@2", "v@3"}, nil},
		{"make it anew", func(g *vdi.Service) error {
			_, err := g.Create(ctx, vdi.CreateOptions{Name: "v", Size: behindSize, ObjectSizeShift: 20})
			return errors.Join(err, fill(g, "v", '3'), g.Delete(ctx, "v", "2"))
		}, []string{"v@1", "v@3"}, nil},
	} {
		for _, when := range []string{"write", "sums", "sync"} {
			t.Run(x.what+" before the first "+when, func(t *testing.T) {
				snapshotsBehind(t, uint64(seed), when, x.do, x.left, x.err)
			})
		}
	}
}

const behindSize = 6 << 20

// fill writes all of a VDI.
func fill(g *vdi.Service, name string, b byte) error {
	v, err := g.Open(ctx, name, "", vdi.OpenOptions{Client: "test"})
	if err != nil {
		return err
	}
	defer v.Close()
	_, err = v.WriteAt(ctx, bytes.Repeat([]byte{b}, behindSize), 0)
	return err
}

func snapshotsBehind(t *testing.T, seed uint64, when string, do func(*vdi.Service) error, left []string, want error) {
	c := vditest.NewCluster(t, seed)
	c.Lag, c.Rough = 2*time.Millisecond, true
	h := holdNext(c.Objects, when)
	list := []*vditest.Gateway{c.Gateway("a"), c.Gateway("b"), c.Gateway("c")}
	a, b := list[0], list[1]
	create(t, a.Service, "v", behindSize).Close()
	for _, tag := range []byte("12") {
		err := fill(a.Service, "v", tag)
		_, err1 := a.Snapshot(ctx, "v", string(tag))
		if err := errors.Join(err, err1); err != nil {
			t.Fatal(err)
		}
	}
	catchUp(list)
	open := must[*vdi.Volume](t)(list[2].Open(ctx, "v", "1", vdi.OpenOptions{Client: "reader"}))
	stop := make(chan struct{})
	var reader sync.WaitGroup
	reader.Go(func() {
		p := make([]byte, 512)
		for n := int64(0); ; n++ {
			select {
			case <-stop:
				return
			default:
			}
			_, err := open.ReadAt(ctx, p, n%6<<20)
			if err != nil && errors.Is(err, vdi.ErrNotFound) {
				return // deleted
			}
			if err != nil || p[0] != '1' {
				t.Errorf("the reader finds %q, %v", p[0], err)
				return
			}
		}
	})
	if err := a.Delete(ctx, "v", ""); err != nil {
		t.Fatal(err)
	}
	h.on.Store(true)
	done := make(chan error)
	go func() {
		_, err := b.AlterCopies(ctx, "v", 3, nil, nil)
		done <- err
	}()
	select {
	case <-h.began:
		if err := do(a.Service); err != nil {
			t.Error(err)
		}
		close(h.release)
		if err := <-done; !errors.Is(err, want) {
			t.Errorf("%v, want %v", err, want)
		}
	case err := <-done:
		t.Fatalf("it was through before: %v", err)
	}
	close(stop)
	reader.Wait()
	open.Close()
	catchUp(list)
	for _, g := range list {
		for _, name := range left {
			expectBehind(t, g, name)
		}
	}
	if err := b.Collect(ctx); err != nil {
		t.Error(err)
	}
	policies := map[object.PolicyID]bool{}
	for _, v := range must[[]vdi.Info](t)(b.List(ctx)) {
		policies[v.Policy] = true
		if r := must[vdi.CheckReport](t)(b.Check(ctx, v.Name, vdi.CheckOptions{}, nil)); len(r.Problems) > 0 {
			t.Errorf("%+v", r.Problems)
		}
	}
	for n := range object.PolicyID(vditest.MaxCopies) {
		if ids := c.Objects.In(vditest.Policy + n); (len(ids) > 0) != policies[vditest.Policy+n] {
			t.Errorf("policy %d has %v, and volumes are in %v", vditest.Policy+n, ids, policies)
		}
	}
}

func expectBehind(t *testing.T, g *vditest.Gateway, name string) {
	t.Helper()
	base, tag, _ := strings.Cut(name, "@")
	want := tag[0]
	if want == '3' {
		tag = ""
	}
	v, err := g.Open(ctx, base, tag, vdi.OpenOptions{Client: "test"})
	if err != nil {
		t.Errorf("%s through %s: %v", name, g.Name, err)
		return
	}
	defer v.Close()
	p := make([]byte, behindSize)
	if _, err := v.ReadAt(ctx, p, 0); err != nil || !bytes.Equal(p, bytes.Repeat([]byte{want}, behindSize)) {
		t.Errorf("%s through %s begins with %q (%v)", name, g.Name, p[0], err)
	}
}

// Ownership of one VDI that goes while the node that copies waits for another one's, and is on its way back, is not
// taken for ownership: what the former owner has under way is copied too.
func TestAlterCopiesAndReturningOwnership(t *testing.T) {
	c := vditest.NewCluster(t, 1)
	h := holdNext(c.Objects, "write")
	var v, w, there *vdi.Volume
	var lost, back atomic.Bool // a has lost w; v is on its way back to a
	var a, b *vditest.Gateway
	var wg sync.WaitGroup
	var once sync.Once
	copied, landed := make(chan struct{}), make(chan struct{})
	ofV, ofW := object.VID(0), object.VID(0)
	taken := func() { // a waits for w; b takes v, and has a write under way when a client of a takes it back
		write(t, there, 0, 512, 2)
		h.on.Store(true)
		wg.Go(func() {
			write(t, there, 512, 512, 3)
			close(landed)
		})
		<-h.began
		wg.Go(func() { write(t, v, 1<<20, 512, 4) })
		for {
			if i, _ := a.Catalog.Get(ofV); i.Owner != nil && i.Owner.Name == "a" {
				back.Store(true)
				return
			}
			time.Sleep(time.Millisecond)
		}
	}
	c.Config = func(cfg *vdi.Config) {
		settled := cfg.Settled
		if cfg.Node != "a" {
			return
		}
		cfg.Settled = func(ctx context.Context, n catalog.Node, vid object.VID, generation uint64) error {
			switch {
			case !lost.Load():
			case vid == ofW:
				once.Do(taken)
			case vid == ofV:
				select {
				case <-copied:
				case <-time.After(time.Second): // it is waited for
				}
				close(h.release)
				<-landed
			}
			return settled(ctx, n, vid, generation)
		}
	}
	a, b = c.Gateway("a"), c.Gateway("b")
	v = create(t, a.Service, "v", 4<<20)
	write(t, v, 0, 4<<20, 1)
	must[vdi.Info](t)(a.Snapshot(ctx, "v", "s"))
	must[vdi.Info](t)(a.Clone(ctx, "v", "s", "c0")) // whose vid is behind that of v
	there = openAll(t, []*vditest.Gateway{b}, "v")[0]
	w = open(t, b.Service, "c0")
	write(t, w, 0, 512, 5)
	write(t, v, 0, 512, 6) // a owns v, b owns w
	a.CatchUp()
	ofV, ofW = vidOf(t, a.Service, "v"), vidOf(t, a.Service, "c0")
	fault := c.Objects.Fault
	var first, again sync.Once
	c.Objects.Fault = func(what string, id object.ID) error {
		if what == "sums" {
			first.Do(func() { // all is copied for the first time
				write(t, w, 0, 512, 7)
				lost.Store(true)
			})
			if back.Load() {
				again.Do(func() { time.AfterFunc(100*time.Millisecond, func() { close(copied) }) })
			}
		}
		return fault(what, id)
	}
	must[vdi.Altered](t)(a.AlterCopies(ctx, "v", 2, nil, nil))
	wg.Wait()
	for off, want := range map[int64]byte{0: 2, 512: 3, 1 << 20: 4, 2 << 20: 1} {
		if got := byteAt(t, v, off); got != want {
			t.Errorf("at %d there is %d, want %d", off, got, want)
		}
	}
	if got := byteAt(t, w, 0); got != 7 {
		t.Errorf("the clone has %d", got)
	}
}
