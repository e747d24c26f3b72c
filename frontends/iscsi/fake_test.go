package iscsi

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"

	"sheepdog/vdi"
)

// store is a Volumes in memory.
type store struct {
	mu      sync.Mutex
	disks   map[string]*disk // by NAME or NAME.TAG
	opens   atomic.Int64     // volumes open now
	changes atomic.Uint64
	lapses  atomic.Uint64
	taken   atomic.Bool // another gateway owned the disk: writes are asked about
	fences  atomic.Int64
	owner   uint16
	paths   []Path
	others  []func(context.Context) // Settle of other gateways
	dead    map[string]bool         // gateways
	before  func()                  // called by SetReservations before it does anything
}

type disk struct {
	Disk
	mu       sync.RWMutex
	data     []byte
	hole     []bool // by block of 4096 bytes
	fail     map[vdi.Op]error
	once     map[vdi.Op]error // the same, for one request
	hold     chan struct{}    // if not nil, requests complete only when it is closed
	held     atomic.Int64     // requests that wait for hold
	durable  atomic.Int64
	heard    atomic.Int64 // calls of Heard
	text     string
	revision uint64
}

func newStore(sizes map[string]int64) *store {
	s := &store{disks: map[string]*disk{}, owner: 1, paths: []Path{{Group: 1, Owner: true}}}
	n := byte(0)
	for name, size := range sizes {
		n++
		d := &disk{Disk: Disk{Name: name, Size: size, ID: [8]byte{1, n}}, data: make([]byte, size), hole: make([]bool, size/4096), fail: map[vdi.Op]error{}}
		for i := range d.hole {
			d.hole[i] = true
		}
		s.disks[name] = d
	}
	return s
}

// snapshot makes what NAME is now NAME.TAG.
func (s *store) snapshot(name, tag string) {
	d := s.disks[name]
	d.mu.Lock()
	defer d.mu.Unlock()
	x := &disk{Disk: d.Disk, data: append([]byte(nil), d.data...), hole: append([]bool(nil), d.hole...), fail: map[vdi.Op]error{}}
	x.Tag, x.ReadOnly, x.ID = tag, true, [8]byte{2, d.ID[1]}
	s.disks[name+"."+tag] = x
}

func key(name, tag string) string {
	if tag != "" {
		return name + "." + tag
	}
	return name
}

func (s *store) List(context.Context) ([]Disk, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var list []Disk
	for _, d := range s.disks {
		list = append(list, d.Disk)
	}
	return list, nil
}

func (s *store) find(name, tag string) (*disk, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if d := s.disks[key(name, tag)]; d != nil && d.Name == name {
		return d, nil
	}
	return nil, fmt.Errorf("%q: %w", key(name, tag), vdi.ErrNotFound)
}

func (s *store) Find(name, tag string) (Disk, error) {
	d, err := s.find(name, tag)
	if err != nil {
		return Disk{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return d.Disk, nil
}

func (s *store) Open(_ context.Context, name, tag, _ string) (Volume, error) {
	d, err := s.find(name, tag)
	if err != nil {
		return nil, err
	}
	s.opens.Add(1)
	return &handle{disk: d, store: s}, nil
}

func (s *store) Changes() uint64 { return s.changes.Load() }
func (s *store) Lapses() uint64  { return s.lapses.Load() }
func (s *store) Group() uint16   { return 1 }
func (s *store) Paths(string, string) []Path {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.paths
}

func (s *store) Reservations(name, tag string) (string, uint64, error) {
	d, err := s.find(name, tag)
	if err != nil {
		return "", 0, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return d.text, d.revision, nil
}

func (s *store) Known(ctx context.Context) error {
	for _, settle := range s.others {
		settle(ctx)
	}
	return ctx.Err()
}

func (s *store) Life() uint64 { return 1 }

func (s *store) Lives(node string, life uint64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return life == 1 && !s.dead[node]
}

func (s *store) SetReservations(ctx context.Context, name, tag string, revision uint64, text string, fence bool) (uint64, error) {
	d, err := s.find(name, tag)
	if err != nil {
		return 0, err
	}
	s.mu.Lock()
	before := s.before
	s.before = nil
	s.mu.Unlock()
	if before != nil {
		before()
	}
	s.mu.Lock()
	if d.revision != revision {
		s.mu.Unlock()
		return 0, vdi.ErrStale
	}
	d.text, d.revision = text, d.revision+1
	if fence {
		s.fences.Add(1)
	}
	s.changes.Add(1)
	revision = d.revision
	s.mu.Unlock()
	if fence {
		err = s.Known(ctx)
	}
	return revision, err
}

func (s *store) Own(context.Context, string) error { return nil }

// handle is an open disk.
type handle struct {
	*disk
	store  *store
	closed atomic.Bool
}

func (h *handle) Size() int64 {
	h.mu.RLock()
	defer h.mu.RUnlock()
	return h.Disk.Size
}
func (h *handle) ReadOnly() bool { return h.Disk.ReadOnly }
func (h *handle) Kick()          {}
func (h *handle) Heard()         { h.heard.Add(1) }

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
	if r.Off < 0 || r.Len < 0 || r.Off+r.Len > int64(len(h.data)) {
		panic(fmt.Sprintf("request beyond the volume: %d+%d", r.Off, r.Len))
	}
	if h.store.taken.Load() && r.Check != nil && (r.Op == vdi.OpWrite || r.Op == vdi.OpZero || r.Op == vdi.OpDiscard) {
		if r.Err = r.Check(r); r.Err != nil {
			r.Done(r)
			return
		}
	}
	h.mu.RLock()
	hold := h.hold
	h.mu.RUnlock()
	if hold == nil {
		r.Err = h.do(r)
		r.Done(r)
		return
	}
	h.held.Add(1)
	go func() {
		<-hold
		h.held.Add(-1)
		r.Err = h.do(r)
		r.Done(r)
	}()
}

func (d *disk) do(r *vdi.Request) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.fail[r.Op]; err != nil {
		return err
	}
	if err := d.once[r.Op]; err != nil {
		delete(d.once, r.Op)
		return err
	}
	switch r.Op {
	case vdi.OpRead:
		copy(r.Data, d.data[r.Off:])
	case vdi.OpWrite:
		copy(d.data[r.Off:], r.Data)
		for i := r.Off / 4096; i*4096 < r.Off+r.Len; i++ {
			d.hole[i] = false
		}
	case vdi.OpZero, vdi.OpDiscard:
		clear(d.data[r.Off : r.Off+r.Len])
		for i := (r.Off + 4095) / 4096; (i+1)*4096 <= r.Off+r.Len; i++ {
			d.hole[i] = r.Flags&vdi.FlagNoHole == 0
		}
	case vdi.OpFlush:
		d.durable.Add(1)
	}
	if r.Flags&vdi.FlagFUA != 0 {
		d.durable.Add(1)
	}
	return nil
}

func (h *handle) Extents(_ context.Context, off, n int64, fn func(vdi.Extent) bool) error {
	h.mu.RLock()
	defer h.mu.RUnlock()
	for at := off; at < off+n; {
		end := min(off+n, (at/4096+1)*4096)
		if !fn(vdi.Extent{Off: at, Len: end - at, Hole: h.hole[at/4096], Zero: h.hole[at/4096]}) {
			break
		}
		at = end
	}
	return nil
}

func (h *handle) Update(_ context.Context, off, n int64, _ vdi.Flags, fn func([]byte) error) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	p := append([]byte(nil), h.data[off:off+n]...)
	if err := fn(p); err != nil {
		return err
	}
	copy(h.data[off:], p)
	return nil
}
