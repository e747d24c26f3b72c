package storage

import (
	"fmt"

	"sheepdog/storage/object"
)

// Taking a disk out while the store works goes in three steps. Retire says that what the disk
// has is to have another place: Failed is true of it, though it works, so that the layer above
// makes sure that others have it, and then Abandons it group by group. Held lists what is still
// there. Unplug closes the disk when that is nothing that matters.

// leaves reports whether a drive is out of service or to be taken out.
func (d *drive) leaves() bool { return d.retired.Load() || d.failed() != nil }

// named finds a disk by its id or directory. It fails with ErrNotFound.
func (s *Store) named(name string) (*drive, error) {
	for _, d := range s.routes.drives() {
		if d.id.Disk == name || d.String() == name {
			return d, nil
		}
	}
	return nil, fmt.Errorf("disk %s: %w", name, object.ErrNotFound)
}

// Retire says that a disk is to be taken out, or with false that it stays. It fails with
// ErrInvalid if no other disk works.
func (s *Store) Retire(name string, retire bool) error {
	s.plugMu.Lock()
	defer s.plugMu.Unlock()
	d, err := s.named(name)
	if err != nil {
		return err
	}
	others := 0
	for _, o := range s.routes.drives() {
		if o != d && !o.leaves() {
			others++
		}
	}
	if retire && others == 0 {
		return fmt.Errorf("disk %s is the last one that works: %w", d, object.ErrInvalid)
	}
	d.retired.Store(retire)
	return nil
}

// Held lists the groups that live on a disk.
func (s *Store) Held(name string) ([]object.Group, error) {
	d, err := s.named(name)
	if err != nil {
		return nil, err
	}
	return s.routes.on(d), nil
}

// Unplug closes a disk that was retired. What it has is lost to the store, and the directory
// free for others. Requests that are under way for it fail with ErrIO or ErrClosed.
func (s *Store) Unplug(name string) error {
	s.plugMu.Lock()
	defer s.plugMu.Unlock()
	d, err := s.named(name)
	switch {
	case err != nil:
		return err
	case s.closed.Load():
		return object.ErrClosed
	case !d.retired.Load():
		return fmt.Errorf("disk %s is in use: %w", d, object.ErrInvalid)
	}
	s.routes.drop(d)
	gone := fmt.Errorf("disk %s was taken out: %w", d, object.ErrIO)
	d.failure.CompareAndSwap(nil, &gone) // who found it before fails
	d.upkeep.wake()
	d.syncer.wake()
	err = d.close()
	s.idMu.Lock()
	s.noteDisks()
	s.idMu.Unlock()
	s.cfg.Logger.Info("disk was taken out", "disk", d.String(), "id", d.id.Disk)
	return err
}
