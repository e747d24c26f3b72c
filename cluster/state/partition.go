package state

import (
	"slices"
)

// change replaces partitions of a policy: fn returns the new content of one, or false
// to leave it. What fn returns gets the current epoch.
func (v *View) change(pos int, fn func(i int, p Partition) (Partition, bool)) {
	old := v.Policies[pos]
	var parts []Partition
	for i, p := range old.Partitions {
		changed, ok := fn(i, p)
		if !ok {
			continue
		}
		if parts == nil {
			parts = slices.Clone(old.Partitions)
		}
		changed.Epoch = v.Epoch
		if was := p.Primary(); was != changed.Primary() && v.up(was) && !slices.Contains(changed.Former, was) {
			changed.Former = with(changed.Former, was)
		}
		changed.Former = without(changed.Former, changed.Primary())
		parts[i] = changed
	}
	if parts != nil {
		v.putPartitions(pos, parts)
	}
}

func (v *View) changeAll(fn func(p Partition) (Partition, bool)) {
	for pos := range v.Policies {
		v.change(pos, func(_ int, p Partition) (Partition, bool) { return fn(p) })
	}
}

func (v *View) up(id NodeID) bool {
	n := v.Node(id)
	return n != nil && n.State == NodeUp
}

func (v *View) putPartitions(pos int, parts []Partition) {
	policy := *v.Policies[pos]
	policy.Partitions = parts
	policy.MinInSync = max(policy.MinInSync, min(WantedInSync(policy.Copies), fewest(parts)))
	v.Policies = slices.Clone(v.Policies)
	v.Policies[pos] = &policy
}

// fewest is the size of the smallest in-sync set.
func fewest(parts []Partition) int {
	n := MaxCopies
	for i := range parts {
		n = min(n, len(parts[i].ISR))
	}
	return n
}

// leave takes nodes that are down out of everything they were in sync with or learning,
// one after the other: the last member stays, with a new epoch.
func (v *View) leave(ids []NodeID) {
	v.changeAll(func(p Partition) (Partition, bool) {
		touched := false
		for _, id := range ids {
			if slices.Contains(p.ISR, id) {
				touched = true
				if len(p.ISR) > 1 {
					p.ISR = without(p.ISR, id)
				}
			}
			touched = p.drop(id) || touched
		}
		if !touched {
			return p, false
		}
		return v.inherit(p), true
	})
}

// drop takes a node out of the learners and the former primaries.
func (p *Partition) drop(id NodeID) bool {
	if !slices.Contains(p.Learners, id) && !slices.Contains(p.Former, id) {
		return false
	}
	p.Learners, p.Former = without(p.Learners, id), without(p.Former, id)
	return true
}

// restart deals with members that are other incarnations now: see the package comment. A
// nil alive says that all others live.
func (v *View) restart(ids []NodeID, alive func(NodeID) bool) {
	started := map[NodeID]bool{}
	for _, id := range ids {
		started[id] = true
	}
	v.changeAll(func(p Partition) (Partition, bool) {
		touched := false
		for _, id := range ids {
			touched = p.drop(id) || touched
		}
		var back, others []NodeID
		for _, id := range p.ISR {
			if started[id] {
				back = append(back, id)
			} else {
				others = append(others, id)
			}
		}
		switch {
		case len(back) == 0:
			return p, touched
		case len(others) > 0 && (alive == nil || slices.ContainsFunc(others, alive)):
			p.ISR, p.Waiting = others, nil
			p.Learners = v.learners(p)
			return p, true
		case len(others) > 0:
			p.ISR, p.Waiting = others, joined(p.Waiting, back)
		default:
			p.Restarted = v.Epoch
			p.ISR, p.Waiting = back[:1:1], joined(p.Waiting, back[1:])
		}
		return v.inherit(p), true
	})
}

// inherit gives an undecided partition to one of those that wait, once no member is up.
func (v *View) inherit(p Partition) Partition {
	if len(p.Waiting) == 0 || slices.ContainsFunc(p.ISR, v.up) {
		return p
	}
	for _, id := range joined(p.Targets, p.Waiting) {
		if slices.Contains(p.Waiting, id) && v.up(id) {
			p.ISR, p.Waiting, p.Restarted = []NodeID{id}, nil, v.Epoch
			p.Learners = v.learners(p)
			return p
		}
	}
	return p
}

// learners are the targets that are up and are to be brought in sync.
func (v *View) learners(p Partition) []NodeID {
	var list []NodeID
	for _, id := range joined(p.Learners, p.Targets) {
		if v.joins(id) && slices.Contains(p.Targets, id) && !slices.Contains(p.ISR, id) && !slices.Contains(p.Waiting, id) {
			list = append(list, id)
		}
	}
	return list
}

