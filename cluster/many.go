package cluster

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"sheepdog/cluster/internal/replica"
	"sheepdog/cluster/internal/replicas"
	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// submitMany is Submit of a node that is one of many.
func (n *Node) submitMany(r *object.Request) {
	if n.delay != nil && r.Op != object.OpSync {
		n.delay.submit(r)
		return
	}
	n.flock.Submit(r)
}

// Submit starts a request of this node's clients.
func (f *flock) Submit(r *object.Request) {
	if r.Op == object.OpSync {
		f.flush(r)
		return
	}
	p, err := f.partition(r.Policy, r.ID)
	switch {
	case err != nil:
		r.Complete(err)
	case r.Len == 0 || r.SizeShift < object.MinSizeShift || r.SizeShift > object.MaxSizeShift || uint64(r.Off)+uint64(r.Len) > 1<<r.SizeShift:
		r.Complete(fmt.Errorf("range %d+%d of object %s: %w", r.Off, r.Len, r.ID, object.ErrInvalid))
	default:
		r.Partition = p
		f.gates.Submit(r)
	}
}

// partition finds an object's, if there is a table.
func (f *flock) partition(policy object.PolicyID, id object.ID) (object.Partition, error) {
	if f.n.closed.Load() {
		return 0, object.ErrClosed
	}
	v := f.view.Load()
	p := v.Policy(policy)
	if f.replicas() == nil || p == nil || len(p.Partitions) == 0 {
		return 0, f.n.routes.Load().unserved(policy, 0)
	}
	return object.PartitionOf(id, len(p.Partitions)), nil
}

// flush makes durable what was answered for a volume through this node; for volume 0,
// what was answered at all.
func (f *flock) flush(r *object.Request) {
	if f.replicas() == nil {
		r.Complete(f.n.routes.Load().unserved(r.Policy, 0))
		return
	}
	if r.Flags&object.FlagAll != 0 {
		f.tasks.Go(func() { r.Complete(f.flushAll(r)) })
		return
	}
	f.gates.Flush(r.Volume, r.Complete)
}

// do carries out a task about an object, and waits for it.
func (f *flock) do(ctx context.Context, policy object.PolicyID, id object.ID, t replicas.Task) (*replicas.Task, error) {
	p, err := f.partition(policy, id)
	if err != nil {
		return nil, err
	}
	t.Group, t.ID = object.Group{Policy: policy, Partition: p}, id
	return f.carryOut(ctx, t)
}

func (f *flock) carryOut(ctx context.Context, t replicas.Task) (*replicas.Task, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	type outcome struct {
		task *replicas.Task
		err  error
	}
	done := make(chan outcome, 1)
	f.gates.Do(t, func(t *replicas.Task, err error) { done <- outcome{t, err} })
	f.Kick()
	o := <-done // a task ends by itself: what was begun is not given up
	return o.task, o.err
}

func (f *flock) stat(ctx context.Context, policy object.PolicyID, id object.ID) (object.Info, error) {
	t, err := f.do(ctx, policy, id, replicas.Task{Verb: replicas.VerbStat})
	if err != nil {
		return object.Info{}, err
	}
	return t.Info, nil
}

func (f *flock) sums(ctx context.Context, policy object.PolicyID, id object.ID) ([]uint64, error) {
	t, err := f.do(ctx, policy, id, replicas.Task{Verb: replicas.VerbSums})
	if err != nil {
		return nil, err
	}
	return t.Sums, nil
}

// extents are found in the checksums.
func (f *flock) extents(ctx context.Context, policy object.PolicyID, id object.ID, off, n uint32) ([]object.Extent, error) {
	sums, err := f.sums(ctx, policy, id)
	if err != nil || n == 0 {
		return nil, err
	}
	if uint64(off)+uint64(n) > uint64(len(sums))*object.BlockSize {
		return nil, fmt.Errorf("range is past the end of object %s: %w", id, object.ErrInvalid)
	}
	var list []object.Extent
	for at, end := uint64(off), uint64(off)+uint64(n); at < end; {
		b := at / object.BlockSize
		next := min(end, (b+1)*object.BlockSize)
		hole := sums[b] == 0
		if last := len(list) - 1; last >= 0 && list[last].Hole == hole {
			list[last].Len += uint32(next - at)
		} else {
			list = append(list, object.Extent{Off: uint32(at), Len: uint32(next - at), Hole: hole})
		}
		at = next
	}
	return list, nil
}

