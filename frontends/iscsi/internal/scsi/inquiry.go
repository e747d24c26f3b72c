package scsi

import (
	"encoding/binary"

	"github.com/gostor/gotgt/pkg/api"
)

// What the unit is called, padded as SPC-4 has it.
const (
	vendor   = "SHEEPDOG"
	product  = "VDI             "
	revision = "1.0 "
)

// versions are the standards that are claimed (SPC-4 annex): SAM-5, iSCSI, SPC-4, SBC-3.
var versions = []uint16{0x00a0, 0x0960, 0x0460, 0x04c0}

const inquirySize = 96

func planInquiry(u *Unit, cdb []byte) Plan {
	limit := int64(binary.BigEndian.Uint16(cdb[3:]))
	if cdb[1]&1 != 0 {
		return planPage(u, cdb[2], limit)
	}
	if cdb[2] != 0 {
		return badField(2)
	}
	return answer(standardInquiry(byte(api.TYPE_DISK)), limit)
}

// inquiryWithout is the answer under a number that has no unit.
func inquiryWithout(cdb []byte) Plan {
	const noDevice = 0x7f // qualifier 011b, type 1Fh
	if cdb[1]&1 != 0 || cdb[2] != 0 {
		return badField(1)
	}
	return answer(standardInquiry(noDevice), int64(binary.BigEndian.Uint16(cdb[3:])))
}

func standardInquiry(device byte) []byte {
	const (
		spc4       = 6
		hisup      = 0x10
		format     = 2
		groups     = 0x30 // implicit and explicit asymmetric access
		queueing   = 0x02
		thirdParty = 0x08
	)
	b := make([]byte, inquirySize)
	b[0], b[2], b[3], b[4], b[5], b[7] = device, spc4, hisup|format, inquirySize-5, groups|thirdParty, queueing
	copy(b[8:], vendor)
	copy(b[16:], product)
	copy(b[32:], revision)
	for i, v := range versions {
		binary.BigEndian.PutUint16(b[58+2*i:], v)
	}
	return b
}
