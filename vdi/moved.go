package vdi

import (
	"context"
	"fmt"

	"sheepdog/storage/object"
	"sheepdog/vdi/catalog"
)

// errMoved says that something was looked for where it is not kept any more.
var errMoved = fmt.Errorf("the objects were moved to another policy meanwhile: %w", object.ErrStale)

// place is where a VDI or snapshot is kept. Back in a policy where it was before, it is in another place.
type place struct {
	ref   catalog.Ref
	moves uint64
}

func placeOf(v catalog.VDI) place { return place{v.Ref, v.Moves} }

func (m *mapping) place() place { return place{m.ref, m.moves} }

// unmoved fails with errMoved if a VDI or snapshot is not kept there any more: what was not found there proves
// nothing then. Objects that were moved are removed when every node that has a lease knows of the move; so the
// lease is asked for first, as in trusts.
func (s *Service) unmoved(ctx context.Context, at place) error {
	if !s.leased() {
		if err := s.catchUp(ctx); err != nil {
			return err
		}
	}
	if v, ok := s.cfg.Catalog.Get(at.ref.VID); ok && v.Ref == at.ref && v.Moves != at.moves {
		return errMoved
	}
	return nil
}

// renewed is the volume's mapping; that of a snapshot which was moved says where it is now. Its map is the same.
func (c *core) renewed() *mapping {
	m := c.mapping.Load()
	if !c.snapshot {
		return m
	}
	v, ok := c.s.cfg.Catalog.Get(m.vid())
	if !ok || v.Ref != m.ref || v.Moves == m.moves && v.Generation == m.under {
		return m
	}
	c.mapping.CompareAndSwap(m, &mapping{table: m.table, ref: m.ref, policy: v.Policy, moves: v.Moves, under: v.Generation})
	return c.mapping.Load()
}
