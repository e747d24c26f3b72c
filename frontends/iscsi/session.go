package iscsi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"sheepdog/frontends/internal/stream"
	"sheepdog/frontends/iscsi/internal/login"
	"sheepdog/frontends/iscsi/internal/pdu"
	"sheepdog/frontends/iscsi/internal/scsi"
)

// session is an initiator in the full feature phase. How bytes come and go: see package stream.
//
// CmdSN: commands are taken in the order in which they come, which on the one connection
// of a session is the order of their numbers. The window is a number of commands: each that
// is answered moves MaxCmdSN on by one, so that it never goes back.
type session struct {
	server *Server
	info   SessionInfo // what does not change
	conn   net.Conn
	stream *stream.Stream
	log    *slog.Logger
	stats  *counters
	params login.Params // the reader's, after the login
	tsih   uint16
	cid    uint16
	nexus  scsi.Nexus

	group  string     // whose units it has; "" for the one of a VDI's own target
	client string     // the initiator, for people
	from   netip.Addr // that it connects from
	port   atomic.Pointer[scsi.Port]
	// listed is up to when relist has taken over the group's units.
	listed    atomic.Uint64
	relisting atomic.Bool

	ctx    context.Context // of slow commands: ends when nobody waits for their answer
	cancel context.CancelFunc
	gone   chan struct{} // closed when nothing of it is left
	// background has what waits for the end of aborted tasks.
	background sync.WaitGroup

	expectedSN atomic.Uint32 // CmdSN of the next command
	windowEnd  atomic.Uint32 // MaxCmdSN
	statusSN   uint32        // the output owner's
	maxSend    atomic.Int64  // longest data segment that the initiator takes, bytes
	lastHeard  atomic.Int64  // by stream.Ticks

	notices stream.Notices

	mu         sync.Mutex
	luns       []*lun           // by number; none in a discovery session
	parted     bool             // it has given up its units
	tasks      map[uint32]*task // by tag, until they are answered
	immediate  int              // of them, those outside the window
	collecting int              // of them, those that wait for data
	idle       chan struct{}    // closed when there is no task, if somebody waits for that
	pings      int              // NOP-Ins that were not answered
	closed     bool             // before the login is answered, and at the end: nobody else may send anything
	nextTag    uint32           // target transfer tags
	copies     copies

	// The reader's.
	lapses  struct{ tried, since uint64 } // see past.go
	current *task                         // whose data is in the PDU at hand
	touched []*lun
	text    textExchange
}

// maxImmediate bounds the immediate commands of a session: they have no window.
const maxImmediate = 16

// maxAnswers bounds answers that the initiator has not taken, of whatever kind.
const maxAnswers = 1024

func newSession(s *Server, conn net.Conn, p login.Params, first *pdu.Header, c *connection) *session {
	ctx, cancel := context.WithCancel(context.Background())
	n := &session{
		server: s, conn: conn, stats: new(counters), params: p, tsih: c.tsih, cid: first.ConnectionID(), group: c.place.group, client: c.client(), from: c.address(),
		ctx: ctx, cancel: cancel, tasks: map[uint32]*task{}, closed: true, gone: make(chan struct{}),
	}
	n.stream = stream.New(conn, s.clients.Budget(), s.cfg.SessionMemory, n.kick)
	n.setLUNs(nil)
	n.stream.Need(pdu.HeaderSize)
	n.watchLapses()
	n.nexus = scsi.Nexus{Port: fmt.Sprintf("%s,i,0x%x", n.params.Initiator, n.params.ISID), Group: s.group(), Place: c.place.group}
	// The login's requests are immediate: the first command has their number.
	n.expectedSN.Store(c.commandSN)
	n.windowEnd.Store(c.commandSN + uint32(s.window) - 1)
	n.statusSN = c.statusSN + 1 // the last answer of the login has the one before
	n.maxSend.Store(int64(n.params.MaxSend))
	n.lastHeard.Store(stream.Ticks(time.Now()))
	n.log = c.log.With("target", n.params.Target, "initiator", n.params.Initiator)
	return n
}

// run serves the initiator until it or we end the session, and returns why; nil if it logged
// out. When run returns nothing of the session is left but its volume.
func (s *session) run() error {
	err := s.readLoop()
	s.stream.Ends(err)
	s.stream.FinishBatch()
	if !errors.Is(err, stream.ErrStopped) && !errors.Is(err, errLogout) {
		s.cancel() // the initiator is gone: nobody waits for what still runs
	}
	s.dropCollecting()
	s.awaitTasks()
	s.background.Wait()
	s.endText()
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	err = s.stream.Finish(s.server.cfg.LingerTimeout, err)
	s.cancel()
	if errors.Is(err, errLogout) {
		return nil
	}
	return err
}

// open lets others send something: the login is answered.
func (s *session) open() {
	s.mu.Lock()
	s.closed = false
	s.mu.Unlock()
}

// End ends the session from outside, at once, and reports whether it is the first who does.
func (s *session) End(why error) bool {
	first := s.stream.Ends(why) // before the reader is stopped, who has no reason of his own
	s.cancel()
	s.stream.Stop()
	s.stream.Cut(why)
	return first
}

