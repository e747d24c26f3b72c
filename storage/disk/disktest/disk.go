package disktest

import (
	"errors"
	"io"
	"io/fs"
	"math"
	"slices"
	"strings"
	"sync"
	"syscall"

	"sheepdog/storage/disk"
)

// ErrCrashed is what all operations fail with after the power was cut.
var ErrCrashed = errors.New("disktest: the power is off")

// unlimited is the size of a disk without a capacity, in bytes.
const unlimited = 1 << 50

// Disk is a disk.FS in memory. All methods may be called concurrently.
type Disk struct {
	name string

	mu       sync.Mutex
	root     *inode
	lastID   uint64
	pending  []*entryChange // of directories; not durable, oldest first
	capacity int64          // pages
	used     int64          // pages
	locked   bool
	hook     func(Op) error

	counts  [kinds]int64
	changes int64 // operations that change the disk, so far
	crashAt int64
	crashed bool
}

// New returns an empty disk; name is what messages call it.
func New(name string) *Disk {
	d := &Disk{name: name, capacity: unlimited / pageSize}
	d.root = d.newInode(true)
	return d
}

// entryChange is one operation on directory entries: all of it survives a crash, or nothing.
type entryChange struct {
	entries []entry
	synced  []bool // per entry: its directory was synced since
}

// entry is a new value of one directory entry; nil: the name is gone.
type entry struct {
	dir    *inode
	name   string
	target *inode
}

func (d *Disk) newInode(dir bool) *inode {
	d.lastID++
	n := &inode{id: d.lastID, dir: dir}
	if dir {
		n.entries, n.durableEntries = map[string]*inode{}, map[string]*inode{}
	} else {
		n.pages, n.durable, n.dirty = map[int64]*page{}, map[int64]*page{}, map[int64]struct{}{}
	}
	return n
}

// String implements disk.FS.
func (d *Disk) String() string { return d.name }

func pathError(op, name string, err error) error {
	return &fs.PathError{Op: op, Path: name, Err: err}
}

// walk finds a name. mu is held.
func (d *Disk) walk(op, name string) (*inode, error) {
	if !fs.ValidPath(name) {
		return nil, pathError(op, name, fs.ErrInvalid)
	}
	n := d.root
	if name == "." {
		return n, nil
	}
	for part := range strings.SplitSeq(name, "/") {
		if !n.dir {
			return nil, pathError(op, name, syscall.ENOTDIR)
		}
		if n = n.entries[part]; n == nil {
			return nil, pathError(op, name, fs.ErrNotExist)
		}
	}
	return n, nil
}

// parent finds the directory of a name and the last part of it. mu is held.
func (d *Disk) parent(op, name string) (*inode, string, error) {
	if !fs.ValidPath(name) || name == "." {
		return nil, "", pathError(op, name, fs.ErrInvalid)
	}
	dir, base := ".", name
	if i := strings.LastIndexByte(name, '/'); i >= 0 {
		dir, base = name[:i], name[i+1:]
	}
	n, err := d.walk(op, dir)
	if err == nil && !n.dir {
		err = pathError(op, name, syscall.ENOTDIR)
	}
	return n, base, err
}

// change carries out one operation on directory entries. mu is held.
func (d *Disk) change(entries ...entry) {
	for _, e := range entries {
		old := e.dir.entries[e.name]
		if e.target == nil {
			delete(e.dir.entries, e.name)
		} else {
			e.dir.entries[e.name] = e.target
			e.target.links++
		}
		if old != nil {
			old.links--
			d.reap(old)
		}
	}
	d.pending = append(d.pending, &entryChange{entries: entries, synced: make([]bool, len(entries))})
}

// reap gives back the space of a file that nobody can reach. mu is held.
func (d *Disk) reap(n *inode) {
	if !n.dir && n.links == 0 && n.handles == 0 {
		d.used -= int64(len(n.pages))
		n.pages = map[int64]*page{}
	}
}

// OpenFile implements disk.FS. Creating a file needs a free page, as a directory
// might have to grow for it.
func (d *Disk) OpenFile(name string, flag disk.Flag) (disk.File, error) {
	kind := OpOpen
	if flag&disk.Create != 0 {
		kind = OpCreate
	}
	last, err := d.enter(Op{Kind: kind, Name: name})
	if err != nil {
		return nil, pathError("open", name, err)
	}
	n, err := d.openInode(name, flag)
	if err == nil && !last {
		n.handles++
	}
	if err := d.leave(last, err); err != nil {
		return nil, err
	}
	return &handle{disk: d, inode: n, name: name}, nil
}

