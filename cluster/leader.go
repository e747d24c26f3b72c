package cluster

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"sheepdog/cluster/internal/consensus"
	"sheepdog/cluster/internal/peer"
	"sheepdog/cluster/internal/steward"
	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// leader is what a node does for the cluster while it leads: it carries out what package
// steward decides.
type leader struct {
	f    *flock
	wake chan struct{}

	mu       sync.Mutex
	facts    steward.Facts
	start    []*starting
	steward  *steward.Steward
	reign    consensus.Reign
	reigning bool // this node leads in reign, and has applied all that was decided before

	questions uint64 // that this node has asked itself; of the goroutine that does
}

// starting is a node that has announced itself and waits for its incarnation.
type starting struct {
	steward.Announcement
	done chan error // buffered
	life state.Life // if done is nil
}

func (l *leader) init(f *flock) { l.f, l.wake = f, make(chan struct{}, 1) }

// connection is told of connections to other nodes. A refused one says that the process
// is gone: so it need not be waited for.
func (l *leader) connection(e peer.Event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case e.Incoming:
		signal(l.wake) // it may be gone
	case e.Up:
		l.facts.Connected(e.Node)
	case gone(e.Err):
		l.facts.Refused(e.Node, time.Now())
		signal(l.wake)
	}
}

// announce takes a node that has started, and waits for its incarnation.
func (l *leader) announce(ctx context.Context, a state.Announce) (state.Life, error) {
	s := &starting{Announcement: steward.Announcement{Announce: a, Came: time.Now()}, done: make(chan error, 1)}
	l.mu.Lock()
	l.start = append(l.start, s)
	l.mu.Unlock()
	signal(l.wake)
	select {
	case err := <-s.done:
		return s.life, err
	case <-ctx.Done():
		l.mu.Lock()
		l.start = slices.DeleteFunc(l.start, func(o *starting) bool { return o == s })
		l.mu.Unlock()
		return state.Life{}, ctx.Err()
	}
}

const (
	leadEvery      = 100 * time.Millisecond
	reconcileEvery = 500 * time.Millisecond
	// maxSteps bounds how many changes of who votes go together: the leader has other things to do.
	maxSteps = 4
	// paused is how long the leader may take between two looks before it counts as having
	// been stopped itself.
	paused = 500 * time.Millisecond
	// silenceMargin is what the silence of a node must exceed the leases by before it is down.
	silenceMargin = 300 * time.Millisecond
	gather        = 300 * time.Millisecond
	settleFor     = 500 * time.Millisecond
	// movesAtATime is how many partitions begin a new epoch at once because they get other
	// targets or learners: see leaveAtATime.
	movesAtATime = 128
)

// run does the leader's work whenever this node leads.
func (l *leader) run(ctx context.Context, log *consensus.Log) {
	l.mu.Lock()
	l.steward = steward.New(steward.Options{
		Self: l.f.n.cfg.Name, Lease: l.f.n.cfg.Network.Lease, LeaderLease: log.LeaderLease(), Margin: silenceMargin,
		Gather: gather, Settle: settleFor, Moves: movesAtATime,
	})
	l.mu.Unlock()
	t := time.NewTicker(leadEvery)
	defer t.Stop()
	var reconciled, witnessed, woke time.Time
	for looked := time.Now(); ; looked = time.Now() {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		case <-l.wake:
		}
		if !l.reigns(ctx, log) || l.f.whole.drained.Load() { // whoever goes then goes with all
			continue
		}
		now := time.Now()
		if now.Sub(looked) > paused {
			woke = now
			l.mu.Lock()
			l.steward.Woke(now)
			l.mu.Unlock()
		}
		if now.Sub(woke) > deafAfter && l.deaf(log, now) {
			l.f.log.Warn("this node leads, and most of those that decide with it do not reach it: another one shall lead")
			if err := log.StepDown(ctx); err != nil {
				l.f.log.Warn("the lead could not be handed over", "err", err)
			}
			woke = now // not again at once
			continue
		}
		l.step(ctx, log)
		if time.Since(reconciled) > reconcileEvery {
			l.reconcile(ctx, log)
			reconciled = time.Now()
		}
		if time.Since(witnessed) > witnessEvery {
			l.f.tasks.Go(func() { l.f.witness(ctx) })
			witnessed = time.Now()
		}
	}
}

