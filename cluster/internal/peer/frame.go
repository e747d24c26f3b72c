package peer

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/zeebo/xxh3"
)

// Bounds of a message, in bytes.
const (
	// MaxHead bounds the head of a request or a reply.
	MaxHead = 4 << 10
	// MaxData bounds the data of a request or a reply: 4 MiB and what describes them.
	MaxData = 4<<20 + 64<<10
)

// Every message after the hello is a frame: a header of 32 bytes, a head, data.
// Numbers are little-endian.
//
//	 0  4  magic "SHPF"
//	 4  1  type
//	 5  1  zero
//	 6  2  request: operation; reply: code of failure, 0 for success
//	 8  8  id: of a request: count of the connection's requests in the upper 48 bits,
//	       a slot of the sender in the lower 16; of a reply: the request's
//	16  4  length of the data
//	20  4  request: how much data the reply may carry
//	24  2  length of the head
//	26  2  zero
//	28  4  lower half of the xxh3 of the 28 bytes above, seeded with what both sides
//	       said in the hello: what was recorded on another connection is garbage on this one
const (
	headerSize = 32
	frameMagic = 0x46504853
)

type frameType uint8

const (
	frameRequest frameType = 1 + iota
	frameReply
	framePing // id: the sender's clock, which the pong repeats
	framePong
	frameTypes
)

// header is a decoded frame header.
type header struct {
	typ  frameType
	op   uint16
	id   uint64
	data uint32
	want uint32
	head uint16
}

// slotBits of an id are the sender's slot.
const slotBits = 16

func (h *header) count() uint64 { return h.id >> slotBits }
func (h *header) slot() int     { return int(h.id & (1<<slotBits - 1)) }

// size is the length of the whole frame.
func (h *header) size() int { return headerSize + int(h.head) + int(h.data) }

func (h *header) encode(b *[headerSize]byte, seed uint64) {
	binary.LittleEndian.PutUint32(b[0:], frameMagic)
	b[4], b[5] = byte(h.typ), 0
	binary.LittleEndian.PutUint16(b[6:], h.op)
	binary.LittleEndian.PutUint64(b[8:], h.id)
	binary.LittleEndian.PutUint32(b[16:], h.data)
	binary.LittleEndian.PutUint32(b[20:], h.want)
	binary.LittleEndian.PutUint16(b[24:], h.head)
	binary.LittleEndian.PutUint16(b[26:], 0)
	binary.LittleEndian.PutUint32(b[28:], uint32(xxh3.HashSeed(b[:28], seed)))
}

// errProtocol ends a connection: nothing that comes after can be believed.
var errProtocol = errors.New("node violates the protocol")

// decodeHeader checks all that a header says by itself. b has headerSize bytes.
func decodeHeader(b []byte, seed uint64) (h header, err error) {
	if binary.LittleEndian.Uint32(b) != frameMagic {
		return h, fmt.Errorf("%w: message with a wrong magic number", errProtocol)
	}
	if binary.LittleEndian.Uint32(b[28:]) != uint32(xxh3.HashSeed(b[:28], seed)) {
		return h, fmt.Errorf("%w: header's checksum does not match", errProtocol)
	}
	h = header{
		typ:  frameType(b[4]),
		op:   binary.LittleEndian.Uint16(b[6:]),
		id:   binary.LittleEndian.Uint64(b[8:]),
		data: binary.LittleEndian.Uint32(b[16:]),
		want: binary.LittleEndian.Uint32(b[20:]),
		head: binary.LittleEndian.Uint16(b[24:]),
	}
	return h, h.check(b)
}

func (h *header) check(b []byte) error {
	switch {
	case h.typ == 0 || h.typ >= frameTypes || b[5] != 0 || b[26] != 0 || b[27] != 0:
		return fmt.Errorf("%w: message of unknown type %d", errProtocol, h.typ)
	case h.head > MaxHead || h.data > MaxData || h.want > MaxData:
		return fmt.Errorf("%w: message of %d + %d bytes, asking for %d", errProtocol, h.head, h.data, h.want)
	case h.typ != frameRequest && h.want != 0:
		return fmt.Errorf("%w: reply that asks for a reply", errProtocol)
	case h.typ == frameReply && h.op != 0 && h.data != 0:
		return fmt.Errorf("%w: failure with data", errProtocol)
	case (h.typ == framePing || h.typ == framePong) && (h.head != 0 || h.data != 0 || h.op != 0):
		return fmt.Errorf("%w: heartbeat with content", errProtocol)
	}
	return nil
}
