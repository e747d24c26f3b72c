package sheepdog

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"sheepdog/frontends/internal/listen"
	"sheepdog/frontends/internal/stream"
	"sheepdog/frontends/sheepdog/internal/wire"
	"sheepdog/storage/object"
)

// session is one connection. QEMU has one for a volume's data, for as long as it has it open,
// and one for each other request.
type session struct {
	server *Server
	conn   net.Conn
	host   string // who it comes from, without the port
	log    *slog.Logger
	stats  *counters
	stream *stream.Stream

	ctx    context.Context // of slow operations: ends when nobody waits for their answer
	cancel context.CancelFunc
	slow   chan struct{} // a slot for each slow operation that may run

	// The reader's.
	requests int    // so far
	clearing bool   // it began with clearing a part of a map: see clearEntry
	kicked   Volume // that requests were submitted to since the last kick; nil: none

	used atomic.Bool // it has sent a request

	sharing sharing
	notices stream.Notices

	mu       sync.Mutex
	info     SessionInfo
	attached map[object.VID]*attached
	detached []*attached // that requests still use
	family   uint64      // of the volumes whose objects it uses; 0: none yet
	writes   string      // name of the volume that it writes
	reads    string      // name of the first volume that it read own objects of
}

const (
	// maxSlow bounds the slow operations of one session that run at a time.
	maxSlow = 8
	// maxNames is the longest payload of an operation on a VDI, in bytes.
	maxNames = 4096
)

func newSession(s *Server, conn net.Conn) *session {
	ctx, cancel := context.WithCancel(context.Background())
	c := &session{
		server: s, conn: conn, host: hostOf(conn), log: s.log.With("peer", listen.PeerName(conn)), stats: new(counters),
		ctx: ctx, cancel: cancel, slow: make(chan struct{}, maxSlow), attached: map[object.VID]*attached{},
	}
	c.stream = stream.New(conn, s.clients.Budget(), s.cfg.SessionMemory, c.kick)
	return c
}

// Stop makes the session end when what it has carried out is answered.
func (s *session) Stop() { s.stream.Stop() }

// End ends the session at once.
func (s *session) End(why error) bool {
	s.cancel()
	return s.stream.Cut(why)
}

// Stalled implements listen.Session.
func (s *session) Stalled(since time.Time) (int64, bool) { return s.stream.Stalled(since) }

// run serves the client until it or we end the session, and returns why: io.EOF if the client
// left, which is how all do. When run returns nothing of the session is left.
func (s *session) run() error {
	err := s.readLoop()
	if !errors.Is(err, stream.ErrStopped) {
		s.cancel() // the client is gone: nobody waits for what still runs
	}
	err = s.stream.Finish(s.server.cfg.LingerTimeout, err)
	s.cancel()
	s.unshare()
	s.detachAll()
	return err
}

func (s *session) readLoop() error {
	for {
		if err := s.decode(); err != nil {
			return err
		}
		if s.stream.Stopping() {
			return stream.ErrStopped
		}
		s.stream.FinishBatch()
		if err := s.stream.Receive(); err != nil {
			return err
		}
		s.notices.Heard()
	}
}

// decode carries out all requests that are received in full.
func (s *session) decode() error {
	for {
		b := s.stream.Buffered()
		if len(b) < wire.HeaderSize {
			s.stream.Need(wire.HeaderSize)
			return nil
		}
		r := wire.ParseRequest(b)
		have, err := true, error(nil)
		if r.HasPayload() {
			have, err = s.withPayload(&r)
		} else {
			s.stream.Consume(wire.HeaderSize)
			err = s.take(&r)
		}
		if !have || err != nil {
			return err
		}
	}
}

// take carries out a request without payload.
func (s *session) take(r *wire.Request) error {
	def := operationOf(r.Op)
	if bad := def.check(r); bad != nil {
		return s.reply(r, bad)
	}
	n := 0
	if def.reads {
		n = int(r.DataLength)
	}
	o, err := s.newReadOp(r, n)
	if err != nil {
		return err
	}
	return s.start(o, def)
}

// withPayload takes a request that a payload follows; false if not all of it is here.
func (s *session) withPayload(r *wire.Request) (bool, error) {
	def := operationOf(r.Op)
	const size = wire.HeaderSize
	n := int(r.DataLength)
	if bad := def.check(r); bad != nil {
		s.stream.Consume(size)
		if err := s.stream.Skip(n); err != nil {
			return true, err
		}
		return true, s.reply(r, bad)
	}
	if n > stream.ChunkDataMax || !s.stream.Grow(size+n) {
		s.stream.Consume(size)
		s.stream.Streaming(true)
		o, err := s.newLongOp(r, n)
		if err != nil {
			return true, err
		}
		if err := s.stream.Fill(o.data); err != nil {
			o.free()
			return true, err
		}
		return true, s.start(o, def)
	}
	b := s.stream.Buffered()
	if len(b) < size+n {
		s.stream.Need(size + n)
		return false, nil
	}
	o := s.newOp(r)
	o.data = b[size : size+n]
	o.in = s.stream.Pin()
	s.stream.Consume(size + n)
	s.stream.Streaming(false)
	return true, s.start(o, def)
}

// start counts an op in and carries it out.
func (s *session) start(o *op, def *operation) error {
	if err := s.stream.Admit(s.server.cfg.SessionRequests); err != nil {
		o.free()
		return err
	}
	s.stream.Claim()
	s.stats.submitted(&o.wire)
	s.used.Store(true)
	s.requests++
	if def.object {
		o.obj = o.wire.Object()
	}
	n := len(o.data)
	if vol := handlers[o.wire.Op](s, o); vol != nil {
		if s.kicked != vol {
			s.kick()
		}
		s.kicked = vol
		s.stream.Submitted(n)
	}
	return nil
}

// reply answers a request that is not carried out. It is counted like any other: a client
// that sends nonsense and reads no answers shall not fill our memory.
func (s *session) reply(r *wire.Request, why error) error {
	if err := s.stream.Admit(s.server.cfg.SessionRequests); err != nil {
		return err
	}
	s.stream.Claim()
	s.stats.submitted(r)
	s.used.Store(true)
	s.newOp(r).finish(why)
	return nil
}

// later runs what has to wait on a goroutine of its own. The reader calls it.
func (s *session) later(o *op, run func(*session, context.Context, *op)) {
	s.stream.FinishBatch()
	select {
	case s.slow <- struct{}{}:
	case <-s.stream.Stopped():
		o.finish(stream.ErrStopped)
		return
	}
	go func() {
		defer func() { <-s.slow }()
		run(s, s.ctx, o)
	}()
}

// kick has the volume carry out what the reader submitted.
func (s *session) kick() {
	if s.kicked != nil {
		s.kicked.Kick()
		s.kicked = nil
	}
}

// failed notes a request that failed.
func (s *session) failed(o *op, result wire.Result, err error) {
	s.stats.errors.Add(1)
	if ours(result) && s.ctx.Err() == nil {
		s.server.failureLog.Warn(s.log, "request failed", "op", nameOf(o.wire.Op), "object", object.ID(o.obj.OID).String(), "result", uint32(result), "err", err)
		return
	}
	s.log.Debug("request refused", "op", nameOf(o.wire.Op), "object", object.ID(o.obj.OID).String(), "result", uint32(result), "err", err)
}
