package stream

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// Why a session ends that its client has not ended.
var (
	// ErrStopped says that the reader was told to take no more requests.
	ErrStopped = errors.New("server is shutting down")
	// ErrOverdue is for those whose requests in flight were not waited for any longer.
	ErrOverdue = errors.New("server is shutting down, and what was in flight took too long")
	// ErrStalled is for those that Stalled is true of.
	ErrStalled = errors.New("client does not read its replies, or finish a payload, while others wait for memory")
)

// errShort says that the client is gone, and has sent a part of something.
var errShort = fmt.Errorf("connection ended within a request: %w", io.ErrUnexpectedEOF)

// Left fails if a session's context has ended: its client, which is called so, has left. What that had in flight may have been sent again on another
// connection, or through another node, and others after it: then it is of the past, and not to be begun.
func Left(ctx context.Context, client string) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("%s has left: %w", client, err)
	}
	return nil
}

// EndLevel is how loud the end of a session is to be told, by what Finish returned: Debug if client or server
// ended it as it should, Warn if it was ended for the sake of others, else Info.
func EndLevel(why error) slog.Level {
	switch {
	case why == nil, errors.Is(why, io.EOF), errors.Is(why, ErrStopped):
		return slog.LevelDebug
	case errors.Is(why, ErrStalled):
		return slog.LevelWarn
	}
	return slog.LevelInfo
}

// Stream is a session's half of a connection to its client. The methods are the
// reader's, that is, of one goroutine at a time, where they do not say otherwise.
type Stream struct {
	conn   net.Conn
	link   link
	budget *Budget
	limit  int64 // bytes that may be held
	kick   func()
	empty  func() // nil, or see OnEmpty

	taking   context.Context // ends when the reader shall take no more requests
	stopTake context.CancelFunc
	sender   sync.WaitGroup

	in     input
	arena  arena
	output output

	why      atomic.Pointer[error] // the session ends; nil: it does not, or as it should
	inflight atomic.Int64          // items that were counted in and are not yet sent
	held     atomic.Int64          // bytes that count against limit
	// fillSince is when the client last sent a part of a long payload that the reader
	// waits for, by Ticks; 0 if it waits for none.
	fillSince atomic.Int64
}

// New makes the stream of a connection, which it closes in the end. The session may hold
// limit bytes, of the budget; kick carries out what was submitted since the last call.
// Finish must be called, whatever happens.
func New(conn net.Conn, b *Budget, limit int64, kick func()) *Stream {
	s := &Stream{conn: conn, link: newLink(conn), budget: b, limit: limit, kick: kick}
	s.taking, s.stopTake = context.WithCancel(context.Background())
	s.in.need = 1
	s.output.init()
	s.sender.Go(s.sendLoop)
	return s
}

// OnEmpty has fn called by the reader whenever the client has sent nothing more: all that it receives then comes
// after the receiving began that found nothing. It is called before anything is received.
func (s *Stream) OnEmpty(fn func()) { s.empty = fn }

// Stop makes the reader stop: no further request is taken, those in flight are answered.
// It may be called from any goroutine.
func (s *Stream) Stop() {
	s.stopTake()
	s.conn.SetReadDeadline(time.Unix(1, 0))
}

// Stopped is closed by Stop and Finish. Any goroutine may wait for it.
func (s *Stream) Stopped() <-chan struct{} { return s.taking.Done() }

// Stopping reports whether Stopped is closed. From any goroutine.
func (s *Stream) Stopping() bool { return s.taking.Err() != nil }

// Ends says why the session ends, and reports whether that is the reason that Finish returns: the first one is.
// What is as it should be, a client that leaves and a server that stops, is none: what goes wrong
// afterwards says more. From any goroutine.
func (s *Stream) Ends(why error) bool {
	return EndLevel(why) > slog.LevelDebug && s.why.CompareAndSwap(nil, &why)
}

// Cut closes the connection, for a reason: nothing more is received or sent. It returns what Ends
// does. From any goroutine.
func (s *Stream) Cut(why error) bool {
	first := s.Ends(why)
	conn := s.conn
	if t, ok := conn.(*tls.Conn); ok {
		conn = t.NetConn() // nobody waits for an alert to be sent
	}
	conn.Close()
	return first
}

// Finish is told why receiving ended, nil if it ended as the protocol has it. It sends what is still answered, for linger at the most, and returns when every item
// that was counted in was sent or dropped, with the reason why the session ends: see Ends. Nothing of the stream is left then.
func (s *Stream) Finish(linger time.Duration, err error) error {
	s.Ends(err)
	s.FinishBatch()
	s.conn.SetWriteDeadline(time.Now().Add(linger))
	s.awaitIdle()
	close(s.output.wake)
	s.sender.Wait()
	s.stopTake()
	s.in.release()
	s.arena.release()
	s.conn.Close()
	if why := s.why.Load(); why != nil {
		return *why
	}
	return err
}

// Held is how many bytes of the budgets the session holds. From any goroutine.
func (s *Stream) Held() int64 { return s.held.Load() }

// InFlight is how many items were counted in and are not yet sent. From any goroutine.
func (s *Stream) InFlight() int64 { return s.inflight.Load() }

// Stalled tells what Held does, and whether the session's client could set it free, and
// has not moved since the given time. From any goroutine.
func (s *Stream) Stalled(since time.Time) (held int64, stalled bool) {
	before := func(t int64) bool { return t != 0 && t < Ticks(since) }
	held = s.held.Load()
	return held, held > 0 && (before(s.output.blockedSince.Load()) || before(s.fillSince.Load()))
}

// Admit counts an item in that will be Put, waiting while there are limit of them. It
// fails with ErrStopped.
func (s *Stream) Admit(limit int) error {
	if s.inflight.Load() >= int64(limit) {
		if err := s.Await(func() bool { return s.inflight.Load() < int64(limit) }); err != nil {
			return err
		}
	}
	s.inflight.Add(1)
	return nil
}

// CountIn counts an item in that will be Put, without waiting: there must be another
// bound of how many of its kind there are. From any goroutine.
func (s *Stream) CountIn() { s.inflight.Add(1) }

// Await waits until ok, which reads atomics, becomes true by items of this session having
// been sent. What was submitted is carried out first. It fails with ErrStopped.
func (s *Stream) Await(ok func() bool) error {
	s.FinishBatch()
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
			return ErrStopped
		}
	}
}

// awaitIdle waits until every item is sent and no goroutine of the session but the
// sender is at work.
func (s *Stream) awaitIdle() {
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

// Charge takes n bytes of the session's and the server's budget for a payload, waiting
// its turn. It fails with ErrStopped.
func (s *Stream) Charge(n int64) error {
	take := func() bool {
		if s.held.Add(n) <= s.limit {
			return true
		}
		s.held.Add(-n)
		return false
	}
	if !take() {
		if err := s.Await(take); err != nil {
			return err
		}
	}
	if s.budget.tryPayload(n) {
		return nil
	}
	s.FinishBatch() // what is held back may be what others wait for
	if err := s.budget.payload(s.taking, n); err != nil {
		s.held.Add(-n)
		return ErrStopped
	}
	return nil
}

// TryCharge is Charge for who cannot wait.
func (s *Stream) TryCharge(n int64) bool {
	if s.held.Add(n) > s.limit || !s.budget.tryPayload(n) {
		s.held.Add(-n)
		return false
	}
	return true
}

// Uncharge gives back what Charge took. From any goroutine.
func (s *Stream) Uncharge(n int64) {
	s.held.Add(-n)
	s.budget.putPayload(n)
}
