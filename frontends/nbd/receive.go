package nbd

import (
	"fmt"
	"sync/atomic"
	"time"

	"sheepdog/frontends/nbd/internal/wire"
)

// requests is the receive buffer: a chunk that write payloads are used in place from.
// The reader alone uses it.
type requests struct {
	chunk *chunk      // nil while idle
	slot  atomic.Bool // the session's own small chunk is in use
	r, w  int         // what was received and not yet decoded lies in chunk.b[r:w]
	need  int         // bytes from r on that make progress possible

	fill []byte // rest of a long payload: received before anything else
	// streaming: the last write was long. Then little is received beyond it, because
	// all of that would have to be copied to where the next payload goes.
	streaming bool

	big  bool // more comes at a time than fits a small chunk
	calm int  // receives since the last one that showed it
}

const (
	// calmAfter receives that would fit a small chunk, big ones are given up.
	calmAfter = 256
	// streamAhead is what is received beyond a long payload: the next header.
	streamAhead = 4 << 10
)

func (q *requests) received(n int) {
	q.w += n
	switch {
	case n < smallChunk && q.calm < calmAfter:
		q.calm++
	case n < smallChunk:
		q.big = false
	case !q.streaming:
		q.big, q.calm = true, 0
	}
}

func (q *requests) release() {
	if q.chunk != nil {
		q.chunk.unref()
		q.chunk = nil
	}
}

// buffers implements receiver.
func (s *session) buffers() (p, q []byte, err error) {
	in := &s.requests
	if len(in.fill) > 0 {
		if in.chunk != nil && in.chunk.refs.Load() == 1 { // all of it is decoded
			in.r, in.w = 0, 0
			q = in.chunk.b[:streamAhead]
		}
		return in.fill, q, nil
	}
	if err := s.makeRoom(); err != nil {
		return nil, nil, err
	}
	p = in.chunk.b[in.w:]
	if in.streaming && len(p) > streamAhead {
		p = p[:max(streamAhead, in.need-(in.w-in.r))]
	}
	return p, nil, nil
}

// idle implements receiver: the client has sent nothing more yet. Whatever can be
// answered is on its way, and the session holds no more memory than it needs.
func (s *session) idle() {
	s.finishBatch()
	in := &s.requests
	if in.chunk != nil && in.r == in.w && len(in.fill) == 0 && in.chunk.refs.Load() == 1 {
		in.release()
	}
	if s.arena.chunk != nil && s.arena.chunk.refs.Load() == 1 {
		s.arena.release()
	}
}

// makeRoom sees to it that need bytes from r on fit the chunk, and that it has room at all.
func (s *session) makeRoom() error {
	in := &s.requests
	if in.chunk == nil {
		return s.replaceChunk()
	}
	sole := in.chunk.refs.Load() == 1
	if in.r == in.w && sole {
		in.r, in.w = 0, 0
	}
	if len(in.chunk.b)-in.r >= in.need && len(in.chunk.b) > in.w {
		return nil
	}
	if sole && len(in.chunk.b) >= in.need {
		in.w = copy(in.chunk.b, in.chunk.b[in.r:in.w])
		in.r = 0
		return nil
	}
	return s.replaceChunk()
}

// replaceChunk takes a chunk in which need bytes fit, or waits until the one at hand
// is no longer used by requests in flight.
func (s *session) replaceChunk() error {
	in := &s.requests
	var next *chunk
	sole := false
	enough := func() bool {
		if in.chunk != nil && in.chunk.refs.Load() == 1 && len(in.chunk.b) >= in.need {
			sole = true
			return true
		}
		next = s.tryChunk(&in.slot, in.big || in.need > smallChunk)
		if next != nil && len(next.b) < in.need {
			next.unref()
			next = nil
		}
		return next != nil
	}
	if !enough() {
		if err := s.await(enough); err != nil {
			return err
		}
	}
	if sole {
		next = in.chunk
		next.refs.Add(1)
	}
	if in.chunk != nil {
		in.w = copy(next.b, in.chunk.b[in.r:in.w])
		in.r = 0
		in.chunk.unref()
	} else {
		in.r, in.w = 0, 0
	}
	in.chunk = next
	return nil
}

