package state

import (
	"slices"
)

// reshape begins a new epoch in which nodes or targets change.
func (v *View) reshape() {
	v.Epoch++
	v.Shape = v.Epoch
}

func (v *View) announce(c *Announce, res *Result) error {
	if err := v.mayAnnounce(c); err != nil {
		return err
	}
	v.reshape()
	res.Node, res.Incarnation = v.started(c)
	v.miss(res.Node, c, false)
	v.restart([]NodeID{res.Node}, nil)
	return nil
}

// announceAll takes those that are valid; it is refused if none is. Of those that are Older now it gives no life.
func (v *View) announceAll(c *AnnounceAll, res *Result) error {
	if len(c.Nodes) == 0 || len(c.Nodes) > MaxNodes {
		return refuse(ErrInvalid, "%d nodes announced at a time: must be 1 to %d", len(c.Nodes), MaxNodes)
	}
	live := v.lives(c.Live)
	v.reshape()
	var ids []NodeID
	var refused error
	res.Nodes = make([]Life, len(c.Nodes))
	for i := range c.Nodes {
		a := &c.Nodes[i]
		if err := v.mayAnnounce(a); err != nil {
			refused = err
			continue
		}
		older := v.older(a)
		if older && v.needsOlder(a.Name) {
			refused = nil // that is a change
			continue
		}
		id, incarnation := v.started(a)
		res.Nodes[i] = Life{id, incarnation}
		ids = append(ids, id)
		v.miss(id, a, older)
	}
	if len(ids) == 0 {
		return refused
	}
	v.restart(ids, live)
	return nil
}

// lives tells nodes that are known to live in their present incarnation.
func (v *View) lives(list []Life) func(NodeID) bool {
	live := map[NodeID]bool{}
	for _, l := range list {
		if n := v.Node(l.Node); n != nil && n.Incarnation == l.Incarnation && n.State == NodeUp {
			live[l.Node] = true
		}
	}
	return func(id NodeID) bool { return live[id] }
}

// started gives a node a new incarnation, and a new node a number.
func (v *View) started(c *Announce) (NodeID, uint64) {
	n := Node{State: NodeDown}
	if old := v.NodeByName(c.Name); old != nil {
		n = *old
	} else {
		v.LastNode++
		n.ID = v.LastNode
	}
	if n.State == NodeUp || n.Incarnation == 0 {
		n.Since = c.At
	}
	n.Missing = n.lacks(c.Disks)
	n.Name, n.Address, n.Zone, n.Disks = c.Name, c.Address, c.Zone, slices.Clone(c.Disks)
	n.Incarnation++
	n.State, n.Leaving, n.Older = NodeDown, false, false
	v.putNode(&n)
	return n.ID, n.Incarnation
}

func (v *View) mayAnnounce(c *Announce) error {
	switch {
	case c.Name == "" || len(c.Name) > maxNameBytes:
		return refuse(ErrInvalid, "a node needs a name of at most %d bytes", maxNameBytes)
	case slices.Contains(v.Gone, c.Name):
		return refuse(ErrInvalid, "node %q was removed: what is left of it cannot come back", c.Name)
	case len(c.Zone) > maxNameBytes || len(c.Address) > maxNameBytes:
		return refuse(ErrInvalid, "zone or address of node %q is longer than %d bytes", c.Name, maxNameBytes)
	case v.LastNode == MaxNodes && v.NodeByName(c.Name) == nil:
		return refuse(ErrInvalid, "%d nodes have been in the cluster, which is all the numbers there are", MaxNodes)
	}
	return checkDisks(c.Name, c.Disks)
}

func checkDisks(node string, disks []Disk) error {
	if len(disks) > MaxDisks {
		return refuse(ErrInvalid, "node %q has %d disks, at most %d are possible", node, len(disks), MaxDisks)
	}
	seen := map[string]bool{}
	for _, d := range disks {
		if d.ID == "" || seen[d.ID] {
			return refuse(ErrInvalid, "disk %q of node %q has no id of its own", d.Path, node)
		}
		seen[d.ID] = true
	}
	return nil
}

func (v *View) putNode(n *Node) {
	nodes := slices.Clone(v.Nodes)
	i, ok := v.search(n.ID)
	if ok {
		nodes[i] = n
	} else {
		nodes = slices.Insert(nodes, i, n)
	}
	v.Nodes = nodes
}

