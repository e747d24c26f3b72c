package stream

import (
	"errors"
	"io"
	"sync/atomic"
	"time"
)

// input is the receive buffer: a chunk that payloads are used in place from.
type input struct {
	chunk *Chunk      // nil while idle
	slot  atomic.Bool // the session's own small chunk is in use
	r, w  int         // what was received and not yet consumed lies in chunk.b[r:w]
	need  int         // bytes from r on that make progress possible

	fill []byte // rest of a long payload: received before anything else
	// streaming: the last payload was long. Then little is received beyond it, because
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

// Buffered is what was received and not yet consumed. It is valid until the next call of
// a method that receives; longer for who pins it.
func (s *Stream) Buffered() []byte {
	if s.in.chunk == nil {
		return nil
	}
	return s.in.chunk.b[s.in.r:s.in.w]
}

// Consume takes n bytes off the front of Buffered.
func (s *Stream) Consume(n int) { s.in.r += n }

// Pin keeps the memory of Buffered, as it is now, until the chunk is let go of.
func (s *Stream) Pin() *Chunk {
	s.in.chunk.refs.Add(1)
	return s.in.chunk
}

// Need says that nothing can be done before Buffered has n bytes, BigChunk at most.
func (s *Stream) Need(n int) { s.in.need = n }

// Streaming says whether the payload at hand is a long one that is received elsewhere.
func (s *Stream) Streaming(on bool) {
	s.in.streaming = on
	if on {
		s.in.big = false
	}
}

// Receive waits for more to be in Buffered. What was submitted is carried out before
// it waits.
func (s *Stream) Receive() error {
	n, err := s.link.recv(s)
	if err != nil {
		return s.readError(err, len(s.Buffered()) > 0)
	}
	s.in.received(n)
	return nil
}

// readError says why receiving ended, within something or not.
func (s *Stream) readError(err error, within bool) error {
	switch {
	case s.taking.Err() != nil:
		return ErrStopped
	case within && errors.Is(err, io.EOF):
		return errShort
	}
	return err
}

func (q *input) received(n int) {
	q.w += n
	switch {
	case n < SmallChunk && q.calm < calmAfter:
		q.calm++
	case n < SmallChunk:
		q.big = false
	case !q.streaming:
		q.big, q.calm = true, 0
	}
}

func (q *input) release() {
	if q.chunk != nil {
		q.chunk.Unref()
		q.chunk = nil
	}
}

// buffers implements receiver.
func (s *Stream) buffers() (p, q []byte, err error) {
	in := &s.in
	if len(in.fill) > 0 {
		if in.chunk != nil && in.chunk.refs.Load() == 1 { // all of it is consumed
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
func (s *Stream) idle() {
	if s.empty != nil {
		s.empty()
	}
	s.FinishBatch()
	in := &s.in
	if in.chunk != nil && in.r == in.w && len(in.fill) == 0 && in.chunk.refs.Load() == 1 {
		in.release()
	}
	if s.arena.chunk != nil && s.arena.chunk.refs.Load() == 1 {
		s.arena.release()
	}
}

// makeRoom sees to it that need bytes from r on fit the chunk, and that it has room at all.
func (s *Stream) makeRoom() error {
	in := &s.in
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
func (s *Stream) replaceChunk() error {
	in := &s.in
	var next *Chunk
	sole := false
	enough := func() bool {
		if in.chunk != nil && in.chunk.refs.Load() == 1 && len(in.chunk.b) >= in.need {
			sole = true
			return true
		}
		next = s.tryChunk(&in.slot, in.big || in.need > SmallChunk)
		if next != nil && len(next.b) < in.need {
			next.Unref()
			next = nil
		}
		return next != nil
	}
	if !enough() {
		if err := s.Await(enough); err != nil {
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
		in.chunk.Unref()
	} else {
		in.r, in.w = 0, 0
	}
	in.chunk = next
	return nil
}

// Grow reports whether n bytes from the front of Buffered on fit the buffer, after trying
// to get a bigger one, without waiting.
func (s *Stream) Grow(n int) bool {
	in := &s.in
	if n <= len(in.chunk.b) {
		return true
	}
	in.big, in.calm = true, 0
	next := s.tryChunk(&in.slot, true)
	if next == nil {
		return false
	}
	if len(next.b) < n {
		next.Unref()
		return false
	}
	in.w = copy(next.b, in.chunk.b[in.r:in.w])
	in.r = 0
	in.chunk.Unref()
	in.chunk = next
	return true
}

// Fill fills dst with what comes next, waiting for it.
func (s *Stream) Fill(dst []byte) error {
	in := &s.in
	n := copy(dst, s.Buffered())
	in.r += n
	in.fill = dst[n:]
	defer func() {
		in.fill = nil
		s.fillSince.Store(0)
	}()
	for len(in.fill) > 0 {
		s.fillSince.Store(Ticks(time.Now()))
		n, err := s.link.recv(s)
		if err != nil {
			return s.readError(err, true)
		}
		k := min(n, len(in.fill))
		in.fill = in.fill[k:]
		in.w += n - k
	}
	return nil
}

// Skip throws away n bytes that nobody wants.
func (s *Stream) Skip(n int) error {
	in := &s.in
	k := min(n, in.w-in.r)
	in.r += k
	for n -= k; n > 0; n -= k {
		in.need = 1
		s.FinishBatch() // before waiting: answers may be what the client waits for
		got, err := s.link.recv(s)
		if err != nil {
			return s.readError(err, true)
		}
		in.w += got
		k = min(n, in.w-in.r)
		in.r += k
	}
	return nil
}
