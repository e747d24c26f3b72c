package wire

import (
	"encoding/binary"
	"time"
)

// The inode object of a VDI, in bytes: a header, then a map of vids.
const (
	InodeHeaderSize = 4664
	MapEntries      = 1 << 20
	InodeSize       = InodeHeaderSize + 4*MapEntries
	// LongInodeSize is what newer tools take for its size; what is beyond InodeSize is zero.
	LongInodeSize = InodeSize + 8*MapEntries
)

// Places of fields in the header.
const (
	offName        = 0
	offTag         = offName + MaxName
	offCreated     = offTag + MaxName
	offSnapped     = offCreated + 8
	offVMClock     = offSnapped + 8
	offSize        = offVMClock + 8
	offVMStateSize = offSize + 8
	offCopyPolicy  = offVMStateSize + 8 // copy_policy, store_policy, nr_copies, block_size_shift
	offSnapID      = offCopyPolicy + 4
)

// InodeHeader is the header of an inode.
type InodeHeader struct {
	Name, Tag      string
	Created        time.Time
	Snapped        time.Time // zero: it is no snapshot
	VMClock        uint64    // ns
	Size           uint64    // bytes
	VMStateSize    uint64    // bytes
	CopyPolicy     uint8
	Copies         uint8
	BlockSizeShift uint8
	SnapID         uint32
	VID            uint32
	ParentVID      uint32
}

// Put encodes the header into the first InodeHeaderSize bytes of b. What is longer than
// its field is cut off.
func (h *InodeHeader) Put(b []byte) {
	clear(b[:InodeHeaderSize])
	copy(b[offName:offTag], h.Name)
	copy(b[offTag:offCreated], h.Tag)
	le.PutUint64(b[offCreated:], clock(h.Created))
	le.PutUint64(b[offSnapped:], clock(h.Snapped))
	le.PutUint64(b[offVMClock:], h.VMClock)
	le.PutUint64(b[offSize:], h.Size)
	le.PutUint64(b[offVMStateSize:], h.VMStateSize)
	b[offCopyPolicy], b[offCopyPolicy+2], b[offCopyPolicy+3] = h.CopyPolicy, h.Copies, h.BlockSizeShift
	le.PutUint32(b[offSnapID:], h.SnapID)
	le.PutUint32(b[offSnapID+4:], h.VID)
	le.PutUint32(b[offSnapID+8:], h.ParentVID)
}

// ParseInodeHeader decodes the first InodeHeaderSize bytes of b.
func ParseInodeHeader(b []byte) InodeHeader {
	return InodeHeader{
		Name: text(b[offName:offTag]), Tag: text(b[offTag:offCreated]), Created: parseClock(le.Uint64(b[offCreated:])),
		Snapped: parseClock(le.Uint64(b[offSnapped:])), VMClock: le.Uint64(b[offVMClock:]), Size: le.Uint64(b[offSize:]),
		VMStateSize: le.Uint64(b[offVMStateSize:]), CopyPolicy: b[offCopyPolicy], Copies: b[offCopyPolicy+2], BlockSizeShift: b[offCopyPolicy+3],
		SnapID: le.Uint32(b[offSnapID:]), VID: le.Uint32(b[offSnapID+4:]), ParentVID: le.Uint32(b[offSnapID+8:]),
	}
}

// clock gives a time as seconds << 32 | nanoseconds.
func clock(t time.Time) uint64 {
	if t.IsZero() {
		return 0
	}
	return uint64(t.Unix())<<32 | uint64(t.Nanosecond())
}

func parseClock(c uint64) time.Time {
	if c == 0 {
		return time.Time{}
	}
	return time.Unix(int64(c>>32), int64(c&(1<<32-1))).UTC()
}

// Entry decodes the i-th vid of a piece of a map.
func Entry(b []byte, i int) uint32 { return binary.LittleEndian.Uint32(b[4*i:]) }
