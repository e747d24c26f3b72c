package nbd

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"

	"sheepdog/vdi"
)

// store is a Volumes in memory: VDIs with snapshots, block by block.
type store struct {
	mu    sync.Mutex
	disks map[string]*disk // by export name
	opens atomic.Int64     // volumes open now
	fail  error            // of Open, List and Snapshots
}

const testBlock = 4096

type disk struct {
	mu        sync.RWMutex
	name, tag string
	data      []byte
	present   []bool
	snapshots []string                    // tags, oldest first
	changed   map[string][]bool           // by tag: blocks written since
	fail      map[vdi.Op]error            // injected
	hold      chan struct{}               // if not nil, requests complete only when it is closed
	taken     chan struct{}               // if not nil, another node owns the disk until it is closed
	kicks     atomic.Int64                // calls of Kick
	durable   atomic.Int64                // flushes and FUA requests
	seen      []vdi.Request               // submitted, without data
	heard     atomic.Int64                // calls of Heard
	delay     func(*vdi.Request)          // if not nil, completes requests elsewhere
	wait      func(context.Context) error // if not nil, in Extents
}

func newStore(sizes map[string]int64) *store {
	s := &store{disks: map[string]*disk{}}
	for name, size := range sizes {
		s.disks[name] = newDisk(name, size)
	}
	return s
}

func newDisk(name string, size int64) *disk {
	return &disk{name: name, data: make([]byte, size), present: make([]bool, (size+testBlock-1)/testBlock), changed: map[string][]bool{}, fail: map[vdi.Op]error{}}
}

func (s *store) disk(name string) *disk {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.disks[name]
}

// snapshot freezes a VDI's content as NAME@TAG.
func (s *store) snapshot(name, tag string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	d := s.disks[name]
	d.mu.Lock()
	defer d.mu.Unlock()
	snap := newDisk(name, int64(len(d.data)))
	snap.tag = tag
	copy(snap.data, d.data)
	copy(snap.present, d.present)
	s.disks[name+"@"+tag] = snap
	d.snapshots = append(d.snapshots, tag)
	d.changed[tag] = make([]bool, len(d.present))
}

func (s *store) List(context.Context) ([]Export, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var list []Export
	for _, name := range slices.Sorted(maps.Keys(s.disks)) {
		d := s.disks[name]
		list = append(list, Export{Name: d.name, Tag: d.tag, Size: int64(len(d.data)), ReadOnly: d.tag != ""})
	}
	return list, s.fail
}

func (s *store) find(name, tag string) (*disk, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fail != nil {
		return nil, s.fail
	}
	export := name
	if tag != "" {
		export += "@" + tag
	}
	d := s.disks[export]
	if d == nil || d.name != name {
		return nil, fmt.Errorf("open %q: %w", export, vdi.ErrNotFound)
	}
	return d, nil
}

func (s *store) Open(_ context.Context, name, tag, _ string) (Volume, error) {
	d, err := s.find(name, tag)
	if err != nil {
		return nil, err
	}
	s.opens.Add(1)
	d.mu.RLock()
	defer d.mu.RUnlock()
	return &handle{disk: d, store: s, size: int64(len(d.data))}, nil
}

func (s *store) Snapshots(_ context.Context, name, tag string) ([]string, error) {
	d, err := s.find(name, tag)
	if err != nil {
		return nil, err
	}
	return d.snapshots, nil
}

// set changes the disk in step with its sessions.
func (d *disk) set(change func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	change()
}

// submitted returns the requests since the last call.
func (d *disk) submitted() []vdi.Request {
	d.mu.Lock()
	defer d.mu.Unlock()
	seen := d.seen
	d.seen = nil
	return seen
}

// content returns a copy of the data.
func (d *disk) content() []byte {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return slices.Clone(d.data)
}

// handle is an open disk; it keeps the size that it was opened with.
type handle struct {
	*disk
	store  *store
	size   int64
	closed atomic.Bool
}

