package state

import (
	"slices"

	"sheepdog/storage/object"
)

// miss takes a node that has started out of the partitions that were on a disk that is
// missing. Where it is the last member it stays that, and the partition is absent; who
// waited for it has all that was flushed, and takes over. With the disk back, it is there
// again.
// A disk that it says is missing and was emptied before, which it may not have known yet, is not
// missed. Of an older copy nothing counts; see older.
func (v *View) miss(id NodeID, c *Announce, older bool) {
	partial := c.Partial && len(v.Node(id).Missing) > 0 || older
	held := make(map[object.Group]bool, len(c.Held))
	for _, g := range c.Held {
		held[g] = !older
	}
	for pos := range v.Policies {
		v.change(pos, func(i int, p Partition) (Partition, bool) {
			g := object.Group{Policy: v.Policies[pos].ID, Partition: object.Partition(i)}
			switch there := !partial || held[g]; {
			case there && p.Absent && p.ISR[0] == id:
				p.Absent = false
				return p, true
			case there || !slices.Contains(p.ISR, id) && !slices.Contains(p.Waiting, id):
				return p, false
			case slices.Contains(p.Waiting, id):
				p.Waiting = without(p.Waiting, id)
			case len(p.ISR) > 1:
				p.ISR = without(p.ISR, id)
			case len(p.Waiting) > 0:
				p.ISR, p.Waiting, p.Restarted = p.Waiting[:1:1], without(p.Waiting, p.Waiting[0]), v.Epoch
			default:
				p.Absent = true
			}
			return p, true
		})
	}
	v.forgetMissing(id)
}

// forgetMissing forgets the missing disks of a node that nothing is waited for from.
func (v *View) forgetMissing(id NodeID) {
	n := v.Node(id)
	if len(n.Missing) == 0 || v.absent(id) > 0 {
		return
	}
	changed := *n
	changed.Missing = nil
	v.putNode(&changed)
}

// absent counts the partitions that are on missing disks of a node.
func (v *View) absent(id NodeID) (count int) {
	for _, p := range v.Policies {
		for i := range p.Partitions {
			if q := &p.Partitions[i]; q.Absent && q.ISR[0] == id {
				count++
			}
		}
	}
	return count
}
