package cluster

import (
	"context"
	"slices"
	"sync"

	"sheepdog/storage/object"
)

// memStore is a Store in memory: requests complete at Kick, as writes of the real one do.
type memStore struct {
	mu      sync.Mutex
	queue   []*object.Request
	objects map[object.Key]*memObject
	kicks   int
}

type memObject struct {
	data    []byte
	version object.Version
	shift   uint8
}

func newMemStore() *memStore { return &memStore{objects: map[object.Key]*memObject{}} }

func (s *memStore) Submit(r *object.Request) {
	s.mu.Lock()
	s.queue = append(s.queue, r)
	s.mu.Unlock()
}

func (s *memStore) Kick() {
	s.mu.Lock()
	queue := s.queue
	s.queue = nil
	s.kicks++
	for _, r := range queue {
		r.Err = s.do(r)
	}
	s.mu.Unlock()
	for _, r := range queue {
		r.Done(r)
	}
}

func (s *memStore) do(r *object.Request) error {
	o := s.objects[r.Key()]
	switch r.Op {
	case object.OpSync:
		return nil
	case object.OpRead:
		if o == nil {
			return object.ErrNotFound
		}
		copy(r.Data, o.data[r.Off:])
		return nil
	}
	if o == nil {
		o = &memObject{data: make([]byte, 1<<r.SizeShift), shift: r.SizeShift}
		s.objects[r.Key()] = o
	}
	o.version = r.Version
	if r.Op == object.OpWrite {
		copy(o.data[r.Off:], r.Data)
	} else {
		clear(o.data[r.Off : r.Off+r.Len])
	}
	return nil
}

func (s *memStore) Copy(_ context.Context, dst, src object.Key, shift uint8, v object.Version) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	o := s.objects[src]
	if o == nil {
		return object.ErrNotFound
	}
	if s.objects[dst] == nil {
		s.objects[dst] = &memObject{slices.Clone(o.data), v, shift}
	}
	return nil
}

func (s *memStore) Delete(_ context.Context, k object.Key) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.objects, k)
	return nil
}

func (s *memStore) Extents(_ context.Context, k object.Key, off, n uint32) ([]object.Extent, error) {
	if _, err := s.Stat(context.Background(), k); err != nil {
		return nil, err
	}
	return []object.Extent{{Off: off, Len: n}}, nil
}

func (s *memStore) Sums(_ context.Context, k object.Key) ([]uint64, error) {
	if _, err := s.Stat(context.Background(), k); err != nil {
		return nil, err
	}
	return []uint64{1}, nil
}

func (s *memStore) Stat(_ context.Context, k object.Key) (object.Info, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	o := s.objects[k]
	if o == nil {
		return object.Info{}, object.ErrNotFound
	}
	return object.Info{Key: k, SizeShift: o.shift, Version: o.version}, nil
}

func (s *memStore) List(_ context.Context, g object.Group, fn func(object.Info) error) error {
	s.mu.Lock()
	var list []object.Info
	for k, o := range s.objects {
		if k.Group == g {
			list = append(list, object.Info{Key: k, SizeShift: o.shift, Version: o.version})
		}
	}
	s.mu.Unlock()
	for _, i := range list {
		if err := fn(i); err != nil {
			return err
		}
	}
	return nil
}

func (s *memStore) Groups(context.Context) ([]object.Group, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var list []object.Group
	for k := range s.objects {
		if !slices.Contains(list, k.Group) {
			list = append(list, k.Group)
		}
	}
	return list, nil
}

func (s *memStore) Objects() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return int64(len(s.objects))
}

func (s *memStore) Tight(object.Group) bool                                { return false }
func (s *memStore) Failed(object.Group) bool                               { return false }
func (s *memStore) Abandon(object.Group) bool                              { return false }
func (s *memStore) Rotten() map[object.Key][]uint32                        { return nil }
func (s *memStore) Heal(context.Context, object.Key, uint32, []byte) error { return nil }
func (s *memStore) KeepMarks(map[object.Group]object.Version) error        { return nil }
func (s *memStore) Marks() map[object.Group]object.Version                 { return nil }
