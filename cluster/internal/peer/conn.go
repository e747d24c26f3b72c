package peer

import (
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// conn is a connection over which frames go, of either side.
type conn struct {
	raw    net.Conn // below TLS
	link   link
	class  Class
	remote Identity
	seed   uint64

	out     output
	in      inbox
	settled func() // called after calls were done by the sender

	// heard: something came since the last tick; listening: the reader waits for more.
	heard, listening atomic.Bool
	lastHeard        time.Time // heartbeat's
	rtt              atomic.Int64
	ping, pong       beat

	failed  chan struct{} // closed by the first fail
	failing sync.Once
	err     error // valid when failed is closed
}

// beat is a heartbeat on its way out.
type beat struct {
	frame
	busy atomic.Bool
}

// sent implements sendable.
func (b *beat) sent() *Call {
	b.busy.Store(false)
	return nil
}

// newConn makes a conn of a connection that is through the hello. tc is nil without TLS.
func newConn(s stream, class Class, remote Identity, seed uint64, b *budget) *conn {
	c := &conn{raw: s.raw, class: class, remote: remote, seed: seed, failed: make(chan struct{})}
	if s.tls != nil {
		c.link = s.tls
	} else {
		c.link = &plainLink{newSocket(s.raw)}
	}
	c.ping.owner, c.pong.owner = &c.ping, &c.pong
	c.out.init(c)
	c.in.init(c, b)
	return c
}

// stream is a connection as it comes out of the handshake.
type stream struct {
	net.Conn // what to read and write: TLS if there is
	raw      net.Conn
	tls      *tlsLink
}

// fail ends the connection. Reader and sender find out; whoever they serve is told by
// the reader's end.
func (c *conn) fail(err error) {
	c.failing.Do(func() {
		c.err = err
		close(c.failed)
		if tcp, ok := c.raw.(*net.TCPConn); ok && !errors.Is(err, errStopped) {
			tcp.SetLinger(0) // what the kernel still holds for the other side goes too
		}
		c.raw.Close()
	})
}

func (c *conn) dead() bool {
	select {
	case <-c.failed:
		return true
	default:
		return false
	}
}

// reason says why the connection ended, given what the reader got.
func (c *conn) reason(err error) error {
	select {
	case <-c.failed:
		return c.err
	default:
	}
	if errors.Is(err, io.EOF) {
		return fmt.Errorf("connection closed by the other side: %w", io.EOF)
	}
	return err
}

// receive receives some more into the inbox.
func (c *conn) receive() error {
	c.listening.Store(true)
	n, err := c.link.recv(&c.in)
	c.listening.Store(false)
	if err != nil {
		return err
	}
	if !c.heard.Load() {
		c.heard.Store(true)
	}
	if n > 0 {
		c.in.received(n)
	}
	return nil
}

var began = time.Now()

// ticks is a time in nanoseconds on a clock that nobody sets, never 0: a connection must not count as stalled, or never count as
// that, because the time of day is set.
func ticks(t time.Time) int64 { return int64(t.Sub(began)) + 1 }

// heartbeat carries out what both sides do about heartbeats.
func (c *conn) heartbeat(h *header) {
	now := uint64(ticks(time.Now()))
	switch {
	case h.typ == framePong && now >= h.id:
		c.rtt.Store(max(1, int64(now-h.id)))
	case h.typ == framePing && c.pong.busy.CompareAndSwap(false, true):
		h.typ = framePong
		h.encode(&c.pong.header, c.seed)
		c.out.putWake(&c.pong.frame)
	}
}

// beat sends a heartbeat, unless the previous one has not left yet.
func (c *conn) beat() {
	if c.ping.busy.CompareAndSwap(false, true) {
		h := header{typ: framePing, id: uint64(ticks(time.Now()))}
		h.encode(&c.ping.header, c.seed)
		c.out.putWake(&c.ping.frame)
	}
}

var (
	errStopped = errors.New("connection is no longer needed")
	errSilent  = errors.New("nothing came from the node for too long")
	errStalled = errors.New("node takes too long to send a message or to take replies")
)

// tick looks after the connection; called once in a while by one goroutine. silence is
// how long nothing may come.
func (c *conn) tick(now time.Time, silence, stall time.Duration) {
	// While the reader does something else it is not the other side that is silent.
	if c.heard.Swap(false) || !c.listening.Load() || c.lastHeard.IsZero() {
		c.lastHeard = now
	} else if now.Sub(c.lastHeard) > silence {
		c.fail(errSilent)
	}
	for _, since := range [...]int64{c.in.since.Load(), c.out.blocked.Load()} {
		if since != 0 && ticks(now)-since > int64(stall) {
			c.fail(errStalled)
		}
	}
}
