package scsi

import (
	"encoding/binary"

	"github.com/gostor/gotgt/pkg/api"
)

// Third-party copy (SPC-4 section 6.4): EXTENDED COPY(LID1) from blocks to blocks, between units that the
// initiator uses through this gateway. It is what ESXi clones by.

// Operation codes, which gotgt has no names for.
const (
	opExtendedCopy api.SCSICommandType = 0x83
	opCopyResults  api.SCSICommandType = 0x84

	copyLID1   = 0x00 // service action of EXTENDED COPY
	copyStatus = 0x00 // service actions of RECEIVE COPY RESULTS
	copyParams = 0x03
)

// Limits of a copy.
const (
	maxCopyTargets  = 8
	maxCopySegments = 64
	maxCopyList     = 2048      // bytes of all descriptors
	maxCopySegment  = 256 << 20 // bytes: 2^16-1 blocks of 4096 are less
	// MaxCopies is how many results a session keeps, and how many copies it has at once.
	MaxCopies = 16
)

const (
	copyHeader     = 16
	targetDescSize = 32
	segmentSize    = 28
	codeIdentity   = 0xe4
	codeBlocks     = 0x02 // block to block
	dataGrain      = 9    // log2 of what segments are made of, bytes
)

func copyCommands() []*Command {
	results := func(name string, action byte, plan func(*Unit, []byte) Plan) *Command {
		return entry("RECEIVE COPY RESULTS, "+name, opCopyResults, int(action), cdb(opCopyResults, action, all1, []byte{0, 0, 0, 0, 0, 0, 0}, all4, []byte{0, 0}), AccessWrite, plan)
	}
	return []*Command{
		entry("EXTENDED COPY", opExtendedCopy, copyLID1, cdb(opExtendedCopy, copyLID1, []byte{0, 0, 0, 0, 0, 0, 0, 0}, all4, []byte{0, 0}), AccessWrite, planCopy),
		results("COPY STATUS", copyStatus, planCopyStatus), results("OPERATING PARAMETERS", copyParams, planCopyParams),
	}
}

func planCopy(_ *Unit, cdb []byte) Plan {
	n := int64(binary.BigEndian.Uint32(cdb[10:]))
	if n > copyHeader+2*maxCopyList { // beyond all that is understood
		return refuse(ParameterListLength)
	}
	return Plan{Kind: ExtendedCopy, DataOut: n}
}

func planCopyStatus(_ *Unit, cdb []byte) Plan {
	return Plan{Kind: CopyResult, Limit: int64(binary.BigEndian.Uint32(cdb[10:]))}
}

func planCopyParams(_ *Unit, cdb []byte) Plan {
	b := make([]byte, 46)
	binary.BigEndian.PutUint32(b, uint32(len(b)-4))
	b[4] = 1 // SNLID: a copy without a list identifier is understood
	binary.BigEndian.PutUint16(b[8:], maxCopyTargets)
	binary.BigEndian.PutUint16(b[10:], maxCopySegments)
	binary.BigEndian.PutUint32(b[12:], maxCopyList)
	binary.BigEndian.PutUint32(b[16:], maxCopySegment)
	binary.BigEndian.PutUint16(b[34:], MaxCopies)
	b[36], b[37] = MaxCopies, dataGrain
	b[43], b[44], b[45] = 2, codeBlocks, codeIdentity
	return answer(b, int64(binary.BigEndian.Uint32(cdb[10:])))
}

// pageCopy is the VPD page of third-party copy (SPC-4 section 7.8.17).
func pageCopy(*Unit) []byte {
	supported := []byte{0, 0x01, 0, 8, 7, byte(opExtendedCopy), 1, copyLID1, byte(opCopyResults), 2, copyStatus, copyParams}
	params := make([]byte, 32)
	params[1], params[3] = 0x04, 28
	binary.BigEndian.PutUint16(params[8:], maxCopyTargets)
	binary.BigEndian.PutUint16(params[10:], maxCopySegments)
	binary.BigEndian.PutUint32(params[12:], maxCopyList)
	descriptors := []byte{0, 0x08, 0, 4, 2, codeBlocks, codeIdentity, 0}
	ids := []byte{0, 0x0c, 0, 4, 0, 0, 0, 0}
	general := make([]byte, 36)
	general[0], general[1], general[3] = 0x80, 0x01, 32
	binary.BigEndian.PutUint32(general[4:], MaxCopies)
	binary.BigEndian.PutUint32(general[8:], MaxCopies)
	binary.BigEndian.PutUint32(general[12:], maxCopySegment)
	general[16] = dataGrain
	return joined(supported, params, descriptors, ids, general)
}

// Copy is what EXTENDED COPY asks for.
type Copy struct {
	List byte
	// Kept: its result can be asked for by List.
	Kept     bool
	Segments []Segment
}

// Segment copies blocks from one unit to another, perhaps the same.
type Segment struct {
	From, To CopyTarget
	At, Dest uint64 // LBA
	Blocks   uint64 // of From, or with ByDest of To
	ByDest   bool
}

// CopyTarget names a unit by a designator of VPD page 83h. The zero value is none that could be reached.
type CopyTarget struct {
	NAA   [8]byte
	valid bool
}

// Is reports whether a unit is meant.
func (c CopyTarget) Is(id [8]byte) bool { return c.valid && c.NAA == naaOf(id) }

// naaOf makes a unit's identity a designator.
func naaOf(id [8]byte) [8]byte {
	id[0] = naaLocal | id[0]&0x0f
	return id
}

