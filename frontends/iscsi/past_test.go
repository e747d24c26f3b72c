package iscsi

import (
	"bytes"
	"testing"

	"sheepdog/frontends/iscsi/internal/scsi"
)

const busy = 0x08

// A write that may lie in the socket since before the gateway was taken for gone is not carried out under a new
// ownership: its initiator may have sent it, and others after it, through another gateway. What is sent
// after the answer is. Nor does it change reservations.
func TestCommandsOfThePast(t *testing.T) {
	h := serve(t, nil)
	d := h.store.disks["vm1"]
	c := h.login("vm1", me)
	c.ready()
	write := func(b byte) byte { return c.write(0, bytes.Repeat([]byte{b}, 512)).status }
	content := func() byte {
		d.mu.RLock()
		defer d.mu.RUnlock()
		return d.data[0]
	}
	// until repeats something that does not depend on us alone: when the session looks at its socket.
	until := func(what string, status byte, fn func() byte) {
		t.Helper()
		got := fn()
		for range 1000 {
			if got == status {
				return
			}
			got = fn()
		}
		t.Errorf("%s: always status %#x, never %#x", what, got, status)
	}
	lapse := func() { h.store.lapses.Add(2) }

	for b := byte(1); b < 20; b++ {
		if got := write(b); got != 0 || content() != b {
			t.Fatalf("who owned the disk all the time: status %#x", got)
		}
		lapse()
	}
	h.store.taken.Store(true)
	until("of the past", busy, func() byte {
		lapse()
		before := content()
		got := write(before + 1)
		if got == busy && content() != before {
			t.Error("what was refused is on the disk")
		}
		return got
	})
	until("sent anew", 0, func() byte { return write(100) })
	h.store.lapses.Add(1)
	for range 20 {
		if got := write(101); got != busy || content() != 100 {
			t.Fatalf("without a lease: status %#x", got)
		}
	}
	h.store.lapses.Add(1)
	until("with a lease again", 0, func() byte { return write(102) })

	register := func() byte { return c.prOut(0, 0, 0, 7).status }
	until("a registration of the past", busy, func() byte { lapse(); return c.prOut(6, 0, 0, 7).status })
	until("a registration", 0, register)
	until("a reservation of the past", busy, func() byte { lapse(); return c.prOut(1, scsi.WriteExclusive, 7, 0).status })
}
