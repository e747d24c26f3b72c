package peer

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

// session is a connection over which another node sends requests.
//
// One goroutine, the reader, decodes all requests that have come together, gives each to
// the handler and then kicks it once. What is replied to meanwhile it sends itself; later
// replies are sent by the sender goroutine.
type session struct {
	c        *conn
	handler  Handler
	errs     *errorTable
	limits   limits
	budget   *budget
	requests *requestPool

	deaf   chan struct{}   // closed when no request reaches the handler any more
	taking context.Context // ends when the reader shall take no more
	stop   context.CancelFunc

	inflight atomic.Int64 // requests whose reply was not sent
	held     atomic.Int64 // bytes charged for them

	// The reader's.
	count   uint64 // of the last request
	batch   int    // requests since the last kick
	claimed bool   // the reader owns the output
}

// limits of one session.
type limits struct {
	requests int64
	memory   int64
	linger   time.Duration
}

// maxBatch requests are handled before the handler is kicked.
const maxBatch = 128

func newSession(c *conn, t *Transport) *session {
	s := &session{c: c, handler: t.cfg.Handler, errs: t.errs, budget: t.budgets[c.class], requests: &t.requests, deaf: make(chan struct{})}
	s.limits = limits{int64(t.cfg.SessionRequests), t.cfg.Memory / 8, t.cfg.Linger}
	s.taking, s.stop = context.WithCancel(context.Background())
	c.in.pause = s.kick // what is held back may be what is waited for
	return s
}

// run serves the node until the connection ends, and returns why. Then nothing of the
// session is left.
func (s *session) run() error {
	var sender sync.WaitGroup
	sender.Go(s.c.out.sendLoop)
	watch := context.AfterFunc(s.taking, func() { s.c.raw.SetReadDeadline(time.Unix(1, 0)) })
	err := s.read()
	close(s.deaf)
	watch()
	s.kick()
	if s.taking.Err() != nil && !errors.Is(err, errProtocol) {
		// What was taken is still answered.
		err = errStopped
		timer := time.AfterFunc(s.limits.linger, func() { s.c.fail(errStopped) })
		s.idle()
		timer.Stop()
	}
	s.c.fail(s.c.reason(err))
	s.c.out.end()
	sender.Wait()
	s.idleDead()
	s.c.in.drop()
	s.c.link.release()
	s.stop()
	return s.c.err
}

// shut makes the reader take no more requests.
func (s *session) shut() { s.stop() }

// idle waits until everything is answered, or the connection has failed.
func (s *session) idle() {
	s.c.in.await(func() bool { return s.inflight.Load() == 0 })
	// The last reply was handed to the socket, or lies collected below TLS: milliseconds.
	for !s.c.dead() && s.c.link.pending() {
		time.Sleep(time.Millisecond)
	}
}

// idleDead waits until the handler has given all requests back.
func (s *session) idleDead() {
	s.c.in.waiting.Store(true)
	for s.inflight.Load() > 0 {
		<-s.c.in.space
	}
}

func (s *session) read() error {
	for {
		if err := s.decode(); err != nil {
			return err
		}
		if s.taking.Err() != nil {
			return errStopped
		}
		if !s.c.link.more() {
			s.kick()
		}
		if err := s.c.receive(); err != nil {
			return err
		}
	}
}

// decode takes all messages that are here.
func (s *session) decode() error {
	for {
		h, ok, err := s.c.in.next()
		if !ok || err != nil {
			return err
		}
		if s.c.dead() { // nobody would hear of what is still here
			return s.c.err
		}
		switch h.typ {
		case framePing, framePong:
			s.c.in.take(headerSize)
			s.c.heartbeat(&h)
		case frameRequest:
			if h.count() <= s.count {
				return fmt.Errorf("%w: request %d again", errProtocol, h.count())
			}
			s.count = h.count()
			err = s.request(&h)
		default:
			err = fmt.Errorf("%w: reply without a request", errProtocol)
		}
		if err != nil {
			return err
		}
	}
}

// request takes a request and gives it to the handler.
func (s *session) request(h *header) error {
	cost := int64(0)
	if h.long() {
		cost += int64(bufferSize(int(h.data)))
	}
	if h.want > 0 {
		cost += int64(bufferSize(int(h.want)))
	}
	if err := s.admit(cost); err != nil {
		return err
	}
	in := &s.c.in
	in.take(headerSize)
	r := s.requests.get()
	r.s, r.id, r.want, r.cost = s, h.id, int(h.want), cost
	r.Class, r.Op, r.From = s.c.class, h.op, &s.c.remote
	r.ReplyHead = r.head[:0]
	s.inflight.Add(1)
	switch {
	case h.long():
		r.store = append(r.store[:0], in.take(int(h.head))...)
		r.Head = r.store
		r.long = newBuffer(int(h.data))
		r.Data = r.long.b[:h.data]
		if len(r.Data)-(in.w-in.r) > 0 {
			s.kick() // before waiting for the rest
		}
		if err := in.receive(r.Data); err != nil {
			r.sent()
			return err
		}
	case h.head > 0 || h.data > 0:
		r.in = in.chunk
		r.in.refs.Add(1)
		r.Head = in.take(int(h.head))
		r.Data = in.take(int(h.data))
	}
	if h.want > 0 {
		r.reply = newBuffer(int(h.want))
		r.ReplyData = r.reply.b[:h.want]
	}
	if !s.claimed {
		s.claimed = s.c.out.claim()
	}
	s.batch++
	s.handler.Handle(r)
	if s.batch >= maxBatch {
		s.kick()
	}
	return nil
}

// admit waits until the bounds allow another request that costs so many bytes.
func (s *session) admit(cost int64) error {
	ok := func() bool {
		n := s.inflight.Load()
		return n == 0 || n < s.limits.requests && s.held.Load()+cost <= s.limits.memory
	}
	if err := s.c.in.await(ok); err != nil {
		return err
	}
	if cost > 0 && !s.budget.tryData(cost) {
		s.kick()
		ctx, cancel := context.WithCancel(s.taking)
		stop := make(chan struct{})
		go func() {
			select {
			case <-s.c.failed:
				cancel()
			case <-stop:
			}
		}()
		err := s.budget.waitData(ctx, cost)
		close(stop)
		cancel()
		if err != nil {
			return errStopped
		}
	}
	s.held.Add(cost)
	return nil
}

// finished is told by each request at its end.
func (s *session) finished(cost int64) {
	if cost > 0 {
		s.held.Add(-cost)
		s.budget.putData(cost)
	}
	s.inflight.Add(-1)
	s.c.in.released(0)
}

// kick carries out what was handled and sends what was replied. The reader calls it
// before anything that may wait.
func (s *session) kick() {
	if s.batch > 0 {
		s.batch = 0
		s.handler.Kick()
	}
	if s.claimed {
		s.claimed = false
		s.c.out.send(false)
	}
}
