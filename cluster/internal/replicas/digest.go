package replicas

import (
	"encoding/binary"

	"github.com/zeebo/xxh3"

	"sheepdog/storage/object"
)

// Of two objects that are to be made equal, mostly a few blocks differ. Who asks sends a
// digest of each stretch of blocks, and is told the checksums of those stretches that are
// not the same on the other side: for a block of 4 KiB that differs in an object of 4 MiB
// about 640 bytes travel beside it, instead of a table of 8 KiB.

// stretch is how many blocks have one digest.
const stretch = 64

// digests are those of a table of checksums. nil has none.
func digests(sums []uint64) []uint64 {
	list := make([]uint64, 0, len(sums)/stretch)
	for len(sums) > 0 {
		n := min(stretch, len(sums))
		list = append(list, digest(sums[:n]))
		sums = sums[n:]
	}
	return list
}

// digest is the xxh3 of checksums in little-endian bytes; of more than a stretch, each stretch's has that of those before
// it as its seed.
func digest(sums []uint64) (d uint64) {
	var b [stretch * 8]byte
	for len(sums) > 0 {
		n := min(stretch, len(sums))
		for i, s := range sums[:n] {
			binary.LittleEndian.PutUint64(b[i*8:], s)
		}
		d = xxh3.HashSeed(b[:n*8], d)
		sums = sums[n:]
	}
	return d
}

// content is the data of a write with what its receivers know it by.
type content struct {
	// sums are the checksums of the blocks of the data, made once, when it came to this node, and stored with it; none
	// if it is not of whole blocks.
	sums []uint64
	sum  uint64 // what travels: the digest of sums, or the xxh3 of data that is not of whole blocks
	made bool
}

// of makes it what it is of data that is written at off, unless it is already.
func (c *content) of(off uint32, data []byte) {
	if c.made {
		return
	}
	c.made, c.sums = true, c.sums[:0]
	if (uint64(off)|uint64(len(data)))%object.BlockSize == 0 {
		c.sums = object.AppendSums(c.sums, data)
		c.sum = digest(c.sums)
	} else {
		c.sum = xxh3.Hash(data)
	}
}

// arrived is of for data that has come over the network. It fails if the data is not what its sender sent.
func (c *content) arrived(m *action, data []byte) error {
	c.made = false
	if len(data) != int(m.len) {
		return errDamaged
	}
	if c.of(m.off, data); c.sum != m.sum {
		return errDamaged
	}
	return nil
}

// appendDifference appends the stretches of a table that do not have the digests of the
// other side; if those are of no table as long as this one, all that are no holes. Each is
// its number, 4 bytes, and its checksums.
func appendDifference(b []byte, sums, theirs []uint64) []byte {
	known := len(theirs) == len(sums)/stretch
	var hole [stretch]uint64
	empty := digest(hole[:])
	for i := 0; i < len(sums)/stretch; i++ {
		part, other := sums[i*stretch:][:stretch], empty
		if known {
			other = theirs[i]
		}
		if digest(part) != other {
			b = appendSums(le.AppendUint32(b, uint32(i)), part)
		}
	}
	return b
}

// decodeDifference changes a table to what the other side has.
func decodeDifference(b []byte, sums []uint64) error {
	d := decoder{b: b}
	for len(d.b) > 0 {
		i := d.u32()
		if d.err != nil || uint64(i) >= uint64(len(sums)/stretch) {
			return errMessage
		}
		for k := range stretch {
			sums[int(i)*stretch+k] = d.u64()
		}
	}
	return d.end()
}
