package state

import (
	"slices"
	"time"

	"sheepdog/storage/object"
)

// NodeID numbers the nodes of a cluster, from 1; 0 is no node. It is never given again.
type NodeID uint16

// Epoch numbers the versions of the cluster map.
type Epoch uint64

// View is the state after some command. It and all it points to never change.
type View struct {
	Cluster Cluster `json:"cluster"`
	Epoch   Epoch   `json:"epoch"`
	// Shape is the epoch of the last change of nodes or targets: what a placement is
	// computed from.
	Shape    Epoch     `json:"shape"`
	LastNode NodeID    `json:"last_node"` // highest ever given
	Nodes    []*Node   `json:"nodes"`     // ascending by ID
	Policies []*Policy `json:"policies"`  // ascending by ID
	// Gone are names of nodes that were removed, until Welcome: whoever still goes by one is
	// no member of anything.
	Gone []string `json:"gone,omitempty"`
}

// Cluster is what format made.
type Cluster struct {
	ID              string          `json:"id"` // "" = not formatted
	Name            string          `json:"name"`
	Created         time.Time       `json:"created"`
	Partitions      int             `json:"partitions"` // of each policy, a power of two
	ObjectSizeShift uint8           `json:"object_size_shift"`
	DefaultPolicy   object.PolicyID `json:"default_policy"`
	// OutAfterSeconds is how long a node may be down before its data is brought elsewhere;
	// 0 stands for DefaultOutAfter, a negative number for never.
	OutAfterSeconds int64 `json:"out_after,omitempty"`
	// Hold: partitions stay where they shall be, whatever becomes of nodes and weights.
	Hold bool `json:"hold,omitempty"`
}

// DefaultOutAfter is how long a node may be down unless somebody chose otherwise.
const DefaultOutAfter = 10 * time.Minute

// OutAfter is how long a node may be down before its data is brought elsewhere; false:
// for ever.
func (c *Cluster) OutAfter() (time.Duration, bool) {
	if c.OutAfterSeconds == 0 {
		return DefaultOutAfter, true
	}
	return time.Duration(c.OutAfterSeconds) * time.Second, c.OutAfterSeconds > 0
}

// NodeState says whether a node takes part.
type NodeState string

// States of a node.
const (
	NodeUp   NodeState = "up"
	NodeDown NodeState = "down"
)

// Node is a member of the cluster.
type Node struct {
	ID          NodeID    `json:"id"`
	Name        string    `json:"name"` // unique
	Address     string    `json:"address"`
	Zone        string    `json:"zone"`
	Incarnation uint64    `json:"incarnation"` // counts its starts
	State       NodeState `json:"state"`
	Since       time.Time `json:"since"`            // of State
	Turned      Epoch     `json:"turned,omitempty"` // in which State began
	Disks       []Disk    `json:"disks"`            // none: a gateway
	// Leaving: it is about to stop, and takes part in nothing more until it has started anew.
	Leaving bool `json:"leaving,omitempty"`
	// Missing are disks that it once had and has not, by their ids, as long as something may
	// be on them that nobody else has.
	Missing []string `json:"missing,omitempty"`
	// Log is how much of the log it certainly had on its disk, see Witness. Older: it has started with
	// less, and alone had something; it has no part in anything until it is back with all, or Force.
	Log   uint64 `json:"log,omitempty"`
	Older bool   `json:"older,omitempty"`
	// Drain: it shall hold nothing, by somebody's wish.
	Drain bool `json:"drain,omitempty"`
	// Out: it shall hold nothing, for it has been down for long. It ends when the node is up.
	Out bool `json:"out,omitempty"`
	// Percent of its weight that counts for placement; 0 stands for 100.
	Percent int `json:"percent,omitempty"`
}

// Disk is a disk of a node.
type Disk struct {
	ID     string `json:"id"`
	Path   string `json:"path"`
	Weight uint64 `json:"weight"` // share of the data; its size in MiB unless somebody chose otherwise
}

// Lacks reports whether a disk that the node had is not among those given: then it says
// what it holds when it announces itself.
func (n *Node) Lacks(disks []Disk) bool { return len(n.lacks(disks)) > 0 }

func (n *Node) lacks(disks []Disk) (ids []string) {
	add := func(id string) {
		if !slices.Contains(ids, id) && !slices.ContainsFunc(disks, func(d Disk) bool { return d.ID == id }) {
			ids = append(ids, id)
		}
	}
	for _, id := range n.Missing {
		add(id)
	}
	for _, d := range n.Disks {
		add(d.ID)
	}
	return ids
}

// Weight is the sum of the weights of the node's disks. 0: it holds no data.
func (n *Node) Weight() (w uint64) {
	for _, d := range n.Disks {
		w += d.Weight
	}
	return w
}

