package cluster

import (
	"context"
	"time"

	"sheepdog/cluster/internal/replicas"
	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

const (
	// leaveTimeout bounds how long a node that stops waits for the others to take over.
	leaveTimeout = 5 * time.Second
	// leaveAtATime is how many partitions are handed over in one command: each of them
	// begins a new epoch, and serves nobody until its members have agreed on that.
	leaveAtATime = 128
)

// leave has the others take over before this node stops. As long as it answers and is up,
// that takes each partition a round trip: first it hands over the lead of the log, then
// what it is a member of, some at a time, and only when it holds nothing that others hold
// too it gives up its lease and is down.
func (f *flock) leave() {
	if f.whole.stops.Load() {
		f.awaitWhole()
		f.endLease() // there is nobody to take over
		return
	}
	l, r := f.n.consensus.Load(), f.replicas()
	if l == nil || r == nil {
		f.endLease()
		return
	}
	ctx, cancel := context.WithTimeout(f.ctx, leaveTimeout)
	defer cancel()
	if l.Leading() {
		if err := l.StepDown(ctx); err != nil {
			f.log.Info("the others choose another leader", "reason", err)
		}
	}
	err := f.handOver(ctx)
	f.endLease() // nothing is answered from here on that others do not know of
	if err == nil {
		down := state.SetNode{Node: state.NodeID(f.n.self.Load()), Incarnation: f.n.inc.Load(), State: state.NodeDown, At: f.n.now(), Log: f.applied()}
		_, err = f.n.command(ctx, state.Command{SetNode: &down})
	}
	if err != nil {
		f.log.Warn("the others could not be told that this node stops: they will find out", "err", err)
	}
}

// handOver takes this node out of all partitions that have other members.
func (f *flock) handOver(ctx context.Context) error {
	began, count := time.Now(), 0
	c := state.Leave{Node: state.NodeID(f.n.self.Load()), Incarnation: f.n.inc.Load(), Most: leaveAtATime}
	for {
		res, err := f.n.command(ctx, state.Command{Leave: &c})
		if err != nil {
			return err
		}
		if res.Partitions == 0 {
			f.log.Info("this node's partitions were handed over", "partitions", count, "took", time.Since(began))
			return nil
		}
		count += res.Partitions
		if err := f.served(ctx, *res.Last); err != nil {
			return err
		}
	}
}

// served returns when a partition is served in the epoch that this node knows.
func (f *flock) served(ctx context.Context, g object.Group) error {
	done := make(chan struct{})
	// Whether there is such an object makes no difference.
	f.gates.Do(replicas.Task{Group: g, Verb: replicas.VerbStat}, func(*replicas.Task, error) { close(done) })
	f.Kick()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
