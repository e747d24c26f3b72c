package pdu

import "encoding/binary"

// Numbers are what every answer carries of the session's order.
type Numbers struct {
	StatusSN   uint32
	ExpectedSN uint32 // ExpCmdSN
	MaxSN      uint32 // MaxCmdSN
}

// SetNumbers puts the numbers into an answer.
func (h *Header) SetNumbers(n Numbers) {
	binary.BigEndian.PutUint32(h[24:], n.StatusSN)
	binary.BigEndian.PutUint32(h[28:], n.ExpectedSN)
	binary.BigEndian.PutUint32(h[32:], n.MaxSN)
}

// SetDataSize says how long the data segment is, without padding.
func (h *Header) SetDataSize(n int) { h[5], h[6], h[7] = byte(n>>16), byte(n>>8), byte(n) }

func answer(op, flags byte, tag uint32) (h Header) {
	h[0], h[1] = op, flags
	binary.BigEndian.PutUint32(h[16:], tag)
	return h
}

// Residual is what differs between the length that the initiator expected and the one of
// the command, in bytes.
type Residual struct {
	Overflow bool // the command's length is longer
	Count    uint32
}

func (r Residual) flags() byte {
	switch {
	case r.Count == 0:
		return 0
	case r.Overflow:
		return flagOverflow
	}
	return flagUnderflow
}

// Response codes of SCSI Response.
const (
	ResponseDone    = 0x00 // command completed at target
	ResponseFailure = 0x01 // target failure
)

// Response makes a SCSI Response; dataPDUs is how many Data-In and R2T PDUs the command had.
func Response(tag uint32, code, status byte, r Residual, dataPDUs uint32) Header {
	h := answer(OpResponse, FlagFinal|r.flags(), tag)
	h[2], h[3] = code, status
	binary.BigEndian.PutUint32(h[36:], dataPDUs)
	binary.BigEndian.PutUint32(h[44:], r.Count)
	return h
}

// DataIn makes a SCSI Data-In of n bytes at offset.
func DataIn(tag uint32, final bool, dataSN, offset uint32, n int) Header {
	h := answer(OpDataIn, 0, tag)
	if final {
		h[1] = FlagFinal
	}
	binary.BigEndian.PutUint32(h[20:], NoTag)
	binary.BigEndian.PutUint32(h[36:], dataSN)
	binary.BigEndian.PutUint32(h[40:], offset)
	h.SetDataSize(n)
	return h
}

// SetStatus makes the last Data-In carry the command's status as well.
func (h *Header) SetStatus(status byte, r Residual) {
	h[1] |= FlagStatus | FlagFinal | r.flags()
	h[3] = status
	binary.BigEndian.PutUint32(h[44:], r.Count)
}

// R2T makes a Ready To Transfer for n bytes at offset.
func R2T(lun uint64, tag, transferTag, r2tSN, offset, n uint32) Header {
	h := answer(OpR2T, FlagFinal, tag)
	binary.BigEndian.PutUint64(h[8:], lun)
	binary.BigEndian.PutUint32(h[20:], transferTag)
	binary.BigEndian.PutUint32(h[36:], r2tSN)
	binary.BigEndian.PutUint32(h[40:], offset)
	binary.BigEndian.PutUint32(h[44:], n)
	return h
}

// NOPIn makes a NOP-In: the answer to a NOP-Out (transferTag NoTag), or a question of the
// target's own (tag NoTag).
func NOPIn(lun uint64, tag, transferTag uint32, n int) Header {
	h := answer(OpNOPIn, FlagFinal, tag)
	binary.BigEndian.PutUint64(h[8:], lun)
	binary.BigEndian.PutUint32(h[20:], transferTag)
	h.SetDataSize(n)
	return h
}

// Task management functions (RFC 7143 section 11.5.1).
const (
	TaskAbort      = 1
	TaskAbortSet   = 2
	TaskClearACA   = 3
	TaskClearSet   = 4
	TaskLUNReset   = 5
	TaskWarmReset  = 6
	TaskColdReset  = 7
	TaskReassign   = 8
	taskFunctions  = 0x7f
	TaskComplete   = 0
	TaskUnknown    = 1 // task does not exist
	TaskNoLUN      = 2
	TaskNoReassign = 4
	TaskNoFunction = 5
	TaskRejected   = 255
)

