package wire

import "encoding/binary"

// Headers is the form of messages that a session negotiated.
type Headers uint8

// Forms of messages.
const (
	Simple     Headers = iota // compact requests, simple replies
	Structured                // compact requests, structured reply chunks where there is a payload
	Extended                  // extended requests and extended reply chunks
)

// String names the form as `dog session list` shows it.
func (h Headers) String() string { return [...]string{"simple", "structured", "extended"}[h] }

// Sizes of transmission headers, in bytes.
const (
	SimpleReplySize = 16
	MaxRequestSize  = 32
	// MaxReadHeadSize is the longest head in front of the data of a read reply.
	MaxReadHeadSize = 32 + 8
)

// Request is the header of a request.
type Request struct {
	Flags  uint16
	Type   uint16
	Cookie uint64
	Offset uint64
	Length uint64 // of the payload if HasPayload, else of the effect, in bytes
}

// RequestSize is the size of a request header, in bytes.
func (h Headers) RequestSize() int {
	if h == Extended {
		return 32
	}
	return 28
}

// ParseRequest decodes the first RequestSize bytes of b; ok is false if the magic is wrong.
func (h Headers) ParseRequest(b []byte) (r Request, ok bool) {
	r.Flags = binary.BigEndian.Uint16(b[4:])
	r.Type = binary.BigEndian.Uint16(b[6:])
	r.Cookie = binary.BigEndian.Uint64(b[8:])
	r.Offset = binary.BigEndian.Uint64(b[16:])
	if h == Extended {
		r.Length = binary.BigEndian.Uint64(b[24:])
		return r, binary.BigEndian.Uint32(b) == NBD_EXTENDED_REQUEST_MAGIC
	}
	r.Length = uint64(binary.BigEndian.Uint32(b[24:]))
	return r, binary.BigEndian.Uint32(b) == NBD_REQUEST_MAGIC
}

// HasPayload reports whether Length bytes follow the header.
func (h Headers) HasPayload(r *Request) bool {
	if h == Extended {
		return r.Flags&NBD_CMD_FLAG_PAYLOAD_LEN != 0
	}
	return r.Type == NBD_CMD_WRITE
}

// PutSimpleReply writes a simple reply's SimpleReplySize bytes.
func PutSimpleReply(b []byte, cookie uint64, errno Errno) {
	binary.BigEndian.PutUint32(b, NBD_SIMPLE_REPLY_MAGIC)
	binary.BigEndian.PutUint32(b[4:], uint32(errno))
	binary.BigEndian.PutUint64(b[8:], cookie)
}

// ChunkSize is the size of the header of a reply chunk, in bytes. h is not Simple.
func (h Headers) ChunkSize() int {
	if h == Extended {
		return 32
	}
	return 20
}

// PutChunk writes the header of a chunk with length bytes of payload. offset is
// that of the request. h is not Simple.
func (h Headers) PutChunk(b []byte, flags, typ uint16, cookie, offset uint64, length int) {
	binary.BigEndian.PutUint16(b[4:], flags)
	binary.BigEndian.PutUint16(b[6:], typ)
	binary.BigEndian.PutUint64(b[8:], cookie)
	if h == Extended {
		binary.BigEndian.PutUint32(b, NBD_EXTENDED_REPLY_MAGIC)
		binary.BigEndian.PutUint64(b[16:], offset)
		binary.BigEndian.PutUint64(b[24:], uint64(length))
		return
	}
	binary.BigEndian.PutUint32(b, NBD_STRUCTURED_REPLY_MAGIC)
	binary.BigEndian.PutUint32(b[16:], uint32(length))
}

// DoneSize is the size of a reply without payload, in bytes.
func (h Headers) DoneSize() int {
	if h == Extended {
		return 32
	}
	return SimpleReplySize
}

// PutDone writes a successful reply without payload: DoneSize bytes. With
// structured replies it is a simple one, which is shorter and allowed for every
// request but NBD_CMD_READ; see PutNone for that.
func (h Headers) PutDone(b []byte, cookie, offset uint64) {
	if h == Extended {
		h.PutChunk(b, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_NONE, cookie, offset, 0)
		return
	}
	PutSimpleReply(b, cookie, NBD_SUCCESS)
}

// ReadHeadSize is the size of what precedes the data of a read reply, in bytes.
func (h Headers) ReadHeadSize() int {
	if h == Simple {
		return SimpleReplySize
	}
	return h.ChunkSize() + 8
}