// list calls fn for every object of a policy, partition by partition, several at a time.
func (f *flock) list(ctx context.Context, policy object.PolicyID, fn func(object.Info) error) error {
	if _, err := f.partition(policy, 0); err != nil {
		return err
	}
	count := len(f.view.Load().Policy(policy).Partitions)
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(listAtATime)
	found := make(chan []object.Info)
	go func() {
		for i := range count {
			g.Go(func() error {
				return f.listPartition(ctx, object.Group{Policy: policy, Partition: object.Partition(i)}, found)
			})
		}
		_ = g.Wait() // asked again below
		close(found)
	}()
	var err error
	for infos := range found {
		for i := 0; i < len(infos) && err == nil; i++ {
			err = fn(infos[i])
		}
	}
	if err == nil {
		err = g.Wait()
	}
	return err
}

const listAtATime = 16

func (f *flock) listPartition(ctx context.Context, g object.Group, found chan<- []object.Info) error {
	for from := object.ID(0); ; {
		t, err := f.carryOut(ctx, replicas.Task{Group: g, Verb: replicas.VerbList, ID: from, Len: replicas.MaxList})
		if err != nil {
			return err
		}
		found <- t.Infos
		if len(t.Infos) < replicas.MaxList {
			return nil
		}
		from = t.Infos[len(t.Infos)-1].Key.ID + 1
	}
}

func (f *flock) remove(ctx context.Context, policy object.PolicyID, id object.ID, vid object.VID, generation uint64) error {
	_, err := f.do(ctx, policy, id, replicas.Task{Verb: replicas.VerbDelete, Volume: vid, Generation: generation})
	return err
}

// copy makes an object of another one, whose primary may be elsewhere: its content comes
// here and goes to the new one's primary. Who copies knows that nobody uses the new object
// before, and makes it durable; so it need not appear at once.
func (f *flock) copy(ctx context.Context, c object.CopyRequest) error {
	if _, err := f.stat(ctx, c.DstPolicy, c.Dst); err == nil || !errors.Is(err, object.ErrNotFound) {
		return err
	}
	size := uint32(uint64(1)<<c.SizeShift - 1) // a size of 2 GiB does not fit otherwise
	list, err := f.extents(ctx, c.SrcPolicy, c.Src, 0, size&^(object.BlockSize-1))
	if err != nil {
		return err
	}
	if last := size &^ (object.BlockSize - 1); last > 0 {
		tail, err := f.extents(ctx, c.SrcPolicy, c.Src, last, object.BlockSize)
		if err != nil {
			return err
		}
		list = append(list, tail...)
	}
	g, work := errgroup.WithContext(ctx)
	g.SetLimit(copiedAtATime)
	for _, e := range list {
		for off := e.Off; !e.Hole && off-e.Off < e.Len; off += copyStep {
			n := min(copyStep, e.Len-(off-e.Off))
			g.Go(func() error { return f.copyPiece(work, c, off, n) })
		}
	}
	return g.Wait()
}

// An object is copied by pieces of copyStep bytes, copiedAtATime of them at once, so that one is read while others are
// written. Long ones cost more: their buffers, here and at every node, are out of all caches by the time they are used.
const (
	copyStep      uint32 = 512 << 10
	copiedAtATime        = 2
)

var copyBuffers = sync.Pool{New: func() any { return new([copyStep]byte) }}

