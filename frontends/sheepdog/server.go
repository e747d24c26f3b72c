package sheepdog

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"sheepdog/frontends/internal/stream"
)

// MaxPayload is the longest payload of a request or a response, in bytes.
const MaxPayload = 32 << 20

// Config is what a Server needs. Zero values stand for the defaults.
type Config struct {
	// Volumes is what is served. Needed.
	Volumes Volumes
	// Logger; default: none.
	Logger *slog.Logger

	// Allow lists who may connect over TCP; empty: everybody. Who may open a unix
	// socket is the file system's matter. The protocol has no other protection.
	Allow []netip.Prefix

	// MaxConnections bounds connections. Default 4096.
	MaxConnections int
	// MemoryLimit bounds the buffers of all sessions together, beside 32 KiB that each
	// always may have. At least 8 * MaxPayload; default 384 MiB. In bytes.
	MemoryLimit int64
	// SessionMemory bounds the buffers of one session. At least 2 * MaxPayload; default 96 MiB. In bytes.
	SessionMemory int64
	// SessionRequests bounds the requests of one session in flight: no more are read from a
	// client until it has taken responses. Default 1024.
	SessionRequests int
	// StallTimeout is how long a client may leave responses unread, or a payload unfinished,
	// while other sessions wait for memory. Default 30 s.
	StallTimeout time.Duration
	// LingerTimeout is how long responses are still sent to a client that disconnects. Default 10 s.
	LingerTimeout time.Duration
}

func orDefault[T comparable](v *T, d T) {
	var zero T
	if *v == zero {
		*v = d
	}
}

func (c *Config) validate() error {
	orDefault(&c.Logger, slog.New(slog.DiscardHandler))
	orDefault(&c.MaxConnections, 4096)
	orDefault(&c.MemoryLimit, 384<<20)
	orDefault(&c.SessionMemory, 96<<20)
	orDefault(&c.SessionRequests, 1024)
	orDefault(&c.StallTimeout, 30*time.Second)
	orDefault(&c.LingerTimeout, 10*time.Second)
	switch {
	case c.Volumes == nil:
		return errors.New("sheepdog: no volumes to serve")
	case c.MaxConnections < 1:
		return fmt.Errorf("sheepdog: at most %d connections: must be at least 1", c.MaxConnections)
	case c.MemoryLimit < 8*MaxPayload:
		return fmt.Errorf("sheepdog: memory limit of %d bytes: must be at least %d", c.MemoryLimit, 8*MaxPayload)
	case c.SessionMemory < 2*MaxPayload:
		return fmt.Errorf("sheepdog: memory limit of %d bytes per session: must be at least %d", c.SessionMemory, 2*MaxPayload)
	case c.SessionRequests < 1:
		return fmt.Errorf("sheepdog: at most %d requests in flight: must be at least 1", c.SessionRequests)
	}
	return nil
}

// Server serves volumes to native clients. Its methods may be called from any goroutine.
type Server struct {
	cfg    Config
	log    *slog.Logger
	budget *stream.Budget

	locks     locks
	shared    sharedVDIs
	rollbacks rollbacks

	mu        sync.Mutex
	listeners map[net.Listener]struct{}
	conns     map[net.Conn]*session
	closing   bool
	stopped   chan struct{} // closed by Shutdown
	clients   sync.WaitGroup

	lastID   atomic.Uint64
	past     counters // of sessions that ended
	accepted atomic.Uint64
	refused  atomic.Uint64
	tooMany  atomic.Uint64
	evicted  atomic.Uint64

	refusedLog, failureLog, acceptLog, tooLargeLog quiet
}

// New makes a Server. It serves nothing before Serve.
func New(cfg Config) (*Server, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	s := &Server{cfg: cfg, log: cfg.Logger, listeners: map[net.Listener]struct{}{}, conns: map[net.Conn]*session{}, stopped: make(chan struct{})}
	s.budget = stream.NewBudget(cfg.MemoryLimit, max(cfg.StallTimeout/4, time.Millisecond), s.evictStalled)
	return s, nil
}

// Serve accepts connections from l until ctx ends or Shutdown is called, and then
// closes l and returns nil. Sessions outlive it until Shutdown. It may be called for
// several listeners at once.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	s.mu.Lock()
	if s.closing {
		s.mu.Unlock()
		l.Close()
		return nil
	}
	s.listeners[l] = struct{}{}
	s.mu.Unlock()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer func() {
		stop()
		l.Close()
		s.mu.Lock()
		delete(s.listeners, l)
		s.mu.Unlock()
	}()
	s.log.Info("serving the native protocol", "address", l.Addr().String())
	for {
		conn, err := l.Accept()
		switch {
		case err == nil:
			s.accept(conn)
		case ctx.Err() != nil || s.isClosing():
			return nil
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("sheepdog: accept: %w", err)
		default:
			// Out of file descriptors, most likely: others may be closed soon.
			s.acceptLog.warn(s.log, "accept failed", "err", err)
			select {
			case <-time.After(100 * time.Millisecond):
			case <-ctx.Done():
			case <-s.stopped:
			}
		}
	}
}

