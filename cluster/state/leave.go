package state

import (
	"slices"

	"sheepdog/storage/object"
)

// Leave says that a node is about to stop, and takes it out of some of what it is in sync
// with or learning: while it is up, and answers, its part can be handed over without a
// pause in which nobody may serve. It stays the last member of what only it has. Repeated
// until Result.Partitions is 0 it takes the node out of everything; after that SetNode says
// that it is down. What the node leaves at once has new primaries at once, which need a
// moment each: Most bounds that.
type Leave struct {
	Node        NodeID `json:"node"`
	Incarnation uint64 `json:"incarnation"`
	Most        int    `json:"most"` // partitions; at least 1
}

func (v *View) depart(c *Leave, res *Result) error {
	n, err := v.life(Life{c.Node, c.Incarnation})
	switch {
	case err != nil:
		return err
	case c.Most < 1:
		return refuse(ErrInvalid, "a node leaves at least 1 partition at a time, not %d", c.Most)
	}
	if !n.Leaving {
		leaving := *n
		leaving.Leaving = true
		v.putNode(&leaving)
	}
	v.Epoch++
	for pos := range v.Policies {
		v.change(pos, func(i int, p Partition) (Partition, bool) {
			if res.Partitions == c.Most || !p.left(c.Node) {
				return p, false
			}
			res.Partitions++
			res.Last = &object.Group{Policy: v.Policies[pos].ID, Partition: object.Partition(i)}
			return p, true
		})
	}
	return nil
}

// left takes a node out of the members and learners, and reports whether it was there. The
// last member stays.
func (p *Partition) left(id NodeID) bool {
	learns := slices.Contains(p.Learners, id)
	if learns {
		p.Learners = without(p.Learners, id)
	}
	if !slices.Contains(p.ISR, id) || len(p.ISR) == 1 || p.Undecided() {
		return learns
	}
	p.ISR = without(p.ISR, id)
	return true
}

// joins reports whether a node may begin to take part in a partition.
func (v *View) joins(id NodeID) bool {
	n := v.Node(id)
	return n != nil && n.State == NodeUp && !n.Leaving
}
