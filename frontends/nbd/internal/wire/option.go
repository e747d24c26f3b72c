package wire

import (
	"bytes"
	"encoding/binary"
	"errors"
	"unicode/utf8"
)

// Sizes of the handshake's fixed parts, in bytes.
const (
	GreetingSize     = 18
	ClientFlagsSize  = 4
	OptionHeaderSize = 16
	optionReplySize  = 20
)

// ErrMalformed: the data of an option or payload does not parse. What was wrong
// is in the text of the error that wraps it.
var ErrMalformed = errors.New("malformed")

type malformed string

func (m malformed) Error() string        { return string(m) }
func (m malformed) Is(target error) bool { return target == ErrMalformed }

// AppendGreeting appends the server's first message ("Newstyle negotiation").
func AppendGreeting(b []byte, flags uint16) []byte {
	b = binary.BigEndian.AppendUint64(b, NBDMAGIC)
	b = binary.BigEndian.AppendUint64(b, IHAVEOPT)
	return binary.BigEndian.AppendUint16(b, flags)
}

// OptionHeader announces an option and Length bytes of its data.
type OptionHeader struct {
	Option uint32
	Length uint32
}

// ParseOptionHeader decodes the first OptionHeaderSize bytes of b.
func ParseOptionHeader(b []byte) (OptionHeader, error) {
	if binary.BigEndian.Uint64(b) != IHAVEOPT {
		return OptionHeader{}, malformed("option does not begin with IHAVEOPT")
	}
	return OptionHeader{binary.BigEndian.Uint32(b[8:]), binary.BigEndian.Uint32(b[12:])}, nil
}

// CheckString reports what makes s unfit as a string of the protocol, or nil.
func CheckString(s []byte) error {
	switch {
	case len(s) > MaxString:
		return malformed("string is longer than 4096 bytes")
	case bytes.IndexByte(s, 0) >= 0:
		return malformed("string contains NUL")
	case !utf8.Valid(s):
		return malformed("string is not UTF-8")
	}
	return nil
}

// reader takes fields off the front of an option's data.
type reader struct {
	b   []byte
	bad bool
}

func (r *reader) take(n uint32) []byte {
	if r.bad || uint64(n) > uint64(len(r.b)) {
		r.bad = true
		return nil
	}
	p := r.b[:n]
	r.b = r.b[n:]
	return p
}

func (r *reader) u16() uint16 {
	if p := r.take(2); p != nil {
		return binary.BigEndian.Uint16(p)
	}
	return 0
}

func (r *reader) u32() uint32 {
	if p := r.take(4); p != nil {
		return binary.BigEndian.Uint32(p)
	}
	return 0
}

// InfoRequest is the data of NBD_OPT_INFO and NBD_OPT_GO.
type InfoRequest struct {
	Name  string
	Infos []uint16 // information requests, as sent
}

// Wants reports whether the client asked for an information type.
func (r InfoRequest) Wants(info uint16) bool {
	for _, i := range r.Infos {
		if i == info {
			return true
		}
	}
	return false
}

// ParseInfoRequest decodes the data of NBD_OPT_INFO and NBD_OPT_GO.
func ParseInfoRequest(data []byte) (InfoRequest, error) {
	r := reader{b: data}
	name := r.take(r.u32())
	count := r.u16()
	if r.bad {
		return InfoRequest{}, malformed("name or number of information requests goes beyond the option's data")
	}
	if len(r.b) != 2*int(count) {
		return InfoRequest{}, malformed("option's length does not match its number of information requests")
	}
	if err := CheckString(name); err != nil {
		return InfoRequest{}, err
	}
	q := InfoRequest{Name: string(name), Infos: make([]uint16, 0, count)}
	for range count {
		q.Infos = append(q.Infos, r.u16())
	}
	return q, nil
}

// MetaRequest is the data of NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT.
type MetaRequest struct {
	Name    string
	Queries []string
}

