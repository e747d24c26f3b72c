package vdi_test

import (
	"sync"
	"testing"

	"sheepdog/vdi"
	"sheepdog/vdi/vditest"
)

// A gateway that takes a snapshot, and then is slow, does not go back to the size that the VDI had: another one has
// resized it since.
func TestSizeAfterSnapshot(t *testing.T) {
	c := vditest.NewCluster(t, 1)
	h := holdNext(c.Objects, "sync")
	var log *ahead
	c.Config = func(cfg *vdi.Config) {
		if cfg.Node == "a" {
			log = &ahead{Log: cfg.Log, kind: "snapshot", do: func() { h.on.Store(true) }} // the fence behind it
			cfg.Log = log
		}
	}
	a, b := c.Gateway("a"), c.Gateway("b")
	create(t, a.Service, "v", 4<<20).Close()
	log.on.Store(true)
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := a.Snapshot(ctx, "v", "s"); err != nil {
			t.Error(err)
		}
	})
	<-h.began
	b.CatchUp()
	must[vdi.Info](t)(b.Resize(ctx, "v", 8<<20))
	a.CatchUp()
	v := open(t, a.Service, "v")
	close(h.release)
	wg.Wait()
	byteAt(t, v, 6<<20)
	write(t, v, 6<<20, 512, 1)
}
