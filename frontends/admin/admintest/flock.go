package admintest

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"sheepdog/frontends/admin"
	"sheepdog/frontends/admin/api"
	"sheepdog/vdi"
)

// Flock makes the sheep one of four: n1 is the sheep itself; n2 is up, with an API of its own
// that listens to nobody but n1; n3 is down; g4 is a gateway that does not answer.
type Flock struct {
	Other *Sheep // n2

	server   *admin.Server // its
	hold     bool
	outAfter int64 // seconds
	drained  map[string]bool
	percent  map[string]int
	removed  map[string]bool
}

// Join makes the sheep one of many.
func (s *Sheep) Join(t testing.TB, volumes admin.Volumes) {
	t.Helper()
	f := &Flock{Other: newSheep("n2"), outAfter: 600, drained: map[string]bool{}, percent: map[string]int{}, removed: map[string]bool{}}
	f.Other.Flock = f
	var err error
	if f.server, err = admin.New(f.Other.config(volumes)); err != nil {
		t.Fatal(err)
	}
	s.Lock()
	defer s.Unlock()
	s.Flock = f
}

// Lone returns a server that listens to nobody and has no volumes: for what needs none.
func Lone() (*admin.Server, error) { return LoneWith(noVolumes{}) }

// LoneWith returns a server that listens to nobody.
func LoneWith(volumes admin.Volumes) (*admin.Server, error) {
	return admin.New(newSheep("n1").config(volumes))
}

// noVolumes must not be asked for volumes.
type noVolumes struct{ admin.Volumes }

// GC implements admin.Volumes.
func (noVolumes) GC() vdi.GCStatus { return vdi.GCStatus{} }

// flock is that of a sheep that is alone, too.
func (c cluster) flock() *Flock {
	if c.Flock == nil {
		return &Flock{outAfter: 600}
	}
	return c.Flock
}

func (f *Flock) members(self string) []api.Node {
	node := func(id int, name, state string) api.Node {
		return api.Node{
			ID: id, Name: name, Address: fmt.Sprintf("127.0.0.%d:7001", id), Zone: name, State: state, Since: Then, Incarnation: 2,
			Disks: 1, Weight: 102400, Percent: 100, Replicas: 64, Primaries: 22, Targets: 64, Leader: id == 1, Self: name == self,
		}
	}
	list := []api.Node{node(1, "n1", api.NodeUp), node(2, "n2", api.NodeUp), node(3, "n3", api.NodeDown), node(4, "g4", api.NodeUp)}
	list[2].Replicas, list[2].Primaries = 0, 0
	g := &list[3]
	g.Gateway, g.Disks, g.Weight, g.Replicas, g.Primaries, g.Targets = true, 0, 0, 0, 0, 0
	var left []api.Node
	for _, n := range list {
		n.Drain = f.drained[n.Name]
		if p := f.percent[n.Name]; p != 0 {
			n.Percent = p
		}
		if !f.removed[n.Name] {
			left = append(left, n)
		}
	}
	return left
}

// Partitions implements admin.Operations.
func (c cluster) Partitions() []api.Partition {
	list := []api.Partition{{Policy: 1, Partition: 0, Epoch: 3, InSync: []string{"n1"}, Targets: []string{"n1"}, Learners: []string{}}}
	if c.Flock != nil {
		list = append(list, api.Partition{Policy: 1, Partition: 1, Epoch: 7, InSync: []string{"n1"}, Targets: []string{"n1", "n2"}, Learners: []string{"n2"}})
	}
	return list
}

// Recovery implements admin.Operations.
func (c cluster) Recovery() api.Recovery {
	c.Lock()
	defer c.Unlock()
	f := c.flock()
	r := api.Recovery{Enabled: !f.hold, OutAfter: f.outAfter, Partitions: 64}
	if c.Flock != nil {
		r.Degraded, r.Moving = 64, 64
		r.Nodes = []api.NodeRecovery{
			{Node: "n2", State: api.NodeUp, Learning: 12, Missing: 16},
			{Node: "n3", State: api.NodeDown, Why: "out", Leaving: 3},
		}
	}
	return r
}

// Transfers implements admin.Operations.
func (c cluster) Transfers() []api.Transfer {
	if c.Flock == nil || c.name != "n2" {
		return nil
	}
	return []api.Transfer{{Source: "n2", Node: "n1", Partitions: 12, Objects: 100, DoneObjects: 300, DoneBytes: 3 << 30, LeftBytes: 1 << 30, BytesPerSecond: 100 << 20, ETA: 10}}
}

// CheckReplicas implements admin.Operations.
func (c cluster) CheckReplicas(_ context.Context, repair bool, progress func(done, total int64)) (api.CheckReport, error) {
	progress(64, 64)
	if c.Flock == nil {
		return api.CheckReport{}, nil
	}
	r := api.CheckReport{Problems: []api.Problem{{Kind: api.ProblemReplica, Node: "n2", Object: "00123456000000ab", Text: "2 blocks on node n2 are not what the primary has", Repaired: repair}}}
	if repair {
		r.Repaired = 1
	}
	return r, nil
}

