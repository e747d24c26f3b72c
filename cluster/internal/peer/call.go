package peer

import (
	"sync/atomic"
	"time"
)

// Call is a request to another node, and later its outcome. Its owner allocates it and
// may use it again and again.
//
// From Submit to Done the Call and all that it refers to belong to the transport. Done
// is called exactly once, on any goroutine of the transport or, if there is no
// connection or no room, within Submit; never within Kick. No lock of the transport is
// held. It must not wait. After each batch of Dones on a goroutine of the transport
// comes a Handler.Kick.
type Call struct {
	Class Class
	Op    uint16
	Head  []byte // at most MaxHead bytes; what the request is
	Data  []byte // at most MaxData bytes with Tail; not copied, but for TLS
	Tail  []byte // follows Data: to the other side they are one
	// Want is for how much data in the reply there is room, in bytes. With ReplyData nil
	// the transport takes a buffer for what comes: then Release gives it back. Else
	// ReplyData has that length, or Want is 0 and stands for its length.
	Want int
	// Deadline is when the call fails with ErrTimeout at the latest, give or take a
	// quarter of a second; zero: never. Data that is being sent then is finished first.
	Deadline time.Time

	ReplyHead []byte // the reply's head, appended to ReplyHead[:0]
	ReplyData []byte // the reply's data: a prefix of what was given
	Err       error  // how it failed
	Done      func(*Call)
	State     any // the owner's

	frame  frame
	next   *Call // in a queue
	lane   *lane
	holds  atomic.Int32 // the output's and the reply's; who lets go of the last one calls Done
	want   int
	cost   int64
	slot   int
	buffer *buffer
}

// Sent reports, after Done, whether the other node may have seen any of the request.
func (c *Call) Sent() bool { return c.frame.loaded }

// Release gives back a buffer that the transport took for ReplyData. Not to be called
// twice; needless, but cheap, if there is none.
func (c *Call) Release() {
	if c.buffer != nil {
		c.buffer.free()
		c.buffer, c.ReplyData = nil, nil
	}
}

// prepare checks a call and makes it ready to be queued.
func (c *Call) prepare(l *lane) error {
	c.lane, c.next, c.Err, c.buffer = l, nil, nil, nil
	c.frame.owner, c.frame.loaded = c, false
	c.want = max(c.Want, len(c.ReplyData))
	n := len(c.Data) + len(c.Tail)
	if len(c.Head) > MaxHead || n > MaxData || c.want > MaxData || c.ReplyData != nil && c.want > len(c.ReplyData) {
		return ErrTooLong
	}
	c.cost = int64(len(c.Head) + n + c.want)
	return nil
}

// arm gives a call its place among those under way.
func (c *Call) arm(slot int, id, seed uint64) {
	c.slot = slot
	h := header{
		typ: frameRequest, op: c.Op, id: id, want: uint32(c.want),
		head: uint16(len(c.Head)), data: uint32(len(c.Data) + len(c.Tail)),
	}
	c.frame.head, c.frame.data, c.frame.tail = c.Head, c.Data, c.Tail
	h.encode(&c.frame.header, seed)
	c.holds.Store(2)
}

// sent implements sendable.
func (c *Call) sent() *Call {
	if c.holds.Add(-1) > 0 {
		return nil
	}
	return c
}

// finish is the end of the reply's side, with the outcome. Only who took the call from
// its slot or its queue may call it.
func (c *Call) finish(err error) {
	c.Err = err
	if c.holds.Add(-1) == 0 {
		c.done()
	}
}

func (c *Call) done() {
	c.frame.head, c.frame.data, c.frame.tail, c.lane = nil, nil, nil, nil
	c.Done(c)
}

// abort ends a call that was never given to the output.
func (c *Call) abort(err error) {
	c.holds.Store(1)
	c.finish(err)
}

// queue is a list of calls.
type queue struct {
	head, tail *Call
	n          int
	bytes      int64
}

func (q *queue) push(c *Call) {
	c.next = nil
	if q.tail == nil {
		q.head = c
	} else {
		q.tail.next = c
	}
	q.tail = c
	q.n++
	q.bytes += c.cost
}

func (q *queue) pop() *Call {
	c := q.head
	if c == nil {
		return nil
	}
	if q.head = c.next; q.head == nil {
		q.tail = nil
	}
	c.next = nil
	q.n--
	q.bytes -= c.cost
	return c
}

// abort aborts all calls of the queue.
func (q *queue) abort(err error) {
	for c := q.pop(); c != nil; c = q.pop() {
		c.abort(err)
	}
}
