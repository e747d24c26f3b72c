package vdi

import (
	"context"
	"encoding/binary"
	"errors"
	"sync"
	"sync/atomic"

	"sheepdog/storage/object"
	"sheepdog/vdi/catalog"
)

// A map entry tells which VDI owns the object of an index. unsettled is stored with it;
// the other bits are in memory alone.
const (
	ownerMask = uint32(object.MaxVID)
	// unsettled: the object was new when the entry was written, and no flush has covered it
	// since. If the power fails it may be missing, which then reads as zeros.
	unsettled = uint32(1) << 31
	// pending: the entry is being written, and its object if that is over a hole, or that has failed. Reads must not use it: they
	// ask the stored map, as other nodes do. Else one read here would see what a later one elsewhere does not.
	pending = uint32(1) << 30
	// volatile: the entry was written after the last flush: a power cut may undo it.
	volatile = uint32(1) << 29
)

const (
	mapShift       = 22 // map objects are always 4 MiB
	indexShift     = 20 // a map object has 2^20 entries
	pageEntries    = object.BlockSize / 4
	pagesPerObject = 1 << indexShift / pageEntries
	maxMapObjects  = catalog.MaxIndex >> indexShift
)

// table is a volume's map in memory: pages of it, loaded when first touched. Pages are
// never dropped while the volume is open: a page stands for 1024 objects.
type table struct {
	dirs    [maxMapObjects]atomic.Pointer[directory]
	loading [16]longLock // by page: several can be loaded at a time
	lost    atomic.Bool  // a power cut has undone something: it is not what is stored
}

// directory has the pages of one map object.
type directory struct {
	// absent: the map object did not exist, so pages not in memory are empty.
	absent atomic.Bool
	pages  [pagesPerObject]atomic.Pointer[page]
}

// page is a block of a map object.
type page struct {
	entries [pageEntries]atomic.Uint32

	mu     sync.Mutex
	done   sync.Cond
	fua    bool // the next writing shall be durable
	active bool
	result *pageWrite // the next writing, once somebody waits for it
}

// pageWrite is one writing, with which several changes of a page are done.
type pageWrite struct {
	finished bool
	err      error
	undo     []func() // of the changes, if it is known not to be carried out
}

// lookup returns an index's entry, or false if its page must be loaded first.
func (t *table) lookup(index uint32) (uint32, bool) {
	d := t.dirs[index>>indexShift].Load()
	if d == nil {
		return 0, false
	}
	if p := d.pages[index>>10%pagesPerObject].Load(); p != nil {
		return p.entries[index%pageEntries].Load(), true
	}
	return 0, d.absent.Load()
}

// mapping is a table with the VDI that it is the map of. It is replaced as a whole.
type mapping struct {
	*table     // nil if nothing may be remembered of the map: see core.lookUp
	ref        catalog.Ref
	policy     object.PolicyID
	moves      uint64        // see catalog.VDI
	under      uint64        // generation that requests carry
	generation atomic.Uint64 // under, or 0: this node does not own the VDI
}

func newMapping(v catalog.VDI) *mapping {
	return &mapping{table: new(table), ref: v.Ref, policy: v.Policy, moves: v.Moves, under: v.Generation}
}

func (m *mapping) vid() object.VID { return m.ref.VID }

// page returns the page of an index, and loads or makes it if need be.
func (c *core) page(ctx context.Context, m *mapping, index uint32) (*page, error) {
	number := index / pageEntries
	d := m.directory(index >> indexShift)
	slot := &d.pages[number%pagesPerObject]
	if p := slot.Load(); p != nil {
		return p, nil
	}
	lock := &m.loading[number%uint32(len(m.loading))]
	lock.Lock()
	defer lock.Unlock()
	if p := slot.Load(); p != nil {
		return p, nil
	}
	var found []uint32
	var err error
	p := new(page)
	p.done.L = &p.mu
	if !d.absent.Load() {
		if found, err = c.load(ctx, m, d, number, p); err != nil {
			return nil, explain(err, "read the map of %s", c.title())
		}
	}
	slot.Store(p)
	c.noteUncertain(m, found) // who looks into it finds the page
	return p, nil
}

func (t *table) directory(n uint32) *directory {
	slot := &t.dirs[n]
	if d := slot.Load(); d != nil {
		return d
	}
	slot.CompareAndSwap(nil, new(directory))
	return slot.Load()
}

func (c *core) load(ctx context.Context, m *mapping, d *directory, number uint32, p *page) (found []uint32, err error) {
	var b [object.BlockSize]byte
	r := mapRead(m.policy, m.vid(), number, b[:])
	r.Volume, r.Generation = m.vid(), m.under
	err = c.s.doAt(ctx, r, m.place())
	switch {
	case errors.Is(err, object.ErrNotFound):
		d.absent.Store(true)
		return nil, nil
	case errors.Is(err, object.ErrStale):
		c.disown(m)
	}
	if err != nil {
		return nil, err
	}
	for i := range p.entries {
		e := binary.LittleEndian.Uint32(b[4*i:])
		if e&unsettled != 0 {
			e |= volatile
			found = append(found, number*pageEntries+uint32(i))
		}
		p.entries[i].Store(e)
	}
	return found, nil
}

