package storage

import (
	"errors"
	"fmt"
	"io/fs"

	"sheepdog/storage/disk"
	"sheepdog/storage/object"
)

// Reuse is Plug for a disk of this node that it went on without: what the disk holds is older than
// what took its place, and is removed first. It fails with ErrInvalid if the disk is in use, or does
// not say that it belongs to this node and cluster, and leaves it alone then. If it is interrupted the
// disk is refused by all but another Reuse.
func (s *Store) Reuse(fsys disk.FS, tell func(DiskStatus) error) (DiskStatus, error) {
	if err := s.clear(fsys); err != nil {
		return DiskStatus{}, fmt.Errorf("empty disk %s: %w", fsys, err)
	}
	return s.Plug(fsys, tell)
}

// clear removes all that a disk has, its identity last.
func (s *Store) clear(fsys disk.FS) error {
	s.plugMu.Lock()
	defer s.plugMu.Unlock()
	if s.closed.Load() {
		return object.ErrClosed
	}
	lock, err := fsys.Lock()
	if errors.Is(err, disk.ErrLocked) {
		return refuse("it is in use")
	} else if err != nil {
		return err
	}
	defer lock.Close()
	id, err := readIdentity(fsys)
	if err != nil || id == nil {
		return err // Plug takes it if it is empty
	}
	for _, d := range s.routes.drives() {
		if d.name == id.Disk {
			return refuse("it has the identity of disk %s, which is in use", d)
		}
	}
	if id.Node != s.cfg.Node || id.Cluster != s.Cluster() {
		return refuse("it belongs to node %q of cluster %q, not to this one: it is left as it is", id.Node, id.Cluster)
	}
	if !id.Clearing {
		id.Clearing = true
		if err := writeIdentity(fsys, id); err != nil {
			return err
		}
	}
	s.cfg.Logger.Warn("a disk is emptied to be used again", "disk", fsys.String(), "id", id.Disk)
	for _, dir := range []string{objectsDir, newDir, walDir} {
		if err := removeAll(fsys, dir, dir == objectsDir); err != nil {
			return err
		}
	}
	// The identity last: without it the marks, which say of partitions that they are whole, would be believed.
	for _, name := range []string{marksName, notesName, identityName} {
		if err := fsys.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := fsys.SyncDir("."); err != nil {
			return err
		}
	}
	return nil
}

// removeAll durably removes what is in a directory: files, or directories of files.
func removeAll(fsys disk.FS, dir string, nested bool) error {
	names, err := fsys.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	for _, name := range names {
		path := dir + "/" + name
		if nested {
			if err := removeAll(fsys, path, false); err != nil {
				return err
			}
		}
		if err := fsys.Remove(path); err != nil {
			return err
		}
	}
	return fsys.SyncDir(dir)
}