// TaskFunction is what a task management request asks for.
func (h *Header) TaskFunction() byte { return h[1] & taskFunctions }

// TaskAnswer makes the answer to a task management request.
func TaskAnswer(tag uint32, response byte) Header {
	h := answer(OpTaskAnswer, FlagFinal, tag)
	h[2] = response
	return h
}

// LoginStatus is the class and detail of a login response (RFC 7143 section 11.13.5).
type LoginStatus uint16

// Login status codes.
const (
	LoginOK             LoginStatus = 0x0000
	LoginInitiatorError LoginStatus = 0x0200
	LoginAuthentication LoginStatus = 0x0201
	LoginForbidden      LoginStatus = 0x0202
	LoginNotFound       LoginStatus = 0x0203
	LoginVersion        LoginStatus = 0x0205
	LoginTooMany        LoginStatus = 0x0206
	LoginMissing        LoginStatus = 0x0207
	LoginNoInclude      LoginStatus = 0x0208
	LoginSessionType    LoginStatus = 0x0209
	LoginNoSession      LoginStatus = 0x020a
	LoginInvalid        LoginStatus = 0x020b
	LoginTargetError    LoginStatus = 0x0300
	LoginUnavailable    LoginStatus = 0x0301
	LoginOutOfResources LoginStatus = 0x0302
)

// LoginReply makes the answer to the login request q.
func LoginReply(q *Header, flags byte, tsih uint16, status LoginStatus, n int) Header {
	h := answer(OpLoginReply, flags, q.TaskTag())
	copy(h[8:14], q[8:14])
	binary.BigEndian.PutUint16(h[14:], tsih)
	binary.BigEndian.PutUint16(h[36:], uint16(status))
	h.SetDataSize(n)
	return h
}

// TextReply makes the answer to a text request.
func TextReply(tag, transferTag uint32, final bool, n int) Header {
	h := answer(OpTextReply, FlagContinue, tag)
	if final {
		h[1] = FlagFinal
	}
	binary.BigEndian.PutUint32(h[20:], transferTag)
	h.SetDataSize(n)
	return h
}

// Reasons and answers of a logout.
const (
	LogoutSession    = 0
	LogoutConnection = 1
	LogoutRecovery   = 2
	logoutReasons    = 0x7f

	LogoutDone       = 0
	LogoutNoCID      = 1
	LogoutNoRecovery = 2
)

// LogoutReason is why a logout request wants to.
func (h *Header) LogoutReason() byte { return h[1] & logoutReasons }

// LogoutReply makes the answer to a logout request.
func LogoutReply(tag uint32, response byte) Header {
	h := answer(OpLogoutDone, FlagFinal, tag)
	h[2] = response
	return h
}

// Reasons of a reject (RFC 7143 section 11.17.1).
const (
	RejectDataDigest  = 0x02
	RejectSNACK       = 0x03
	RejectProtocol    = 0x04
	RejectUnsupported = 0x05
	RejectTooMany     = 0x06
	RejectInvalid     = 0x09
	RejectWaiting     = 0x0a // long operation
	RejectNegotiation = 0x0b
)

// Reject makes a reject; its data is the rejected header.
func Reject(reason byte) Header {
	h := answer(OpReject, FlagFinal, NoTag)
	h[2] = reason
	h.SetDataSize(HeaderSize)
	return h
}

// Events of an asynchronous message (RFC 7143 section 11.9.1).
const (
	AsyncSCSI   = 0
	AsyncLogout = 1 // the target asks for a logout
	AsyncDrop   = 2 // the target drops the connection
)

// Async makes an asynchronous message; seconds is in which time a logout is asked for.
func Async(lun uint64, event byte, seconds uint16) Header {
	h := answer(OpAsync, FlagFinal, NoTag)
	binary.BigEndian.PutUint64(h[8:], lun)
	h[36] = event
	binary.BigEndian.PutUint16(h[42:], seconds)
	return h
}