// readMap reads len(b) bytes of a map from the given page on, all in one map object.
// object.ErrNotFound stands for an empty map object.
func (s *Service) readMap(ctx context.Context, v catalog.VDI, number uint32, b []byte) error {
	return s.doAt(ctx, mapRead(v.Policy, v.VID, number, b), placeOf(v))
}

func mapRead(policy object.PolicyID, vid object.VID, number uint32, b []byte) *object.Request {
	return &object.Request{
		Op: object.OpRead, ID: object.NewID(object.KindMap, vid, number/pagesPerObject), Policy: policy, SizeShift: mapShift,
		Off: number % pagesPerObject * object.BlockSize, Len: uint32(len(b)), Data: b,
	}
}

// do carries out a request and waits for it. It does not return early: until the
// request is done, it belongs to the layers below.
func (s *Service) do(ctx context.Context, r *object.Request) error {
	return s.doThen(ctx, r, func() {})
}

// doThen is do that calls then when the request is done, as its Done.
func (s *Service) doThen(ctx context.Context, r *object.Request, then func()) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	done := make(chan struct{})
	r.Done = func(*object.Request) {
		then()
		close(done)
	}
	s.cfg.Objects.Submit(r)
	s.cfg.Objects.Kick()
	<-done
	return r.Err
}

// doAt is do for reading an object of a VDI or snapshot that is there. What is not found is not there: it was not moved.
// Nor is what is read without a generation a copy that is being made.
func (s *Service) doAt(ctx context.Context, r *object.Request, at place) error {
	err := s.do(ctx, r)
	if isMissing(err) || err == nil && r.Generation == 0 {
		if moved := s.unmoved(ctx, at); moved != nil {
			return moved
		}
	}
	return err
}

// sync makes everything durable that this node has completed for a volume before; for
// volume 0 all that it has completed.
func (s *Service) sync(ctx context.Context, policy object.PolicyID, vid object.VID) error {
	return s.do(ctx, &object.Request{Op: object.OpSync, Policy: policy, Volume: vid})
}

// syncAll makes everything durable that any node has completed before.
func (s *Service) syncAll(ctx context.Context, policy object.PolicyID) error {
	return s.do(ctx, &object.Request{Op: object.OpSync, Policy: policy, Flags: object.FlagAll})
}

// fence makes everything durable that any node has completed for a vid, and keeps out
// what comes under a generation older than the one the vid has in v.
func (s *Service) fence(ctx context.Context, v catalog.VDI) error {
	return s.do(ctx, &object.Request{Op: object.OpSync, Policy: v.Policy, Flags: object.FlagAll, Volume: v.VID, Generation: v.Generation})
}

// store writes the page of an index to the map object. Those who ask while a writing is
// under way are served together by the next one.
func (c *core) store(ctx context.Context, m *mapping, index uint32, p *page, fua bool) error {
	return c.storeWith(ctx, m, index, p, fua, func() {}, func() {})
}

// storeWith is store after change, which makes the index's entry a new one. No writing that began
// before has that entry: if this one is refused as stale, it is not stored. If there was no space for
// it, it is not stored either, and undo is called before another writing begins.
func (c *core) storeWith(ctx context.Context, m *mapping, index uint32, p *page, fua bool, change, undo func()) error {
	p.mu.Lock()
	change()
	if p.result == nil {
		p.result = new(pageWrite)
	}
	mine := p.result
	mine.undo = append(mine.undo, undo)
	p.fua = p.fua || fua
	for p.active && !mine.finished {
		p.done.Wait()
	}
	if mine.finished {
		p.mu.Unlock()
		return mine.err
	}
	p.active, p.result, fua = true, nil, p.fua
	p.fua = false
	b := p.encode()
	p.mu.Unlock()

	err := c.writePage(ctx, m, index/pageEntries, b, fua)

	p.mu.Lock()
	if errors.Is(err, object.ErrNoSpace) {
		for _, undo := range mine.undo {
			undo()
		}
	}
	mine.finished, mine.err, mine.undo, p.active = true, err, nil, false
	p.done.Broadcast()
	p.mu.Unlock()
	return err
}

func (p *page) encode() []byte {
	b := make([]byte, object.BlockSize)
	for i := range p.entries {
		binary.LittleEndian.PutUint32(b[4*i:], p.entries[i].Load()&(ownerMask|unsettled))
	}
	return b
}

func (c *core) writePage(ctx context.Context, m *mapping, number uint32, b []byte, fua bool) error {
	if m.generation.Load() == 0 {
		return errDisowned
	}
	r := &object.Request{
		Op: object.OpWrite, ID: object.NewID(object.KindMap, m.vid(), number/pagesPerObject), Policy: m.policy, SizeShift: mapShift,
		Off: number % pagesPerObject * object.BlockSize, Len: uint32(len(b)), Data: b, Volume: m.vid(), Generation: m.under,
	}
	if fua {
		r.Flags = object.FlagFUA
	}
	err := c.s.do(ctx, r)
	c.touched(r.ID)
	if errors.Is(err, object.ErrStale) {
		c.disown(m)
	}
	if err != nil {
		return explain(err, "write the map of %s", c.title())
	}
	return nil
}
