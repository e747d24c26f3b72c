package vdi_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sheepdog/storage/object"
	"sheepdog/vdi"
	"sheepdog/vdi/vditest"
)

// writeFor writes for a vid, as native clients do.
func writeFor(v *vdi.Volume, vid object.VID, off int64, p []byte) error {
	done := make(chan error, 1)
	v.Submit(&vdi.Request{Op: vdi.OpWrite, Off: off, Len: int64(len(p)), Data: p, VID: vid, Done: func(r *vdi.Request) { done <- r.Err }})
	v.Kick()
	return <-done
}

// A write for a vid is in the snapshot that the vid becomes, or it is refused; whatever is under way when
// the snapshot is taken.
func TestWritesForAVID(t *testing.T) {
	s := vditest.New(t)
	v := create(t, s, "vm", 8<<20)
	vid := v.VID()
	const workers, grain = 8, 4096
	var last [workers]byte // the last value answered
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for i := byte(1); ; i++ {
				err := writeFor(v, vid, int64(w)<<20, bytes.Repeat([]byte{i}, grain))
				if errors.Is(err, vdi.ErrReadOnly) {
					return
				}
				if err != nil {
					t.Errorf("write: %v", err)
					return
				}
				last[w] = i
			}
		})
	}
	must[vdi.Info](t)(s.Snapshot(ctx, "vm", "one"))
	wg.Wait()
	snap, err := s.OpenVID(vid, "test", true)
	if err != nil {
		t.Fatal(err)
	}
	defer snap.Close()
	for w := range workers {
		off := int64(w) << 20
		if in, now := byteAt(t, snap, off), byteAt(t, v, off); in != last[w] || now != last[w] {
			t.Errorf("worker %d: the snapshot has %d, the VDI %d, %d was answered", w, in, now, last[w])
		}
	}
	h, err := s.Successor(vid)
	if err != nil || h.Snapshot || h.Parent != vid {
		t.Fatalf("%+v, %v", h, err)
	}
	if err := writeFor(v, h.VID, 0, make([]byte, grain)); err != nil {
		t.Errorf("write for the new vid: %v", err)
	}
	if _, err := v.Entry(ctx, vid, 0); !errors.Is(err, vdi.ErrReadOnly) {
		t.Errorf("entry of the old vid: %v", err)
	}
}

// The map that clients read is as every answered write has made it.
func TestReadMap(t *testing.T) {
	s := vditest.New(t)
	const objects = 3000
	v := create(t, s, "vm", objects<<20)
	vid := v.VID()
	want := make([]uint32, objects+100)
	set := func(i int) {
		write(t, v, int64(i)<<20, 512, 1)
		h, err := s.Successor(vid)
		if err != nil {
			t.Fatal(err)
		}
		want[i] = uint32(h.VID)
	}
	check := func(vid object.VID) {
		t.Helper()
		for _, r := range [][2]int{{0, len(want)}, {1, 5}, {1000, 1100}, {1023, 2}, {2999, 50}} {
			p := make([]byte, 4*r[1])
			if err := s.ReadMap(ctx, vid, uint32(r[0]), p[:4*min(r[1], len(want)-r[0])]); err != nil {
				t.Fatal(err)
			}
			for i := range min(r[1], len(want)-r[0]) {
				if got := binary.LittleEndian.Uint32(p[4*i:]); got != want[r[0]+i] {
					t.Fatalf("entry %d of %s is %x, want %x", r[0]+i, vid, got, want[r[0]+i])
				}
			}
		}
	}
	for _, i := range []int{0, 3, 1023, 1024, 2047, 2999} {
		set(i)
	}
	check(vid)
	before, err := v.MapVersion(ctx)
	if err != nil {
		t.Fatal(err)
	}
	must[vdi.Info](t)(s.Snapshot(ctx, "vm", "one"))
	check(vid)
	set(3)
	set(4)
	h, _ := s.Successor(vid)
	check(h.VID)
	if now, err := v.MapVersion(ctx); err != nil || now == before {
		t.Errorf("version %+v, before %+v, %v", now, before, err)
	}
	if err := s.ReadMap(ctx, 0x123456, 0, make([]byte, 4)); !errors.Is(err, vdi.ErrNotFound) {
		t.Errorf("map of nothing: %v", err)
	}
}

