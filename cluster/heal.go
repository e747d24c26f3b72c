package cluster

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"sheepdog/cluster/internal/replicas"
	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// Heal brings content that this node's store has found to be corrupt, as the primary of its
// partition, from other replicas: reading does it. Of partitions of which this node is a
// member only, CheckReplicas does so. No blocks mean that the header or table is corrupt.
// Objects that nobody else has, or that are gone, are left as they are.
func (n *Node) Heal(ctx context.Context, k object.Key, blocks []uint32) error {
	if n.flock == nil || n.primary(k.Group) != n.cfg.Name {
		return nil
	}
	info, err := n.flock.stat(ctx, k.Group.Policy, k.ID)
	for _, b := range blocks {
		if err != nil {
			break
		}
		t := replicas.Task{Verb: replicas.VerbRead, SizeShift: info.SizeShift, Off: b * object.BlockSize, Len: object.BlockSize, Data: make([]byte, object.BlockSize)}
		_, err = n.flock.do(ctx, k.Group.Policy, k.ID, t)
	}
	if err != nil && !errors.Is(err, object.ErrNotFound) {
		return fmt.Errorf("heal object %s: %w", k, err)
	}
	return nil
}

// primary is the name of a partition's, "" if there is no such partition.
func (n *Node) primary(g object.Group) string {
	v := n.state.View()
	p := v.Policy(g.Policy)
	if p == nil || int(g.Partition) >= len(p.Partitions) {
		return ""
	}
	return nameOf(v, p.Partitions[g.Partition].Primary())
}

// OnlyHere counts the groups that nobody but this node has.
func (n *Node) OnlyHere(groups []object.Group) int {
	return n.count(groups, func(p *state.Partition, self state.NodeID) bool {
		return slices.Contains(p.ISR, self) && len(p.ISR) == 1 || slices.Contains(p.Waiting, self)
	})
}

// Exist counts the groups that there are in the cluster.
func (n *Node) Exist(groups []object.Group) int {
	return n.count(groups, func(*state.Partition, state.NodeID) bool { return true })
}

func (n *Node) count(groups []object.Group, is func(*state.Partition, state.NodeID) bool) (count int) {
	v, self := n.state.View(), state.NodeID(n.self.Load())
	for _, g := range groups {
		if p := v.Policy(g.Policy); p != nil && int(g.Partition) < len(p.Partitions) && is(&p.Partitions[g.Partition], self) {
			count++
		}
	}
	return count
}
