package vditest

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"sheepdog/storage/object"
	"sheepdog/vdi"
	"sheepdog/vdi/catalog"
)

// Cluster is several gateways that serve the same VDIs: the same objects, and a log that
// each applies to a catalog of its own, later than others or sooner.
type Cluster struct {
	Objects *Objects
	// Delay is the longest time that a message to or from the objects takes, Lag the longest
	// until a gateway applies the next command, Lease the time after which a stopped gateway is
	// waited for no more. Set them before Gateway.
	Delay, Lag, Lease time.Duration
	// Rough has one of 10 messages and commands take up to 20 times as long.
	Rough bool
	// SlowMaps has what is written to maps arrive up to 20 times as late.
	SlowMaps bool
	Config   func(*vdi.Config) // changes the configuration of services, if set

	t        testing.TB
	mu       sync.Mutex
	moved    *sync.Cond // something changed: the log, or a gateway
	rng      *rand.Rand
	log      []entry
	gateways map[string]*Gateway
	starts   uint64
	ended    bool
}

type entry struct {
	command []byte
	by      *Gateway
	result  []byte // once applied by that
}

// Gateway is one of them. Its service does not run.
type Gateway struct {
	*vdi.Service
	Name    string
	Catalog *catalog.Machine

	cluster     *Cluster
	incarnation uint64
	// Guarded by Cluster.mu.
	applied int
	stopped time.Time // zero: it is not
	killed  bool
	behind  bool // it applies nothing
	expired bool // somebody has not waited for it
}

// NewCluster returns a cluster without gateways, whose chances come from the seed.
func NewCluster(t testing.TB, seed uint64) *Cluster {
	c := &Cluster{
		Objects: NewObjects(), Delay: 100 * time.Microsecond, Lag: 500 * time.Microsecond, Lease: 5 * time.Millisecond,
		t: t, rng: rand.New(rand.NewPCG(seed, 77)), gateways: map[string]*Gateway{},
	}
	c.moved = sync.NewCond(&c.mu)
	t.Cleanup(func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.ended = true
		c.moved.Broadcast()
	})
	return c
}

// Gateway starts a gateway of that name, in place of one that was killed.
func (c *Cluster) Gateway(name string) *Gateway {
	c.t.Helper()
	c.mu.Lock()
	c.starts++
	incarnation := c.starts
	g := &Gateway{Name: name, Catalog: catalog.New(), cluster: c, incarnation: incarnation}
	c.gateways[name] = g
	c.mu.Unlock()
	cfg := vdi.Config{
		Objects: &path{g}, Log: g, Catalog: g.Catalog, Node: name, Incarnation: func() uint64 { return incarnation },
		DefaultPolicy: func() object.PolicyID { return Policy },
		PolicyOf:      policyOf, CopiesOf: copiesOf, Policies: allPolicies,
		Lost:    func(object.PolicyID) uint64 { return c.Objects.Restarts() },
		Settled: c.settled, Leased: g.leased, Known: g.known, Up: c.up,
	}
	if c.Config != nil {
		c.Config(&cfg)
	}
	s, err := vdi.NewService(cfg)
	if err != nil {
		c.t.Fatal(err)
	}
	g.Service = s
	go g.apply()
	g.CatchUp()
	return g
}

// Crash cuts the power of the objects, see Objects.Crash, after all gateways were killed.
func (c *Cluster) Crash(keep float64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.Objects = c.Objects.Crash(c.rng, keep)
}

// Cut has some of who keeps the objects lose its power and come back while the gateways go on, or all of them: see Objects.RestartSome.
func (c *Cluster) Cut(keep float64, some bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	which := object.ID(c.rng.IntN(holders))
	c.Objects.RestartSome(c.rng, keep, func(p object.PolicyID, id object.ID) bool {
		return !some || (id^id>>32+object.ID(p))%holders == which
	})
}

// holders is how many keep the objects, each some of them.
const holders = 3

// Stop stops the gateway as SIGSTOP does; what it has sent arrives nevertheless.
func (g *Gateway) Stop() { g.set(func() { g.stopped = time.Now() }) }

// Continue lets it go on.
func (g *Gateway) Continue() { g.set(func() { g.stopped = time.Time{} }) }

// Kill ends it; what it has sent arrives nevertheless. Its calls fail with ErrClosed.
func (g *Gateway) Kill() { g.set(func() { g.killed = true }) }

