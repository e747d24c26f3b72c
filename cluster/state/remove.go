package state

import (
	"slices"
)

// alone counts the partitions that a node, and nobody else, holds.
func (v *View) alone(id NodeID) (count int) {
	for _, p := range v.Policies {
		for i := range p.Partitions {
			if p.Partitions[i].only(id) {
				count++
			}
		}
	}
	return count
}

func (p *Partition) only(id NodeID) bool {
	return len(p.ISR) == 1 && p.ISR[0] == id && len(p.Waiting) == 0
}

// involved counts the partitions that a node is in sync with, or waits to be.
func (v *View) involved(id NodeID) (count int) {
	for _, p := range v.Policies {
		for i := range p.Partitions {
			if q := &p.Partitions[i]; slices.Contains(q.ISR, id) || slices.Contains(q.Waiting, id) {
				count++
			}
		}
	}
	return count
}

func (v *View) remove(c *Remove) error {
	n := v.Node(c.Node)
	if n == nil {
		return refuse(ErrNotFound, "node %d", c.Node)
	}
	involved, alone := v.involved(n.ID), v.alone(n.ID)
	switch {
	case n.State == NodeUp && (len(n.Disks) > 0 || involved > 0):
		return refuse(ErrNeeded, "%q is up and has disks: drain it first", n.Name)
	case alone > 0 && c.Force == "":
		return refuse(ErrNeeded, "%q alone has %d partitions: start it again, or force it by its name, which loses them", n.Name, alone)
	case c.Force != "" && c.Force != n.Name:
		return refuse(ErrInvalid, "node %d is called %q, not %q: nothing was removed", n.ID, n.Name, c.Force)
	}
	v.reshape()
	if alone > 0 {
		if err := v.bequeath(n.ID, 0, false); err != nil {
			return err
		}
	}
	v.nodeGone(n.ID)
	return nil
}

// welcome lets a name be another node's.
func (v *View) welcome(name string) {
	if i := slices.Index(v.Gone, name); i >= 0 {
		v.Epoch++
		v.Gone = slices.Delete(slices.Clone(v.Gone), i, i+1)
	}
}

// nodeGone forgets a node that does not hold anything alone.
func (v *View) nodeGone(id NodeID) {
	i, _ := v.search(id)
	if name := v.Nodes[i].Name; !slices.Contains(v.Gone, name) {
		v.Gone = append(slices.Clip(slices.Clone(v.Gone)), name)
	}
	v.Nodes = slices.Delete(slices.Clone(v.Nodes), i, i+1)
	v.changeAll(func(p Partition) (Partition, bool) {
		touched := p.drop(id)
		if len(p.ISR) == 1 && p.ISR[0] == id { // those that wait have all that was flushed
			p.ISR, p.Waiting, p.Restarted = p.Waiting[:1:1], without(p.Waiting, p.Waiting[0]), v.Epoch
			p.Learners = v.learners(p)
			touched = true
		}
		for _, list := range []*[]NodeID{&p.ISR, &p.Waiting, &p.Targets} {
			if slices.Contains(*list, id) {
				*list, touched = without(*list, id), true
			}
		}
		if len(p.Targets) == 0 {
			p.Targets = slices.Clone(p.ISR) // until they are placed again
		}
		if !touched {
			return p, false
		}
		p.Learners = v.learners(p)
		return settle(v.inherit(p)), true
	})
}

func (v *View) force(c *Force, res *Result) error {
	n := v.Node(c.Node)
	switch {
	case n == nil:
		return refuse(ErrNotFound, "node %d", c.Node)
	case n.Name != c.Name:
		return refuse(ErrInvalid, "node %d is called %q, not %q: nothing was given up", n.ID, n.Name, c.Name)
	case n.State == NodeUp && !c.Absent:
		return refuse(ErrNeeded, "%q is up", n.Name)
	}
	if c.To != 0 {
		to := v.Node(c.To)
		if to == nil {
			return refuse(ErrNotFound, "node %d", c.To)
		}
		if to.State != NodeUp || len(to.Disks) == 0 {
			return refuse(ErrInvalid, "%q is down or has no disks", to.Name)
		}
	}
	if c.Absent && n.Older {
		v.acceptOlder(n, res)
		return nil
	}
	if res.Partitions = v.alone(n.ID); c.Absent {
		res.Partitions = v.absent(n.ID)
	}
	v.Epoch++
	if err := v.bequeath(n.ID, c.To, c.Absent); err != nil {
		return err
	}
	v.forgetMissing(n.ID)
	return nil
}

// bequeath gives the partitions that only one node has to others, which may have little
// of them.
func (v *View) bequeath(from, to NodeID, absent bool) error {
	orphans := 0
	v.changeAll(func(p Partition) (Partition, bool) {
		if !p.only(from) || absent && !p.Absent {
			return p, false
		}
		heir := v.heir(&p, from, to)
		if heir == 0 && p.Absent && v.up(from) {
			heir = from // with nothing
		}
		if heir == 0 {
			orphans++
			return p, false
		}
		p.ISR, p.Absent = []NodeID{heir}, false
		p.Lost, p.Restarted = v.Epoch, v.Epoch
		p.Former = without(p.Former, from)
		p.Learners = v.learners(p)
		return p, true
	})
	if orphans > 0 {
		return refuse(ErrNeeded, "%d partitions have nobody else who could take them: start another of the nodes that shall hold them", orphans)
	}
	return nil
}

// heir is who takes a partition; 0: nobody can.
func (v *View) heir(p *Partition, from, to NodeID) NodeID {
	if to != 0 {
		return to
	}
	for _, id := range joined(p.Learners, p.Targets) {
		if id != from && v.up(id) {
			return id
		}
	}
	return 0
}
