package wal

import (
	"encoding/binary"

	"sheepdog/storage/object"
)

// Type says what a Record did to its object.
type Type uint8

// Types of records. They are part of the format on disk.
const (
	// Create makes the object exist, empty. Generation names the incarnation.
	Create Type = iota + 1
	// Write stores Count blocks from Block on; the payload and Sums come with it.
	Write
	// Hole turns Count blocks from Block on into holes.
	Hole
	// Zero makes Count blocks from Block on zeros that stay allocated.
	Zero
	// Direct marks region Block of the object as being written in its file directly:
	// after a crash the checksums of that region are rebuilt from the content.
	Direct
	// Delete ends the object.
	Delete
)

// FlagComplete on a Create says that the object's file was made in full and synced
// before the record was written: its checksum table is to be trusted.
const FlagComplete uint8 = 1

// Record is one entry of the log. A Record given to a replay function is valid
// only during the call.
type Record struct {
	Type       Type
	Flags      uint8
	SizeShift  uint8
	Key        object.Key
	Version    object.Version
	Generation uint64
	Block      uint32
	Count      uint32
	Sums       []uint64 // Write: one checksum for each block
}

const recordBytes = 48

// size is the length of the encoded descriptor in bytes.
func (r *Record) size() int { return recordBytes + 8*len(r.Sums) }

// payload is the number of payload bytes that belong to the record.
func (r *Record) payload() int {
	if r.Type != Write {
		return 0
	}
	return int(r.Count) * object.BlockSize
}

func (r *Record) append(b []byte) []byte {
	le := binary.LittleEndian
	b = append(b, byte(r.Type), r.Flags, r.SizeShift, byte(r.Key.Group.Policy))
	b = le.AppendUint16(b, uint16(r.Key.Group.Partition))
	b = append(b, 0, 0)
	b = le.AppendUint64(b, uint64(r.Key.ID))
	b = le.AppendUint64(b, r.Version.Epoch)
	b = le.AppendUint64(b, r.Version.Seq)
	b = le.AppendUint64(b, r.Generation)
	b = le.AppendUint32(b, r.Block)
	b = le.AppendUint32(b, r.Count)
	for _, s := range r.Sums {
		b = le.AppendUint64(b, s)
	}
	return b
}

// decode reads one descriptor from b and returns what follows; ok is false if b does
// not hold a well-formed descriptor. Nothing in b is believed: lengths are checked
// before use, so that any bytes can be given to it.
func (r *Record) decode(b []byte) (rest []byte, ok bool) {
	if len(b) < recordBytes {
		return nil, false
	}
	le := binary.LittleEndian
	sums := r.Sums[:0]
	*r = Record{
		Type: Type(b[0]), Flags: b[1], SizeShift: b[2],
		Key: object.Key{
			Group: object.Group{Policy: object.PolicyID(b[3]), Partition: object.Partition(le.Uint16(b[4:]))},
			ID:    object.ID(le.Uint64(b[8:])),
		},
		Version:    object.Version{Epoch: le.Uint64(b[16:]), Seq: le.Uint64(b[24:])},
		Generation: le.Uint64(b[32:]),
		Block:      le.Uint32(b[40:]),
		Count:      le.Uint32(b[44:]),
	}
	b = b[recordBytes:]
	if !r.wellFormed() {
		return nil, false
	}
	if r.Type == Write {
		if uint64(len(b)) < 8*uint64(r.Count) {
			return nil, false
		}
		for i := range int(r.Count) {
			sums = append(sums, le.Uint64(b[8*i:]))
		}
		b = b[8*r.Count:]
	}
	r.Sums = sums
	return b, true
}

func (r *Record) wellFormed() bool {
	if r.SizeShift < object.MinSizeShift || r.SizeShift > object.MaxSizeShift {
		return false
	}
	blocks := uint64(1) << r.SizeShift / object.BlockSize
	end := uint64(r.Block) + uint64(r.Count)
	switch r.Type {
	case Create, Delete:
		return r.Block == 0 && r.Count == 0
	case Write, Hole, Zero:
		return r.Count > 0 && end <= blocks
	case Direct:
		return r.Count == 1 && end <= blocks
	}
	return false
}
