package storage

import (
	"sync"
	"sync/atomic"

	"sheepdog/storage/disk"
	"sheepdog/storage/internal/wal"
	"sheepdog/storage/object"
)

// obj is what is known in memory about one object, existing or not. Everything is
// guarded by mu, except where a comment says otherwise. Lock order: maint, mu, then
// the locks of the log and of the drive's lists; never two objects at once.
type obj struct {
	key      object.Key
	unmerged *atomic.Int64 // the drive's count of objects with dirty pages

	// maint is held by whoever replaces, renames or removes the object's file.
	maint sync.Mutex
	used  atomic.Bool // since the last sweep of the cache; not guarded

	// waiting is set while the holder of mu waits for the disk: the fast path then does
	// not queue up for the lock. Not guarded.
	waiting atomic.Bool

	mu     sync.RWMutex
	dead   bool // left the drive's map: look the key up again
	loaded bool // the fields below are known
	exists bool
	broken bool // the file is there but its header cannot be believed

	shift      uint8
	generation uint64
	version    object.Version
	filed      object.Version // the version in the file's header, as far as known; zero: another one
	uncertain  bool

	createPos wal.Pos // of the Create record, while the log holds it
	complete  bool    // created with its file already complete and durable (wal.FlagComplete)
	stale     wal.Pos // of the last Delete record, while objectPath may hold that incarnation's file
	fresh     bool    // the file, if there is one, is at newPath
	hasFile   bool
	file      *handle // nil: not open now

	pages      []*sumPage // nil: not loaded
	dirtyPages int

	over     overlay
	marks    []wal.Pos // per region: of its last Direct record; nil: none
	rebuild  bool      // after a crash: regions in distrust have checksums that lag behind the content
	distrust []bool    // per region; nil with rebuild: all

	spans     []span // direct writes in flight
	waiters   requests
	merging   bool          // the checkpoint works on it: nothing may be evicted
	loose     bool          // what a checkpoint has written to the file is not durable: if it fails there, the next one must see to that
	frozen    bool          // no direct write may begin: the checkpoint waits for those in flight
	drained   chan struct{} // closed when there are none left, if frozen
	dirtyData bool          // direct writes that are not durable; the object is in drive.dirty
	logged    bool          // the object is in drive.logged

	watch *handover // is told of changes: the object's group is being copied to another disk
	held  bool      // nothing may change: the group is about to live on that disk
}

// span is a range of blocks that is being written directly.
type span struct{ first, end uint32 }

func (o *obj) busy(first, end uint32) bool {
	for _, s := range o.spans {
		if first < s.end && s.first < end {
			return true
		}
	}
	return false
}

// ready reports whether the object can be worked with at once.
func (o *obj) ready() bool { return o.loaded && !o.dead && !o.rebuild && !o.broken }

// inMemory reports whether the object has an open file and its table for [first, end) is in memory.
func (o *obj) inMemory(first, end uint32) bool {
	if !o.ready() || !o.exists || o.file == nil || end > o.blocks() {
		return false
	}
	for p := first / sumsPerPage; p <= (end-1)/sumsPerPage; p++ {
		if o.pages[p] == nil {
			return false
		}
	}
	return true
}

func (o *obj) blocks() uint32 { return blocksOf(o.shift) }

// sum returns the checksum that block b has now, pending or not. ok is false if the
// table's page is needed and not in memory.
func (o *obj) sum(b uint32) (sum uint64, ok bool) {
	if e := o.over.get(b); e.pending() {
		return e.sum, true
	}
	return o.fileSum(b)
}

// fileSum is sum for what the file has. Without a file there is nothing: a new object
// needs no table in memory, and many are made at a time.
func (o *obj) fileSum(b uint32) (sum uint64, ok bool) {
	p := o.pages[b/sumsPerPage]
	if p == nil {
		return 0, !o.hasFile
	}
	return p.sums[b%sumsPerPage], true
}

// setFileSum changes the table; the page is in memory.
func (o *obj) setFileSum(b uint32, sum uint64) {
	p := o.pages[b/sumsPerPage]
	p.sums[b%sumsPerPage] = sum
	o.pageDirty(p)
}

func (o *obj) pageDirty(p *sumPage) {
	if p.dirty {
		return
	}
	p.dirty = true
	if o.dirtyPages++; o.dirtyPages == 1 {
		o.unmerged.Add(1)
	}
}

func (o *obj) pageClean(p *sumPage) {
	if !p.dirty {
		return
	}
	p.dirty = false
	if o.dirtyPages--; o.dirtyPages == 0 {
		o.unmerged.Add(-1)
	}
}

func (o *obj) raise(v object.Version) {
	if o.version.Less(v) {
		o.version = v
	}
}

// changed tells who copies the object to another disk that it is another now. Its lock is held.
func (o *obj) changed() {
	if o.watch != nil && !o.watch.touch(o.key) {
		o.watch = nil
	}
}

