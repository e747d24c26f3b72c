package pdu

import (
	"encoding/binary"
	"hash/crc32"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Digest is CRC32C as it goes over the wire (RFC 7143 section 13.1): over the pieces one after
// another, padding included.
func Digest(pieces ...[]byte) (d [DigestSize]byte) {
	var sum uint32
	for _, p := range pieces {
		sum = crc32.Update(sum, castagnoli, p)
	}
	binary.LittleEndian.PutUint32(d[:], sum)
	return d
}
