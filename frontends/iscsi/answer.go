package iscsi

import (
	"encoding/binary"

	"sheepdog/frontends/internal/stream"
	"sheepdog/frontends/iscsi/internal/pdu"
)

// answer is any PDU to the initiator that is not the answer to a SCSI command.
type answer struct {
	stream.Queued
	s      *session
	header pdu.Header
	data   []byte
	number numbering
	credit bool // it answers a command of the window
	cost   int64
	pieces [4][]byte
	tail   [3 + pdu.DigestSize]byte
	digest [pdu.DigestSize]byte
}

// numbering says what StatSN an answer has.
type numbering uint8

const (
	takesSN numbering = iota // its own
	noSN                     // that of the next status, as R2T and pings have it
)

// answer queues a PDU. data must not change any more. From any goroutine.
func (s *session) answer(h pdu.Header, data []byte, n numbering) {
	s.put(&answer{header: h, data: data, number: n})
}

// finish queues the answer to the request q.
func (s *session) finish(q *pdu.Header, h pdu.Header, data []byte) {
	s.put(&answer{header: h, data: data, credit: !q.Immediate()})
}

func (s *session) put(a *answer) {
	a.s = s
	s.stream.CountIn()
	s.stream.Put(a)
}

// Render implements stream.Item.
func (a *answer) Render() [][]byte {
	if a.credit {
		a.s.credit()
	}
	a.header.SetNumbers(a.s.numbers(a.number == takesSN))
	return a.s.frame(a.pieces[:0], &a.header, a.data, a.digest[:], a.tail[:])
}

// Sent implements stream.Item.
func (a *answer) Sent() {
	if a.cost != 0 {
		a.s.stream.Uncharge(a.cost)
	}
}

// frame appends a PDU to pieces: header, header digest, data, padding and data digest, which are
// made in the buffers digest and tail.
func (s *session) frame(pieces [][]byte, h *pdu.Header, data, digest, tail []byte) [][]byte {
	pieces = append(pieces, h[:])
	if s.params.HeaderDigest {
		d := pdu.Digest(h[:])
		pieces = append(pieces, digest[:copy(digest, d[:])])
	}
	if len(data) == 0 {
		return pieces
	}
	pieces = append(pieces, data)
	pad := pdu.Padded(len(data)) - len(data)
	clear(tail[:pad])
	n := pad
	if s.params.DataDigest {
		d := pdu.Digest(data, tail[:pad])
		n += copy(tail[pad:], d[:])
	}
	if n > 0 {
		pieces = append(pieces, tail[:n])
	}
	return pieces
}

// reject answers a PDU that is not understood or not allowed with its header.
func (s *session) reject(q *pdu.Header, reason byte) {
	s.stats.rejects.Add(1)
	head := *q
	s.answer(pdu.Reject(reason), head[:], takesSN)
}

// senseSegment is the data segment of a response with sense data.
func senseSegment(sense []byte) []byte {
	return append(binary.BigEndian.AppendUint16(make([]byte, 0, 2+len(sense)), uint16(len(sense))), sense...)
}
