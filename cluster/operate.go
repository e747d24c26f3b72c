package cluster

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// What operators ask of the cluster. Any node takes it, for any node. Everything here fails
// with the kinds of package state, or with what Propose fails with.

// Errors of operations that are not carried out as things are.
var (
	// ErrTooFew: what is left would be too little. Who asks may insist.
	ErrTooFew = errors.New("too few nodes would be left")
	// ErrOnHold: data is not moved now, see Node.Hold.
	ErrOnHold = errors.New("recovery is disabled")
	// ErrSilent: a node is down, or does not answer.
	ErrSilent = errors.New("no answer")
)

// NodeNamed finds a member by its name, or by its number in decimal.
func (n *Node) NodeNamed(name string) (*state.Node, error) {
	v := n.state.View()
	if !v.Formatted() {
		return nil, errUnformatted
	}
	if m := v.NodeByName(name); m != nil {
		return m, nil
	}
	for _, m := range v.Nodes {
		if fmt.Sprint(m.ID) == name {
			return m, nil
		}
	}
	return nil, fmt.Errorf("%w: %q", state.ErrNotFound, name)
}

// Drain brings a node's data to others, or with drain false lets it hold data again. A node
// that is drained stays in sync with what it holds until others are. It fails with ErrTooFew
// if fewer nodes than copies would be left to hold data, unless insist is set, and with
// ErrOnHold while nothing is moved.
func (n *Node) Drain(ctx context.Context, name string, drain, insist bool) error {
	m, err := n.NodeNamed(name)
	if err != nil {
		return err
	}
	if drain {
		if err := mayDrain(n.state.View(), m, insist); err != nil {
			return fmt.Errorf("drain node %q: %w", m.Name, err)
		}
	}
	if _, err := n.command(ctx, state.Command{Drain: &state.Drain{Node: m.ID, Drain: drain}}); err != nil {
		return fmt.Errorf("drain node %q: %w", m.Name, err)
	}
	n.log.Info("node is drained", "node", m.Name, "drain", drain)
	return nil
}

// mayDrain refuses to drain a node when there is nowhere to go.
func mayDrain(v *state.View, m *state.Node, insist bool) error {
	if v.Cluster.Hold {
		return ErrOnHold
	}
	left := 0
	for _, o := range v.Nodes {
		if o.ID != m.ID && o.Share() > 0 && o.State == state.NodeUp {
			left++
		}
	}
	if m.Share() == 0 { // it holds nothing, or is on its way to that
		return nil
	}
	copies := 0
	for _, p := range v.Policies {
		if len(p.Partitions) > 0 {
			copies = max(copies, p.Copies)
		}
	}
	switch {
	case left == 0:
		return fmt.Errorf("%w: no other node could hold its data", state.ErrNeeded)
	case left < copies && !insist:
		return fmt.Errorf("%w: %d could hold data, for %d copies", ErrTooFew, left, copies)
	}
	return nil
}

// Held counts the partitions that a node is in sync with, or waits to be: a node that is
// drained is empty when there are none.
func Held(v *state.View, id state.NodeID) (count int) {
	for _, p := range v.Policies {
		for i := range p.Partitions {
			if q := &p.Partitions[i]; slices.Contains(q.ISR, id) || slices.Contains(q.Waiting, id) {
				count++
			}
		}
	}
	return count
}

// Remove makes a node one that is gone for good. One that is up must be drained and empty;
// it is stopped first, and what remains of it can never be a member again, but its name can.
// A node that is down may hold what others hold as well; with force also what only it holds,
// which is lost then. It fails with state.ErrNeeded otherwise.
func (n *Node) Remove(ctx context.Context, name string, force bool) error {
	m, err := n.NodeNamed(name)
	if err != nil {
		return err
	}
	if err := n.remove(ctx, m, force); err != nil {
		return fmt.Errorf("remove node %q: %w", m.Name, err)
	}
	n.log.Info("node is removed", "node", m.Name)
	return nil
}

func (n *Node) remove(ctx context.Context, m *state.Node, force bool) error {
	c := state.Remove{Node: m.ID}
	if force {
		c.Force = m.Name
	}
	ctx, cancel := context.WithTimeout(ctx, 2*stopTimeout)
	defer cancel()
	for {
		if err := n.mayRemove(ctx, m); err != nil {
			return err
		}
		_, err := n.command(ctx, state.Command{Remove: &c})
		// A process that is only ending may have been taken for one that is back.
		if err == nil {
			return nil
		}
		if m = n.state.View().Node(c.Node); m == nil || m.State == state.NodeDown {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(askPause):
		}
	}
}

