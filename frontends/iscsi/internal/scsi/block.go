package scsi

import (
	"encoding/binary"

	"github.com/gostor/gotgt/pkg/api"
)

// layout is where a CDB of the block commands has its fields.
type layout struct{ lba, lbaSize, count, countSize int }

var (
	layout6  = layout{1, 3, 4, 1}
	layout10 = layout{2, 4, 7, 2}
	layout12 = layout{2, 4, 6, 4}
	layout16 = layout{2, 8, 10, 4}
)

func field(cdb []byte, at, size int) (n uint64) {
	for _, b := range cdb[at : at+size] {
		n = n<<8 | uint64(b)
	}
	return n
}

// Bits of the second byte of a CDB.
const (
	bitsProtect = 0xe0 // protection information: there is none on a unit
	bitFUA      = 0x08
	bitsCompare = 0x06 // BYTCHK
	shiftBytchk = 1
)

func sized(op api.SCSICommandType, second byte, l layout) []byte {
	switch l {
	case layout6:
		return cdb(op, 0x1f, all4[:3], zero1)
	case layout10:
		return cdb(op, second, all4, zero1, all2, zero1)
	case layout12:
		return cdb(op, second, all4, all4, zero1, zero1)
	}
	return cdb(op, second, all4, all4, all4, zero1, zero1)
}

func blockCommands() []*Command {
	var list []*Command
	add := func(name string, op api.SCSICommandType, second byte, l layout, a Access, writes bool, plan func(u *Unit, cdb []byte, l layout) Plan) {
		c := entry(name, op, noAction, sized(op, second, l), a, func(u *Unit, cdb []byte) Plan { return plan(u, cdb, l) })
		c.writes = writes
		list = append(list, c)
	}
	add("READ(6)", api.READ_6, 0, layout6, AccessRead, false, planRead)
	add("READ(10)", api.READ_10, 0xf8, layout10, AccessRead, false, planRead)
	add("READ(12)", api.READ_12, 0xf8, layout12, AccessRead, false, planRead)
	add("READ(16)", api.READ_16, 0xf8, layout16, AccessRead, false, planRead)
	add("WRITE(6)", api.WRITE_6, 0, layout6, AccessWrite, true, planWrite)
	add("WRITE(10)", api.WRITE_10, 0xf8, layout10, AccessWrite, true, planWrite)
	add("WRITE(12)", api.WRITE_12, 0xf8, layout12, AccessWrite, true, planWrite)
	add("WRITE(16)", api.WRITE_16, 0xf8, layout16, AccessWrite, true, planWrite)
	add("WRITE AND VERIFY(10)", api.WRITE_VERIFY, 0xf6, layout10, AccessWrite, true, planWriteVerify)
	add("WRITE AND VERIFY(12)", api.WRITE_VERIFY_12, 0xf6, layout12, AccessWrite, true, planWriteVerify)
	add("WRITE AND VERIFY(16)", api.WRITE_VERIFY_16, 0xf6, layout16, AccessWrite, true, planWriteVerify)
	add("VERIFY(10)", api.VERIFY_10, 0xf6, layout10, AccessRead, false, planVerify)
	add("VERIFY(12)", api.VERIFY_12, 0xf6, layout12, AccessRead, false, planVerify)
	add("VERIFY(16)", api.VERIFY_16, 0xf6, layout16, AccessRead, false, planVerify)
	add("ORWRITE(16)", api.ORWRITE_16, 0xf8, layout16, AccessWrite, true, planOrWrite)
	add("PRE-FETCH(10)", api.PRE_FETCH_10, 0x02, layout10, AccessRead, false, planPrefetch)
	add("PRE-FETCH(16)", api.PRE_FETCH_16, 0x02, layout16, AccessRead, false, planPrefetch)
	add("SYNCHRONIZE CACHE(10)", api.SYNCHRONIZE_CACHE, 0x02, layout10, AccessWrite, false, planSync)
	add("SYNCHRONIZE CACHE(16)", api.SYNCHRONIZE_CACHE_16, 0x02, layout16, AccessWrite, false, planSync)
	return append(list,
		entry("COMPARE AND WRITE", api.COMPARE_AND_WRITE, noAction, cdb(api.COMPARE_AND_WRITE, 0xf8, all4, all4, []byte{0, 0, 0, 0xff, 0, 0}), AccessWrite, planCompareWrite).writing(),
		entry("READ CAPACITY(10)", api.READ_CAPACITY, noAction, cdb(api.READ_CAPACITY, 0, all4, []byte{0, 0, 1, 0}), AccessAlways, planCapacity10),
		entry("READ CAPACITY(16)", api.SERVICE_ACTION_IN, int(api.SAI_READ_CAPACITY_16), cdb(api.SERVICE_ACTION_IN, byte(api.SAI_READ_CAPACITY_16), all4, all4, all4, []byte{1, 0}), AccessAlways, planCapacity16),
		entry("READ DEFECT DATA(10)", api.READ_DEFECT_DATA, noAction, cdb(api.READ_DEFECT_DATA, 0, []byte{0x1f, 0, 0, 0, 0}, all2, zero1), AccessRead, planDefects10),
		entry("READ DEFECT DATA(12)", opReadDefectData12, noAction, cdb(opReadDefectData12, 0x1f, all4, all4, []byte{0, 0}), AccessRead, planDefects12),
	)
}

