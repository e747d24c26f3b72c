package vdi_test

import (
	"bytes"
	"context"
	"errors"
	"sync/atomic"
	"testing"

	"sheepdog/storage/object"
	"sheepdog/vdi"
	"sheepdog/vdi/vditest"
)

// ahead is a log in which something comes before the next command of a kind, once it is on.
type ahead struct {
	vdi.Log
	on   atomic.Bool
	kind string
	do   func()
}

func (a *ahead) Propose(ctx context.Context, machine string, command []byte) ([]byte, error) {
	if bytes.HasPrefix(command, []byte(`{"`+a.kind+`":`)) && a.on.CompareAndSwap(true, false) {
		a.do()
	}
	return a.Log.Propose(ctx, machine, command)
}

// twoGateways are two gateways of a volume v. Before the first one's next command of a kind, once the log is on,
// something is done.
func twoGateways(t *testing.T, kind string, do func(b *vditest.Gateway)) (a, b *vditest.Gateway, log *ahead) {
	t.Helper()
	c := vditest.NewCluster(t, 1)
	log = &ahead{kind: kind}
	c.Config = func(cfg *vdi.Config) {
		if cfg.Node == "a" {
			log.Log, cfg.Log = cfg.Log, log
		}
	}
	a, b = c.Gateway("a"), c.Gateway("b")
	log.do = func() { do(b) }
	create(t, a.Service, "v", 4<<20).Close()
	catchUp([]*vditest.Gateway{a, b})
	return a, b, log
}

// Who deletes a VDI does not delete the snapshot that it has become meanwhile through another gateway instead.
func TestDeleteWhileSnapshotIsTaken(t *testing.T) {
	a, b, log := twoGateways(t, "delete", func(b *vditest.Gateway) { must[vdi.Info](t)(b.Snapshot(ctx, "v", "s")) })
	write(t, open(t, b.Service, "v"), 0, 512, 1)
	log.on.Store(true)
	if err := a.Delete(ctx, "v", ""); err != nil {
		t.Fatal(err)
	}
	catchUp([]*vditest.Gateway{a, b})
	for _, g := range []*vditest.Gateway{a, b} {
		if _, err := g.Open(ctx, "v", "", vdi.OpenOptions{}); !errors.Is(err, vdi.ErrNotFound) {
			t.Errorf("the VDI is there by %s: %v", g.Name, err)
		}
		if b := byteAt(t, must[*vdi.Volume](t)(g.Open(ctx, "v", "s", vdi.OpenOptions{})), 0); b != 1 {
			t.Errorf("its snapshot has %d by %s", b, g.Name)
		}
	}
}

// So does who deletes it when it was rolled back, or when its snapshot has come and gone.
func TestDeleteWhileReplaced(t *testing.T) {
	a, b, log := twoGateways(t, "delete", func(b *vditest.Gateway) {
		must[vdi.Info](t)(b.Rollback(ctx, "v", "s"))
		if err := errors.Join(b.Delete(ctx, "v", "s"), b.Collect(ctx)); err != nil {
			t.Error(err)
		}
	})
	must[vdi.Info](t)(b.Snapshot(ctx, "v", "s"))
	log.on.Store(true)
	if err := a.Delete(ctx, "v", ""); err != nil {
		t.Fatal(err)
	}
	if list := must[[]vdi.Info](t)(a.List(ctx)); len(list) > 0 {
		t.Errorf("there is %+v", list)
	}
}

// Who resizes a VDI that was rolled back meanwhile through another gateway resizes what it is now. If it was rolled back when the size
// was changed, it is not changed once more.
func TestResizeWhileRolledBack(t *testing.T) {
	for kind, want := range map[string]int64{"resize": 2 << 20, "trimmed": 4 << 20} {
		a, b, log := twoGateways(t, kind, func(b *vditest.Gateway) {
			must[vdi.Info](t)(b.Rollback(ctx, "v", "s"))
			write(t, open(t, b.Service, "v"), 3<<20, 512, 2)
		})
		must[vdi.Info](t)(b.Snapshot(ctx, "v", "s"))
		write(t, open(t, a.Service, "v"), 3<<20, 512, 1)
		log.on.Store(true)
		if i := must[vdi.Info](t)(a.Resize(ctx, "v", 2<<20)); i.Size != 2<<20 {
			t.Errorf("%s: it has %d bytes", kind, i.Size)
		}
		b.CatchUp()
		if i := must[vdi.Info](t)(b.Info(ctx, "v", "")); i.Size != want {
			t.Errorf("%s: it has %d bytes by another gateway, want %d", kind, i.Size, want)
		}
		if want == 4<<20 {
			if got := byteAt(t, open(t, b.Service, "v"), 3<<20); got != 2 {
				t.Errorf("%s: %d has come of what was written since", kind, got)
			}
		}
	}
}

// A VDI that is shrunk, and that another gateway makes larger again while the space is freed, is not shrunk a second time: what
// was written there since stays.
func TestShrunkOnce(t *testing.T) {
	a, b, log := twoGateways(t, "trimmed", func(b *vditest.Gateway) {
		b.CatchUp()
		must[vdi.Info](t)(b.Resize(ctx, "v", 8<<20))
		write(t, open(t, b.Service, "v"), 3<<20, 512, 2)
	})
	write(t, open(t, a.Service, "v"), 3<<20, 512, 1)
	log.on.Store(true)
	if i := must[vdi.Info](t)(a.Resize(ctx, "v", 2<<20)); i.Size != 2<<20 {
		t.Errorf("it has %d bytes", i.Size)
	}
	for _, g := range []*vditest.Gateway{a, b} {
		g.CatchUp()
		v := open(t, g.Service, "v")
		if v.Size() != 8<<20 {
			t.Fatalf("it has %d bytes by %s", v.Size(), g.Name)
		}
		if got := byteAt(t, v, 3<<20); got != 2 {
			t.Errorf("by %s it has %d where 2 was written", g.Name, got)
		}
	}
}