// States of machines are written under the working vid, stay with the snapshot that it becomes, and go with it.
func TestVMState(t *testing.T) {
	w := vditest.NewWorld(t)
	s := w.Service() // which does not run: a sweep passes over what somebody else is collecting just now
	v := create(t, s, "vm", 4<<20)
	vid := v.VID()
	state := bytes.Repeat([]byte("state"), 700_000)
	put := func(vid object.VID) error {
		for off := 0; off < len(state); off += 1 << 20 {
			at := vdi.VMState{VID: vid, Index: uint32(off >> 20)}
			if err := s.WriteVMState(ctx, at, state[off:min(off+1<<20, len(state))], true, 0); err != nil {
				return err
			}
		}
		return s.Describe(ctx, vid, "one", int64(len(state)), 77)
	}
	if err := put(vid); err != nil {
		t.Fatal(err)
	}
	if err := s.WriteVMState(ctx, vdi.VMState{VID: vid, Index: 9}, []byte("never said"), true, 0); err != nil {
		t.Fatal(err)
	}
	h, err := s.HeaderOf(vid)
	if err != nil || h.Tag != "one" || h.VMStateSize != int64(len(state)) || h.VMClock != 77 {
		t.Fatalf("%+v, %v", h, err)
	}
	must[vdi.Info](t)(s.Snapshot(ctx, "vm", h.Tag))
	h, err = s.FindHeader("vm", "one", 0)
	if err != nil || h.VID != vid || h.VMStateSize != int64(len(state)) {
		t.Fatalf("%+v, %v", h, err)
	}
	if now, err := s.FindHeader("vm", "", 0); err != nil || now.VMStateSize != 0 || now.Tag != "" {
		t.Errorf("the VDI goes on with %+v, %v", now, err)
	}
	if err := put(vid); !errors.Is(err, vdi.ErrReadOnly) {
		t.Errorf("write to the snapshot's state: %v", err)
	}
	p := make([]byte, 1<<20)
	if err := s.ReadVMState(ctx, vdi.VMState{VID: vid, Index: 1, Off: 0}, p); err != nil || !bytes.Equal(p, state[1<<20:2<<20]) {
		t.Errorf("read: %v", err)
	}
	if err := s.ReadVMState(ctx, vdi.VMState{VID: vid, Index: 5}, p); !errors.Is(err, vdi.ErrNotFound) {
		t.Errorf("read of what is not there: %v", err)
	}
	for _, at := range []vdi.VMState{{VID: vid, Index: vdi.NativeObjects}, {VID: vid, Off: 1 << 22}} {
		if err := s.ReadVMState(ctx, at, p); !errors.Is(err, vdi.ErrInvalid) {
			t.Errorf("read at %+v: %v", at, err)
		}
	}
	if err := s.Sweep(ctx); err != nil {
		t.Fatal(err)
	}
	if n := states(w); n != 5 {
		t.Errorf("%d objects of states, want 5", n)
	}
	if err := s.Delete(ctx, "vm", "one"); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(s.Collect(ctx), s.Sweep(ctx)); err != nil {
		t.Fatal(err)
	}
	if n := states(w); n != 0 {
		t.Errorf("%d objects of states are left", n)
	}
}

func states(w *vditest.World) (n int) {
	for _, id := range w.Objects.IDs() {
		if kind, _ := id.Kind(); kind == object.KindVMState {
			n++
		}
	}
	return n
}

// An object of a deleted snapshot is found by way of who uses it still.
func TestHolder(t *testing.T) {
	s := vditest.New(t)
	v := create(t, s, "vm", 4<<20)
	write(t, v, 0, 512, 7)
	vid := v.VID()
	must[vdi.Info](t)(s.Snapshot(ctx, "vm", "one"))
	must[vdi.Info](t)(s.Clone(ctx, "vm", "one", "copy"))
	if err := s.Delete(ctx, "vm", "one"); err != nil {
		t.Fatal(err)
	}
	holder, err := s.Holder(ctx, vid, 0)
	if err != nil {
		t.Fatal(err)
	}
	if h, err := s.HeaderOf(holder); err != nil || h.Snapshot {
		t.Errorf("%+v, %v", h, err)
	}
	if _, err := s.Holder(ctx, vid, 1); !errors.Is(err, vdi.ErrNotFound) {
		t.Errorf("holder of a hole: %v", err)
	}
	if _, err := s.OpenVID(vid, "test", true); !errors.Is(err, vdi.ErrNotFound) {
		t.Errorf("open of what is deleted: %v", err)
	}
}

