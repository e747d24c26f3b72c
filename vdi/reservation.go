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
// With fence, every node that serves clients goes by it when it returns: none admits anything by what was
// before. This node is the VDI's owner then, so what another one has under way has landed. If that fails the
// text is stored nevertheless.
func (s *Service) SetReservation(ctx context.Context, name, tag string, revision uint64, text string, fence bool) (uint64, error) {
	v, err := s.find(ctx, name, tag)
	if err != nil {
		return 0, explain(err, "reserve")
	}
	res, err := s.propose(ctx, catalog.Command{Hold: &catalog.SetHold{Ref: v.Ref, Revision: revision, Text: text}})
	if err != nil {
		return 0, explain(err, "reserve %q", name)
	}
	if fence {
		if err := s.known(ctx); err != nil {
			return 0, explain(err, "reserve %q: another node may not know it", name)
		}
		if tag == "" {
			if err := s.Own(ctx, name); err != nil {
				return 0, err
			}
		}
	}
	_, now := res.VDI.Reserved()
	return now, nil
}

// Known returns when every node that serves clients goes by all that this node knows.
func (s *Service) Known(ctx context.Context) error {
	return explain(s.known(ctx), "tell other nodes")
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
