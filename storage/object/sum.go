package object

import "github.com/zeebo/xxh3"

// Sum is the checksum of a block of content, BlockSize bytes: its xxh3 of 64 bits, but 1 for 0, which is kept for blocks
// that were never written.
func Sum(block []byte) uint64 { return max(1, xxh3.Hash(block)) }

// AppendSums appends the checksums of the blocks of data, whose length is a multiple of BlockSize.
func AppendSums(sums []uint64, data []byte) []uint64 {
	for ; len(data) > 0; data = data[BlockSize:] {
		sums = append(sums, Sum(data[:BlockSize]))
	}
	return sums
}
