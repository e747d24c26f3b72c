package vdi

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"sheepdog/storage/object"
	"sheepdog/vdi/catalog"
)

// A copy of a family's objects in another policy is made, and removed, under a vid of its own: see DESIGN.md.

// reserveCopy takes a vid for a copy of a family in a policy. The caller passes it to unreserve in the end.
func (s *Service) reserveCopy(ctx context.Context, v catalog.VDI, policy object.PolicyID) (catalog.VDI, error) {
	name := v.Name
	if name == "" { // nobody knows what it was
		name = v.VID.String()
	}
	s.makingMu.Lock()
	defer s.makingMu.Unlock()
	cmd := catalog.Move{Name: name, Source: v.Ref, Policy: policy, By: s.self(), At: s.now()}
	res, err := s.propose(ctx, catalog.Command{Move: &cmd})
	if err != nil {
		return catalog.VDI{}, err
	}
	s.making[res.VDI.Ref] = true
	return *res.VDI, nil
}

// copying returns what stands for objects of a family in a policy that is not its own.
func (s *Service) copying(family uint64, policy object.PolicyID) (catalog.VDI, bool) {
	for _, v := range s.cfg.Catalog.Family(family) {
		if v.Move && v.Policy == policy {
			return v, true
		}
	}
	return catalog.VDI{}, false
}

// moving reports whether there may be objects of a family in two policies.
func (s *Service) moving(family uint64) bool {
	return slices.ContainsFunc(s.cfg.Catalog.Family(family), func(v catalog.VDI) bool { return v.Move })
}

// misplaced reports whether what is of v in another policy than v's is left over: nobody is making or removing it. If
// it shall be removed, the collector does that, with all that the family has there.
func (s *Service) misplaced(ctx context.Context, v catalog.VDI, policy object.PolicyID, remove bool) (bool, error) {
	if _, known := s.copying(v.Family, policy); known || v.Move {
		return false, nil
	}
	if !remove {
		return true, nil
	}
	x, err := s.reserveCopy(ctx, v, policy)
	for _, otherwise := range []error{catalog.ErrBusy, catalog.ErrInvalid, catalog.ErrNotFound} {
		if errors.Is(err, otherwise) {
			return false, nil // this node's catalog was behind
		}
	}
	if err != nil {
		return false, err
	}
	s.log.Info("found objects of a volume in a policy that is not its", "vdi", v.Name, "policy", policy)
	s.gc.leftovers.Add(1)
	s.unreserve(ctx, x.Ref)
	return true, nil
}

// removeCopy removes all objects of a family in the policy that x stands for. Who goes by what was before the family
// was moved reads there until it knows better, so all shall; and what the copy's maker has under way must not come later.
//
// It is done under a generation that nobody else has, and the vid is freed by that: who else has believed to be the one that removes,
// and goes on when the family has come back there, under another vid then, is refused.
func (s *Service) removeCopy(ctx context.Context, x catalog.VDI) error {
	res, err := s.propose(ctx, catalog.Command{Removal: &catalog.Removal{Ref: x.Ref, Generation: x.Generation}})
	if err != nil {
		return s.unlessTaken(x, err)
	}
	x = *res.VDI
	if err := s.known(ctx); err != nil {
		return err
	}
	if err := s.fence(ctx, x); err != nil {
		return s.unlessTaken(x, err)
	}
	since := s.lostIn(x.Policy)
	// None of the family gets objects there: it is not moved there as long as x is what it is.
	elsewhere := map[object.VID]bool{}
	for _, v := range s.cfg.Catalog.Family(x.Family) {
		if v.Policy != x.Policy {
			elsewhere[v.VID] = true
		}
	}
	remove := func(list []object.ID) error {
		for _, id := range list {
			if err := s.removeObject(ctx, object.DeleteRequest{Policy: x.Policy, ID: id, Volume: x.VID, Generation: x.Generation}); err != nil {
				return err
			}
		}
		return nil
	}
	var batch []object.ID
	err = s.cfg.Objects.List(ctx, x.Policy, func(i object.Info) error {
		if elsewhere[i.Key.ID.VID()] {
			batch = append(batch, i.Key.ID)
		}
		if len(batch) < sweepBatch {
			return ctx.Err()
		}
		err := remove(batch)
		batch = batch[:0]
		return err
	})
	if err == nil {
		err = remove(batch)
	}
	if err == nil {
		err = s.syncSince(ctx, x.Policy, since)
	}
	if err == nil {
		err = s.freeVIDs(ctx, []catalog.Ref{x.Ref}, x.Generation)
	}
	return s.unlessTaken(x, err)
}

// unlessTaken forgets that something under a deleted vid was refused because the vid is used anew, or freed. If somebody else
// removes what it stands for, this node looks again later.
func (s *Service) unlessTaken(x catalog.VDI, err error) error {
	if !isStale(err) && !errors.Is(err, catalog.ErrNotFound) {
		return err
	}
	now, ok := s.cfg.Catalog.Get(x.VID)
	switch {
	case !ok || now.Ref != x.Ref || now.State != catalog.Deleted:
		return nil
	case now.Generation != x.Generation:
		return errRemoving
	}
	return err
}

// errRemoving says that another node does what this one began.
var errRemoving = fmt.Errorf("another node removes it: %w", object.ErrUnavailable)

func (s *Service) mayBeUp(n *catalog.Node) bool { return n == nil || s.cfg.Up == nil || s.cfg.Up(*n) }

// beginCopy is reserveCopy after what somebody has given up is out of the way.
func (s *Service) beginCopy(ctx context.Context, v catalog.VDI, policy object.PolicyID) (catalog.VDI, error) {
	for {
		x, err := s.reserveCopy(ctx, v, policy)
		list := s.cfg.Catalog.Family(v.Family)
		if errors.Is(err, catalog.ErrNotFound) { // it was a snapshot by then, and is deleted
			if i := slices.IndexFunc(list, func(w catalog.VDI) bool { return w.State == catalog.Live && w.Ref != v.Ref }); i >= 0 {
				v = list[i]
				continue
			}
		}
		if !errors.Is(err, catalog.ErrBusy) {
			return x, err
		}
		i := slices.IndexFunc(list, func(w catalog.VDI) bool { return w.Move && w.State == catalog.Reserved })
		if i < 0 {
			continue // it has just ended
		}
		other := list[i]
		s.makingMu.Lock()
		working := s.making[other.Ref]
		s.makingMu.Unlock()
		if working || other.By.Name != s.cfg.Node && s.mayBeUp(other.By) { // a former start of this node has ended
			return x, fmt.Errorf("its copies are being altered through node %q already: wait, or stop that: %w", other.By.Name, ErrBusy)
		}
		if _, err := s.propose(ctx, catalog.Command{Cancel: &catalog.Cancel{Ref: other.Ref}}); err != nil && !errors.Is(err, catalog.ErrNotFound) {
			return x, err
		}
	}
}
