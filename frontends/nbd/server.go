package nbd

import (
	"context"
	"crypto/tls"
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
	"sheepdog/frontends/nbd/internal/wire"
)

// MaxPayload is the longest payload of a request or a reply, in bytes: what the
// specification asks of every server, and what NBD_INFO_BLOCK_SIZE announces.
const MaxPayload = wire.DefaultMaxPayload

// Config is what a Server needs. Zero values stand for the defaults.
type Config struct {
	// Volumes is what is exported. Needed.
	Volumes Volumes
	// Logger; default: none.
	Logger *slog.Logger

	// TLS makes NBD_OPT_STARTTLS available; TLS.ClientAuth says whether clients show
	// certificates. TLSRequired refuses everything to clients that do not use it.
	TLS         *tls.Config
	TLSRequired bool
	// Allow lists who may connect over TCP; empty: everybody. Who may open a unix
	// socket is the file system's matter.
	Allow []netip.Prefix

	// MaxConnections bounds connections, handshakes included. Default 4096.
	MaxConnections int
	// MemoryLimit bounds the buffers of all sessions together, beside 32 KiB that each
	// always may have. At least 8 * MaxPayload; default 1 GiB. In bytes.
	MemoryLimit int64
	// SessionMemory bounds the buffers of one session. At least 2 * MaxPayload;
	// default 96 MiB. In bytes.
	SessionMemory int64
	// SessionRequests bounds the requests of one session in flight: no more are read
	// from a client until it has taken replies. Default 1024.
	SessionRequests int
	// HandshakeTimeout is for the whole handshake, and begins anew with each export that
	// the client is told about: to list many may take a slow client minutes. Default 60 s.
	HandshakeTimeout time.Duration
	// StallTimeout is how long a client may leave replies unread, or a payload
	// unfinished, while other sessions wait for memory. Default 30 s.
	StallTimeout time.Duration
	// LingerTimeout is how long replies are still sent to a client that disconnects.
	// Default 10 s.
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
	orDefault(&c.MemoryLimit, 1<<30)
	orDefault(&c.SessionMemory, 96<<20)
	orDefault(&c.SessionRequests, 1024)
	orDefault(&c.HandshakeTimeout, time.Minute)
	orDefault(&c.StallTimeout, 30*time.Second)
	orDefault(&c.LingerTimeout, 10*time.Second)
	switch {
	case c.Volumes == nil:
		return errors.New("nbd: no volumes to export")
	case c.TLSRequired && c.TLS == nil:
		return errors.New("nbd: TLS is required but there is no certificate")
	case c.MaxConnections < 1:
		return fmt.Errorf("nbd: at most %d connections: must be at least 1", c.MaxConnections)
	case c.MemoryLimit < 8*MaxPayload:
		return fmt.Errorf("nbd: memory limit of %d bytes: must be at least %d", c.MemoryLimit, 8*MaxPayload)
	case c.SessionMemory < 2*MaxPayload:
		return fmt.Errorf("nbd: memory limit of %d bytes per session: must be at least %d", c.SessionMemory, 2*MaxPayload)
	case c.SessionRequests < 1:
		return fmt.Errorf("nbd: at most %d requests in flight: must be at least 1", c.SessionRequests)
	}
	return nil
}

// Server serves volumes to NBD clients. Its methods may be called from any goroutine.
type Server struct {
	cfg    Config
	log    *slog.Logger
	budget *stream.Budget

	ctx    context.Context // of handshakes: ends with Shutdown
	cancel context.CancelFunc

	mu        sync.Mutex
	listeners map[net.Listener]struct{}
	conns     map[net.Conn]*session // nil during the handshake
	closing   bool
	clients   sync.WaitGroup

	lastID   atomic.Uint64
	past     counters // of sessions that ended
	accepted atomic.Uint64
	refused  atomic.Uint64
	tooMany  atomic.Uint64
	failed   atomic.Uint64
	evicted  atomic.Uint64

	refusedLog, failureLog, acceptLog stream.Quiet
}

// New makes a Server. It serves nothing before Serve.
func New(cfg Config) (*Server, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	s := &Server{cfg: cfg, log: cfg.Logger, listeners: map[net.Listener]struct{}{}, conns: map[net.Conn]*session{}}
	s.ctx, s.cancel = context.WithCancel(context.Background())
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
	s.log.Info("serving NBD", "address", l.Addr().String())
	for {
		conn, err := l.Accept()
		switch {
		case err == nil:
			s.accept(conn)
		case ctx.Err() != nil || s.isClosing():
			return nil
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("nbd: accept: %w", err)
		default:
			// Out of file descriptors, most likely: others may be closed soon.
			s.acceptLog.Warn(s.log, "accept failed", "err", err)
			select {
			case <-time.After(100 * time.Millisecond):
			case <-ctx.Done():
			case <-s.ctx.Done():
			}
		}
	}
}

