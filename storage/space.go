package storage

import (
	"sync"
	"time"

	"sheepdog/storage/disk"
	"sheepdog/storage/object"
)

// space keeps account of what the disk has free, so that a write that needs space
// fails before anything is changed, and what was answered always finds its place.
type space struct {
	fs      disk.FS
	reserve int64 // bytes

	mu       sync.Mutex
	total    int64
	free     int64    // as far as known, less what was promised since
	promised [2]int64 // to pending blocks: since the last rotation of the log, and before it
	asked    time.Time
	full     bool // the last that asked for space was refused
	tight    bool // see Store.Tight
}

// spaceAge is how old the file system's answer may be before it is asked again: when
// space is plentiful, and when it is short.
const (
	spaceAge      = time.Second
	spaceAgeShort = 20 * time.Millisecond
)

func (s *space) init(fsys disk.FS, reserve int64) error {
	s.fs = fsys
	if err := s.ask(); err != nil {
		return err
	}
	switch {
	case reserve == 0:
		s.reserve = min(s.total/64, maxReserve)
	case reserve > 0:
		s.reserve = reserve
	}
	return nil
}

func (s *space) ask() error {
	u, err := s.fs.Usage()
	if err != nil {
		return err
	}
	s.total, s.asked = int64(u.Total), time.Now()
	s.free = int64(u.Free) - s.promised[0] - s.promised[1]
	return nil
}

// take promises n bytes; false means that only the reserve is left. If the file system
// does not answer, what is known has to do: its failure shows soon enough.
func (s *space) take(n int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	short := s.free-n < s.reserve
	if age := time.Since(s.asked); age > spaceAge || short && age > spaceAgeShort {
		_ = s.ask()
		short = s.free-n < s.reserve
	}
	s.full = short
	if short {
		return false
	}
	s.free -= n
	s.promised[0] += n
	return true
}

// give takes back a promise.
func (s *space) give(n int64) {
	if n == 0 {
		return
	}
	s.mu.Lock()
	s.free += n
	s.promised[0] = max(0, s.promised[0]-n)
	s.mu.Unlock()
}

// rotated and merged follow the checkpoint: what was promised before the log's
// rotation has its place in files when the checkpoint is done.
func (s *space) rotated() {
	s.mu.Lock()
	s.promised[1] += s.promised[0]
	s.promised[0] = 0
	s.mu.Unlock()
}

func (s *space) merged() {
	s.mu.Lock()
	s.promised[1] = 0
	s.asked = time.Time{}
	s.mu.Unlock()
}

// Tight reports whether the disk of a group is nearly full: only so much is left above the
// reserve that what others have begun to write here, and what clients may write by then,
// still finds its place.
func (s *Store) Tight(g object.Group) bool {
	d := s.routes.find(g)
	return d.failed() == nil && d.space.nearlyFull()
}

// maxSlack bounds the space above the reserve in which a disk counts as nearly full, in
// bytes: more than can be under way at a time.
const maxSlack = 1 << 30

// nearlyFull has a hysteresis: who is told something twice a second shall not hear
// something else each time.
func (s *space) nearlyFull() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	slack := min(s.total/16, maxSlack)
	limit := s.reserve + slack
	if s.tight {
		limit += slack / 4
	}
	if age := time.Since(s.asked); age > spaceAge || s.free < limit+slack && age > spaceAgeShort {
		_ = s.ask()
	}
	s.tight = s.free < limit
	return s.tight
}

func (s *space) usage() (total, free int64, full bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if time.Since(s.asked) > spaceAge {
		_ = s.ask()
	}
	return s.total, max(0, s.free), s.full && s.free < s.reserve+blockSize
}
