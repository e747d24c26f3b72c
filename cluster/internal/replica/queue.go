package replica

import (
	"cmp"
	"slices"

	"sheepdog/storage/object"
)

// objectQueue has the ops on one object in the order they came. An op runs when none
// before it overlaps with it, but for reads beside reads.
type objectQueue struct {
	id    object.ID
	first *Op
	last  *Op
}

func (o *Op) overlaps(p *Op) bool {
	if o.Read && p.Read {
		return false
	}
	if o.Whole || p.Whole {
		return true
	}
	return uint64(o.Off) < uint64(p.Off)+uint64(p.Len) && uint64(p.Off) < uint64(o.Off)+uint64(o.Len)
}

// enqueue puts op into its object's queue and reports whether it may run. A repair of a
// learner goes first: changes may be waiting for just that learner.
func (p *Partition) enqueue(op *Op) bool {
	q := p.objects[op.ID]
	if q == nil {
		q = p.newQueue(op.ID)
	}
	op.object, op.previous, op.next = q, q.last, nil
	switch {
	case q.last == nil:
		q.first, q.last = op, op
	case op.learner != nil:
		op.previous, op.next = nil, q.first
		q.first.previous, q.first = op, op
	default:
		q.last.next, q.last = op, op
	}
	return q.free(op)
}

func (p *Partition) newQueue(id object.ID) *objectQueue {
	var q *objectQueue
	if n := len(p.spare); n > 0 {
		q, p.spare = p.spare[n-1], p.spare[:n-1]
		*q = objectQueue{}
	} else {
		q = new(objectQueue)
	}
	q.id = id
	if p.objects == nil {
		p.objects = make(map[object.ID]*objectQueue)
	}
	p.objects[id] = q
	return q
}

// queues lists all queues in an order that does not depend on chance.
func (p *Partition) queues() []*objectQueue {
	all := make([]*objectQueue, 0, len(p.objects))
	for _, q := range p.objects {
		all = append(all, q)
	}
	slices.SortFunc(all, func(a, b *objectQueue) int { return cmp.Compare(a.id, b.id) })
	return all
}

// free reports whether nothing keeps op from running: of what came before it, and for a
// repair of what has begun.
func (q *objectQueue) free(op *Op) bool {
	if op.learner != nil {
		for o := op.next; o != nil; o = o.next {
			if o.state >= opRunning && o.overlaps(op) {
				return false
			}
		}
		return true
	}
	for b := op.previous; b != nil; b = b.previous {
		if b.overlaps(op) {
			return false
		}
	}
	return true
}

// dequeue takes op out of its object's queue and starts those that waited for it.
func (p *Partition) dequeue(now Time, op *Op) {
	q := op.object
	if op.previous == nil {
		q.first = op.next
	} else {
		op.previous.next = op.next
	}
	if op.next == nil {
		q.last = op.previous
	} else {
		op.next.previous = op.previous
	}
	op.object, op.previous, op.next = nil, nil, nil
	if q.first == nil {
		delete(p.objects, q.id)
		if len(p.spare) < maxSpare {
			p.spare = append(p.spare, q)
		}
		return
	}
	for o := q.first; o != nil; o = o.next {
		if o.state == opWaiting && o.overlaps(op) && q.free(o) {
			p.run(now, o)
		}
	}
}

// maxSpare bounds the queues kept for use again.
const maxSpare = 64

// link is an op's place in a list.
type link struct{ before, after *Op }

// opList is a list of ops, oldest first. An op is in one list at most.
type opList struct {
	front, back *Op
	n           int
}

func (l *opList) push(op *Op) {
	op.list, op.link = l, link{before: l.back}
	l.n++
	if l.back == nil {
		l.front = op
	} else {
		l.back.after = op
	}
	l.back = op
}

func (l *opList) any(is func(*Op) bool) bool {
	for op := l.front; op != nil; op = op.after {
		if is(op) {
			return true
		}
	}
	return false
}

// unlist takes op out of the list that it is in, if any.
func (op *Op) unlist() {
	l := op.list
	if l == nil {
		return
	}
	if op.before == nil {
		l.front = op.after
	} else {
		op.before.after = op.after
	}
	if op.after == nil {
		l.back = op.before
	} else {
		op.after.before = op.before
	}
	op.list, op.link = nil, link{}
	l.n--
}
