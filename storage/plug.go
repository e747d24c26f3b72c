package storage

import (
	"errors"
	"fmt"

	"sheepdog/storage/disk"
	"sheepdog/storage/object"
)

// Plug puts one more disk into service, which must be empty: what another life of the store
// has left on it may be older than what the other disks have, and is looked at by Open. From
// then on groups that come get their places on it too, and some of those that are there
// go to it until it has its share. It fails with ErrInvalid if the disk is not empty, or belongs to others, and leaves it
// alone then. tell is called before anything can come to the disk, so that it is missed by whoever is
// told if it is not there after a restart; if it fails the disk is not added.
func (s *Store) Plug(fsys disk.FS, tell func(DiskStatus) error) (DiskStatus, error) {
	s.plugMu.Lock()
	defer s.plugMu.Unlock()
	switch {
	case s.closed.Load():
		return DiskStatus{}, object.ErrClosed
	case len(s.routes.drives()) >= maxDisks:
		return DiskStatus{}, fmt.Errorf("there are %d disks, which is all a store can have: %w", maxDisks, object.ErrInvalid)
	}
	d, err := s.prepareEmpty(fsys)
	if err != nil {
		return DiskStatus{}, fmt.Errorf("add disk %s: %w", fsys, err)
	}
	if err := tell(d.status()); err != nil {
		_ = d.abandon() // nothing was written that could be lost
		return DiskStatus{}, fmt.Errorf("add disk %s: %w", fsys, err)
	}
	d.start()
	s.routes.add(d)
	s.idMu.Lock()
	s.noteDisks()
	s.idMu.Unlock()
	notify(s.mover.wake)
	s.cfg.Logger.Info("disk was added", "disk", d.String(), "id", d.name)
	return d.status(), nil
}

// prepareEmpty opens a disk that has nothing yet, up to where it could be started.
func (s *Store) prepareEmpty(fsys disk.FS) (*drive, error) {
	if err := refuseUsed(fsys); err != nil {
		return nil, err
	}
	if err := refuseContent(fsys); err != nil {
		return nil, err
	}
	d, err := prepareDrive(&s.cfg, fsys, s.cfg.Logger)
	if err != nil {
		return nil, err
	}
	if err := s.welcome(d); err != nil {
		_ = d.abandon() // nothing was written that could be lost
		return nil, err
	}
	return d, nil
}

// refuseUsed says so of a disk that is in use, by this store or another one, instead of what is wrong with what it holds.
func refuseUsed(fsys disk.FS) error {
	lock, err := fsys.Lock()
	switch {
	case errors.Is(err, disk.ErrLocked):
		return refuse("it is in use already")
	case err != nil:
		return err
	}
	return lock.Close()
}

// whatToDo with a disk that has something.
const whatToDo = `put it into node.disks and start anew, or, if the node went on without it, use "dog node md plug --empty"`

// refuseContent looks before anything is written: a disk of others is left as it is.
func refuseContent(fsys disk.FS) error {
	for _, dir := range []string{objectsDir, newDir} {
		names, err := fsys.ReadDir(dir)
		if err == nil && len(names) > 0 {
			return refuse("it has objects already: " + whatToDo)
		}
	}
	return nil
}

// welcome finishes what prepareDrive has begun.
func (s *Store) welcome(d *drive) error {
	for _, o := range s.routes.drives() {
		if o.name == d.name {
			return refuse("it has the identity of disk %s: one is a copy of the other", o)
		}
	}
	id := *d.id
	changed, err := id.adopt(d.fs, s.cfg.Node, s.Cluster())
	if err != nil {
		return err
	}
	found, had := false, d.notes
	d.notes = newNotes() // of what it had before it was emptied
	if err := d.recover(func(object.Group) { found = true }); err != nil {
		return err
	}
	if found {
		return refuse("its log has something of objects: " + whatToDo)
	}
	if changed || id.Leaving || !id.Filling { // it stays, and has nothing that could have left it
		id.Leaving, id.Filling = false, true
		if err := d.become(id); err != nil {
			return err
		}
		d.retired.Store(false)
		d.filling.Store(true)
	}
	if !had.empty() {
		if err := d.notes.write(d.fs); err != nil {
			return err
		}
	}
	return d.forgetMarks()
}

// forgetMarks has an empty disk no longer say of partitions that nothing of them is missing: the file is of a time
// before the disk was emptied.
func (d *drive) forgetMarks() error {
	marks, err := readMarks(d.fs)
	if err == nil && len(marks) == 0 {
		return nil
	}
	return writeWhole(d.fs, marksName, encodeMarks(nil))
}
