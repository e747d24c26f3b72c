package state

import (
	"encoding/json"
	"fmt"
	"slices"
)

// snapshotFormat is the version of the snapshot's encoding.
const snapshotFormat = 1

type snapshot struct {
	Format int   `json:"format"`
	View   *View `json:"view"`
}

// Snapshot encodes the whole state: equal states give equal bytes.
func (m *Machine) Snapshot() ([]byte, error) {
	b, err := json.Marshal(snapshot{snapshotFormat, m.View()})
	if err != nil {
		return nil, fmt.Errorf("encode cluster state: %w", err)
	}
	return b, nil
}

// Restore replaces the state by that of a snapshot. If it fails nothing has changed.
func (m *Machine) Restore(b []byte) error {
	var s snapshot
	if err := json.Unmarshal(b, &s); err != nil {
		return fmt.Errorf("decode cluster state: %w", err)
	}
	if s.Format != snapshotFormat || s.View == nil {
		return fmt.Errorf("decode cluster state: format %d is not known to this version (%d): use a newer sheep", s.Format, snapshotFormat)
	}
	if err := s.View.check(); err != nil {
		return fmt.Errorf("decode cluster state: %w", err)
	}
	m.view.Store(s.View)
	return nil
}

// check refuses a state that no sequence of commands makes, so that the rest of the
// program may rely on its shape.
func (v *View) check() error {
	if slices.Contains(v.Nodes, nil) || slices.Contains(v.Policies, nil) {
		return fmt.Errorf("%w: null entry", ErrInvalid)
	}
	for i, n := range v.Nodes {
		if i > 0 && v.Nodes[i-1].ID >= n.ID {
			return fmt.Errorf("%w: nodes are out of order", ErrInvalid)
		}
	}
	for _, p := range v.Policies {
		if len(p.Partitions) != 0 && len(p.Partitions) != v.Cluster.Partitions {
			return fmt.Errorf("%w: policy %d has %d partitions, not %d", ErrInvalid, p.ID, len(p.Partitions), v.Cluster.Partitions)
		}
		for i := range p.Partitions {
			q := &p.Partitions[i]
			if len(q.ISR) == 0 {
				return fmt.Errorf("%w: partition %d of policy %d has no member", ErrInvalid, i, p.ID)
			}
			for _, list := range [][]NodeID{q.ISR, q.Targets, q.Learners, q.Former, q.Waiting} {
				for _, id := range list {
					if v.Node(id) == nil {
						return fmt.Errorf("%w: partition %d of policy %d is held by node %d, which does not exist", ErrInvalid, i, p.ID, id)
					}
				}
			}
		}
	}
	return nil
}
