package main

import (
	"context"
	"errors"
	"fmt"

	"sheepdog/cluster"
	"sheepdog/cluster/state"
	"sheepdog/frontends/admin"
	"sheepdog/frontends/admin/api"
	"sheepdog/storage/object"
	"sheepdog/vdi"
)

// membership is the node's part in the cluster as the admin API sees it.
type membership struct{ *cluster.Node }

var _ admin.Cluster = membership{}

// Info implements admin.Cluster.
func (m membership) Info() api.Cluster {
	i := m.Node.Info()
	c := api.Cluster{
		Formatted: i.Formatted, ID: i.ID, Name: i.Name, Created: i.Created, Epoch: i.Epoch, Status: i.Status, Reason: i.Reason,
		Node: i.Node, Leader: i.Leader, LeaderNode: i.LeaderNode, NodesUp: i.NodesUp, NodesDown: i.NodesDown,
		Recovery: !i.Hold, OutAfter: outAfter(i.OutAfter), DefaultCopies: i.DefaultCopies, ObjectSize: i.ObjectSize,
	}
	for _, p := range i.Policies {
		c.Policies = append(c.Policies, api.Policy{
			ID: int(p.ID), Copies: p.Copies, MinInSync: p.MinInSync, Partitions: p.Partitions,
			Degraded: p.Degraded, Unavailable: p.Unavailable, Recovering: p.Learning,
		})
	}
	return c
}

// Nodes implements admin.Cluster.
func (m membership) Nodes() []api.Node {
	var list []api.Node
	for _, n := range m.NodeList() {
		list = append(list, api.Node{
			ID: int(n.ID), Name: n.Name, Address: n.Address, Zone: n.Zone, State: string(n.State), Since: n.Since, Incarnation: n.Incarnation,
			Disks: n.Disks, Weight: n.Weight, Percent: n.Percent, Drain: n.Drain, Out: n.Out, Leader: n.Leader, Votes: n.Votes,
			Replicas: n.Replicas, Primaries: n.Primaries, Targets: n.Targets, Learning: n.Learning, Gateway: n.Gateway, Self: n.Self,
		})
	}
	return list
}

// Format implements admin.Cluster.
func (m membership) Format(ctx context.Context, o admin.FormatOptions) error {
	err := m.Node.Format(ctx, cluster.FormatOptions{Name: o.Name, Copies: o.Copies, ObjectSizeShift: o.ObjectSizeShift})
	switch {
	case errors.Is(err, state.ErrFormatted):
		return fmt.Errorf("%w: %w", vdi.ErrExists, err)
	case errors.Is(err, state.ErrInvalid):
		return fmt.Errorf("%w: %w", vdi.ErrInvalid, err)
	}
	return err
}

// Locate implements admin.Cluster.
func (m membership) Locate(policy object.PolicyID, id object.ID) (api.Placement, error) {
	p, err := m.Node.Locate(policy, id)
	return api.Placement{Partition: int(p.Partition), Nodes: p.InSync}, err
}
