package pdu

import "encoding/binary"

// HeaderSize is the length of a basic header segment (BHS), in bytes.
const HeaderSize = 48

// DigestSize is the length of a header or data digest, in bytes.
const DigestSize = 4

// Opcodes of initiators (RFC 7143 section 11.2.1.2).
const (
	OpNOPOut    = 0x00
	OpCommand   = 0x01
	OpTask      = 0x02
	OpLogin     = 0x03
	OpText      = 0x04
	OpDataOut   = 0x05
	OpLogout    = 0x06
	OpSNACK     = 0x10
	opcodeMask  = 0x3f
	immediateOp = 0x40
)

// Opcodes of targets.
const (
	OpNOPIn      = 0x20
	OpResponse   = 0x21
	OpTaskAnswer = 0x22
	OpLoginReply = 0x23
	OpTextReply  = 0x24
	OpDataIn     = 0x25
	OpLogoutDone = 0x26
	OpR2T        = 0x31
	OpAsync      = 0x32
	OpReject     = 0x3f
)

// Flags in the second byte of a header.
const (
	FlagFinal    = 0x80 // all but login and reject
	FlagRead     = 0x40 // command
	FlagWrite    = 0x20 // command
	FlagContinue = 0x40 // text, login
	FlagTransit  = 0x80 // login
	FlagStatus   = 0x01 // Data-In

	flagOverflow  = 0x04
	flagUnderflow = 0x02
)

// NoTag is the task tag that stands for none.
const NoTag = 0xffffffff

// Header is a basic header segment. Which methods make sense depends on Op.
type Header [HeaderSize]byte

// Op is the opcode.
func (h *Header) Op() byte { return h[0] & opcodeMask }

// Immediate reports whether the request takes no place in the order of commands.
func (h *Header) Immediate() bool { return h[0]&immediateOp != 0 }

// Flags is the second byte.
func (h *Header) Flags() byte { return h[1] }

// Final is the F bit.
func (h *Header) Final() bool { return h[1]&FlagFinal != 0 }

// ExtraSize is the length of the additional header segments, in bytes: 1020 at most.
func (h *Header) ExtraSize() int { return int(h[4]) * 4 }

// DataSize is the length of the data segment without its padding, in bytes: less than 16 MiB.
func (h *Header) DataSize() int { return int(h[5])<<16 | int(h[6])<<8 | int(h[7]) }

// Padded is n rounded up to whole words.
func Padded(n int) int { return (n + 3) &^ 3 }

// LUN is the logical unit number as SAM writes it.
func (h *Header) LUN() uint64 { return binary.BigEndian.Uint64(h[8:]) }

// TaskTag is the initiator task tag.
func (h *Header) TaskTag() uint32 { return binary.BigEndian.Uint32(h[16:]) }

// ExpectedLength of a command is what the initiator wants transferred, in bytes.
func (h *Header) ExpectedLength() uint32 { return binary.BigEndian.Uint32(h[20:]) }

// TransferTag is the target transfer tag of Data-Out, NOP-Out and text requests.
func (h *Header) TransferTag() uint32 { return binary.BigEndian.Uint32(h[20:]) }

// ReferencedTag of a task management request names the task that it is about.
func (h *Header) ReferencedTag() uint32 { return binary.BigEndian.Uint32(h[20:]) }

// ConnectionID of a login or logout request.
func (h *Header) ConnectionID() uint16 { return binary.BigEndian.Uint16(h[20:]) }

// CommandSN is CmdSN, of all requests but Data-Out and SNACK.
func (h *Header) CommandSN() uint32 { return binary.BigEndian.Uint32(h[24:]) }

// ExpectedStatusSN is ExpStatSN: all status before it has arrived.
func (h *Header) ExpectedStatusSN() uint32 { return binary.BigEndian.Uint32(h[28:]) }

// CDB is a command's descriptor block; those longer than 16 bytes go on in an additional header.
func (h *Header) CDB() []byte { return h[32:48] }

// ReferencedSN is RefCmdSN of a task management request.
func (h *Header) ReferencedSN() uint32 { return binary.BigEndian.Uint32(h[32:]) }

// DataSN numbers the Data-Out PDUs of a sequence.
func (h *Header) DataSN() uint32 { return binary.BigEndian.Uint32(h[36:]) }

// BufferOffset is where the data of a Data-Out belongs, in bytes.
func (h *Header) BufferOffset() uint32 { return binary.BigEndian.Uint32(h[40:]) }

// Before compares serial numbers (RFC 1982 with 32 bits).
func Before(a, b uint32) bool { return int32(a-b) < 0 }

// Login fields.

// VersionMin is the lowest version that the initiator speaks.
func (h *Header) VersionMin() byte { return h[3] }

// Stages returns the current stage of a login request and the one it wants next.
func (h *Header) Stages() (current, next byte) { return h[1] >> 2 & 3, h[1] & 3 }

// ISID identifies the session for its initiator.
func (h *Header) ISID() (id [6]byte) {
	copy(id[:], h[8:14])
	return id
}

// TSIH identifies the session for the target.
func (h *Header) TSIH() uint16 { return binary.BigEndian.Uint16(h[14:]) }

// Stages of a login.
const (
	StageSecurity    = 0
	StageOperational = 1
	StageFull        = 3
)
