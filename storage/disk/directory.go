package disk

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"syscall"

	"golang.org/x/sys/unix"
)

// lockName is the file whose flock guards a directory.
const lockName = "lock"

// directory is the FS of a directory of the operating system.
type directory struct {
	path string
	root *os.Root // confines every name below path, symbolic links included
}

// Open returns the FS of an existing directory. Its files are opened with O_CLOEXEC
// and O_NOATIME is not used: the file system's relatime is cheap enough.
func Open(path string) (FS, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("open disk: %w", err)
	}
	root, err := os.OpenRoot(abs)
	if err != nil {
		return nil, fmt.Errorf("open disk: %w", err)
	}
	return &directory{path: abs, root: root}, nil
}

func (d *directory) String() string { return d.path }

func (d *directory) OpenFile(name string, flag Flag) (File, error) {
	mode := os.O_RDWR
	if flag&Create != 0 {
		mode |= os.O_CREATE
	}
	if flag&Exclusive != 0 {
		mode |= os.O_EXCL
	}
	f, err := d.root.OpenFile(name, mode, 0o600)
	if err != nil {
		return nil, err
	}
	return newFile(f), nil
}

func (d *directory) Remove(name string) error { return d.root.Remove(name) }

func (d *directory) Rename(oldName, newName string) error { return d.root.Rename(oldName, newName) }

func (d *directory) MkdirAll(name string) error { return d.root.MkdirAll(name, 0o700) }

func (d *directory) ReadDir(name string) ([]string, error) {
	f, err := d.root.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	names, err := f.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	sort.Strings(names)
	return names, nil
}

func (d *directory) SyncDir(name string) error {
	f, err := d.root.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

func (d *directory) Usage() (Usage, error) {
	var st unix.Statfs_t
	if err := ignoringEINTR(func() error { return unix.Statfs(d.path, &st) }); err != nil {
		return Usage{}, &fs.PathError{Op: "statfs", Path: d.path, Err: err}
	}
	unit := uint64(st.Frsize)
	return Usage{Total: st.Blocks * unit, Free: st.Bavail * unit}, nil
}

func (d *directory) Lock() (io.Closer, error) {
	f, err := d.root.OpenFile(lockName, os.O_RDWR|os.O_CREATE, 0o600)
	if errors.Is(err, fs.ErrPermission) {
		return nil, fmt.Errorf("%s must belong to the user that sheep runs as, or be writable for it: %w", d.path, err)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", d.path, err)
	}
	err = ignoringEINTR(func() error { return unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) })
	if err == nil {
		return f, nil
	}
	f.Close()
	if errors.Is(err, syscall.EWOULDBLOCK) {
		return nil, fmt.Errorf("lock %s: %w", d.path, ErrLocked)
	}
	return nil, &fs.PathError{Op: "flock", Path: d.path, Err: err}
}

func ignoringEINTR(call func() error) error {
	for {
		if err := call(); err != unix.EINTR {
			return err
		}
	}
}