// DecodeCopy reads the parameters of EXTENDED COPY; sense is why they are refused. Nothing is copied
// then. No parameters are no copy, which is no mistake.
func DecodeCopy(b []byte) (c Copy, sense Sense) {
	if len(b) == 0 {
		return c, Sense{}
	}
	if len(b) < copyHeader {
		return c, Sense{Code: ParameterListLength}
	}
	targets, segments := int(binary.BigEndian.Uint16(b[2:])), int64(binary.BigEndian.Uint32(b[8:]))
	const useNone = 3
	usage := b[1] >> 3 & 3
	c.List, c.Kept = b[0], usage == 0
	switch {
	case binary.BigEndian.Uint32(b[12:]) > 0:
		return c, Sense{Code: InlineData}
	case int64(targets)+segments > maxCopyList, copyHeader+int64(targets)+segments > int64(len(b)), targets%targetDescSize != 0:
		return c, Sense{Code: ParameterListLength}
	case usage == useNone && b[0] != 0:
		return c, Sense{Code: InvalidFieldInParameter, HasField: true}
	case targets/targetDescSize > maxCopyTargets:
		return c, Sense{Code: TooManyTargets}
	}
	var list []CopyTarget
	for at := copyHeader; at < copyHeader+targets; at += targetDescSize {
		t, s := decodeTarget(b[at : at+targetDescSize])
		if s != (Sense{}) {
			return c, s
		}
		list = append(list, t)
	}
	for at, end := copyHeader+targets, copyHeader+targets+int(segments); at < end; at += segmentSize {
		if len(c.Segments) == maxCopySegments {
			return c, Sense{Code: TooManySegments}
		}
		s, bad := decodeSegment(list, b[at:end], at)
		if bad != (Sense{}) {
			return c, bad
		}
		c.Segments = append(c.Segments, s)
	}
	return c, Sense{}
}

// decodeTarget reads an identification descriptor. What it designates is looked for later. LU ID
// TYPE is ignored, and NUL obsolete, as in SPC-4.
func decodeTarget(d []byte) (t CopyTarget, sense Sense) {
	switch {
	case d[0] != codeIdentity:
		return t, Sense{Code: UnsupportedTarget}
	case d[4]&0x0f != codeBinary || d[5]&0x3f != typeNAA|ofUnit || d[7] != 8:
		return t, Sense{} // nothing that there is here
	}
	t.valid = true
	copy(t.NAA[:], d[8:])
	return t, Sense{}
}

func decodeSegment(list []CopyTarget, d []byte, at int) (s Segment, sense Sense) {
	const byDest = 0x02
	switch {
	case len(d) > 0 && d[0] != codeBlocks:
		return s, Sense{Code: UnsupportedSegment}
	case len(d) < segmentSize:
		return s, Sense{Code: ParameterListLength}
	case binary.BigEndian.Uint16(d[2:]) != segmentSize-4:
		return s, Sense{Code: InvalidFieldInParameter, Field: uint16(at + 2), HasField: true}
	}
	pick := func(i uint16) (t CopyTarget) {
		if int(i) < len(list) {
			t = list[i]
		}
		return t
	}
	s.From, s.To = pick(binary.BigEndian.Uint16(d[4:])), pick(binary.BigEndian.Uint16(d[6:]))
	s.ByDest, s.Blocks = d[1]&byDest != 0, uint64(binary.BigEndian.Uint16(d[10:]))
	s.At, s.Dest = binary.BigEndian.Uint64(d[12:]), binary.BigEndian.Uint64(d[20:])
	return s, Sense{}
}

// Ranges makes a segment's blocks bytes of the two units; false if they go beyond an end.
func (s *Segment) Ranges(from, to *Unit) (src, dst Range, ok bool) {
	shift := from.BlockShift
	if s.ByDest {
		shift = to.BlockShift
	}
	n := int64(s.Blocks) << shift
	within := func(u *Unit, lba uint64) bool {
		return n&(1<<u.BlockShift-1) == 0 && lba <= u.Blocks && uint64(n)>>u.BlockShift <= u.Blocks-lba
	}
	if !within(from, s.At) || !within(to, s.Dest) {
		return src, dst, false
	}
	return Range{int64(s.At) << from.BlockShift, n}, Range{int64(s.Dest) << to.BlockShift, n}, true
}

// CopyState is how far a copy has come.
type CopyState struct {
	Status   byte // see below
	Segments uint16
	Bytes    uint64
}

// States of copies.
const (
	CopyRuns   = 0
	CopyDone   = 1
	CopyFailed = 2
)

// Encode gives the answer to COPY STATUS. The unit of the count is as small as it can be.
func (c CopyState) Encode() []byte {
	b := make([]byte, 12)
	binary.BigEndian.PutUint32(b, 8)
	b[4] = c.Status
	binary.BigEndian.PutUint16(b[5:], c.Segments)
	for c.Bytes > 0xffffffff {
		c.Bytes >>= 10
		b[7]++
	}
	binary.BigEndian.PutUint32(b[8:], uint32(c.Bytes))
	return b
}

// Plans of what a copy does to its units, for reservations.
var (
	CopyReads  = Plan{Kind: Read, Command: mustFind(api.READ_16)}
	CopyWrites = Plan{Kind: Write, Command: mustFind(api.WRITE_16)}
)

func mustFind(op api.SCSICommandType) *Command {
	c, _ := find([]byte{byte(op), 0})
	return c
}
