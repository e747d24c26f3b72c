package storage

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"sheepdog/storage/disk"
	"sheepdog/storage/internal/wal"
	"sheepdog/storage/object"
)

// drive is one disk at work.
type drive struct {
	cfg    *Config
	fs     disk.FS
	name   string    // the disk's id
	id     *identity // another one takes its place when it changes; guarded by Store.idMu once the store is open
	weight uint64    // bytes
	logger *slog.Logger
	unlock io.Closer
	log    *wal.Log

	shards   [shardCount]shard
	resident atomic.Int64 // objects in memory
	open     atomic.Int64 // files
	pages    atomic.Int64 // table pages in memory
	unmerged atomic.Int64 // objects whose table in memory is newer than the file's
	sweepAt  atomic.Uint32

	listMu  sync.Mutex
	logged  []*obj // what the log has something about
	dirty   []*obj // what was written directly since the last sync
	garbage []garbage

	oldest   atomic.Int64  // unix nanoseconds since when the log is not empty; 0: it is
	barrier  atomic.Uint32 // first segment that the checkpoint begun last does not cover
	lastGen  atomic.Uint64
	newDirty atomic.Bool                    // entries of newDir are not durable
	staged   atomic.Bool                    // records await the next kick
	gives    atomic.Bool                    // the next checkpoint gives back what was deleted or discarded
	handy    atomic.Pointer[object.Request] // a long write that awaits it, too; nil: none does

	fileSync sync.Mutex // serialises syncFiles
	groupMu  sync.Mutex
	groups   map[object.Group]bool // group directories that exist

	space    space
	pool     pool
	syncer   syncer
	upkeep   upkeep
	rot      rot
	scrubber scrubber
	count    counters

	started bool // its log was replayed; never changes after Open
	failure atomic.Pointer[error]
	retired atomic.Bool // it works, and is to be taken out: see Store.Retire
	given   atomic.Bool // and what is on it is had from elsewhere: see Store.Release

	parted   atomic.Bool // it was taken out with everything durable
	fresh    bool        // the store has given it its identity
	routes   *routes     // nil until the drive has a slot
	filling  atomic.Bool
	handover atomic.Pointer[handover] // of groups that live here to another disk; nil: none goes on
	retained atomic.Uint32            // first segment that the log has kept at the last checkpoint since the start
	untidy   bool                     // it had notes when it was opened
	notes    notes                    // guarded by mover.mu once the store is open
	moves    moves
	counted  chan struct{} // closed when its objects were counted
	stop     chan struct{}
	wg       sync.WaitGroup
}

// garbage is the file of an object that was deleted before any checkpoint covered it.
type garbage struct {
	path    string
	deleted wal.Pos
}

var (
	// errSlow: the operation has to wait for the disk and must move to a worker.
	errSlow = errors.New("must wait for the disk")
	// errBusy: the operation overlaps a direct write in flight.
	errBusy = errors.New("range is being written")
)

func (d *drive) now() int64 { return time.Now().UnixNano() }

func (d *drive) String() string { return d.fs.String() }

// nextGeneration names a new incarnation of an object: unique on this disk for ever.
func (d *drive) nextGeneration() uint64 {
	return uint64(d.log.Boot())<<36 | d.lastGen.Add(1)
}

// submit starts one operation; it never waits for the disk.
func (d *drive) submit(r *object.Request) {
	if err := d.failed(); err != nil {
		d.refuse(r, err)
		return
	}
	done := false
	switch r.Op {
	case object.OpRead:
		done = r.Len <= maxInlineRead && d.tryRead(r)
	case object.OpWrite:
		if int(r.Len) <= d.cfg.SmallWrite {
			done = d.tryLog(r)
		} else {
			done = r.Len <= maxInlineWrite && d.tryDirect(r)
		}
	case object.OpZero, object.OpDiscard:
		done = r.Len <= maxInlineZero && d.tryLog(r)
	}
	if !done {
		d.pool.submit(r)
		return
	}
	if d.failed() != nil {
		d.kick() // it may be taken out by now, and nobody else would
	}
}

