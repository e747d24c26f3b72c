package scsi

import (
	"encoding/binary"

	"github.com/gostor/gotgt/pkg/api"
)

func thinCommands() []*Command {
	same := func(name string, op api.SCSICommandType, second byte, l layout, plan func(*Unit, []byte) Plan) *Command {
		return entry(name, op, noAction, sized(op, second, l), AccessWrite, plan).writing()
	}
	return []*Command{
		same("WRITE SAME(10)", api.WRITE_SAME, 0xf8, layout10, planSame10),
		same("WRITE SAME(16)", api.WRITE_SAME_16, 0xf9, layout16, planSame16),
		entry("UNMAP", api.UNMAP, noAction, cdb(api.UNMAP, 1, []byte{0, 0, 0, 0, 0}, all2, zero1), AccessWrite, planUnmap).writing(),
		entry("GET LBA STATUS", api.SERVICE_ACTION_IN, int(api.SAI_GET_LBA_STATUS), cdb(api.SERVICE_ACTION_IN, byte(api.SAI_GET_LBA_STATUS), all4, all4, all4, []byte{0, 0}), AccessRead, planAllocation),
	}
}

// Bits of WRITE SAME.
const (
	bitAnchor = 0x10
	bitUnmap  = 0x08
	bitNoData = 0x01 // NDOB: the data is a block of zeros that is not sent
)

func planSame10(u *Unit, cdb []byte) Plan { return u.planSame(cdb, layout10, 0) }

func planSame16(u *Unit, cdb []byte) Plan { return u.planSame(cdb, layout16, cdb[1]&bitNoData) }

func (u *Unit) planSame(cdb []byte, l layout, noData byte) Plan {
	if cdb[1]&(bitsProtect|bitAnchor) != 0 {
		return badField(1)
	}
	off, n, bad := u.blocks(cdb, l)
	switch {
	case bad != nil:
		return *bad
	case n == 0 || n > MaxSame: // 0 would be up to the end: WSNZ says that it is refused
		return badField(l.count)
	}
	p := Plan{Kind: Fill, Off: off, Len: n}
	if cdb[1]&bitUnmap != 0 {
		p.Kind = Discard
	}
	switch {
	case noData == 0:
		p.DataOut = 1 << u.BlockShift
	case p.Kind == Fill:
		p.Kind = Zero
	}
	return p
}

func planUnmap(_ *Unit, cdb []byte) Plan {
	if cdb[1]&1 != 0 { // ANCHOR
		return badField(1)
	}
	n := int64(binary.BigEndian.Uint16(cdb[7:]))
	if n > 0 && n < 8 {
		return refuse(ParameterListLength)
	}
	return Plan{Kind: Unmap, DataOut: n}
}

// Range is a run of bytes.
type Range struct{ Off, Len int64 }

// UnmapRanges reads the parameters of UNMAP; sense is why they are refused.
func UnmapRanges(u *Unit, b []byte) (list []Range, sense Sense) {
	if len(b) == 0 {
		return nil, Sense{}
	}
	if len(b) < 8 {
		return nil, Sense{Code: ParameterListLength}
	}
	size := int(binary.BigEndian.Uint16(b[2:]))
	b = b[8:]
	b = b[:min(len(b), size)]
	if len(b)/16 > MaxUnmapRanges {
		return nil, Sense{Code: InvalidFieldInParameter, Field: 2, HasField: true}
	}
	var total uint64
	for ; len(b) >= 16; b = b[16:] {
		lba, count := binary.BigEndian.Uint64(b), uint64(binary.BigEndian.Uint32(b[8:]))
		if total += count; total > MaxUnmap {
			return nil, Sense{Code: InvalidFieldInParameter, Field: 2, HasField: true}
		}
		off, n, bad := u.extent(lba, count)
		if bad != nil {
			return nil, bad.Sense
		}
		if n > 0 {
			list = append(list, Range{off, n})
		}
	}
	return list, Sense{}
}

// planAllocation answers about as much as fits: see AllocationData.
func planAllocation(u *Unit, cdb []byte) Plan {
	lba := binary.BigEndian.Uint64(cdb[2:])
	if lba >= u.Blocks {
		return refuse(OutOfRange)
	}
	limit := int64(binary.BigEndian.Uint32(cdb[10:]))
	off := int64(lba) << u.BlockShift
	return Plan{Kind: Allocation, Off: off, Len: int64(u.Blocks)<<u.BlockShift - off, Limit: limit}
}

// MaxStatus bounds the descriptors of one answer.
const MaxStatus = 1024

// AllocationData collects the answer to GET LBA STATUS.
type AllocationData struct {
	b     []byte
	shift uint8
	room  int
	last  byte
}

// NewAllocation begins an answer of limit bytes at most.
func NewAllocation(u *Unit, limit int64) *AllocationData {
	room := max(1, min((limit-8)/16, MaxStatus))
	return &AllocationData{b: make([]byte, 8, 8+16*min(room, 16)), shift: u.BlockShift, room: int(room)}
}

// Add says that the next range is a hole or not; false if no more is wanted. Ranges begin
// and end with blocks.
func (d *AllocationData) Add(r Range, hole bool) bool {
	status := byte(0) // mapped
	if hole {
		status = 1 // deallocated
	}
	for r.Len > 0 {
		n := min(r.Len>>d.shift, 0xffffffff)
		at := len(d.b) - 16
		if len(d.b) > 8 && d.last == status && uint64(binary.BigEndian.Uint32(d.b[at+8:]))+uint64(n) <= 0xffffffff {
			binary.BigEndian.PutUint32(d.b[at+8:], binary.BigEndian.Uint32(d.b[at+8:])+uint32(n))
		} else {
			if (len(d.b)-8)/16 == d.room {
				return false
			}
			var e [16]byte
			binary.BigEndian.PutUint64(e[:], uint64(r.Off)>>d.shift)
			binary.BigEndian.PutUint32(e[8:], uint32(n))
			e[12] = status
			d.b, d.last = append(d.b, e[:]...), status
		}
		r.Off, r.Len = r.Off+n<<d.shift, r.Len-n<<d.shift
	}
	return true
}

// Bytes is the answer.
func (d *AllocationData) Bytes() []byte {
	binary.BigEndian.PutUint32(d.b, uint32(len(d.b)-4))
	return d.b
}
