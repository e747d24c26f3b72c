package admin

import (
	"cmp"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"

	"sheepdog/frontends/admin/api"
	"sheepdog/vdi"
)

// nodeCalled finds a member by its name or number.
func (s *Server) nodeCalled(name string) (api.Node, bool) {
	nodes := s.cfg.Cluster.Nodes()
	for _, n := range nodes {
		if n.Name == name {
			return n, true
		}
	}
	for _, n := range nodes {
		if fmt.Sprint(n.ID) == name {
			return n, true
		}
	}
	return api.Node{}, false
}

// isSelf reports whether a name or number is this node's.
func (s *Server) isSelf(name string) bool {
	n, ok := s.nodeCalled(name)
	return ok && n.Self || !ok && name == s.cfg.Node
}

// aboutNode is the answer about the node that the path names, after something was done to it.
func (c *call) aboutNode(err error) (any, error) {
	if err != nil {
		return nil, err
	}
	n, ok := c.s.nodeCalled(c.r.PathValue("node"))
	if !ok {
		return nil, noSuchNode(c.r.PathValue("node"))
	}
	return n, nil
}

func noSuchNode(name string) error {
	return refuse(api.KindNotFound, "there is no node %.64q", name).withHint(`"dog node list" shows the nodes`)
}

func (c *call) drainNode() (any, error) {
	force, err := c.flag("force")
	if err != nil {
		return nil, err
	}
	node := c.r.PathValue("node")
	c.noted("node is to be drained", "node", node)
	return c.aboutNode(c.s.cfg.Cluster.Drain(c.r.Context(), node, true, force))
}

func (c *call) undrainNode() (any, error) {
	node := c.r.PathValue("node")
	c.noted("node is to hold data again", "node", node)
	return c.aboutNode(c.s.cfg.Cluster.Drain(c.r.Context(), node, false, false))
}

// noted logs what somebody asked for over the API.
func (c *call) noted(what string, args ...any) {
	c.s.log.Info(what, append(args, "peer", c.r.RemoteAddr)...)
}

func (c *call) weighNode() (any, error) {
	var q api.WeightRequest
	if err := c.body(&q); err != nil {
		return nil, err
	}
	if q.Percent < 1 || q.Percent > 1000 {
		return nil, refuse(api.KindInvalid, "%d percent of a node's weight makes no sense", q.Percent).
			withHint(`take 1 to 1000; to empty a node, use "dog node drain"`)
	}
	return c.aboutNode(c.s.cfg.Cluster.SetWeight(c.r.Context(), c.r.PathValue("node"), q.Percent))
}

func (c *call) removeNode() (any, error) {
	n, ok := c.s.nodeCalled(c.r.PathValue("node"))
	if !ok {
		return nil, noSuchNode(c.r.PathValue("node"))
	}
	force := c.query("force")
	if force != "" && force != n.Name {
		return nil, refuse(api.KindInvalid, "the node is called %q, not %.64q: nothing was removed", n.Name, force)
	}
	c.noted("node is to be removed", "node", n.Name, "force", force != "")
	if err := c.s.cfg.Cluster.Remove(c.r.Context(), n.Name, force); err != nil {
		return nil, err
	}
	return api.Names{Nodes: []string{n.Name}}, nil
}

// giveUpDisks declares lost what only a node had on disks that it lacks, or what is missing in an older copy of it.
func (c *call) giveUpDisks() (any, error) {
	n, ok := c.s.nodeCalled(c.r.PathValue("node"))
	if !ok {
		return nil, noSuchNode(c.r.PathValue("node"))
	}
	lost := c.s.cfg.Cluster.Absent(n.Name)
	switch force := c.query("force"); {
	case lost == 0:
		return nil, refuse(api.KindInvalid, "node %q alone has nothing that is on a disk that it lacks, or that an older copy of it lacks", n.Name)
	case force == "":
		return nil, refuse(api.KindBusy, "%d partitions are only on disks that node %q lacks, or newer than the copy that it has", lost, n.Name).
			withHint("put the disks, or the newest that it had, back and start the node anew; or give them up with --force and the node's name: what was written there is gone for good")
	case force != n.Name:
		return nil, refuse(api.KindInvalid, "the node is called %q, not %.64q: nothing was given up", n.Name, force)
	}
	lost, err := c.s.cfg.Cluster.GiveUp(c.r.Context(), n.Name)
	if err != nil {
		return nil, err
	}
	c.noted("missing disks were given up", "node", n.Name, "partitions", lost)
	return api.Lost{Node: n.Name, Partitions: lost}, nil
}

func (c *call) setCopies() (any, error) {
	var q api.CopiesRequest
	if err := c.body(&q); err != nil {
		return nil, err
	}
	if err := c.s.cfg.Cluster.SetCopies(c.r.Context(), q.Copies); err != nil {
		return nil, err
	}
	return c.cluster()
}

func (c *call) partitions() (any, error) {
	list := orEmpty(c.s.cfg.Cluster.Partitions())
	name := c.query("node")
	if name == "" {
		return list, nil
	}
	n, ok := c.s.nodeCalled(name)
	if !ok {
		return nil, noSuchNode(name)
	}
	return slices.DeleteFunc(list, func(p api.Partition) bool {
		return !slices.Contains(p.InSync, n.Name) && !slices.Contains(p.Targets, n.Name) && !slices.Contains(p.Learners, n.Name)
	}), nil
}

