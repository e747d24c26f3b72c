package storage

import (
	"encoding/binary"
	"fmt"
	"strconv"
	"strings"

	"github.com/zeebo/xxh3"

	"sheepdog/storage/object"
)

// An object's file: data at [0, size), then the header block, then the table of
// checksums. A table sector holds 63 checksums and a checksum of its own, so that a
// sector, which a crash leaves whole, is right by itself or known to be rotten: a zeroed
// sector must not turn data into holes. Tables are written in full when the file is made.
const (
	objectsDir = "objects"
	newDir     = "new"
	walDir     = "wal"

	blockSize = object.BlockSize

	headerMagic  = 0x314a424f50454853 // "SHEPOBJ1"
	headerFormat = 1
	headerBytes  = object.SectorSize // the header proper; the rest of its block is zero

	sumsPerSector  = object.SectorSize/8 - 1
	sectorsPerPage = blockSize / object.SectorSize
	sumsPerPage    = sumsPerSector * sectorsPerPage

	// regionBlocks is the grain of direct marks: what is checksummed anew after a crash.
	regionBlocks = 1024

	// badSum stands for all entries of a rotten table sector. No content is believed to have it.
	badSum = ^uint64(0)
)

func blocksOf(shift uint8) uint32     { return 1 << (shift - 12) }
func pagesOf(shift uint8) int         { return (int(blocksOf(shift)) + sumsPerPage - 1) / sumsPerPage }
func regionsOf(shift uint8) int       { return (int(blocksOf(shift)) + regionBlocks - 1) / regionBlocks }
func headerOffset(shift uint8) int64  { return 1 << shift }
func tableOffset(shift uint8) int64   { return 1<<shift + blockSize }
func overheadBytes(shift uint8) int64 { return int64(1+pagesOf(shift)) * blockSize }

// zeroBlock is a block of zeros, and zeroSum its checksum.
var (
	zeroBlock = make([]byte, blockSize)
	zeroSum   = object.Sum(zeroBlock)
)

// header is the decoded header of an object's file.
type header struct {
	key        object.Key
	shift      uint8
	uncertain  bool
	version    object.Version
	generation uint64
}

func (h *header) encode() []byte {
	le := binary.LittleEndian
	b := make([]byte, headerBytes)
	le.PutUint64(b[0:], headerMagic)
	le.PutUint32(b[16:], headerFormat)
	b[20] = byte(h.key.Group.Policy)
	b[21] = h.shift
	le.PutUint16(b[22:], uint16(h.key.Group.Partition))
	le.PutUint64(b[24:], uint64(h.key.ID))
	le.PutUint64(b[32:], h.generation)
	le.PutUint64(b[40:], h.version.Epoch)
	le.PutUint64(b[48:], h.version.Seq)
	if h.uncertain {
		b[56] = 1
	}
	le.PutUint64(b[8:], xxh3.Hash(b[16:]))
	return b
}

// decode reports whether b is an intact header of the given object.
func (h *header) decode(b []byte, key object.Key) bool {
	le := binary.LittleEndian
	if len(b) < headerBytes || le.Uint64(b) != headerMagic || le.Uint64(b[8:]) != xxh3.Hash(b[16:headerBytes]) {
		return false
	}
	*h = header{
		key: object.Key{
			Group: object.Group{Policy: object.PolicyID(b[20]), Partition: object.Partition(le.Uint16(b[22:]))},
			ID:    object.ID(le.Uint64(b[24:])),
		},
		shift: b[21], uncertain: b[56]&1 != 0,
		generation: le.Uint64(b[32:]),
		version:    object.Version{Epoch: le.Uint64(b[40:]), Seq: le.Uint64(b[48:])},
	}
	return le.Uint32(b[16:]) == headerFormat && h.key == key && h.shift >= object.MinSizeShift && h.shift <= object.MaxSizeShift
}

// sumPage is a page of an object's table in memory: no checksums of its own.
type sumPage struct {
	sums  [sumsPerPage]uint64
	dirty bool // differs from the file
}

// sectorSeed binds a table sector to its place and to the incarnation of its object.
func sectorSeed(generation uint64, sector int) uint64 {
	return generation*0x9e3779b97f4a7c15 + uint64(sector) + 1
}

func (p *sumPage) encode(b []byte, page int, generation uint64) {
	le := binary.LittleEndian
	for s := range sectorsPerPage {
		sector := b[s*object.SectorSize:][:object.SectorSize]
		for i := range sumsPerSector {
			le.PutUint64(sector[8*i:], p.sums[s*sumsPerSector+i])
		}
		le.PutUint64(sector[8*sumsPerSector:], xxh3.HashSeed(sector[:8*sumsPerSector], sectorSeed(generation, page*sectorsPerPage+s)))
	}
}

// decode returns false if a sector is rotten; its entries become badSum.
func (p *sumPage) decode(b []byte, page int, generation uint64) bool {
	le := binary.LittleEndian
	intact := true
	for s := range sectorsPerPage {
		sector := b[s*object.SectorSize:][:object.SectorSize]
		ok := sectorIntact(sector, page*sectorsPerPage+s, generation)
		intact = intact && ok
		for i := range sumsPerSector {
			sum := badSum
			if ok {
				sum = le.Uint64(sector[8*i:])
			}
			p.sums[s*sumsPerSector+i] = sum
		}
	}
	return intact
}

// sectorIntact reports whether b begins with the given sector of the table of an incarnation.
func sectorIntact(b []byte, sector int, generation uint64) bool {
	return binary.LittleEndian.Uint64(b[8*sumsPerSector:]) == xxh3.HashSeed(b[:8*sumsPerSector], sectorSeed(generation, sector))
}

func groupDir(g object.Group) string { return objectsDir + "/" + g.String() }
func objectPath(k object.Key) string { return objectsDir + "/" + k.String() }
func newName(k object.Key, g uint64) string {
	return fmt.Sprintf("%s-%s-%016x", k.Group, k.ID, g)
}
func newPath(k object.Key, g uint64) string { return newDir + "/" + newName(k, g) }

// parseGroup reads a directory name made by groupDir.
func parseGroup(name string) (g object.Group, ok bool) {
	p, q, ok := strings.Cut(name, "-")
	policy, err1 := strconv.ParseUint(p, 16, 8)
	partition, err2 := strconv.ParseUint(q, 16, 16)
	g = object.Group{Policy: object.PolicyID(policy), Partition: object.Partition(partition)}
	return g, ok && err1 == nil && err2 == nil && g.String() == name
}

// parseID reads a file name of an object.
func parseID(name string) (object.ID, bool) {
	n, err := strconv.ParseUint(name, 16, 64)
	return object.ID(n), err == nil && object.ID(n).String() == name
}
