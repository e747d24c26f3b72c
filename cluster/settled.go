package cluster

import (
	"context"
	"encoding/binary"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"sheepdog/cluster/internal/peer"
	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// Settled returns when nobody answers or changes anything of a volume any more under a
// generation older than the given one, which a command has just begun: every node that is
// up has applied that command, and has no older change under way. A node that is down has
// no lease (INV-R5). What became of such changes may be a matter of epochs that this node hears of later than others: when it
// returns this node has followed those, too, and does not read from its own replicas what is undone in them. It fails with ErrUnavailable if a node neither answers nor is found
// to be down in time, and with the error of ctx.
func (n *Node) Settled(ctx context.Context, vid object.VID, generation uint64) error {
	if n.flock == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, n.cfg.Network.IOTimeout)
	defer cancel()
	defer context.AfterFunc(n.flock.ctx, cancel)() // nobody follows the log any more
	var furthest atomic.Uint64
	g, work := errgroup.WithContext(ctx)
	g.Go(func() error { return n.flock.fence(work, vid, generation) })
	for _, m := range n.state.View().Nodes {
		if m.State == state.NodeUp && m.Name != n.cfg.Name {
			g.Go(func() error {
				index, err := n.flock.fenceNode(work, m, vid, generation)
				for was := furthest.Load(); index > was && !furthest.CompareAndSwap(was, index); was = furthest.Load() {
				}
				return err
			})
		}
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return n.flock.catchUp(ctx, furthest.Load())
}

// applied is how far this node has applied the log.
func (f *flock) applied() uint64 {
	if l := f.n.consensus.Load(); l != nil {
		return l.Applied()
	}
	return 0
}

// catchUp waits until this node's replicas have followed the log up to an index, and all that the node knows.
func (f *flock) catchUp(ctx context.Context, index uint64) error {
	l, r := f.n.consensus.Load(), f.replicas()
	if l == nil || r == nil {
		return nil
	}
	err := l.AwaitApplied(ctx, index)
	if err == nil {
		err = r.AwaitFollowed(ctx, f.n.state.View().Epoch)
	}
	if err != nil {
		return fmt.Errorf("%w: this node is behind others, or its replicas are: %w", object.ErrUnavailable, err)
	}
	return nil
}

// Known returns when every node that serves clients has applied all commands that this node has,
// and has done what follows from them (see OnKnown), or serves nobody any more: a node that is down has
// no lease, and gets one only when it has applied what came before it was up again (INV-R5). It costs a
// round trip to each node; one that hangs delays it until its lease is over. It fails like Settled.
func (n *Node) Known(ctx context.Context) error {
	l := n.consensus.Load()
	if n.flock == nil || l == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, n.cfg.Network.IOTimeout)
	defer cancel()
	head := binary.LittleEndian.AppendUint64(nil, l.Applied())
	g, ctx := errgroup.WithContext(ctx)
	for _, m := range n.state.View().Nodes {
		if m.State == state.NodeUp && m.Name != n.cfg.Name {
			g.Go(func() error {
				_, err := n.flock.insist(ctx, m, opKnown, head)
				return err
			})
		}
	}
	return g.Wait()
}

// OnKnown has fn called, in place of an earlier one, before this node tells another one that it has
// applied what that has: fn returns when what follows from it is done, or when ctx ends.
func (n *Node) OnKnown(fn func(ctx context.Context)) { n.knowing.Store(&fn) }

// knows is what Known wants of this node.
func (f *flock) knows(ctx context.Context, index uint64) error {
	l := f.n.consensus.Load()
	if l == nil {
		return object.ErrUnavailable
	}
	ctx, cancel := context.WithTimeout(ctx, fenceTimeout)
	defer cancel()
	if err := l.AwaitApplied(ctx, index); err != nil {
		return err
	}
	if fn := f.n.knowing.Load(); fn != nil {
		(*fn)(ctx)
	}
	return ctx.Err()
}

// fenceNode has another node fence a volume, as long as that is up, and returns how far that had applied the log afterwards.
func (f *flock) fenceNode(ctx context.Context, node *state.Node, vid object.VID, generation uint64) (index uint64, err error) {
	head := binary.LittleEndian.AppendUint32(nil, uint32(vid))
	head = binary.LittleEndian.AppendUint64(head, generation)
	answer, err := f.insist(ctx, node, opFence, head)
	if err == nil && len(answer) == 8 {
		index = binary.LittleEndian.Uint64(answer)
	}
	return index, err
}

// insist asks another node until it has answered, or is not up any more: then there is no answer.
func (f *flock) insist(ctx context.Context, node *state.Node, op uint16, head []byte) (answer []byte, err error) {
	for {
		answer, err = f.ask(ctx, node.Name, op, head)
		m := f.n.state.View().Node(node.ID)
		switch {
		case err == nil:
			return answer, nil
		case m == nil || m.State != state.NodeUp || m.Incarnation != node.Incarnation:
			return nil, nil
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: node %q, which may still serve clients, does not answer: %w", object.ErrUnavailable, node.Name, err)
		case <-time.After(retryPause):
		}
	}
}

// ask asks another node once and waits, or gives up. The answer is in the reply's head.
func (f *flock) ask(ctx context.Context, node string, op uint16, head []byte) ([]byte, error) {
	c := &peer.Call{Class: peer.Data, Op: op, Head: head, Deadline: time.Now().Add(fenceTimeout)}
	if err := f.await(ctx, node, c); err != nil {
		return nil, err
	}
	return c.ReplyHead, nil
}

// fenceTimeout is how long one attempt takes.
const fenceTimeout = 2 * time.Second

// fence is what Settled wants of this node.
func (f *flock) fence(ctx context.Context, vid object.VID, generation uint64) error {
	n := f.n
	for n.cfg.Generation != nil {
		applied := n.follower.changed()
		if n.cfg.Generation(vid) >= generation {
			break
		}
		select {
		case <-applied:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	n.fence.admit(vid, generation)
	r := f.replicas()
	if r == nil {
		return nil
	}
	select {
	case <-r.Landed(vid, generation):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// follower tells when commands were applied.
type follower struct {
	mu   sync.Mutex
	wait chan struct{} // closed by the next one; nil: nobody waits
}

// changed returns a channel that is closed when another command has been applied.
func (f *follower) changed() <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.wait == nil {
		f.wait = make(chan struct{})
	}
	return f.wait
}

func (f *follower) applied() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.wait != nil {
		close(f.wait)
		f.wait = nil
	}
}
