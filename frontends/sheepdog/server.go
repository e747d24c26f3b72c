package sheepdog

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync/atomic"
	"time"

	"sheepdog/frontends/internal/listen"
	"sheepdog/frontends/internal/stream"
	"sheepdog/storage/object"
)

// MaxPayload is the longest payload of a request or a response, in bytes.
const MaxPayload = 32 << 20

// Config is what a Server needs. Zero values stand for the defaults.
type Config struct {
	// Volumes is what is served. Needed.
	Volumes Volumes
	// Logger; default: none.
	Logger *slog.Logger

	// Limits.Allow is all the protection that there is: the protocol has none.
	listen.Limits
	// SessionRequests bounds the requests of one session in flight: no more are read from a
	// client until it has taken responses. Default 1024.
	SessionRequests int
}

func (c *Config) validate() error {
	c.Logger = cmp.Or(c.Logger, slog.New(slog.DiscardHandler))
	c.SessionRequests = cmp.Or(c.SessionRequests, 1024)
	switch {
	case c.Volumes == nil:
		return errors.New("sheepdog: no volumes to serve")
	case c.SessionRequests < 1:
		return fmt.Errorf("sheepdog: at most %d requests in flight: must be at least 1", c.SessionRequests)
	}
	if err := c.Limits.Validate(MaxPayload); err != nil {
		return fmt.Errorf("sheepdog: %w", err)
	}
	return nil
}

// Server serves volumes to native clients. Its methods may be called from any goroutine.
type Server struct {
	cfg     Config
	log     *slog.Logger
	clients *listen.Acceptor[*session]

	locks     locks
	shared    sharedVDIs
	rollbacks announcements
	heirs     announcements

	lastID atomic.Uint64
	past   counters // of sessions that ended

	failureLog, tooLargeLog stream.Quiet
}

// New makes a Server. It serves nothing before Serve.
func New(cfg Config) (*Server, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	s := &Server{cfg: cfg, log: cfg.Logger}
	s.clients = listen.New[*session](listen.Config{Protocol: "the native protocol", Logger: cfg.Logger, Limits: cfg.Limits}, s.serve)
	s.clients.Begin(s.begin)
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
	// Clients come and go for each question they have: only what is not as it should be is worth more than Debug.
	c.log.Log(context.Background(), stream.EndLevel(err), "session ended", "session", c.info.ID, "export", c.info.Export, "reason", reason(err))
}

func reason(err error) string {
	if errors.Is(err, io.EOF) {
		return "client disconnected"
	}
	return err.Error()
}

// HasOpen reports whether a client may have a working VDI open through this server: who has opened it, or may be a client of before this
// server was started. Those whose requests use it now are known to the volumes. It answers at once, from any goroutine.
func (s *Server) HasOpen(vid object.VID) bool {
	h, err := s.cfg.Volumes.HeaderOf(vid)
	return err == nil && !h.Snapshot && (s.locks.count(h.Name) > 0 || s.idles())
}

// idles reports whether there is a connection on which nothing has come for a while since it was made, of a host that has opened nothing. A
// client that has nothing to do makes one when it has lost the one before, as by a restart of this server, and says of what only when it has.
func (s *Server) idles() (found bool) {
	s.clients.Each(func(c *session) {
		found = found || !c.used.Load() && time.Since(c.info.Started) > lockLinger && !s.locks.any(c.host)
	})
	return found
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
