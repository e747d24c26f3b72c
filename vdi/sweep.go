package vdi

import (
	"context"
	"errors"
	"slices"
	"time"

	"sheepdog/storage/object"
	"sheepdog/vdi/catalog"
)

// sweepBatch bounds the objects that a sweep remembers at a time.
const sweepBatch = 1 << 16

// maxSweepRetry bounds the pause after a sweep that failed: each looks at all objects again.
const maxSweepRetry = 10 * time.Minute

// sweepAll sweeps at the start and every Config.SweepEvery. It may take long, so nobody's garbage waits for it.
func (s *Service) sweepAll(ctx context.Context) {
	due, pause := time.Now(), collectRetry
	for ctx.Err() == nil {
		if s.cfg.DefaultPolicy() != 0 && s.leading() && !time.Now().Before(due) {
			err := s.Sweep(ctx)
			if err == nil {
				due, pause = time.Now().Add(s.cfg.SweepEvery), collectRetry
			} else {
				due, pause = time.Now().Add(pause), min(2*pause, maxSweepRetry)
			}
			s.failed(ctx, &s.gc.sweepError, err, "what crashes have left is not looked for yet")
		}
		wait := time.Until(due)
		if wait <= 0 {
			wait = collectRetry // until it is this node's turn
		}
		_ = sleep(ctx, wait) // ends with ctx, as the loop does
	}
}

// Sweep looks at all objects and removes those that no map names: what crashes left. It fails if some are not reachable,
// after it has looked at all others.
func (s *Service) Sweep(ctx context.Context) error {
	s.gc.sweeping.Store(true)
	defer s.gc.sweeping.Store(false)
	t := tries{unreached: map[object.PolicyID]bool{}}
	for _, p := range s.policies() {
		t.try(ctx, p, func() error { return s.sweepPolicy(ctx, p) })
	}
	s.freeHeld(ctx, &t)
	if t.err != nil {
		return explain(t.err, "sweep")
	}
	s.gc.mu.Lock()
	s.gc.lastSweep = s.now()
	s.gc.mu.Unlock()
	return nil
}

// policies are those that may have objects.
func (s *Service) policies() []object.PolicyID {
	list := s.cfg.Catalog.Policies()
	more := []object.PolicyID{s.cfg.DefaultPolicy()}
	if s.cfg.Policies != nil {
		more = append(more, s.cfg.Policies()...)
	}
	for _, p := range more {
		if !slices.Contains(list, p) {
			list = append(list, p)
		}
	}
	return list
}

func (s *Service) sweepPolicy(ctx context.Context, policy object.PolicyID) error {
	var batch []object.ID
	flush := func() error {
		slices.Sort(batch) // by VDI, then by index
		d := s.doom(policy)
		for _, id := range batch {
			if _, err := s.sweepObject(ctx, id, &d, true); err != nil && !errors.Is(err, errMoved) {
				return err
			}
		}
		batch = batch[:0]
		s.gc.leftovers.Add(int64(len(d.list)))
		if err := s.removeObjects(ctx, &d); !errors.Is(err, errChanged) {
			return err
		}
		return nil // the next sweep finds them
	}
	err := s.cfg.Objects.List(ctx, policy, func(i object.Info) error {
		batch = append(batch, i.Key.ID)
		if len(batch) < sweepBatch {
			return ctx.Err()
		}
		return flush()
	})
	if err != nil {
		return err
	}
	return flush()
}

// leftover reports whether no map names an object, and removes it then if it shall.
func (s *Service) leftover(ctx context.Context, policy object.PolicyID, id object.ID, remove bool) (bool, error) {
	if v, ok := s.cfg.Catalog.Get(id.VID()); ok && v.Policy != policy {
		return s.misplaced(ctx, v, policy, remove)
	}
	if v, ok := s.cfg.Catalog.Get(id.VID()); ok && v.State == catalog.Live && !v.Snapshot {
		return s.sweepWorking(ctx, v, id, remove)
	}
	d := s.doom(policy)
	left, err := s.sweepObject(ctx, id, &d, remove)
	if err != nil || !left || !remove {
		return left, err
	}
	return true, s.removeObjects(ctx, &d)
}

