package vdi

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"sheepdog/storage/object"
	"sheepdog/vdi/catalog"
)

// tidy does for a volume what nobody waits for: it clears the flags of entries that a
// flush has made durable, removes objects that were discarded, and finds out about
// entries that a crash has left unsettled. all makes everything durable before.
func (c *core) tidy(ctx context.Context, all bool) error {
	if c.snapshot || c.mapping.Load().generation.Load() == 0 {
		return nil
	}
	if err := c.admin.LockWithin(ctx); err != nil {
		return err
	}
	defer c.admin.Unlock()
	m := c.mapping.Load()
	if m.generation.Load() == 0 {
		return nil
	}
	if err := c.resolve(ctx, m); err != nil {
		return err
	}
	if all || c.needsFlush() {
		if err := c.syncNow(ctx); err != nil {
			return err
		}
	}
	if err := c.settle(ctx, m); err != nil {
		return err
	}
	if err := c.removeEmpty(ctx, m); err != nil {
		return err
	}
	if err := c.removeOrphans(ctx); err != nil {
		return err
	}
	return c.tellSettled(ctx, m)
}

// tellSettled has the catalog forget the owners before this node: whoever owns the VDI
// next need not wait for them.
func (c *core) tellSettled(ctx context.Context, m *mapping) error {
	v, ok := c.s.cfg.Catalog.Get(m.vid())
	if !ok || !c.s.isMine(v, m) || len(v.Previous) == 0 {
		return nil
	}
	_, err := c.s.propose(ctx, catalog.Command{Settled: &catalog.Settled{Ref: v.Ref, Generation: v.Generation}})
	if errors.Is(err, catalog.ErrStale) {
		return nil // another node has taken it: that one asks
	}
	return err
}

func (c *core) needsFlush() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.book.volatile) >= flushAt || len(c.book.empty)+len(c.book.orphans) > 0
}

// settle stores without their flags the entries that a flush has made durable. The
// caller holds admin.
func (c *core) settle(ctx context.Context, m *mapping) error {
	c.mu.Lock()
	flushed, unstored := c.book.flushed, c.book.unstored
	c.book.flushed, c.book.unstored = nil, nil
	c.mu.Unlock()
	touched := map[uint32]uint32{} // page -> one index in it
	for _, i := range unstored {
		touched[i/pageEntries] = i
	}
	for _, ch := range flushed {
		slot := c.slot(m, ch.index)
		if slot.entries[ch.index%pageEntries].CompareAndSwap(ch.entry, ch.entry&^(unsettled|volatile)) && ch.entry&unsettled != 0 {
			touched[ch.index/pageEntries] = ch.index
		}
	}
	var failed error
	for _, index := range touched {
		if err := c.store(ctx, m, index, c.slot(m, index), false); err != nil {
			failed = err
			c.mu.Lock()
			c.book.unstored = append(c.book.unstored, index)
			c.mu.Unlock()
		}
	}
	return failed
}

// slot returns a page that is known to be in memory.
func (c *core) slot(m *mapping, index uint32) *page {
	return m.dirs[index>>indexShift].Load().pages[index/pageEntries%pagesPerObject].Load()
}

// resolve finds out about entries that were unsettled when loaded, and about those whose
// storing failed. The caller holds admin; the gate is open.
func (c *core) resolve(ctx context.Context, m *mapping) error {
	c.mu.Lock()
	uncertain, doubtful := c.book.uncertain, c.book.doubtful
	c.book.uncertain, c.book.doubtful = nil, nil
	c.mu.Unlock()
	for n, index := range doubtful {
		if err := c.resolveOne(ctx, m, index, c.storeAgain); err != nil {
			c.mu.Lock()
			c.book.doubtful = append(c.book.doubtful, doubtful[n:]...)
			c.book.uncertain = append(c.book.uncertain, uncertain...)
			c.mu.Unlock()
			return err
		}
	}
	for n, index := range uncertain {
		if err := c.resolveOne(ctx, m, index, c.lookForObject); err != nil {
			c.mu.Lock()
			c.book.uncertain = append(c.book.uncertain, uncertain[n:]...)
			c.mu.Unlock()
			return err
		}
	}
	return nil
}