// accept lets a connection in, or closes it.
func (s *Server) accept(conn net.Conn) {
	s.accepted.Add(1)
	if !s.allowed(conn.RemoteAddr()) {
		s.refused.Add(1)
		s.refusedLog.Warn(s.log, "connection refused: address is not allowed", "peer", conn.RemoteAddr().String())
		conn.Close()
		return
	}
	s.mu.Lock()
	switch {
	case s.closing:
		s.mu.Unlock()
		conn.Close()
		return
	case len(s.conns) >= s.cfg.MaxConnections:
		s.mu.Unlock()
		s.tooMany.Add(1)
		s.refusedLog.Warn(s.log, "connection refused: too many connections", "peer", conn.RemoteAddr().String(), "limit", s.cfg.MaxConnections)
		conn.Close()
		return
	}
	s.conns[conn] = nil
	s.clients.Add(1)
	s.mu.Unlock()
	go func() {
		defer s.clients.Done()
		s.serveConn(conn)
		conn.Close()
		s.mu.Lock()
		delete(s.conns, conn)
		s.mu.Unlock()
	}()
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

// unixSendBuffer is asked of the kernel for a unix socket, in bytes: a long read's
// reply in one piece. It gives no more than net.core.wmem_max.
const unixSendBuffer = 2 << 20

// serveConn takes a client through the handshake and serves it.
func (s *Server) serveConn(conn net.Conn) {
	if tcp, ok := conn.(*net.TCPConn); ok {
		if err := tcp.SetKeepAliveConfig(keepalive); err != nil {
			s.log.Debug("keepalive cannot be set", "err", err)
		}
	}
	if unix, ok := conn.(*net.UnixConn); ok {
		// A unix socket holds no more than this buffer, however fast its client reads;
		// TCP's is left alone because the kernel sizes it better.
		if err := unix.SetWriteBuffer(unixSendBuffer); err != nil {
			s.log.Debug("send buffer cannot be set", "err", err)
		}
	}
	n := &negotiation{server: s, conn: conn, log: s.log.With("peer", peerName(conn))}
	if err := n.run(s.ctx); err != nil {
		if !errors.Is(err, errAborted) {
			s.failed.Add(1)
		}
		n.log.Debug("handshake ended", "reason", err)
		return
	}
	c := newSession(s, n.conn, new(counters), n)
	c.info = n.describe(s.lastID.Add(1))
	s.mu.Lock()
	s.conns[conn] = c
	closing := s.closing
	s.mu.Unlock()
	if closing {
		c.stop()
	}
	c.log.Info("session began", "session", c.info.ID, "read_only", c.readOnly, "tls", c.info.TLS, "headers", c.info.Headers)
	err := c.run()
	s.mu.Lock()
	s.conns[conn] = nil
	s.past.add(c.stats)
	s.mu.Unlock()
	c.log.Info("session ended", "session", c.info.ID, "reason", reason(err))
}

func reason(err error) string {
	if err == nil {
		return "client disconnected"
	}
	return err.Error()
}

func peerName(conn net.Conn) string {
	if conn.RemoteAddr().Network() == "unix" {
		return "unix"
	}
	return conn.RemoteAddr().String()
}

func (s *Server) isClosing() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closing
}

// Shutdown stops accepting, lets every session answer what it has received, and
// returns when all are gone. If ctx ends first, the connections are closed; what the
// volumes still work on is waited for nevertheless, and ctx's error returned.
func (s *Server) Shutdown(ctx context.Context) error {
	s.mu.Lock()
	s.closing = true
	for l := range s.listeners {
		l.Close()
	}
	for conn, c := range s.conns {
		if c != nil {
			c.stop()
		} else {
			// A handshake ends at its next read: there is nothing in flight.
			conn.SetReadDeadline(time.Unix(1, 0))
		}
	}
	s.mu.Unlock()
	s.cancel()

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
	for conn, c := range s.conns {
		if c != nil {
			c.cancel()
		}
		conn.Close()
	}
	s.mu.Unlock()
	<-gone
	return ctx.Err()
}

// evictStalled ends sessions whose clients hold memory that others wait for.
func (s *Server) evictStalled() {
	since := time.Now().Add(-s.cfg.StallTimeout)
	s.mu.Lock()
	defer s.mu.Unlock()
	for conn, c := range s.conns {
		if c != nil && c.stream.Stalled(since) {
			s.evicted.Add(1)
			c.log.Warn("session is ended", "reason", errStalled, "bytes", c.stream.Held())
			conn.Close()
		}
	}
}

// Sessions describes the clients in the transmission phase, by ID.
func (s *Server) Sessions() []SessionInfo {
	s.mu.Lock()
	list := make([]SessionInfo, 0, len(s.conns))
	for _, c := range s.conns {
		if c != nil {
			list = append(list, c.snapshot())
		}
	}
	s.mu.Unlock()
	slices.SortFunc(list, func(a, b SessionInfo) int { return int(int64(a.ID) - int64(b.ID)) })
	return list
}

// Counters returns what the server did so far.
func (s *Server) Counters() Counters {
	var sum counters
	c := Counters{
		Accepted: s.accepted.Load(), NotAllowed: s.refused.Load(), TooMany: s.tooMany.Load(), Failed: s.failed.Load(), Evicted: s.evicted.Load(),
		BufferBytes: s.budget.InUse(), MemoryLimit: s.cfg.MemoryLimit, MaxConnections: s.cfg.MaxConnections,
	}
	s.mu.Lock()
	sum.add(&s.past)
	c.Connections = len(s.conns)
	for _, n := range s.conns {
		if n != nil {
			sum.add(n.stats)
			c.Sessions++
			c.InFlight += n.stream.InFlight()
		}
	}
	s.mu.Unlock()
	c.Requests, c.Errors = sum.byCommand(), sum.errors.Load()
	c.ReadBytes, c.WrittenBytes = sum.readBytes.Load(), sum.sentBytes.Load()
	return c
}

// logFailure tells the operator of requests that failed for a reason that is ours.
func (s *Server) logFailure(c *session, o *op, errno wire.Errno, err error) {
	if errno == wire.NBD_EIO {
		s.failureLog.Warn(c.log, "request failed", "command", commands[o.wire.Type].name, "offset", o.wire.Offset, "length", o.wire.Length, "err", err)
	}
}