// ParseMetaRequest decodes the data of NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT.
func ParseMetaRequest(data []byte) (MetaRequest, error) {
	r := reader{b: data}
	name := r.take(r.u32())
	count := r.u32()
	if r.bad {
		return MetaRequest{}, malformed("name or number of queries goes beyond the option's data")
	}
	if err := CheckString(name); err != nil {
		return MetaRequest{}, err
	}
	// Each query takes at least its length field, so count is bounded by what is there.
	if uint64(count)*4 > uint64(len(r.b)) {
		return MetaRequest{}, malformed("number of queries goes beyond the option's data")
	}
	q := MetaRequest{Name: string(name), Queries: make([]string, 0, count)}
	for range count {
		s := r.take(r.u32())
		if r.bad {
			return MetaRequest{}, malformed("query goes beyond the option's data")
		}
		if err := CheckString(s); err != nil {
			return MetaRequest{}, err
		}
		q.Queries = append(q.Queries, string(s))
	}
	if len(r.b) != 0 {
		return MetaRequest{}, malformed("option's data goes on after its last query")
	}
	return q, nil
}

// AppendOptionReply appends a reply of type rep with the given data.
func AppendOptionReply(b []byte, option, rep uint32, data []byte) []byte {
	b = appendOptionReplyHeader(b, option, rep, len(data))
	return append(b, data...)
}

func appendOptionReplyHeader(b []byte, option, rep uint32, length int) []byte {
	b = binary.BigEndian.AppendUint64(b, NBD_REP_MAGIC)
	b = binary.BigEndian.AppendUint32(b, option)
	b = binary.BigEndian.AppendUint32(b, rep)
	return binary.BigEndian.AppendUint32(b, uint32(length))
}

// AppendError appends an error reply with a message for people, cut to what a string may be.
func AppendError(b []byte, option, rep uint32, message string) []byte {
	message = Truncate(message)
	b = appendOptionReplyHeader(b, option, rep, len(message))
	return append(b, message...)
}

// Truncate cuts s to MaxString bytes without cutting a code point.
func Truncate(s string) string {
	if len(s) <= MaxString {
		return s
	}
	n := MaxString
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n]
}

// AppendServer appends a NBD_REP_SERVER: one export of a list, with its description.
func AppendServer(b []byte, name, description string) []byte {
	b = appendOptionReplyHeader(b, NBD_OPT_LIST, NBD_REP_SERVER, 4+len(name)+len(description))
	b = binary.BigEndian.AppendUint32(b, uint32(len(name)))
	b = append(b, name...)
	return append(b, description...)
}

// AppendMetaContext appends a NBD_REP_META_CONTEXT.
func AppendMetaContext(b []byte, option, id uint32, name string) []byte {
	b = appendOptionReplyHeader(b, option, NBD_REP_META_CONTEXT, 4+len(name))
	b = binary.BigEndian.AppendUint32(b, id)
	return append(b, name...)
}

// AppendInfoExport appends the NBD_INFO_EXPORT information.
func AppendInfoExport(b []byte, option uint32, size uint64, flags uint16) []byte {
	b = appendOptionReplyHeader(b, option, NBD_REP_INFO, 12)
	b = binary.BigEndian.AppendUint16(b, NBD_INFO_EXPORT)
	b = binary.BigEndian.AppendUint64(b, size)
	return binary.BigEndian.AppendUint16(b, flags)
}

// AppendInfoString appends a NBD_INFO_NAME or NBD_INFO_DESCRIPTION information.
func AppendInfoString(b []byte, option uint32, info uint16, s string) []byte {
	b = appendOptionReplyHeader(b, option, NBD_REP_INFO, 2+len(s))
	b = binary.BigEndian.AppendUint16(b, info)
	return append(b, s...)
}

// AppendInfoBlockSize appends the NBD_INFO_BLOCK_SIZE information, in bytes.
func AppendInfoBlockSize(b []byte, option, minimum, preferred, maxPayload uint32) []byte {
	b = appendOptionReplyHeader(b, option, NBD_REP_INFO, 14)
	b = binary.BigEndian.AppendUint16(b, NBD_INFO_BLOCK_SIZE)
	b = binary.BigEndian.AppendUint32(b, minimum)
	b = binary.BigEndian.AppendUint32(b, preferred)
	return binary.BigEndian.AppendUint32(b, maxPayload)
}

// AppendExportName appends the answer to NBD_OPT_EXPORT_NAME.
func AppendExportName(b []byte, size uint64, flags uint16, noZeroes bool) []byte {
	b = binary.BigEndian.AppendUint64(b, size)
	b = binary.BigEndian.AppendUint16(b, flags)
	if noZeroes {
		return b
	}
	return append(b, make([]byte, NewstyleZeroes)...)
}