// accept lets a connection in, or closes it.
func (s *Server) accept(conn net.Conn) {
	s.accepted.Add(1)
	if !s.allowed(conn.RemoteAddr()) {
		s.refused.Add(1)
		s.refusedLog.warn(s.log, "connection refused: address is not allowed", "peer", conn.RemoteAddr().String())
		conn.Close()
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.closing:
		conn.Close()
		return
	case len(s.conns) >= s.cfg.MaxConnections:
		s.tooMany.Add(1)
		s.refusedLog.warn(s.log, "connection refused: too many connections", "peer", conn.RemoteAddr().String(), "limit", s.cfg.MaxConnections)
		conn.Close()
		return
	}
	s.tune(conn)
	c := newSession(s, conn)
	c.info = SessionInfo{ID: s.lastID.Add(1), Peer: peerName(conn), Listener: conn.LocalAddr().String(), Started: time.Now()}
	s.conns[conn] = c
	s.locks.connected(c.host)
	s.clients.Go(func() { s.serve(c) })
}

func (s *Server) serve(c *session) {
	c.log.Debug("session began", "session", c.info.ID)
	err := c.run()
	c.conn.Close()
	s.locks.disconnected(c.host)
	s.mu.Lock()
	delete(s.conns, c.conn)
	s.past.add(c.stats)
	s.mu.Unlock()
	c.log.Debug("session ended", "session", c.info.ID, "export", c.info.Export, "reason", err)
}

// allowed applies Config.Allow.
func (s *Server) allowed(a net.Addr) bool {
	tcp, ok := a.(*net.TCPAddr)
	if !ok || len(s.cfg.Allow) == 0 {
		return true
	}
	ip := tcp.AddrPort().Addr().Unmap().WithZone("")
	return slices.ContainsFunc(s.cfg.Allow, func(p netip.Prefix) bool { return p.Contains(ip) })
}

// keepalive finds clients whose machine is gone within about a minute.
var keepalive = net.KeepAliveConfig{Enable: true, Idle: 30 * time.Second, Interval: 10 * time.Second, Count: 3}

// unixSendBuffer is asked of the kernel for a unix socket, in bytes. It gives no more than
// net.core.wmem_max.
const unixSendBuffer = 2 << 20

func (s *Server) tune(conn net.Conn) {
	var err error
	switch c := conn.(type) {
	case *net.TCPConn:
		err = c.SetKeepAliveConfig(keepalive)
	case *net.UnixConn:
		// It holds no more than this buffer, however fast its client reads.
		err = c.SetWriteBuffer(unixSendBuffer)
	}
	if err != nil {
		s.log.Debug("socket cannot be tuned", "err", err)
	}
}

func peerName(conn net.Conn) string {
	if conn.RemoteAddr().Network() == "unix" {
		return "unix"
	}
	return conn.RemoteAddr().String()
}

// hostOf is who a connection comes from, whatever the port.
func hostOf(conn net.Conn) string {
	if tcp, ok := conn.RemoteAddr().(*net.TCPAddr); ok {
		return tcp.AddrPort().Addr().Unmap().String()
	}
	return conn.RemoteAddr().Network()
}

func (s *Server) isClosing() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closing
}

// Shutdown stops accepting, lets every session answer what it has carried out, and returns when
// all are gone; what was not begun the clients send again to who comes next. If ctx ends
// first, the connections are closed; what the volumes still work on is waited for
// nevertheless, and ctx's error returned.
func (s *Server) Shutdown(ctx context.Context) error {
	s.mu.Lock()
	if !s.closing {
		s.closing = true
		close(s.stopped)
	}
	for l := range s.listeners {
		l.Close()
	}
	for _, c := range s.conns {
		c.stream.Stop()
	}
	s.mu.Unlock()
	gone := make(chan struct{})
	go func() {
		s.clients.Wait()
		close(gone)
	}()
	select {
	case <-gone:
		return nil
	case <-ctx.Done():
	}
	s.mu.Lock()
	for _, c := range s.conns {
		c.cancel()
		c.stream.Cut()
	}
	s.mu.Unlock()
	<-gone
	return ctx.Err()
}

// evictStalled ends sessions whose clients hold memory that others wait for.
func (s *Server) evictStalled() {
	limit := time.Now().Add(-s.cfg.StallTimeout)
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.conns {
		if c.stream.Stalled(limit) {
			s.evicted.Add(1)
			c.log.Warn("session is ended", "reason", errStalled, "bytes", c.stream.Held())
			c.stream.Cut()
		}
	}
}

// quiet passes on at most one message a second, and says how many it left out.
type quiet struct {
	last    atomic.Int64 // UnixNano
	skipped atomic.Int64
}

func (q *quiet) warn(log *slog.Logger, msg string, args ...any) {
	now, last := time.Now().UnixNano(), q.last.Load()
	if now-last < int64(time.Second) || !q.last.CompareAndSwap(last, now) {
		q.skipped.Add(1)
		return
	}
	log.Warn(msg, append(args, "not_logged", q.skipped.Swap(0))...)
}
