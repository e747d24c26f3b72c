package vdi_test

import (
	"errors"
	"fmt"
	"sync"
	"testing"

	"sheepdog/vdi"
)

// What was made through one node is there for who asks another one afterwards.
func TestGatewayFindsWhatIsNew(t *testing.T) {
	_, list := startGateways(t, 7)
	for i := range 12 {
		name, maker := fmt.Sprint("v", i), list[i%3]
		create(t, maker.Service, name, 4<<20).Close()
		v := must[*vdi.Volume](t)(list[(i+1)%3].Open(ctx, name, "", vdi.OpenOptions{}))
		write(t, v, 0, 512, byte(i+1))
		must[vdi.Info](t)(maker.Snapshot(ctx, name, "s"))
		must[*vdi.Volume](t)(list[(i+2)%3].Open(ctx, name, "s", vdi.OpenOptions{})).Close()
		must[vdi.Info](t)(list[(i+2)%3].Clone(ctx, name, "s", name+"c"))
		must[vdi.Info](t)(maker.Info(ctx, name+"c", ""))
		v.Close()
	}
}

// Names that nobody has are not found, however many ask at once.
func TestGatewayFindsNothing(t *testing.T) {
	_, list := startGateways(t, 8)
	create(t, list[0].Service, "v", 4<<20).Close()
	var wg sync.WaitGroup
	for i := range 200 {
		wg.Go(func() {
			if _, err := list[i%3].Open(ctx, fmt.Sprint("nobody", i), "", vdi.OpenOptions{}); !errors.Is(err, vdi.ErrNotFound) {
				t.Errorf("open of nothing: %v", err)
			}
		})
	}
	wg.Wait()
}
