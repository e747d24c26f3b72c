package sheepdog

import (
	"context"
	"fmt"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"sheepdog/frontends/sheepdog/internal/wire"
	"sheepdog/storage/object"
)

// elsewhere is volumes that may be open through another node.
type elsewhere struct {
	volumes
	used atomic.Bool
}

func (e *elsewhere) UsedElsewhere(context.Context, object.VID) bool { return e.used.Load() }

// Who reads the map of a VDI that others may have open is given one that has it ask for everything; all others one that has what there is.
func TestMapWhereOthersMayWrite(t *testing.T) {
	var other *elsewhere
	h := serve(t, func(c *Config) {
		other = &elsewhere{volumes: c.Volumes.(volumes)}
		c.Volumes = other
	})
	vid := h.create("vm", 4<<20).VID
	h.put(vid, 0, 1)
	h.snapshot("vm", "s")
	snapshot, vid := vid, h.working("vm")
	closed := func(left int) { // the server has closed what others had, but so many
		t.Helper()
		for deadline := time.Now().Add(10 * time.Second); h.volumes.Opened(vid) > left; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("it is open %d times", h.volumes.Opened(vid))
			}
		}
	}
	closed(0)
	conn := h.dial()
	entries := func(of object.VID) (list []object.VID) {
		t.Helper()
		header, got := exchange(t, conn, message(t, []string{"op=2", fmt.Sprintf("oid=%d", 1<<63|uint64(of)<<32),
			fmt.Sprintf("offset=%d", wire.InodeHeaderSize), "want=24"}))
		if result(header) != 0 {
			t.Fatalf("map of %s: %#x", of, result(header))
		}
		for i := range len(got) / 4 {
			list = append(list, object.VID(le.Uint32(got[4*i:])))
		}
		return list
	}
	expect := func(what string, of object.VID, want ...object.VID) {
		t.Helper()
		if got := entries(of); !slices.Equal(got, want) {
			t.Errorf("%s: the map is %v, want %v", what, got, want)
		}
	}
	lock, release := message(t, []string{"op=0x12", "flags=1", "name=vm", "tag="}), message(t, []string{"op=0x13", "flags=1", "name=vm"})
	stored := []object.VID{snapshot, 0, 0, 0, 0, 0}
	asking := []object.VID{vid, vid, vid, vid, 0, 0} // nothing is beyond the size
	exchange(t, conn, lock)
	expect("open once", vid, stored...)
	exchange(t, conn, lock)
	expect("open twice", vid, asking...)
	expect("a snapshot", snapshot, stored...)
	exchange(t, conn, release)
	expect("open once again", vid, stored...)

	other.used.Store(true)
	expect("open elsewhere", vid, asking...)
	other.used.Store(false)

	writer := h.dial()
	if got := h.read(writer, vid, 0); got != 1 {
		t.Fatalf("read %d", got)
	}
	expect("in use by the only client", vid, stored...)
	exchange(t, conn, release)
	exchange(t, conn, lock)
	expect("in use by who used it before it was opened", vid, asking...)
	if header, _ := exchange(t, writer, message(t, []string{"op=3", "flags=5", fmt.Sprintf("oid=%d", object.DataID(vid, 2)), "offset=512", "fill=7*512"})); result(header) != 0 {
		t.Errorf("write to what is not there, by a map that says it is: %#x", result(header))
	}
	for index, want := range []byte{1, 0, 0, 0} {
		if got := h.read(conn, vid, index); got != want {
			t.Errorf("object %d begins with %d, want %d", index, got, want)
		}
	}
	writer.Close()
	closed(1)
	stored[2] = vid
	expect("in use by this connection alone", vid, stored...)
}

// A connection that says nothing is one of a client that has lost another, unless it is known what its host has open.
func TestSilentConnectionMayUseAnything(t *testing.T) {
	h := serve(t, nil)
	vid := h.create("vm", 4<<20).VID
	h.dial()
	conn := h.dial()
	exchange(t, conn, message(t, []string{"op=0x14", "flags=1", "name=vm", "tag="})) // it is served
	if h.server.HasOpen(vid) {
		t.Error("it counts at once")
	}
	h.server.clients.Each(func(s *session) { s.info.Started = s.info.Started.Add(-2 * lockLinger) })
	if !h.server.HasOpen(vid) {
		t.Error("it does not count after a while")
	}
	other := h.create("other", 4<<20).VID
	exchange(t, conn, message(t, []string{"op=0x12", "flags=1", "name=vm", "tag="}))
	if h.server.HasOpen(other) || !h.server.HasOpen(vid) {
		t.Error("what its host has open does not count")
	}
}
