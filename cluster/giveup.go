package cluster

import (
	"context"
	"fmt"

	"sheepdog/cluster/state"
)

// Absent counts the partitions that only a node has that lacks their disk, or that has started with an older copy of them, by the
// nodes' names. They cannot be used until the disks, or the newest copy, are back, or GiveUp.
func (n *Node) Absent() map[string]int {
	v := n.state.View()
	counts := map[string]int{}
	for _, p := range v.Policies {
		for i := range p.Partitions {
			q := &p.Partitions[i]
			if m := v.Node(q.ISR[0]); q.Absent || m != nil && m.Older && len(q.ISR) == 1 && len(q.Waiting) == 0 {
				counts[nameOf(v, q.ISR[0])]++
			}
		}
	}
	return counts
}

// GiveUp declares lost what only the named node had on disks that it lacks, and returns how
// many partitions that were. They can be used again then, and have what another node kept
// of them, or nothing: what was written to them is gone for good. Of a node that has started with an
// older copy it is what that lacks: the node goes on with the copy. It fails with
// state.ErrNotFound if there is no such node.
func (n *Node) GiveUp(ctx context.Context, name string) (partitions int, err error) {
	m := n.state.View().NodeByName(name)
	if m == nil {
		return 0, fmt.Errorf("give up disks of node %q: %w", name, state.ErrNotFound)
	}
	res, err := n.command(ctx, state.Command{Force: &state.Force{Node: m.ID, Name: m.Name, Absent: true}})
	if err != nil {
		return 0, fmt.Errorf("give up disks of node %q: %w", name, err)
	}
	n.log.Warn("what was on missing disks, or is missing in an older copy, is given up: it is lost", "node", m.Name, "partitions", res.Partitions)
	return res.Partitions, nil
}
