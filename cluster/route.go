package cluster

import (
	"fmt"
	"slices"
	"sync/atomic"

	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// routing says where requests go. It is immutable, but for the sequence counters.
type routing struct {
	view   *state.View
	self   state.NodeID
	tables [state.MaxPolicies]*table // by PolicyID; nil: no such policy, or not placed yet
}

// table is the routing of one policy.
type table struct {
	source *state.Policy // what it was made from
	routes []route       // by Partition
}

// route is how this node deals with a partition.
type route struct {
	epoch    uint64
	seq      *atomic.Uint64 // last sequence number given in epoch
	here     bool           // this node is the primary
	writable bool           // enough members are in sync (INV-R4)
}

// reroute makes the routing of the current state. Only consensus' applying goroutine
// and join, which waits for that, cause it, so there is one writer.
func (n *Node) reroute() {
	old, v := n.routes.Load(), n.state.View()
	next := &routing{view: v, self: n.selfIn(v)}
	for _, p := range v.Policies {
		if len(p.Partitions) == 0 {
			continue
		}
		was := old.tables[p.ID]
		if was != nil && was.source == p && old.self == next.self {
			next.tables[p.ID] = was
			continue
		}
		next.tables[p.ID] = newTable(p, was, next.self)
	}
	n.routes.Store(next)
}

// selfIn finds this node by its name: a command may name it before Announce has returned.
func (n *Node) selfIn(v *state.View) state.NodeID {
	if m := v.NodeByName(n.cfg.Name); m != nil && n.cfg.Store != nil && m.State == state.NodeUp {
		return m.ID
	}
	return 0
}

// newTable keeps the counters of partitions whose epoch has not changed.
func newTable(p *state.Policy, was *table, self state.NodeID) *table {
	t := &table{source: p, routes: make([]route, len(p.Partitions))}
	counters := make([]atomic.Uint64, len(p.Partitions))
	for i := range p.Partitions {
		part := &p.Partitions[i]
		r := route{epoch: uint64(part.Epoch), seq: &counters[i], here: self != 0 && part.Primary() == self, writable: len(part.ISR) >= p.MinInSync}
		if was != nil && was.routes[i].epoch == r.epoch {
			r.seq = was.routes[i].seq
		}
		t.routes[i] = r
	}
	return t
}

// find returns the object's partition and how it is dealt with. The pointer is nil if
// there is no table, or if the partition is served elsewhere.
func (r *routing) find(policy object.PolicyID, id object.ID) (object.Partition, *route) {
	t := r.tables[policy]
	if t == nil {
		return 0, nil
	}
	p := object.PartitionOf(id, len(t.routes))
	if rt := &t.routes[p]; rt.here {
		return p, rt
	}
	return p, nil
}

// key finds an object of which this node is the primary.
func (r *routing) key(policy object.PolicyID, id object.ID) (object.Key, *route, error) {
	p, rt := r.find(policy, id)
	if rt == nil {
		return object.Key{}, nil, r.unserved(policy, p)
	}
	return object.Key{Group: object.Group{Policy: policy, Partition: p}, ID: id}, rt, nil
}

// next gives a write of the partition its version.
func (rt *route) next() object.Version {
	return object.Version{Epoch: rt.epoch, Seq: rt.seq.Add(1)}
}

// unserved explains why find found nothing.
func (r *routing) unserved(policy object.PolicyID, p object.Partition) error {
	if !r.view.Formatted() {
		return errUnformatted
	}
	if r.tables[policy] == nil {
		if r.view.Policy(policy) == nil {
			return fmt.Errorf("no policy %d: %w", policy, object.ErrInvalid)
		}
		return fmt.Errorf("%w: policy %d is placed on no node: add a node with disks", object.ErrUnavailable, policy)
	}
	part := &r.tables[policy].source.Partitions[p]
	primary := r.view.Node(part.Primary())
	name := "?"
	if primary != nil {
		name = primary.Name
	}
	return fmt.Errorf("%w: partition %s is held by node %q, which this node cannot reach: start that node", object.ErrUnavailable,
		object.Group{Policy: policy, Partition: p}, name)
}

// unwritable explains why a partition takes no writes.
func (r *routing) unwritable(policy object.PolicyID, p object.Partition) error {
	t := r.tables[policy]
	return fmt.Errorf("%w: partition %s has %d replicas in sync and needs %d: bring nodes back", object.ErrUnavailable,
		object.Group{Policy: policy, Partition: p}, len(t.source.Partitions[p].ISR), t.source.MinInSync)
}

// here lists the groups of a policy, of those given, that this node is the primary of.
func (r *routing) here(policy object.PolicyID, groups []object.Group) []object.Group {
	t := r.tables[policy]
	if t == nil {
		return nil
	}
	return slices.DeleteFunc(slices.Clone(groups), func(g object.Group) bool {
		return g.Policy != policy || int(g.Partition) >= len(t.routes) || !t.routes[g.Partition].here
	})
}
