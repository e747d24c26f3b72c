package gateway

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"

	"sheepdog/cluster/internal/replica"
	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// View is what the replicated state says about a partition.
type View struct {
	Epoch    state.Epoch
	ISR      []replica.Peer // the primary first
	Learners []replica.Peer
	// Restarted is the epoch in which the last member restarted last: what was answered
	// before and not made durable may be lost.
	Restarted state.Epoch
}

// Options of a Gateway. All are needed.
type Options struct {
	Retry   time.Duration // between attempts in one epoch
	Timeout time.Duration // of requests and flushes
}

// Request is a read or a change of a range of one object. The caller owns it but for the
// time between Submit and the effect Done.
type Request struct {
	Group object.Group
	ID    object.ID
	// Off and Len are the range rounded to whole blocks.
	Off, Len uint32
	Read     bool
	Whole    bool       // it concerns all of the object
	Durable  bool       // the change is durable when it is answered
	Volume   object.VID // whose flush covers the change
	// Err is the outcome: valid in Done.
	Err error

	Owner any // the caller's

	began   replica.Time
	sent    state.Epoch // epoch of the attempt under way; 0: none
	said    error       // what was answered to the last one
	doubt   state.Epoch // in which it may have been carried out first, without an answer that says so; 0: in none
	retryAt replica.Time
	part    *partition
	changes *queue // of the object, for changes
	waiting bool   // for its turn there
}

// Flush makes all that was answered for a volume durable.
type Flush struct {
	Volume object.VID
	All    bool // for all volumes instead
	// Err is the outcome: valid in Flushed.
	Err error

	Owner any // the caller's

	began replica.Time
	left  holdings
}

// EffectKind says what the caller shall do.
type EffectKind uint8

// Effects.
const (
	// Forward sends Request to the primary To under Epoch. Answered follows once; only
	// then nothing of the attempt can be carried out later than what is sent next.
	Forward EffectKind = iota
	// Done gives Request back.
	Done
	// Sync has To make everything durable: Synced.
	Sync
	// Flushed gives Flush back.
	Flushed
)

// Effect is something that the caller shall do.
type Effect struct {
	Kind    EffectKind
	To      replica.Peer
	Epoch   state.Epoch
	Request *Request
	Flush   *Flush
}

// Gateway is the part of a node that serves clients. Its methods are called by one
// goroutine at a time; after each, Effects has what is to be done.
type Gateway struct {
	opt     Options
	parts   map[object.Group]*partition
	volumes map[object.VID]*holdings
	objects map[objectKey]*queue
	flushes []*Flush
	open    int // requests that were submitted and not given back
	syncs   map[replica.Peer]*syncing
	effects []Effect
}

type objectKey struct {
	group object.Group
	id    object.ID
}

// partition is a partition and the requests for it.
type partition struct {
	view     View
	requests []*Request
}

// New returns a gateway that knows of no partition yet.
func New(o Options) *Gateway {
	return &Gateway{
		opt: o, parts: map[object.Group]*partition{}, volumes: map[object.VID]*holdings{},
		objects: map[objectKey]*queue{}, syncs: map[replica.Peer]*syncing{},
	}
}

// Effects returns what is to be done, in this order, since the last call. It is valid
// until the next call of any method.
func (g *Gateway) Effects() []Effect {
	e := g.effects
	g.effects = g.effects[:0]
	return e
}

func (g *Gateway) emit(e Effect) { g.effects = append(g.effects, e) }

func (g *Gateway) part(group object.Group) *partition {
	p := g.parts[group]
	if p == nil {
		p = &partition{}
		g.parts[group] = p
	}
	return p
}

// SetView says what has become of a partition. Older views change nothing.
func (g *Gateway) SetView(now replica.Time, group object.Group, v View) {
	p := g.part(group)
	if v.Epoch <= p.view.Epoch {
		return
	}
	p.view = v
	for _, r := range slices.Clone(p.requests) {
		if !r.waiting && r.sent == 0 {
			g.forward(r)
		}
	}
	g.progress(now)
}

// Submit starts a request.
func (g *Gateway) Submit(now replica.Time, r *Request) {
	r.Err, r.began, r.sent, r.said, r.doubt, r.retryAt, r.waiting, r.changes = nil, now, 0, nil, 0, 0, false, nil
	r.part = g.part(r.Group)
	r.part.requests = append(r.part.requests, r)
	g.open++
	if !r.Read && !g.enqueue(r) {
		r.waiting = true
		return
	}
	g.forward(r)
}

// Changing reports whether a change of the range of an object is under way or waits. Who
// alone changes a volume may read elsewhere than at the primary what is not changing.
func (g *Gateway) Changing(group object.Group, id object.ID, off, length uint32) bool {
	q := g.objects[objectKey{group, id}]
	if q == nil {
		return false
	}
	r := Request{Off: off, Len: length}
	return slices.ContainsFunc(q.changes, r.overlaps)
}

// forward begins an attempt, if it is known where.
func (g *Gateway) forward(r *Request) {
	v := &r.part.view
	if v.Epoch == 0 {
		return
	}
	r.sent, r.retryAt = v.Epoch, 0
	g.emit(Effect{Kind: Forward, To: v.ISR[0], Epoch: v.Epoch, Request: r})
}

