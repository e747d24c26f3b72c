package peer

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// lane is the calls of one class to one node, over a connection that is made again
// whenever it was lost.
type lane struct {
	p     *Peer
	t     *Transport
	class Class

	mu    sync.Mutex
	state laneState
	err   error     // why it is down, an ErrDisconnected
	lost  time.Time // since when it tries to connect in vain; zero: it does not
	conn  *conn     // if up

	slots    []slot
	free     []uint16 // slots
	count    uint64   // requests over conn
	bytes    int64    // under way
	waiting  queue    // for the connection, or for room
	earliest time.Time
	used     time.Time // heartbeat's: when there last were calls

	kicks atomic.Bool // there may be something to flush
}

type laneState uint8

const (
	laneIdle       laneState = iota // nobody has called yet, or for long
	laneConnecting                  // calls wait
	laneUp
	laneDown // calls fail until a connection is made
	laneClosed
)

// slot is a request under way. Its call is nil when nobody waits for the reply any more.
type slot struct {
	id   uint64 // 0: free
	call *Call
	cost int64
}

func (l *lane) init(p *Peer, class Class) {
	l.p, l.t, l.class = p, p.t, class
}

// submit begins a call.
func (l *lane) submit(c *Call) {
	err := c.prepare(l)
	if err != nil {
		c.abort(err)
		return
	}
	l.mu.Lock()
	switch {
	case l.state == laneClosed:
		err = ErrClosed
	case l.state == laneDown:
		err = l.err
	case l.state == laneUp && l.waiting.n == 0 && l.room(c):
		l.start(c)
	case l.waiting.n >= l.t.cfg.QueueCalls || l.waiting.n > 0 && l.waiting.bytes+c.cost > l.t.cfg.QueueBytes:
		err = ErrBusy
	default:
		l.waiting.push(c)
		l.open()
	}
	if err == nil && !c.Deadline.IsZero() && (l.earliest.IsZero() || c.Deadline.Before(l.earliest)) {
		l.earliest = c.Deadline
	}
	l.mu.Unlock()
	if err != nil {
		c.abort(err)
	}
}

// open makes the lane connect if it does not yet. l.mu is held.
func (l *lane) open() {
	if l.state == laneIdle {
		l.state, l.lost = laneConnecting, time.Now()
		l.t.running.Go(l.run)
	}
}

// room reports whether a call may be under way beside the others.
func (l *lane) room(c *Call) bool {
	return len(l.free) > 0 && (l.bytes == 0 || l.bytes+c.cost <= l.t.cfg.WindowBytes)
}

// start gives a call to the connection. l.mu is held.
func (l *lane) start(c *Call) {
	i := l.free[len(l.free)-1]
	l.free = l.free[:len(l.free)-1]
	l.count++
	id := l.count<<slotBits | uint64(i)
	l.slots[i] = slot{id, c, c.cost}
	l.bytes += c.cost
	c.arm(int(i), id, l.conn.seed)
	l.conn.out.put(&c.frame)
	l.kicks.Store(true)
}

// vacate frees a slot. l.mu is held.
func (l *lane) vacate(i int) {
	l.bytes -= l.slots[i].cost
	l.slots[i] = slot{}
	l.free = append(l.free, uint16(i))
}

// advance starts calls that wait, as far as there is room. l.mu is held.
func (l *lane) advance() {
	for l.state == laneUp && l.waiting.n > 0 && l.room(l.waiting.head) {
		l.start(l.waiting.pop())
	}
}

// kick sends what was submitted.
func (l *lane) kick() {
	if !l.kicks.Load() {
		return
	}
	l.kicks.Store(false)
	l.mu.Lock()
	c := l.conn
	l.mu.Unlock()
	if c != nil {
		c.out.flush()
	}
}

// Pauses between attempts to connect.
const (
	firstPause = 20 * time.Millisecond
	lastPause  = time.Second
)

