package sheepdog

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync/atomic"
	"time"

	"sheepdog/frontends/internal/listen"
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

func (c *Config) validate() error {
	c.Logger = cmp.Or(c.Logger, slog.New(slog.DiscardHandler))
	c.MaxConnections = cmp.Or(c.MaxConnections, 4096)
	c.MemoryLimit = cmp.Or(c.MemoryLimit, 384<<20)
	c.SessionMemory = cmp.Or(c.SessionMemory, 96<<20)
	c.SessionRequests = cmp.Or(c.SessionRequests, 1024)
	c.StallTimeout = cmp.Or(c.StallTimeout, 30*time.Second)
	c.LingerTimeout = cmp.Or(c.LingerTimeout, 10*time.Second)
	switch {
	case c.Volumes == nil:
		return errors.New("sheepdog: no volumes to serve")
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
	cfg     Config
	log     *slog.Logger
	budget  *stream.Budget
	clients *listen.Acceptor[*session]

	locks     locks
	shared    sharedVDIs
	rollbacks announcements
	heirs     announcements

	lastID  atomic.Uint64
	past    counters // of sessions that ended
	evicted atomic.Uint64

	failureLog, tooLargeLog stream.Quiet
}

// New makes a Server. It serves nothing before Serve.
func New(cfg Config) (*Server, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	s := &Server{cfg: cfg, log: cfg.Logger}
	var err error
	s.clients, err = listen.New[*session](listen.Config{Protocol: "the native protocol", Logger: cfg.Logger, Allow: cfg.Allow, MaxConnections: cfg.MaxConnections}, s.serve)
	if err != nil {
		return nil, err
	}
	s.clients.Begin(s.begin)
	s.budget = stream.NewBudget(cfg.MemoryLimit, max(cfg.StallTimeout/4, time.Millisecond), s.evictStalled)
	return s, nil
}

// Serve accepts connections from l until ctx ends or Shutdown is called, and then
// closes l and returns nil. Sessions outlive it until Shutdown. It may be called for
// several listeners at once.
func (s *Server) Serve(ctx context.Context, l net.Listener) error { return s.clients.Serve(ctx, l) }

// begin makes a client's session as it comes: who came first matters (deletesSnapshot).
func (s *Server) begin(conn net.Conn) *session {
	c := newSession(s, conn)
	c.info = SessionInfo{ID: s.lastID.Add(1), Peer: listen.PeerName(conn), Listener: conn.LocalAddr().String(), Started: time.Now()}
	s.locks.connected(c.host)
	return c
}

// serve serves a client.
func (s *Server) serve(conn net.Conn) {
	c := s.clients.Session(conn)
	c.log.Debug("session began", "session", c.info.ID)
	err := c.run()
	conn.Close()
	s.locks.disconnected(c.host)
	s.clients.Leave(conn, func() { s.past.add(c.stats) })
	c.log.Debug("session ended", "session", c.info.ID, "export", c.info.Export, "reason", err)
}

// hostOf is who a connection comes from, whatever the port.
func hostOf(conn net.Conn) string {
	if tcp, ok := conn.RemoteAddr().(*net.TCPAddr); ok {
		return tcp.AddrPort().Addr().Unmap().String()
	}
	return conn.RemoteAddr().Network()
}

// Shutdown stops accepting, lets every session answer what it has carried out, and returns when
// all are gone; what was not begun the clients send again to who comes next. If ctx ends
// first, the connections are closed; what the volumes still work on is waited for
// nevertheless, and ctx's error returned.
func (s *Server) Shutdown(ctx context.Context) error { return s.clients.Shutdown(ctx) }

// evictStalled ends sessions whose clients hold memory that others wait for.
func (s *Server) evictStalled() {
	since := time.Now().Add(-s.cfg.StallTimeout)
	s.clients.Each(func(c *session) {
		if c.stream.Stalled(since) {
			s.evicted.Add(1)
			c.log.Warn("session is ended", "reason", errStalled, "bytes", c.stream.Held())
			c.stream.Cut()
		}
	})
}
