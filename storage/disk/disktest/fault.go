package disktest

import (
	"fmt"
	"io/fs"
	"path"
	"sync/atomic"
)

// Kind says what an operation is.
type Kind uint8

// Kinds of operations; those up to OpSyncDir change the disk.
const (
	OpCreate Kind = iota // OpenFile with disk.Create, whether or not the file is there
	OpRemove
	OpRename
	OpMkdir
	OpWrite
	OpPunch
	OpAllocate
	OpTruncate
	OpSync
	OpSyncDir
	OpOpen
	OpRead
	OpReadNowait
	OpReadDir
	OpNextData
	OpSize
	OpUsage
	OpLock
	OpWriteback
	kinds
)

var kindNames = [kinds]string{"create", "remove", "rename", "mkdir", "write", "punch", "allocate", "truncate", "sync", "syncdir",
	"open", "read", "readnowait", "readdir", "nextdata", "size", "usage", "lock", "writeback"}

// String gives the kind's name.
func (k Kind) String() string { return kindNames[k] }

// Changes reports whether operations of this kind change the disk or make changes
// durable: only those are worth a crash.
func (k Kind) Changes() bool { return k <= OpSyncDir }

// Op is an operation about to happen.
type Op struct {
	Kind          Kind
	Name, NewName string // NewName: OpRename
	Off, Len      int64  // bytes
	Change        int64  // number of this operation among those that change the disk, from 1; 0 for others
}

// String is for logs of what a workload did.
func (o Op) String() string {
	return fmt.Sprintf("%d %s %s%s [%d,+%d)", o.Change, o.Kind, o.Name, o.NewName, o.Off, o.Len)
}

// enter begins an operation: it counts it, asks the hook and returns with mu held,
// unless it fails. last says that the power goes while the operation is under way.
func (d *Disk) enter(op Op) (last bool, err error) {
	d.mu.Lock()
	if d.crashed {
		d.mu.Unlock()
		return false, ErrCrashed
	}
	d.counts[op.Kind]++
	if op.Kind.Changes() {
		d.changes++
		op.Change = d.changes
		last = d.changes == d.crashAt
	}
	if hook := d.hook; hook != nil {
		d.mu.Unlock()
		err := hook(op)
		d.mu.Lock()
		if err == nil && d.crashed {
			err = ErrCrashed
		}
		if last && err != nil {
			d.crashed = true
		}
		if err != nil {
			d.mu.Unlock()
			return false, err
		}
	}
	return last, nil
}

// leave ends an operation that enter began.
func (d *Disk) leave(last bool, err error) error {
	if last {
		d.crashed = true
		err = ErrCrashed
	}
	d.mu.Unlock()
	return err
}

// Hook sets what is called before every operation, without a lock held; an error that it
// returns is the operation's outcome, and nothing happens on the disk. It may sleep.
// nil removes it.
func (d *Disk) Hook(hook func(Op) error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.hook = hook
}

// FailNth returns a hook that fails the n-th operation (from 1) for which match, if
// not nil, says true; with forever, all later ones too.
func FailNth(n int64, forever bool, err error, match func(Op) bool) func(Op) error {
	var count atomic.Int64
	return func(op Op) error {
		if match != nil && !match(op) {
			return nil
		}
		if k := count.Add(1); k == n || forever && k > n {
			return err
		}
		return nil
	}
}

// Named matches operations of the given kinds (none: all) on names that fit a pattern
// of package path.
func Named(pattern string, kinds ...Kind) func(Op) bool {
	return func(op Op) bool {
		ok, err := path.Match(pattern, op.Name)
		if err != nil {
			panic(fmt.Sprintf("disktest: pattern %q: %v", pattern, err))
		}
		if len(kinds) == 0 {
			return ok
		}
		for _, k := range kinds {
			if op.Kind == k {
				return ok
			}
		}
		return false
	}
}

// Changes is the number of operations so far that change the disk.
func (d *Disk) Changes() int64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.changes
}

// Count is the number of operations of one kind so far.
func (d *Disk) Count(k Kind) int64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.counts[k]
}

// CrashAt cuts the power at the n-th operation from now that changes the disk: it may
// take effect in part, wholly or not at all. 0 takes it back.
func (d *Disk) CrashAt(n int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.crashAt = 0
	if n > 0 {
		d.crashAt = d.changes + n
	}
}

// Crash cuts the power now.
func (d *Disk) Crash() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.crashed = true
}

// Crashed reports whether the power is off.
func (d *Disk) Crashed() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.crashed
}

// Flip inverts the bits of mask in one byte of a file, beneath everything: the medium
// has gone bad there. It fails if the byte does not exist or lies in a hole.
func (d *Disk) Flip(name string, off int64, mask byte) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	n, err := d.walk("flip", name)
	if err != nil {
		return err
	}
	if n.dir || off < 0 || off >= n.size || n.pages[off/pageSize] == nil {
		return pathError("flip", name, fs.ErrInvalid)
	}
	p := off / pageSize
	cur, durable := n.pages[p], n.durable[p]
	n.pages[p] = flipped(cur, off%pageSize, mask)
	if durable == cur {
		n.durable[p] = n.pages[p]
		n.pages[p].frozen = true
	} else if durable != nil {
		n.durable[p] = flipped(durable, off%pageSize, mask)
		n.durable[p].frozen = true
	}
	return nil
}

// Durable reports whether nothing of a file's content would be lost if the power were cut.
func (d *Disk) Durable(name string) (bool, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	n, err := d.walk("durable", name)
	if err != nil {
		return false, err
	}
	return len(n.writes) == 0 && n.size == n.durableSize, nil
}

func flipped(p *page, in int64, mask byte) *page {
	p = &page{data: p.data}
	p.data[in] ^= mask
	return p
}
