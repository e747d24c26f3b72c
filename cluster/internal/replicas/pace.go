package replicas

import (
	"slices"
	"sync"
	"time"

	"sheepdog/cluster/internal/replica"
)

// Clients go first. As long as this node has a part in requests of clients, it brings
// learners few objects at a time, and pauses between them; an object is not changed
// while it is brought, so that is not drawn out, but the next one waits. Without clients, or
// where they wait for a learner, it goes as fast as it can.

const (
	// paceShare is how many objects are under way in the mean when there are clients, of at
	// most paceMost; paceShareLast and paceMostLast if something has a single copy left.
	paceShare     = 0.5
	paceMost      = 1
	paceShareLast = 1
	paceMostLast  = 2
	// paceIdle is how long after the last request clients count as gone.
	paceIdle = replica.Time(300 * time.Millisecond)
	// paceSaved bounds the time that is saved up while nothing was to be brought.
	paceSaved = 100 * time.Millisecond
	// repairsTaken bounds the objects that a learner takes at a time, from all sources.
	repairsTaken = 32
)

// pace is the budget of a node that brings learners in sync.
type pace struct {
	mu     sync.Mutex
	seen   uint64       // requests of clients at the last tick
	active replica.Time // when there were some last; 0: never
	at     replica.Time // of the last tick
	last   bool         // something has a single copy left
	credit time.Duration
}

// tick lets time pass.
func (p *pace) tick(now replica.Time, clients uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if clients != p.seen {
		p.seen, p.active = clients, now
	}
	share := paceShare
	if p.last {
		share = paceShareLast
	}
	p.credit = min(p.credit+time.Duration(float64(now-p.at)*share), paceSaved)
	p.at = now
}

// spent counts the time that an object took.
func (p *pace) spent(d time.Duration) {
	p.mu.Lock()
	p.credit -= d
	p.mu.Unlock()
}

// limit is how many objects may be under way.
func (p *pace) limit(now replica.Time, most int64, fewest int32) int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.last = fewest <= 1
	switch {
	case p.active == 0 || now > p.active+paceIdle:
		return most
	case p.credit > 0 && p.last:
		return paceMostLast
	case p.credit > 0:
		return paceMost
	}
	return 0
}

// grant lets repairs of learners begin: first where clients wait for them, then where the
// fewest copies are left.
func (r *Replicas) grant() {
	for {
		wanting := r.wanting()
		began := false
		for _, p := range wanting {
			limit := int64(r.cfg.Repairs)
			if !p.starved.Load() {
				limit = r.pace.limit(r.now(), limit, p.copies.Load())
			}
			if r.repairs.Load() >= limit {
				return
			}
			if !p.granting.CompareAndSwap(false, true) {
				continue
			}
			before := p.wanted.Load()
			p.post(event{kind: evGrant})
			began = began || p.wanted.Load() < before
		}
		if !began {
			return
		}
	}
}

// wanting are the partitions with objects that wait to be brought to learners, in the
// order in which they get a turn.
func (r *Replicas) wanting() (list []*part) {
	for _, p := range r.all() {
		if p.wanted.Load() > 0 {
			list = append(list, p)
		}
	}
	rank := func(p *part) int {
		if p.starved.Load() {
			return 0
		}
		return int(p.copies.Load())
	}
	slices.SortStableFunc(list, func(a, b *part) int { return rank(a) - rank(b) })
	return list
}