// Answered says how an attempt has ended. Holders are who may hold the change. The error
// replica.ErrRetry, and that of a lost connection, which the caller turns into it, let
// the request be sent again. Unless it is replica.ErrUnsent as well the attempt may have been carried out.
func (g *Gateway) Answered(now replica.Time, r *Request, holders []replica.Peer, err error) {
	epoch := r.sent
	r.sent, r.said = 0, err
	if err != nil && !r.Read && r.doubt == 0 && errors.Is(err, replica.ErrRetry) && !errors.Is(err, replica.ErrUnsent) {
		r.doubt = epoch
	}
	switch {
	case errors.Is(err, replica.ErrRetry) && now >= r.began+replica.Time(g.opt.Timeout):
		g.finish(r, unavailable(r))
	case errors.Is(err, replica.ErrRetry) && r.part.view.Epoch > epoch:
		g.forward(r)
	case errors.Is(err, replica.ErrRetry):
		r.retryAt = now + replica.Time(g.opt.Retry)
	default:
		if err == nil && !r.Read && !r.Durable {
			g.hold(holding{volume: r.Volume, group: r.Group, epoch: epoch, peers: holders})
		}
		g.finish(r, err)
	}
}

// unavailable says whom the request has waited for, and why in vain.
func unavailable(r *Request) error {
	v := &r.part.view
	switch {
	case v.Epoch == 0:
		return fmt.Errorf("%w: nobody has served partition %s in time: this node does not know who holds it", object.ErrUnavailable, r.Group)
	case r.waiting:
		return fmt.Errorf("%w: nobody has served partition %s in time: an earlier change of the same blocks is still under way", object.ErrUnavailable, r.Group)
	}
	// Not wrapped: whoever looks for the kind of the last answer shall not find it here.
	return fmt.Errorf("%w: nobody has served partition %s in time: node %d, its primary in epoch %d, said last: %v", object.ErrUnavailable, r.Group, v.ISR[0].Node, v.Epoch, r.said)
}

// finish gives a request back and begins those that waited for it.
func (g *Gateway) finish(r *Request, err error) {
	p := r.part
	p.requests = slices.DeleteFunc(p.requests, func(q *Request) bool { return q == r })
	g.open--
	if err != nil && r.doubt != 0 {
		g.holdDoubtful(r)
	}
	r.Err, r.part = err, nil
	g.emit(Effect{Kind: Done, Request: r})
	if r.changes != nil {
		g.dequeue(r)
	}
}

// Tick lets time pass.
func (g *Gateway) Tick(now replica.Time) {
	for _, group := range g.groups() {
		for _, r := range slices.Clone(g.parts[group].requests) {
			switch {
			case r.sent != 0 || r.part == nil: // under way, or ended by now
			case now >= r.began+replica.Time(g.opt.Timeout):
				g.finish(r, unavailable(r))
			case !r.waiting && r.retryAt != 0 && now >= r.retryAt:
				g.forward(r)
			}
		}
	}
	g.tickFlushes(now)
}

// Idle reports whether Tick has nothing to do before another event comes.
func (g *Gateway) Idle() bool {
	return len(g.flushes) == 0 && g.open == 0
}

func (g *Gateway) groups() []object.Group {
	list := make([]object.Group, 0, len(g.parts))
	for k, p := range g.parts {
		if len(p.requests) > 0 {
			list = append(list, k)
		}
	}
	slices.SortFunc(list, func(a, b object.Group) int {
		return cmp.Or(cmp.Compare(a.Policy, b.Policy), cmp.Compare(a.Partition, b.Partition))
	})
	return list
}

// queue has the changes of one object in the order they came.
type queue struct{ changes []*Request }

func (r *Request) overlaps(q *Request) bool {
	return r.Whole || q.Whole || uint64(r.Off) < uint64(q.Off)+uint64(q.Len) && uint64(q.Off) < uint64(r.Off)+uint64(r.Len)
}

// enqueue notes a change and reports whether it may be sent.
func (g *Gateway) enqueue(r *Request) bool {
	key := objectKey{r.Group, r.ID}
	q := g.objects[key]
	if q == nil {
		q = new(queue)
		g.objects[key] = q
	}
	r.changes = q
	q.changes = append(q.changes, r)
	return q.first(r)
}

// first reports whether no change that came before r overlaps with it.
func (q *queue) first(r *Request) bool {
	for _, c := range q.changes {
		if c == r {
			return true
		}
		if c.overlaps(r) {
			return false
		}
	}
	return true
}

func (g *Gateway) dequeue(r *Request) {
	q := r.changes
	r.changes = nil
	q.changes = slices.DeleteFunc(q.changes, func(c *Request) bool { return c == r })
	if len(q.changes) == 0 {
		delete(g.objects, objectKey{r.Group, r.ID})
		return
	}
	for _, c := range q.changes {
		if c.waiting && c.overlaps(r) && q.first(c) {
			c.waiting = false
			g.forward(c)
		}
	}
}
