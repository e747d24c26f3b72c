package nbd

import (
	"fmt"
	"testing"

	"sheepdog/frontends/nbd/internal/wire"
	"sheepdog/storage/object"
	"sheepdog/vdi"
)

// A flush that says that writes may be lost is heard by a client that goes on, or ends its session as it should; not by one whose
// connection is lost while it waits: that comes back, and flushes anew.
func TestWhoHearsOfLostWrites(t *testing.T) {
	for _, c := range []struct {
		name  string
		end   func(*client)
		heard int64
	}{
		{"goes on", func(c *client) {
			c.expect(wire.NBD_EIO, wire.NBD_CMD_FLUSH, 0, 0, 0, nil)
			for range 2 { // the second one comes when the answer is known to be sent
				c.expect(0, wire.NBD_CMD_WRITE, 0, 0, 4096, make([]byte, 4096))
			}
			c.conn.Close()
		}, 1},
		{"disconnects", func(c *client) {
			c.expect(wire.NBD_EIO, wire.NBD_CMD_FLUSH, 0, 0, 0, nil)
			c.send(wire.NBD_CMD_DISC, 0, 0, 0, nil)
		}, 1},
		{"is lost", func(c *client) {
			c.send(wire.NBD_CMD_FLUSH, 0, 0, 0, nil)
			c.conn.Close()
		}, 0},
	} {
		h := serve(t, newStore(map[string]int64{"vm": 1 << 20}), nil)
		d := h.store.disk("vm")
		d.set(func() { d.fail[vdi.OpFlush] = fmt.Errorf("flush: %w: %w", vdi.ErrIO, object.ErrLost) })
		c.end(h.open("vm", wire.Structured))
		h.eventually("the session stays", func() bool { return h.Counters().Sessions == 0 && h.store.opens.Load() == 0 })
		if n := d.heard.Load(); n != c.heard {
			t.Errorf("a client that %s: heard %d times, want %d", c.name, n, c.heard)
		}
	}
}
