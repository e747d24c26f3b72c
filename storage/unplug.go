package storage

import (
	"fmt"

	"sheepdog/storage/object"
)

// Taking a disk out while the store works goes in three steps. Retire says that what the disk
// has is to have another place: the mover brings it to the other disks. What it cannot, for they have no
// space, has to come from elsewhere: after Release, Failed is true of it, though it works, so that the layer above
// makes sure that others have it, and then Abandons it group by group. Held lists what is still
// there. Unplug closes the disk when that is nothing that matters. A store that is opened in between
// goes on with that: of each group it knows which disk has it, and which only has what it left.

// leaves reports whether a drive is out of service or to be taken out.
func (d *drive) leaves() bool { return d.retired.Load() || d.failed() != nil }

// lost reports whether what is on a drive has to come from elsewhere.
func (d *drive) lost() bool { return d.given.Load() || d.failed() != nil }

// named finds a disk by its id or directory. It fails with ErrNotFound.
func (s *Store) named(name string) (*drive, error) {
	for _, d := range s.routes.drives() {
		if d.name == name || d.String() == name {
			return d, nil
		}
	}
	return nil, fmt.Errorf("disk %s: %w", name, object.ErrNotFound)
}

// Retire says that a disk is to be taken out, durably if it works: that may be said again, but not
// unsaid, for groups leave it from then on. It fails with ErrInvalid if no other disk works.
func (s *Store) Retire(name string) error {
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
	if others == 0 {
		return fmt.Errorf("disk %s is the last one that works: %w", d, object.ErrInvalid)
	}
	if d.failed() == nil {
		if err := s.noteLeaving(d); err != nil {
			return fmt.Errorf("retire disk %s: %w", d, err)
		}
	}
	d.retired.Store(true)
	notify(s.mover.wake)
	return nil
}

// Release says of a disk that is to be taken out that what still is on it has to come from elsewhere: Failed is true
// of it from then on, until the store is closed. It fails with ErrInvalid if the disk was not retired.
func (s *Store) Release(name string) error {
	s.plugMu.Lock()
	defer s.plugMu.Unlock()
	d, err := s.named(name)
	if err != nil {
		return err
	}
	if !d.retired.Load() {
		return fmt.Errorf("disk %s is in use: %w", d, object.ErrInvalid)
	}
	defer s.mover.stop()()
	d.given.Store(true)
	return nil
}

// noteLeaving has a disk say of itself that it is to be taken out.
func (s *Store) noteLeaving(d *drive) error {
	s.idMu.Lock()
	defer s.idMu.Unlock()
	if d.id.Leaving {
		return nil
	}
	id := *d.id
	id.Leaving = true
	return d.become(id)
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
// free for others. Requests that are under way for it fail with ErrIO.
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
	defer s.mover.stop()()
	s.mover.settle()
	if s.mover.owes(d) { // a group that lives here might get its place where it was before
		return fmt.Errorf("disk %s: of partitions that went to it something is left on others: %w", d, errUnsettled)
	}
	s.routes.drop(d)
	if d.failed() == nil { // what is under way for partitions that have left it ends well
		done := make(chan struct{})
		d.sync(&object.Request{Op: object.OpSync, Done: func(r *object.Request) {
			d.parted.Store(r.Err == nil)
			close(done)
		}})
		<-done
	}
	gone := fmt.Errorf("disk %s was taken out: %w", d, object.ErrIO)
	d.failure.CompareAndSwap(nil, &gone) // who found it before fails
	d.upkeep.wake()
	d.syncer.wake()
	err = d.close()
	s.idMu.Lock()
	s.noteDisks()
	s.idMu.Unlock()
	s.cfg.Logger.Info("disk was taken out", "disk", d.String(), "id", d.name)
	return err
}
