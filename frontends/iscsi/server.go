package iscsi

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"sheepdog/frontends/internal/listen"
	"sheepdog/frontends/internal/stream"
	"sheepdog/frontends/iscsi/internal/scsi"
)

// Chap has the names and secrets of CHAP. Initiators must prove themselves if Secret is set; the
// target proves itself to those that ask if OurSecret is.
type Chap struct {
	User, Secret       string
	OurUser, OurSecret string
}

// Config is what a Server needs. Zero values stand for the defaults.
type Config struct {
	// Volumes is what is served. Needed.
	Volumes Volumes
	// Targets is what operators say of targets. Default: nothing.
	Targets Targets
	// Secrets tells name and secret of a credential that Targets name. Default: there are none.
	Secrets func(credential string) (user, secret string, err error)
	// Logger; default: none.
	Logger *slog.Logger
	// Prefix begins the names of targets; PREFIX:NAME is the target of the VDI NAME. Needed.
	Prefix string
	// Node is this gateway's name.
	Node string
	// Portals are told to initiators beside the one that they found, as ADDRESS:PORT,GROUP. Default: none.
	Portals func() []string

	// Chap is asked of all initiators.
	Chap Chap
	// Initiators lists the iSCSI names that may log in; empty: all.
	Initiators []string
	// Limits.SessionMemory gives the command window of a session too.
	listen.Limits

	// BlockShift is log2 of a logical block's bytes: 9, the default, or 12.
	BlockShift uint8
	// SmallPhysical tells initiators that a physical block is as long as a logical one, for those that take
	// no disks with longer ones. Writes of less than 4096 bytes are slower nevertheless.
	SmallPhysical bool
	// LoginTimeout is for a whole login. Default 30 s.
	LoginTimeout time.Duration
	// PingEvery is after how long without a word an initiator is asked whether it is there.
	// Default 30 s.
	PingEvery time.Duration
	// SettlePaths is how long a gateway must have owned a volume before initiators are told that it is the
	// quicker path. Default 3 s.
	SettlePaths time.Duration
	// LogoutTimeout is how long Shutdown leaves initiators to log out. Default 2 s.
	LogoutTimeout time.Duration
}

// MaxTransfer is the longest data of a command, in bytes.
const MaxTransfer = scsi.MaxTransfer

func (c *Config) validate() error {
	c.Logger = cmp.Or(c.Logger, slog.New(slog.DiscardHandler))
	c.BlockShift = cmp.Or(c.BlockShift, 9)
	c.LoginTimeout = cmp.Or(c.LoginTimeout, 30*time.Second)
	c.PingEvery = cmp.Or(c.PingEvery, 30*time.Second)
	c.SettlePaths = cmp.Or(c.SettlePaths, 3*time.Second)
	c.LogoutTimeout = cmp.Or(c.LogoutTimeout, 2*time.Second)
	if c.Portals == nil {
		c.Portals = func() []string { return nil }
	}
	if c.Targets == nil {
		c.Targets = noTargets{}
	}
	if c.Secrets == nil {
		c.Secrets = noSecrets
	}
	switch {
	case c.Volumes == nil || c.Prefix == "":
		return errors.New("iscsi: volumes and a prefix for the names of targets are needed")
	case c.BlockShift != 9 && c.BlockShift != 12:
		return fmt.Errorf("iscsi: logical blocks of 2^%d bytes: must be 512 or 4096 bytes", c.BlockShift)
	}
	if err := c.Limits.Validate(MaxTransfer); err != nil {
		return fmt.Errorf("iscsi: %w", err)
	}
	return nil
}

// windowOf gives the commands that a session may have in flight: as many as its memory can
// have data of, at the longest that most initiators make their requests.
func windowOf(memory int64) int { return int(max(64, min(memory>>20, 256))) }

// Server serves volumes to iSCSI initiators. Its methods may be called from any goroutine.
type Server struct {
	cfg     Config
	log     *slog.Logger
	window  int // commands of a session
	clients *listen.Acceptor[*session]
	upkeep  sync.WaitGroup

	mu       sync.Mutex
	units    map[string]*unit // by unitKey
	handles  map[uint16]bool  // TSIHs in use
	nextTSIH uint16

	lastID atomic.Uint64
	past   counters // of sessions that ended
	failed atomic.Uint64
	denied atomic.Uint64

	failureLog, loginLog stream.Quiet
}

// New makes a Server. It serves nothing before Serve; Shutdown must be called in the end.
func New(cfg Config) (*Server, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	s := &Server{cfg: cfg, log: cfg.Logger, window: windowOf(cfg.SessionMemory), units: map[string]*unit{}, handles: map[uint16]bool{}}
	s.clients = listen.New[*session](listen.Config{Protocol: "iSCSI", Logger: cfg.Logger, Limits: cfg.Limits}, s.serve)
	s.upkeep.Go(s.keep)
	return s, nil
}

// Serve accepts connections from l until ctx ends or Shutdown is called, and then
// closes l and returns nil. Sessions outlive it until Shutdown. It may be called for
// several listeners at once.
func (s *Server) Serve(ctx context.Context, l net.Listener) error { return s.clients.Serve(ctx, l) }