// resolveOne calls fn with an index that has no write about.
func (c *core) resolveOne(ctx context.Context, m *mapping, index uint32, fn func(context.Context, *mapping, uint32, *page) error) error {
	s := c.gate.stripe(index)
	s.close()
	defer s.open()
	return fn(ctx, m, index, c.slot(m, index))
}

// storeAgain stores a pending entry, or a hole in place of one over a hole whose object was not made.
func (c *core) storeAgain(ctx context.Context, m *mapping, index uint32, p *page) error {
	slot := &p.entries[index%pageEntries]
	e := slot.Load()
	if e&pending == 0 {
		return nil
	}
	if e&unsettled != 0 {
		there, err := c.hasObject(ctx, m, index)
		if err != nil {
			return err
		}
		if !there {
			e = pending | volatile
			slot.Store(e)
		}
	}
	if err := c.store(ctx, m, index, p, false); err != nil {
		return err
	}
	e = e&^pending | volatile
	slot.Store(e)
	c.noteChange(index, e)
	return nil
}

// hasObject reports whether there is an own object of an index, whatever the map says.
func (c *core) hasObject(ctx context.Context, m *mapping, index uint32) (bool, error) {
	_, err := c.s.cfg.Objects.Stat(ctx, m.policy, object.DataID(m.vid(), index))
	if isMissing(err) {
		return false, nil
	}
	return err == nil, err
}

// lookForObject makes an unsettled entry a hole if a power cut took its object.
func (c *core) lookForObject(ctx context.Context, m *mapping, index uint32, p *page) error {
	slot := &p.entries[index%pageEntries]
	e := slot.Load()
	if e != uint32(m.vid())|unsettled|volatile {
		return nil
	}
	there, err := c.hasObject(ctx, m, index)
	if err != nil {
		return err
	}
	if !there {
		slot.Store(pending | volatile)
		if err := c.store(ctx, m, index, p, false); err != nil {
			slot.Store(e)
			return err
		}
		e = volatile
		slot.Store(e)
	}
	c.noteChange(index, e)
	return nil
}

