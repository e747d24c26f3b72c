// Package listen takes clients in: what the servers of all frontends need, whatever protocol they
// speak. It accepts connections, refuses those that may not be or are too many, has the memory of sessions, knows those
// that there are, and ends them.
package listen

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"sheepdog/frontends/internal/stream"
)

// Session is a client that is past its handshake. The methods are called with the acceptor's lock
// held, from any goroutine, and more than once: they must not wait.
type Session interface {
	comparable
	// Stop makes the session end when what it has received is answered.
	Stop()
	// End ends it at once, for a reason, and reports whether no other has come first.
	End(why error) bool
	// Stalled tells how many bytes of the Budget the session holds, and whether its client keeps
	// them from others and has not moved since that time.
	Stalled(since time.Time) (held int64, stalled bool)
}

// Config is what an Acceptor needs.
type Config struct {
	Protocol string // as operators call it
	Logger   *slog.Logger
	Limits   // which are valid
}

// Acceptor has the connections of a server, and the memory of their sessions. Its methods may be called from any goroutine.
type Acceptor[S Session] struct {
	cfg   Config
	serve func(net.Conn)
	begin func(net.Conn) S

	budget *stream.Budget

	ctx    context.Context // ends with Shutdown, under mu
	cancel context.CancelFunc

	mu        sync.Mutex
	listeners map[net.Listener]struct{}
	conns     map[net.Conn]S // the zero value during the handshake
	clients   sync.WaitGroup

	accepted, notAllowed, tooMany, evicted atomic.Uint64
	refusedLog, acceptLog                  stream.Quiet
}

// New makes an Acceptor. serve has a connection to itself; when it returns, the connection is
// closed. It calls Enter and Leave when its session begins and ends.
func New[S Session](cfg Config, serve func(net.Conn)) *Acceptor[S] {
	a := &Acceptor[S]{cfg: cfg, serve: serve, listeners: map[net.Listener]struct{}{}, conns: map[net.Conn]S{}}
	a.ctx, a.cancel = context.WithCancel(context.Background())
	a.budget = stream.NewBudget(cfg.MemoryLimit, max(cfg.StallTimeout/4, time.Millisecond), a.evictStalled)
	return a
}

// Budget is the memory of all sessions.
func (a *Acceptor[S]) Budget() *stream.Budget { return a.budget }

// Begin has sessions made as connections are accepted, in the order in which they come, for a protocol without a
// handshake; Session returns them, and Enter is not called. make has the acceptor's lock held: it must not wait. To be called before Serve.
func (a *Acceptor[S]) Begin(make func(net.Conn) S) { a.begin = make }

// Session is the session of a connection that is being served.
func (a *Acceptor[S]) Session(conn net.Conn) S {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.conns[conn]
}

// Context ends when Shutdown begins: it is for handshakes.
func (a *Acceptor[S]) Context() context.Context { return a.ctx }

// Serve accepts connections from l until ctx ends or Shutdown is called, and then closes l and
// returns nil. Sessions outlive it until Shutdown. It may be called for several listeners at once.
func (a *Acceptor[S]) Serve(ctx context.Context, l net.Listener) error {
	a.mu.Lock()
	if a.ctx.Err() != nil {
		a.mu.Unlock()
		l.Close()
		return nil
	}
	a.listeners[l] = struct{}{}
	a.mu.Unlock()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer func() {
		stop()
		l.Close()
		a.mu.Lock()
		delete(a.listeners, l)
		a.mu.Unlock()
	}()
	a.cfg.Logger.Info("serving "+a.cfg.Protocol, "address", l.Addr().String())
	for {
		conn, err := l.Accept()
		switch {
		case err == nil:
			a.accept(conn)
		case ctx.Err() != nil || a.ctx.Err() != nil:
			return nil
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("%s: accept: %w", a.cfg.Protocol, err)
		default:
			// Out of file descriptors, most likely: others may be closed soon.
			a.acceptLog.Warn(a.cfg.Logger, "accept failed", "err", err)
			select {
			case <-time.After(100 * time.Millisecond):
			case <-ctx.Done():
			case <-a.ctx.Done():
			}
		}
	}
}

// accept lets a connection in, or closes it.
func (a *Acceptor[S]) accept(conn net.Conn) {
	a.accepted.Add(1)
	if !a.allowed(conn.RemoteAddr()) {
		a.notAllowed.Add(1)
		a.refusedLog.Warn(a.cfg.Logger, "connection refused: address is not allowed", "peer", PeerName(conn))
		conn.Close()
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case a.ctx.Err() != nil:
		a.cfg.Logger.Debug("connection refused: server is shutting down", "peer", PeerName(conn))
		conn.Close()
		return
	case len(a.conns) >= a.cfg.MaxConnections:
		a.tooMany.Add(1)
		a.refusedLog.Warn(a.cfg.Logger, "connection refused: too many connections", "peer", PeerName(conn), "limit", a.cfg.MaxConnections)
		conn.Close()
		return
	}
	var s S
	if a.begin != nil {
		s = a.begin(conn)
	}
	a.conns[conn] = s
	a.clients.Go(func() {
		a.tune(conn)
		a.serve(conn)
		conn.Close()
		a.mu.Lock()
		delete(a.conns, conn)
		a.mu.Unlock()
	})
}

// allowed applies Config.Allow.
func (a *Acceptor[S]) allowed(from net.Addr) bool {
	tcp, ok := from.(*net.TCPAddr)
	if !ok || len(a.cfg.Allow) == 0 {
		return true
	}
	ip := tcp.AddrPort().Addr().Unmap().WithZone("")
	return slices.ContainsFunc(a.cfg.Allow, func(p netip.Prefix) bool { return p.Contains(ip) })
}

