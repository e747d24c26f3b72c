package nbd

import (
	"fmt"

	"sheepdog/frontends/internal/stream"
	"sheepdog/frontends/nbd/internal/wire"
)

// decode carries out all requests that are received in full. io.EOF is NBD_CMD_DISC.
func (s *session) decode() error {
	size := s.headers.RequestSize()
	for len(s.stream.Buffered()) >= size {
		r, ok := s.headers.ParseRequest(s.stream.Buffered())
		if !ok {
			// Nothing tells where the next request begins.
			return fmt.Errorf("%w: request with a wrong magic number", errProtocol)
		}
		var have bool
		var err error
		if s.headers.HasPayload(&r) {
			have, err = s.withPayload(&r, size)
		} else {
			s.stream.Consume(size)
			have, err = true, s.take(&r, nil)
		}
		if !have || err != nil {
			return err
		}
	}
	s.stream.Need(size)
	return nil
}

// withPayload takes a request that a payload follows; false if not all of it is here.
func (s *session) withPayload(r *wire.Request, size int) (bool, error) {
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
	case bad == accepted && (n > stream.ChunkDataMax || !s.stream.Grow(size+n)):
		s.stream.Consume(size)
		s.stream.Streaming(true)
		return true, s.takeLong(r)
	}
	if bad != accepted {
		s.stream.Consume(size)
		if err := s.stream.Skip(n); err != nil {
			return true, readError(err)
		}
		return true, s.reply(r, bad)
	}
	if len(s.stream.Buffered()) < size+n {
		s.stream.Need(size + n)
		return false, nil
	}
	payload := s.stream.Buffered()[size : size+n]
	s.stream.Consume(size + n)
	s.stream.Streaming(false)
	return true, s.take(r, payload)
}

// takeLong receives a long payload into a buffer of its own, then takes the write.
func (s *session) takeLong(r *wire.Request) error {
	o, err := s.newLongOp(r)
	if err != nil {
		return err
	}
	if err := s.stream.Fill(o.data); err != nil {
		o.free()
		return readError(err)
	}
	return s.submit(o)
}
