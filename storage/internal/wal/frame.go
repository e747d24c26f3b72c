package wal

import (
	"encoding/binary"

	"github.com/zeebo/xxh3"

	"sheepdog/storage/object"
)

// A frame is what one write call puts into a segment: a header, the payloads of all
// its records, and the records. It starts on a sector boundary, so that no sector
// holding a synced frame is ever written again. The header's checksum covers the
// header and, through it, the records; payloads are covered by the block checksums
// inside the records, which have to be computed anyway.
const (
	frameMagic       = 0x31454d4152465653 // "SVFRAME1"
	frameHeaderBytes = 64
	sectorBytes      = object.SectorSize
)

// frameHeader is the decoded form of a frame's first 64 bytes.
type frameHeader struct {
	segment  uint32 // sequence number of the segment: stale bytes of a recycled segment never match
	count    uint32 // records
	firstLSN uint64
	synced   uint64 // every LSN up to this was durable when the frame was written
	payload  uint32 // bytes
	desc     uint32 // bytes of encoded records behind the payload
	descSum  uint64
	boot     uint32 // the segment's: sequence numbers of lost segments are used again, with another boot
}

func (h *frameHeader) encode(b []byte) {
	le := binary.LittleEndian
	le.PutUint64(b[0:], frameMagic)
	le.PutUint32(b[16:], h.segment)
	le.PutUint32(b[20:], h.count)
	le.PutUint64(b[24:], h.firstLSN)
	le.PutUint64(b[32:], h.synced)
	le.PutUint32(b[40:], h.payload)
	le.PutUint32(b[44:], h.desc)
	le.PutUint64(b[48:], h.descSum)
	le.PutUint32(b[56:], h.boot)
	le.PutUint32(b[60:], 0)
	le.PutUint64(b[8:], xxh3.Hash(b[16:frameHeaderBytes]))
}

func (h *frameHeader) decode(b []byte) bool {
	le := binary.LittleEndian
	if len(b) < frameHeaderBytes || le.Uint64(b) != frameMagic || le.Uint64(b[8:]) != xxh3.Hash(b[16:frameHeaderBytes]) {
		return false
	}
	*h = frameHeader{
		segment: le.Uint32(b[16:]), count: le.Uint32(b[20:]),
		firstLSN: le.Uint64(b[24:]), synced: le.Uint64(b[32:]),
		payload: le.Uint32(b[40:]), desc: le.Uint32(b[44:]), descSum: le.Uint64(b[48:]), boot: le.Uint32(b[56:]),
	}
	return h.count > 0
}

// bytes is the length of the frame without padding.
func (h *frameHeader) bytes() int64 {
	return frameHeaderBytes + int64(h.payload) + int64(h.desc)
}

func (h *frameHeader) lastLSN() uint64 { return h.firstLSN + uint64(h.count) - 1 }

func roundUp(n int64) int64 { return (n + sectorBytes - 1) &^ (sectorBytes - 1) }

// frameAt decodes the frame at off of a segment's bytes, without looking at its
// payload. ok is false when there is no whole, intact frame of that segment.
func frameAt(seg []byte, off int64, sequence, boot uint32) (h frameHeader, desc []byte, ok bool) {
	if off < 0 || off+frameHeaderBytes > int64(len(seg)) || !h.decode(seg[off:]) || h.segment != sequence || h.boot != boot {
		return h, nil, false
	}
	if off+h.bytes() > int64(len(seg)) {
		return h, nil, false
	}
	desc = seg[off+frameHeaderBytes+int64(h.payload):][:h.desc]
	return h, desc, xxh3.Hash(desc) == h.descSum
}
