package nbd

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"net"
	"slices"
	"sync/atomic"
	"time"

	"sheepdog/frontends/internal/listen"
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

	listen.Limits
	// SessionRequests bounds the requests of one session in flight: no more are read
	// from a client until it has taken replies. Default 1024.
	SessionRequests int
	// HandshakeTimeout is for the whole handshake, and begins anew with each export that
	// the client is told about: to list many may take a slow client minutes. Default 60 s.
	HandshakeTimeout time.Duration
}

func (c *Config) validate() error {
	c.Logger = cmp.Or(c.Logger, slog.New(slog.DiscardHandler))
	c.SessionRequests = cmp.Or(c.SessionRequests, 1024)
	c.HandshakeTimeout = cmp.Or(c.HandshakeTimeout, time.Minute)
	switch {
	case c.Volumes == nil:
		return errors.New("nbd: no volumes to export")
	case c.TLSRequired && c.TLS == nil:
		return errors.New("nbd: TLS is required but there is no certificate")
	case c.SessionRequests < 1:
		return fmt.Errorf("nbd: at most %d requests in flight: must be at least 1", c.SessionRequests)
	}
	if err := c.Limits.Validate(MaxPayload); err != nil {
		return fmt.Errorf("nbd: %w", err)
	}
	return nil
}

// Server serves volumes to NBD clients. Its methods may be called from any goroutine.
type Server struct {
	cfg     Config
	log     *slog.Logger
	clients *listen.Acceptor[*session]

	lastID atomic.Uint64
	past   counters // of sessions that ended
	failed atomic.Uint64

	failureLog stream.Quiet
}

// New makes a Server. It serves nothing before Serve.
func New(cfg Config) (*Server, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	s := &Server{cfg: cfg, log: cfg.Logger}
	s.clients = listen.New[*session](listen.Config{Protocol: "NBD", Logger: cfg.Logger, Limits: cfg.Limits}, s.serve)
	return s, nil
}

// Serve accepts connections from l until ctx ends or Shutdown is called, and then
// closes l and returns nil. Sessions outlive it until Shutdown. It may be called for
// several listeners at once.
func (s *Server) Serve(ctx context.Context, l net.Listener) error { return s.clients.Serve(ctx, l) }

// serve takes a client through the handshake and serves it.
func (s *Server) serve(conn net.Conn) {
	n := &negotiation{server: s, raw: conn, conn: conn, log: s.log.With("peer", listen.PeerName(conn))}
	if err := n.run(s.clients.Context()); err != nil {
		if !errors.Is(err, errAborted) {
			s.failed.Add(1)
		}
		n.log.Debug("handshake ended", "reason", err)
		return
	}
	c := newSession(s, n)
	c.info = n.describe(s.lastID.Add(1))
	s.clients.Enter(conn, c)
	c.log.Info("session began", "session", c.info.ID, "read_only", c.readOnly, "tls", c.info.TLS, "headers", c.info.Headers)
	err := c.run()
	s.clients.Leave(conn, func() { s.past.add(c.stats) })
	c.log.Log(context.Background(), max(slog.LevelInfo, stream.EndLevel(err)), "session ended", "session", c.info.ID, "reason", reason(err))
}

func reason(err error) string {
	if err == nil {
		return "client disconnected"
	}
	return err.Error()
}

// Shutdown stops accepting, lets every session answer what it has received, and
// returns when all are gone. If ctx ends first, the connections are closed; what the
// volumes still work on is waited for nevertheless, and ctx's error returned.
func (s *Server) Shutdown(ctx context.Context) error { return s.clients.Shutdown(ctx) }

// Sessions describes the clients in the transmission phase, by ID.
func (s *Server) Sessions() []SessionInfo {
	var list []SessionInfo
	s.clients.Each(func(c *session) { list = append(list, c.snapshot()) })
	slices.SortFunc(list, func(a, b SessionInfo) int { return cmp.Compare(a.ID, b.ID) })
	return list
}

// Counters returns what the server did so far.
func (s *Server) Counters() Counters {
	var sum counters
	c := Counters{Counters: s.clients.Counters(), Failed: s.failed.Load()}
	s.clients.View(func(sessions iter.Seq[*session]) {
		sum.add(&s.past)
		for n := range sessions {
			sum.add(n.stats)
			c.Sessions++
			c.InFlight += n.stream.InFlight()
		}
	})
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
