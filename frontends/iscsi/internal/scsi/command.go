package scsi

import (
	"encoding/binary"

	"github.com/gostor/gotgt/pkg/api"
)

// Kind says what a Plan does.
type Kind uint8

// Kinds of plans.
const (
	Refuse       Kind = iota // Status and Sense are the answer
	Answer                   // Data is the answer
	ListUnits                // the same; that the list has changed needs to be told no more
	Read                     // answer [Off, Off+Len)
	Write                    // store the data at Off
	WriteVerify              // store it durably, then compare
	Verify                   // Len bytes can be read; with data, they are the same
	CompareWrite             // if the first half of the data is there, store the second half
	OrWrite                  // OR the data into what is there
	Fill                     // repeat the data, one block, over the range
	Zero                     // the range reads as zero
	Discard                  // the range is no longer needed, and reads as zero
	Unmap                    // discard the ranges that the data lists
	Flush                    // make durable what was answered
	Cache                    // bring the range into memory
	Allocation               // answer which blocks of the range take space
	SelectMode               // the data has mode pages
	ReserveIn                // answer the state of persistent reservations
	ReserveOut               // change it by the data
	Reserve                  // for the initiator alone, the old way
	Release                  // the same undone
	TakeSense                // answer a pending unit attention as data
	Prevent                  // medium removal
	ExtendedCopy             // copy as the data says
	CopyResult               // answer what came of a copy
	SetGroups                // change the states of target port groups by the data
	listCommands             // within Decide alone: what the table of commands answers itself
)

// Plan is what a command means. Lengths are in bytes.
type Plan struct {
	Kind    Kind
	Command *Command
	Off     int64
	Len     int64
	DataOut int64 // length of the data that the command takes from the initiator
	Limit   int64 // length that the command may answer at most
	FUA     bool
	Once    bool // Verify: the data is one block, to be compared with each
	Data    []byte
	Status  Status
	Sense   Sense
	CDB     [16]byte // of kinds that are carried out with state: see Action
}

// Action is the service action of the kinds that have several.
func (p *Plan) Action() byte { return p.CDB[1] & 0x1f }

// Unit is the state of a logical unit that commands depend on.
type Unit struct {
	Blocks     uint64 // logical ones
	BlockShift uint8  // log2 of a logical block's bytes
	// SmallPhysical: initiators are told that a physical block is as long as a logical one.
	SmallPhysical bool
	ReadOnly      bool
	ID            [8]byte // the same through every gateway, and no other unit's
	Group         uint16  // target port group of this gateway, and tag of its portal group
	Groups        []Group // all of them, by ID
	Protected     bool    // SWP: an initiator asked to refuse writes
	Descriptor    bool    // D_SENSE: sense data is in descriptors

	port *Port // set by Decide for commands whose answer depends on it
}

// Port is what a command came through: a target, with the numbers of its logical units.
type Port struct {
	Target string   // iSCSI name
	LUNs   []uint16 // ascending
}

// Limits of a unit.
const (
	// PhysicalBlock is what is written without reading first, in bytes: a block of the store.
	PhysicalBlock = 4096
	// MaxTransfer is the longest data of a command, in bytes.
	MaxTransfer = 32 << 20
	// MaxCompare is the longest COMPARE AND WRITE, in blocks.
	MaxCompare = 128
	// MaxSame is the longest WRITE SAME, in bytes.
	MaxSame = 1 << 30
	// MaxUnmap bounds the blocks of one UNMAP, MaxUnmapRanges its ranges.
	MaxUnmap       = 1 << 20
	MaxUnmapRanges = 256
)

// Access says what reservations of others do to a command (SPC-4 table 46, SBC-3 table 13).
type Access uint8

// Classes of access.
const (
	AccessAlways Access = iota
	AccessRead          // conflicts with exclusive access
	AccessWrite         // conflicts with all
	AccessOwn           // decides for itself
)

