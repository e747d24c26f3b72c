package listen

import (
	"context"
	"errors"
	"io"
	"iter"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"sheepdog/frontends/internal/stream"
)

const patience = time.Minute

// echo is a session that answers each byte with itself. A connection whose first byte is 'h' stays
// in its handshake.
type echo struct {
	conn          net.Conn
	stopped, cut  atomic.Bool
	stalls        atomic.Bool
	why           error // it was cut
	bytes         int64
	hold          chan struct{} // while it is open, nothing is answered after Stop
	holdsInFlight bool
}

func (e *echo) Stop() {
	e.stopped.Store(true)
	e.conn.SetReadDeadline(time.Unix(1, 0))
}

func (e *echo) End(why error) bool {
	first := !e.cut.Swap(true)
	if first {
		e.why = why
		close(e.hold)
	}
	e.conn.Close()
	return first
}

func (e *echo) Stalled(time.Time) (int64, bool) { return 7, e.stalls.Load() }

type server struct {
	*Acceptor[*echo]
	t    *testing.T
	past atomic.Int64
}

func serve(t *testing.T, l net.Listener, change func(*Config)) *server {
	t.Helper()
	cfg := Config{Protocol: "echo", Logger: slog.New(slog.DiscardHandler), Limits: Limits{MaxConnections: 100}}
	if change != nil {
		change(&cfg)
	}
	s := &server{t: t}
	s.Acceptor = New[*echo](cfg, s.client)
	var served sync.WaitGroup
	served.Go(func() {
		if err := s.Serve(context.Background(), l); err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	t.Cleanup(func() {
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		s.Shutdown(ctx)
		served.Wait()
		if n := s.Counters().Connections; n != 0 {
			t.Errorf("%d connections are left", n)
		}
	})
	return s
}

func (s *server) client(conn net.Conn) {
	b := make([]byte, 1)
	if s.Extend(conn, time.Now().Add(patience)) != nil {
		return
	}
	for {
		if _, err := io.ReadFull(conn, b); err != nil {
			return
		}
		if b[0] != 'h' {
			break
		}
	}
	conn.SetDeadline(time.Time{})
	e := &echo{conn: conn, hold: make(chan struct{}), holdsInFlight: b[0] == 'w'}
	s.Enter(conn, e)
	for {
		conn.Write(b)
		e.bytes++
		if _, err := io.ReadFull(conn, b); err != nil {
			break
		}
	}
	if e.holdsInFlight {
		<-e.hold
	}
	s.Leave(conn, func() { s.past.Add(e.bytes) })
}

func tcp(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// dial connects and says one byte.
func dial(t *testing.T, l net.Listener, from string, first byte) net.Conn {
	t.Helper()
	d := net.Dialer{Timeout: patience}
	if from != "" {
		d.LocalAddr = &net.TCPAddr{IP: net.ParseIP(from)}
	}
	conn, err := d.Dial(l.Addr().Network(), l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(patience))
	conn.Write([]byte{first})
	return conn
}

// answered reports whether a byte comes back; if not, the connection was closed.
func answered(t *testing.T, conn net.Conn) bool {
	t.Helper()
	_, err := io.ReadFull(conn, make([]byte, 1))
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) {
		t.Fatal(err)
	}
	return err == nil
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal(what)
		}
	}
}

func TestAllow(t *testing.T) {
	l := tcp(t)
	s := serve(t, l, func(c *Config) {
		c.Allow = []netip.Prefix{netip.MustParsePrefix("127.0.0.2/32"), netip.MustParsePrefix("10.0.0.0/8")}
	})
	for from, allowed := range map[string]bool{"127.0.0.1": false, "127.0.0.2": true, "127.0.0.3": false} {
		if got := answered(t, dial(t, l, from, 'x')); got != allowed {
			t.Errorf("from %s: let in: %v", from, got)
		}
	}
	if c := s.Counters(); c.Accepted != 3 || c.NotAllowed != 2 || c.TooMany != 0 {
		t.Errorf("%+v", c)
	}
	for addr, want := range map[string]bool{"10.1.2.3": true, "::ffff:10.1.2.3": true, "11.0.0.1": false, "fe80::1%eth0": false} {
		if got := s.allowed(net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(addr), 1))); got != want {
			t.Errorf("%s allowed: %v, want %v", addr, got, want)
		}
	}
}