// SetRecovery implements admin.Operations.
func (c cluster) SetRecovery(_ context.Context, q api.RecoverySettings) error {
	c.Lock()
	defer c.Unlock()
	if q.Enabled != nil {
		c.Flock.hold = !*q.Enabled
	}
	if q.OutAfter != nil {
		if c.Flock.outAfter = max(*q.OutAfter, -1); *q.OutAfter == 0 {
			c.Flock.outAfter = 600
		}
	}
	return nil
}

// ForceRecovery implements admin.Operations.
func (c cluster) ForceRecovery(context.Context) ([]string, error) {
	if c.Flock == nil {
		return nil, nil
	}
	return []string{"n3"}, nil
}

// Drain implements admin.Operations.
func (c cluster) Drain(_ context.Context, node string, drain, force bool) error {
	c.Lock()
	defer c.Unlock()
	if drain && !force {
		return &api.Error{Kind: api.KindBusy, Message: fmt.Sprintf("drain node %q: too few nodes would be left", node), Hint: "insist with --force"}
	}
	c.Flock.drained[node] = drain
	return nil
}

// Remove implements admin.Operations.
func (c cluster) Remove(_ context.Context, node, force string) error {
	c.Lock()
	defer c.Unlock()
	if node == "n2" {
		return &api.Error{Kind: api.KindBusy, Message: `remove node "n2": it is up and holds data`, Hint: `"dog node drain" empties a node`}
	}
	c.Flock.removed[node] = true
	return nil
}

// Absent implements admin.Operations.
func (c cluster) Absent(node string) int {
	if node == "n3" {
		return 17
	}
	return 0
}

// GiveUp implements admin.Operations.
func (c cluster) GiveUp(_ context.Context, node string) (int, error) { return c.Absent(node), nil }

// SetWeight implements admin.Operations.
func (c cluster) SetWeight(_ context.Context, node string, percent int) error {
	c.Lock()
	defer c.Unlock()
	c.Flock.percent[node] = percent
	return nil
}

// SetCopies implements admin.Operations.
func (c cluster) SetCopies(_ context.Context, copies int) error {
	if copies < 1 || copies > 16 {
		return fmt.Errorf("set default copies: %d copies: must be from 1 to 16: %w", copies, vdi.ErrInvalid)
	}
	c.Lock()
	defer c.Unlock()
	c.Copies = copies
	return nil
}

// Disks implements admin.Operations.
func (c cluster) Disks() []api.Disk {
	c.Lock()
	defer c.Unlock()
	list := []api.Disk{{Node: "n1", ID: "d1", Path: "/disk", Weight: 102400, TotalBytes: 100 << 30}}
	if c.Flock != nil {
		list = append(list, api.Disk{Node: "n2", ID: "d2", Path: "/disk", Weight: 102400, TotalBytes: 100 << 30}, api.Disk{Node: "n3", ID: "d3", Path: "/disk", Weight: 102400, TotalBytes: 100 << 30})
	}
	return list
}

// StopNode implements admin.Operations.
func (c cluster) StopNode(_ context.Context, node string) error {
	if node == "g4" {
		return silent("stop node %q: no answer: it does not stop: its log says why", node)
	}
	return nil
}

// StopAll implements admin.Operations.
func (c cluster) StopAll(_ context.Context, force bool) ([]string, error) {
	c.Lock()
	defer c.Unlock()
	switch {
	case c.Flock == nil:
		return []string{"n1"}, nil
	case !force:
		return nil, silent("stop the cluster: no answer of g4: nothing was stopped")
	}
	return []string{"n1", "n2"}, nil
}

// Ask implements admin.Operations.
func (c cluster) Ask(ctx context.Context, node string, question []byte) ([]byte, error) {
	f := c.Flock
	if f == nil || node != f.Other.name {
		return nil, silent("ask node %q: no answer", node)
	}
	return f.server.Answer(ctx, c.name, question), nil
}

func silent(format string, args ...any) error {
	return &api.Error{Kind: api.KindUnavailable, Message: fmt.Sprintf(format, args...), Hint: `"dog node list" shows which nodes are up`}
}

// plugs are disks that come and go.
type plugs Sheep

// Plug implements admin.Plugs.
func (p *plugs) Plug(_ context.Context, path string, empty bool) (api.Disk, error) {
	p.Lock()
	defer p.Unlock()
	if !strings.HasPrefix(path, "/") {
		return api.Disk{}, &api.Error{Kind: api.KindInvalid, Message: fmt.Sprintf("add disk %s: it is no absolute path", path)}
	}
	if strings.HasPrefix(path, "/old") && !empty {
		return api.Disk{}, &api.Error{Kind: api.KindInvalid, Message: fmt.Sprintf("add disk %s: it has objects already", path)}
	}
	d := api.Disk{ID: "new", Path: path, State: api.DiskOK, TotalBytes: 100 << 30, FreeBytes: 100 << 30}
	p.Disks = append(p.Disks, d)
	return d, nil
}

// Unplug implements admin.Plugs.
func (p *plugs) Unplug(_ context.Context, disk string) (api.Disk, error) {
	p.Lock()
	defer p.Unlock()
	for i, d := range p.Disks {
		if d.Path == disk || d.ID == disk {
			p.Disks = append(p.Disks[:i:i], p.Disks[i+1:]...)
			return d, nil
		}
	}
	return api.Disk{}, &api.Error{Kind: api.KindNotFound, Message: fmt.Sprintf("there is no disk %s", disk), Hint: `"dog node md info" shows the disks`}
}