// Command is one entry of the table.
type Command struct {
	Name   string
	op     byte
	action int    // service action, -1 if the operation has none
	usage  []byte // which bits of the CDB are looked at; its length is the CDB's
	Access Access
	// Quiet commands report no unit attention.
	Quiet bool
	// writes makes the command refused on write protected units.
	writes bool
	// ported commands answer what depends on the port they came through.
	ported bool
	plan   func(u *Unit, cdb []byte) Plan
}

const noAction = -1

// usage makes the bits of a CDB that a command looks at, all ones beyond the first
// two bytes but for control.
func usage(op byte, second byte, rest ...byte) []byte { return append([]byte{op, second}, rest...) }

var (
	all4  = []byte{0xff, 0xff, 0xff, 0xff}
	all2  = []byte{0xff, 0xff}
	all1  = []byte{0xff}
	zero1 = []byte{0}
)

func joined(parts ...[]byte) (b []byte) {
	for _, p := range parts {
		b = append(b, p...)
	}
	return b
}

// cdb builds the usage of a CDB from its second byte and the rest.
func cdb(op api.SCSICommandType, second byte, parts ...[]byte) []byte {
	return usage(byte(op), second, joined(parts...)...)
}

func entry(name string, op api.SCSICommandType, action int, use []byte, access Access, plan func(*Unit, []byte) Plan) *Command {
	return &Command{Name: name, op: byte(op), action: action, usage: use, Access: access, plan: plan}
}

func (c *Command) quiet() *Command   { c.Quiet = true; return c }
func (c *Command) writing() *Command { c.writes = true; return c }
func (c *Command) byPort() *Command  { c.ported = true; return c }

// Operation codes that gotgt has no name for.
const (
	opReadDefectData12 api.SCSICommandType = 0xb7
	opMaintenanceOut   api.SCSICommandType = 0xa4
)

// commands are all there are, by operation code and service action.
var commands = makeCommands()

func makeCommands() []*Command {
	list := append(primaryCommands(), blockCommands()...)
	return append(append(list, thinCommands()...), copyCommands()...)
}