// scan loads the pages of the map that have unsettled entries. The caller holds admin.
func (c *core) scan(ctx context.Context, m *mapping) error {
	c.mu.Lock()
	scanned := c.book.scanned
	c.mu.Unlock()
	if scanned {
		return nil
	}
	err := c.s.walkMap(ctx, catalog.VDI{Ref: m.ref, Policy: m.policy, Moves: m.moves}, c.objects(), func(first uint32, entries []byte) error {
		for at := 0; at < len(entries); at += object.BlockSize {
			if hasUnsettled(entries[at : at+object.BlockSize]) {
				if _, err := c.page(ctx, m, first+uint32(at/4)); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		return explain(err, "read the map of %s", c.title())
	}
	c.mu.Lock()
	c.book.scanned = true
	c.mu.Unlock()
	return nil
}

func hasUnsettled(block []byte) bool {
	for i := 0; i < len(block); i += 4 {
		if binary.LittleEndian.Uint32(block[i:])&unsettled != 0 {
			return true
		}
	}
	return false
}

func (c *core) objects() int64 { return (c.size.Load() + c.objectSize() - 1) >> c.shift }

// walkPiece is how much of a map walkMap reads at a time, in bytes.
const walkPiece = 256 << 10

// walkMap calls fn with the stored entries of v's map, which has count objects, piece by
// piece, each a number of whole pages, from the index first on. It passes over map
// objects that do not exist. fn must not keep entries.
func (s *Service) walkMap(ctx context.Context, v catalog.VDI, count int64, fn func(first uint32, entries []byte) error) error {
	buf := make([]byte, min(walkPiece, (count+pageEntries-1)/pageEntries*object.BlockSize))
	for index := int64(0); index < count; {
		left := min(count-index, 1<<indexShift-index&(1<<indexShift-1)) // in this map object
		n := min(int64(len(buf)), (left+pageEntries-1)/pageEntries*object.BlockSize)
		err := s.readMap(ctx, v, uint32(index/pageEntries), buf[:n])
		if errors.Is(err, object.ErrNotFound) {
			index += left
			continue
		}
		if err != nil {
			return err
		}
		if err := fn(uint32(index), buf[:n]); err != nil {
			return err
		}
		index += n / 4
	}
	return nil
}

// removeEmpty removes objects that were discarded as a whole. The hole is durable in the
// map before the object goes: a crash leaves an object too many, never one too few. The
// caller holds admin.
func (c *core) removeEmpty(ctx context.Context, m *mapping) error {
	c.mu.Lock()
	list := c.book.empty
	c.book.empty = nil
	c.mu.Unlock()
	for len(list) > 0 {
		n := min(len(list), removeBatch)
		if err := c.removeSome(ctx, m, list[:n]); err != nil {
			for _, index := range list {
				c.noteEmpty(index)
			}
			return err
		}
		list = list[n:]
	}
	return nil
}

const removeBatch = 1024

func (c *core) removeSome(ctx context.Context, m *mapping, list []uint32) error {
	var holes []uint32
	for _, index := range list {
		err := c.resolveOne(ctx, m, index, func(ctx context.Context, m *mapping, index uint32, p *page) error {
			made, err := c.makeHole(ctx, m, index, p)
			if made {
				holes = append(holes, index)
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	if len(holes) == 0 {
		return nil
	}
	if err := c.syncNow(ctx); err != nil {
		return err
	}
	for _, index := range holes {
		err := c.resolveOne(ctx, m, index, func(ctx context.Context, m *mapping, index uint32, p *page) error {
			if p.entries[index%pageEntries].Load()&ownerMask != 0 {
				return nil
			}
			return c.remove(ctx, m, index)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// makeHole replaces a settled entry whose object has nothing in it.
func (c *core) makeHole(ctx context.Context, m *mapping, index uint32, p *page) (bool, error) {
	slot := &p.entries[index%pageEntries]
	if slot.Load() != uint32(m.vid()) {
		return false, nil // a later discard, or the sweep, will come by
	}
	info, err := c.s.cfg.Objects.Stat(ctx, m.policy, object.DataID(m.vid(), index))
	if isMissing(err) {
		err = cmp.Or(c.stillOwned(ctx, m), err)
	}
	if err != nil || info.Allocated > 0 {
		return false, err
	}
	slot.Store(pending | volatile)
	if err := c.store(ctx, m, index, p, false); err != nil {
		c.noteDoubt(index)
		return false, err
	}
	slot.Store(volatile)
	c.noteChange(index, volatile)
	c.changed.Store(true)
	c.changes.Add(1)
	return true, nil
}

// removeOrphans removes objects of deleted VDIs that the volume was the last to use.
func (c *core) removeOrphans(ctx context.Context) error {
	c.mu.Lock()
	list := c.book.orphans
	c.book.orphans = nil
	c.mu.Unlock()
	if len(list) == 0 {
		return nil
	}
	live := c.s.liveOf(c.family)
	d := c.s.doom(c.mapping.Load().policy)
	d.looked(live...)
	for _, o := range list {
		used, err := c.s.referenced(ctx, live, o.owner, o.index)
		if err != nil {
			return fmt.Errorf("look for what %s stopped using: %w", c.title(), err) // the sweep will find it
		}
		// If the vid has come to be used otherwise, it is no business of this volume's.
		if v, ok := c.s.cfg.Catalog.Get(o.owner); !used && ok && v.State == catalog.Deleted && v.Family == c.family {
			d.add(object.DataID(o.owner, o.index), v.Generation)
		}
	}
	if err := c.s.removeObjects(ctx, &d); !errors.Is(err, errChanged) {
		return err
	}
	return nil // the sweep will find it
}
