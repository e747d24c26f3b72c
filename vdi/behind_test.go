package vdi_test

import (
	"bytes"
	"context"
	"errors"
	"sync/atomic"
	"testing"

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

// Who resizes a VDI that was rolled back meanwhile through another gateway resizes what it is now.
func TestResizeWhileRolledBack(t *testing.T) {
	for _, kind := range []string{"resize", "trimmed"} {
		a, b, log := twoGateways(t, kind, func(b *vditest.Gateway) { must[vdi.Info](t)(b.Rollback(ctx, "v", "s")) })
		must[vdi.Info](t)(b.Snapshot(ctx, "v", "s"))
		write(t, open(t, a.Service, "v"), 3<<20, 512, 1)
		log.on.Store(true)
		if i := must[vdi.Info](t)(a.Resize(ctx, "v", 2<<20)); i.Size != 2<<20 {
			t.Errorf("%s: it has %d bytes", kind, i.Size)
		}
		b.CatchUp()
		if i := must[vdi.Info](t)(b.Info(ctx, "v", "")); i.Size != 2<<20 {
			t.Errorf("%s: it has %d bytes by another gateway", kind, i.Size)
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