// run keeps the lane connected until the peer is closed or it is not needed any more.
func (l *lane) run() {
	pause := firstPause
	for {
		self := l.t.Identity()
		c, err := l.p.connect(l.class)
		if err == nil {
			if l.up(c) {
				if l.t.Identity() != self {
					c.fail(errIdentity) // SetIdentity may have come before there was a connection
				}
				err = l.serve(c)
				l.t.gaveUp(l.p.name, c)
				pause = firstPause
			} else {
				err = ErrClosed
			}
		}
		l.t.event(Event{Node: l.p.name, Class: l.class, Err: err})
		if !l.down(c, err) {
			return
		}
		if c != nil {
			continue // once at once
		}
		select {
		case <-time.After(pause/2 + rand.N(pause)):
		case <-l.p.closed.Done():
		}
		pause = min(2*pause, lastPause)
	}
}

// up begins to use a connection; false if it is too late.
func (l *lane) up(c *conn) bool {
	l.mu.Lock()
	if l.state == laneClosed {
		l.mu.Unlock()
		return false
	}
	l.state, l.conn, l.err, l.lost = laneUp, c, nil, time.Time{}
	n := l.t.cfg.WindowCalls
	l.slots, l.free = make([]slot, n), make([]uint16, n)
	for i := range l.free {
		l.free[i] = uint16(n - 1 - i)
	}
	l.count, l.bytes = 0, 0
	l.advance()
	l.mu.Unlock()
	l.t.event(Event{Node: l.p.name, Class: l.class, Up: true, Identity: c.remote})
	return true
}

// serve receives replies until the connection ends, and returns why.
func (l *lane) serve(c *conn) error {
	if !l.t.keep(c) {
		c.fail(ErrClosed)
	}
	c.out.flush()
	err := l.read(c)
	c.fail(c.reason(err))
	return c.err
}

// down ends the use of a connection, or of the attempt to make one, and fails all calls.
// It returns false if the lane has no more use for one.
func (l *lane) down(c *conn, err error) bool {
	err = fmt.Errorf("%w: node %s: %w", ErrDisconnected, l.p.name, err)
	var lost queue
	l.mu.Lock()
	for _, s := range l.slots {
		if s.call != nil {
			lost.push(s.call)
		}
	}
	again := l.state != laneClosed
	switch {
	case !again:
	case errors.Is(err, errStopped) && lost.n == 0 && l.waiting.n == 0:
		l.state, again = laneIdle, false
	case l.conn != nil:
		l.state = laneConnecting
	default:
		l.state, l.err = laneDown, err
	}
	switch {
	case l.state == laneIdle || errors.Is(err, syscall.ECONNREFUSED): // the machine is reached
		l.lost = time.Time{}
	case l.lost.IsZero():
		l.lost = time.Now()
	}
	waiting := l.waiting
	l.conn, l.slots, l.free, l.waiting, l.earliest = nil, nil, nil, queue{}, time.Time{}
	l.mu.Unlock()
	if c != nil {
		c.fail(ErrClosed)
		c.out.end()
		l.t.forget(c)
		c.in.drop()
		c.link.release()
	}
	for c := lost.pop(); c != nil; c = lost.pop() {
		c.finish(err)
	}
	waiting.abort(err)
	l.t.cfg.Handler.Kick()
	return again
}

// close fails all calls and ends the connection. The goroutine of the lane ends soon.
func (l *lane) close() {
	l.mu.Lock()
	l.state = laneClosed
	waiting, c := l.waiting, l.conn
	l.waiting = queue{}
	l.mu.Unlock()
	if c != nil {
		c.fail(ErrClosed)
	}
	waiting.abort(ErrClosed)
}

func (l *lane) read(c *conn) error {
	for {
		n, err := l.decode(c)
		if n > 0 {
			l.t.cfg.Handler.Kick()
		}
		if err != nil {
			return err
		}
		if !c.link.more() {
			c.out.flush() // what waited for room
		}
		if err := c.receive(); err != nil {
			return err
		}
	}
}

// decode takes all messages that are here, and returns how many calls are done.
func (l *lane) decode(c *conn) (done int, err error) {
	for {
		h, ok, err := c.in.next()
		if !ok || err != nil {
			return done, err
		}
		c.in.take(headerSize)
		switch h.typ {
		case framePing, framePong:
			c.heartbeat(&h)
		case frameReply:
			done++
			err = l.reply(c, &h)
		default:
			err = fmt.Errorf("%w: request from the node that is asked", errProtocol)
		}
		if err != nil {
			return done, err
		}
	}
}

