package cluster

import (
	"context"
	"errors"
	"fmt"
	"time"

	"sheepdog/cluster/internal/placement"
	"sheepdog/cluster/internal/steward"
	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// DefaultPolicy is the policy of volumes that do not choose; 0 before Format.
func (n *Node) DefaultPolicy() object.PolicyID { return n.state.View().Cluster.DefaultPolicy }

// PolicyOf returns the policy that keeps the given number of copies, and makes it, with
// its partition table, if there is none yet. Invalid numbers fail with object.ErrInvalid.
func (n *Node) PolicyOf(ctx context.Context, copies int) (object.PolicyID, error) {
	if p := n.state.View().PolicyOf(copies); p != nil && len(p.Partitions) > 0 {
		return p.ID, nil
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	res, err := n.command(ctx, state.Command{AddPolicy: &state.AddPolicy{Copies: copies}})
	switch {
	case errors.Is(err, state.ErrInvalid):
		return 0, fmt.Errorf("add policy: %w: %w", object.ErrInvalid, err)
	case errors.Is(err, state.ErrNotFormatted):
		return 0, errUnformatted
	case err != nil:
		return 0, fmt.Errorf("add policy: %w", err)
	}
	if n.flock != nil {
		return res.Policy, n.placed(ctx, res.Policy)
	}
	return res.Policy, n.place(ctx)
}

// placed waits until the leader has placed a policy.
func (n *Node) placed(ctx context.Context, id object.PolicyID) error {
	ctx, cancel := context.WithTimeout(ctx, placeTimeout)
	defer cancel()
	for {
		applied := n.follower.changed()
		if p := n.state.View().Policy(id); p != nil && len(p.Partitions) > 0 {
			return nil
		}
		select {
		case <-applied:
		case <-ctx.Done():
			return fmt.Errorf("%w: policy %d is not placed yet: are there nodes with disks?", object.ErrUnavailable, id)
		}
	}
}

// placeTimeout is how long a new policy waits for its place.
const placeTimeout = 15 * time.Second

// Copies returns how many copies a policy asks for; 0 if there is no such policy.
func (n *Node) Copies(id object.PolicyID) int {
	if p := n.state.View().Policy(id); p != nil {
		return p.Copies
	}
	return 0
}

// placeAttempts bounds how often a placement is computed anew because the map changed
// under it.
const placeAttempts = 10

// place proposes targets for every policy whose partitions are not where they should be.
func (n *Node) place(ctx context.Context) error {
	for range placeAttempts {
		v := n.state.View()
		c := placeOne(v)
		if c == nil {
			return nil
		}
		if _, err := n.command(ctx, state.Command{SetTargets: c}); err != nil && !errors.Is(err, state.ErrStale) {
			return fmt.Errorf("place partitions of policy %d: %w", c.Policy, err)
		}
	}
	return fmt.Errorf("place partitions: the cluster map kept changing: %w", object.ErrUnavailable)
}

// placeOne returns the command for the first policy that needs one.
func placeOne(v *state.View) *state.SetTargets {
	var nodes []placement.Node
	for _, m := range v.Nodes {
		if w := m.Weight(); w > 0 {
			nodes = append(nodes, placement.Node{ID: uint16(m.ID), Weight: float64(w), Zone: m.Zone})
		}
	}
	if len(nodes) == 0 {
		return nil
	}
	for _, p := range v.Policies {
		if c := steward.Place(v, p, nodes); c != nil {
			return c
		}
	}
	return nil
}

func (n *Node) now() time.Time { return n.cfg.Now().UTC().Truncate(time.Millisecond) }

// DefaultSizeShift is the size of objects, as a power of two, of volumes that do not choose.
func (n *Node) DefaultSizeShift() uint8 {
	if c := n.state.View().Cluster; c.ObjectSizeShift != 0 {
		return c.ObjectSizeShift
	}
	return object.DefaultSizeShift
}