func (f *flock) copyPiece(ctx context.Context, c object.CopyRequest, off, n uint32) error {
	buf := copyBuffers.Get().(*[copyStep]byte)
	defer copyBuffers.Put(buf)
	t := replicas.Task{
		Verb: replicas.VerbRead, SizeShift: c.SizeShift, Off: off, Len: n, Data: buf[:n],
		Volume: c.Volume, Generation: c.Generation, // so it is read here, if this node has it
	}
	if _, err := f.do(ctx, c.SrcPolicy, c.Src, t); err != nil {
		return err
	}
	t.Verb = replicas.VerbWrite
	_, err := f.do(ctx, c.DstPolicy, c.Dst, t)
	return err
}

// flushAll makes durable what anybody has written; with a volume and its generation, after
// everything older of that is done.
func (f *flock) flushAll(r *object.Request) error {
	if r.Volume != 0 && r.Generation != 0 {
		if err := f.n.Settled(f.ctx, r.Volume, r.Generation); err != nil {
			return err
		}
	}
	return f.syncAll(f.ctx, r.Policy)
}

// syncAll makes durable what every node has stored of a policy, by whomever it was written.
// A node that is down, or goes down meanwhile, has no part in it where others are in sync:
// they have all of it. What it alone has may be lost; so it is waited for, and if it comes
// back as another process, syncAll fails with ErrIO rather than lie. Without it, it fails
// with ErrUnavailable in time.
func (f *flock) syncAll(ctx context.Context, policy object.PolicyID) error {
	ctx, cancel := context.WithTimeout(ctx, f.n.cfg.Network.IOTimeout)
	defer cancel()
	g, work := errgroup.WithContext(ctx)
	began := f.n.state.View()
	for _, m := range began.Nodes {
		if m.State == state.NodeUp && len(m.Disks) > 0 {
			g.Go(func() error { return f.syncNode(work, replica.Peer{Node: m.ID, Incarnation: m.Incarnation}) })
		}
	}
	if err := g.Wait(); err != nil {
		return err
	}
	for {
		applied := f.n.follower.changed()
		missing, err := lost(f.n.state.View(), policy, began.Epoch)
		if err != nil || missing == nil {
			return err
		}
		select {
		case <-applied:
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", missing, ctx.Err())
		}
	}
}

// Lost counts something that grows whenever what was written in a policy, and is not durable, may be lost because the last that had it
// have started anew. It has what an OpSync with FlagAll has waited for.
func (n *Node) Lost(policy object.PolicyID) uint64 {
	p := n.state.View().Policy(policy)
	if p == nil {
		return 0
	}
	var last state.Epoch
	for i := range p.Partitions {
		last = max(last, p.Partitions[i].Restarted, p.Partitions[i].Lost)
	}
	return uint64(last)
}

// lost finds out whether some of what was stored at an epoch may be lost, or, with missing,
// whether that is not known yet.
func lost(v *state.View, policy object.PolicyID, since state.Epoch) (missing, err error) {
	p := v.Policy(policy)
	if p == nil {
		return nil, nil
	}
	for i := range p.Partitions {
		q := &p.Partitions[i]
		switch n := v.Node(q.Primary()); {
		case q.Restarted > since || q.Lost > since:
			return nil, fmt.Errorf("%w: the last member of partition %s has restarted: what was written before may be lost", object.ErrIO,
				object.Group{Policy: policy, Partition: object.Partition(i)})
		case q.Undecided() || n == nil || n.State != state.NodeUp:
			missing = fmt.Errorf("%w: what partition %s has is not certain before the nodes that had it last are back", object.ErrUnavailable,
				object.Group{Policy: policy, Partition: object.Partition(i)})
		}
	}
	return missing, nil
}

// syncNode has a node make everything durable, unless it is down by then.
func (f *flock) syncNode(ctx context.Context, to replica.Peer) error {
	for {
		done := make(chan error, 1)
		f.replicas().Sync(to, func(err error) { done <- err })
		f.Kick()
		var err error
		select {
		case err = <-done:
		case <-ctx.Done():
			err = ctx.Err()
		}
		m := f.n.state.View().Node(to.Node)
		if err == nil || m == nil || m.State != state.NodeUp || m.Incarnation != to.Incarnation {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: node %q has not made its data durable in time: %w", object.ErrUnavailable, m.Name, err)
		case <-time.After(retryPause):
		}
	}
}