// reply takes a reply.
func (l *lane) reply(c *conn, h *header) error {
	i := h.slot()
	l.mu.Lock()
	if i >= len(l.slots) || l.slots[i].id != h.id || h.id == 0 {
		l.mu.Unlock()
		return fmt.Errorf("%w: reply to no request", errProtocol)
	}
	call := l.slots[i].call
	l.vacate(i)
	l.advance()
	l.mu.Unlock()
	if call == nil { // nobody waits for it any more
		c.in.take(int(h.head))
		return c.in.skip(int(h.data))
	}
	err := call.receive(c, h)
	if err != nil {
		call.finish(fmt.Errorf("%w: node %s: %w", ErrDisconnected, l.p.name, err))
		return err
	}
	if h.op != 0 {
		call.finish(l.t.errs.decode(l.p.name, h.op, call.ReplyHead))
		return nil
	}
	call.finish(nil)
	return nil
}

// receive takes a reply's content.
func (c *Call) receive(from *conn, h *header) error {
	in := &from.in
	if int(h.data) > c.want {
		return fmt.Errorf("%w: reply of %d bytes where there is room for %d", errProtocol, h.data, c.want)
	}
	c.ReplyHead = append(c.ReplyHead[:0], in.take(int(h.head))...)
	if c.ReplyData == nil && h.data > 0 {
		c.buffer = newBuffer(int(h.data))
		c.ReplyData = c.buffer.b
	}
	if c.ReplyData != nil {
		c.ReplyData = c.ReplyData[:h.data]
	}
	return in.receive(c.ReplyData)
}

// expire fails the calls whose deadline has passed.
func (l *lane) expire(now time.Time) {
	var early, late queue
	l.mu.Lock()
	if l.earliest.IsZero() || now.Before(l.earliest) {
		l.mu.Unlock()
		return
	}
	l.earliest = time.Time{}
	over := func(c *Call) bool {
		if c.Deadline.IsZero() {
			return false
		}
		if now.Before(c.Deadline) {
			if l.earliest.IsZero() || c.Deadline.Before(l.earliest) {
				l.earliest = c.Deadline
			}
			return false
		}
		return true
	}
	var rest queue
	for c := l.waiting.pop(); c != nil; c = l.waiting.pop() {
		if over(c) {
			early.push(c)
		} else {
			rest.push(c)
		}
	}
	l.waiting = rest
	for i := range l.slots {
		if c := l.slots[i].call; c != nil && over(c) {
			l.slots[i].call = nil // until its reply comes it still counts
			if l.conn.out.remove(&c.frame) {
				l.vacate(i)
				c.holds.Add(-1)
			}
			late.push(c)
		}
	}
	l.advance()
	l.mu.Unlock()
	if early.n+late.n == 0 {
		return
	}
	early.abort(ErrTimeout)
	for c := late.pop(); c != nil; c = late.pop() {
		c.finish(ErrTimeout)
	}
	l.t.cfg.Handler.Kick()
}

// tick looks after the lane, now and then.
func (l *lane) tick(now time.Time) {
	l.expire(now)
	l.mu.Lock()
	c := l.conn
	if c == nil || l.bytes > 0 || l.waiting.n > 0 || len(l.free) < len(l.slots) || l.used.IsZero() {
		l.used = now
	}
	over := l.class == Bulk && now.Sub(l.used) > l.t.cfg.BulkIdle
	l.mu.Unlock()
	if over {
		c.fail(errStopped)
	}
	l.kicks.Store(true)
	l.kick() // what nobody kicked
}

// rtt is the latest round trip of a heartbeat; 0 if there is no connection.
func (l *lane) rtt() time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.conn == nil {
		return 0
	}
	return time.Duration(l.conn.rtt.Load())
}

// identity is who is at the other side; ok is false if there is no connection.
func (l *lane) identity() (id Identity, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.conn == nil {
		return id, false
	}
	return l.conn.remote, true
}

// drop ends the lane's connection, which is then made again.
func (l *lane) drop(err error) {
	l.mu.Lock()
	c := l.conn
	l.mu.Unlock()
	if c != nil {
		c.fail(err)
	}
}