// mayRemove sees to it that a node that is up may be removed, and stops it.
func (n *Node) mayRemove(ctx context.Context, m *state.Node) error {
	if m.State == state.NodeUp {
		held := Held(n.state.View(), m.ID)
		switch {
		case m.Name == n.cfg.Name:
			return fmt.Errorf("%w: it is the node that was asked: ask another one", state.ErrInvalid)
		case !m.Drain && len(m.Disks) > 0:
			return fmt.Errorf("%w: it is up and holds data: drain it first", state.ErrNeeded)
		case held > 0:
			return fmt.Errorf("%w: it is being drained and still holds %d partitions: wait until it is empty", state.ErrNeeded, held)
		}
		return n.flock.stop(ctx, m, stopForGood)
	}
	return nil
}

// Reweight sets how much of a node's weight counts for placement, in percent from 1 to 1000.
func (n *Node) Reweight(ctx context.Context, name string, percent int) error {
	m, err := n.NodeNamed(name)
	if err != nil {
		return err
	}
	if _, err := n.command(ctx, state.Command{Reweight: &state.Reweight{Node: m.ID, Percent: percent}}); err != nil {
		return fmt.Errorf("set weight of node %q: %w", m.Name, err)
	}
	return nil
}

// Hold keeps partitions where they shall be although nodes join, go for long or change their
// weight, or ends that. Nodes that come back catch up nevertheless.
func (n *Node) Hold(ctx context.Context, hold bool) error {
	if _, err := n.command(ctx, state.Command{SetHold: &state.SetHold{Hold: hold}}); err != nil {
		return fmt.Errorf("set recovery: %w", err)
	}
	return nil
}

// SetOutAfter says how long a node may be down before its data is brought elsewhere; a
// negative time is for ever.
func (n *Node) SetOutAfter(ctx context.Context, d time.Duration) error {
	c := state.SetOutAfter{Seconds: int64(d / time.Second)}
	if d > 0 && c.Seconds == 0 {
		return fmt.Errorf("%w: a node that is down for less than a second is no reason to move data", state.ErrInvalid)
	}
	if _, err := n.command(ctx, state.Command{SetOutAfter: &c}); err != nil {
		return fmt.Errorf("set out_after: %w", err)
	}
	return nil
}

// ForceOut has the data of all nodes that are down brought elsewhere now, and returns the
// names of those.
func (n *Node) ForceOut(ctx context.Context) (names []string, err error) {
	v := n.state.View()
	if v.Cluster.Hold {
		return nil, ErrOnHold
	}
	c := state.SetOut{}
	for _, m := range v.Nodes {
		if m.State == state.NodeDown && m.Share() > 0 {
			c.Nodes = append(c.Nodes, state.Life{Node: m.ID, Incarnation: m.Incarnation})
			names = append(names, m.Name)
		}
	}
	if len(names) == 0 {
		return nil, nil
	}
	if _, err := n.command(ctx, state.Command{SetOut: &c}); err != nil {
		return nil, fmt.Errorf("force recovery: %w", err)
	}
	return names, nil
}

// SetCopies makes volumes that do not choose keep so many copies from now on.
func (n *Node) SetCopies(ctx context.Context, copies int) error {
	if _, err := n.PolicyOf(ctx, copies); err != nil {
		return fmt.Errorf("set default copies: %w", err)
	}
	if _, err := n.command(ctx, state.Command{SetDefault: &state.SetDefault{Copies: copies}}); err != nil {
		return fmt.Errorf("set default copies: %w", err)
	}
	return nil
}

// SetDisks says which disks this node has from now on. Those that it had and has no more are
// missing, and what may be on them is waited for, but for those that were emptied.
func (n *Node) SetDisks(ctx context.Context, disks []state.Disk, emptied ...string) error {
	c := state.SetDisks{Node: state.NodeID(n.self.Load()), Incarnation: n.inc.Load(), Disks: disks, Emptied: emptied}
	if c.Node == 0 {
		return errUnformatted
	}
	if _, err := n.command(ctx, state.Command{SetDisks: &c}); err != nil {
		return fmt.Errorf("set disks: %w", err)
	}
	if n.flock != nil {
		return nil
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.place(ctx)
}

// errAlone is what a node that is alone answers about others.
var errAlone = fmt.Errorf("%w: this node is alone: it has no listen.peer", object.ErrInvalid)
