package scsi

import (
	"encoding/binary"
	"math/bits"
)

func (u *Unit) physicalExponent() int {
	if u.SmallPhysical {
		return 0
	}
	return bits.Len(PhysicalBlock) - 1 - int(u.BlockShift)
}

func planCapacity10(u *Unit, cdb []byte) Plan {
	if cdb[8]&1 == 0 && binary.BigEndian.Uint32(cdb[2:]) != 0 {
		return badField(2) // an address without PMI (SBC-3 section 5.15)
	}
	b := make([]byte, 8)
	last := uint64(0)
	if u.Blocks > 0 {
		last = u.Blocks - 1
	}
	binary.BigEndian.PutUint32(b, uint32(min(last, 0xffffffff)))
	binary.BigEndian.PutUint32(b[4:], 1<<u.BlockShift)
	return answer(b, 8)
}

func planCapacity16(u *Unit, cdb []byte) Plan {
	const thin, zeroes = 0x80, 0x40 // LBPME, LBPRZ
	b := make([]byte, 32)
	if u.Blocks > 0 {
		binary.BigEndian.PutUint64(b, u.Blocks-1)
	}
	binary.BigEndian.PutUint32(b[8:], 1<<u.BlockShift)
	b[13] = byte(u.physicalExponent())
	b[14] = thin | zeroes
	return answer(b, int64(binary.BigEndian.Uint32(cdb[10:])))
}