// Stop asks the initiator to log out. Shutdown waits for that only for a while.
func (s *session) Stop() { s.askLogout(s.server.cfg.LogoutTimeout) }

// Stalled implements listen.Session. An initiator that does not send the data of commands keeps memory too.
func (s *session) Stalled(since time.Time) (int64, bool) {
	held, stalled := s.stream.Stalled(since)
	return held, stalled || s.starved(since)
}

// readLoop takes requests until there are no more.
func (s *session) readLoop() error {
	for {
		if err := s.decode(); err != nil {
			return err
		}
		if s.stream.Stopping() {
			return stream.ErrStopped
		}
		s.stream.FinishBatch()
		s.tryToReceive()
		if err := s.stream.Receive(); err != nil {
			return err
		}
		s.heard()
		s.notices.Heard()
	}
}

func (s *session) heard() { s.lastHeard.Store(stream.Ticks(time.Now())) }

// numbers are what an answer carries. The output's owner alone calls it, in Render.
func (s *session) numbers(advance bool) pdu.Numbers {
	n := pdu.Numbers{StatusSN: s.statusSN, ExpectedSN: s.expectedSN.Load(), MaxSN: s.windowEnd.Load()}
	if advance {
		s.statusSN++
	}
	return n
}

// order says what to do with a request by its CmdSN (RFC 7143 section 4.2.2.1).
func (s *session) order(h *pdu.Header) (take bool, err error) {
	sn, expected := h.CommandSN(), s.expectedSN.Load()
	switch {
	case h.Immediate():
		return true, nil
	case sn == expected:
		s.expectedSN.Store(expected + 1)
		return true, nil
	case pdu.Before(sn, expected) || pdu.Before(s.windowEnd.Load(), sn):
		return false, nil // "MUST silently ignore any non-immediate command outside of this range"
	}
	// The commands before it cannot come any more: on one connection numbers only rise, and
	// nothing is retransmitted at error recovery level 0.
	return false, fmt.Errorf("%w: command %d came in place of %d", errProtocol, sn, expected)
}

// credit moves the window on: a command of it was answered.
func (s *session) credit() { s.windowEnd.Add(1) }

// enter takes a task in, and finds its unit; false if its tag is in use, or if there are too many.
func (s *session) enter(t *task) (ok, crowded bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.tasks[t.tag] != nil {
		return false, false
	}
	if t.immediate {
		if s.immediate >= maxImmediate {
			return false, true
		}
		s.immediate++
	}
	s.tasks[t.tag] = t
	s.hold(t, s.find(t.lun))
	return true, false
}

// leave forgets a task, which will not be answered any more, or is about to be. The caller
// holds mu.
func (s *session) leave(t *task) {
	delete(s.tasks, t.tag)
	s.release(t.at)
	if t.immediate {
		s.immediate--
	}
	if len(s.tasks) == 0 && s.idle != nil {
		close(s.idle)
		s.idle = nil
	}
}

// awaitTasks waits until no task is under way.
func (s *session) awaitTasks() {
	s.mu.Lock()
	if len(s.tasks) == 0 {
		s.mu.Unlock()
		return
	}
	s.idle = make(chan struct{})
	idle := s.idle
	s.mu.Unlock()
	<-idle
}

// dropCollecting ends the tasks whose data will not come any more.
func (s *session) dropCollecting() {
	s.mu.Lock()
	var list []*task
	for _, t := range s.tasks {
		if t.state == collecting {
			list = append(list, t)
			s.leave(t)
			if t.counted {
				s.collecting--
			}
		}
	}
	s.mu.Unlock()
	for _, t := range list {
		t.drop()
	}
}

// reserve takes memory for a command; false if it would have to wait for what only more
// requests of this session can set free.
func (s *session) reserve(n int64) (bool, error) {
	if s.stream.TryCharge(n) {
		return true, nil
	}
	s.stream.FinishBatch()
	if s.stream.TryCharge(n) {
		return true, nil
	}
	s.mu.Lock()
	waits := s.collecting > 0
	s.mu.Unlock()
	if waits {
		return false, nil
	}
	return true, s.stream.Charge(n)
}

// ping asks the initiator whether it is there, at most maxPings times without an answer.
func (s *session) ping() (ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return true
	}
	if s.pings >= maxPings {
		return false
	}
	s.pings++
	s.nextTag++
	s.answer(pdu.NOPIn(0, pdu.NoTag, s.nextTag&^(1<<31), 0), nil, noSN)
	return true
}

// maxPings is after how many unanswered pings an initiator counts as gone.
const maxPings = 3

// unanswered is how many pings were not answered.
func (s *session) unanswered() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pings
}

// askLogout asks the initiator to log out (RFC 7143 section 11.9.1, event 1).
func (s *session) askLogout(within time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	s.answer(pdu.Async(0, pdu.AsyncLogout, uint16(max(1, within/time.Second))), nil, takesSN)
}

// starved reports whether commands wait for data, and none has come since the given time.
func (s *session) starved(since time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.collecting > 0 && s.lastHeard.Load() < stream.Ticks(since)
}