// confirm ends the doubt about partitions with members that live.
func (v *View) confirm(live func(NodeID) bool) {
	v.changeAll(func(p Partition) (Partition, bool) {
		if len(p.Waiting) == 0 || !slices.ContainsFunc(p.ISR, live) {
			return p, false
		}
		p.Waiting = nil
		p.Learners = v.learners(p)
		return p, true
	})
}

// enter gives a new epoch to what nodes that came up are in sync with, for its primary starts
// anew, and has them learn what else they shall hold, as far as that goes at once.
func (v *View) enter(ids []NodeID, most int) {
	came := func(id NodeID) bool { return slices.Contains(ids, id) }
	v.changeAll(func(p Partition) (Partition, bool) {
		member := slices.ContainsFunc(p.ISR, came)
		if member {
			p.Waiting = nil // the member was not away, or has started like the others
		}
		if !member && !slices.ContainsFunc(p.Waiting, came) {
			return p, false
		}
		p.Learners = v.learners(p)
		return v.inherit(p), true
	})
	v.enroll(most)
}

func (v *View) setTargets(c *SetTargets) error {
	pos := slices.IndexFunc(v.Policies, func(p *Policy) bool { return p.ID == c.Policy })
	switch {
	case pos < 0:
		return refuse(ErrNotFound, "policy %d", c.Policy)
	case c.Since < v.Shape || c.Since > v.Epoch:
		return refuse(ErrStale, "placement was computed at epoch %d, now it is %d", c.Since, v.Epoch)
	case len(c.Targets) != v.Cluster.Partitions:
		return refuse(ErrInvalid, "targets for %d partitions, there are %d", len(c.Targets), v.Cluster.Partitions)
	}
	for i, targets := range c.Targets {
		if err := v.checkTargets(i, targets, v.Policies[pos]); err != nil {
			return err
		}
	}
	v.reshape()
	if len(v.Policies[pos].Partitions) == 0 {
		v.firstTargets(pos, c.Targets)
		return nil
	}
	v.change(pos, func(i int, p Partition) (Partition, bool) {
		if c.Targets[i] == nil || slices.Equal(c.Targets[i], p.Targets) {
			return p, false
		}
		return v.retarget(p, slices.Clone(c.Targets[i])), true
	})
	return nil
}

// retarget says who shall hold a partition.
func (v *View) retarget(p Partition, targets []NodeID) Partition {
	p.Targets, p.Learners = targets, nil
	p.Learners = v.learners(p)
	return settle(p)
}

func (v *View) checkTargets(i int, targets []NodeID, policy *Policy) error {
	if targets == nil {
		if len(policy.Partitions) == 0 {
			return refuse(ErrInvalid, "the first placement of policy %d has no targets for partition %d", policy.ID, i)
		}
		return nil
	}
	if len(targets) == 0 || len(targets) > policy.Copies {
		return refuse(ErrInvalid, "partition %d has %d targets: must be from 1 to %d", i, len(targets), policy.Copies)
	}
	for k, id := range targets {
		if n := v.Node(id); n == nil || n.Weight() == 0 {
			return refuse(ErrNotFound, "target %d of partition %d is no node with disks", id, i)
		}
		if slices.Contains(targets[:k], id) {
			return refuse(ErrInvalid, "node %d is twice a target of partition %d", id, i)
		}
	}
	return nil
}

// firstTargets makes a policy's table: nothing was ever written, so all are in sync
// that are up. If none is, the first target is the last member.
func (v *View) firstTargets(pos int, targets [][]NodeID) {
	parts := make([]Partition, len(targets))
	for i, t := range targets {
		p := Partition{Epoch: v.Epoch, Targets: slices.Clone(t)}
		for _, id := range t {
			if v.joins(id) {
				p.ISR = append(p.ISR, id)
			}
		}
		if len(p.ISR) == 0 {
			p.ISR = slices.Clone(t[:1])
		}
		parts[i] = p
	}
	v.putPartitions(pos, parts)
}

func (v *View) changeISR(c *ChangeISR) error {
	pos, err := v.mayChangeISR(c)
	if err != nil {
		return err
	}
	v.Epoch++
	v.change(pos, func(i int, p Partition) (Partition, bool) {
		if i != int(c.Partition) {
			return p, false
		}
		return v.changed(p, c), true
	})
	return nil
}

