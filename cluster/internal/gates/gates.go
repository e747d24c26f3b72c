// Package gates is the way of clients' requests out of a node: it carries out what package
// gateway decides, with the node's own replicas and the connections to other nodes that
// these have.
//
// The volumes are divided among some gates, each with a mailbox, so that those of
// different volumes seldom wait for each other. A volume always has the same gate, which
// knows its changes under way.
package gates

import (
	"errors"
	"sync"
	"time"

	"sheepdog/cluster/internal/gateway"
	"sheepdog/cluster/internal/replica"
	"sheepdog/cluster/internal/replicas"
	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// Config is what Gates work with. All is needed.
type Config struct {
	// Replicas are this node's, in its present life.
	Replicas func() *replicas.Replicas
	// View is what Replicas were told of the cluster's state last.
	View func() *state.View
	// Fence is that of replicas.Config.
	Fence func(vid object.VID, generation uint64) error
	// Now is the time on a clock that begins anywhere.
	Now func() replica.Time
	// KickSoon has Replicas.Kick called soon, but not within.
	KickSoon func()

	Retry   time.Duration // between attempts of a request in one epoch
	Timeout time.Duration // how long requests wait for somebody who can serve them
}

// count is into how many a node's volumes are divided.
const count = 8

// Gates bring requests of a node's clients to primaries. Their methods may be called
// from any goroutine.
type Gates struct {
	cfg  Config
	list [count]*gate
}

// New returns gates that know of no partition yet.
func New(c Config) *Gates {
	g := &Gates{cfg: c}
	for i := range g.list {
		g.list[i] = newGate(&g.cfg)
	}
	return g
}

// of is the gate of a volume.
func (g *Gates) of(vid object.VID) *gate { return g.list[uint32(vid)*2654435761>>16%count] }

// Submit starts a read or a change of a client, whose Partition is set and whose range is
// within the object. It may be held back until Replicas.Kick.
func (g *Gates) Submit(r *object.Request) { g.of(r.Volume).submit(r) }

// Do starts a task, whose Group and ID are set, and calls done with its outcome, which
// must not wait. It may be held back until Replicas.Kick.
func (g *Gates) Do(t replicas.Task, done func(*replicas.Task, error)) {
	j := &job{done: func(j *job) { done(&j.fwd.Task, j.req.Err) }}
	j.fwd.Task = t
	g.of(t.Volume).begin(j)
}

// Flush makes durable what was answered for a volume through these gates, for volume 0
// what was answered at all, and calls done with the outcome, which must not wait. It may
// be held back until Replicas.Kick.
func (g *Gates) Flush(vid object.VID, done func(error)) {
	if vid != 0 {
		g.of(vid).flush(gateway.Flush{Volume: vid}, done)
		return
	}
	var (
		mu   sync.Mutex
		left = len(g.list)
		all  error
	)
	for _, one := range g.list {
		one.flush(gateway.Flush{All: true}, func(err error) {
			mu.Lock()
			all = errors.Join(all, err)
			left--
			last := left == 0
			mu.Unlock()
			if last {
				done(all)
			}
		})
	}
}

func (g *gate) flush(f gateway.Flush, done func(error)) {
	w := &flushing{Flush: f, done: done}
	w.Owner = w
	g.post(gateEvent{kind: gateFlush, batch: true, flush: w})
}

// Serving reports whether clients have asked for something lately.
func (g *Gates) Serving() bool {
	now := g.cfg.Now()
	for _, one := range g.list {
		if at := replica.Time(one.used.Load()); at != 0 && now-at < replica.Time(lately) {
			return true
		}
	}
	return false
}

// lately is how long ago the last request of a client may be who is still there.
const lately = 10 * time.Second

// Moved says that View has changed.
func (g *Gates) Moved() {
	for _, one := range g.list {
		one.post(gateEvent{kind: gateViews})
	}
}

// Tick lets time pass. It is called several times in Config.Retry, or about as often.
func (g *Gates) Tick() {
	for _, one := range g.list {
		if !one.idle.Load() {
			one.post(gateEvent{kind: gateTick})
		}
	}
}
