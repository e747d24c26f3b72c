package stream

import (
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

// Item is something to be sent. It embeds Queued, and is in one queue at a time.
type Item interface {
	// Render returns what is sent, in pieces; none, if nothing is. It is called once, and
	// for one item at a time, in the order of sending; it must not block. The pieces stay
	// as they are until Sent.
	Render() [][]byte
	// Sent frees the item. It is called once, whether or not sending succeeded.
	Sent()
	// InQueue is where the queue keeps the item: what Queued gives.
	InQueue() *Queued
}

// Queued makes a type that embeds it fit for the queue.
type Queued struct{ next Item }

// InQueue implements Item.
func (q *Queued) InQueue() *Queued { return q }

// output is the queue of items and the right to send them. At any time at most one
// goroutine owns it: the reader, from the first request of a batch on until it has
// sent what completed meanwhile; who puts an item that is all the client waits for (see PutLast); or the
// sender goroutine, which is woken by whoever puts another one while nobody owns the output, and by everybody
// who finds the socket full. The owner sends until the queue is empty; nobody else wakes anybody.
type output struct {
	mu         sync.Mutex
	head, tail Item // to be sent
	owned      bool // somebody owns the output
	waiting    bool // the reader waits for items to be sent
	space      chan struct{}

	wake chan struct{} // passes the ownership to the sender

	// The reader's.
	claimed bool // it is the owner
	kick    bool // something was submitted since the last kick
	batch   int  // bytes submitted since

	// The owner's.
	taken   Item // off the queue, not yet in vec
	sending Item // in vec
	vec     [][]byte
	all     [][]byte // vec's array from its start
	broken  error    // sending failed: items are dropped from then on

	blockedSince atomic.Int64 // when sending began to wait, by Ticks; 0 if it does not
}

const (
	// maxBatch bytes of data make a batch that is sent before more requests are taken.
	maxBatch = 256 << 10
	// maxVector pieces, or maxVectorBytes, are sent at a time.
	maxVector      = 512
	maxVectorBytes = 4 << 20
)

func (q *output) init() {
	q.space = make(chan struct{}, 1)
	q.wake = make(chan struct{}, 1)
}

// Claim makes the reader the owner of the output if there is none, so that what
// completes until FinishBatch is sent together.
func (s *Stream) Claim() {
	q := &s.output
	if q.claimed {
		return
	}
	q.mu.Lock()
	if !q.owned {
		q.owned, q.claimed = true, true
	}
	q.mu.Unlock()
}

// Put queues an item, which was counted in. From any goroutine.
func (s *Stream) Put(i Item) {
	if s.put(i) {
		s.output.wake <- struct{}{} // has room: there is one ownership to pass
	}
}

// PutLast is Put for an item that is all the client waits for: nothing can come that is better sent with it, and
// to wake the sender would take longer than to send. So it is sent here and now if nobody else sends, as
// far as that needs no waiting. The item may be gone when it returns.
func (s *Stream) PutLast(i Item) {
	if s.put(i) {
		s.send(false)
	}
}

// Answer is PutLast for sessions that count an item in for each request as it comes, if there is no other one, and else Put.
func (s *Stream) Answer(i Item) {
	if s.inflight.Load() == 1 {
		s.PutLast(i)
	} else {
		s.Put(i)
	}
}

// put returns whether the caller is the owner of the output now.
func (s *Stream) put(i Item) bool {
	q := &s.output
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.tail == nil {
		q.head = i
	} else {
		q.tail.InQueue().next = i
	}
	q.tail = i
	if q.owned {
		return false
	}
	q.owned = true
	return true
}

// Submitted says that a request was submitted that moves n bytes: the next kick
// carries it out, which may be now.
func (s *Stream) Submitted(n int) {
	q := &s.output
	q.kick = true
	if q.batch += n; q.batch >= maxBatch {
		s.FinishBatch() // the client shall have something to do meanwhile
	}
}

// FinishBatch carries out what was submitted, and sends what has completed. The
// reader calls it before anything that may wait.
func (s *Stream) FinishBatch() {
	q := &s.output
	if q.kick {
		q.kick = false
		s.kick()
	}
	q.batch = 0
	if q.claimed {
		q.claimed = false
		s.send(false)
	}
}

// sendLoop is the sender goroutine.
func (s *Stream) sendLoop() {
	for range s.output.wake {
		s.send(true)
	}
}

// send sends items until there are none and gives the ownership up. If it may not
// wait and the socket is full, it passes the ownership to the sender.
func (s *Stream) send(wait bool) {
	q := &s.output
	for {
		if len(q.vec) == 0 {
			if !s.nextItems() {
				return
			}
			continue // they may have nothing to send
		}
		n, err := 0, q.broken
		if err == nil {
			n, err = s.sendSome(wait)
		}
		if err == errWouldBlock {
			q.wake <- struct{}{}
			return
		}
		if err != nil {
			s.breakOutput(err)
			continue
		}
		q.advance(n)
	}
}

func (s *Stream) sendSome(wait bool) (int, error) {
	q := &s.output
	if !wait {
		return s.link.trySend(q.vec)
	}
	q.blockedSince.Store(Ticks(time.Now()))
	n, err := s.link.send(q.vec)
	q.blockedSince.Store(0)
	return n, err
}

// breakOutput drops this and all further items: the client cannot be reached. The
// reader finds out by itself, or is told by the closed connection.
func (s *Stream) breakOutput(err error) {
	q := &s.output
	if q.broken == nil {
		q.broken = err
		s.Ends(fmt.Errorf("send: %w", err))
		s.conn.Close()
	}
	q.vec = q.vec[:0]
}

// advance takes n bytes that were sent off the front of vec.
func (q *output) advance(n int) {
	for len(q.vec) > 0 && n >= len(q.vec[0]) {
		n -= len(q.vec[0])
		q.vec = q.vec[1:]
	}
	if n > 0 {
		q.vec[0] = q.vec[0][n:]
	}
}

// nextItems frees what was sent and loads what is sent next; false if there is
// nothing, and then the output is no longer owned.
func (s *Stream) nextItems() bool {
	q := &s.output
	freed := q.freeSent()
	if freed > 0 {
		s.inflight.Add(-freed)
	}
	q.mu.Lock()
	if q.taken == nil {
		q.taken, q.head, q.tail = q.head, nil, nil
	}
	if q.taken == nil {
		q.owned = false
	}
	signal := q.waiting && (freed > 0 || q.taken == nil)
	if signal {
		q.waiting = false
	}
	more := q.taken != nil
	q.mu.Unlock()
	if signal {
		select {
		case q.space <- struct{}{}:
		default:
		}
	}
	if more {
		q.load()
	}
	return more
}

func (q *output) freeSent() (n int64) {
	clear(q.all)
	for i := q.sending; i != nil; n++ {
		link := i.InQueue()
		next := link.next
		link.next = nil
		i.Sent()
		i = next
	}
	q.sending = nil
	return n
}

// load moves items from taken to vec.
func (q *output) load() {
	vec, bytes := q.all[:0], 0
	var last Item
	q.sending = q.taken
	for i := q.taken; i != nil && len(vec) < maxVector && bytes < maxVectorBytes; i = i.InQueue().next {
		pieces := i.Render()
		vec = append(vec, pieces...)
		for _, p := range pieces {
			bytes += len(p)
		}
		last = i
	}
	link := last.InQueue()
	q.taken, link.next = link.next, nil
	q.all, q.vec = vec, vec
}