func (h *handle) Size() int64    { return h.size }
func (h *handle) ReadOnly() bool { return h.tag != "" }
func (h *handle) Kick()          { h.kicks.Add(1) }

func (h *handle) Heard() { h.heard.Add(1) }

func (h *handle) Close() error {
	if h.closed.Swap(true) {
		panic("volume closed twice")
	}
	h.store.opens.Add(-1)
	return nil
}

func (h *handle) Submit(r *vdi.Request) {
	if h.closed.Load() {
		panic("request on a closed volume")
	}
	if r.Off < 0 || r.Len < 0 || r.Off+r.Len > h.size {
		panic(fmt.Sprintf("request beyond the volume: %d+%d", r.Off, r.Len))
	}
	h.mu.Lock()
	seen := *r
	seen.Data, seen.Done = nil, nil
	h.seen = append(h.seen, seen)
	hold, delay, taken := h.hold, h.delay, h.taken
	h.mu.Unlock()
	finish := func() {
		r.Err = h.do(r)
		r.Done(r)
	}
	switch {
	case taken != nil && r.Op != vdi.OpRead:
		go func() {
			<-taken
			if r.Check != nil {
				if r.Err = r.Check(r); r.Err != nil {
					r.Done(r)
					return
				}
			}
			finish()
		}()
	case hold != nil:
		go func() {
			<-hold
			finish()
		}()
	case delay != nil:
		go func() {
			delay(r)
			finish()
		}()
	default:
		finish()
	}
}

func (d *disk) do(r *vdi.Request) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.fail[r.Op]; err != nil {
		return err
	}
	if r.Off+r.Len > int64(len(d.data)) {
		return fmt.Errorf("%w: volume shrank", vdi.ErrInvalid)
	}
	if r.Op == vdi.OpFlush || r.Flags&vdi.FlagFUA != 0 {
		d.durable.Add(1)
	}
	p := d.data[r.Off : r.Off+r.Len]
	switch r.Op {
	case vdi.OpRead:
		copy(r.Data, p)
	case vdi.OpWrite:
		copy(p, r.Data)
		d.mark(r, true)
	case vdi.OpZero, vdi.OpDiscard:
		clear(p)
		d.mark(r, r.Flags&vdi.FlagNoHole != 0)
	}
	return nil
}

// mark notes which blocks were written or became holes.
func (d *disk) mark(r *vdi.Request, present bool) {
	for b := r.Off / testBlock; b*testBlock < r.Off+r.Len; b++ {
		whole := b*testBlock >= r.Off && (b+1)*testBlock <= r.Off+r.Len
		if present || whole {
			d.present[b] = present
		}
		for _, c := range d.changed {
			c[b] = true
		}
	}
}

// runs calls fn for each block of [off, off+n).
func (d *disk) runs(off, n int64, fn func(off, n, block int64) bool) {
	for end := off + n; off < end; {
		block := off / testBlock
		next := min(end, (block+1)*testBlock)
		if !fn(off, next-off, block) {
			return
		}
		off = next
	}
}

func (d *disk) Extents(ctx context.Context, off, n int64, fn func(vdi.Extent) bool) error {
	if d.wait != nil {
		if err := d.wait(ctx); err != nil {
			return err
		}
	}
	d.mu.RLock()
	defer d.mu.RUnlock()
	d.runs(off, n, func(off, n, b int64) bool { return fn(vdi.Extent{Off: off, Len: n, Hole: !d.present[b]}) })
	return nil
}

func (d *disk) Changed(_ context.Context, tag string, off, n int64, fn func(vdi.ChangedExtent) bool) error {
	d.mu.RLock()
	defer d.mu.RUnlock()
	c, ok := d.changed[tag]
	if !ok {
		return vdi.ErrNotFound
	}
	d.runs(off, n, func(off, n, b int64) bool { return fn(vdi.ChangedExtent{Off: off, Len: n, Changed: c[b]}) })
	return nil
}