// PutReadHead writes what precedes length bytes of data read at dataOffset by the
// request at offset.
func (h Headers) PutReadHead(b []byte, flags uint16, cookie, offset, dataOffset uint64, length int) {
	if h == Simple {
		PutSimpleReply(b, cookie, NBD_SUCCESS)
		return
	}
	h.PutChunk(b, flags, NBD_REPLY_TYPE_OFFSET_DATA, cookie, offset, length+8)
	binary.BigEndian.PutUint64(b[h.ChunkSize():], dataOffset)
}

// HoleSize is the size of a NBD_REPLY_TYPE_OFFSET_HOLE chunk, in bytes.
func (h Headers) HoleSize() int { return h.ChunkSize() + 12 }

// PutHole writes a NBD_REPLY_TYPE_OFFSET_HOLE chunk: length bytes at holeOffset read as zero.
func (h Headers) PutHole(b []byte, flags uint16, cookie, offset, holeOffset uint64, length uint32) {
	h.PutChunk(b, flags, NBD_REPLY_TYPE_OFFSET_HOLE, cookie, offset, 12)
	n := h.ChunkSize()
	binary.BigEndian.PutUint64(b[n:], holeOffset)
	binary.BigEndian.PutUint32(b[n+8:], length)
}

// AppendErrorReply appends the reply to a failed request. Simple replies have no
// room for the message.
func (h Headers) AppendErrorReply(b []byte, cookie, offset uint64, errno Errno, message string) []byte {
	if h == Simple {
		b = append(b, make([]byte, SimpleReplySize)...)
		PutSimpleReply(b[len(b)-SimpleReplySize:], cookie, errno)
		return b
	}
	message = Truncate(message)
	n := h.ChunkSize()
	b = append(b, make([]byte, n)...)
	h.PutChunk(b[len(b)-n:], NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_ERROR, cookie, offset, 6+len(message))
	b = binary.BigEndian.AppendUint32(b, uint32(errno))
	b = binary.BigEndian.AppendUint16(b, uint16(len(message)))
	return append(b, message...)
}

// Status is one descriptor of a block status reply.
type Status struct {
	Length uint64 // bytes
	Flags  uint32
}

// AppendBlockStatus appends a block status chunk of one metadata context:
// NBD_REPLY_TYPE_BLOCK_STATUS_EXT with extended headers, else
// NBD_REPLY_TYPE_BLOCK_STATUS, whose lengths must fit 32 bits.
func (h Headers) AppendBlockStatus(b []byte, flags uint16, cookie, offset uint64, context uint32, list []Status) []byte {
	n := h.ChunkSize()
	b = append(b, make([]byte, n)...)
	head := b[len(b)-n:]
	if h == Extended {
		h.PutChunk(head, flags, NBD_REPLY_TYPE_BLOCK_STATUS_EXT, cookie, offset, 8+16*len(list))
		b = binary.BigEndian.AppendUint32(b, context)
		b = binary.BigEndian.AppendUint32(b, uint32(len(list)))
		for _, s := range list {
			b = binary.BigEndian.AppendUint64(b, s.Length)
			b = binary.BigEndian.AppendUint64(b, uint64(s.Flags))
		}
		return b
	}
	h.PutChunk(head, flags, NBD_REPLY_TYPE_BLOCK_STATUS, cookie, offset, 4+8*len(list))
	b = binary.BigEndian.AppendUint32(b, context)
	for _, s := range list {
		b = binary.BigEndian.AppendUint32(b, uint32(s.Length))
		b = binary.BigEndian.AppendUint32(b, s.Flags)
	}
	return b
}

// ParseStatusPayload decodes the payload of a NBD_CMD_BLOCK_STATUS: the length of
// the effect in bytes, and the contexts to answer for, which are appended to ids.
// At most cap(ids) are taken; more, or a twice-named one, is malformed.
func ParseStatusPayload(b []byte, ids []uint32) (length uint64, _ []uint32, err error) {
	if len(b) < 8 || len(b)%4 != 0 {
		return 0, ids, malformed("block status payload must have 8+4n bytes")
	}
	if (len(b)-8)/4 > cap(ids) {
		return 0, ids, malformed("block status payload names more contexts than there are")
	}
	length = binary.BigEndian.Uint64(b)
	for b = b[8:]; len(b) > 0; b = b[4:] {
		id := binary.BigEndian.Uint32(b)
		for _, other := range ids {
			if other == id {
				return 0, ids, malformed("block status payload names a context twice")
			}
		}
		ids = append(ids, id)
	}
	return length, ids, nil
}