func (d *Disk) openInode(name string, flag disk.Flag) (*inode, error) {
	dir, base, err := d.parent("open", name)
	if err != nil {
		return nil, err
	}
	n := dir.entries[base]
	switch {
	case n == nil && flag&disk.Create == 0:
		return nil, pathError("open", name, fs.ErrNotExist)
	case n != nil && flag&(disk.Create|disk.Exclusive) == disk.Create|disk.Exclusive:
		return nil, pathError("open", name, fs.ErrExist)
	case n != nil && n.dir:
		return nil, pathError("open", name, syscall.EISDIR)
	case n != nil:
		return n, nil
	case d.used >= d.capacity:
		return nil, pathError("open", name, syscall.ENOSPC)
	}
	n = d.newInode(false)
	d.change(entry{dir, base, n})
	return n, nil
}

// Remove implements disk.FS.
func (d *Disk) Remove(name string) error {
	last, err := d.enter(Op{Kind: OpRemove, Name: name})
	if err != nil {
		return pathError("remove", name, err)
	}
	return d.leave(last, d.remove(name))
}

func (d *Disk) remove(name string) error {
	dir, base, err := d.parent("remove", name)
	if err != nil {
		return err
	}
	n := dir.entries[base]
	if n == nil {
		return pathError("remove", name, fs.ErrNotExist)
	}
	if n.dir && len(n.entries) > 0 {
		return pathError("remove", name, syscall.ENOTEMPTY)
	}
	d.change(entry{dir, base, nil})
	return nil
}

// Rename implements disk.FS. After a crash it has happened in both directories or in
// neither; it surely has when both were synced.
func (d *Disk) Rename(oldName, newName string) error {
	last, err := d.enter(Op{Kind: OpRename, Name: oldName, NewName: newName})
	if err != nil {
		return pathError("rename", oldName, err)
	}
	return d.leave(last, d.rename(oldName, newName))
}

func (d *Disk) rename(oldName, newName string) error {
	oldDir, oldBase, err := d.parent("rename", oldName)
	if err != nil {
		return err
	}
	newDir, newBase, err := d.parent("rename", newName)
	if err != nil {
		return err
	}
	n, replaced := oldDir.entries[oldBase], newDir.entries[newBase]
	switch {
	case n == nil:
		return pathError("rename", oldName, fs.ErrNotExist)
	case n == replaced:
		return nil
	case replaced != nil && n.dir && !replaced.dir:
		return pathError("rename", newName, syscall.ENOTDIR)
	case replaced != nil && !n.dir && replaced.dir:
		return pathError("rename", newName, fs.ErrExist)
	case replaced != nil && replaced.dir && len(replaced.entries) > 0:
		return pathError("rename", newName, syscall.ENOTEMPTY)
	}
	d.change(entry{newDir, newBase, n}, entry{oldDir, oldBase, nil})
	return nil
}

// MkdirAll implements disk.FS. Each directory made survives a crash by itself.
func (d *Disk) MkdirAll(name string) error {
	last, err := d.enter(Op{Kind: OpMkdir, Name: name})
	if err != nil {
		return pathError("mkdir", name, err)
	}
	return d.leave(last, d.mkdirAll(name))
}

func (d *Disk) mkdirAll(name string) error {
	if !fs.ValidPath(name) {
		return pathError("mkdir", name, fs.ErrInvalid)
	}
	if name == "." {
		return nil
	}
	n := d.root
	for part := range strings.SplitSeq(name, "/") {
		next := n.entries[part]
		switch {
		case next == nil && d.used >= d.capacity:
			return pathError("mkdir", name, syscall.ENOSPC)
		case next == nil:
			next = d.newInode(true)
			d.change(entry{n, part, next})
		case !next.dir:
			return pathError("mkdir", name, syscall.ENOTDIR)
		}
		n = next
	}
	return nil
}