// Behind has it apply none of the commands to come, or, when it is over, all of them. It serves clients meanwhile.
func (g *Gateway) Behind(is bool) { g.set(func() { g.behind = is }) }

// Killed reports whether it was killed.
func (g *Gateway) Killed() bool {
	g.cluster.mu.Lock()
	defer g.cluster.mu.Unlock()
	return g.killed
}

func (g *Gateway) set(f func()) {
	g.cluster.mu.Lock()
	defer g.cluster.mu.Unlock()
	f()
	g.cluster.moved.Broadcast()
}

// CatchUp returns when the gateway has applied what is in the log.
func (g *Gateway) CatchUp() {
	c := g.cluster
	c.mu.Lock()
	defer c.mu.Unlock()
	for n := len(c.log); g.applied < n && !g.killed && !c.ended; {
		c.moved.Wait()
	}
}

// running returns when the gateway is not stopped, or an error if it is killed.
func (g *Gateway) running() error {
	c := g.cluster
	c.mu.Lock()
	defer c.mu.Unlock()
	for !g.stopped.IsZero() && !g.killed && !c.ended {
		c.moved.Wait()
	}
	if g.killed || c.ended {
		return fmt.Errorf("gateway %s was killed: %w", g.Name, object.ErrClosed)
	}
	return nil
}

func (c *Cluster) pause(most time.Duration) {
	if most <= 0 {
		return
	}
	c.mu.Lock()
	d := time.Duration(c.rng.Int64N(int64(most)))
	often := c.rng.IntN(3) > 0
	if c.Rough && c.rng.IntN(10) == 0 {
		d *= 20
	}
	c.mu.Unlock()
	if often {
		time.Sleep(d)
	}
}

// apply applies the log.
func (g *Gateway) apply() {
	c := g.cluster
	for {
		c.mu.Lock()
		for (g.behind || g.applied == len(c.log)) && !g.killed && !c.ended {
			c.moved.Wait()
		}
		c.mu.Unlock()
		c.pause(c.Lag)
		if g.running() != nil {
			return
		}
		c.mu.Lock()
		e := &c.log[g.applied]
		command, mine := e.command, e.by == g
		c.mu.Unlock()
		result := g.Catalog.Apply(command)
		c.mu.Lock()
		if mine {
			c.log[g.applied].result = result
		}
		g.applied++
		c.moved.Broadcast()
		c.mu.Unlock()
	}
}

// Propose implements vdi.Log.
func (g *Gateway) Propose(ctx context.Context, _ string, command []byte) ([]byte, error) {
	if err := g.running(); err != nil {
		return nil, err
	}
	c := g.cluster
	c.pause(c.Delay)
	c.mu.Lock()
	n := len(c.log)
	c.log = append(c.log, entry{command: command, by: g})
	c.moved.Broadcast()
	for c.log[n].result == nil && !g.killed && !c.ended {
		c.moved.Wait()
	}
	result := c.log[n].result
	c.mu.Unlock()
	if err := g.running(); err != nil {
		return nil, err
	}
	return result, ctx.Err()
}

// settled implements vdi.Config.Settled: a gateway that is killed answers nothing, and one
// that is stopped loses its lease after a while.
func (c *Cluster) settled(_ context.Context, previous catalog.Node, vid object.VID, generation uint64) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		g := c.gateways[previous.Name]
		if g == nil || g.killed || c.ended {
			return nil
		}
		if g.Catalog.Generation(vid) >= generation {
			return nil
		}
		if !g.stopped.IsZero() && time.Since(g.stopped) > c.Lease {
			g.expired = true
			return nil
		}
		c.mu.Unlock()
		time.Sleep(50 * time.Microsecond)
		c.mu.Lock()
	}
}

// known implements vdi.Config.Known.
func (g *Gateway) known(context.Context) error {
	c := g.cluster
	c.mu.Lock()
	defer c.mu.Unlock()
	applied := g.applied
	for _, name := range slices.Sorted(maps.Keys(c.gateways)) {
		for {
			o := c.gateways[name]
			if o.killed || o.applied >= applied || c.ended {
				break
			}
			if !o.stopped.IsZero() && time.Since(o.stopped) > c.Lease {
				o.expired = true
				break
			}
			c.mu.Unlock()
			time.Sleep(50 * time.Microsecond)
			c.mu.Lock()
		}
	}
	return nil
}

