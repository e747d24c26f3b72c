package storage

import (
	"sync"
	"sync/atomic"
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
	free     int64            // as far as known, less what was promised since
	promised int64            // to what is under way, and to what the log has
	pending  map[uint32]int64 // the latter, by the segment with whose retirement it has its place
	asked    time.Time
	refused  int64 // what the last that asked for space did not get, in bytes; 0: it got it
	tight    bool  // see Store.Tight

	wanted atomic.Bool // somebody was told that there is no space who does not ask for the last of it
}

// spaceAge is how old the file system's answer may be before it is asked again: when
// space is plentiful, and when it is short.
const (
	spaceAge      = time.Second
	spaceAgeShort = 20 * time.Millisecond
)

func (s *space) init(fsys disk.FS, reserve int64) error {
	s.fs, s.pending = fsys, make(map[uint32]int64)
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
	s.free = int64(u.Free) - s.promised
	return nil
}

// take promises n bytes; false means that only the reserve is left. If the file system
// does not answer, what is known has to do: its failure shows soon enough. Every promise is
// given back, or kept by log.
func (s *space) take(n int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	short := s.free-n < s.reserve
	if age := time.Since(s.asked); age > spaceAge || short && age > spaceAgeShort {
		_ = s.ask()
		short = s.free-n < s.reserve
	}
	if short {
		s.refused = n
		return false
	}
	s.refused = 0
	s.promise(n)
	return true
}

// takeRare is take for what is rare and can do without: it does not make the disk a full one.
func (s *space) takeRare(n int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_ = s.ask()
	if s.free-n < s.reserve {
		return false
	}
	s.promise(n)
	return true
}

// promise is called with mu held.
func (s *space) promise(n int64) {
	s.free -= n
	s.promised += n
}

// give takes back a promise. A file may have some of it; see also placed.
func (s *space) give(n int64) {
	if n == 0 {
		return
	}
	s.mu.Lock()
	s.promised -= n
	s.asked = time.Time{} // only the file system knows how much of it is free
	s.mu.Unlock()
}

// placed ends a promise whose bytes have their place in a file by now: the file system counts them itself.
func (s *space) placed(n int64) {
	s.mu.Lock()
	s.promised -= n
	s.mu.Unlock()
}

// log has a promise kept until the log's segment is retired: a record there or before it needs it.
func (s *space) log(n int64, segment uint32) {
	if n == 0 {
		return
	}
	s.mu.Lock()
	s.pending[segment] += n
	s.mu.Unlock()
}

// replayed is log for what nobody has taken: it was in the log when that was opened.
func (s *space) replayed(n int64, segment uint32) {
	s.mu.Lock()
	s.promise(n)
	s.pending[segment] += n
	s.mu.Unlock()
}

// merged follows the checkpoint: what the segments before first had has its place in files.
func (s *space) merged(first uint32) {
	s.mu.Lock()
	for segment, n := range s.pending {
		if segment < first {
			s.promised -= n
			delete(s.pending, segment)
		}
	}
	s.asked = time.Time{}
	s.mu.Unlock()
}

// short reports whether less than the reserve is free beside what was promised.
func (s *space) short() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_ = s.ask()
	return s.free < s.reserve
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

// told reports whether who asked last was told that the disk is nearly full.
func (s *space) told() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.tight
}

func (s *space) usage() (total, free int64, full bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if time.Since(s.asked) > spaceAge {
		_ = s.ask()
	}
	return s.total, max(0, s.free), s.refused > 0 && s.free-s.refused < s.reserve
}