// Two gateways: who does not own the VDI still says the right version of its map, and a write for an old vid
// is refused by whoever gets it.
func TestNativeGateways(t *testing.T) {
	_, list := startGateways(t, 5)
	must[vdi.Info](t)(list[0].Service.Create(ctx, vdi.CreateOptions{Name: "vm", Size: 8 << 20, ObjectSizeShift: 20}))
	vols := openAll(t, list, "vm")
	vid := vols[0].VID()
	versions := map[string]bool{}
	for i := range 4 {
		if err := writeFor(vols[i%2], vid, int64(i)<<20, []byte{1, 2, 3}); err != nil {
			t.Fatal(err)
		}
		catchUp(list)
		version, err := vols[2].MapVersion(ctx)
		if err != nil {
			t.Fatal(err)
		}
		versions[fmt.Sprint(version)] = true
	}
	if len(versions) != 4 {
		t.Errorf("%d versions, want 4: %v", len(versions), versions)
	}
	must[vdi.Info](t)(list[0].Service.Snapshot(ctx, "vm", "one"))
	for i, v := range vols {
		if err := writeFor(v, vid, 0, []byte{9}); !errors.Is(err, vdi.ErrReadOnly) {
			t.Errorf("write for the old vid through gateway %d: %v", i, err)
		}
	}
}

// What a vid was is known when it was freed, as long as the VDI that goes on from it is there: that is its successor, by whatever
// snapshots and rollbacks. Others are not, though they have its name: one that is made anew, or as a clone of the same family.
func TestSuccessorOfFreed(t *testing.T) {
	w := vditest.NewWorld(t)
	var ms atomic.Int64 // what is made in the same one is taken for the same
	w.Config = func(cfg *vdi.Config) { cfg.Now = func() time.Time { return time.UnixMilli(ms.Add(1)) } }
	s := w.Start()
	first := create(t, s, "vm", 4<<20)
	vid := first.VID()
	is := func(vid object.VID) {
		t.Helper()
		now := must[vdi.Header](t)(s.FindHeader("vm", "", 0))
		if h, err := s.Successor(vid); err != nil || h.VID != now.VID {
			t.Errorf("the successor of %s is %s, want %s: %v", vid, h.VID, now.VID, err)
		}
		if f, err := s.FamilyOf(vid); err != nil || f != now.Family {
			t.Errorf("%s is of family %d, want %d: %v", vid, f, now.Family, err)
		}
	}
	none := func(vid object.VID) {
		t.Helper()
		if h, err := s.Successor(vid); !errors.Is(err, vdi.ErrNotFound) {
			t.Errorf("the successor of %s is %s of %q: %v", vid, h.VID, h.Name, err)
		}
	}
	free := func(tag string) {
		t.Helper()
		if err := errors.Join(s.Delete(ctx, "vm", tag), s.Collect(ctx)); err != nil {
			t.Fatal(err)
		}
	}
	isFree := func(vid object.VID) {
		t.Helper()
		if !s.InUse(vid) {
			t.Fatalf("%s may be used by others", vid)
		}
		if _, err := s.HeaderOf(vid); !errors.Is(err, vdi.ErrNotFound) {
			t.Fatalf("it is there still: %v", err)
		}
	}
	must[vdi.Info](t)(s.Snapshot(ctx, "vm", "one"))
	second := must[vdi.Header](t)(s.FindHeader("vm", "", 0)).VID
	must[vdi.Info](t)(s.Snapshot(ctx, "vm", "two"))
	free("one")
	isFree(vid)
	is(vid)
	must[vdi.Info](t)(s.Rollback(ctx, "vm", "two"))
	is(vid)
	is(second)
	must[vdi.Info](t)(s.Clone(ctx, "vm", "two", "clone"))
	must[vdi.Info](t)(s.Snapshot(ctx, "clone", "three"))
	first.Close()

	free("")
	none(vid)
	must[vdi.Info](t)(s.Clone(ctx, "clone", "three", "vm"))
	none(vid)
	none(second) // a snapshot
	free("")
	create(t, s, "vm", 4<<20).Close()
	none(vid)
	none(second)
	free("")
	must[vdi.Info](t)(s.Rollback(ctx, "vm", "two"))
	is(vid) // it is back
	is(second)
}
