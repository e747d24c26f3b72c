package wire

import (
	"bytes"
	"encoding/binary"
)

var le = binary.LittleEndian

// Request is the header of a request.
type Request struct {
	ProtoVer   uint8
	Op         Op
	Flags      uint16
	Epoch      uint32
	ID         uint32
	DataLength uint32 // of the payload if HasPayload, else of the data wanted, in bytes
	body       [32]byte
}

// ParseRequest decodes the first HeaderSize bytes of b.
func ParseRequest(b []byte) (r Request) {
	_ = b[HeaderSize-1]
	r.ProtoVer, r.Op, r.Flags = b[0], Op(b[1]), le.Uint16(b[2:])
	r.Epoch, r.ID, r.DataLength = le.Uint32(b[4:]), le.Uint32(b[8:]), le.Uint32(b[12:])
	copy(r.body[:], b[16:HeaderSize])
	return r
}

// HasPayload reports whether DataLength bytes follow the header.
func (r *Request) HasPayload() bool { return r.Flags&SD_FLAG_CMD_WRITE != 0 }

// ObjectRequest is what object operations have in their header.
type ObjectRequest struct {
	OID, CowOID uint64
	Copies      uint8
	CopyPolicy  uint8
	Offset      uint64
}

// Object decodes the header's part for object operations.
func (r *Request) Object() ObjectRequest {
	b := r.body[:]
	return ObjectRequest{OID: le.Uint64(b), CowOID: le.Uint64(b[8:]), Copies: b[16], CopyPolicy: b[17], Offset: le.Uint64(b[24:])}
}

// VDIRequest is what VDI operations have in their header.
type VDIRequest struct {
	Size           uint64 // bytes
	BaseVID        uint32
	Copies         uint8
	CopyPolicy     uint8
	StorePolicy    uint8
	BlockSizeShift uint8
	SnapID         uint32
	Type           uint32
}

// VDI decodes the header's part for VDI operations.
func (r *Request) VDI() VDIRequest {
	b := r.body[:]
	return VDIRequest{
		Size: le.Uint64(b), BaseVID: le.Uint32(b[8:]), Copies: b[12], CopyPolicy: b[13], StorePolicy: b[14], BlockSizeShift: b[15],
		SnapID: le.Uint32(b[16:]), Type: le.Uint32(b[20:]),
	}
}

// Names decodes the payload of a VDI operation: a name, and perhaps a tag.
func Names(payload []byte) (name, tag string) {
	if len(payload) > MaxName {
		tag = text(payload[MaxName:min(len(payload), 2*MaxName)])
		payload = payload[:MaxName]
	}
	return text(payload), tag
}

// text is what a field has up to the first zero.
func text(b []byte) string {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	return string(b)
}

// PutResponse encodes a response to r into the first HeaderSize bytes of b: n bytes of data
// follow it.
func PutResponse(b []byte, r *Request, result Result, n int) {
	clear(b[:HeaderSize])
	b[0], b[1] = r.ProtoVer, byte(r.Op)
	le.PutUint16(b[2:], r.Flags)
	le.PutUint32(b[4:], r.Epoch)
	le.PutUint32(b[8:], r.ID)
	le.PutUint32(b[12:], uint32(n))
	le.PutUint32(b[16:], uint32(result))
}

// PutCopies adds to the response to an object operation how many copies there are.
func PutCopies(b []byte, copies uint8) { b[20] = copies }

// PutVDI adds to the response to a VDI operation which VDI it is about.
func PutVDI(b []byte, vid uint32, copies, blockSizeShift uint8) {
	le.PutUint32(b[24:], vid)
	b[32], b[33] = copies, blockSizeShift
}

// PutDefaults adds to the response to SD_OP_GET_CLUSTER_DEFAULT what new VDIs are like.
func PutDefaults(b []byte, copies, copyPolicy, blockSizeShift uint8) {
	b[20], b[21], b[22] = copies, copyPolicy, blockSizeShift
}
