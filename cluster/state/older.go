package state

import (
	"slices"
)

// Witness says how much of the log nodes have on their disks, by what they say themselves. From then on it is known when
// one comes back with less, with the image of a machine from a backup for instance: it has forgotten what was written
// meanwhile, although it was in sync and has not lost a disk. Those that are other incarnations by now, or down, are left out.
type Witness struct {
	Nodes []Witnessed `json:"nodes"`
}

// Witnessed is what a node says of itself: it has the log up to the entry with this index.
type Witnessed struct {
	Life
	Log uint64 `json:"log"`
}

func (v *View) witness(c *Witness) {
	for i := range c.Nodes {
		w := &c.Nodes[i]
		if n, err := v.life(w.Life); err == nil && n.State == NodeUp {
			v.hasLog(n, w.Log)
		}
	}
}

// hasLog notes how much of the log a node has.
func (v *View) hasLog(n *Node, log uint64) {
	if log > n.Log {
		changed := *n
		changed.Log = log
		v.putNode(&changed)
	}
}

// older reports whether a node that has started has a copy of what it had, from before what it last was known to have. Who has
// none of its disks has nothing that could be taken for what was there.
func (v *View) older(c *Announce) bool {
	n := v.NodeByName(c.Name)
	return n != nil && c.Log > 0 && c.Log < n.Log && slices.ContainsFunc(c.Disks, func(d Disk) bool {
		return slices.Contains(n.Missing, d.ID) || slices.ContainsFunc(n.Disks, func(had Disk) bool { return had.ID == d.ID })
	})
}

// needsOlder reports whether a node that has an older copy once had something that nobody else has. Then that may come back, and
// the copy is not used before somebody has given it up. Where others have everything the node begins anew with what they
// have, as without its disks: see miss.
func (v *View) needsOlder(name string) bool {
	n := v.NodeByName(name)
	if v.alone(n.ID) == 0 {
		return false
	}
	changed := *n
	changed.Older = true
	v.putNode(&changed)
	return true
}

// acceptOlder gives up what is missing in the older copy that a node has.
func (v *View) acceptOlder(n *Node, res *Result) {
	res.Partitions = v.alone(n.ID)
	v.Epoch++
	changed := *n
	changed.Older, changed.Log = false, 0
	v.putNode(&changed)
	v.changeAll(func(p Partition) (Partition, bool) {
		if !p.only(n.ID) {
			return p, false
		}
		p.Lost, p.Restarted = v.Epoch, v.Epoch
		return p, true
	})
}