// decode carries out all requests that are received in full. io.EOF is NBD_CMD_DISC.
func (s *session) decode() error {
	in := &s.requests
	size := s.headers.RequestSize()
	for in.w-in.r >= size {
		r, ok := s.headers.ParseRequest(in.chunk.b[in.r:])
		if !ok {
			// Nothing tells where the next request begins.
			return fmt.Errorf("%w: request with a wrong magic number", errProtocol)
		}
		var have bool
		var err error
		if s.headers.HasPayload(&r) {
			have, err = s.withPayload(&r, size)
		} else {
			in.r += size
			have, err = true, s.take(&r, nil)
		}
		if !have || err != nil {
			return err
		}
	}
	in.need = size
	return nil
}

// withPayload takes a request that a payload follows; false if not all of it is here.
func (s *session) withPayload(r *wire.Request, size int) (bool, error) {
	in := &s.requests
	if r.Length > MaxPayload {
		// The specification lets a server end the session over a payload beyond the
		// advertised maximum; to read it all in order to go on would serve nobody.
		if err := s.reply(r, refuse(wire.NBD_EINVAL, "payload of %d bytes is longer than the maximum of %d", r.Length, MaxPayload)); err != nil {
			return true, err
		}
		return true, fmt.Errorf("%w: payload of %d bytes", errProtocol, r.Length)
	}
	n := int(r.Length)
	bad := s.check(r)
	switch {
	case bad == accepted && r.Type == wire.NBD_CMD_BLOCK_STATUS && n > 8+4*len(s.contexts):
		bad = refuse(wire.NBD_EINVAL, "block status payload of %d bytes for %d contexts", n, len(s.contexts))
	case bad == accepted && n > chunkDataMax || size+n > len(in.chunk.b) && bad == accepted && !s.growChunk(size+n):
		in.r += size
		in.streaming, in.big = true, false
		return true, s.takeLong(r)
	}
	if bad != accepted {
		in.r += size
		if err := s.skip(n); err != nil {
			return true, err
		}
		return true, s.reply(r, bad)
	}
	if in.w-in.r < size+n {
		in.need = size + n
		return false, nil
	}
	payload := in.chunk.b[in.r+size : in.r+size+n]
	in.r += size + n
	in.streaming = false
	return true, s.take(r, payload)
}

// growChunk changes to a chunk in which n bytes fit, without waiting.
func (s *session) growChunk(n int) bool {
	in := &s.requests
	in.big, in.calm = true, 0
	next := s.tryChunk(&in.slot, true)
	if next == nil {
		return false
	}
	if len(next.b) < n {
		next.unref()
		return false
	}
	in.w = copy(next.b, in.chunk.b[in.r:in.w])
	in.r = 0
	in.chunk.unref()
	in.chunk = next
	return true
}

// takeLong receives a long payload into a buffer of its own, then takes the write.
func (s *session) takeLong(r *wire.Request) error {
	o, err := s.newLongOp(r)
	if err != nil {
		return err
	}
	if err := s.receive(o.data); err != nil {
		o.free()
		return err
	}
	return s.submit(o)
}

// receive fills dst with what comes next.
func (s *session) receive(dst []byte) error {
	in := &s.requests
	n := copy(dst, in.chunk.b[in.r:in.w])
	in.r += n
	in.fill = dst[n:]
	defer func() {
		in.fill = nil
		s.fillSince.Store(0)
	}()
	for len(in.fill) > 0 {
		s.fillSince.Store(time.Now().UnixNano())
		n, err := s.link.recv(s)
		if err != nil {
			return s.readError(err)
		}
		k := min(n, len(in.fill))
		in.fill = in.fill[k:]
		in.w += n - k
	}
	return nil
}

// skip throws away n bytes of payload that nobody wants.
func (s *session) skip(n int) error {
	in := &s.requests
	k := min(n, in.w-in.r)
	in.r += k
	for n -= k; n > 0; n -= k {
		in.need = 1
		s.finishBatch() // before waiting: answers may be what the client waits for
		got, err := s.link.recv(s)
		if err != nil {
			return s.readError(err)
		}
		in.w += got
		k = min(n, in.w-in.r)
		in.r += k
	}
	return nil
}
