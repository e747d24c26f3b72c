package peer

import (
	"context"
	"net"
	"testing"
	"time"
)

func TestDialFrom(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for _, x := range []struct{ from, seen string }{
		{"127.0.0.7", "127.0.0.7"},
		{"", "127.0.0.1"},
		{"0.0.0.0", "127.0.0.1"},
		{"::1", "127.0.0.1"},        // of another family
		{"192.0.2.77", "127.0.0.1"}, // RFC 5737: nobody's
	} {
		c, err := DialFrom(net.ParseIP(x.from))(context.Background(), l.Addr().String())
		if err != nil {
			t.Errorf("from %q: %v", x.from, err)
			continue
		}
		s, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if got := hostOf(s.RemoteAddr()); got != x.seen {
			t.Errorf("from %q: the other side sees %s", x.from, got)
		}
		c.Close()
		s.Close()
	}
}

// A node is heard as long as a connection that it has made is there; its end is told.
func TestHears(t *testing.T) {
	modes(t, func(t *testing.T, change func(*Config)) {
		w := network(t)
		a, b := w.start("a", change), w.start("b", change)
		if b.Hears("a", Control) {
			t.Error("a is heard before it has called")
		}
		a.do("b", &Call{Class: Control, Op: opEcho})
		if !b.Hears("a", Control) || b.Hears("a", Data) || a.Hears("b", Control) {
			t.Error("it is not known who calls whom")
		}
		// A connection in place of another one is no end.
		a.Peer("b").lanes[Control].drop(errIdentity)
		eventually(t, "it does not connect again", func() bool {
			c := a.do("b", &Call{Class: Control, Op: opEcho})
			return c.Err == nil
		})
		a.Close()
		eventually(t, "a is heard after its end", func() bool { return !b.Hears("a", Control) })
		for deadline := time.After(testTimeout); ; {
			select {
			case e := <-b.events:
				if e.Incoming && !e.Up && e.Node == "a" && e.Class == Control {
					return
				}
			case <-deadline:
				t.Fatal("its end was not told")
			}
		}
	})
}
