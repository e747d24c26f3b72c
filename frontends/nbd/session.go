package nbd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"sheepdog/frontends/nbd/internal/wire"
)

// session is a client in the transmission phase.
//
// One goroutine, the reader, decodes all requests that are in its receive buffer,
// submits each and then kicks the volume once. Replies are sent by whoever owns the
// output (see output.go): the reader while it works through a batch, so that
// requests that complete at once cost no hand-over, else the sender goroutine.
type session struct {
	server *Server
	info   SessionInfo // what does not change
	conn   net.Conn
	link   link
	log    *slog.Logger
	stats  *counters

	vol      Volume
	size     uint64 // bytes, as told at the handshake
	readOnly bool
	headers  wire.Headers
	contexts []metaContext

	ctx      context.Context // of slow commands: ends when nobody waits for their reply
	cancel   context.CancelFunc
	taking   context.Context // ends when the reader shall take no more requests
	stopTake context.CancelFunc
	slow     chan struct{} // a slot for each slow command that may run

	requests requests
	arena    arena
	output   output

	inflight atomic.Int64 // requests that were received and whose replies are not yet sent
	held     atomic.Int64 // bytes that count against SessionMemory
	// fillSince is when the client last sent a part of a long payload that the reader
	// waits for, as UnixNano; 0 if it waits for none.
	fillSince atomic.Int64
}

// maxSlow bounds the slow commands of one session that run at a time.
const maxSlow = 8

func newSession(s *Server, conn net.Conn, stats *counters, n *negotiation) *session {
	ctx, cancel := context.WithCancel(context.Background())
	taking, stopTake := context.WithCancel(context.Background())
	c := &session{
		server: s, conn: conn, link: newLink(conn), log: n.log.With("export", n.export), stats: stats,
		vol: n.volume, size: uint64(n.volume.Size()), readOnly: n.volume.ReadOnly(), headers: n.headers, contexts: n.selected,
		ctx: ctx, cancel: cancel, taking: taking, stopTake: stopTake, slow: make(chan struct{}, maxSlow),
	}
	c.requests.need = n.headers.RequestSize()
	c.output.init()
	return c
}

// run serves the client until it or we end the session, and returns why; nil if the
// client disconnected as it should. When run returns nothing of the session is left.
func (s *session) run() error {
	var sender sync.WaitGroup
	sender.Go(s.sendLoop)
	err := s.readLoop()
	if errors.Is(err, errDraining) {
		s.refuseRest()
	}
	s.finishBatch()
	if err != nil && !errors.Is(err, errDraining) && !errors.Is(err, errProtocol) {
		s.cancel() // the client is gone: nobody waits for what still runs
	}
	// Replies to what is in flight are still sent ("server MUST handle all
	// outstanding requests"), but not to a client that stopped reading.
	s.conn.SetWriteDeadline(time.Now().Add(s.server.cfg.LingerTimeout))
	s.awaitIdle()
	close(s.output.wake)
	sender.Wait()
	s.cancel()
	s.stopTake()
	s.requests.release()
	s.arena.release()
	s.conn.Close()
	if cerr := s.vol.Close(); cerr != nil {
		s.log.Warn("close of volume failed", "err", cerr)
	}
	if s.output.broken != nil {
		return s.output.broken
	}
	return err
}

// stop makes the reader stop: no further request is taken, those in flight are answered.
func (s *session) stop() {
	s.stopTake()
	s.conn.SetReadDeadline(time.Unix(1, 0))
}

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
		if s.taking.Err() != nil {
			return errDraining
		}
		s.finishBatch()
		n, err := s.link.recv(s)
		if err != nil {
			return s.readError(err)
		}
		s.requests.received(n)
	}
}

// refuseRest answers the requests that were received but not taken when the server
// began to shut down ("any subsequently received requests SHOULD be NBD_ESHUTDOWN").
func (s *session) refuseRest() {
	in := &s.requests
	for size := s.headers.RequestSize(); in.chunk != nil && in.w-in.r >= size; {
		r, ok := s.headers.ParseRequest(in.chunk.b[in.r:])
		if s.headers.HasPayload(&r) {
			size += int(min(r.Length, bigChunk))
		}
		if !ok || r.Type == wire.NBD_CMD_DISC || in.w-in.r < size {
			return
		}
		in.r += size
		size = s.headers.RequestSize()
		s.inflight.Add(1) // bounded by the receive buffer
		s.output.claim(s)
		o := s.newOp(&r)
		o.fail(wire.NBD_ESHUTDOWN, errDraining.Error())
		s.output.put(s, o)
	}
}

// readError says why receiving ended.
func (s *session) readError(err error) error {
	if s.taking.Err() != nil {
		return errDraining
	}
	if errors.Is(err, io.EOF) {
		return fmt.Errorf("connection closed without NBD_CMD_DISC: %w", net.ErrClosed)
	}
	return err
}

// await waits until ok, which reads atomics, becomes true by replies of this session
// having been sent.
func (s *session) await(ok func() bool) error {
	s.finishBatch()
	for {
		s.output.mu.Lock()
		if ok() {
			s.output.mu.Unlock()
			return nil
		}
		s.output.waiting = true
		s.output.mu.Unlock()
		select {
		case <-s.output.space:
		case <-s.taking.Done():
			return errDraining
		}
	}
}

// awaitIdle waits until every request is answered and no goroutine of the session
// but the sender is at work.
func (s *session) awaitIdle() {
	for {
		s.output.mu.Lock()
		if s.inflight.Load() == 0 && !s.output.owned {
			s.output.mu.Unlock()
			return
		}
		s.output.waiting = true
		s.output.mu.Unlock()
		<-s.output.space
	}
}

// chargePayload takes n bytes of the session's and the server's budget, waiting its turn.
func (s *session) chargePayload(n int64) error {
	take := func() bool {
		if s.held.Add(n) <= s.server.cfg.SessionMemory {
			return true
		}
		s.held.Add(-n)
		return false
	}
	if !take() {
		if err := s.await(take); err != nil {
			return err
		}
	}
	if s.server.budget.tryPayload(n) {
		return nil
	}
	s.finishBatch() // what is held back may be what others wait for
	if err := s.server.budget.payload(s.taking, n); err != nil {
		s.held.Add(-n)
		return errDraining
	}
	return nil
}

func (s *session) uncharge(n int64) {
	s.held.Add(-n)
	s.server.budget.putPayload(n)
}
