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

// request carries out a request.
func request(v *vdi.Volume, r vdi.Request) error {
	done := make(chan struct{})
	r.Done = func(*vdi.Request) { close(done) }
	v.Submit(&r)
	v.Kick()
	<-done
	return r.Err
}

// A read that has looked into the map before an object was discarded and removed, and reads only when it is being made anew, finds
// what others find who look then.
func TestReadWhileObjectIsMadeAnew(t *testing.T) {
	c := vditest.NewCluster(t, 1)
	var reading, storing atomic.Bool // are kept back
	read, stored, release := make(chan struct{}), make(chan struct{}), make(chan struct{})
	c.Objects.Fault = func(what string, id object.ID) error {
		switch kind, _ := id.Kind(); {
		case what == "read" && kind == object.KindData && reading.CompareAndSwap(true, false):
			close(read)
			<-stored
			time.Sleep(10 * time.Millisecond) // what could be written now is
		case what == "write" && kind == object.KindMap && storing.CompareAndSwap(true, false):
			close(stored)
			<-release
		}
		return nil
	}
	a, b := c.Gateway("a"), c.Gateway("b")
	create(t, a.Service, "v", 4<<20).Close()
	vols := openAll(t, []*vditest.Gateway{a, b}, "v")
	write(t, vols[0], 0, 512, 1)
	reading.Store(true)
	var wg sync.WaitGroup
	wg.Go(func() {
		first := byteAt(t, vols[1], 0)
		if second := byteAt(t, vols[1], 0); first != second {
			t.Errorf("it reads %d, and then %d", first, second)
		}
		close(release)
	})
	<-read
	if err := errors.Join(vols[0].Discard(ctx, 0, vols[0].ObjectSize()), a.Collect(ctx)); err != nil {
		t.Fatal(err)
	}
	if n := c.Objects.Count(); n != 1 {
		t.Fatalf("%d objects, want the map alone", n)
	}
	storing.Store(true)
	write(t, vols[0], 0, 512, 2)
	wg.Wait()
	if b := byteAt(t, vols[1], 0); b != 2 {
		t.Errorf("in the end it reads %d", b)
	}
}

// What is written over a hole may fail when its entry is stored already. That reads as zeros, through every gateway, and does so when
// all else is durable and settled; a snapshot of it can be written over.
func TestWriteOverHoleFails(t *testing.T) {
	for _, flags := range []vdi.Flags{0, vdi.FlagFUA} {
		for _, failure := range []error{object.ErrIO, object.ErrNoSpace} {
			c := vditest.NewCluster(t, 1)
			var on atomic.Bool
			c.Objects.Fault = func(what string, id object.ID) error {
				if kind, _ := id.Kind(); what == "write" && kind == object.KindData && on.Load() {
					return failure
				}
				return nil
			}
			list := []*vditest.Gateway{c.Gateway("a"), c.Gateway("b")}
			create(t, list[0].Service, "v", 4<<20).Close()
			vols := openAll(t, list, "v")
			on.Store(true)
			p := []byte{1}
			if err := request(vols[0], vdi.Request{Op: vdi.OpWrite, Flags: flags, Len: 1, Data: p}); err == nil {
				t.Fatal("it was written")
			}
			on.Store(false)
			zero := func(when string) {
				t.Helper()
				for i, v := range vols {
					if b := byteAt(t, v, 0); b != 0 {
						t.Errorf("%v, %s: %s reads %d", failure, when, list[i].Name, b)
					}
				}
			}
			zero("at once")
			if flags == 0 { // a discard does not make the object
				if err := vols[0].Discard(ctx, 0, 4096); err != nil {
					t.Fatal(err)
				}
			}
			if err := errors.Join(vols[0].Flush(ctx), list[0].Collect(ctx)); err != nil {
				t.Fatal(err)
			}
			zero("settled")
			must[vdi.Info](t)(list[0].Snapshot(ctx, "v", "s"))
			zero("with a snapshot")
			write(t, vols[0], 0, 512, 2)
			if r := must[vdi.CheckReport](t)(list[0].Check(ctx, "v", vdi.CheckOptions{}, nil)); len(r.Problems) > 0 {
				t.Errorf("%+v", r.Problems)
			}
			if b := byteAt(t, vols[1], 0); b != 2 {
				t.Errorf("in the end it reads %d", b)
			}
		}
	}
}
