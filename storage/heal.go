package storage

import (
	"context"
	"fmt"
	"slices"

	"sheepdog/storage/internal/wal"
	"sheepdog/storage/object"
)

// Failed reports whether the disk of a group is out of service, or is to be taken out.
func (s *Store) Failed(g object.Group) bool { return s.routes.find(g).leaves() }

// Abandon gives a group, whose disk is out of service, a place on another disk, where it has
// nothing. It reports whether it did. The caller knows that the content is elsewhere.
func (s *Store) Abandon(g object.Group) bool { return s.routes.move(g) }

// move gives a group of a disk that is out of service a place on one that is not.
func (t *routes) move(g object.Group) bool {
	if !t.find(g).leaves() {
		return false
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	l := t.lineup.Load()
	var working []*drive
	for _, d := range l.drives {
		if !d.leaves() {
			working = append(working, d)
		}
	}
	if len(working) == 0 {
		return false
	}
	to := slices.Index(l.slots, working[rendezvous(g, working)])
	t.page(g)[g.Partition].Store(uint32(to + 1))
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
func (s *Store) Heal(_ context.Context, k object.Key, block uint32, data []byte) error {
	d, err := s.drive(k)
	if err != nil {
		return err
	}
	if len(data) != blockSize {
		return fmt.Errorf("heal with %d bytes: %w", len(data), object.ErrInvalid)
	}
	if err := d.heal(k, block, data); err != nil {
		return d.explain(err)
	}
	d.flush()
	return d.failed()
}

func (d *drive) heal(k object.Key, block uint32, data []byte) error {
	o, err := d.existing(k)
	if err != nil {
		return err
	}
	defer o.mu.Unlock()
	if block >= o.blocks() {
		return fmt.Errorf("heal block %d of object %s: %w", block, k, object.ErrInvalid)
	}
	if err := d.ensurePages(o, block, block+1); err != nil {
		return err
	}
	sum, _ := o.sum(block)
	if sum != wal.Sum(data) || o.busy(block, block+1) {
		return fmt.Errorf("heal block %d of object %s: not its content: %w", block, k, object.ErrInvalid)
	}
	s := scratches.Get().(*scratch)
	defer scratches.Put(s)
	if err := d.appendWrite(o, s, o.version, block, data, nil); err != nil {
		return err
	}
	d.staged.Store(true)
	return nil
}