// ReadDir implements disk.FS.
func (d *Disk) ReadDir(name string) ([]string, error) {
	if _, err := d.enter(Op{Kind: OpReadDir, Name: name}); err != nil {
		return nil, pathError("readdir", name, err)
	}
	defer d.mu.Unlock()
	n, err := d.walk("readdir", name)
	if err != nil {
		return nil, err
	}
	if !n.dir {
		return nil, pathError("readdir", name, syscall.ENOTDIR)
	}
	names := make([]string, 0, len(n.entries))
	for base := range n.entries {
		names = append(names, base)
	}
	slices.Sort(names)
	return names, nil
}

// SyncDir implements disk.FS.
func (d *Disk) SyncDir(name string) error {
	last, err := d.enter(Op{Kind: OpSyncDir, Name: name})
	if err != nil {
		return pathError("syncdir", name, err)
	}
	n, err := d.walk("syncdir", name)
	if err == nil && !n.dir {
		err = pathError("syncdir", name, syscall.ENOTDIR)
	}
	if err == nil && !last {
		d.syncEntries(n)
	}
	return d.leave(last, err)
}

// syncEntries marks the changes of a directory as synced and makes durable what then
// is synced wholly, with everything before it that it depends on. mu is held.
func (d *Disk) syncEntries(dir *inode) {
	for _, c := range d.pending {
		for i, e := range c.entries {
			c.synced[i] = c.synced[i] || e.dir == dir
		}
	}
	settled := closure(d.pending, func(c *entryChange) bool { return !slices.Contains(c.synced, false) })
	rest := d.pending[:0]
	for i, c := range d.pending {
		if settled[i] {
			c.settle()
		} else {
			rest = append(rest, c)
		}
	}
	clear(d.pending[len(rest):])
	d.pending = rest
}

// settle makes a change durable.
func (c *entryChange) settle() {
	for _, e := range c.entries {
		if e.target == nil {
			delete(e.dir.durableEntries, e.name)
		} else {
			e.dir.durableEntries[e.name] = e.target
		}
	}
}

// closure tells which changes hold if those do that chosen picks: also all earlier
// ones of the same names, since the changes of one name happen in their order.
func closure(changes []*entryChange, chosen func(*entryChange) bool) []bool {
	type slot struct {
		dir  *inode
		name string
	}
	holds := make([]bool, len(changes))
	needed := map[slot]bool{}
	for i, c := range slices.Backward(changes) {
		holds[i] = chosen(c)
		for _, e := range c.entries {
			holds[i] = holds[i] || needed[slot{e.dir, e.name}]
		}
		if holds[i] {
			for _, e := range c.entries {
				needed[slot{e.dir, e.name}] = true
			}
		}
	}
	return holds
}

// Usage implements disk.FS.
func (d *Disk) Usage() (disk.Usage, error) {
	if _, err := d.enter(Op{Kind: OpUsage, Name: "."}); err != nil {
		return disk.Usage{}, pathError("statfs", ".", err)
	}
	defer d.mu.Unlock()
	return disk.Usage{
		Total: uint64(d.capacity) * pageSize,
		Free:  uint64(max(d.capacity-d.used, 0)) * pageSize,
	}, nil
}

// SetCapacity bounds the space of the disk; 0 lifts the bound. What is stored stays,
// even if it is more.
func (d *Disk) SetCapacity(bytes int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if bytes == 0 {
		bytes = unlimited
	}
	d.capacity = bytes / pageSize
}

// Used is the space that files take, in bytes.
func (d *Disk) Used() int64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.used * pageSize
}

// Lock implements disk.FS.
func (d *Disk) Lock() (io.Closer, error) {
	if _, err := d.enter(Op{Kind: OpLock, Name: "."}); err != nil {
		return nil, pathError("lock", ".", err)
	}
	defer d.mu.Unlock()
	if d.locked {
		return nil, pathError("lock", d.name, disk.ErrLocked)
	}
	d.locked = true
	return &lock{disk: d}, nil
}

type lock struct {
	disk   *Disk
	closed bool
}

func (l *lock) Close() error {
	l.disk.mu.Lock()
	defer l.disk.mu.Unlock()
	if l.closed {
		return fs.ErrClosed
	}
	l.closed, l.disk.locked = true, false
	return nil
}

// maxOffset bounds file sizes, in bytes.
const maxOffset = math.MaxInt64 / 2
