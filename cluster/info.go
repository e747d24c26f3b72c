package cluster

import (
	"fmt"
	"slices"
	"time"

	"sheepdog/cluster/internal/replicas"
	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// Info describes the cluster as this node knows it.
type Info struct {
	Formatted     bool            `json:"formatted"`
	ID            string          `json:"id,omitempty"`
	Name          string          `json:"name,omitempty"`
	Created       *time.Time      `json:"created,omitempty"`
	Epoch         uint64          `json:"epoch"`
	Status        string          `json:"status"`           // see the Status constants
	Reason        string          `json:"reason,omitempty"` // why Status is not StatusOK
	Leader        bool            `json:"leader"`           // this node leads
	LeaderNode    string          `json:"leader_node"`      // the name of who leads; "": nobody is known to
	Node          string          `json:"node"`             // this node's name
	NodesUp       int             `json:"nodes_up"`
	NodesDown     int             `json:"nodes_down"`
	Hold          bool            `json:"hold"`      // data is not moved, see Node.Hold
	OutAfter      time.Duration   `json:"out_after"` // negative: never
	Incarnation   uint64          `json:"incarnation"`
	ObjectSize    int64           `json:"object_size,omitempty"` // default, bytes
	DefaultCopies int             `json:"default_copies,omitempty"`
	Policies      []PolicySummary `json:"policies"`
}

// States of the cluster in Info.Status.
const (
	StatusOK          = "ok"
	StatusDegraded    = "degraded"    // some partitions have fewer copies than asked for
	StatusUnavailable = "unavailable" // some partitions cannot be written
	StatusUnformatted = "unformatted"
)

// PolicySummary counts the partitions of a policy.
type PolicySummary struct {
	ID          object.PolicyID `json:"id"`
	Copies      int             `json:"copies"`
	MinInSync   int             `json:"min_in_sync"`
	Partitions  int             `json:"partitions"`
	Degraded    int             `json:"degraded"`    // fewer in sync than Copies
	Unavailable int             `json:"unavailable"` // fewer in sync than MinInSync, or primary down
	Learning    int             `json:"learning"`    // with learners
}

// NodeInfo describes a member.
type NodeInfo struct {
	ID          state.NodeID    `json:"id"`
	Name        string          `json:"name"`
	Address     string          `json:"address"`
	Zone        string          `json:"zone"`
	State       state.NodeState `json:"state"`
	Since       time.Time       `json:"since"`
	Incarnation uint64          `json:"incarnation"`
	Disks       int             `json:"disks"`
	Weight      uint64          `json:"weight"`
	Percent     int             `json:"percent"`  // of Weight that counts for placement
	Drain       bool            `json:"drain"`    // it shall hold nothing, by somebody's wish
	Out         bool            `json:"out"`      // it shall hold nothing, for it has been down for long
	Replicas    int             `json:"replicas"` // partitions it holds in sync
	Primaries   int             `json:"primaries"`
	Targets     int             `json:"targets"`  // partitions that it shall hold
	Learning    int             `json:"learning"` // of those, which it is being brought in sync with
	Leader      bool            `json:"leader"`
	Votes       bool            `json:"votes"`   // it is one of those that decide
	Gateway     bool            `json:"gateway"` // it holds no data
	Self        bool            `json:"self"`
}

// DiskInfo describes a disk of the cluster; its use is known to its node's store.
type DiskInfo struct {
	Node   string `json:"node"`
	ID     string `json:"id"`
	Path   string `json:"path"`
	Weight uint64 `json:"weight"`
}

// PartitionInfo describes one partition.
type PartitionInfo struct {
	Policy    object.PolicyID  `json:"policy"`
	Partition object.Partition `json:"partition"`
	Epoch     uint64           `json:"epoch"`
	InSync    []string         `json:"in_sync"` // names of nodes, the primary first
	Targets   []string         `json:"targets"`
	Learners  []string         `json:"learners"`
}

// Formatted reports whether the node belongs to a cluster.
func (n *Node) Formatted() bool { return n.state.View().Formatted() }

// ClusterID is "" before Format.
func (n *Node) ClusterID() string { return n.state.View().Cluster.ID }

// Incarnation counts the starts of the node in its cluster; 0 before Format.
func (n *Node) Incarnation() uint64 { return n.inc.Load() }

// View is the cluster's agreed state. It never changes.
func (n *Node) View() *state.View { return n.state.View() }

// Ready is nil if the node serves volumes; otherwise it says what is missing.
func (n *Node) Ready() error {
	v := n.routes.Load()
	switch {
	case n.closed.Load():
		return object.ErrClosed
	case !v.view.Formatted():
		return errUnformatted
	case v.tables[v.view.Cluster.DefaultPolicy] == nil:
		return v.unserved(v.view.Cluster.DefaultPolicy, 0)
	}
	return nil
}

// Info describes the cluster.
func (n *Node) Info() Info {
	v := n.state.View()
	i := Info{Node: n.cfg.Name, Incarnation: n.inc.Load(), Status: StatusUnformatted, Policies: []PolicySummary{}}
	if l := n.consensus.Load(); l != nil {
		i.Leader = l.Leading()
	}
	if !v.Formatted() {
		i.Reason = `run "dog cluster format"`
		return i
	}
	c := v.Cluster
	i.Formatted, i.ID, i.Name, i.Created, i.Epoch = true, c.ID, c.Name, &c.Created, uint64(v.Epoch)
	i.ObjectSize = 1 << c.ObjectSizeShift
	i.LeaderNode, i.Hold, i.OutAfter = n.leader(), c.Hold, -1
	if after, ever := c.OutAfter(); ever {
		i.OutAfter = after
	}
	for _, m := range v.Nodes {
		if m.State == state.NodeUp {
			i.NodesUp++
		} else {
			i.NodesDown++
		}
	}
	i.DefaultCopies = n.Copies(c.DefaultPolicy)
	i.Status = StatusOK
	for _, p := range v.Policies {
		s := summarize(v, p)
		i.Policies = append(i.Policies, s)
		switch {
		case s.Unavailable > 0 || s.Partitions == 0:
			i.Status, i.Reason = StatusUnavailable, "too few replicas are in sync: bring nodes back or add nodes with disks"
		case s.Degraded > 0 && i.Status == StatusOK:
			i.Status, i.Reason = StatusDegraded, "there are fewer replicas than copies asked for: bring nodes back or add nodes with disks"
		}
	}
	if n.flock != nil && n.flock.replicas() != nil {
		i.addUnlisted(n.flock.replicas().Unlisted())
	}
	return i
}

// addUnlisted says that nobody serves what this node cannot list and nobody else has.
func (i *Info) addUnlisted(u replicas.Unlisted) {
	if u.Unserved == 0 {
		return
	}
	i.Status = StatusUnavailable
	i.Reason = fmt.Sprintf("nobody serves %d partitions, such as %s: this node is the last that is in sync, and cannot list their objects: %v: repair its disk; "+
		"if that cannot be done, start it without the disk and run \"dog node give-up\"", u.Unserved, u.Example, u.Err)
}

// leader is the name of the node that leads, as far as this one knows.
func (n *Node) leader() string {
	l := n.consensus.Load()
	if l == nil {
		return ""
	}
	name, _ := l.Leader()
	return name
}

// voting is who decides, by name.
func (n *Node) voting() map[string]bool {
	names := map[string]bool{}
	if l := n.consensus.Load(); l != nil {
		for _, s := range l.Servers() {
			names[s.Node] = s.Voter
		}
	}
	return names
}

func summarize(v *state.View, p *state.Policy) PolicySummary {
	s := PolicySummary{ID: p.ID, Copies: p.Copies, MinInSync: p.MinInSync, Partitions: len(p.Partitions)}
	for i := range p.Partitions {
		part := &p.Partitions[i]
		if len(part.ISR) < p.Copies {
			s.Degraded++
		}
		primary := v.Node(part.Primary())
		if len(part.ISR) < p.MinInSync || primary == nil || primary.State != state.NodeUp || part.Absent {
			s.Unavailable++
		}
		if len(part.Learners) > 0 {
			s.Learning++
		}
	}
	return s
}

// NodeList lists the members by number.
func (n *Node) NodeList() []NodeInfo {
	v := n.state.View()
	leader := n.leader()
	list := make([]NodeInfo, len(v.Nodes))
	at := map[state.NodeID]*NodeInfo{}
	votes := n.voting()
	for i, m := range v.Nodes {
		list[i] = NodeInfo{
			ID: m.ID, Name: m.Name, Address: m.Address, Zone: m.Zone, State: m.State, Since: m.Since, Incarnation: m.Incarnation,
			Disks: len(m.Disks), Weight: m.Weight(), Percent: m.Percent, Drain: m.Drain, Out: m.Out,
			Leader: m.Name == leader, Votes: votes[m.Name], Gateway: len(m.Disks) == 0, Self: m.Name == n.cfg.Name,
		}
		orDefault(&list[i].Percent, 100)
		at[m.ID] = &list[i]
	}
	for _, p := range v.Policies {
		for i := range p.Partitions {
			countPartition(&p.Partitions[i], at)
		}
	}
	return list
}

func countPartition(p *state.Partition, at map[state.NodeID]*NodeInfo) {
	count := func(ids []state.NodeID, of func(*NodeInfo) *int) {
		for _, id := range ids {
			if m := at[id]; m != nil {
				*of(m)++
			}
		}
	}
	count(p.ISR[:1], func(m *NodeInfo) *int { return &m.Primaries })
	count(p.ISR, func(m *NodeInfo) *int { return &m.Replicas })
	count(p.Targets, func(m *NodeInfo) *int { return &m.Targets })
	count(p.Learners, func(m *NodeInfo) *int { return &m.Learning })
}

// DiskList lists the disks of all members.
func (n *Node) DiskList() []DiskInfo {
	list := []DiskInfo{}
	for _, m := range n.state.View().Nodes {
		for _, d := range m.Disks {
			list = append(list, DiskInfo{Node: m.Name, ID: d.ID, Path: d.Path, Weight: d.Weight})
		}
	}
	return list
}

// Partitions lists the partitions of a policy; empty if there is no such policy.
func (n *Node) Partitions(policy object.PolicyID) []PartitionInfo {
	v := n.state.View()
	p := v.Policy(policy)
	if p == nil {
		return []PartitionInfo{}
	}
	list := make([]PartitionInfo, len(p.Partitions))
	for i := range p.Partitions {
		list[i] = describe(v, p, object.Partition(i))
	}
	return list
}

// Locate tells which partition an object belongs to, and who holds it.
func (n *Node) Locate(policy object.PolicyID, id object.ID) (PartitionInfo, error) {
	routes := n.routes.Load()
	t := routes.tables[policy]
	if t == nil {
		return PartitionInfo{}, routes.unserved(policy, 0)
	}
	return describe(routes.view, t.source, object.PartitionOf(id, len(t.routes))), nil
}

func describe(v *state.View, p *state.Policy, i object.Partition) PartitionInfo {
	part := &p.Partitions[i]
	names := func(ids []state.NodeID) []string {
		list := make([]string, len(ids))
		for k, id := range ids {
			if m := v.Node(id); m != nil {
				list[k] = m.Name
			}
		}
		return list
	}
	return PartitionInfo{
		Policy: p.ID, Partition: i, Epoch: uint64(part.Epoch),
		InSync: names(part.ISR), Targets: names(part.Targets), Learners: names(part.Learners),
	}
}

// Moving tells which partitions are not held by those, and those alone, that shall hold them.
type Moving struct {
	Partitions int
	Missing    map[state.NodeID]int // partitions that a node shall hold, and is not in sync with
	Leaving    map[state.NodeID]int // partitions that a node is in sync with until others are
}

// Moving tells what is being moved, or waits for nodes that are down.
func (n *Node) Moving() Moving {
	v := n.state.View()
	m := Moving{Missing: map[state.NodeID]int{}, Leaving: map[state.NodeID]int{}}
	for _, p := range v.Policies {
		for i := range p.Partitions {
			m.add(&p.Partitions[i])
		}
	}
	return m
}

func (m *Moving) add(p *state.Partition) {
	moves := false
	for _, id := range p.Targets {
		if !slices.Contains(p.ISR, id) {
			m.Missing[id]++
			moves = true
		}
	}
	for _, id := range p.ISR {
		if !slices.Contains(p.Targets, id) {
			m.Leaving[id]++
			moves = true
		}
	}
	if moves {
		m.Partitions++
	}
}

// Leased reports whether this node may answer from what it knows (INV-R5).
func (n *Node) Leased() bool {
	if n.flock == nil {
		return true
	}
	r := n.flock.replicas()
	return r != nil && r.Leased()
}

// Lapses is even while this node has a lease. If it is the same at two moments, nobody has taken
// this node for gone in between.
func (n *Node) Lapses() uint64 {
	if n.flock == nil {
		return 0
	}
	r := n.flock.replicas()
	if r == nil {
		return 1
	}
	return r.Lapses()
}

// Leading reports whether this node leads the cluster, and so does what one does for all.
func (n *Node) Leading() bool {
	l := n.consensus.Load()
	return l != nil && l.Leading()
}