func primaryCommands() []*Command {
	return []*Command{
		entry("TEST UNIT READY", api.TEST_UNIT_READY, noAction, cdb(api.TEST_UNIT_READY, 0, []byte{0, 0, 0, 0}), AccessAlways, planGood),
		entry("REQUEST SENSE", api.REQUEST_SENSE, noAction, cdb(api.REQUEST_SENSE, 1, []byte{0, 0, 0xff, 0}), AccessAlways, planTakeSense).quiet(),
		entry("INQUIRY", api.INQUIRY, noAction, cdb(api.INQUIRY, 1, all1, all2, zero1), AccessAlways, planInquiry).quiet().byPort(),
		entry("MODE SELECT(6)", api.MODE_SELECT, noAction, cdb(api.MODE_SELECT, 0x11, []byte{0, 0, 0xff, 0}), AccessWrite, planSelect6),
		entry("RESERVE(6)", api.RESERVE, noAction, cdb(api.RESERVE, 0, []byte{0, 0, 0, 0}), AccessOwn, planReserve),
		entry("RELEASE(6)", api.RELEASE, noAction, cdb(api.RELEASE, 0, []byte{0, 0, 0, 0}), AccessOwn, planRelease),
		entry("MODE SENSE(6)", api.MODE_SENSE, noAction, cdb(api.MODE_SENSE, 8, all1, all2, zero1), AccessWrite, planSense6),
		entry("START STOP UNIT", api.START_STOP, noAction, cdb(api.START_STOP, 1, []byte{0, 0x0f, 0xf7, 0}), AccessWrite, planStartStop),
		entry("PREVENT ALLOW MEDIUM REMOVAL", api.ALLOW_MEDIUM_REMOVAL, noAction, cdb(api.ALLOW_MEDIUM_REMOVAL, 0, []byte{0, 0, 3, 0}), AccessOwn, planPrevent),
		entry("MODE SELECT(10)", api.MODE_SELECT_10, noAction, cdb(api.MODE_SELECT_10, 0x11, []byte{0, 0, 0, 0, 0}, all2, zero1), AccessWrite, planSelect10),
		entry("RESERVE(10)", api.RESERVE_10, noAction, cdb(api.RESERVE_10, 0, []byte{0, 0, 0, 0, 0, 0, 0, 0}), AccessOwn, planReserve),
		entry("RELEASE(10)", api.RELEASE_10, noAction, cdb(api.RELEASE_10, 0, []byte{0, 0, 0, 0, 0, 0, 0, 0}), AccessOwn, planRelease),
		entry("MODE SENSE(10)", api.MODE_SENSE_10, noAction, cdb(api.MODE_SENSE_10, 0x18, all1, all1, []byte{0, 0, 0}, all2, zero1), AccessWrite, planSense10),
		entry("REPORT LUNS", api.REPORT_LUNS, noAction, cdb(api.REPORT_LUNS, 0, []byte{0xff, 0, 0, 0}, all4, []byte{0, 0}), AccessAlways, planLUNs).quiet().byPort(),
		entry("REPORT TARGET PORT GROUPS", api.MAINT_PROTOCOL_IN, 0x0a, cdb(api.MAINT_PROTOCOL_IN, 0xea, []byte{0, 0, 0, 0}, all4, []byte{0, 0}), AccessAlways, planGroups),
		entry("REPORT SUPPORTED OPERATION CODES", api.MAINT_PROTOCOL_IN, 0x0c, cdb(api.MAINT_PROTOCOL_IN, 0x0c, []byte{0x87}, all1, all2, all4, []byte{0, 0}), AccessAlways, planOpcodes),
		entry("REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS", api.MAINT_PROTOCOL_IN, 0x0d, cdb(api.MAINT_PROTOCOL_IN, 0x0d, []byte{0x80, 0, 0, 0}, all4, []byte{0, 0}), AccessAlways, planFunctions),
		entry("SET TARGET PORT GROUPS", opMaintenanceOut, 0x0a, cdb(opMaintenanceOut, 0x0a, []byte{0, 0, 0, 0}, all4, []byte{0, 0}), AccessWrite, planSetGroups),
		reserveIn("READ KEYS", prReadKeys), reserveIn("READ RESERVATION", prReadReservation), reserveIn("REPORT CAPABILITIES", prCapabilities),
		reserveIn("READ FULL STATUS", prFullStatus),
		reserveOut("REGISTER", prRegister), reserveOut("RESERVE", prReserve), reserveOut("RELEASE", prRelease), reserveOut("CLEAR", prClear),
		reserveOut("PREEMPT", prPreempt), reserveOut("PREEMPT AND ABORT", prPreemptAbort), reserveOut("REGISTER AND IGNORE EXISTING KEY", prRegisterIgnore),
	}
}

func reserveIn(name string, action byte) *Command {
	return entry("PERSISTENT RESERVE IN, "+name, api.PERSISTENT_RESERVE_IN, int(action), cdb(api.PERSISTENT_RESERVE_IN, action, []byte{0, 0, 0, 0, 0}, all2, zero1), AccessAlways, planReserveIn)
}

func reserveOut(name string, action byte) *Command {
	return entry("PERSISTENT RESERVE OUT, "+name, api.PERSISTENT_RESERVE_OUT, int(action), cdb(api.PERSISTENT_RESERVE_OUT, action, []byte{0xff, 0, 0}, all4, zero1), AccessOwn, planReserveOut)
}

// find returns the command of a CDB; known says whether there is any with its operation
// code, to which an unknown service action is a wrong field.
func find(cdb []byte) (c *Command, known bool) {
	for _, c := range commands {
		if c.op != cdb[0] {
			continue
		}
		if c.action == noAction || c.action == int(cdb[1]&0x1f) {
			return c, true
		}
		known = true
	}
	return nil, known
}

// refuse makes the plan of a command that is refused.
func refuse(c Code) Plan { return Plan{Kind: Refuse, Status: StatusCheck, Sense: Sense{Code: c}} }

