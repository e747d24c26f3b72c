package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"sheepdog/cluster"
	"sheepdog/cluster/state"
	"sheepdog/frontends/admin/api"
)

// outAfter is how long nodes may be down as the admin API has it.
func outAfter(d time.Duration) int64 {
	if d < 0 {
		return -1
	}
	return int64(d / time.Second)
}

// operation says what clients are told of an operation on the cluster that failed.
func operation(err error) error {
	if err == nil {
		return nil
	}
	for _, k := range []struct {
		err  error
		kind api.Kind
		hint string
	}{
		{state.ErrNotFound, api.KindNotFound, `"dog node list" shows the nodes`},
		{cluster.ErrTooFew, api.KindBusy, "add nodes with disks first, or insist with --force: volumes then keep fewer copies"},
		{cluster.ErrOnHold, api.KindBusy, `"dog cluster recover enable" lets data be moved again`},
		{state.ErrNeeded, api.KindBusy, `"dog node drain" empties a node that is up, "dog node recovery" shows how far it is`},
		{state.ErrStale, api.KindBusy, "try again"},
		{cluster.ErrSilent, api.KindUnavailable, `"dog node list" shows which nodes are up`},
		{state.ErrInvalid, api.KindInvalid, ""},
	} {
		if errors.Is(err, k.err) {
			return &api.Error{Kind: k.kind, Message: err.Error(), Hint: k.hint}
		}
	}
	return err
}

// Partitions implements admin.Operations.
func (m membership) Partitions() (list []api.Partition) {
	for _, policy := range m.View().Policies {
		for _, p := range m.Node.Partitions(policy.ID) {
			list = append(list, api.Partition{Policy: int(p.Policy), Partition: int(p.Partition), Epoch: p.Epoch, InSync: p.InSync, Targets: p.Targets, Learners: p.Learners})
		}
	}
	return list
}

// Recovery implements admin.Operations.
func (m membership) Recovery() api.Recovery {
	i := m.Info()
	r := api.Recovery{Enabled: i.Recovery, OutAfter: i.OutAfter}
	for _, p := range i.Policies {
		r.Partitions += p.Partitions
		r.Degraded += p.Degraded
		r.Unavailable += p.Unavailable
	}
	moving := m.Moving()
	r.Moving = moving.Partitions
	for _, n := range m.Nodes() {
		x := api.NodeRecovery{Node: n.Name, State: n.State, Learning: n.Learning, Missing: moving.Missing[state.NodeID(n.ID)], Leaving: moving.Leaving[state.NodeID(n.ID)]}
		switch {
		case n.Drain:
			x.Why = "drained"
		case n.Out:
			x.Why = "out"
		}
		if x.Learning+x.Missing+x.Leaving > 0 || x.Why != "" {
			r.Nodes = append(r.Nodes, x)
		}
	}
	return r
}

// SetRecovery implements admin.Operations.
func (m membership) SetRecovery(ctx context.Context, q api.RecoverySettings) error {
	if q.OutAfter != nil {
		if err := m.SetOutAfter(ctx, time.Duration(*q.OutAfter)*time.Second); err != nil {
			return operation(err)
		}
	}
	if q.Enabled != nil {
		return operation(m.Hold(ctx, !*q.Enabled))
	}
	return nil
}

// ForceRecovery implements admin.Operations.
func (m membership) ForceRecovery(ctx context.Context) ([]string, error) {
	names, err := m.ForceOut(ctx)
	return names, operation(err)
}

// Drain implements admin.Operations.
func (m membership) Drain(ctx context.Context, node string, drain, force bool) error {
	return operation(m.Node.Drain(ctx, node, drain, force))
}

// Remove implements admin.Operations.
func (m membership) Remove(ctx context.Context, node, force string) error {
	return operation(m.Node.Remove(ctx, node, force != ""))
}

// Absent implements admin.Operations.
func (m membership) Absent(node string) int { return m.Node.Absent()[node] }

