package sheepdog

import (
	"context"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"sheepdog/vdi"
	"sheepdog/vdi/vditest"
)

// Who has written under a vid, and flushes under it when others have taken a snapshot meanwhile, hears that what he wrote may be
// lost: the snapshot's own flush has heard it first.
func TestFlushOfFormerVIDSaysWhatIsLost(t *testing.T) {
	w := vditest.NewWorld(t)
	h := &harness{t: t, volumes: volumes{w.Start()}}
	h.start(nil)
	oid := func(v vdi.Info) string { return fmt.Sprintf("oid=%d", uint64(v.VID)<<32) }
	inode := func(v vdi.Info) string { return fmt.Sprintf("oid=%d", uint64(1)<<63|uint64(v.VID)<<32) }
	v := h.create("vm", 4<<20)
	conn := h.dial()
	const cached = "flags=5"
	conn.SetDeadline(time.Now().Add(time.Minute))
	if header, _ := exchange(t, conn, message(t, []string{"op=1", cached, oid(v), "fill=7*4096"})); result(header) != 0 {
		t.Fatalf("write: %#x", result(header))
	}
	w.Objects.Restart(rand.New(rand.NewPCG(1, 1)), 0)
	if _, err := h.volumes.Snapshot(context.Background(), "vm", "s"); err == nil {
		t.Fatal("the snapshot does not notice")
	}
	if _, err := h.volumes.Snapshot(context.Background(), "vm", "s"); err != nil {
		t.Fatal(err)
	}
	conn = h.dial() // it has lost its connection, and knows the vid of before
	flush := func() uint32 {
		header, _ := exchange(t, conn, message(t, []string{"op=0x16", inode(v)}))
		return result(header)
	}
	if got := flush(); got != 3 {
		t.Errorf("flush under the vid of before: result %#x, want 3", got)
	}
	// It is said again until the server knows that the answer was sent when the next request comes.
	eventually(t, "it is still told of what was lost", func() bool { return flush() == 0 })
	flush()
	again := h.dial() // it has nothing to hear of
	if header, _ := exchange(t, again, message(t, []string{"op=0x16", inode(v)})); result(header) != 0 {
		t.Errorf("flush of who comes later: result %#x", result(header))
	}
}

// A client that loses its connection while it waits for a flush, comes back and flushes anew hears what the first one would have said.
func TestLossIsToldToWhoComesBack(t *testing.T) {
	w := vditest.NewWorld(t)
	h := &harness{t: t, volumes: volumes{w.Start()}}
	h.start(nil)
	v := h.create("vm", 4<<20)
	inode := fmt.Sprintf("oid=%d", uint64(1)<<63|uint64(v.VID)<<32)
	stays := h.dial() // another client of it
	if header, _ := exchange(t, stays, message(t, []string{"op=0x16", inode})); result(header) != 0 {
		t.Fatalf("flush: %#x", result(header))
	}
	conn := h.dial()
	if header, _ := exchange(t, conn, message(t, []string{"op=1", "flags=5", fmt.Sprintf("oid=%d", uint64(v.VID)<<32), "fill=7*4096"})); result(header) != 0 {
		t.Fatalf("write: %#x", result(header))
	}
	w.Objects.Restart(rand.New(rand.NewPCG(1, 1)), 0)
	if _, err := conn.Write(message(t, []string{"op=0x16", inode})); err != nil {
		t.Fatal(err)
	}
	conn.Close()
	eventually(t, "the session is left", func() bool { return h.server.Counters().Connections == 1 })
	conn = h.dial()
	for _, want := range []uint32{3, 0, 0} { // the last one comes when the first answer is known to be sent
		if header, _ := exchange(t, conn, message(t, []string{"op=0x16", inode})); result(header) != want {
			t.Errorf("flush of who has come back: result %#x, want %#x", result(header), want)
		}
	}
	if header, _ := exchange(t, h.dial(), message(t, []string{"op=0x16", inode})); result(header) != 0 {
		t.Errorf("flush of who comes later: result %#x", result(header))
	}
}