// badField refuses a CDB for the field in the given byte.
func badField(at int) Plan {
	return Plan{Kind: Refuse, Status: StatusCheck, Sense: Sense{Code: InvalidFieldInCDB, Field: uint16(at), HasField: true, InCommand: true}}
}

// Decide says what a CDB of 16 bytes asks of unit u, nil if there is none under the number
// that it was sent to. It never fails: what cannot be done is a plan that says so.
func Decide(u *Unit, at *Port, cdb []byte) Plan {
	c, known := find(cdb)
	switch {
	case c == nil && u == nil:
		return refuse(NoLogicalUnit)
	case c == nil && known:
		return badField(1)
	case c == nil:
		return refuse(InvalidCommand)
	case u == nil:
		p := decideWithout(at, cdb)
		p.Command = c
		return p
	}
	if c.ported {
		v := *u
		v.port = at
		u = &v
	}
	p := c.plan(u, cdb)
	if p.Kind == listCommands {
		p = reportCommands(cdb)
	}
	if c.writes && p.Kind != Refuse {
		switch {
		case u.ReadOnly:
			p = refuse(WriteProtected)
		case u.Protected:
			p = refuse(SoftwareWriteProtected)
		}
	}
	p.Command = c
	copy(p.CDB[:], cdb)
	return p
}

// decideWithout is Decide where there is no unit (SPC-4 section 4.6.4).
func decideWithout(at *Port, cdb []byte) Plan {
	switch api.SCSICommandType(cdb[0]) {
	case api.INQUIRY:
		return inquiryWithout(cdb)
	case api.REPORT_LUNS:
		return planLUNs(&Unit{port: at}, cdb)
	case api.REQUEST_SENSE:
		return answer(Sense{Code: NoLogicalUnit}.Encode(cdb[1]&1 != 0), int64(cdb[4]))
	}
	return refuse(NoLogicalUnit)
}

func answer(data []byte, limit int64) Plan {
	if int64(len(data)) > limit {
		data = data[:limit]
	}
	return Plan{Kind: Answer, Status: StatusGood, Data: data, Limit: limit}
}

func planGood(*Unit, []byte) Plan { return Plan{Kind: Answer, Status: StatusGood} }

func planTakeSense(_ *Unit, cdb []byte) Plan { return Plan{Kind: TakeSense, Limit: int64(cdb[4])} }

func planReserve(*Unit, []byte) Plan { return Plan{Kind: Reserve} }
func planRelease(*Unit, []byte) Plan { return Plan{Kind: Release} }

func planPrevent(_ *Unit, cdb []byte) Plan {
	if cdb[4]&^3 != 0 {
		return badField(4)
	}
	return Plan{Kind: Prevent}
}

// planStartStop does nothing that could be seen: a volume has no motor, and what is
// stopped for one initiator would be for all. Before it stops, it is flushed.
func planStartStop(_ *Unit, cdb []byte) Plan {
	const start, noFlush = 0x01, 0x04
	if cdb[4]&start != 0 || cdb[4]&noFlush != 0 || cdb[4]>>4 != 0 {
		return Plan{Kind: Answer, Status: StatusGood}
	}
	return Plan{Kind: Flush}
}

// planLUNs lists the target's units, in the peripheral device addressing method.
func planLUNs(u *Unit, cdb []byte) Plan {
	limit := int64(binary.BigEndian.Uint32(cdb[6:]))
	if report := cdb[2]; report > 2 {
		return badField(2)
	} else if report == 1 { // well known ones: there are none
		return answer(make([]byte, 8), limit)
	}
	if limit < 16 {
		return badField(6)
	}
	b := make([]byte, 8+8*len(u.port.LUNs))
	binary.BigEndian.PutUint32(b, uint32(len(b)-8))
	for i, n := range u.port.LUNs {
		b[8+8*i+1] = byte(n) // above 255 there are none
	}
	return Plan{Kind: ListUnits, Status: StatusGood, Data: b[:min(int64(len(b)), limit)], Limit: limit}
}
