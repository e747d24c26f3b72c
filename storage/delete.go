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
	d, err := s.drive(k)
	if err != nil {
		return err
	}
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
}

func (d *drive) delete(k object.Key) error {
	o := d.maintain(k)
	defer o.maint.Unlock()
	return d.deleteHeld(o)
}

// maintain returns the object with maint and mu locked.
func (d *drive) maintain(k object.Key) *obj {
	for {
		o := d.obtain(k)
		o.maint.Lock()
		o.mu.Lock()
		if !o.dead {
			return o
		}
		o.mu.Unlock()
		o.maint.Unlock()
	}
}

// deleteHeld deletes with both locks held; it unlocks mu.
func (d *drive) deleteHeld(o *obj) error {
	defer d.thaw(o)
	for len(o.spans) > 0 {
		o.frozen, o.drained = true, make(chan struct{})
		drained := o.drained
		o.mu.Unlock()
		<-drained
		o.mu.Lock()
		o.frozen = false
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
	if o.fresh && o.hasFile {
		d.listMu.Lock()
		d.garbage = append(d.garbage, garbage{newPath(o.key, o.generation), pos})
		d.listMu.Unlock()
	}
	o.stale = pos
	d.closeFile(o)
	d.dropPages(o)
	o.pages = nil
	o.forget()
	d.cleared(o.key)
	d.count.objects.Add(-1)
	d.count.deletes.Add(1)
	return nil
}
