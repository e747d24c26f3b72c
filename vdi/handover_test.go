package vdi_test

import (
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sheepdog/storage/object"
	"sheepdog/vdi"
	"sheepdog/vdi/vditest"
)

// held keeps back writes of maps: what it is told to let go goes on.
type held struct {
	on      atomic.Bool
	began   chan struct{}
	release chan struct{}
}

func holdMapWrites(o *vditest.Objects) *held {
	h := &held{began: make(chan struct{}, 64), release: make(chan struct{})}
	o.Fault = func(what string, id object.ID) error {
		if kind, _ := id.Kind(); what == "write" && kind == object.KindMap && h.on.Load() {
			h.began <- struct{}{}
			<-h.release
		}
		return nil
	}
	return h
}

// holdNext keeps back one operation when it is on: the next of that name.
func holdNext(o *vditest.Objects, name string) *held {
	h := &held{began: make(chan struct{}), release: make(chan struct{})}
	o.Fault = func(what string, _ object.ID) error {
		if what == name && h.on.CompareAndSwap(true, false) {
			close(h.began)
			<-h.release
		}
		return nil
	}
	return h
}

// A flush that ends when another node has had the volume meanwhile says nothing about the map that this one has now.
func TestGatewayFlushesWhatItHad(t *testing.T) {
	c := vditest.NewCluster(t, 1)
	h := holdNext(c.Objects, "sync")
	a, b := c.Gateway("a"), c.Gateway("b")
	create(t, a.Service, "v", 2<<30).Close()
	vols := openAll(t, []*vditest.Gateway{a, b}, "v")
	write(t, vols[0], 0, 512, 1)
	h.on.Store(true)
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := vols[0].Flush(ctx); err != nil {
			t.Error(err)
		}
	})
	<-h.began
	write(t, vols[1], 1<<20, 512, 2)
	write(t, vols[0], 1536<<20, 512, 3) // in another page of the map
	close(h.release)
	wg.Wait()
	if err := a.Collect(ctx); err != nil {
		t.Fatal(err)
	}
	for off, want := range map[int64]byte{0: 1, 1 << 20: 2, 1536 << 20: 3} {
		if got := byteAt(t, vols[1], off); got != want {
			t.Errorf("at %d there is %d, want %d", off, got, want)
		}
	}
}

// A volume that is opened anew while the map of its last use is being settled has the same map in memory: what is written
// then stays in it.
func TestOpenedAnewWhileItSettles(t *testing.T) {
	c := vditest.NewCluster(t, 1)
	h := holdNext(c.Objects, "write")
	a, b := c.Gateway("a"), c.Gateway("b")
	v := create(t, a.Service, "v", 4<<20)
	write(t, v, 0, 512, 1)
	if err := errors.Join(v.Flush(ctx), v.Close()); err != nil {
		t.Fatal(err)
	}
	h.on.Store(true)
	settled, written := make(chan error, 1), make(chan struct{})
	go func() { settled <- a.Collect(ctx) }()
	<-h.began
	open(t, a.Service, "v").Close()
	v = open(t, a.Service, "v")
	go func() {
		write(t, v, 1<<20, 512, 2)
		close(written)
	}()
	select {
	case <-written:
	case <-time.After(200 * time.Millisecond): // it waits for the page
	}
	close(h.release)
	<-written
	if err := <-settled; err != nil {
		t.Fatal(err)
	}
	w := openAll(t, []*vditest.Gateway{b}, "v")[0]
	for off, want := range map[int64]byte{0: 1, 1 << 20: 2} {
		if got := byteAt(t, w, off); got != want {
			t.Errorf("at %d another gateway reads %d, want %d", off, got, want)
		}
	}
}

// While the entry of an object is being stored, other gateways do not see the object. So nobody
// sees it through its owner either: who had read it there would not find it elsewhere.
func TestGatewayReadsNoPendingEntry(t *testing.T) {
	for _, what := range []string{"hole", "ancestor's"} {
		t.Run(what, func(t *testing.T) {
			c := vditest.NewCluster(t, 1)
			h := holdMapWrites(c.Objects)
			a, b := c.Gateway("a"), c.Gateway("b")
			create(t, a.Service, "v", 4<<20).Close()
			vols := openAll(t, []*vditest.Gateway{a, b}, "v")
			write(t, vols[0], 2<<20, 512, 1) // a owns it, and has the page
			if what != "hole" {
				write(t, vols[0], 0, 512, 1)
				must[vdi.Info](t)(a.Snapshot(ctx, "v", "s"))
				b.CatchUp()
			}
			before := byteAt(t, vols[1], 0)
			h.on.Store(true)
			var wg sync.WaitGroup
			wg.Go(func() { write(t, vols[0], 0, 512, 2) })
			<-h.began
			here, there := byteAt(t, vols[0], 0), byteAt(t, vols[1], 0)
			if here != before || there != before {
				t.Errorf("the owner reads %d, and then another gateway %d, while the entry is being stored; it was %d", here, there, before)
			}
			h.on.Store(false)
			close(h.release)
			wg.Wait()
			for i, v := range vols {
				if got := byteAt(t, v, 0); got != 2 {
					t.Errorf("gateway %d reads %d after the write was answered", i, got)
				}
			}
		})
	}
}

// A lease that was over comes back when the node has applied what others did meanwhile. What it
// looked up before is not taken for true because there is a lease again.
func TestGatewayLeaseComesBack(t *testing.T) {
	c := vditest.NewCluster(t, 1)
	var a *vditest.Gateway
	var over atomic.Bool
	c.Config = func(cfg *vdi.Config) {
		if cfg.Node == "a" {
			cfg.Leased = func() bool {
				if over.CompareAndSwap(true, false) {
					a.Continue()
					a.CatchUp()
				}
				return true
			}
		}
	}
	a = c.Gateway("a")
	b := c.Gateway("b")
	create(t, a.Service, "v", 4<<20).Close()
	vols := openAll(t, []*vditest.Gateway{a, b}, "v")
	write(t, vols[0], 2<<20, 512, 1)
	byteAt(t, vols[0], 0) // a hole, as a remembers
	a.Stop()
	write(t, vols[1], 0, 512, 2)
	over.Store(true)
	if got := byteAt(t, vols[0], 0); got != 2 {
		t.Errorf("a gateway whose lease has come back reads %d", got)
	}
}