// reconcile has those vote that shall. It does not pause between its steps: with two voters, on the way from one to three, the
// loss of either would stop the cluster.
func (l *leader) reconcile(ctx context.Context, log *consensus.Log) {
	for range maxSteps {
		c, err := log.Reconcile(ctx, voters(l.f.n.state.View()))
		if err != nil && ctx.Err() == nil {
			l.f.log.Debug("voters cannot be changed now", "err", err)
		}
		if err != nil || c.Do == consensus.Nothing || c.Do == consensus.HandOver {
			return
		}
	}
}

// reigns begins and ends the steward's reigns with those of the log, and reports whether
// there is one. Nothing is decided, and no lease granted, before all is known that former
// leaders have decided: a node that counts as up here may have been declared down.
func (l *leader) reigns(ctx context.Context, log *consensus.Log) bool {
	reign, leading := log.Reign()
	switch {
	case !leading:
		l.retire()
		return false
	case l.reigning && reign == l.reign:
		return true
	case l.reigning:
		l.retire()
	}
	if err := log.CatchUp(ctx); err != nil {
		return false
	}
	l.mu.Lock()
	l.reign, l.reigning = reign, true
	l.steward.Lead(reign.Since)
	l.mu.Unlock()
	signal(l.f.lease.again)
	return true
}

func voters(v *state.View) (list []consensus.Member) {
	for _, m := range v.Nodes {
		list = append(list, consensus.Member{Node: m.Name, Zone: m.Zone})
	}
	for _, name := range v.Gone {
		list = append(list, consensus.Member{Node: name, Leaving: true})
	}
	return list
}

// retire has those that wait for this leader look for another one.
func (l *leader) retire() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.reigning = false
	l.steward.Follow()
	l.facts.Forget()
	// It shall be known for how long nodes have been there, should this one lead soon.
	l.facts.Of(time.Now(), l.f.n.state.View())
	for _, s := range l.start {
		s.done <- consensus.ErrNotLeader
	}
	l.start = nil
}

// step decides once, and carries it out.
func (l *leader) step(ctx context.Context, log *consensus.Log) {
	v := l.f.n.state.View()
	linked := make([]bool, len(v.Nodes))
	for i, m := range v.Nodes {
		linked[i] = l.f.net.Hears(m.Name, peer.Control)
		if m.Name != l.f.n.cfg.Name && m.State == state.NodeUp {
			l.f.net.Peer(m.Name).Connect(peer.Commit)
		}
	}
	l.mu.Lock()
	for i, m := range v.Nodes {
		l.facts.Linked(m.Name, linked[i])
	}
	waiting := slices.Clone(l.start)
	announcements := make([]steward.Announcement, len(waiting))
	for i, w := range waiting {
		announcements[i] = w.Announcement
	}
	now := time.Now()
	d := l.steward.Step(now, v, l.facts.Of(now, v), announcements)
	l.mu.Unlock()
	for _, n := range d.Notes {
		l.f.log.Info(n.What, "node", n.Node, "reason", n.Reason)
	}
	for i := range d.Commands {
		c := &d.Commands[i]
		res, err := l.f.n.command(ctx, *c)
		if c.AnnounceAll != nil {
			l.announced(c.AnnounceAll, res, err, waiting)
		}
		if err != nil {
			if ctx.Err() == nil && !errors.Is(err, state.ErrStale) {
				l.f.log.Warn("the cluster's state cannot be changed now; trying again", "err", err)
			}
			return
		}
	}
	if len(d.Commands) > 0 {
		signal(l.wake)
	}
}

// announced tells the nodes that have started who they are.
func (l *leader) announced(c *state.AnnounceAll, res state.Result, err error, waiting []*starting) {
	l.mu.Lock()
	defer l.mu.Unlock()
	lives := map[string]state.Life{}
	for i := range c.Nodes {
		if i < len(res.Nodes) {
			lives[c.Nodes[i].Name] = res.Nodes[i]
		}
	}
	latest := map[string]*starting{}
	for _, w := range waiting {
		if o := latest[w.Name]; o == nil || o.Came.Before(w.Came) {
			latest[w.Name] = w
		}
	}
	for _, w := range waiting {
		life, ok := lives[w.Name]
		switch {
		case err != nil:
			w.done <- err
		case ok && life.Node == 0 && isOlder(l.f.n.state.View(), w.Name):
			w.done <- fmt.Errorf("%w: %w", object.ErrUnavailable, errOlder)
		case !ok || life.Node == 0 || latest[w.Name] != w:
			w.done <- fmt.Errorf("%w: the cluster does not take node %q: is its name, or one of its disks, that of another?", object.ErrInvalid, w.Name)
		default:
			w.life = life
			w.done <- nil
		}
	}
	l.start = slices.DeleteFunc(l.start, func(s *starting) bool { return slices.Contains(waiting, s) })
}
