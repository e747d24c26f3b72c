package peer

import (
	"sync/atomic"
	"time"
)

// inbox is where a connection receives. Only the reader uses it, but for released.
type inbox struct {
	c      *conn
	budget *budget // of big chunks; nil: they are not counted
	own    chunk   // the small one that is always there

	chunk *chunk // nil while idle
	r, w  int    // received and not yet decoded: chunk.b[r:w]
	need  int    // bytes from r on that make progress possible

	fill []byte // rest of long data: received before anything else
	// streaming: the last message was long. Then little is received beyond it, since all
	// of that would have to be copied to where the next long data goes.
	streaming bool
	busy      bool // more comes at a time than fits the small chunk
	since     atomic.Int64

	pause   func()        // called before the reader waits for other than the socket
	space   chan struct{} // somebody released something while waiting was set
	waiting atomic.Bool
}

// streamAhead is what is received beyond long data, in bytes: the next header.
const streamAhead = headerSize + MaxHead

func (in *inbox) init(c *conn, b *budget) {
	in.c, in.budget, in.need, in.space = c, b, headerSize, make(chan struct{}, 1)
	in.own.inbox = in
}

func (in *inbox) received(n int) {
	if len(in.fill) > 0 {
		in.fill = in.fill[n:]
		return
	}
	in.w += n
	if !in.streaming && in.w == len(in.chunk.b) {
		in.busy = true
	}
}

// buffer implements source.
func (in *inbox) buffer() ([]byte, error) {
	if len(in.fill) > 0 {
		return in.fill, nil
	}
	if err := in.makeRoom(); err != nil {
		return nil, err
	}
	p := in.chunk.b[in.w:]
	if in.streaming {
		p = p[:min(len(p), max(streamAhead, in.need-(in.w-in.r)))]
	}
	return p, nil
}

// idle implements source: nothing more has come, so little memory is held meanwhile.
func (in *inbox) idle() {
	if in.chunk != nil && in.r == in.w && len(in.fill) == 0 && in.chunk.refs.Load() == 1 {
		in.busy = false
		in.drop()
	}
}

func (in *inbox) drop() {
	if in.chunk != nil {
		in.chunk.unref()
		in.chunk = nil
	}
}

// makeRoom sees to it that need bytes from r on fit the chunk, and that it has room at all.
func (in *inbox) makeRoom() error {
	if c := in.chunk; c != nil {
		sole := c.refs.Load() == 1
		if in.r == in.w && sole {
			in.r, in.w = 0, 0
		}
		switch {
		case in.busy && len(c.b) == smallChunk && in.replace():
			return nil
		case len(c.b)-in.r >= in.need && len(c.b) > in.w:
			return nil
		case sole:
			in.w = copy(c.b, c.b[in.r:in.w])
			in.r = 0
			return nil
		}
	}
	return in.await(in.replace)
}

// replace goes on in another chunk; false if there is none now.
func (in *inbox) replace() bool {
	c := in.chunk
	var next *chunk
	switch {
	case c != nil && c.refs.Load() == 1 && len(c.b) == bigChunk:
		in.w = copy(c.b, c.b[in.r:in.w])
		in.r = 0
		return true
	case (c != nil || in.busy || in.own.refs.Load() > 0) && (in.budget == nil || in.budget.tryChunk()):
		// A request that takes long may hold the small one.
		next = bigChunks.Get().(*chunk)
		next.inbox = in
		if in.budget != nil {
			next.cost = bigChunk
		}
	case in.own.refs.Load() == 0:
		if next = &in.own; next.b == nil {
			next.b = make([]byte, smallChunk)
		}
	case c != nil && c.refs.Load() == 1:
		in.w = copy(c.b, c.b[in.r:in.w])
		in.r = 0
		return true
	default:
		return false
	}
	next.refs.Store(1)
	var rest []byte
	if c != nil {
		rest = c.b[in.r:in.w]
	}
	in.r, in.w = 0, copy(next.b, rest)
	in.drop()
	in.chunk = next
	return true
}

// released is told by chunks and requests that something is free again.
func (in *inbox) released(cost int64) {
	if cost > 0 {
		in.budget.chunks.Add(-cost)
	}
	if in.waiting.Load() {
		select {
		case in.space <- struct{}{}:
		default:
		}
	}
}

// await waits until ok, which becomes true by something being released. It fails when
// the connection does.
func (in *inbox) await(ok func() bool) error {
	if ok() {
		return nil
	}
	if in.pause != nil {
		in.pause()
	}
	// Meanwhile it is not the other side that is silent.
	defer in.c.listening.Store(in.c.listening.Swap(false))
	in.waiting.Store(true)
	defer in.waiting.Store(false)
	for !ok() {
		select {
		case <-in.space:
		case <-in.c.failed:
			return in.c.err
		}
	}
	return nil
}

// next decodes the header of the next message. ok is false if not all that is needed of
// it is here: its header and head, and its data unless that is long.
func (in *inbox) next() (h header, ok bool, err error) {
	in.need = headerSize
	if in.chunk == nil || in.w-in.r < headerSize {
		return h, false, nil
	}
	if h, err = decodeHeader(in.chunk.b[in.r:in.r+headerSize], in.c.seed); err != nil {
		return h, false, err
	}
	in.need += int(h.head)
	if !h.long() {
		in.need += int(h.data)
	}
	if in.w-in.r < in.need {
		return h, false, nil
	}
	in.streaming = h.long()
	return h, true, nil
}

// long reports whether a message's data does not stay in the chunk.
func (h *header) long() bool { return h.data > inPlaceMax }

// take takes n bytes that are here. They stay valid until the next receive, or as long
// as a reference to the chunk is held.
func (in *inbox) take(n int) []byte {
	p := in.chunk.b[in.r : in.r+n : in.r+n]
	in.r += n
	return p
}

// receive fills dst with what comes next.
func (in *inbox) receive(dst []byte) error {
	n := min(len(dst), in.w-in.r)
	copy(dst, in.take(n))
	in.fill = dst[n:]
	if len(in.fill) == 0 {
		return nil
	}
	in.since.Store(ticks(time.Now()))
	defer func() {
		in.fill = nil
		in.since.Store(0)
	}()
	for len(in.fill) > 0 {
		if err := in.c.receive(); err != nil {
			return err
		}
	}
	return nil
}

// skip throws away n bytes.
func (in *inbox) skip(n int) error {
	if n == 0 {
		return nil
	}
	b := newBuffer(min(n, bigChunk))
	defer b.free()
	for n > 0 {
		k := min(n, len(b.b))
		if err := in.receive(b.b[:k]); err != nil {
			return err
		}
		n -= k
	}
	return nil
}
