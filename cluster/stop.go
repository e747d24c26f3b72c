package cluster

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"sheepdog/cluster/internal/peer"
	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// stopWay is how a daemon stops. The numbers travel.
type stopWay byte

const (
	stopPlain   stopWay = 0 // the others go on
	stopWhole   stopWay = 1 // every node stops
	stopForGood stopWay = 2 // the node is to be removed
)

// whole is what a node knows of the end of the whole cluster. Then nobody shall take over
// from anybody: a node whose clients have gone goes on serving the clients of others, until
// those have gone everywhere; and it says to nobody that it goes. So all members stay in
// sync, and whichever nodes come back first, enough of them have everything.
type whole struct {
	stops   atomic.Bool
	drained atomic.Bool // this node's clients have gone
}

const (
	// stopTimeout bounds how long a node may take until it has stopped.
	stopTimeout = 45 * time.Second
	// wholeTimeout bounds how long a node waits for the clients of others.
	wholeTimeout = 30 * time.Second
	askPause     = 50 * time.Millisecond
)

var errNoStop = fmt.Errorf("%w: this daemon cannot be stopped by others", object.ErrInvalid)

// stopHere has this daemon stop.
func (f *flock) stopHere(way stopWay, from string) error {
	if f.n.cfg.Stop == nil {
		return errNoStop
	}
	switch way {
	case stopPlain:
		f.log.Info("stopping: another node was asked for it", "from", from)
	case stopWhole:
		f.whole.stops.Store(true)
		f.log.Info("stopping with the whole cluster", "from", from)
	case stopForGood:
		f.log.Warn("stopping for good: this node is being removed from the cluster", "from", from)
	default:
		return fmt.Errorf("stop in way %d: %w", way, object.ErrInvalid)
	}
	f.n.cfg.Stop()
	return nil
}

// stop stops another node, and returns when it is down.
func (f *flock) stop(ctx context.Context, m *state.Node, way stopWay) error {
	ctx, cancel := context.WithTimeout(ctx, stopTimeout)
	defer cancel()
	told := false
	for {
		applied := f.n.follower.changed()
		now := f.n.state.View().Node(m.ID)
		switch {
		case now == nil || now.State == state.NodeDown:
			return nil
		case now.Incarnation != m.Incarnation:
			return fmt.Errorf("%w: it has started anew meanwhile", state.ErrStale)
		}
		if !told {
			c := &peer.Call{Class: peer.Bulk, Op: opStop, Head: []byte{byte(way)}, Deadline: time.Now().Add(fenceTimeout)}
			err := unanswered(f.await(ctx, m.Name, c))
			if err != nil && !errors.Is(err, ErrSilent) {
				return err
			}
			told = err == nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: it does not stop: its log says why", ErrSilent)
		case <-applied:
		case <-time.After(askPause):
		}
	}
}

// StopNode stops another node's daemon in an orderly way, and returns when it is down.
func (n *Node) StopNode(ctx context.Context, name string) error {
	m, err := n.NodeNamed(name)
	switch {
	case err != nil:
		return err
	case n.flock == nil || m.Name == n.cfg.Name:
		return errAlone
	}
	if err := n.flock.stop(ctx, m, stopPlain); err != nil {
		return fmt.Errorf("stop node %q: %w", m.Name, err)
	}
	return nil
}

// StopAll tells every node that is up to stop with the whole cluster, this one last, and
// returns the names of those that were told. If one cannot be told none is stopped, unless
// insist is set: it would go on without the others, or be found down by them. Its caller
// then has its own daemon stop, as Config.Stop does.
func (n *Node) StopAll(ctx context.Context, insist bool) ([]string, error) {
	names := []string{n.cfg.Name}
	if n.flock == nil {
		return names, nil
	}
	f := n.flock
	var others []string
	for _, m := range n.state.View().Nodes {
		if m.State == state.NodeUp && m.Name != n.cfg.Name {
			others = append(others, m.Name)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, questionTimeout)
	defer cancel()
	// First it is seen whether all of them answer: half a cluster that stops helps nobody.
	if missing := f.each(ctx, others, opDrained, nil); len(missing) > 0 && !insist {
		return nil, fmt.Errorf("stop the cluster: %w of %s: nothing was stopped", ErrSilent, strings.Join(missing, ", "))
	}
	if missing := f.each(ctx, others, opStop, []byte{byte(stopWhole)}); len(missing) > 0 {
		n.log.Warn("nodes could not be told that the cluster stops", "nodes", missing)
	}
	f.whole.stops.Store(true)
	return append(names, others...), nil
}

// each makes a call to nodes, and returns those that did not answer.
func (f *flock) each(ctx context.Context, nodes []string, op uint16, head []byte) (missing []string) {
	var g errgroup.Group
	var mu sync.Mutex
	for _, name := range nodes {
		g.Go(func() error {
			c := &peer.Call{Class: peer.Bulk, Op: op, Head: head, Deadline: time.Now().Add(fenceTimeout)}
			if err := f.await(ctx, name, c); err != nil {
				mu.Lock()
				missing = append(missing, name)
				mu.Unlock()
			}
			return nil
		})
	}
	_ = g.Wait() // none of them fails
	return missing
}

// awaitWhole returns when the clients of all nodes have gone, or after a time.
func (f *flock) awaitWhole() {
	f.whole.drained.Store(true)
	ctx, cancel := context.WithTimeout(f.ctx, wholeTimeout)
	defer cancel()
	var g errgroup.Group
	for _, m := range f.n.state.View().Nodes {
		if m.State == state.NodeUp && m.Name != f.n.cfg.Name {
			g.Go(func() error { return f.awaitDrained(ctx, m.Name) })
		}
	}
	if err := g.Wait(); err != nil {
		f.log.Warn("not all nodes have stopped with the cluster", "err", err)
	}
}

// awaitDrained returns when a node's clients have gone, or the node has.
func (f *flock) awaitDrained(ctx context.Context, node string) error {
	for {
		c := &peer.Call{Class: peer.Bulk, Op: opDrained, Deadline: time.Now().Add(fenceTimeout)}
		err := f.await(ctx, node, c)
		if err == nil && len(c.ReplyHead) == 1 && c.ReplyHead[0] == 1 || err != nil && f.refuses(ctx, node) {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w of node %q that its clients have gone", ErrSilent, node)
		case <-time.After(askPause):
		}
	}
}

// refuses reports whether nobody listens where a node did.
func (f *flock) refuses(ctx context.Context, node string) bool {
	address, err := f.resolve(node)
	if err != nil {
		return false
	}
	conn, err := (&net.Dialer{Timeout: fenceTimeout}).DialContext(ctx, "tcp", address)
	if err == nil {
		conn.Close()
	}
	return gone(err)
}
