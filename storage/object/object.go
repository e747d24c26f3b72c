// Package object is the vocabulary of the storage layer: names, kinds, sizes,
// versions, requests and errors of objects. It is pure: it decides nothing that
// needs a clock, a disk or a socket, and every layer above may import it.
package object

import (
	"encoding/binary"
	"fmt"

	"github.com/zeebo/xxh3"
)

// BlockSize is the grain of checksums, allocation and the write-ahead log, in bytes.
const BlockSize = 4096

// SectorSize is the unit that a disk writes atomically, in bytes (INV-S2).
const SectorSize = 512

// Object sizes are powers of two between these shifts (1 MiB to 2 GiB).
const (
	MinSizeShift     = 20
	DefaultSizeShift = 22
	MaxSizeShift     = 31
)

// VID names a VDI or one of its snapshots: 24 bits. 0 is no VDI.
type VID uint32

// MaxVID is the largest VID.
const MaxVID VID = 1<<24 - 1

// String gives the VID as the original prints it: six hexadecimal digits.
func (v VID) String() string { return fmt.Sprintf("%06x", uint32(v)) }

// ID is a 64-bit object id with the bit layout of the native protocol:
// the top bits are the kind, bits 32-55 the VID, bits 0-31 the index.
type ID uint64

// Kind tells what an object holds.
type Kind uint8

// Kinds of objects. All but KindMap are the native protocol's.
const (
	KindData    Kind = iota // a piece of a volume's content
	KindInode               // bit 63
	KindVMState             // bit 62
	KindAttr                // bit 61
	KindMap                 // bit 58: 2^20 entries of a volume's map
)

const (
	bitInode   = 63
	bitVMState = 62
	bitAttr    = 61
	bitMap     = 58
	kindMask   = ID(0xff) << 56
)

var kindBits = [...]ID{KindData: 0, KindInode: 1 << bitInode, KindVMState: 1 << bitVMState, KindAttr: 1 << bitAttr, KindMap: 1 << bitMap}

// NewID builds the id of the object of the given kind, volume and index.
func NewID(kind Kind, vid VID, index uint32) ID {
	return kindBits[kind] | ID(vid&MaxVID)<<32 | ID(index)
}

// DataID is NewID(KindData, vid, index).
func DataID(vid VID, index uint32) ID { return ID(vid&MaxVID)<<32 | ID(index) }

// Kind returns the object's kind; ok is false if the kind bits are none that this project knows.
func (id ID) Kind() (k Kind, ok bool) {
	for k, bits := range kindBits {
		if id&kindMask == bits {
			return Kind(k), true
		}
	}
	return 0, false
}

// VID returns the volume that owns the object.
func (id ID) VID() VID { return VID(id>>32) & MaxVID }

// Index returns the object's index within its volume and kind.
func (id ID) Index() uint32 { return uint32(id) }

// String gives the id as sixteen hexadecimal digits, as in file names and logs.
func (id ID) String() string { return fmt.Sprintf("%016x", uint64(id)) }

// PolicyID numbers a redundancy policy of the cluster (for instance "3 copies").
type PolicyID uint8

// Partition numbers a partition of one policy's objects: the unit of placement and replication.
type Partition uint16

// PartitionOf returns the partition of an object in a table of count partitions
// (a power of two): the low bits of the xxh3 of the id's eight little-endian bytes.
func PartitionOf(id ID, count int) Partition {
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], uint64(id))
	return Partition(xxh3.Hash(b[:]) & uint64(count-1))
}

// Group is one partition of one policy: all objects of a group have the same replicas.
type Group struct {
	Policy    PolicyID
	Partition Partition
}

// String gives "PP-pppp" in hexadecimal, as in directory names.
func (g Group) String() string { return fmt.Sprintf("%02x-%04x", uint8(g.Policy), uint16(g.Partition)) }

// Key names an object on a node: where it belongs and which it is.
type Key struct {
	Group Group
	ID    ID
}

// String gives "PP-pppp/oid".
func (k Key) String() string { return k.Group.String() + "/" + k.ID.String() }

// Version orders the writes of a partition: the epoch of the replica set that
// accepted the write, then the write's sequence number in the partition.
type Version struct {
	Epoch uint64
	Seq   uint64
}

// Less reports whether v is older than w.
func (v Version) Less(w Version) bool {
	return v.Epoch < w.Epoch || v.Epoch == w.Epoch && v.Seq < w.Seq
}