// GiveUp implements admin.Operations.
func (m membership) GiveUp(ctx context.Context, node string) (int, error) {
	lost, err := m.Node.GiveUp(ctx, node)
	return lost, operation(err)
}

// SetWeight implements admin.Operations.
func (m membership) SetWeight(ctx context.Context, node string, percent int) error {
	return operation(m.Reweight(ctx, node, percent))
}

// SetCopies implements admin.Operations.
func (m membership) SetCopies(ctx context.Context, copies int) error {
	return operation(m.Node.SetCopies(ctx, copies))
}

// Disks implements admin.Operations.
func (m membership) Disks() []api.Disk {
	var list []api.Disk
	for _, d := range m.DiskList() {
		list = append(list, api.Disk{Node: d.Node, ID: d.ID, Path: d.Path, Weight: d.Weight, TotalBytes: int64(d.Weight) << 20})
	}
	return list
}

// StopNode implements admin.Operations.
func (m membership) StopNode(ctx context.Context, node string) error {
	return operation(m.Node.StopNode(ctx, node))
}

// StopAll implements admin.Operations.
func (m membership) StopAll(ctx context.Context, force bool) ([]string, error) {
	names, err := m.Node.StopAll(ctx, force)
	return names, operation(err)
}

// Ask implements admin.Operations.
func (m membership) Ask(ctx context.Context, node string, question []byte) ([]byte, error) {
	answer, err := m.Node.Ask(ctx, node, question)
	return answer, operation(err)
}

// Transfers implements admin.Operations.
func (m membership) Transfers() (list []api.Transfer) {
	for _, s := range m.Node.Recovery() {
		t := api.Transfer{
			Source: s.Source, Node: s.Node, Partitions: s.Partitions, Objects: int64(s.Objects), Listing: s.Listing,
			DoneObjects: int64(s.DoneObjects), DoneBytes: int64(s.DoneBytes), LeftBytes: int64(s.LeftBytes), BytesPerSecond: s.BytesPerSecond, ETA: -1, Waits: s.Waits,
		}
		if s.ETA != nil {
			t.ETA = int64(*s.ETA / time.Second)
		}
		list = append(list, t)
	}
	return list
}

// CheckReplicas implements admin.Operations.
func (m membership) CheckReplicas(ctx context.Context, repair bool, progress func(done, total int64)) (api.CheckReport, error) {
	found, err := m.Node.CheckReplicas(ctx, repair, func(p cluster.CheckProgress) { progress(int64(p.Done), int64(p.Partitions)) })
	r := api.CheckReport{More: int64(found.More)}
	for i := range found.Findings {
		f := &found.Findings[i]
		if f.Repaired {
			r.Repaired++
		}
		r.Problems = append(r.Problems, api.Problem{Kind: api.ProblemReplica, Node: f.Node, Object: f.Object, Text: differing(f), Repaired: f.Repaired})
	}
	for _, u := range found.Unchecked {
		r.Problems = append(r.Problems, api.Problem{Kind: api.ProblemReplica, Text: fmt.Sprintf("partition %d of policy %d could not be compared: %s: check again when its nodes are up", u.Partition, u.Policy, u.Reason)})
	}
	return r, err
}

// differing says what is wrong with a replica, and what to do.
func differing(f *cluster.CheckResult) string {
	what := map[string]string{
		"differs": fmt.Sprintf("%d blocks on node %s are not what the primary has", f.Blocks, f.Node), "missing": "it is missing on node " + f.Node,
		"extra": "only node " + f.Node + " has it, not the primary", "newer": "node " + f.Node + " has a newer version than the primary", "unreadable": "it cannot be read on node " + f.Node + ": " + f.Reason,
	}[f.Kind]
	switch {
	case f.Repaired:
		return what + ": repaired"
	case f.Kind == "extra" || f.Kind == "newer":
		return what + ": the primary may have lost it, so it is left as it is: compare the volume with a backup"
	}
	return what + `: "dog cluster check --repair" makes them equal`
}