// sweepObject reports whether an object is to be removed, because no map names it, and
// adds it to d. If it is one of a VDI that may be written, it removes it if it shall.
func (s *Service) sweepObject(ctx context.Context, id object.ID, d *doomed, remove bool) (bool, error) {
	kind, known := id.Kind()
	if !known || kind != object.KindData && kind != object.KindMap && kind != object.KindVMState {
		return false, nil
	}
	v, ok := s.cfg.Catalog.Get(id.VID())
	if !ok {
		// Who takes the vid just now must not lose objects: so the vid is taken first, and
		// its objects go the way of all deleted VDIs' objects.
		res, err := s.propose(ctx, catalog.Command{Adopt: &catalog.Adopt{VID: id.VID(), Policy: d.policy}})
		if err != nil {
			return false, err
		}
		v, ok = s.cfg.Catalog.Get(id.VID())
		s.log.Info("found objects of no VDI", "vid", id.VID(), "adopted", res.Refusal == "" && ok)
	}
	if ok && v.Policy != d.policy {
		_, err := s.misplaced(ctx, v, d.policy, remove)
		return false, err
	}
	switch {
	case !ok || v.State == catalog.Reserved || kind == object.KindMap:
		return false, nil
	case kind == object.KindVMState && v.State == catalog.Live:
		return false, nil // it goes with its VDI or snapshot
	case kind == object.KindVMState:
		d.add(id, v.Generation)
		return true, nil
	case v.State == catalog.Live && !v.Snapshot:
		_, err := s.sweepWorking(ctx, v, id, remove)
		return false, err
	}
	// No new map entry can come to name objects of a snapshot or a deleted VDI.
	live := s.liveOf(v.Family)
	used, err := s.referenced(ctx, live, id.VID(), id.Index())
	if err != nil || used {
		return false, err
	}
	d.add(id, v.Generation)
	d.looked(live...)
	return true, nil
}

// sweepWorking reports whether an object of a VDI that may be written just now is not
// named by its entry, with no write to the index about, and removes it then if it shall.
// Only the owner knows that. What a crash left of a VDI that another node owns waits
// until it is made anew, gets into a snapshot, or is looked for by Check.
func (s *Service) sweepWorking(ctx context.Context, v catalog.VDI, id object.ID, remove bool) (bool, error) {
	if v.Owner != nil && v.Owner.Name != s.cfg.Node {
		return false, nil
	}
	d := s.doom(v.Policy)
	used, err := s.referenced(ctx, s.liveOf(v.Family), v.VID, id.Index())
	if err != nil || used {
		return false, err
	}
	c, err := s.acquire(ctx, v.Name, "")
	if err != nil {
		return false, nil // it has gone meanwhile
	}
	defer s.release(c)
	if err := c.own(ctx); err != nil {
		return false, err
	}
	st := c.gate.stripe(id.Index())
	st.close()
	defer st.open()
	m := c.mapping.Load()
	if m.ref != v.Ref || m.policy != v.Policy || m.generation.Load() == 0 {
		return false, nil
	}
	p, err := c.page(ctx, m, id.Index())
	if err != nil || object.VID(p.entries[id.Index()%pageEntries].Load()&ownerMask) == v.VID {
		return false, err
	}
	if _, err := s.cfg.Objects.Stat(ctx, m.policy, id); isMissing(err) {
		return false, nil
	}
	if !remove {
		return true, nil
	}
	s.gc.leftovers.Add(1)
	defer c.touched(id)
	d.add(id, m.under)
	return true, s.removeObjects(ctx, &d)
}

// freeHeld frees deleted vids whose last objects have gone since their maps went: their
// users wrote over them, one by one.
func (s *Service) freeHeld(ctx context.Context, t *tries) {
	families := map[uint64]bool{}
	for _, v := range s.cfg.Catalog.InState(catalog.Deleted) {
		if !v.MapGone || families[v.Family] {
			continue
		}
		families[v.Family] = true
		if s.moving(v.Family) {
			continue // it is not known here what is free
		}
		t.try(ctx, v.Policy, func() error { return s.freeHeldOf(ctx, v.Family) })
	}
}

func (s *Service) freeHeldOf(ctx context.Context, family uint64) error {
	live, _, held := s.family(family)
	since := s.lostIn(policyOf(live))
	used := map[object.VID]bool{}
	for _, m := range live {
		err := s.walkMap(ctx, m.VDI, m.MaxObjects(), func(_ uint32, entries []byte) error {
			(&member{entries: entries}).noteOwners(used)
			return nil
		})
		if err != nil {
			return err
		}
	}
	var free []catalog.Ref
	for _, r := range held {
		if !used[r.VID] {
			free = append(free, r)
		}
	}
	if len(free) == 0 {
		return nil
	}
	if err := s.syncSince(ctx, policyOf(live), since); err != nil {
		return err
	}
	if err := s.stillLive(ctx, live); err != nil {
		return err
	}
	return s.freeVIDs(ctx, free, 0)
}
