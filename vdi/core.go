package vdi

import (
	"fmt"
	"sync"
	"sync/atomic"

	"sheepdog/storage/object"
	"sheepdog/vdi/catalog"
)

// core is a VDI or snapshot that is open on this node: one for all Volumes of it, so
// that all of them see the same.
type core struct {
	s        *Service
	name     string
	tag      string // for messages and Volume.Tag
	snapshot bool
	shift    uint8
	family   uint64

	size    atomic.Int64
	mapping atomic.Pointer[mapping]
	gate    gate
	changed atomic.Bool   // some entry changed since its space was counted
	changes atomic.Uint64 // of entries by this node: see Volume.MapVersion
	tracker atomic.Pointer[tracker]

	losses atomic.Uint64 // how often a sync has said that something may be lost
	told   atomic.Uint64 // of how many of them somebody was told who flushed

	// admin is held by who changes the volume as a whole: snapshot, rollback, resize,
	// ownership, settling.
	admin longLock

	tenure atomic.Int64  // for how long ownership is asked for, a time.Duration
	held   bool          // others are kept away until the call that has admin is over; guarded by admin
	lone   atomic.Uint32 // reads that had to ask for their map entry

	mu   sync.Mutex
	book book
	// doubted: a command that changes who owns the VDI, or its vid, may still be applied.
	// Ownership is then asked for, also if this node seems to have it: the answer is
	// ordered behind that command.
	doubted bool
	// unsure: so may one that holds for as long as the generation does. Then ownership is asked for under another one.
	unsure bool

	// Guarded by Service.mu.
	handles map[*Volume]struct{}
	users   int // calls under way, beside handles
}

// book is what is known about entries that need work. It belongs to one mapping.
type book struct {
	volatile  []change // entries written since the last flush
	flushed   []change // entries that a flush has made durable, their flags still to be cleared
	uncertain []uint32 // indices found unsettled when loaded: does their object exist?
	doubtful  []uint32 // indices whose entry could not be written
	unstored  []uint32 // indices whose entry is settled in memory only
	empty     []uint32 // indices whose object was discarded as a whole
	orphans   []orphan // objects of deleted VDIs that this volume stopped using
	scanned   bool     // the whole map was searched for unsettled entries
}

// change is an index and the entry it got. The entry is compared before flags are
// cleared: it may have been replaced since.
type change struct{ index, entry uint32 }

type orphan struct {
	owner object.VID
	index uint32
}

// Bounds of lists whose entries the sweep would find too.
const (
	maxEmpty   = 1 << 16
	maxOrphans = 1 << 16
	// flushAt volatile entries make the service flush by itself: the list shall not grow with the volume.
	flushAt = 1 << 14
)

func newCore(s *Service, v catalog.VDI) *core {
	c := &core{
		s: s, name: v.Name, tag: tagOf(v), snapshot: v.Snapshot, shift: v.SizeShift, family: v.Family,
		handles: map[*Volume]struct{}{},
	}
	c.tenure.Store(int64(minTenure))
	c.gate.init()
	c.size.Store(v.Size)
	c.mapping.Store(newMapping(v))
	return c
}

// tagOf is how a snapshot is asked for.
func tagOf(v catalog.VDI) string {
	if v.Snapshot && v.Tag == "" {
		return fmt.Sprint(v.SnapshotID)
	}
	return v.Tag
}

// title names the volume in messages, as one would export it.
func (c *core) title() string {
	if c.tag != "" {
		return fmt.Sprintf("%q", c.name+"@"+c.tag)
	}
	return fmt.Sprintf("%q", c.name)
}

// setSize is for who owns the VDI by m, and knows its size. If ownership went meanwhile, another node may have changed it since.
func (c *core) setSize(m *mapping, size int64) {
	c.mu.Lock()
	c.size.Store(size)
	c.mu.Unlock()
	if m.generation.Load() == 0 {
		c.renewSize()
	}
}

// renewSize has the size be what the catalog says, unless this node owns the VDI: then the size changes here alone.
func (c *core) renewSize() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if now, err := c.current(); err == nil && c.mapping.Load().generation.Load() == 0 {
		c.size.Store(now.Size)
	}
}

func (c *core) objectSize() int64 { return 1 << c.shift }

// noteUncertain is for who loaded a page of m, perhaps a reader who has been overtaken: what
// it found is nothing that the book of another map should know.
func (c *core) noteUncertain(m *mapping, indices []uint32) {
	if len(indices) == 0 {
		return
	}
	c.mu.Lock()
	if c.mapping.Load().table == m.table {
		c.book.uncertain = append(c.book.uncertain, indices...)
	}
	c.mu.Unlock()
	c.s.wake()
}

// noteChange records an entry that is stored but not durable.
func (c *core) noteChange(index, entry uint32) {
	c.mu.Lock()
	c.book.volatile = append(c.book.volatile, change{index, entry})
	many := len(c.book.volatile) == flushAt
	c.mu.Unlock()
	if many {
		c.s.wake()
	}
}

// noteDurable records an entry that is stored durably, with its object, but unsettled.
func (c *core) noteDurable(index, entry uint32) {
	c.mu.Lock()
	c.book.flushed = append(c.book.flushed, change{index, entry})
	c.mu.Unlock()
}

// noteEmpty records an object that may be removed.
func (c *core) noteEmpty(index uint32) {
	c.mu.Lock()
	if len(c.book.empty) < maxEmpty {
		c.book.empty = append(c.book.empty, index)
	}
	c.mu.Unlock()
}

// noteOrphan records that the volume uses an object of another one no more. Only objects
// of deleted VDIs are worth it: the others are used by their own.
func (c *core) noteOrphan(owner object.VID, index uint32) {
	if owner == 0 || owner == c.mapping.Load().vid() {
		return
	}
	if v, ok := c.s.cfg.Catalog.Get(owner); ok && v.State != catalog.Deleted {
		return
	}
	c.mu.Lock()
	if len(c.book.orphans) < maxOrphans {
		c.book.orphans = append(c.book.orphans, orphan{owner, index})
	}
	c.mu.Unlock()
}

// idle reports whether nothing is left to be written for the volume. Without ownership
// nothing can be; who owns the VDI next finds what is unsettled.
func (c *core) idle() bool {
	if c.mapping.Load().generation.Load() == 0 {
		return true
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	b := &c.book
	return len(b.volatile)+len(b.flushed)+len(b.doubtful)+len(b.unstored)+len(b.empty)+len(b.orphans) == 0
}
