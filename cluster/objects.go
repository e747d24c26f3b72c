package cluster

import (
	"context"
	"fmt"
	"time"

	"sheepdog/storage/object"
)

// Submit starts a request: see object.Request. The node fills in Partition and Version.
// Beside what the store fails with, a request fails with ErrUnavailable while the
// cluster is not formatted, ErrStale if its generation is, and ErrClosed after Close.
// OpSync covers every object of this node.
func (n *Node) Submit(r *object.Request) {
	if n.flock != nil {
		n.submitMany(r)
		return
	}
	if err := n.admit(r); err != nil {
		r.Complete(err)
		return
	}
	if n.delay != nil {
		n.delay.submit(r)
		return
	}
	n.cfg.Store.Submit(r)
}

func (n *Node) admit(r *object.Request) error {
	if n.closed.Load() {
		return object.ErrClosed
	}
	routes := n.routes.Load()
	if r.Op == object.OpSync {
		if n.cfg.Store == nil || !routes.view.Formatted() {
			return routes.unserved(r.Policy, 0)
		}
		if r.Flags&object.FlagAll != 0 && r.Generation != 0 && !n.fence.admit(r.Volume, r.Generation) {
			return n.stale(r.Volume, r.Generation)
		}
		return nil
	}
	p, rt := routes.find(r.Policy, r.ID)
	if rt == nil {
		return routes.unserved(r.Policy, p)
	}
	r.Partition = p
	if r.Op == object.OpRead {
		if r.Generation != 0 && !n.fence.admit(r.Volume, r.Generation) {
			return n.stale(r.Volume, r.Generation)
		}
		return nil
	}
	if !rt.writable {
		return routes.unwritable(r.Policy, p)
	}
	if !n.fence.admit(r.Volume, r.Generation) {
		return n.stale(r.Volume, r.Generation)
	}
	r.Version = rt.next()
	return nil
}

func (n *Node) stale(vid object.VID, gen uint64) error {
	return fmt.Errorf("request for volume %s under generation %d, newest is %d: %w", vid, gen, n.fence.newest(vid), object.ErrStale)
}

// Kick carries out what Submit held back.
func (n *Node) Kick() {
	if n.flock != nil {
		n.flock.Kick()
		return
	}
	if n.cfg.Store != nil && n.delay == nil {
		n.cfg.Store.Kick()
	}
}

// SetGeneration makes the node refuse writes of a volume under generations older than
// gen. Older news change nothing.
func (n *Node) SetGeneration(vid object.VID, gen uint64) { n.fence.admit(vid, gen) }

// Copy makes an object of another where the data is: see object.CopyRequest.
func (n *Node) Copy(ctx context.Context, c object.CopyRequest) error {
	if n.flock != nil {
		return n.flock.copy(ctx, c)
	}
	routes, err := n.ready(ctx)
	if err != nil {
		return err
	}
	dst, rt, err := routes.key(c.DstPolicy, c.Dst)
	if err != nil {
		return err
	}
	src, _, err := routes.key(c.SrcPolicy, c.Src)
	if err != nil {
		return err
	}
	if !rt.writable {
		return routes.unwritable(c.DstPolicy, dst.Group.Partition)
	}
	if !n.fence.admit(c.Volume, c.Generation) {
		return n.stale(c.Volume, c.Generation)
	}
	return n.cfg.Store.Copy(ctx, dst, src, c.SizeShift, rt.next())
}

// Delete removes an object; a missing one is no error: see object.DeleteRequest.
func (n *Node) Delete(ctx context.Context, d object.DeleteRequest) error {
	if n.flock != nil {
		return n.flock.remove(ctx, d.Policy, d.ID, d.Volume, d.Generation)
	}
	key, err := n.key(ctx, d.Policy, d.ID)
	if err != nil {
		return err
	}
	if !n.fence.admit(d.Volume, d.Generation) {
		return n.stale(d.Volume, d.Generation)
	}
	return n.cfg.Store.Delete(ctx, key)
}

// Extents tells which bytes of [off, off+n) of an object are allocated.
func (n *Node) Extents(ctx context.Context, policy object.PolicyID, id object.ID, off, length uint32) ([]object.Extent, error) {
	if n.flock != nil {
		return n.flock.extents(ctx, policy, id, off, length)
	}
	key, err := n.key(ctx, policy, id)
	if err != nil {
		return nil, err
	}
	return n.cfg.Store.Extents(ctx, key, off, length)
}

// Sums returns the checksums of an object's blocks; 0 stands for a hole.
func (n *Node) Sums(ctx context.Context, policy object.PolicyID, id object.ID) ([]uint64, error) {
	if n.flock != nil {
		return n.flock.sums(ctx, policy, id)
	}
	key, err := n.key(ctx, policy, id)
	if err != nil {
		return nil, err
	}
	return n.cfg.Store.Sums(ctx, key)
}

// Stat describes an object.
func (n *Node) Stat(ctx context.Context, policy object.PolicyID, id object.ID) (object.Info, error) {
	if n.flock != nil {
		return n.flock.stat(ctx, policy, id)
	}
	key, err := n.key(ctx, policy, id)
	if err != nil {
		return object.Info{}, err
	}
	return n.cfg.Store.Stat(ctx, key)
}

// List calls fn for every object of a policy, in no order, until fn returns an error.
func (n *Node) List(ctx context.Context, policy object.PolicyID, fn func(object.Info) error) error {
	if n.flock != nil {
		return n.flock.list(ctx, policy, fn)
	}
	routes, err := n.ready(ctx)
	if err != nil {
		return err
	}
	groups, err := n.cfg.Store.Groups(ctx)
	if err != nil {
		return err
	}
	for _, g := range routes.here(policy, groups) {
		if err := n.cfg.Store.List(ctx, g, fn); err != nil {
			return err
		}
	}
	return nil
}

func (n *Node) key(ctx context.Context, policy object.PolicyID, id object.ID) (object.Key, error) {
	routes, err := n.ready(ctx)
	if err != nil {
		return object.Key{}, err
	}
	key, _, err := routes.key(policy, id)
	return key, err
}

// ready returns the routing for an operation that is not a Request, after Config.Delay.
func (n *Node) ready(ctx context.Context) (*routing, error) {
	if n.closed.Load() {
		return nil, object.ErrClosed
	}
	if n.cfg.Delay > 0 {
		t := time.NewTimer(n.cfg.Delay)
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	return n.routes.Load(), nil
}
