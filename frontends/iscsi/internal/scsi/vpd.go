package scsi

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
)

// pages are the vital product data there is, by page code.
var pages = []struct {
	code byte
	make func(u *Unit) []byte
}{
	{0x00, pageList},
	{0x80, pageSerial},
	{0x83, pageIdentification},
	{0x86, pageExtended},
	{0x8f, pageCopy},
	{0xb0, pageLimits},
	{0xb1, pageCharacteristics},
	{0xb2, pageProvisioning},
}

// pageCodes are those of pages, which pageList cannot range over itself.
var pageCodes = []byte{0x00, 0x80, 0x83, 0x86, 0x8f, 0xb0, 0xb1, 0xb2}

func planPage(u *Unit, code byte, limit int64) Plan {
	for _, p := range pages {
		if p.code == code {
			body := p.make(u)
			b := make([]byte, 4, 4+len(body))
			b[1] = code
			binary.BigEndian.PutUint16(b[2:], uint16(len(body)))
			return answer(append(b, body...), limit)
		}
	}
	return badField(2)
}

func pageList(*Unit) []byte { return pageCodes }

// Serial is the unit's serial number.
func (u *Unit) Serial() string { return hex.EncodeToString(u.ID[:]) }

func pageSerial(u *Unit) []byte { return []byte(u.Serial()) }

// designation descriptors (SPC-4 section 7.8.6).
const (
	codeBinary = 1
	codeASCII  = 2
	codeUTF8   = 3

	ofUnit   = 0x00
	ofPort   = 0x10
	ofDevice = 0x20

	typeT10    = 1
	typeNAA    = 3
	typePort   = 4
	typeGroup  = 5
	typeName   = 8
	iscsiProto = 0x50
	knowsProto = 0x80
	naaLocal   = 0x30 // locally assigned: 60 bits of the unit's own
)

func designator(code, kind byte, value []byte) []byte {
	d := []byte{code, kind, 0, byte(len(value))}
	if kind&0x30 != ofUnit {
		d[0] |= iscsiProto
		d[1] |= knowsProto
	}
	return append(d, value...)
}

// name makes a SCSI name string: ended by zero, padded to whole words.
func name(s string) []byte {
	b := append([]byte(s), 0)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

func pageIdentification(u *Unit) []byte {
	naa := naaOf(u.ID)
	number := make([]byte, 4)
	binary.BigEndian.PutUint16(number[2:], u.Group)
	b := designator(codeBinary, ofUnit|typeNAA, naa[:])
	b = append(b, designator(codeASCII, ofUnit|typeT10, []byte(vendor+u.Serial()))...)
	b = append(b, designator(codeBinary, ofPort|typePort, number)...)
	b = append(b, designator(codeBinary, ofPort|typeGroup, number)...)
	b = append(b, designator(codeUTF8, ofPort|typeName, name(fmt.Sprintf("%s,t,0x%04x", u.port.Target, u.Group)))...)
	return append(b, designator(codeUTF8, ofDevice|typeName, name(u.port.Target))...)
}

// pageExtended: commands are ordered simply, the cache is volatile, and resets are told of.
func pageExtended(*Unit) []byte {
	const simple, volatile, lunReset = 0x01, 0x01, 0x01
	b := make([]byte, 60)
	b[1], b[2], b[3] = simple, volatile, lunReset
	return b
}

func pageLimits(u *Unit) []byte {
	const wsnz, alignmentValid = 1, 1 << 31
	b := make([]byte, 60)
	b[0] = wsnz
	perBlock := uint32(PhysicalBlock) >> u.BlockShift
	b[1] = MaxCompare
	binary.BigEndian.PutUint16(b[2:], uint16(perBlock))               // optimal transfer length granularity
	binary.BigEndian.PutUint32(b[4:], MaxTransfer>>u.BlockShift)      // maximum transfer length
	binary.BigEndian.PutUint32(b[8:], 1<<20>>u.BlockShift)            // optimal transfer length
	binary.BigEndian.PutUint32(b[12:], MaxTransfer>>u.BlockShift)     // maximum prefetch length
	binary.BigEndian.PutUint32(b[16:], MaxUnmap)                      // maximum unmap LBA count
	binary.BigEndian.PutUint32(b[20:], MaxUnmapRanges)                // maximum unmap block descriptor count
	binary.BigEndian.PutUint32(b[24:], perBlock)                      // optimal unmap granularity
	binary.BigEndian.PutUint32(b[28:], alignmentValid)                // unmap granularity alignment: 0
	binary.BigEndian.PutUint64(b[32:], uint64(MaxSame)>>u.BlockShift) // maximum write same length
	return b
}

// pageCharacteristics: nothing rotates.
func pageCharacteristics(*Unit) []byte {
	const notRotating = 1
	b := make([]byte, 60)
	binary.BigEndian.PutUint16(b, notRotating)
	return b
}

// pageProvisioning: thin; UNMAP and both WRITE SAME unmap, and what is unmapped is zero.
func pageProvisioning(*Unit) []byte {
	const unmap, same16, same10, zeroes, thin = 0x80, 0x40, 0x20, 0x04, 2
	return []byte{0, unmap | same16 | same10 | zeroes, thin, 0}
}
