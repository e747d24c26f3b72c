package storage

import (
	"slices"
	"sync"
	"sync/atomic"

	"sheepdog/storage/object"
)

// rot is the bounded list of corrupt blocks that were found and not yet overwritten.
type rot struct {
	some   atomic.Bool // the list is not empty
	mu     sync.Mutex
	found  map[object.Key][]uint32
	events uint64 // findings, repeated ones included
}

const (
	maxRotObjects = 256
	maxRotBlocks  = 64
)

// note counts rot that is mended at once.
func (r *rot) note() {
	r.mu.Lock()
	r.events++
	r.mu.Unlock()
}

// reportRot enters a finding and logs it if it is news.
func (d *drive) reportRot(e *object.CorruptError) {
	r := &d.rot
	r.mu.Lock()
	r.events++
	if r.found == nil {
		r.found = make(map[object.Key][]uint32)
	}
	old, known := r.found[e.Key]
	blocks := old
	for _, b := range e.Blocks {
		if len(blocks) < maxRotBlocks && !slices.Contains(blocks, b) {
			blocks = append(blocks, b)
		}
	}
	news := !known || len(blocks) > len(old)
	if known || len(r.found) < maxRotObjects {
		r.found[e.Key] = blocks
		r.some.Store(true)
	}
	r.mu.Unlock()
	if news {
		d.logger.Error("object is corrupt: its content does not match its checksums", "object", e.Key.String(), "disk", d.String(), "blocks", e.Blocks)
	}
}

// healed takes overwritten blocks off the list.
func (d *drive) healed(o *obj, first, end uint32) {
	r := &d.rot
	if !r.some.Load() {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	blocks, ok := r.found[o.key]
	if !ok || len(blocks) == 0 {
		return
	}
	blocks = slices.DeleteFunc(blocks, func(b uint32) bool { return b >= first && b < end })
	if r.found[o.key] = blocks; len(blocks) == 0 {
		delete(r.found, o.key)
		d.logger.Info("corrupt object was overwritten", "object", o.key.String(), "disk", d.String())
	}
	r.some.Store(len(r.found) > 0)
}

// cleared takes a deleted object off the list.
func (d *drive) cleared(k object.Key) {
	d.rot.mu.Lock()
	delete(d.rot.found, k)
	d.rot.some.Store(len(d.rot.found) > 0)
	d.rot.mu.Unlock()
}

// takeRot takes over what is known to be corrupt of an object that lived on another disk.
func (d *drive) takeRot(from *drive, k object.Key) {
	from.rot.mu.Lock()
	blocks, ok := from.rot.found[k]
	from.rot.mu.Unlock()
	if !ok {
		return
	}
	from.cleared(k)
	d.reportRot(&object.CorruptError{Key: k, Blocks: blocks, Disk: d.String()})
}

// Corrupt names the corrupt blocks of one object; no blocks mean its header or table.
type Corrupt struct {
	Key    object.Key
	Blocks []uint32
}

func (r *rot) list() []Corrupt {
	r.mu.Lock()
	defer r.mu.Unlock()
	var all []Corrupt
	for k, blocks := range r.found {
		all = append(all, Corrupt{k, slices.Clone(blocks)})
	}
	slices.SortFunc(all, func(a, b Corrupt) int {
		return compareKeys(a.Key, b.Key)
	})
	return all
}

// RottenBlocks names blocks of an object that are known to be corrupt; none: there are none, or
// it is the header or table of the object. It takes no time.
func (s *Store) RottenBlocks(k object.Key) []uint32 {
	r := &s.routes.find(k.Group).rot
	if !r.some.Load() {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.found[k])
}
