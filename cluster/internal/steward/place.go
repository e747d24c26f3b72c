package steward

import (
	"slices"
	"time"

	"sheepdog/cluster/internal/placement"
	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// place proposes targets for one policy, if some are not what they should be: for a new policy
// all at once, else some at a time. A partition that gets other targets begins a new epoch and
// serves nobody until its members have agreed on that; if thousands do so together, each waits
// for all.
func (r *round) place() {
	s := r.s
	nodes := r.candidates()
	r.observe(nodes)
	if len(nodes) == 0 {
		return
	}
	settled := r.settled()
	for _, p := range r.v.Policies {
		first := len(p.Partitions) == 0
		waits := !settled || r.v.Cluster.Hold || r.now.Sub(s.moved) < movePause
		if waits && !first || s.placed[p.ID] {
			continue
		}
		plan := s.plans[p.ID]
		if plan == nil {
			if s.tries[p.ID] >= maxTries {
				continue
			}
			s.tries[p.ID]++
			plan = Compute(r.v, p, nodes)
			s.plans[p.ID] = plan
			r.note("", "partitions are placed", "nodes or their weights have changed")
		}
		most := s.opt.Moves
		if first {
			most = len(plan)
		}
		if c, more := Moves(r.v, p, plan, most); c != nil {
			if more {
				s.moved = r.now
			}
			r.Commands = append(r.Commands, state.Command{SetTargets: c})
			return
		}
		s.placed[p.ID] = true
	}
}

const (
	// maxTries bounds how often a policy is placed for the same nodes.
	maxTries = 10
	// movePause is the pause after partitions have got other targets or learners: all 4096 of a
	// policy take three seconds if they do so 128 at a time.
	movePause = 100 * time.Millisecond
)

// enroll has nodes that came up learn more of what they shall hold: see state.Enroll. It goes
// before other targets, for it makes good what is missing.
func (r *round) enroll() {
	s := r.s
	if s.learned == r.v.Epoch || r.now.Sub(s.moved) < movePause {
		return
	}
	if r.v.Enrolled() {
		s.learned = r.v.Epoch
		return
	}
	s.moved = r.now
	r.Commands = append(r.Commands, state.Command{Enroll: &state.Enroll{Most: s.opt.Moves}})
}

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
	s.plans, s.placed = map[object.PolicyID][][]state.NodeID{}, map[object.PolicyID]bool{}
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
	c, _ := Moves(v, p, Compute(v, p, nodes), v.Cluster.Partitions)
	return c
}

// Compute tells who of nodes should hold the partitions of a policy.
func Compute(v *state.View, p *state.Policy, nodes []placement.Node) [][]state.NodeID {
	previous := make([][]uint16, len(p.Partitions))
	for i := range p.Partitions {
		for _, id := range p.Partitions[i].Targets {
			previous[i] = append(previous[i], uint16(id))
		}
	}
	wanted := placement.Compute(placement.Input{
		Nodes: nodes, Copies: p.Copies, Partitions: v.Cluster.Partitions, Seed: uint64(p.ID), Previous: previous,
	})
	plan := make([][]state.NodeID, len(wanted))
	for i, w := range wanted {
		for _, id := range w {
			plan[i] = append(plan[i], state.NodeID(id))
		}
	}
	return plan
}

// Moves returns the command that gives partitions of a policy, most of them at most, the
// targets that a plan has for them, and whether there are more; nil if they all have them.
func Moves(v *state.View, p *state.Policy, plan [][]state.NodeID, most int) (c *state.SetTargets, more bool) {
	moves := 0
	for i, targets := range plan {
		if len(p.Partitions) > 0 && slices.Equal(targets, p.Partitions[i].Targets) {
			continue
		}
		if moves++; moves > most {
			return c, true
		}
		if c == nil {
			c = &state.SetTargets{Policy: p.ID, Since: v.Epoch, Targets: make([][]state.NodeID, len(plan))}
		}
		c.Targets[i] = targets
	}
	return c, false
}