// maxInlineRead bounds what a read copies and verifies within Submit, in bytes. Longer ones
// take long enough for the hand-over to a worker not to matter, and for the caller to have
// something better to do: send what was read before, or submit the next one.
const maxInlineRead = 128 << 10

// maxInlineWrite bounds what a kick writes to an object's file by itself, in bytes, if nothing else is
// being done for which there are workers: to wake one takes as long as to copy that much.
const maxInlineWrite = 128 << 10

// maxInlineZero bounds the work that a zero or discard does within Submit, in bytes.
const maxInlineZero = 4 << 20

// work carries out one operation on a worker, where it may wait.
func (d *drive) work(r *object.Request) {
	if err := d.failed(); err != nil {
		d.refuse(r, err)
		return
	}
	switch {
	case r.Op == object.OpRead:
		d.read(r)
	case r.Op == object.OpWrite && int(r.Len) > d.cfg.SmallWrite:
		d.writeDirect(r, true)
	default:
		d.writeLog(r)
	}
	d.kick()
}

// kick writes the staged records and completes what only waited for that.
func (d *drive) kick() {
	if d.staged.Swap(false) {
		d.flush()
	}
	if d.handy.Load() == nil {
		return
	}
	if r := d.handy.Swap(nil); r != nil {
		d.writeDirect(r, d.syncer.quick())
	}
}

// flush writes what was gathered for the log and completes whom that is enough for. To make it durable for the others is left
// to the syncer, unless that takes no longer than to wake it.
func (d *drive) flush() {
	done, err := d.log.Flush()
	if err != nil {
		err = d.fail(err)
	}
	waiting := false
	for done != nil {
		r := done
		done = r.Next
		r.Next = nil
		switch {
		case err != nil:
			r.Complete(err)
		case r.Flags&object.FlagFUA != 0:
			d.syncer.add(r, false)
			waiting = true
		default:
			r.Complete(nil)
		}
	}
	if waiting {
		d.syncer.serve(d.syncer.quick())
	}
}

// settle handles an operation that could not go on for the given reason.
func (d *drive) settle(r *object.Request, err error) {
	switch {
	case errors.Is(err, wal.ErrFull):
		d.upkeep.stall(r)
	case errors.Is(err, errHeld):
		d.park(r)
	case errors.Is(err, errAway):
		d.pass(r)
	default:
		r.Complete(d.explain(err))
	}
}

// explain turns an error of the disk or the log into one of the object vocabulary and
// takes the disk out of service where that is due.
func (d *drive) explain(err error) error {
	if err == nil {
		return nil
	}
	return d.diagnose(err)
}

// diagnose is apart from explain for the sake of the good case: it allocates.
func (d *drive) diagnose(err error) error {
	var corrupt *object.CorruptError
	switch {
	case errors.As(err, &corrupt):
		d.reportRot(corrupt)
		return err
	case errors.Is(err, object.ErrIO), errors.Is(err, object.ErrInvalid), errors.Is(err, object.ErrNotFound),
		errors.Is(err, object.ErrNoSpace), errors.Is(err, object.ErrClosed), errors.Is(err, errAway), errors.Is(err, errHeld),
		errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded): // who asked has gone: no fault of the disk
		return err
	case errors.Is(err, wal.ErrFull):
		return fmt.Errorf("log of disk %s is full and cannot be emptied: %w", d, object.ErrNoSpace)
	case errors.Is(err, wal.ErrBroken):
		return d.fail(err)
	case noSpace(err):
		return fmt.Errorf("disk %s: %w", d, object.ErrNoSpace)
	}
	return d.fail(err)
}

// failed returns the error of a disk that is out of service.
func (d *drive) failed() error {
	if p := d.failure.Load(); p != nil {
		return *p
	}
	return nil
}

// fail takes the disk out of service. It returns what all operations fail with from now on.
func (d *drive) fail(cause error) error {
	err := fmt.Errorf("disk %s is out of service: %w: %w", d, object.ErrIO, cause)
	if d.failure.CompareAndSwap(nil, &err) {
		d.count.ioErrors.Add(1)
		d.logger.Error("disk failed and is out of service: replace it, or restart sheep once it is repaired", "disk", d.String(), "error", cause)
		d.upkeep.wake()
		d.syncer.wake()
	}
	return d.failed()
}
