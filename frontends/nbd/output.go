package nbd

import (
	"sync"
	"sync/atomic"
	"time"
)

// output is the queue of replies and the right to send them. At any time at most one
// goroutine owns it: the reader, from the first request of a batch on until it has
// sent what completed meanwhile; or the sender goroutine, which is woken by whoever
// completes a request while nobody owns the output, and by a reader that finds the
// socket full. The owner sends until the queue is empty; nobody else wakes anybody.
type output struct {
	mu         sync.Mutex
	head, tail *op  // replies to be sent
	owned      bool // somebody owns the output
	waiting    bool // the reader waits for replies to be sent
	space      chan struct{}

	wake chan struct{} // passes the ownership to the sender

	// The reader's.
	claimed bool // it is the owner
	kick    bool // something was submitted since the last Kick
	batch   int  // bytes submitted since

	// The owner's.
	taken   *op // off the queue, not yet in vec
	sending *op // in vec
	vec     [][]byte
	all     [][]byte // vec's array from its start
	broken  error    // sending failed: replies are dropped from then on

	blockedSince atomic.Int64 // when sending began to wait, as UnixNano; 0 if it does not
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

// claim makes the reader the owner if there is none.
func (q *output) claim(s *session) {
	if q.claimed {
		return
	}
	q.mu.Lock()
	if !q.owned {
		q.owned, q.claimed = true, true
	}
	q.mu.Unlock()
}

// put queues a reply, on any goroutine.
func (q *output) put(s *session, o *op) {
	q.mu.Lock()
	if q.tail == nil {
		q.head = o
	} else {
		q.tail.next = o
	}
	q.tail = o
	wake := !q.owned
	if wake {
		q.owned = true
	}
	q.mu.Unlock()
	if wake {
		q.wake <- struct{}{} // has room: there is one ownership to pass
	}
}

// finishBatch carries out what was submitted, and sends what has completed. The
// reader calls it before anything that may wait.
func (s *session) finishBatch() {
	q := &s.output
	if q.kick {
		q.kick = false
		s.vol.Kick()
	}
	q.batch = 0
	if q.claimed {
		q.claimed = false
		s.send(false)
	}
}

// sendLoop is the sender goroutine.
func (s *session) sendLoop() {
	for range s.output.wake {
		s.send(true)
	}
}

// send sends replies until there are none and gives the ownership up. If it may not
// wait and the socket is full, it passes the ownership to the sender.
func (s *session) send(wait bool) {
	q := &s.output
	for {
		if len(q.vec) == 0 && !s.nextReplies() {
			return
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

func (s *session) sendSome(wait bool) (int, error) {
	q := &s.output
	if !wait {
		return s.link.trySend(q.vec)
	}
	q.blockedSince.Store(time.Now().UnixNano())
	n, err := s.link.send(q.vec)
	q.blockedSince.Store(0)
	return n, err
}

// breakOutput drops this and all further replies: the client cannot be reached. The
// reader finds out by itself, or is told by the closed connection.
func (s *session) breakOutput(err error) {
	q := &s.output
	if q.broken == nil {
		q.broken = err
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

// nextReplies frees what was sent and loads what is sent next; false if there is
// nothing, and then the output is no longer owned.
func (s *session) nextReplies() bool {
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
	for o := q.sending; o != nil; n++ {
		next := o.next
		o.free()
		o = next
	}
	q.sending = nil
	return n
}

// load moves replies from taken to vec.
func (q *output) load() {
	vec, bytes := q.all[:0], 0
	last := q.taken
	q.sending = q.taken
	for o := q.taken; o != nil; o = o.next {
		if len(vec) > 0 && (len(vec)+len(o.reply) > maxVector || bytes >= maxVectorBytes) {
			break
		}
		vec = append(vec, o.reply...)
		for _, p := range o.reply {
			bytes += len(p)
		}
		last = o
	}
	q.taken, last.next = last.next, nil
	q.all, q.vec = vec, vec
}
