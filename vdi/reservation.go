package vdi

import (
	"context"

	"sheepdog/vdi/catalog"
)

// Reservation returns the text that SetReservation stored for the VDI (tag "") or
// snapshot, "" if none, and its revision, as far as this node knows.
func (s *Service) Reservation(name, tag string) (text string, revision uint64, err error) {
	v, err := s.cfg.Catalog.Find(name, tag)
	if err != nil {
		return "", 0, explain(err, "look for reservations")
	}
	text, revision = v.Reserved()
	return text, revision, nil
}

// SetReservation stores a text with a VDI, if revision is still the newest, for who keeps
// others away from it by rules of its own. Every node knows it; clones do not get it. It
// returns the new revision, and fails with ErrStale if there is a newer one already.
//
// With fence, this node is the VDI's owner when it returns. Then what another node has under way has
// landed, and what it does later, it does after having applied this.
func (s *Service) SetReservation(ctx context.Context, name, tag string, revision uint64, text string, fence bool) (uint64, error) {
	v, err := s.find(ctx, name, tag)
	if err != nil {
		return 0, explain(err, "reserve")
	}
	res, err := s.propose(ctx, catalog.Command{Hold: &catalog.SetHold{Ref: v.Ref, Revision: revision, Text: text}})
	if err != nil {
		return 0, explain(err, "reserve %q", name)
	}
	if fence && tag == "" {
		if err := s.Own(ctx, name); err != nil {
			return 0, err
		}
	}
	_, now := res.VDI.Reserved()
	return now, nil
}

// Own makes this node the VDI's owner, if it is not yet.
func (s *Service) Own(ctx context.Context, name string) error {
	c, err := s.acquire(ctx, name, "")
	if err != nil {
		return explain(err, "take ownership of %q", name)
	}
	defer s.release(c)
	return c.own(ctx)
}
