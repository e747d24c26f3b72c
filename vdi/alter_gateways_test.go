package vdi_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"sheepdog/storage/object"
	"sheepdog/vdi"
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
		if r := must[vdi.CheckReport](t)(list[2].Check(ctx, w.v.Name(), false, nil)); len(r.Problems) > 0 {
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
