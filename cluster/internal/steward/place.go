package steward

import (
	"slices"

	"sheepdog/cluster/internal/placement"
	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// place proposes targets for one policy, if some are not what they should be.
func (r *round) place() {
	nodes := r.candidates()
	r.observe(nodes)
	if len(nodes) == 0 {
		return
	}
	settled := r.settled()
	for _, p := range r.v.Policies {
		if r.s.tries[p.ID] >= maxTries || (!settled || r.v.Cluster.Hold) && len(p.Partitions) > 0 {
			continue
		}
		if c := Place(r.v, p, nodes); c != nil {
			r.s.tries[p.ID]++
			r.note("", "partitions are placed", "nodes or their weights have changed")
			r.Commands = append(r.Commands, state.Command{SetTargets: c})
			return
		}
		r.s.tries[p.ID] = maxTries
	}
}

// maxTries bounds how often a policy is placed for the same nodes: a proposal may be void
// because something has changed meanwhile, but then the nodes mostly are others, too.
const maxTries = 10

// candidates are the nodes that shall hold data: those that are up, and those that hold
// some and are not out.
func (r *round) candidates() []placement.Node {
	s := r.s
	if s.holders == nil || s.shape != r.v.Shape {
		s.holders, s.shape = holders(r.v), r.v.Shape
	}
	var list []placement.Node
	for _, n := range r.v.Nodes {
		if w := n.Share(); w > 0 && (n.State == state.NodeUp || s.holders[n.ID]) {
			list = append(list, placement.Node{ID: uint16(n.ID), Weight: w, Zone: n.Zone})
		}
	}
	return list
}

// holders are all targets.
func holders(v *state.View) map[state.NodeID]bool {
	m := map[state.NodeID]bool{}
	for _, p := range v.Policies {
		for i := range p.Partitions {
			for _, id := range p.Partitions[i].Targets {
				m[id] = true
			}
		}
	}
	return m
}

// observe notes when the candidates change.
func (r *round) observe(nodes []placement.Node) {
	s := r.s
	if s.tries != nil && slices.Equal(nodes, s.seen) {
		return
	}
	if s.tries == nil {
		s.first, s.joined = r.now, true // nobody knows what has happened before
	}
	for _, n := range nodes {
		if !slices.ContainsFunc(s.seen, func(o placement.Node) bool { return o.ID == n.ID }) {
			if !s.joined {
				s.first, s.joined = r.now, true
			}
			s.changed = r.now
		}
	}
	s.seen, s.tries = nodes, map[object.PolicyID]int{}
}

// settled reports whether no node has joined for a while.
func (r *round) settled() bool {
	s := r.s
	if s.joined && r.now.Sub(s.changed) < s.opt.Settle && r.now.Sub(s.first) < patience*s.opt.Settle {
		return false
	}
	s.joined = false
	return true
}

// Place returns the command that brings a policy's partitions to nodes, nil if they are
// where they should be.
func Place(v *state.View, p *state.Policy, nodes []placement.Node) *state.SetTargets {
	previous := make([][]uint16, len(p.Partitions))
	for i := range p.Partitions {
		for _, id := range p.Partitions[i].Targets {
			previous[i] = append(previous[i], uint16(id))
		}
	}
	wanted := placement.Compute(placement.Input{
		Nodes: nodes, Copies: p.Copies, Partitions: v.Cluster.Partitions, Seed: uint64(p.ID), Previous: previous,
	})
	c := &state.SetTargets{Policy: p.ID, Since: v.Epoch, Targets: make([][]state.NodeID, len(wanted))}
	changed := false
	for i, w := range wanted {
		targets := make([]state.NodeID, len(w))
		for k, id := range w {
			targets[k] = state.NodeID(id)
		}
		if len(p.Partitions) == 0 || !slices.Equal(targets, p.Partitions[i].Targets) {
			c.Targets[i], changed = targets, true
		}
	}
	if !changed {
		return nil
	}
	return c
}
