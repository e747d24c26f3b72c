package peer

import (
	"sync"
	"sync/atomic"
	"time"
)

// frame is a message on its way out. It lies in what it belongs to.
type frame struct {
	next             *frame
	header           [headerSize]byte
	head, data, tail []byte
	loaded           bool // bytes of it may have left
	owner            sendable
}

// sendable is what a frame belongs to.
type sendable interface {
	// sent is called once for each put: the frame was sent, or never will be. Nothing of
	// it is used any more. It returns a call that is over by that. A lock may be held.
	sent() *Call
}

// output is the queue of frames of a connection and the right to send them. At any time
// at most one goroutine owns it: whoever flushes, a reader that works through a batch, or
// the sender goroutine, which is woken when there is nobody else, and when the socket is
// full. The owner sends until the queue is empty; nobody else needs to wake anybody.
type output struct {
	c *conn

	mu         sync.Mutex
	head, tail *frame
	owned      bool
	closed     bool

	wake chan struct{} // passes the ownership to the sender
	// blocked is since when sending waits for the other side, by ticks; 0: it does not.
	blocked atomic.Int64

	// The owner's.
	late    queue  // calls whose reply was here before all was done with their frame
	taken   *frame // off the queue, not yet in vec
	sending *frame // in vec
	vec     [][]byte
	all     [][]byte // vec's array from its start
}

const (
	// maxVector pieces, or maxVectorBytes, are sent at a time.
	maxVector      = 512
	maxVectorBytes = 1 << 20
)

func (o *output) init(c *conn) { o.c, o.wake = c, make(chan struct{}, 1) }

// put queues a frame. It stays until the next flush or wake, by anybody.
func (o *output) put(f *frame) {
	if o.add(f, false) {
		return
	}
	f.owner.sent()
}

// putWake queues a frame that leaves soon.
func (o *output) putWake(f *frame) {
	if o.add(f, true) {
		return
	}
	f.owner.sent()
}

func (o *output) add(f *frame, wake bool) bool {
	f.next, f.loaded = nil, false
	o.mu.Lock()
	if o.closed {
		o.mu.Unlock()
		return false
	}
	if o.tail == nil {
		o.head = f
	} else {
		o.tail.next = f
	}
	o.tail = f
	if wake = wake && !o.owned; wake {
		o.owned = true
	}
	o.mu.Unlock()
	if wake {
		o.wake <- struct{}{} // has room: there is one ownership to pass
	}
	return true
}

// remove takes a frame off the queue; false if it is not in there any more.
func (o *output) remove(f *frame) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	var last *frame
	for at := &o.head; *at != nil; last, at = *at, &(*at).next {
		if *at != f {
			continue
		}
		if *at = f.next; o.tail == f {
			o.tail = last
		}
		return true
	}
	return false
}

// claim makes the caller the owner if there is none; it must call send.
func (o *output) claim() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.owned || o.closed {
		return false
	}
	o.owned = true
	return true
}

// flush sends what is queued, as far as that needs no waiting.
func (o *output) flush() {
	o.mu.Lock()
	if o.owned || o.closed || o.head == nil {
		o.mu.Unlock()
		return
	}
	o.owned = true
	o.mu.Unlock()
	o.send(false)
}

// end drops what is queued and will be, and lets the sender return. The connection is closed.
func (o *output) end() {
	o.mu.Lock()
	wake := !o.owned && !o.closed
	o.closed = true
	if wake {
		o.owned = true
	}
	o.mu.Unlock()
	if wake {
		o.wake <- struct{}{}
	}
}

// sendLoop is the sender goroutine. It returns after end.
func (o *output) sendLoop() {
	for range o.wake {
		o.send(true)
		o.mu.Lock()
		over := o.closed
		o.mu.Unlock()
		if over {
			return
		}
	}
}

// send sends frames until there are none and gives the ownership up. If it may not wait
// and the socket is full, it passes the ownership to the sender.
func (o *output) send(wait bool) {
	for {
		if len(o.vec) == 0 && !o.next(wait) {
			return
		}
		if o.c.dead() {
			o.vec = o.vec[:0]
			continue
		}
		if wait && o.blocked.Load() == 0 {
			o.blocked.Store(ticks(time.Now()))
		}
		n, err := o.c.link.send(o.vec, wait)
		switch {
		case err == errWouldBlock:
			o.wake <- struct{}{}
			return
		case err != nil:
			o.c.fail(err)
		default:
			o.advance(n)
		}
	}
}

// advance takes n bytes that were sent off the front of vec.
func (o *output) advance(n int) {
	for len(o.vec) > 0 && n >= len(o.vec[0]) {
		n -= len(o.vec[0])
		o.vec = o.vec[1:]
	}
	if n > 0 {
		o.vec[0] = o.vec[0][n:]
	}
}

// next is done with what was sent and loads what is sent next; false if there is nothing,
// and then the output is no longer the caller's.
func (o *output) next(sender bool) bool {
	o.blocked.Store(0)
	o.finish()
	if o.late.n > 0 && !o.settle(sender) {
		return false
	}
	o.mu.Lock()
	if o.taken == nil {
		o.taken, o.head, o.tail = o.head, nil, nil
		for f := o.taken; f != nil; f = f.next {
			f.loaded = true
		}
	}
	pass := false
	if o.taken == nil {
		if !o.c.dead() && o.c.link.pending() {
			o.mu.Unlock()
			return true
		}
		if pass = o.closed && !sender; !pass {
			o.owned = false
		}
	}
	more := o.taken != nil
	o.mu.Unlock()
	if pass {
		o.wake <- struct{}{}
	}
	if more {
		o.load()
	}
	return more
}

// finish is done with the frames in vec.
func (o *output) finish() {
	clear(o.all)
	f := o.sending
	o.sending = nil
	for f != nil {
		next := f.next
		if c := f.owner.sent(); c != nil {
			o.late.push(c)
		}
		f = next
	}
}

// settle tells the owners of late calls. Only the sender does so: others have come here
// from Peer.Kick, whose callers need not expect any call to be done within it. It returns
// false if it has passed the ownership on.
func (o *output) settle(sender bool) bool {
	if !sender {
		o.wake <- struct{}{}
		return false
	}
	for c := o.late.pop(); c != nil; c = o.late.pop() {
		c.done()
	}
	o.c.settled()
	return true
}

// load moves frames from taken to vec.
func (o *output) load() {
	vec, bytes := o.all[:0], 0
	last := o.taken
	o.sending = o.taken
	for f := o.taken; f != nil && len(vec)+4 <= maxVector && bytes < maxVectorBytes; f = f.next {
		vec = append(vec, f.header[:])
		for _, p := range [...][]byte{f.head, f.data, f.tail} {
			if len(p) > 0 {
				vec = append(vec, p)
				bytes += len(p)
			}
		}
		last = f
	}
	o.taken, last.next = last.next, nil
	o.all, o.vec = vec, vec
}
