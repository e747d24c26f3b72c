package storage

import (
	"sync"

	"sheepdog/storage/internal/wal"
)

// entry says where the newest content of a pending block is. sum 0 means a hole;
// otherwise pos is the payload's place in the log, unless zeroFlag is set: then the
// block is all zeros and there is no payload. An entry with pos 0 is not pending.
type entry struct {
	pos wal.Pos
	sum uint64
}

// zeroFlag uses a bit that is always 0 in positions.
const zeroFlag wal.Pos = 1

func (e entry) pending() bool { return e.pos != 0 }
func (e entry) hole() bool    { return e.sum == 0 }
func (e entry) zero() bool    { return e.pos&zeroFlag != 0 }

// overlay is the set of pending blocks of one object: a tree of fixed depth. A
// pending block costs 16 bytes where neighbours are pending too, and 264 where it is alone.
type overlay struct {
	dirs  []*overlayDir
	count int // pending blocks
}

const (
	leafBlocks = 16
	dirLeaves  = 64
	dirBlocks  = leafBlocks * dirLeaves
)

type overlayDir struct {
	leaves [dirLeaves]*overlayLeaf
	used   int // leaves
}

type overlayLeaf struct {
	entries [leafBlocks]entry
	used    int
}

var (
	leafPool = sync.Pool{New: func() any { return new(overlayLeaf) }}
	dirPool  = sync.Pool{New: func() any { return new(overlayDir) }}
)

// get returns the entry of block b; its pos is 0 if b is not pending.
func (o *overlay) get(b uint32) entry {
	if o.count == 0 {
		return entry{}
	}
	dir := o.dirs[b/dirBlocks]
	if dir == nil {
		return entry{}
	}
	leaf := dir.leaves[b/leafBlocks%dirLeaves]
	if leaf == nil {
		return entry{}
	}
	return leaf.entries[b%leafBlocks]
}

// set makes block b of an object of so many blocks pending.
func (o *overlay) set(b uint32, e entry, blocks uint32) {
	if o.dirs == nil {
		o.dirs = make([]*overlayDir, (blocks+dirBlocks-1)/dirBlocks)
	}
	dir := o.dirs[b/dirBlocks]
	if dir == nil {
		dir = dirPool.Get().(*overlayDir)
		o.dirs[b/dirBlocks] = dir
	}
	leaf := dir.leaves[b/leafBlocks%dirLeaves]
	if leaf == nil {
		leaf = leafPool.Get().(*overlayLeaf)
		dir.leaves[b/leafBlocks%dirLeaves] = leaf
		dir.used++
	}
	if !leaf.entries[b%leafBlocks].pending() {
		leaf.used++
		o.count++
	}
	leaf.entries[b%leafBlocks] = e
}

// each calls fn for every pending block in ascending order.
func (o *overlay) each(fn func(b uint32, e entry)) {
	for d, dir := range o.dirs {
		if dir == nil {
			continue
		}
		for i, leaf := range dir.leaves {
			if leaf == nil {
				continue
			}
			for j, e := range leaf.entries {
				if e.pending() {
					fn(uint32(d*dirBlocks+i*leafBlocks+j), e)
				}
			}
		}
	}
}

// drop forgets the entries of segments before first.
func (o *overlay) drop(first uint32) {
	for d, dir := range o.dirs {
		if dir == nil {
			continue
		}
		for i, leaf := range dir.leaves {
			if leaf == nil {
				continue
			}
			o.dropLeaf(leaf, first)
			if leaf.used == 0 {
				leafPool.Put(leaf)
				dir.leaves[i] = nil
				dir.used--
			}
		}
		if dir.used == 0 {
			dirPool.Put(dir)
			o.dirs[d] = nil
		}
	}
	if o.count == 0 {
		o.dirs = nil
	}
}

func (o *overlay) dropLeaf(leaf *overlayLeaf, first uint32) {
	for j := range leaf.entries {
		if e := &leaf.entries[j]; e.pending() && e.pos.Segment() < first {
			*e = entry{}
			leaf.used--
			o.count--
		}
	}
}

// clear forgets everything.
func (o *overlay) clear() { o.drop(^uint32(0)) }