func (v *View) changeISRs(c *ChangeISRs, res *Result) error {
	if len(c.Changes) == 0 || len(c.Changes) > MaxChanges {
		return refuse(ErrInvalid, "%d changes at a time: must be 1 to %d", len(c.Changes), MaxChanges)
	}
	possible := make([]map[int]*ChangeISR, len(v.Policies)) // by partition
	var refused error
	for k := range c.Changes {
		one := &c.Changes[k]
		pos, err := v.mayChangeISR(one)
		if err != nil {
			if refused == nil {
				refused = err
			}
			continue
		}
		if possible[pos] == nil {
			possible[pos] = map[int]*ChangeISR{}
		}
		if possible[pos][int(one.Partition)] == nil {
			possible[pos][int(one.Partition)] = one
			res.Partitions++
		}
	}
	if res.Partitions == 0 {
		return refused
	}
	v.Epoch++
	for pos, changes := range possible {
		if len(changes) == 0 {
			continue
		}
		v.change(pos, func(i int, p Partition) (Partition, bool) {
			one := changes[i]
			if one == nil {
				return p, false
			}
			return v.changed(p, one), true
		})
	}
	return nil
}

// mayChangeISR finds the policy of a change that is possible.
func (v *View) mayChangeISR(c *ChangeISR) (pos int, err error) {
	pos = slices.IndexFunc(v.Policies, func(p *Policy) bool { return p.ID == c.Policy })
	if pos < 0 || int(c.Partition) >= len(v.Policies[pos].Partitions) {
		return pos, refuse(ErrNotFound, "partition %d of policy %d", c.Partition, c.Policy)
	}
	p := &v.Policies[pos].Partitions[c.Partition]
	switch {
	case p.Epoch != c.Epoch:
		return pos, refuse(ErrStale, "partition is at epoch %d, not %d", p.Epoch, c.Epoch)
	case p.Undecided():
		return pos, refuse(ErrInvalid, "it is not decided yet who holds the partition")
	case c.Renew && (c.Add != 0 || c.Remove != 0), !c.Renew && (c.Add == 0) == (c.Remove == 0):
		return pos, refuse(ErrInvalid, "either a member is added or one is removed, or a new epoch begins")
	case c.Add != 0 && !slices.Contains(p.Learners, c.Add):
		return pos, refuse(ErrInvalid, "node %d is no learner", c.Add)
	case c.Add != 0 && !v.up(p.Primary()):
		return pos, refuse(ErrInvalid, "the primary, node %d, is down: nobody can tell that another member is in sync", p.Primary())
	case c.Remove != 0 && !slices.Contains(p.ISR, c.Remove) && !slices.Contains(p.Learners, c.Remove):
		return pos, refuse(ErrInvalid, "node %d is neither in sync nor learning", c.Remove)
	case c.Remove != 0 && len(p.ISR) == 1 && p.ISR[0] == c.Remove:
		return pos, refuse(ErrInvalid, "node %d is the last member and stays it", c.Remove)
	}
	return pos, nil
}

// changed is a partition after a possible change.
func (v *View) changed(p Partition, c *ChangeISR) Partition {
	if c.Add != 0 {
		p.Former = nil // only a primary that serves adds members
		p.ISR, p.Learners = with(p.ISR, c.Add), without(p.Learners, c.Add)
		return settle(p)
	}
	if c.Renew || slices.Contains(p.Learners, c.Remove) {
		return p // with a new epoch, in which it is added no more by what was proposed before
	}
	p.ISR = without(p.ISR, c.Remove)
	// It starts over as a learner, for it still shall hold the partition.
	if v.joins(c.Remove) && slices.Contains(p.Targets, c.Remove) {
		p.Learners = with(p.Learners, c.Remove)
	}
	return p
}

// settle ends a movement: when all targets are in sync, they and nobody else hold the
// partition, in the order that placement wanted.
func settle(p Partition) Partition {
	for _, id := range p.Targets {
		if !slices.Contains(p.ISR, id) {
			return p
		}
	}
	p.ISR, p.Learners = slices.Clone(p.Targets), nil
	return p
}

func without(list []NodeID, id NodeID) []NodeID {
	out := make([]NodeID, 0, len(list))
	for _, n := range list {
		if n != id {
			out = append(out, n)
		}
	}
	if len(out) == 0 {
		return nil
	}
	return out
}

func with(list []NodeID, id NodeID) []NodeID {
	return append(slices.Clip(slices.Clone(list)), id)
}

// joined is one list behind the other, each node once; nil if there is none.
func joined(a, b []NodeID) []NodeID {
	var out []NodeID
	for _, list := range [][]NodeID{a, b} {
		for _, id := range list {
			if !slices.Contains(out, id) {
				out = append(out, id)
			}
		}
	}
	return out
}
