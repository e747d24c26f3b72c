package nbd

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"time"

	"sheepdog/frontends/internal/stream"
	"sheepdog/frontends/nbd/internal/wire"
)

// session is a client in the transmission phase. How bytes come and go: see package stream.
type session struct {
	server *Server
	info   SessionInfo // what does not change
	stream *stream.Stream
	log    *slog.Logger
	stats  *counters

	notices stream.Notices

	vol      Volume
	size     uint64 // bytes, as told at the handshake
	readOnly bool
	headers  wire.Headers
	contexts []metaContext

	ctx    context.Context // of slow commands: ends when nobody waits for their reply
	cancel context.CancelFunc
	slow   chan struct{} // a slot for each slow command that may run
}

// maxSlow bounds the slow commands of one session that run at a time.
const maxSlow = 8

func newSession(s *Server, n *negotiation) *session {
	ctx, cancel := context.WithCancel(context.Background())
	c := &session{
		server: s, stream: stream.New(n.conn, s.clients.Budget(), s.cfg.SessionMemory, n.volume.Kick), log: n.log.With("export", n.export), stats: new(counters),
		vol: n.volume, size: uint64(n.volume.Size()), readOnly: n.volume.ReadOnly(), headers: n.headers, contexts: n.selected,
		ctx: ctx, cancel: cancel, slow: make(chan struct{}, maxSlow),
	}
	c.stream.Need(n.headers.RequestSize())
	return c
}

// run serves the client until it or we end the session, and returns why; nil if the
// client disconnected as it should. When run returns nothing of the session is left.
func (s *session) run() error {
	err := s.readLoop()
	s.stream.Ends(err)
	if errors.Is(err, stream.ErrStopped) {
		s.refuseRest()
	}
	s.stream.FinishBatch()
	if err != nil && !errors.Is(err, stream.ErrStopped) && !errors.Is(err, errProtocol) {
		s.cancel() // the client is gone: nobody waits for what still runs
	}
	// Replies to what is in flight are still sent ("server MUST handle all
	// outstanding requests"), but not to a client that stopped reading.
	err = s.stream.Finish(s.server.cfg.LingerTimeout, err)
	if err == nil {
		s.notices.Heard() // it has said goodbye
	}
	s.cancel()
	if cerr := s.vol.Close(); cerr != nil {
		s.log.Warn("close of volume failed", "err", cerr)
	}
	return err
}

// Stop makes the reader stop: no further request is taken, those in flight are answered.
func (s *session) Stop() { s.stream.Stop() }

// End ends the session at once.
func (s *session) End(why error) bool {
	s.cancel()
	return s.stream.Cut(why)
}

// Stalled implements listen.Session.
func (s *session) Stalled(since time.Time) (int64, bool) { return s.stream.Stalled(since) }

// readLoop takes requests until there are no more; nil after NBD_CMD_DISC.
func (s *session) readLoop() error {
	for {
		err := s.decode()
		if err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		if s.stream.Stopping() {
			return stream.ErrStopped
		}
		s.stream.FinishBatch()
		if err := s.stream.Receive(); err != nil {
			return readError(err)
		}
		s.notices.Heard()
	}
}

// refuseRest answers the requests that were received but not taken when the server
// began to shut down ("any subsequently received requests SHOULD be NBD_ESHUTDOWN").
func (s *session) refuseRest() {
	for size := s.headers.RequestSize(); len(s.stream.Buffered()) >= size; {
		r, ok := s.headers.ParseRequest(s.stream.Buffered())
		if s.headers.HasPayload(&r) {
			size += int(min(r.Length, stream.BigChunk))
		}
		if !ok || r.Type == wire.NBD_CMD_DISC || len(s.stream.Buffered()) < size {
			return
		}
		s.stream.Consume(size)
		size = s.headers.RequestSize()
		s.stream.CountIn() // bounded by the receive buffer
		s.stream.Claim()
		o := s.newOp(&r)
		o.fail(wire.NBD_ESHUTDOWN, stream.ErrStopped.Error())
		s.stream.Put(o)
	}
}

// readError says why receiving ended.
func readError(err error) error {
	if errors.Is(err, io.EOF) {
		return errLeft
	}
	return err
}
