package storage

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"sheepdog/storage/object"
)

// syncer makes things durable for whoever waits: all that gather while one sync runs
// share the next. Its goroutine does that, or somebody who may wait for the disk and would
// have to wake it.
type syncer struct {
	d *drive

	mu     sync.Mutex
	cond   sync.Cond
	queue  requests // complete when durable
	marks  requests // go on when the log is durable
	files  bool     // somebody in queue needs what was written directly
	busy   bool     // a sync is under way: who carries it out wakes the goroutine for what has gathered
	closed bool

	usual atomic.Int64 // what a sync takes, in ns: see took
}

func (s *syncer) init(d *drive) {
	s.d = d
	s.cond.L = &s.mu
	s.usual.Store(int64(time.Millisecond)) // until it is known
}

// add completes r when everything completed so far is durable; files says whether that includes object files. It is begun by
// the serve that must follow.
func (s *syncer) add(r *object.Request, files bool) {
	s.mu.Lock()
	s.queue.push(r)
	s.files = s.files || files
	s.mu.Unlock()
}

// serve sees to those who wait, unless a sync is under way: then they are seen to after it. here says that the caller may wait
// for the disk, and is to do it.
func (s *syncer) serve(here bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.busy || !s.wanted():
	case here:
		s.one()
		if s.wanted() {
			s.cond.Signal()
		}
	default:
		s.cond.Signal()
	}
}

// one carries out a batch. mu is held, but not meanwhile.
func (s *syncer) one() {
	s.busy = true
	s.mu.Unlock()
	s.batch()
	s.mu.Lock()
	s.busy = false
}

// mark gives r back to a worker when the log is durable.
func (s *syncer) mark(r *object.Request) {
	s.mu.Lock()
	s.marks.push(r)
	s.mu.Unlock()
	s.serve(false)
}

func (s *syncer) wake() { s.cond.Signal() }

func (s *syncer) wanted() bool { return s.queue.head != nil || s.marks.head != nil }

func (s *syncer) close() {
	s.mu.Lock()
	s.closed = true
	s.cond.Signal()
	s.mu.Unlock()
}

// run is the syncer's goroutine.
func (s *syncer) run() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		for s.busy || !s.wanted() {
			if s.closed && !s.wanted() {
				return
			}
			s.cond.Wait()
		}
		s.one()
	}
}

// quick is less than it takes to wake a goroutine and to be told of the outcome.
const quick = 40 * time.Microsecond

// quick reports whether to sync takes less time than to have somebody else do it. So it is with a file system in memory,
// and with disks that keep what they have not written yet through a power cut.
func (s *syncer) quick() bool { return s.usual.Load() < int64(quick) }

// took learns what a sync takes: at once if it is more than usual, slowly if it is less.
func (s *syncer) took(t time.Duration) {
	usual := s.usual.Load()
	if usual = usual - usual/16 + int64(t)/16; usual < int64(t) {
		usual = int64(t)
	}
	s.usual.Store(usual)
}

// batch carries out one sync for all who wait.
func (s *syncer) batch() {
	// What is staged may carry requests for this batch.
	s.d.staged.Store(false)
	s.d.flush()
	s.mu.Lock()
	queue, marks, files := s.queue.take(), s.marks.take(), s.files
	s.files = false
	s.mu.Unlock()
	began := time.Now()
	err := s.d.syncAll(files)
	s.took(time.Since(began))
	for r := queue.pop(); r != nil; r = queue.pop() {
		s.d.completeSync(r, err)
	}
	s.d.pool.submitAll(marks)
}

// drain serves what came after the goroutine ended.
func (s *syncer) drain() {
	s.batch()
	s.d.pool.close()
	s.batch()
}

// syncAll makes durable what is complete: object files first if asked for, then the log.
func (d *drive) syncAll(files bool) error {
	if err := d.failed(); err != nil {
		return err
	}
	d.count.syncs.Add(1)
	if files {
		if err := d.syncFiles(); err != nil {
			return d.explain(err)
		}
	}
	if err := d.log.Sync(); err != nil {
		return d.fail(err)
	}
	return nil
}

