package iscsi

import (
	"slices"
	"testing"
	"time"

	"sheepdog/frontends/internal/listen/listentest"
	"sheepdog/frontends/iscsi/internal/pdu"
)

// However a session ends, it is told once, and why.
func TestEndsOfSessions(t *testing.T) {
	for _, x := range []struct {
		what string
		do   func(h *harness, c *client)
		want string
	}{
		{"logged out", func(_ *harness, c *client) {
			c.send(c.request(pdu.OpLogout, pdu.FlagFinal), nil)
			c.recv()
			c.gone()
		}, "INFO initiator logged out"},
		{"left", func(*harness, *client) {}, "INFO initiator disconnected without logging out"},
		{"left within a PDU", func(_ *harness, c *client) { c.conn.Write(make([]byte, 20)) }, "INFO connection ended within a request: unexpected EOF"},
		{"logged in anew", func(h *harness, c *client) { h.login("vm1", me).ready() }, "INFO initiator logged in anew"},
		{"is silent", func(_ *harness, c *client) {
			for range maxPings {
				c.recv()
			}
			c.gone()
		}, "INFO initiator does not answer"},
	} {
		t.Run(x.what, func(t *testing.T) {
			ends := new(listentest.Ends)
			h := serve(t, func(c *Config) {
				c.Logger = ends.Logger()
				if x.what == "is silent" {
					c.PingEvery = 20 * time.Millisecond
				}
			})
			c := h.login("vm1", me)
			if x.what != "is silent" {
				c.ready()
			}
			x.do(h, c)
			c.conn.Close()
			if got := ends.Await(t, 1); !slices.Equal(got, []string{x.want}) {
				t.Errorf("it is told: %q, not %q", got, x.want)
			}
		})
	}
}
