package replicas

import (
	"encoding/binary"

	"github.com/zeebo/xxh3"
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

func digest(sums []uint64) uint64 {
	var b [stretch * 8]byte
	for i, s := range sums {
		binary.LittleEndian.PutUint64(b[i*8:], s)
	}
	return xxh3.Hash(b[:len(sums)*8])
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
