package nbd

import (
	"bytes"
	"testing"

	"sheepdog/frontends/nbd/internal/wire"
)

// What a client that has left had in flight is not carried out when this node becomes the disk's owner later: the client may have
// sent it anew on another connection, and other writes after it. Of a client that has said goodbye, and of one that waits, it is.
func TestWritesOfThePast(t *testing.T) {
	for _, c := range []struct {
		name  string
		leave func(h *harness, c *client)
		lands bool
	}{
		{"left", func(h *harness, c *client) {
			c.conn.Close()
			h.eventually("the session does not notice", func() (gone bool) {
				h.clients.Each(func(s *session) { gone = s.ctx.Err() != nil })
				return gone
			})
		}, false},
		{"disconnected", func(_ *harness, c *client) { c.send(wire.NBD_CMD_DISC, 0, 0, 0, nil) }, true},
		{"waits", func(*harness, *client) {}, true},
	} {
		for _, typ := range []uint16{wire.NBD_CMD_WRITE, wire.NBD_CMD_TRIM, wire.NBD_CMD_WRITE_ZEROES} {
			h := serve(t, newStore(map[string]int64{"vm": 1 << 20}), nil)
			d := h.store.disk("vm")
			other := h.open("vm", wire.Structured)
			other.expect(0, wire.NBD_CMD_WRITE, 0, 0, 4096, bytes.Repeat([]byte{'n'}, 4096))
			other.conn.Close()
			h.eventually("a session is left", func() bool { return h.Counters().Sessions == 0 })
			gate := make(chan struct{})
			d.set(func() { d.taken = gate })
			cl := h.open("vm", wire.Structured)
			var payload []byte
			if typ == wire.NBD_CMD_WRITE {
				payload = bytes.Repeat([]byte{'o'}, 4096)
			}
			cl.send(typ, 0, 0, 4096, payload)
			h.eventually("nothing is in flight", func() bool { return h.Counters().InFlight == 1 })
			c.leave(h, cl)
			close(gate)
			if !c.lands {
				h.eventually("a session is left", func() bool { return h.Counters().Sessions == 0 })
				if b := d.content()[0]; b != 'n' {
					t.Errorf("%s: command %d of the past has landed on what is newer: %q", c.name, typ, b)
				}
				continue
			}
			h.eventually(c.name+": nothing has landed", func() bool { return d.content()[0] != 'n' })
		}
	}
}
