package vdi_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"testing"

	"sheepdog/vdi"
)

// Updates through three gateways at once, with the VDI going from one to the other, lose no
// increment of any counter; one counter lies in two objects.
func TestUpdateIsAtomic(t *testing.T) {
	c, list := startGateways(t, 5)
	must[vdi.Info](t)(list[0].Create(ctx, vdi.CreateOptions{Name: "vm", Size: 64 << 20, ObjectSizeShift: 20}))
	_ = c
	vols := openAll(t, list, "vm")
	offs := []int64{0, 4090, 1<<20 - 4, 5 << 20}
	const rounds = 40
	var wg sync.WaitGroup
	for i, v := range vols {
		for k, off := range offs {
			wg.Go(func() {
				for range rounds {
					err := v.Update(ctx, off, 8, 0, func(p []byte) error {
						binary.LittleEndian.PutUint64(p, binary.LittleEndian.Uint64(p)+1)
						return nil
					})
					if err != nil {
						t.Errorf("update through %d at %d: %v", i, off, err)
					}
				}
			})
			wg.Go(func() { // writers beside it, in the same objects
				for range rounds / 4 {
					if _, err := v.WriteAt(ctx, []byte{byte(k)}, off+8192); err != nil {
						t.Errorf("write: %v", err)
					}
				}
			})
		}
	}
	wg.Wait()
	for _, off := range offs {
		p := make([]byte, 8)
		must[int](t)(vols[1].ReadAt(ctx, p, off))
		if n := binary.LittleEndian.Uint64(p); n != uint64(rounds*len(vols)) {
			t.Errorf("counter at %d: %d, want %d", off, n, rounds*len(vols))
		}
	}
}

// What fn refuses is not written, and its error comes back as it is.
func TestUpdateRefused(t *testing.T) {
	_, list := startGateways(t, 6)
	must[vdi.Info](t)(list[0].Create(ctx, vdi.CreateOptions{Name: "vm", Size: 4 << 20}))
	v := open(t, list[0].Service, "vm")
	no := errors.New("no")
	if err := v.Update(ctx, 0, 16, 0, func(p []byte) error { p[0] = 1; return no }); err != no {
		t.Errorf("got %v", err)
	}
	if b := byteAt(t, v, 0); b != 0 {
		t.Error("it was written")
	}
	for _, n := range []int64{0, -1, vdi.MaxUpdate + 1} {
		if err := v.Update(ctx, 0, n, 0, func([]byte) error { return nil }); !errors.Is(err, vdi.ErrInvalid) {
			t.Errorf("update of %d bytes: %v", n, err)
		}
	}
	if err := v.Update(ctx, 4<<20-8, 16, 0, func([]byte) error { return nil }); !errors.Is(err, vdi.ErrInvalid) {
		t.Errorf("update beyond the end: %v", err)
	}
}

// A reservation that another gateway made is known to whoever takes the VDI after it: what was
// admitted before is asked about again, also if it is carried out in pieces.
func TestCheckAfterReservation(t *testing.T) {
	for _, r := range []vdi.Request{
		{Op: vdi.OpWrite, Len: 1, Data: []byte{2}},
		{Op: vdi.OpDiscard, Len: 64 << 20},
		{Op: vdi.OpDiscard, Len: 256 << 20},
	} {
		t.Run(fmt.Sprint(r.Op, r.Len), func(t *testing.T) { checkAfterReservation(t, r) })
	}
}

func checkAfterReservation(t *testing.T, r vdi.Request) {
	_, list := startGateways(t, 7)
	must[vdi.Info](t)(list[0].Create(ctx, vdi.CreateOptions{Name: "vm", Size: 256 << 20}))
	vols := openAll(t, list, "vm")
	must[int](t)(vols[0].WriteAt(ctx, []byte{1}, 0))
	must[uint64](t)(list[1].SetReservation(ctx, "vm", "", 0, "mine", true))
	no := errors.New("reserved")
	done := make(chan error, 1)
	r.Done = func(r *vdi.Request) { done <- r.Err }
	r.Check = func(*vdi.Request) error {
		text, _, err := list[0].Reservation("vm", "")
		if err == nil && text == "mine" {
			return no
		}
		return err
	}
	vols[0].Submit(&r)
	vols[0].Kick()
	if err := <-done; !errors.Is(err, no) {
		t.Errorf("request by the former owner: %v", err)
	}
	if _, err := list[2].SetReservation(ctx, "vm", "", 0, "yours", true); !errors.Is(err, vdi.ErrStale) {
		t.Errorf("reservation by an old revision: %v", err)
	}
	if b := byteAt(t, vols[1], 0); b != 1 {
		t.Errorf("byte is %d", b)
	}
}