// path is where the object's file is.
func (o *obj) path() string {
	if o.fresh {
		return newPath(o.key, o.generation)
	}
	return objectPath(o.key)
}

// forget makes the object a missing one.
func (o *obj) forget() {
	o.exists, o.broken, o.hasFile, o.fresh, o.complete, o.uncertain = false, false, false, false, false, false
	o.version, o.filed, o.generation, o.createPos = object.Version{}, object.Version{}, 0, 0
	o.over.clear()
	o.marks, o.rebuild, o.distrust, o.dirtyData, o.loose = nil, false, nil, false, false
}

// handle is an open file with a count of its users: the object itself and everybody
// who reads or writes without holding the object's lock.
type handle struct {
	disk.File
	refs atomic.Int32

	syncMu sync.Mutex
	lost   error // what Sync has failed with
}

func newHandle(f disk.File) *handle {
	h := &handle{File: f}
	h.refs.Store(1)
	return h
}

// Sync makes the file's content durable. The system tells one of those who sync a file that something of it was lost, and the next
// ones that all is well: so they do it one after the other, and all hear of it.
func (h *handle) Sync() error {
	h.syncMu.Lock()
	defer h.syncMu.Unlock()
	if h.lost == nil {
		h.lost = h.File.Sync()
	}
	return h.lost
}

func (h *handle) acquire() *handle {
	h.refs.Add(1)
	return h
}

// release closes the file when the last user is gone. What a close could complain
// about was reported by a sync before, or nobody asked for it to be durable.
func (h *handle) release() {
	if h.refs.Add(-1) == 0 {
		_ = h.File.Close()
	}
}

// requests is a queue of requests linked by Next.
type requests struct{ head, tail *object.Request }

func (q *requests) push(r *object.Request) {
	r.Next = nil
	if q.tail == nil {
		q.head = r
	} else {
		q.tail.Next = r
	}
	q.tail = r
}

func (q *requests) pop() *object.Request {
	r := q.head
	if r == nil {
		return nil
	}
	if q.head = r.Next; q.head == nil {
		q.tail = nil
	}
	r.Next = nil
	return r
}

func (q *requests) take() requests {
	all := *q
	*q = requests{}
	return all
}

// shards spread the map of objects over many locks.
const shardCount = 64

type shard struct {
	mu      sync.RWMutex
	objects map[object.Key]*obj
	_       [24]byte
}

func (d *drive) shard(k object.Key) *shard {
	h := (uint64(k.ID) ^ uint64(k.Group.Partition)<<32) * 0x9e3779b97f4a7c15
	return &d.shards[h>>58]
}

// lookup returns the object if it is in memory.
func (d *drive) lookup(k object.Key) *obj {
	s := d.shard(k)
	s.mu.RLock()
	o := s.objects[k]
	s.mu.RUnlock()
	return o
}

// obtain returns the object, making an unloaded one if it is not in memory. It fails with errAway if the
// object's group lives on another disk.
func (d *drive) obtain(k object.Key) (*obj, error) {
	if o := d.lookup(k); o != nil {
		return o, nil
	}
	s := d.shard(k)
	s.mu.Lock()
	defer s.mu.Unlock()
	o := s.objects[k]
	if o == nil {
		if d.away(k.Group) { // under the shard's lock: see handover.depart
			return nil, errAway
		}
		o = d.addObject(s, k)
	}
	return o, nil
}

// addObject makes an unloaded object. The shard's lock is held.
func (d *drive) addObject(s *shard, k object.Key) *obj {
	o := &obj{key: k, unmerged: &d.unmerged}
	if h := d.handover.Load(); h != nil && h.has(k.Group) {
		o.watch, o.held = h, h.held.Load()
	}
	s.objects[k] = o
	d.resident.Add(1)
	return o
}

// lock returns the object loaded and locked for writing. It fails with errAway if the object's group
// lives on another disk.
func (d *drive) lock(k object.Key) (*obj, error) {
	for {
		o, err := d.obtain(k)
		if err != nil {
			return nil, err
		}
		o.mu.Lock()
		if o.dead {
			o.mu.Unlock()
			continue
		}
		if err := d.load(o); err != nil {
			o.mu.Unlock()
			return nil, err
		}
		o.used.Store(true)
		return o, nil
	}
}

// noteLogged puts the object on the list of those the next checkpoint looks at. Its
// lock is held. It comes before the record is appended: a rotation of the log after
// that must find the object on the list.
func (d *drive) noteLogged(o *obj) {
	if o.logged {
		return
	}
	o.logged = true
	d.listMu.Lock()
	d.logged = append(d.logged, o)
	d.listMu.Unlock()
	d.oldest.CompareAndSwap(0, d.now())
}

// noteDirty puts the object on the list of those the next sync looks at. Its lock is held.
func (d *drive) noteDirty(o *obj) {
	if o.dirtyData {
		return
	}
	o.dirtyData = true
	d.listMu.Lock()
	d.dirty = append(d.dirty, o)
	d.listMu.Unlock()
}
