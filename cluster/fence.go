package cluster

import (
	"sync/atomic"

	"sheepdog/storage/object"
)

// fence remembers the highest generation seen of every volume. It takes no lock: a
// table of all 2^24 volumes whose leaves are made when first used.
type fence struct {
	leaves [fenceLeaves]atomic.Pointer[fenceLeaf]
}

const (
	fenceLeafSize = 64
	fenceLeaves   = (int(object.MaxVID) + 1) / fenceLeafSize
)

type fenceLeaf [fenceLeafSize]atomic.Uint64

// admit reports whether gen is not older than what was seen, and remembers it. Volume 0
// is never fenced.
func (f *fence) admit(vid object.VID, gen uint64) bool {
	if vid == 0 {
		return true
	}
	seen := f.entry(vid)
	for {
		newest := seen.Load()
		if gen <= newest {
			return gen == newest
		}
		if seen.CompareAndSwap(newest, gen) {
			return true
		}
	}
}

func (f *fence) newest(vid object.VID) uint64 { return f.entry(vid).Load() }

func (f *fence) entry(vid object.VID) *atomic.Uint64 {
	vid &= object.MaxVID
	slot := &f.leaves[vid/fenceLeafSize]
	leaf := slot.Load()
	if leaf == nil {
		slot.CompareAndSwap(nil, new(fenceLeaf))
		leaf = slot.Load()
	}
	return &leaf[vid%fenceLeafSize]
}