// Share is the weight that counts for placement. 0: it shall hold no data.
func (n *Node) Share() float64 {
	switch {
	case n.Drain || n.Out:
		return 0
	case n.Percent == 0:
		return float64(n.Weight())
	}
	return float64(n.Weight()) * float64(n.Percent) / 100
}

// Policy is a kind of redundancy, with a partition table of its own.
type Policy struct {
	ID     object.PolicyID `json:"id"`
	Copies int             `json:"copies"`
	// MinInSync is how many replicas must hold a write before it is acknowledged
	// (INV-R4). It begins with 1 and rises to what Copies asks for as soon as every
	// partition has that many members in sync; it never falls. So a young cluster
	// with fewer nodes than copies works, and one that once was able to keep two
	// copies never acknowledges less.
	MinInSync int `json:"min_in_sync"`
	// Partitions is empty until the first placement.
	Partitions []Partition `json:"partitions"`
}

// Partition says who holds a partition. The slices are never changed in place.
type Partition struct {
	Epoch    Epoch    `json:"e"`
	ISR      []NodeID `json:"i"`           // in sync, primary first; never empty
	Targets  []NodeID `json:"t"`           // who shall hold it, the wanted primary first
	Learners []NodeID `json:"l,omitempty"` // targets that are up and not in sync yet
	// Former were primaries since one was last known to serve, and are up: they may not
	// know yet that they are none any more, so the primary waits until each has said so.
	Former []NodeID `json:"f,omitempty"`
	// Waiting were members and have started anew when nobody knew of another member that
	// lives: see the package comment. While there are any, the partition is undecided.
	Waiting []NodeID `json:"w,omitempty"`
	// Absent: the last member has come back without the disk that has the partition. It stays
	// the last member; nobody serves until the disk is back or is given up, see Force.
	Absent bool `json:"a,omitempty"`
	// Restarted is when the last of the members came back as another incarnation: what was
	// acknowledged before, and not made durable, may be lost. No mark of an earlier epoch
	// says anything about the content that the partition has since then.
	Restarted Epoch `json:"r,omitempty"`
	// Lost is when somebody gave the partition to a node that was not in sync: what was
	// acknowledged before may be lost.
	Lost Epoch `json:"x,omitempty"`
}

// Undecided reports whether it is not known yet who holds the partition: nodes stay with
// what they knew of it before, and do not take this as a new epoch.
func (p *Partition) Undecided() bool { return len(p.Waiting) > 0 || p.Absent }

// Primary is the node that takes the partition's writes.
func (p *Partition) Primary() NodeID { return p.ISR[0] }

// WantedInSync is what MinInSync of a policy rises to: 1 up to 2 copies, else 2.
func WantedInSync(copies int) int {
	if copies <= 2 {
		return 1
	}
	return 2
}

// Formatted reports whether there is a cluster.
func (v *View) Formatted() bool { return v.Cluster.ID != "" }

// Node returns a node by its number, nil if there is none.
func (v *View) Node(id NodeID) *Node {
	i, ok := v.search(id)
	if !ok {
		return nil
	}
	return v.Nodes[i]
}

// Removed reports whether a number was given to a node that is in the cluster no more. It
// may be false although it is so, as long as this state is behind, but never the other way.
func (v *View) Removed(id NodeID) bool {
	return id != 0 && id <= v.LastNode && v.Node(id) == nil
}

func (v *View) search(id NodeID) (int, bool) {
	return slices.BinarySearchFunc(v.Nodes, id, func(n *Node, id NodeID) int { return int(n.ID) - int(id) })
}

// NodeByName returns a node by its name, nil if there is none.
func (v *View) NodeByName(name string) *Node {
	for _, n := range v.Nodes {
		if n.Name == name {
			return n
		}
	}
	return nil
}

// Policy returns a policy by its number, nil if there is none.
func (v *View) Policy(id object.PolicyID) *Policy {
	for _, p := range v.Policies {
		if p.ID == id {
			return p
		}
	}
	return nil
}

// PolicyOf returns the policy that keeps the given number of copies, nil if there is none yet.
func (v *View) PolicyOf(copies int) *Policy {
	for _, p := range v.Policies {
		if p.Copies == copies {
			return p
		}
	}
	return nil
}

// UndecidedMembers are the members of partitions that are undecided: one of them that
// lives ends that.
func (v *View) UndecidedMembers() (ids []NodeID) {
	for _, p := range v.Policies {
		for i := range p.Partitions {
			q := &p.Partitions[i]
			if len(q.Waiting) == 0 {
				continue
			}
			for _, id := range q.ISR {
				if !slices.Contains(ids, id) {
					ids = append(ids, id)
				}
			}
		}
	}
	return ids
}
