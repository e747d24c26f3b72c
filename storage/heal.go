package storage

import (
	"context"
	"fmt"
	"slices"

	"sheepdog/storage/object"
)

// Failed reports whether the disk of a group is out of service, or was released: see Release.
func (s *Store) Failed(g object.Group) bool { return s.routes.find(g).lost() }

// Abandon gives a group, whose disk is out of service, a place on another disk, where it has
// nothing. It reports whether it did. The caller knows that the content is elsewhere. What leaves a
// disk that works has left it for good: the other one has a directory of it, durably, before, so that after a
// restart it lives there, empty or not.
func (s *Store) Abandon(g object.Group) bool {
	s.mover.mu.Lock() // it is not being moved
	defer s.mover.mu.Unlock()
	from := s.routes.find(g)
	if !from.lost() || s.mover.going[g] {
		return false
	}
	working := slices.DeleteFunc(slices.Clone(s.routes.drives()), (*drive).leaves)
	if len(working) == 0 {
		return false
	}
	to := working[rendezvous(g, working)]
	if to.notes.left[g] != "" {
		if until := to.notes.until[g]; until == 0 || until >= to.retained.Load() {
			notify(s.mover.wake)
			return false // what is left of it there is removed first
		}
		if err := to.explain(to.renote(func(n *notes) { n.forget(g) })); err != nil {
			return false
		}
	}
	if to.notes.arriving[g] != "" {
		if err := to.explain(to.uncopy([]object.Group{g})); err != nil {
			return false
		}
	}
	if from.failed() == nil {
		// A disk that fails at this may have the directory after a restart. So the group goes there
		// nevertheless, where nothing can be done with it: it must not be of use on the old one again.
		if err := to.explain(to.makeGroups([]object.Group{g})); err != nil && to.failed() == nil {
			to.logger.Warn("a partition cannot leave its disk now", "partition", g.String(), "disk", from.String(), "to", to.String(), "error", err)
			return false
		}
	}
	// Marks that are about to be kept may have been taken while the content still counted.
	s.marksMu.Lock()
	defer s.marksMu.Unlock()
	if !s.routes.move(g, from, to) {
		return false
	}
	if s.abandoned == nil {
		s.abandoned = map[object.Group]bool{}
	}
	s.abandoned[g] = true
	return true
}

// move gives a group another place, if it still is where it was, and the other disk there.
func (t *routes) move(g object.Group, from, to *drive) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	slots, p := t.lineup.Load().slots, t.page(g)
	slot := slices.Index(slots, to)
	if i := p[g.Partition].Load(); slot < 0 || i == 0 || slots[i-1] != from {
		return false
	}
	p[g.Partition].Store(uint32(slot + 1))
	return true
}

// Rotten returns the corrupt blocks that were found and not overwritten since. No blocks mean
// an object's header or table. It is bounded as Status is.
func (s *Store) Rotten() map[object.Key][]uint32 {
	all := make(map[object.Key][]uint32)
	for _, d := range s.routes.drives() {
		if d.failed() != nil || !d.rot.some.Load() {
			continue
		}
		for _, c := range d.rot.list() {
			all[c.Key] = c.Blocks
		}
	}
	return all
}

// Heal puts content in place of a block that is rotten, if it is the content that the block's
// checksum is of; else it fails with ErrInvalid and has done nothing. So it does no harm,
// whoever the content comes from and whatever has happened meanwhile. data is a block.
func (s *Store) Heal(ctx context.Context, k object.Key, block uint32, data []byte) error {
	if len(data) != blockSize {
		return fmt.Errorf("heal with %d bytes: %w", len(data), object.ErrInvalid)
	}
	return s.at(ctx, k.Group, func(d *drive) error {
		if err := d.heal(k, block, data); err != nil {
			return d.explain(err)
		}
		d.flush()
		return d.failed()
	})
}

func (d *drive) heal(k object.Key, block uint32, data []byte) error {
	o, err := d.existing(k)
	if err != nil {
		return err
	}
	defer o.mu.Unlock()
	if o.held {
		return errHeld
	}
	if block >= o.blocks() {
		return fmt.Errorf("heal block %d of object %s: %w", block, k, object.ErrInvalid)
	}
	if err := d.ensurePages(o, block, block+1); err != nil {
		return err
	}
	sum, _ := o.sum(block)
	if sum != object.Sum(data) || o.busy(block, block+1) {
		return fmt.Errorf("heal block %d of object %s: not its content: %w", block, k, object.ErrInvalid)
	}
	s := scratches.Get().(*scratch)
	defer scratches.Put(s)
	if err := d.appendWrite(o, s, o.version, block, data, nil, nil); err != nil {
		return err
	}
	d.staged.Store(true)
	return nil
}