func (v *View) confirmNodes(c *Confirm) error {
	live := v.lives(c.Live)
	v.Epoch++
	v.confirm(live)
	return nil
}

func (v *View) setNode(c *SetNode) error {
	n, err := v.life(Life{c.Node, c.Incarnation})
	if err != nil {
		return err
	}
	if c.State != NodeUp && c.State != NodeDown {
		return refuse(ErrInvalid, "node state %q: must be up or down", c.State)
	}
	if n.State == c.State {
		return nil
	}
	return v.setNodes(&SetNodes{Nodes: []SetNode{*c}})
}

// life finds a node if it still is the given incarnation.
func (v *View) life(l Life) (*Node, error) {
	n := v.Node(l.Node)
	switch {
	case n == nil:
		return nil, refuse(ErrNotFound, "node %d", l.Node)
	case n.Incarnation != l.Incarnation:
		return nil, refuse(ErrStale, "node %q is at incarnation %d, not %d", n.Name, n.Incarnation, l.Incarnation)
	}
	return n, nil
}

func (v *View) setNodes(c *SetNodes) error {
	var up, down []NodeID
	for i := range c.Nodes {
		s := &c.Nodes[i]
		n, err := v.life(Life{s.Node, s.Incarnation})
		if err != nil || n.State == s.State {
			continue
		}
		changed := *n
		changed.State, changed.Since, changed.Turned = s.State, s.At, v.Epoch+1 // reshape's
		switch s.State {
		case NodeUp:
			changed.Out = false
			up = append(up, s.Node)
		case NodeDown:
			down = append(down, s.Node)
		default:
			return refuse(ErrInvalid, "node state %q: must be up or down", s.State)
		}
		changed.Log = max(changed.Log, s.Log)
		v.putNode(&changed)
	}
	if len(up)+len(down) == 0 {
		return nil
	}
	v.reshape()
	v.leave(down)
	v.enter(up, c.Enroll)
	return nil
}

func (v *View) setDisks(c *SetDisks) error {
	n, err := v.life(Life{c.Node, c.Incarnation})
	if err != nil {
		return err
	}
	if err := checkDisks(n.Name, c.Disks); err != nil {
		return err
	}
	changed := *n
	emptied := func(id string) bool { return slices.Contains(c.Emptied, id) }
	changed.Missing, changed.Disks = slices.DeleteFunc(n.lacks(c.Disks), emptied), slices.Clone(c.Disks)
	v.reshape()
	v.putNode(&changed)
	return nil
}

func (v *View) drain(c *Drain) error {
	return v.alter(c.Node, func(n *Node) { n.Drain = c.Drain })
}

func (v *View) reweight(c *Reweight) error {
	if c.Percent < 1 || c.Percent > 1000 {
		return refuse(ErrInvalid, "%d percent of a node's weight: must be 1 to 1000; to empty a node, drain it", c.Percent)
	}
	return v.alter(c.Node, func(n *Node) {
		if n.Percent = c.Percent; c.Percent == 100 {
			n.Percent = 0
		}
	})
}

// alter changes what placement makes of a node.
func (v *View) alter(id NodeID, fn func(n *Node)) error {
	n := v.Node(id)
	if n == nil {
		return refuse(ErrNotFound, "node %d", id)
	}
	changed := *n
	fn(&changed)
	if changed.Drain == n.Drain && changed.Percent == n.Percent {
		return nil
	}
	v.reshape()
	v.putNode(&changed)
	return nil
}

func (v *View) setOut(c *SetOut) error {
	changed := false
	for _, l := range c.Nodes {
		n, err := v.life(l)
		if err != nil || n.State == NodeUp || n.Out {
			continue
		}
		out := *n
		out.Out, changed = true, true
		v.putNode(&out)
	}
	if changed {
		v.reshape()
	}
	return nil
}

// maxOutAfterSeconds is a century.
const maxOutAfterSeconds = 100 * 366 * 24 * 3600

func (v *View) setOutAfter(c *SetOutAfter) error {
	if c.Seconds > maxOutAfterSeconds {
		return refuse(ErrInvalid, "out_after of %d seconds: must be at most a century; a negative number stands for never", c.Seconds)
	}
	if v.Cluster.OutAfterSeconds != c.Seconds {
		v.Epoch++
		v.Cluster.OutAfterSeconds = max(c.Seconds, -1)
	}
	return nil
}