// keepalive finds clients whose machine is gone within about a minute.
var keepalive = net.KeepAliveConfig{Enable: true, Idle: 30 * time.Second, Interval: 10 * time.Second, Count: 3}

// unixSendBuffer is asked of the kernel for a unix socket, in bytes: a long read's answer in one
// piece. It gives no more than net.core.wmem_max.
const unixSendBuffer = 2 << 20

func (a *Acceptor[S]) tune(conn net.Conn) {
	var err error
	switch c := conn.(type) {
	case *net.TCPConn:
		err = c.SetKeepAliveConfig(keepalive)
	case *net.UnixConn:
		// A unix socket holds no more than this buffer, however fast its client reads;
		// TCP's is left alone because the kernel sizes it better.
		err = c.SetWriteBuffer(unixSendBuffer)
	}
	if err != nil {
		a.cfg.Logger.Debug("socket cannot be tuned", "err", err)
	}
}

// PeerName is what a client is called: its address, or "unix".
func PeerName(conn net.Conn) string {
	if conn.RemoteAddr().Network() == "unix" {
		return "unix"
	}
	return conn.RemoteAddr().String()
}

// Enter says that the handshake of an accepted connection is over. If Shutdown has begun the
// session is told to stop.
func (a *Acceptor[S]) Enter(conn net.Conn, s S) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.conns[conn] = s
	if a.ctx.Err() != nil {
		s.Stop()
	}
}

// Leave says that the connection's session is over; final is called when it is no longer among those
// that View shows, and before anybody can see that.
func (a *Acceptor[S]) Leave(conn net.Conn, final func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	var none S
	a.conns[conn] = none
	final()
}

// Extend sets the deadline of a handshake, unless Shutdown has set its own.
func (a *Acceptor[S]) Extend(conn net.Conn, deadline time.Time) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.ctx.Err() != nil {
		return nil
	}
	return conn.SetDeadline(deadline)
}

// View calls fn with the sessions that there are, in no order; none begins or ends meanwhile.
func (a *Acceptor[S]) View(fn func(iter.Seq[S])) {
	a.mu.Lock()
	defer a.mu.Unlock()
	fn(a.sessions)
}

// Each calls fn with every session, as View does.
func (a *Acceptor[S]) Each(fn func(S)) {
	a.View(func(sessions iter.Seq[S]) {
		for s := range sessions {
			fn(s)
		}
	})
}

// sessions goes through those past the handshake. The caller holds mu.
func (a *Acceptor[S]) sessions(yield func(S) bool) {
	var handshake S
	for _, s := range a.conns {
		if s != handshake && !yield(s) {
			return
		}
	}
}

// Evict ends a session because of what its client does, or does not.
func (a *Acceptor[S]) Evict(s S, why error) {
	if s.End(why) {
		a.evicted.Add(1)
	}
}

// evictStalled ends sessions whose clients hold memory that others wait for.
func (a *Acceptor[S]) evictStalled() {
	since := time.Now().Add(-a.cfg.StallTimeout)
	a.Each(func(s S) {
		if held, stalled := s.Stalled(since); stalled {
			a.Evict(s, fmt.Errorf("%w: it holds %d bytes", stream.ErrStalled, held))
		}
	})
}

// Counters is a snapshot of what came in, and what it takes. All but the last four only grow.
type Counters struct {
	Accepted   uint64 // connections accepted
	NotAllowed uint64 // connections closed at once: address not in Config.Allow
	TooMany    uint64 // connections closed at once: Config.MaxConnections
	Evicted    uint64 // sessions ended by Evict, as that of a client that stalls while others wait for memory

	Connections    int // now, handshakes included
	MaxConnections int
	BufferBytes    int64 // of MemoryLimit in use now
	MemoryLimit    int64 // bytes
}

// Counters returns what came in so far, and what it takes now.
func (a *Acceptor[S]) Counters() Counters {
	a.mu.Lock()
	defer a.mu.Unlock()
	return Counters{
		Accepted: a.accepted.Load(), NotAllowed: a.notAllowed.Load(), TooMany: a.tooMany.Load(), Evicted: a.evicted.Load(),
		Connections: len(a.conns), MaxConnections: a.cfg.MaxConnections, BufferBytes: a.budget.InUse(), MemoryLimit: a.cfg.MemoryLimit,
	}
}

// Shutdown stops accepting, stops every session, and returns when all are gone. If ctx ends first,
// the connections are cut; what the sessions still wait for is waited for nevertheless, and ctx's
// error returned.
func (a *Acceptor[S]) Shutdown(ctx context.Context) error {
	a.mu.Lock()
	a.cancel()
	for l := range a.listeners {
		l.Close()
	}
	var handshake S
	for conn, s := range a.conns {
		if s != handshake {
			s.Stop()
		} else {
			// A handshake ends at its next read: there is nothing in flight.
			conn.SetReadDeadline(time.Unix(1, 0))
		}
	}
	a.mu.Unlock()

	gone := make(chan struct{})
	go func() {
		a.clients.Wait()
		close(gone)
	}()
	select {
	case <-gone:
		return nil
	case <-ctx.Done():
	}
	a.mu.Lock()
	for conn, s := range a.conns {
		if s != handshake {
			s.End(stream.ErrOverdue)
		}
		conn.Close()
	}
	a.mu.Unlock()
	<-gone
	return ctx.Err()
}