// serve takes an initiator through the login and serves it.
func (s *Server) serve(conn net.Conn) {
	c := &connection{server: s, conn: conn, log: s.log.With("peer", conn.RemoteAddr().String())}
	n, err := c.login()
	if err != nil {
		s.failed.Add(1)
		c.log.Debug("login ended", "reason", err)
		return
	}
	n.log.Info("session began", "session", n.info.ID, "read_only", n.info.ReadOnly, "digests", n.info.Digests)
	err = n.run()
	s.leave(conn, n)
	n.log.Log(context.Background(), max(slog.LevelInfo, stream.EndLevel(err)), "session ended", "session", n.info.ID, "reason", reason(err))
}

func reason(err error) string {
	switch {
	case err == nil:
		return "initiator logged out"
	case errors.Is(err, io.EOF):
		return "initiator disconnected without logging out"
	}
	return err.Error()
}

// leave takes back what a session has.
func (s *Server) leave(conn net.Conn, n *session) {
	n.part()
	s.clients.Leave(conn, func() { s.past.add(n.stats) })
	s.mu.Lock()
	delete(s.handles, n.tsih)
	s.mu.Unlock()
	close(n.gone)
}

// dropUnit forgets a unit that has no sessions. The caller holds mu.
func (s *Server) dropUnit(u *unit) {
	key := unitKey(Disk{Name: u.name, Tag: u.tag})
	if u.sessions--; u.sessions == 0 && s.units[key] == u {
		delete(s.units, key)
	}
}

// group is this gateway's number: of its target port group, and tag of its portal group.
func (s *Server) group() uint16 { return max(1, s.cfg.Volumes.Group()) }

// Shutdown stops accepting, asks all initiators to log out, and lets every session that does
// not answer what it has received. It returns when all are gone. If ctx ends first, the connections are
// closed; what the volumes still work on is waited for nevertheless, and ctx's error returned.
func (s *Server) Shutdown(ctx context.Context) error {
	polite := time.AfterFunc(s.cfg.LogoutTimeout, func() { s.clients.Each(func(c *session) { c.stream.Stop() }) })
	defer polite.Stop()
	err := s.clients.Shutdown(ctx)
	s.upkeep.Wait()
	return err
}

// upkeepEvery is how often sessions and units are looked at.
const upkeepEvery = time.Second

// keep finds initiators that are gone, and tells the others what has changed.
func (s *Server) keep() {
	t := time.NewTicker(min(upkeepEvery, max(s.cfg.PingEvery/4, time.Millisecond)))
	defer t.Stop()
	for {
		select {
		case <-s.clients.Context().Done():
			return
		case <-t.C:
		}
		s.mu.Lock()
		units := make([]*unit, 0, len(s.units))
		for _, u := range s.units {
			units = append(units, u)
		}
		s.mu.Unlock()
		for _, u := range units {
			u.update(s.cfg.Volumes.Changes())
			u.tellPaths()
		}
		s.relistGroups()
		s.clients.Each(s.checkAlive)
	}
}

// relistGroups has sessions of groups take over which units those have, if anything changed.
func (s *Server) relistGroups() {
	now := s.cfg.Volumes.Changes()
	s.clients.Each(func(c *session) {
		if c.group != "" && c.listed.Load() != now && !c.relisting.Swap(true) {
			s.upkeep.Go(c.relist)
		}
	})
}

// checkAlive asks a silent initiator whether it is there, and ends its session if it was
// asked often enough.
func (s *Server) checkAlive(c *session) {
	silent := time.Duration(stream.Ticks(time.Now()) - c.lastHeard.Load())
	if silent < s.cfg.PingEvery*time.Duration(c.unanswered()+1) {
		return
	}
	if !c.ping() {
		s.clients.Evict(c, errSilent)
	}
}

// Sessions describes the initiators that are logged in, by ID.
func (s *Server) Sessions() []SessionInfo {
	var list []SessionInfo
	s.clients.Each(func(c *session) { list = append(list, c.snapshot()) })
	slices.SortFunc(list, func(a, b SessionInfo) int { return cmp.Compare(a.ID, b.ID) })
	return list
}

// Counters returns what the server did so far.
func (s *Server) Counters() Counters {
	var sum counters
	c := Counters{Counters: s.clients.Counters(), Failed: s.failed.Load(), BadLogins: s.denied.Load()}
	s.clients.View(func(sessions iter.Seq[*session]) {
		sum.add(&s.past)
		for n := range sessions {
			sum.add(n.stats)
			c.Sessions++
			c.InFlight += n.inFlight()
		}
	})
	c.Requests, c.Errors, c.Rejects = sum.requests(), sum.errors.Load(), sum.rejects.Load()
	c.ReadBytes, c.WrittenBytes = sum.readBytes.Load(), sum.writtenBytes.Load()
	return c
}

// logFailure tells the operator of commands that failed for a reason that is ours.
func (s *session) logFailure(t *task, err error) {
	var sense *senseError
	var conflict *conflictError
	if errors.As(err, &sense) || errors.As(err, &conflict) || s.ctx.Err() != nil {
		return
	}
	name := "unknown"
	if t.plan.Command != nil {
		name = t.plan.Command.Name
	}
	s.server.failureLog.Warn(s.log, "command failed", "command", name, "offset", t.plan.Off, "length", t.plan.Len, "err", err)
}