// blocks reads address and count of a CDB and makes them bytes; bad is a refusal.
func (u *Unit) blocks(cdb []byte, l layout) (off, n int64, bad *Plan) {
	lba, count := field(cdb, l.lba, l.lbaSize), field(cdb, l.count, l.countSize)
	if l == layout6 {
		lba &= 0x1fffff
		if count == 0 {
			count = 256
		}
	}
	return u.extent(lba, count)
}

func (u *Unit) extent(lba, count uint64) (off, n int64, bad *Plan) {
	if lba > u.Blocks || count > u.Blocks-lba {
		p := refuse(OutOfRange)
		p.Sense.Info, p.Sense.HasInfo = lba, true
		return 0, 0, &p
	}
	return int64(lba) << u.BlockShift, int64(count) << u.BlockShift, nil
}

// transfer is blocks for a command that moves them all.
func (u *Unit) transfer(cdb []byte, l layout) (off, n int64, bad *Plan) {
	if l != layout6 && cdb[1]&bitsProtect != 0 {
		p := badField(1)
		return 0, 0, &p
	}
	off, n, bad = u.blocks(cdb, l)
	if bad == nil && n > MaxTransfer {
		p := badField(l.count)
		bad = &p
	}
	return off, n, bad
}

func planRead(u *Unit, cdb []byte, l layout) Plan {
	off, n, bad := u.transfer(cdb, l)
	if bad != nil {
		return *bad
	}
	// FUA of a read asks for what is on the medium; what is read here is what a power cut may
	// yet undo, so that has to be made durable first (SBC-3 section 5.10).
	return Plan{Kind: Read, Off: off, Len: n, Limit: n, FUA: l != layout6 && cdb[1]&bitFUA != 0}
}

func planWrite(u *Unit, cdb []byte, l layout) Plan {
	off, n, bad := u.transfer(cdb, l)
	if bad != nil {
		return *bad
	}
	return Plan{Kind: Write, Off: off, Len: n, DataOut: n, FUA: l != layout6 && cdb[1]&bitFUA != 0}
}

// Values of BYTCHK.
const (
	checkMedium = 0
	checkBytes  = 1
	checkOne    = 3
)

func planWriteVerify(u *Unit, cdb []byte, l layout) Plan {
	off, n, bad := u.transfer(cdb, l)
	if bad != nil {
		return *bad
	}
	if c := cdb[1] & bitsCompare >> shiftBytchk; c != checkMedium && c != checkBytes {
		return badField(1)
	}
	return Plan{Kind: WriteVerify, Off: off, Len: n, DataOut: n, FUA: true}
}

func planVerify(u *Unit, cdb []byte, l layout) Plan {
	if cdb[1]&bitsProtect != 0 {
		return badField(1)
	}
	off, n, bad := u.blocks(cdb, l)
	if bad != nil {
		return *bad
	}
	p := Plan{Kind: Verify, Off: off, Len: n}
	switch cdb[1] & bitsCompare >> shiftBytchk {
	case checkMedium:
	case checkBytes:
		if p.DataOut = n; n > MaxTransfer {
			return badField(l.count)
		}
	case checkOne:
		if n > 0 {
			p.DataOut, p.Once = 1<<u.BlockShift, true
		}
	default:
		return badField(1)
	}
	return p
}

func planOrWrite(u *Unit, cdb []byte, l layout) Plan {
	off, n, bad := u.transfer(cdb, l)
	if bad != nil {
		return *bad
	}
	return Plan{Kind: OrWrite, Off: off, Len: n, DataOut: n, FUA: cdb[1]&bitFUA != 0}
}

func planCompareWrite(u *Unit, cdb []byte) Plan {
	if cdb[1]&bitsProtect != 0 {
		return badField(1)
	}
	count := uint64(cdb[13])
	if count > MaxCompare {
		return badField(13)
	}
	off, n, bad := u.extent(field(cdb, 2, 8), count)
	if bad != nil {
		return *bad
	}
	return Plan{Kind: CompareWrite, Off: off, Len: n, DataOut: 2 * n, FUA: cdb[1]&bitFUA != 0}
}

// planPrefetch: a count of 0 is to the end, of which as much as a read could have.
func planPrefetch(u *Unit, cdb []byte, l layout) Plan {
	off, n, bad := u.blocks(cdb, l)
	if bad != nil {
		return *bad
	}
	if n == 0 {
		n = int64(u.Blocks)<<u.BlockShift - off
	}
	return Plan{Kind: Cache, Off: off, Len: min(n, MaxTransfer)}
}

// planSync makes everything durable, whatever range was asked for.
func planSync(u *Unit, cdb []byte, l layout) Plan {
	if _, _, bad := u.blocks(cdb, l); bad != nil {
		return *bad
	}
	return Plan{Kind: Flush}
}

// planDefects10 answers an empty list: the store below knows and mends its own defects.
func planDefects10(_ *Unit, cdb []byte) Plan {
	return answer([]byte{0, cdb[2] & 0x1f, 0, 0}, int64(binary.BigEndian.Uint16(cdb[7:])))
}

func planDefects12(_ *Unit, cdb []byte) Plan {
	return answer([]byte{0, cdb[1] & 0x1f, 0, 0, 0, 0, 0, 0}, int64(binary.BigEndian.Uint32(cdb[6:])))
}
