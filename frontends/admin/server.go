package admin

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"sheepdog/frontends/admin/api"
)

// Limits of HTTP itself.
const (
	headerTimeout = 10 * time.Second
	idleTimeout   = 2 * time.Minute
	maxHeader     = 64 << 10
	maxJSON       = 1 << 20          // bytes of a JSON body
	drainTimeout  = 10 * time.Second // for calls under way when the server stops
)

// Server serves the API. Its methods may be called from any goroutine.
type Server struct {
	cfg       Config
	log       *slog.Logger
	started   time.Time
	transfers chan struct{} // holds a token for each transfer under way
	metrics   *metrics
	openapi   []byte

	scrub     scrubbing
	alterings alterings // for other nodes

	stopOnce sync.Once
	stopping chan struct{} // closed when transfers are to end
}

// New makes a Server. It serves nothing before Serve.
func New(cfg Config) (*Server, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	s := &Server{
		cfg: cfg, log: cfg.Logger, started: cfg.Now(), transfers: make(chan struct{}, cfg.MaxTransfers), stopping: make(chan struct{}),
	}
	var err error
	if s.openapi, err = describeAPI(cfg.Version); err != nil {
		return nil, fmt.Errorf("admin: describe the API: %w", err)
	}
	s.metrics = newMetrics(s)
	return s, nil
}

// Serve serves the connections that l accepts, until ctx ends; then transfers are cut
// off, other calls get some time to finish, and it returns nil. It closes l. It refuses to
// serve beyond loopback whoever comes along (see Config.Insecure).
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	local := isLocal(l.Addr())
	if err := s.mayListen(l.Addr(), local); err != nil {
		return errors.Join(err, l.Close())
	}
	h := &http.Server{
		Handler:           s.handler(local),
		TLSConfig:         s.cfg.TLS,
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
	served := make(chan error, 1)
	go func() {
		limited := limitConnections(l, s.cfg.MaxConnections)
		if s.cfg.TLS != nil {
			served <- h.ServeTLS(limited, "", "")
			return
		}
		served <- h.Serve(limited)
	}()
	select {
	case err := <-served:
		return fmt.Errorf("serve admin API on %s: %w", l.Addr(), err)
	case <-ctx.Done():
	}
	s.stopOnce.Do(func() { close(s.stopping) })
	drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTimeout)
	defer cancel()
	if err := h.Shutdown(drain); err != nil {
		s.log.Warn("admin calls were cut off", "listener", l.Addr().String(), "error", err)
		h.Close()
	}
	<-served
	return nil
}

// Close ends what goes on without a client, and waits for that. It comes after Serve.
func (s *Server) Close() error {
	s.stopOnce.Do(func() { close(s.stopping) })
	s.scrub.wait.Wait()
	s.alterings.wait.Wait()
	return nil
}

// isLocal reports whether only this machine can reach an address.
func isLocal(a net.Addr) bool {
	switch a := a.(type) {
	case *net.TCPAddr:
		return a.IP.IsLoopback()
	case *net.UnixAddr:
		return true
	}
	return false
}

func (s *Server) mayListen(a net.Addr, local bool) error {
	if local || s.cfg.Insecure || s.cfg.Token != "" || s.demandsCertificate() {
		if !local && s.cfg.TLS == nil {
			s.log.Warn("the admin API is reachable from other machines without TLS", "listener", a.String())
		}
		return nil
	}
	return fmt.Errorf("the admin API would be open to everybody who reaches %s: set a token, demand client certificates, or listen on loopback", a)
}

// handler is what answers the requests of one listener.
func (s *Server) handler(local bool) http.Handler {
	mux := http.NewServeMux()
	for _, r := range allRoutes() {
		mux.Handle(r.method+" "+r.path, s.route(&r))
	}
	mux.Handle("/", s.page(mux))
	return s.guard(mux, local)
}

// transfer takes a place among the transfers of volume content. The context ends when the
// server stops; release gives the place back.
func (s *Server) transfer(ctx context.Context) (context.Context, func(), error) {
	select {
	case <-s.stopping:
		return nil, nil, refuse(api.KindClosed, "the node is stopping")
	default:
	}
	select {
	case s.transfers <- struct{}{}:
	default:
		return nil, nil, refuse(api.KindOverloaded, "there are %d transfers already, which is the limit", s.cfg.MaxTransfers)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	ended := make(chan struct{})
	go func() {
		select {
		case <-s.stopping:
			cancel(refuse(api.KindClosed, "the node is stopping"))
		case <-ended:
		}
	}()
	return ctx, func() {
		close(ended)
		cancel(nil)
		<-s.transfers
	}, nil
}