// Who shrinks a VDI goes on when another gateway has taken it in the middle, and removed what was cut off.
func TestResizeWhileTrimmedElsewhere(t *testing.T) {
	c := vditest.NewCluster(t, 1)
	h := holdNext(c.Objects, "stat")
	a, b := c.Gateway("a"), c.Gateway("b")
	create(t, a.Service, "v", 4<<20).Close()
	v := open(t, a.Service, "v")
	write(t, v, 3<<20, 512, 1)
	if err := v.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	b.CatchUp()
	h.on.Store(true)
	done := make(chan error)
	go func() {
		_, err := a.Resize(ctx, "v", 2<<20)
		done <- err
	}()
	<-h.began
	b.CatchUp()
	must[vdi.Info](t)(b.Resize(ctx, "v", 1<<20))
	close(h.release)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// A VDI is rolled back, and the gateway that did so is killed before it can tell others. As soon as somebody has written to it, nobody
// reads what it was before, through a gateway that has not heard of it either. So it is if it was deleted before by who was killed.
func TestRolledBackByAGatewayThatIsKilled(t *testing.T) {
	for _, deleted := range []bool{false, true} {
		c := vditest.NewCluster(t, 1)
		gateways := map[string]*vditest.Gateway{}
		catching := &ahead{kind: "barrier"}
		c.Config = func(cfg *vdi.Config) {
			name, kind := cfg.Node, map[string]string{"a": "rollback", "d": "delete"}[cfg.Node]
			if kind != "" {
				cfg.Log = &last{cfg.Log, kind, func() { gateways[name].Kill() }}
			}
			if name == "late" {
				catching.Log, cfg.Log = cfg.Log, catching
			}
		}
		for _, name := range []string{"a", "b", "d", "late"} {
			gateways[name] = c.Gateway(name)
		}
		a, b, d, late := gateways["a"], gateways["b"], gateways["d"], gateways["late"]
		v := create(t, a.Service, "v", 4<<20)
		write(t, v, 0, 512, 1)
		must[vdi.Info](t)(a.Snapshot(ctx, "v", "s"))
		write(t, v, 0, 512, 2)
		w := openAll(t, []*vditest.Gateway{late}, "v")[0]
		if got := byteAt(t, w, 0); got != 2 {
			t.Fatalf("it is %d", got)
		}
		late.Behind(true)
		if deleted {
			d.CatchUp()
			if err := d.Delete(ctx, "v", ""); err == nil {
				t.Fatal("deleted by who was killed")
			}
			if err := v.Close(); err != nil {
				t.Fatal(err)
			}
		}
		a.CatchUp()
		if _, err := a.Rollback(ctx, "v", "s"); err == nil {
			t.Fatal("rolled back by who was killed")
		}
		b.CatchUp()
		write(t, open(t, b.Service, "v"), 0, 512, 3)
		catching.do = func() { late.Behind(false) }
		catching.on.Store(true)
		if got := byteAt(t, w, 0); got != 3 {
			t.Errorf("deleted before: %v: another gateway reads %d, after 3 was written", deleted, got)
		}
	}
}

// When it is answered that a VDI has come back by a rollback, nobody reads what it was when it was deleted: also if those who did
// the one and the other could tell nobody.
func TestRolledBackAfterADeletionThatNobodyHeardOf(t *testing.T) {
	c := vditest.NewCluster(t, 1)
	catching := &ahead{kind: "barrier"}
	var d *vditest.Gateway
	c.Config = func(cfg *vdi.Config) {
		cfg.Known = nil
		switch cfg.Node {
		case "d":
			cfg.Log = &last{cfg.Log, "delete", func() { d.Kill() }}
		case "late":
			catching.Log, cfg.Log = cfg.Log, catching
		}
	}
	a, late := c.Gateway("a"), c.Gateway("late")
	d = c.Gateway("d")
	v := create(t, a.Service, "v", 4<<20)
	write(t, v, 0, 512, 1)
	must[vdi.Info](t)(a.Snapshot(ctx, "v", "s"))
	write(t, v, 0, 512, 2)
	w := openAll(t, []*vditest.Gateway{late}, "v")[0]
	late.Behind(true)
	d.CatchUp()
	if err := d.Delete(ctx, "v", ""); err == nil {
		t.Fatal("deleted by who was killed")
	}
	a.CatchUp()
	must[vdi.Info](t)(a.Rollback(ctx, "v", "s"))
	catching.do = func() { late.Behind(false) }
	catching.on.Store(true)
	if got := byteAt(t, w, 0); got != 1 {
		t.Errorf("another gateway reads %d, after it was rolled back to 1", got)
	}
}

// last is a log in which something comes behind commands of a kind, whose answer is lost.
type last struct {
	vdi.Log
	kind string
	do   func()
}

func (l *last) Propose(ctx context.Context, machine string, command []byte) ([]byte, error) {
	b, err := l.Log.Propose(ctx, machine, command)
	if bytes.HasPrefix(command, []byte(`{"`+l.kind+`":`)) {
		l.do()
		return nil, object.ErrClosed
	}
	return b, err
}
