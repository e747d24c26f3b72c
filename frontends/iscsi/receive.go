package iscsi

import (
	"fmt"

	"sheepdog/frontends/internal/stream"
	"sheepdog/frontends/iscsi/internal/login"
	"sheepdog/frontends/iscsi/internal/pdu"
	"sheepdog/frontends/iscsi/internal/scsi"
)

// segment is the data segment of the PDU at hand. If it is whole, it lies in the receive
// buffer and its digest is right; else it is still to be received.
type segment struct {
	size  int // without padding
	whole []byte
	left  int // of what is still to be received
	// damaged: it was thrown away because its digest is wrong.
	damaged bool
	sum     []byte // what was received, for the digest
}

// longest PDU that is received in one piece, in bytes.
const wholeMax = stream.ChunkDataMax + pdu.HeaderSize + 1024

// decode carries out all requests that are received in full.
func (s *session) decode() error {
	for len(s.stream.Buffered()) >= pdu.HeaderSize {
		have, err := s.next()
		if !have || err != nil {
			return err
		}
	}
	s.stream.Need(pdu.HeaderSize)
	return nil
}

// next takes one PDU; false if not all that is needed of it is here.
func (s *session) next() (bool, error) {
	h := pdu.Header(s.stream.Buffered()[:pdu.HeaderSize])
	if err := s.checkHeader(&h); err != nil {
		return true, err
	}
	head := pdu.HeaderSize + h.ExtraSize()
	if s.params.HeaderDigest {
		head += pdu.DigestSize
	}
	if !s.has(head) {
		return false, nil
	}
	if s.params.HeaderDigest {
		b := s.stream.Buffered()[:head]
		if d := pdu.Digest(b[:head-pdu.DigestSize]); string(d[:]) != string(b[head-pdu.DigestSize:]) {
			// Nothing tells where the next PDU begins (RFC 7143 section 7.7).
			return true, errDigest
		}
	}
	seg := segment{size: h.DataSize()}
	tail := s.tailSize(seg.size)
	if total := head + seg.size + tail; seg.size > 0 && total <= wholeMax && s.stream.Grow(total) {
		if !s.has(total) {
			return false, nil
		}
		b := s.stream.Buffered()[head:total]
		s.stream.Streaming(false)
		if !s.rightDigest(b) {
			s.stream.Consume(total)
			return true, s.badDigest(&h)
		}
		seg.whole = b[:seg.size]
		err := s.dispatch(&h, &seg)
		s.stream.Consume(total)
		if err == nil {
			err = s.proceed()
		}
		return true, err
	}
	s.stream.Consume(head)
	seg.left = seg.size
	if seg.size > 0 {
		s.stream.Streaming(true)
	}
	err := s.dispatch(&h, &seg)
	if err == nil {
		err = s.endSegment(&h, &seg)
	}
	if err == nil {
		err = s.proceed()
	}
	return true, err
}

// has reports whether n bytes are here, and waits for them if not.
func (s *session) has(n int) bool {
	if len(s.stream.Buffered()) >= n {
		return true
	}
	s.stream.Need(n)
	return false
}

// tailSize is the length of padding and digest behind a data segment.
func (s *session) tailSize(n int) int {
	if n == 0 {
		return 0
	}
	tail := pdu.Padded(n) - n
	if s.params.DataDigest {
		tail += pdu.DigestSize
	}
	return tail
}

// checkHeader refuses what nobody could go on after.
func (s *session) checkHeader(h *pdu.Header) error {
	if h.DataSize() > login.MaxReceive {
		return fmt.Errorf("%w: a data segment of %d bytes, the most is %d", errProtocol, h.DataSize(), login.MaxReceive)
	}
	if h.ExtraSize() > 0 && h.Op() != pdu.OpCommand {
		return fmt.Errorf("%w: additional header segments of a PDU that has none", errProtocol)
	}
	return nil
}

func (s *session) rightDigest(b []byte) bool {
	if !s.params.DataDigest {
		return true
	}
	at := len(b) - pdu.DigestSize
	d := pdu.Digest(b[:at])
	return string(d[:]) == string(b[at:])
}

// badDigest deals with a PDU whose data is damaged (RFC 7143 section 7.8): data that belongs
// to a command makes the command fail in the end; anything else is discarded, and
// the number of a command that is missing then ends the session.
func (s *session) badDigest(h *pdu.Header) error {
	s.reject(h, pdu.RejectDataDigest)
	if h.Op() != pdu.OpDataOut {
		return nil
	}
	if err := s.takeData(h, &segment{size: h.DataSize(), damaged: true}); err != nil {
		return err
	}
	return s.proceed()
}

// read receives the next n bytes of a segment into dst.
func (s *session) read(seg *segment, dst []byte) error {
	if seg.whole != nil {
		seg.whole = seg.whole[copy(dst, seg.whole):]
		return nil
	}
	if err := s.stream.Fill(dst); err != nil {
		return err
	}
	seg.left -= len(dst)
	if s.params.DataDigest {
		seg.sum = dst
	}
	return nil
}

// endSegment receives what is left of a segment, and checks its digest.
func (s *session) endSegment(h *pdu.Header, seg *segment) error {
	if seg.size == 0 {
		return nil
	}
	tail := s.tailSize(seg.size)
	if seg.left == seg.size || !s.params.DataDigest { // nobody has used any of it, or nobody can tell
		return s.stream.Skip(seg.left + tail)
	}
	var b [64]byte
	d := pdu.Digest(seg.sum)
	rest := make([]byte, 0, seg.left+tail)
	if seg.left+tail <= len(b) {
		rest = b[:0]
	}
	rest = rest[:seg.left+tail]
	if err := s.stream.Fill(rest); err != nil {
		return err
	}
	at := len(rest) - pdu.DigestSize
	if at > 0 {
		d = pdu.Digest(seg.sum, rest[:at])
	}
	if string(d[:]) != string(rest[at:]) {
		s.reject(h, pdu.RejectDataDigest)
		if t := s.current; t != nil {
			t.refuse(scsi.Outcome{Status: scsi.StatusCheck, Sense: scsi.Sense{Code: scsi.ServiceCRC}})
		}
	}
	return nil
}

// dispatch carries out a PDU.
func (s *session) dispatch(h *pdu.Header, seg *segment) error {
	if s.stream.InFlight() >= maxAnswers {
		if err := s.stream.Await(func() bool { return s.stream.InFlight() < maxAnswers }); err != nil {
			return err
		}
	}
	s.stream.Claim()
	if h.Op() == pdu.OpDataOut {
		return s.takeData(h, seg)
	}
	take, err := s.order(h)
	if !take || err != nil {
		return err
	}
	switch h.Op() {
	case pdu.OpCommand:
		return s.takeCommand(h, seg)
	case pdu.OpNOPOut:
		return s.takeNOP(h, seg)
	case pdu.OpTask:
		return s.takeManagement(h)
	case pdu.OpText:
		return s.takeText(h, seg)
	case pdu.OpLogout:
		return s.takeLogout(h)
	case pdu.OpSNACK:
		s.reject(h, pdu.RejectSNACK) // error recovery level 0 has none
		return nil
	case pdu.OpLogin:
		s.reject(h, pdu.RejectProtocol)
		return fmt.Errorf("%w: a login in the full feature phase", errProtocol)
	}
	s.reject(h, pdu.RejectUnsupported)
	if !h.Immediate() {
		s.credit()
	}
	return nil
}
