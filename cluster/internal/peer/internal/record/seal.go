package record

import "encoding/binary"

// Sizes in bytes.
const (
	// HeaderSize is a record's header: type, version, length. RFC 8446, 5.1.
	HeaderSize = 5
	// MaxContent is the longest content of a record.
	MaxContent = 1 << 14
	// MaxSize is the longest record that a Sealer makes.
	MaxSize = HeaderSize + MaxContent + overhead
	// KeyUpdateSize is the record of a KeyUpdate.
	KeyUpdateSize = HeaderSize + keyUpdateSize + overhead

	overhead = 1 + tagSize // the content's type behind it, and the tag
	// maxProtected is the longest a record may be behind its header: RFC 8446, 5.2.
	maxProtected  = MaxContent + 256
	keyUpdateSize = 5
)

// MaxRecords is how many records a key protects. RFC 8446, 5.5, has AES-GCM protect 2^24.5
// full ones at most; crypto/tls does not count them. With records of full size that is
// 256 GiB.
const MaxRecords = 1 << 24

// Content types: RFC 8446, 5.1.
const (
	typeAlert     = 21
	typeHandshake = 22
	typeData      = 23
)

// Handshake messages after the handshake: RFC 8446, 4 and 4.6.3.
const (
	messageKeyUpdate = 24
	updateNotAsked   = 0
	updateAsked      = 1
)

// Sealer protects what one side sends.
type Sealer struct {
	keys  keys
	limit uint64
}

// NewSealer makes a Sealer from the side's first application traffic secret, of which it
// takes a copy. suite is the number of a cipher suite of TLS 1.3. A key protects at most
// limit records, which is MaxRecords but for tests, and at least 2.
func NewSealer(suite uint16, secret []byte, limit uint64) (*Sealer, error) {
	s := &Sealer{limit: limit}
	if err := s.keys.init(suite, secret); err != nil {
		return nil, err
	}
	return s, nil
}

// Seal makes a record of n bytes of application data that are at b[HeaderSize:], at most
// MaxContent and at least one, where they are. b has room for HeaderSize + n and what
// comes behind, at most MaxSize. It returns the length of the record.
func (s *Sealer) Seal(b []byte, n int) int { return s.seal(b, n, typeData) }

func (s *Sealer) seal(b []byte, n int, typ byte) int {
	size := HeaderSize + n + overhead
	b = b[:size]
	b[0], b[1], b[2] = typeData, 3, 3
	binary.BigEndian.PutUint16(b[3:], uint16(n+overhead))
	b[HeaderSize+n] = typ
	s.keys.aead.Seal(b[:HeaderSize], s.keys.next(), b[HeaderSize:HeaderSize+n+1], b[:HeaderSize])
	return size
}

// Due reports whether the key has protected as much as it may: a KeyUpdate has to come
// before the next record.
func (s *Sealer) Due() bool { return s.keys.seq >= s.limit-1 } // the KeyUpdate is one more

// KeyUpdate makes the record of a KeyUpdate at b, KeyUpdateSize long, and goes on with the
// next key. ask asks the other side for the same. The Sealer is of no use after an error.
func (s *Sealer) KeyUpdate(b []byte, ask bool) (int, error) {
	request := byte(updateNotAsked)
	if ask {
		request = updateAsked
	}
	copy(b[HeaderSize:], []byte{messageKeyUpdate, 0, 0, 1, request})
	n := s.seal(b, keyUpdateSize, typeHandshake)
	return n, s.keys.update()
}
