package replicas

import "slices"

// repairsTaken bounds the objects that a learner takes at a time, from all sources.
const repairsTaken = 32

// grant lets repairs of learners begin: first where clients wait for them, then where the
// fewest copies are left.
func (r *Replicas) grant() {
	for r.wanted.Load() > 0 {
		wanting := r.wanting()
		began := false
		for _, p := range wanting {
			limit, underway := int64(r.cfg.Repairs), r.repairs.Load()
			if !p.starved.Load() {
				if limit = r.pace.limit(r.now(), limit, r.burden(), p.copies.Load()); limit < int64(r.cfg.Repairs) {
					underway = r.burden()
				}
			}
			if underway >= limit {
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

// pass lets time pass for the pace of repairs.
func (r *Replicas) pass() {
	paced := r.burden() > 0 || r.wanted.Load() > 0
	if r.paced.Swap(paced) && !paced {
		r.pace.rest()
	}
	r.pace.tick(r.now(), r.clients.Load(), r.waiting.Load(), r.burden())
}

// burden is how much clients have beside them: objects on their way to learners, and
// learners that make durable what they were brought.
func (r *Replicas) burden() int64 { return r.repairs.Load() + r.settling.Load() }

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
