package vdi

import (
	"slices"
	"sync"
)

// gate lets writes pass and holds them back. Each write passes the stripe of its object's
// index, shared with others; who must have no writes about, for one index (removing its
// object) or for all (taking a snapshot), closes stripes. Reads do not pass the gate.
//
// Within a stripe, a change of who owns an index (copy-on-write, a new object, a hole)
// has the index for itself: others that want to change it wait, and find it changed.
type gate struct {
	stripes [stripeCount]stripe
}

const stripeCount = 64

type stripe struct {
	mu      sync.Mutex
	changed sync.Cond
	passing int      // writes
	closed  bool     //
	closing int      // waiting to close: no new write passes, so that they need not wait for ever
	taken   []uint32 // indices whose owner is being changed
	_       [32]byte // stripes of one volume are used by many processors
}

func (g *gate) init() {
	for i := range g.stripes {
		g.stripes[i].changed.L = &g.stripes[i].mu
	}
}

func (g *gate) stripe(index uint32) *stripe { return &g.stripes[index%stripeCount] }

// tryPass enters if that needs no waiting.
func (s *stripe) tryPass() bool {
	s.mu.Lock()
	ok := !s.closed && s.closing == 0
	if ok {
		s.passing++
	}
	s.mu.Unlock()
	return ok
}

func (s *stripe) pass() {
	s.mu.Lock()
	for s.closed || s.closing > 0 {
		s.changed.Wait()
	}
	s.passing++
	s.mu.Unlock()
}

func (s *stripe) leave() {
	s.mu.Lock()
	s.passing--
	if s.passing == 0 && s.closing > 0 {
		s.changed.Broadcast()
	}
	s.mu.Unlock()
}

// take has an index for its holder, who is passing.
func (s *stripe) take(index uint32) {
	s.mu.Lock()
	for slices.Contains(s.taken, index) {
		s.changed.Wait()
	}
	s.taken = append(s.taken, index)
	s.mu.Unlock()
}

func (s *stripe) giveBack(index uint32) {
	s.mu.Lock()
	i := slices.Index(s.taken, index)
	s.taken = slices.Delete(s.taken, i, i+1)
	s.changed.Broadcast()
	s.mu.Unlock()
}

// close waits until no write is about, and lets none in.
func (s *stripe) close() {
	s.mu.Lock()
	s.closing++
	for s.closed || s.passing > 0 {
		s.changed.Wait()
	}
	s.closing--
	s.closed = true
	s.mu.Unlock()
}

func (s *stripe) open() {
	s.mu.Lock()
	s.closed = false
	s.changed.Broadcast()
	s.mu.Unlock()
}

// pause closes all stripes. Those who close more than one do so in the same order, so
// they cannot wait for each other in a circle.
func (g *gate) pause() {
	for i := range g.stripes {
		g.stripes[i].close()
	}
}

func (g *gate) resume() {
	for i := range g.stripes {
		g.stripes[i].open()
	}
}