// A unix socket has no addresses: the list is not for it.
func TestAllowIsForTCP(t *testing.T) {
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	serve(t, l, func(c *Config) { c.Allow = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")} })
	if !answered(t, dial(t, l, "", 'x')) {
		t.Error("a client of the unix socket is refused")
	}
}

// Handshakes count, and who leaves makes room.
func TestLimit(t *testing.T) {
	l := tcp(t)
	s := serve(t, l, func(c *Config) { c.MaxConnections = 2 })
	a, b := dial(t, l, "", 'x'), dial(t, l, "", 'h')
	if !answered(t, a) {
		t.Fatal("the first is refused")
	}
	eventually(t, "the second is not there", func() bool { return s.Counters().Connections == 2 })
	if answered(t, dial(t, l, "", 'x')) {
		t.Error("one too many is let in")
	}
	if n := s.Counters().TooMany; n != 1 {
		t.Errorf("%d were too many", n)
	}
	b.Close()
	eventually(t, "the second stays", func() bool { return s.Counters().Connections == 1 })
	if !answered(t, dial(t, l, "", 'x')) {
		t.Error("there is room, and one is refused")
	}
}

// A session whose client keeps memory from others is ended, and counted, once; the others stay.
func TestStalledSessionsAreEvicted(t *testing.T) {
	l := tcp(t)
	s := serve(t, l, nil)
	for range 3 {
		if !answered(t, dial(t, l, "", 'x')) {
			t.Fatal("no session")
		}
	}
	eventually(t, "there are too few sessions", func() bool { return s.Counters().Connections == 3 })
	var victim *echo
	s.Each(func(e *echo) {
		if victim == nil {
			victim = e
			e.stalls.Store(true)
		}
	})
	s.evictStalled()
	s.evictStalled()
	if !errors.Is(victim.why, stream.ErrStalled) {
		t.Errorf("it was ended because of %v", victim.why)
	}
	eventually(t, "it stays", func() bool { return s.Counters().Connections == 2 })
	if n := s.Counters().Evicted; n != 1 {
		t.Errorf("%d were evicted", n)
	}
}

func TestLimits(t *testing.T) {
	var l Limits
	if err := l.Validate(32 << 20); err != nil || l.MaxConnections == 0 || l.MemoryLimit == 0 || l.SessionMemory == 0 || l.StallTimeout == 0 || l.LingerTimeout == 0 {
		t.Errorf("the defaults: %v, %+v", err, l)
	}
	for _, l := range []Limits{{MaxConnections: -1}, {MemoryLimit: 8<<20 - 1}, {SessionMemory: 2<<20 - 1}} {
		if err := l.Validate(1 << 20); err == nil {
			t.Errorf("accepted: %+v", l)
		}
	}
	if l := (Limits{MaxConnections: 1, MemoryLimit: 8 << 20, SessionMemory: 2 << 20}); l.Validate(1<<20) != nil {
		t.Error("the least that is enough is refused")
	}
}

// What sessions have done and what those that ended have done add up at any time.
func TestNothingIsCountedTwice(t *testing.T) {
	l := tcp(t)
	s := serve(t, l, nil)
	count := func() (n int64) {
		s.View(func(sessions iter.Seq[*echo]) {
			n = s.past.Load()
			for range sessions {
				n++
			}
		})
		return n
	}
	done := make(chan struct{})
	var clients sync.WaitGroup
	const rounds = 300
	clients.Go(func() {
		defer close(done)
		for range rounds {
			conn := dial(t, l, "", 'x')
			answered(t, conn)
			conn.Close()
		}
	})
	for last := int64(0); ; {
		n := count()
		if n < last {
			t.Fatalf("%d after %d", n, last)
		}
		last = n
		select {
		case <-done:
			clients.Wait()
			eventually(t, "sessions stay", func() bool { return s.Counters().Connections == 0 })
			if n := count(); n != rounds {
				t.Errorf("%d of %d are counted", n, rounds)
			}
			return
		default:
		}
	}
}

// Shutdown ends handshakes at once, tells sessions to stop, and waits for them.
func TestShutdownWaits(t *testing.T) {
	l := tcp(t)
	s := serve(t, l, nil)
	idle, shaking, working := dial(t, l, "", 'x'), dial(t, l, "", 'h'), dial(t, l, "", 'w')
	answered(t, idle)
	answered(t, working)
	eventually(t, "not all are there", func() bool { return s.Counters().Connections == 3 })
	over := make(chan error, 1)
	go func() { over <- s.Shutdown(context.Background()) }()
	for _, conn := range []net.Conn{idle, shaking} {
		if answered(t, conn) {
			t.Error("a connection goes on")
		}
	}
	if s.Context().Err() == nil {
		t.Error("handshakes are not told")
	}
	select {
	case err := <-over:
		t.Fatalf("shutdown did not wait: %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	if _, err := net.Dial("tcp", l.Addr().String()); err == nil {
		t.Error("connections are still accepted")
	}
	s.Each(func(e *echo) {
		if !e.stopped.Load() || e.cut.Load() {
			t.Error("the session was not told to stop, or cut")
		}
		close(e.hold)
	})
	if err := <-over; err != nil {
		t.Error(err)
	}
	if err := s.Serve(context.Background(), tcp(t)); err != nil {
		t.Errorf("serving after the end: %v", err)
	}
}

// Who does not end in time is cut, and still waited for.
func TestShutdownCuts(t *testing.T) {
	l := tcp(t)
	s := serve(t, l, nil)
	conn := dial(t, l, "", 'w')
	answered(t, conn)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	if err := s.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("shutdown: %v", err)
	}
	if s.Counters().Connections != 0 || s.past.Load() != 1 {
		t.Error("shutdown returned before the session")
	}
}

// A session that begins while the server ends is told so; so is a handshake that asks for more time.
func TestLateSession(t *testing.T) {
	a := New[*echo](Config{Protocol: "echo", Logger: slog.New(slog.DiscardHandler), Limits: Limits{MaxConnections: 1}}, nil)
	if err := a.Shutdown(context.Background()); err != nil {
		t.Fatal(err)
	}
	near, far := net.Pipe()
	defer far.Close()
	near.SetReadDeadline(time.Unix(1, 0)) // as Shutdown has
	if err := a.Extend(near, time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	if _, err := near.Read(make([]byte, 1)); !errors.Is(err, context.DeadlineExceeded) && !isTimeout(err) {
		t.Errorf("the deadline is lost: %v", err)
	}
	e := &echo{conn: near, hold: make(chan struct{})}
	a.Enter(near, e)
	if !e.stopped.Load() {
		t.Error("the session was not told")
	}
}

func isTimeout(err error) bool {
	var n net.Error
	return errors.As(err, &n) && n.Timeout()
}

// failing is a listener that has no descriptors at first.
type failing struct {
	net.Listener
	left atomic.Int64
}

func (f *failing) Accept() (net.Conn, error) {
	if f.left.Add(-1) >= 0 {
		return nil, syscall.EMFILE
	}
	return f.Listener.Accept()
}

func TestAcceptGoesOn(t *testing.T) {
	l := &failing{Listener: tcp(t)}
	l.left.Store(2)
	serve(t, l, nil)
	if !answered(t, dial(t, l, "", 'x')) {
		t.Error("nobody is accepted after a failure")
	}
}

// A listener that somebody else closes is an error: nothing is served there any more.
func TestClosedListener(t *testing.T) {
	l := tcp(t)
	a := New[*echo](Config{Protocol: "echo", Logger: slog.New(slog.DiscardHandler), Limits: Limits{MaxConnections: 1}}, func(net.Conn) {})
	l.Close()
	if err := a.Serve(context.Background(), l); !errors.Is(err, net.ErrClosed) {
		t.Errorf("serve: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := a.Serve(ctx, tcp(t)); err != nil {
		t.Errorf("serve after its context has ended: %v", err)
	}
}