// syncParallel is how many files are synced at once: they share the journal's commits.
const syncParallel = 32

// inParallel calls fn with 0 to n-1, on syncParallel goroutines, until one call fails. It
// returns the first failure. A few calls are not worth goroutines.
func inParallel(n int, fn func(i int) error) error {
	if n <= 2 {
		for i := range n {
			if err := fn(i); err != nil {
				return err
			}
		}
		return nil
	}
	var wg sync.WaitGroup
	var next atomic.Int64
	var failure atomic.Pointer[error]
	for range min(syncParallel, n) {
		wg.Go(func() {
			for failure.Load() == nil {
				i := int(next.Add(1)) - 1
				if i >= n {
					return
				}
				if err := fn(i); err != nil {
					failure.CompareAndSwap(nil, &err)
				}
			}
		})
	}
	wg.Wait()
	if p := failure.Load(); p != nil {
		return *p
	}
	return nil
}

// syncFiles makes direct writes and the entries of newDir durable. When it returns,
// everything that was dirty when it was called is durable, whoever synced it.
func (d *drive) syncFiles() error {
	d.fileSync.Lock()
	defer d.fileSync.Unlock()
	d.listMu.Lock()
	dirty := d.dirty
	d.dirty = nil
	d.listMu.Unlock()
	entries := d.newDirty.Swap(false)
	err := inParallel(len(dirty), func(i int) error { return d.syncObject(dirty[i]) })
	if err == nil && entries {
		if err = d.fs.SyncDir(newDir); err != nil {
			err = fmt.Errorf("sync %s: %w", newDir, err)
		}
	}
	if err != nil {
		d.listMu.Lock()
		d.dirty = append(d.dirty, dirty...) // never settled again
		d.listMu.Unlock()
		d.newDirty.Store(true)
		// What the kernel did with the pages is not known: the disk is not to be trusted.
		return d.fail(err)
	}
	return nil
}

func (d *drive) syncObject(o *obj) error {
	o.mu.Lock()
	if !o.dirtyData || o.dead || !o.exists {
		o.mu.Unlock()
		return nil
	}
	if err := d.load(o); err != nil {
		o.mu.Unlock()
		if errors.Is(err, object.ErrCorrupt) {
			return nil // nothing of it can be made durable; its readers are told
		}
		return err
	}
	if err := d.ensureOpen(o); err != nil {
		o.mu.Unlock()
		return err
	}
	o.dirtyData = false
	if o.file == nil {
		o.mu.Unlock()
		return nil
	}
	h := o.file.acquire()
	o.mu.Unlock()
	defer h.release()
	if err := h.Sync(); err != nil {
		return fmt.Errorf("sync object %s: %w", o.key, err)
	}
	return nil
}

// sync carries out OpSync for this disk.
func (d *drive) sync(r *object.Request) {
	if !d.started || d.settled() { // nothing was ever written to a disk that did not open
		r.Complete(nil)
		return
	}
	if err := d.failed(); err != nil {
		d.completeSync(r, err)
		return
	}
	d.syncer.add(r, true)
	d.syncer.serve(false)
}

// completeSync completes an OpSync, or a write that was to be durable. A disk that was taken out with everything durable
// has nothing more to make so.
func (d *drive) completeSync(r *object.Request, err error) {
	if r.Op == object.OpSync && d.parted.Load() {
		err = nil
	}
	r.Complete(err)
}

// settled reports whether there is nothing that a sync would make durable. A disk that
// failed with such things stays unsettled for ever: their writers must hear of it.
func (d *drive) settled() bool {
	if !d.fileSync.TryLock() {
		return false
	}
	defer d.fileSync.Unlock()
	d.listMu.Lock()
	dirty := len(d.dirty)
	d.listMu.Unlock()
	return dirty == 0 && !d.newDirty.Load() && d.log.Clean()
}
