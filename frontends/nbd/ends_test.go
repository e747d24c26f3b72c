package nbd

import (
	"slices"
	"strings"
	"testing"
	"time"

	"sheepdog/frontends/internal/listen/listentest"
	"sheepdog/frontends/nbd/internal/wire"
)

// However a session ends, it is told once, and why.
func TestEndsOfSessions(t *testing.T) {
	write := func(c *client, n int) []byte {
		return requestMessage(c.headers, wire.Request{Type: wire.NBD_CMD_WRITE, Length: uint64(n)}, random(n))
	}
	const short = "INFO connection ended within a request: unexpected EOF"
	for _, x := range []struct {
		what string
		do   func(h *harness, c *client)
		want string
	}{
		{"said goodbye", func(_ *harness, c *client) { c.disconnect() }, "INFO client disconnected"},
		{"left", func(*harness, *client) {}, "INFO connection closed without NBD_CMD_DISC"},
		{"left within a header", func(_ *harness, c *client) { c.write(write(c, 512)[:10]) }, short},
		{"left within a payload", func(_ *harness, c *client) { c.write(write(c, 4096)[:1000]) }, short},
		{"left within a long payload", func(_ *harness, c *client) { c.write(write(c, mib)[:mib/2]) }, short},
		{"violated the protocol", func(_ *harness, c *client) { c.write(make([]byte, 100)) }, "INFO client violated the protocol: request with a wrong magic number"},
		{"server stops", func(h *harness, c *client) {
			if err := h.Shutdown(t.Context()); err != nil {
				t.Error(err)
			}
		}, "INFO server is shutting down"},
	} {
		t.Run(x.what, func(t *testing.T) {
			ends := new(listentest.Ends)
			h := serve(t, newStore(map[string]int64{"vm1": mib}), func(c *Config) { c.Logger = ends.Logger() })
			c := h.open("vm1", wire.Structured)
			x.do(h, c)
			c.conn.Close()
			if got := ends.Await(t, 1); !slices.Equal(got, []string{x.want}) {
				t.Errorf("it is told: %q, not %q", got, x.want)
			}
		})
	}
}

// A session that keeps memory from others is told once, as a warning.
func TestStalledSessionsAreTold(t *testing.T) {
	ends := new(listentest.Ends)
	h := serve(t, newStore(map[string]int64{"vm1": MaxPayload}), func(c *Config) {
		c.MemoryLimit, c.SessionMemory, c.StallTimeout = 8*MaxPayload, 2*MaxPayload, 200*time.Millisecond
		c.Logger = ends.Logger()
	})
	for range 6 {
		h.open("vm1", wire.Structured).send(wire.NBD_CMD_WRITE, 0, 0, MaxPayload, make([]byte, 10))
	}
	h.eventually("memory is not taken", func() bool { return h.Counters().BufferBytes >= 6*MaxPayload })
	c := h.open("vm1", wire.Structured)
	c.expect(0, wire.NBD_CMD_WRITE, 0, 0, MaxPayload, make([]byte, MaxPayload))
	c.disconnect()
	evicted := h.Counters().Evicted
	warned := 0
	for _, line := range ends.Await(t, 1+int(evicted)) {
		if strings.HasPrefix(line, "WARN client does not read its replies, or finish a payload, while others wait for memory: it holds ") {
			warned++
		}
	}
	if warned == 0 || uint64(warned) != evicted {
		t.Errorf("%d sessions were evicted, %d told: %q", evicted, warned, ends.All())
	}
}
