package cluster

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"sheepdog/cluster/internal/durable"
	"sheepdog/cluster/internal/members"
	"sheepdog/cluster/internal/peer"
	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// ErrRemoved: the node was removed from its cluster, and can never be a member of it again
// with what it has.
var ErrRemoved = errors.New("this node was removed from the cluster")

// removed tells when this node has been removed. A node that was up when that happened may
// read it in the log, but need not get so far: the others stop sending it anything. One that
// was down has a log that ends before. So who gets no lease asks others whether its
// number is still a member's. It keeps its number in a file, since its log may need others to
// say what of it holds; and that it was removed in another one.
type removed struct {
	once sync.Once
	told chan struct{} // closed when it is known
	why  error
}

const (
	numberName  = "number"  // in Config.Dir
	removedName = "removed" // likewise

	// doubtAfter is how long a node is granted no lease before it asks, doubtEvery how often.
	doubtAfter = 3 * time.Second
	doubtEvery = time.Second
)

func (r *removed) init() { r.told = make(chan struct{}) }

// until gives a context that ends when the node is known to be removed.
func (r *removed) until(ctx context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancel(ctx)
	go func() {
		select {
		case <-r.told:
			cancel()
		case <-ctx.Done():
		}
	}()
	return ctx, cancel
}

// cause prefers that the node was removed to what came of that.
func (r *removed) cause(err error) error {
	if why := r.err(); err != nil && why != nil {
		return why
	}
	return err
}

func (r *removed) err() error {
	select {
	case <-r.told:
		return r.why
	default:
		return nil
	}
}

// nodeRemoved notes that this node has been removed.
func (n *Node) nodeRemoved() {
	n.removed.once.Do(func() {
		cluster := n.clusterFile()
		n.removed.why = removedError(cluster)
		if err := durable.WriteFile(filepath.Join(n.cfg.Dir, removedName), cluster); err != nil {
			n.log.Warn("that this node was removed is not kept: it will ask others again", "err", err)
		}
		close(n.removed.told)
	})
}

func removedError(cluster string) error {
	return fmt.Errorf("%w %s: to use its machine as a new node, empty its disks and node.state_dir: %w", ErrRemoved, cluster, object.ErrInvalid)
}

// refuseRemoved fails if it is known from before that this node was removed.
func (n *Node) refuseRemoved() error {
	b, err := os.ReadFile(filepath.Join(n.cfg.Dir, removedName))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read whether this node was removed: %w", err)
	}
	return removedError(string(b))
}

// keepNumber keeps this node's number for the next start.
func (n *Node) keepNumber(id state.NodeID) error {
	if n.number() == id {
		return nil
	}
	if err := durable.WriteFile(filepath.Join(n.cfg.Dir, numberName), strconv.Itoa(int(id))); err != nil {
		return fmt.Errorf("keep the node's number: %w", err)
	}
	return nil
}

// number is this node's, as kept; 0: it is not known, or it never was a member.
func (n *Node) number() state.NodeID {
	b, err := os.ReadFile(filepath.Join(n.cfg.Dir, numberName))
	if err != nil {
		return 0
	}
	id, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 16)
	if err != nil {
		return 0
	}
	return state.NodeID(id)
}

// watchRemoval finds out when this node has been removed.
func (f *flock) watchRemoval() {
	id := f.n.number()
	t := time.NewTicker(doubtEvery)
	defer t.Stop()
	heard := time.Now()
	for {
		applied := f.n.follower.changed()
		if self := state.NodeID(f.n.self.Load()); self != 0 {
			id = self
		}
		if f.n.state.View().Removed(id) {
			f.n.nodeRemoved()
			return
		}
		select {
		case <-f.ctx.Done():
			return
		case <-applied:
			continue
		case <-t.C:
		}
		if at := f.lease.granted(); at.After(heard) {
			heard = at
		}
		if id != 0 && time.Since(heard) > doubtAfter && f.anyoneSaysRemoved(id) {
			f.n.nodeRemoved()
			return
		}
	}
}

// anyoneSaysRemoved asks the members of this node's cluster, until one knows.
func (f *flock) anyoneSaysRemoved(id state.NodeID) bool {
	cluster := f.n.clusterFile()
	for _, m := range f.members.List() {
		if m.State != members.Alive || m.Name == f.n.cfg.Name || m.Cluster != cluster || cluster == "" {
			continue
		}
		c := &peer.Call{Class: peer.Data, Op: opRemoved, Head: binary.LittleEndian.AppendUint16(nil, uint16(id)), Deadline: time.Now().Add(fenceTimeout)}
		if err := f.await(f.ctx, m.Name, c); err == nil && len(c.ReplyHead) == 1 && c.ReplyHead[0] == 1 {
			return true
		}
	}
	return false
}
