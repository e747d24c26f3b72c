package state

import (
	"cmp"
	"slices"
)

// Enroll has nodes that are up begin to learn more of what they shall hold, where the fewest
// are in sync first. Each partition that gets a learner begins a new epoch and serves nobody
// until its members have agreed on that: when a node comes back, that is nearly every partition,
// and clients would wait for all of them. Most bounds how many do so at once, but for those
// that take no writes before they have another member in sync. Repeated until
// Result.Partitions is 0, all are learned.
type Enroll struct {
	Most int `json:"most"` // partitions; at least 1
}

func (v *View) enrollMore(c *Enroll, res *Result) error {
	if c.Most < 1 {
		return refuse(ErrInvalid, "nodes begin to learn at least 1 partition at a time, not %d", c.Most)
	}
	if v.Enrolled() {
		return nil
	}
	v.Epoch++
	res.Partitions = v.enroll(c.Most)
	return nil
}

// Enrolled reports whether every node that is up learns all that it shall hold and is not in
// sync with.
func (v *View) Enrolled() bool {
	for _, policy := range v.Policies {
		for i := range policy.Partitions {
			if v.lacksLearner(&policy.Partitions[i]) {
				return false
			}
		}
	}
	return true
}

func (v *View) lacksLearner(p *Partition) bool {
	return slices.ContainsFunc(p.Targets, func(id NodeID) bool {
		return !slices.Contains(p.ISR, id) && !slices.Contains(p.Learners, id) && !slices.Contains(p.Waiting, id) && v.joins(id)
	})
}

// enroll gives partitions their learners, and reports how many; 0 stands for all.
func (v *View) enroll(most int) int {
	type place struct {
		pos, i  int
		starved bool // it takes no writes
		copies  int
	}
	var list []place
	starved := 0
	for pos, policy := range v.Policies {
		for i := range policy.Partitions {
			p := &policy.Partitions[i]
			if !v.lacksLearner(p) {
				continue
			}
			list = append(list, place{pos, i, len(p.ISR) < policy.MinInSync, len(p.ISR)})
			if list[len(list)-1].starved {
				starved++
			}
		}
	}
	rank := func(x place) int {
		if x.starved {
			return 0
		}
		return x.copies
	}
	slices.SortStableFunc(list, func(a, b place) int { return cmp.Compare(rank(a), rank(b)) })
	if most > 0 {
		list = list[:min(len(list), max(most, starved))]
	}
	chosen := make([]map[int]bool, len(v.Policies))
	for _, x := range list {
		if chosen[x.pos] == nil {
			chosen[x.pos] = map[int]bool{}
		}
		chosen[x.pos][x.i] = true
	}
	for pos := range v.Policies {
		v.change(pos, func(i int, p Partition) (Partition, bool) {
			if !chosen[pos][i] {
				return p, false
			}
			p.Learners = v.learners(p)
			return v.inherit(p), true
		})
	}
	return len(list)
}
