package scsi

import (
	"encoding/binary"

	"github.com/gostor/gotgt/pkg/api"
)

// Status is what a command ends with (SAM-5).
type Status byte

// Statuses. gotgt has them as variables: read once, here.
var (
	StatusGood         = Status(api.SAM_STAT_GOOD)
	StatusCheck        = Status(api.SAM_STAT_CHECK_CONDITION)
	StatusConditionMet = Status(api.SAM_STAT_CONDITION_MET)
	StatusBusy         = Status(api.SAM_STAT_BUSY)
	StatusConflict     = Status(api.SAM_STAT_RESERVATION_CONFLICT)
	StatusTaskSetFull  = Status(api.SAM_STAT_TASK_SET_FULL)
	StatusTaskAborted  = Status(api.SAM_STAT_TASK_ABORTED)
)

// Sense keys.
const (
	KeyNone           = 0x0
	KeyNotReady       = 0x2
	KeyMedium         = 0x3
	KeyHardware       = 0x4
	KeyIllegalRequest = 0x5
	KeyUnitAttention  = 0x6
	KeyDataProtect    = 0x7
	KeyCopyAborted    = 0xa
	KeyAborted        = 0xb
	KeyMiscompare     = 0xe
)

// Code is a sense key with the additional sense code and its qualifier.
type Code struct{ Key, ASC, ASCQ byte }

// Codes that are used here; the names are those of SPC-4 annex F.
var (
	NoSense                 = Code{KeyNone, 0, 0}
	NotReadyBecoming        = Code{KeyNotReady, 0x04, 0x01}
	WriteError              = Code{KeyMedium, 0x0c, 0x00}
	UnrecoveredRead         = Code{KeyMedium, 0x11, 0x00}
	InternalFailure         = Code{KeyHardware, 0x44, 0x00}
	Miscompare              = Code{KeyMiscompare, 0x1d, 0x00}
	ParameterListLength     = Code{KeyIllegalRequest, 0x1a, 0x00}
	InvalidCommand          = Code{KeyIllegalRequest, 0x20, 0x00}
	OutOfRange              = Code{KeyIllegalRequest, 0x21, 0x00}
	InvalidFieldInCDB       = Code{KeyIllegalRequest, 0x24, 0x00}
	NoLogicalUnit           = Code{KeyIllegalRequest, 0x25, 0x00}
	InvalidFieldInParameter = Code{KeyIllegalRequest, 0x26, 0x00}
	InvalidRelease          = Code{KeyIllegalRequest, 0x26, 0x04}
	InvalidFieldInUnit      = Code{KeyIllegalRequest, 0x0e, 0x03}
	TooManyTargets          = Code{KeyIllegalRequest, 0x26, 0x06}
	UnsupportedTarget       = Code{KeyIllegalRequest, 0x26, 0x07}
	TooManySegments         = Code{KeyIllegalRequest, 0x26, 0x08}
	UnsupportedSegment      = Code{KeyIllegalRequest, 0x26, 0x09}
	InlineData              = Code{KeyIllegalRequest, 0x26, 0x0b}
	CopyOutOfRange          = Code{KeyCopyAborted, 0x00, 0x00}
	ThirdPartyFailure       = Code{KeyCopyAborted, 0x0d, 0x01}
	NotReachable            = Code{KeyCopyAborted, 0x0d, 0x02}
	InsufficientRegistry    = Code{KeyIllegalRequest, 0x55, 0x04}
	WriteProtected          = Code{KeyDataProtect, 0x27, 0x00}
	SoftwareWriteProtected  = Code{KeyDataProtect, 0x27, 0x02}
	SpaceAllocation         = Code{KeyDataProtect, 0x27, 0x07}
	UnexpectedData          = Code{KeyAborted, 0x0c, 0x0c}
	IncorrectAmount         = Code{KeyAborted, 0x0c, 0x0d}
	ServiceCRC              = Code{KeyAborted, 0x47, 0x05}
	Overlapped              = Code{KeyAborted, 0x4e, 0x00}

	MediumChanged        = Code{KeyUnitAttention, 0x28, 0x00}
	PowerOn              = Code{KeyUnitAttention, 0x29, 0x00}
	BusDeviceReset       = Code{KeyUnitAttention, 0x29, 0x03}
	NexusLoss            = Code{KeyUnitAttention, 0x29, 0x07}
	ModeChanged          = Code{KeyUnitAttention, 0x2a, 0x01}
	ReservationPreempted = Code{KeyUnitAttention, 0x2a, 0x03}
	ReservationReleased  = Code{KeyUnitAttention, 0x2a, 0x04}
	RegistrationGone     = Code{KeyUnitAttention, 0x2a, 0x05}
	AccessStateChanged   = Code{KeyUnitAttention, 0x2a, 0x06}
	CapacityChanged      = Code{KeyUnitAttention, 0x2a, 0x09}
	CommandsCleared      = Code{KeyUnitAttention, 0x2f, 0x00}
	InquiryChanged       = Code{KeyUnitAttention, 0x3f, 0x03}
	LUNsChanged          = Code{KeyUnitAttention, 0x3f, 0x0e}
)

// Sense is why a command was refused or failed.
type Sense struct {
	Code
	Info      uint64 // offset or address that goes with the code
	HasInfo   bool
	Field     uint16 // where in the CDB or the parameters the mistake is
	HasField  bool
	InCommand bool // Field is in the CDB
}

// sense formats (SPC-4 section 4.5).
const (
	fixedSense          = 0x70
	descriptorSense     = 0x72
	fixedSenseSize      = 18
	validInfo           = 0x80
	senseKeySpecific    = 0x80
	fieldInCommand      = 0x40
	descriptorInfo      = 0x00
	descriptorInfoSize  = 12
	descriptorField     = 0x02
	descriptorFieldSize = 8
)

// Encode gives the sense data in the fixed or in the descriptor format.
func (s Sense) Encode(descriptors bool) []byte {
	if descriptors {
		return s.encodeDescriptors()
	}
	b := make([]byte, fixedSenseSize)
	b[0], b[2], b[7], b[12], b[13] = fixedSense, s.Key, fixedSenseSize-8, s.ASC, s.ASCQ
	if s.HasInfo && s.Info <= 0xffffffff {
		b[0] |= validInfo
		binary.BigEndian.PutUint32(b[3:], uint32(s.Info))
	}
	if s.HasField {
		s.putField(b[15:])
	}
	return b
}

func (s Sense) putField(b []byte) {
	b[0] = senseKeySpecific
	if s.InCommand {
		b[0] |= fieldInCommand
	}
	binary.BigEndian.PutUint16(b[1:], s.Field)
}

func (s Sense) encodeDescriptors() []byte {
	b := []byte{descriptorSense, s.Key, s.ASC, s.ASCQ, 0, 0, 0, 0}
	if s.HasInfo {
		d := make([]byte, descriptorInfoSize)
		d[0], d[1], d[2] = descriptorInfo, descriptorInfoSize-2, validInfo
		binary.BigEndian.PutUint64(d[4:], s.Info)
		b = append(b, d...)
	}
	if s.HasField {
		d := make([]byte, descriptorFieldSize)
		d[0], d[1] = descriptorField, descriptorFieldSize-2
		s.putField(d[4:])
		b = append(b, d...)
	}
	b[7] = byte(len(b) - 8)
	return b
}