// up implements vdi.Config.Up.
func (c *Cluster) up(n catalog.Node) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	g := c.gateways[n.Name]
	return g != nil && !g.killed && g.incarnation == n.Incarnation
}

// leased implements vdi.Config.Leased: a lease comes back with the newest catalog. The
// gateway may be stopped between looking and acting.
func (g *Gateway) leased() bool {
	c := g.cluster
	c.mu.Lock()
	if g.expired && g.stopped.IsZero() && g.applied == len(c.log) {
		g.expired = false
	}
	ok := !g.expired
	c.mu.Unlock()
	return ok && g.running() == nil
}

// id is by whom changes were made: who starts anew does not know what it had made before.
func (g *Gateway) id() string { return fmt.Sprintf("%s %d", g.Name, g.incarnation) }

// path is a gateway's way to the objects: messages take their time, and pass each other.
type path struct{ g *Gateway }

// carry calls f, with an error of its own if the gateway does not see the answer.
func (p *path) carry(f func(*Objects) error) error {
	if err := p.g.running(); err != nil {
		return err
	}
	c := p.g.cluster
	c.pause(c.Delay)
	err := f(p.objects())
	c.pause(c.Delay)
	if dead := p.g.running(); dead != nil {
		return dead
	}
	return err
}

// Submit implements vdi.Objects.
func (p *path) Submit(r *object.Request) {
	go func() {
		if kind, _ := r.ID.Kind(); r.Op == object.OpWrite && kind == object.KindMap && p.g.cluster.SlowMaps {
			p.g.cluster.pause(20 * p.g.cluster.Delay)
		}
		if r.Op == object.OpSync {
			r.Complete(p.sync(r))
			return
		}
		if r.Op == object.OpRead {
			r.Complete(p.carry(func(o *Objects) error { return o.read(r) }))
			return
		}
		write := func(o *Objects) error { return o.write(r, p.g.id()) }
		if r.Flags&object.FlagFUA != 0 {
			r.Complete(p.carry(write))
			return
		}
		r.Complete(p.change(r.Volume, write))
	}()
}

// change is carry for what changes something, and is not durable by itself.
func (p *path) change(volume object.VID, f func(*Objects) error) error {
	var at *Objects
	var restarts uint64
	err := p.carry(func(o *Objects) error {
		at, restarts = o, o.Restarts()
		return f(o)
	})
	if err == nil {
		at.answered(volume, p.g.id(), restarts)
	}
	return err
}

// sync covers what was answered before it was asked for.
func (p *path) sync(r *object.Request) error {
	var at *Objects
	t := p.objects().ticket()
	err := p.carry(func(o *Objects) error { at = o; return o.sync(r, t, p.g.id()) })
	if err != nil {
		return err
	}
	return at.tell(r, t, p.g.id())
}

func (p *path) objects() *Objects {
	c := p.g.cluster
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.Objects
}

// Kick implements vdi.Objects.
func (p *path) Kick() { /* nothing is held back */ }

// Copy implements vdi.Objects.
func (p *path) Copy(_ context.Context, r object.CopyRequest) error {
	return p.change(r.Volume, func(o *Objects) error { return o.copy(r, p.g.id()) })
}

// Delete implements vdi.Objects.
func (p *path) Delete(_ context.Context, r object.DeleteRequest) error {
	return p.change(r.Volume, func(o *Objects) error { return o.delete(r, p.g.id()) })
}

// Extents implements vdi.Objects.
func (p *path) Extents(ctx context.Context, policy object.PolicyID, id object.ID, off, n uint32) (list []object.Extent, err error) {
	err = p.carry(func(o *Objects) error { list, err = o.Extents(ctx, policy, id, off, n); return err })
	return list, err
}

// Sums implements vdi.Objects.
func (p *path) Sums(ctx context.Context, policy object.PolicyID, id object.ID) (sums []uint64, err error) {
	err = p.carry(func(o *Objects) error { sums, err = o.Sums(ctx, policy, id); return err })
	return sums, err
}

// Stat implements vdi.Objects.
func (p *path) Stat(ctx context.Context, policy object.PolicyID, id object.ID) (i object.Info, err error) {
	err = p.carry(func(o *Objects) error { i, err = o.Stat(ctx, policy, id); return err })
	return i, err
}

// List implements vdi.Objects.
func (p *path) List(ctx context.Context, policy object.PolicyID, fn func(object.Info) error) error {
	return p.carry(func(o *Objects) error { return o.List(ctx, policy, fn) })
}
