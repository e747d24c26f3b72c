package storage

import (
	"context"
	"errors"

	"sheepdog/storage/internal/wal"
	"sheepdog/storage/object"
)

// Delete ends an object; a missing one is fine. It is durable with the next OpSync; the
// space is given back with the next checkpoint. It waits for direct writes in flight.
func (s *Store) Delete(ctx context.Context, k object.Key) error {
	return s.at(ctx, k.Group, func(d *drive) error {
		for {
			if err := ctx.Err(); err != nil {
				return err
			}
			err := d.delete(k)
			if errors.Is(err, wal.ErrFull) {
				if err := d.upkeep.wait(ctx); err != nil {
					return err
				}
				continue
			}
			if err != nil {
				return d.explain(err)
			}
			d.flush()
			return d.failed()
		}
	})
}

func (d *drive) delete(k object.Key) error {
	o, err := d.maintain(k)
	if err != nil {
		return err
	}
	defer o.maint.Unlock()
	return d.deleteHeld(o)
}

// maintain returns the object with maint and mu locked. It fails with errAway if the object's group lives
// on another disk.
func (d *drive) maintain(k object.Key) (*obj, error) {
	for {
		o, err := d.obtain(k)
		if err != nil {
			return nil, err
		}
		o.maint.Lock()
		o.mu.Lock()
		if !o.dead {
			return o, nil
		}
		o.mu.Unlock()
		o.maint.Unlock()
	}
}

// deleteHeld deletes with both locks held; it unlocks mu.
func (d *drive) deleteHeld(o *obj) error {
	defer d.thaw(o)
	o.drain()
	if o.held {
		return errHeld
	}
	if err := d.load(o); err != nil && !errors.Is(err, object.ErrCorrupt) {
		return err
	}
	if !o.exists {
		return nil
	}
	d.noteLogged(o)
	shift := max(o.shift, object.MinSizeShift)
	rec := wal.Record{Type: wal.Delete, SizeShift: shift, Key: o.key, Version: o.version, Generation: o.generation}
	pos, err := d.log.Append(&rec, nil, true, nil)
	if err != nil {
		return err
	}
	d.staged.Store(true)
	d.gives.Store(true)
	if o.fresh { // there may be a file even if none was made whole
		d.listMu.Lock()
		d.garbage = append(d.garbage, garbage{newPath(o.key, o.generation), pos})
		d.listMu.Unlock()
	}
	o.stale = pos
	d.closeFile(o)
	d.dropPages(o)
	o.pages = nil
	o.forget()
	o.changed()
	d.cleared(o.key)
	d.count.objects.Add(-1)
	d.count.deletes.Add(1)
	return nil
}