func (c *call) recovery() (any, error) {
	r := c.s.cfg.Cluster.Recovery()
	r.Nodes, r.Transfers, r.ETA = orEmpty(r.Nodes), c.s.transferring(), 0
	answers, failed := askAll[[]api.Transfer](c.r.Context(), c.s, question{Method: http.MethodGet, Path: api.Prefix + "/node/transfers"})
	for _, list := range answers {
		r.Transfers = append(r.Transfers, list...)
	}
	r.Silent = slices.Sorted(maps.Keys(failed))
	slices.SortFunc(r.Transfers, func(a, b api.Transfer) int {
		return cmp.Or(strings.Compare(a.Node, b.Node), strings.Compare(a.Source, b.Source))
	})
	for _, t := range r.Transfers {
		r.LeftObjects += t.Objects
		r.LeftBytes += t.LeftBytes
		r.DoneBytes += t.DoneBytes
		r.BytesPerSecond += t.BytesPerSecond
		if t.ETA < 0 || r.ETA < 0 {
			r.ETA = -1
		} else {
			r.ETA = max(r.ETA, t.ETA) // they go on side by side
		}
	}
	return r, nil
}

func (s *Server) transferring() []api.Transfer { return orEmpty(s.cfg.Cluster.Transfers()) }

func (c *call) transfersHere() (any, error) { return c.s.transferring(), nil }

func (c *call) setRecovery() (any, error) {
	var q api.RecoverySettings
	if err := c.body(&q); err != nil {
		return nil, err
	}
	if q == (api.RecoverySettings{}) {
		return nil, refuse(api.KindInvalid, "nothing is to be set").withHint("give enabled or out_after")
	}
	if err := c.s.cfg.Cluster.SetRecovery(c.r.Context(), q); err != nil {
		return nil, err
	}
	return c.recovery()
}

func (c *call) forceRecovery() (any, error) {
	names, err := c.s.cfg.Cluster.ForceRecovery(c.r.Context())
	if err != nil {
		return nil, err
	}
	c.noted("recovery was forced", "nodes", strings.Join(names, " "))
	return api.Names{Nodes: orEmpty(names)}, nil
}

func (c *call) shutdown() (any, error) {
	force, err := c.flag("force")
	if err != nil {
		return nil, err
	}
	if c.s.cfg.Shutdown == nil {
		return nil, errNoShutdown
	}
	c.noted("shutdown of the whole cluster was asked for")
	names, err := c.s.cfg.Cluster.StopAll(c.r.Context(), force)
	if err != nil {
		return nil, hinted(err, api.KindUnavailable, "bring them back, or stop the others with --force")
	}
	c.s.cfg.Shutdown()
	return api.Names{Nodes: orEmpty(names)}, nil
}

var errNoShutdown = fmt.Errorf("this daemon does not stop by a call: %w", vdi.ErrUnsupported)

func (c *call) shutdownNode() (any, error) {
	name := c.query(paramNode.name)
	if name != "" && !c.s.isSelf(name) {
		n, ok := c.s.nodeCalled(name)
		if !ok {
			return nil, noSuchNode(name)
		}
		c.noted("shutdown of a node was asked for", "node", n.Name)
		if err := c.s.cfg.Cluster.StopNode(c.r.Context(), n.Name); err != nil {
			return nil, err
		}
		return api.Names{Nodes: []string{n.Name}}, nil
	}
	if c.s.cfg.Shutdown == nil {
		return nil, errNoShutdown
	}
	c.noted("shutdown was asked for over the admin API")
	c.s.cfg.Shutdown()
	return api.Names{Nodes: []string{c.s.cfg.Node}}, nil
}

func (c *call) plug() (any, error) {
	var q api.DiskRequest
	if err := c.body(&q); err != nil {
		return nil, err
	}
	switch {
	case q.Path == "":
		return nil, refuse(api.KindInvalid, "the path of a disk is missing")
	case c.s.cfg.Plugs == nil:
		return nil, errNoPlugs
	}
	d, err := c.s.cfg.Plugs.Plug(c.r.Context(), q.Path, q.Empty)
	return c.aboutDisk(d, err)
}

func (c *call) unplug() (any, error) {
	disk := c.query("disk")
	switch {
	case disk == "":
		return nil, refuse(api.KindInvalid, "the path or id of a disk is missing")
	case c.s.cfg.Plugs == nil:
		return nil, errNoPlugs
	}
	d, err := c.s.cfg.Plugs.Unplug(c.r.Context(), disk)
	return c.aboutDisk(d, err)
}

func (c *call) aboutDisk(d api.Disk, err error) (any, error) {
	d.Node, d.Corrupt = c.s.cfg.Node, orEmpty(d.Corrupt)
	if d.Errors == nil {
		d.Errors = map[string]uint64{}
	}
	return d, err
}

var errNoPlugs = fmt.Errorf("this daemon's disks come and go with its configuration alone: %w", vdi.ErrUnsupported)
