package replicas

import (
	"errors"
	"slices"
	"sync"
	"time"

	"sheepdog/cluster/internal/replica"
	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// recovery measures what this node, as a primary, brings to learners.
type recovery struct {
	mu    sync.Mutex
	nodes map[replica.Peer]*brought
}

// brought is what one node was brought since its recovery began.
type brought struct {
	began      replica.Time
	seen       replica.Time // when the node last learned something, as far as known
	objects    uint64
	bytes      uint64
	partitions uint64 // that are in sync now
	rate       rate
	failure    error // of what was tried since the node last made durable what it had; nil: none
}

// rate is what came to pass lately: a mean in which an older second counts less.
type rate struct {
	at    replica.Time
	bytes float64 // since at
	value float64 // bytes per second
}

// rateStep is how long a rate collects before it is counted.
const rateStep = replica.Time(time.Second)

func (r *rate) add(now replica.Time, bytes float64) {
	if r.bytes += bytes; now < r.at+rateStep {
		return
	}
	const weight = 0.3 // of the last step
	v := r.bytes / time.Duration(now-r.at).Seconds()
	if r.value == 0 {
		r.value = v
	} else {
		r.value += weight * (v - r.value)
	}
	r.at, r.bytes = now, 0
}

// brought notes an object that a learner was brought, and what of it was not equal.
func (r *recovery) brought(now replica.Time, to replica.Peer, bytes uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	b := r.of(now, to)
	b.objects++
	b.bytes += bytes
	b.rate.add(now, float64(bytes))
}

// tried notes how something has ended that brings a learner in sync. done: it was the last step of
// a partition. What is of another epoch, or waits for room or space, is no failure: it is tried again.
func (r *recovery) tried(now replica.Time, to replica.Peer, done bool, err error) {
	if err == nil && !done || errors.Is(err, replica.ErrEpoch) || errors.Is(err, replica.ErrBusy) || errors.Is(err, object.ErrNoSpace) {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	b := r.of(now, to)
	if b.failure = err; err == nil {
		b.partitions++
	}
}

// forgetAfter is for how long a recovery counts as the same one although the node learns nothing:
// partitions get learners some at a time.
const forgetAfter = replica.Time(10 * time.Second)

func (r *recovery) of(now replica.Time, to replica.Peer) *brought {
	b := r.nodes[to]
	if b == nil || now > b.seen+forgetAfter {
		if r.nodes == nil {
			r.nodes = map[replica.Peer]*brought{}
		}
		b = &brought{began: now, rate: rate{at: now}}
		r.nodes[to] = b
	}
	b.seen = now
	return b
}

// Recovering says how far this node, as a primary, has brought another one.
type Recovering struct {
	Node       state.NodeID
	Partitions int  // that the node learns from this one
	Unlisted   int  // of which it is not known yet what is to be done
	Objects    int  // to be looked at
	NoSpace    bool // partitions wait until the node has space
	Since      time.Duration
	Done       uint64  // objects
	InSync     uint64  // partitions that were brought in sync
	DoneBytes  uint64  // that were not equal
	Rate       float64 // bytes per second, lately
	Failure    error   // of what was tried since a partition was last completed; nil: none
}

// Recovery tells it of all nodes that learn from this one, by their numbers.
func (r *Replicas) Recovery() []Recovering {
	now := r.now()
	nodes := map[replica.Peer]*Recovering{}
	for _, p := range r.all() {
		list := p.learning.Load()
		if list == nil {
			continue
		}
		for _, l := range *list {
			n := nodes[l.Peer]
			if n == nil {
				n = &Recovering{Node: l.Node}
				nodes[l.Peer] = n
			}
			n.Partitions++
			n.Objects += l.Left
			n.NoSpace = n.NoSpace || l.NoSpace
			if !l.Listed {
				n.Unlisted++
			}
		}
	}
	r.recovery.mu.Lock()
	defer r.recovery.mu.Unlock()
	for m, b := range r.recovery.nodes {
		if nodes[m] == nil && now > b.seen+forgetAfter {
			delete(r.recovery.nodes, m)
		}
	}
	var list []Recovering
	for m, n := range nodes {
		b := r.recovery.of(now, m)
		b.rate.add(now, 0)
		n.InSync = b.partitions
		n.Since, n.Done, n.DoneBytes, n.Rate = time.Duration(now-b.began), b.objects, b.bytes, b.rate.value
		n.Failure = b.failure
		list = append(list, *n)
	}
	slices.SortFunc(list, func(a, b Recovering) int { return int(a.Node) - int(b.Node) })
	return list
}
