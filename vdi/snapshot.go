package vdi

import (
	"context"
	"errors"
	"fmt"

	"sheepdog/storage/object"
	"sheepdog/vdi/catalog"
)

func isMissing(err error) bool { return errors.Is(err, object.ErrNotFound) }

// Snapshot makes what the VDI holds now a snapshot. It has every write answered before
// the call and none begun after it; writes wait while the map is copied. A tag must be
// unique among the VDI's snapshots; "" is allowed, the snapshot then has a number only.
func (s *Service) Snapshot(ctx context.Context, name, tag string) (Info, error) {
	return s.snapshotAs(ctx, name, tag, newIdentity())
}

func (s *Service) snapshotAs(ctx context.Context, name, tag, identity string) (Info, error) {
	c, err := s.acquire(ctx, name, "")
	if err != nil {
		return Info{}, explain(err, "snapshot")
	}
	defer s.release(c)
	v, err := c.snapshotAs(ctx, tag, identity)
	if err != nil {
		return Info{}, explain(err, "snapshot %q of %q", tag, name)
	}
	return s.describe(v), nil
}

func (c *core) snapshotAs(ctx context.Context, tag, identity string) (v catalog.VDI, err error) {
	err = c.asOwner(ctx, func() error {
		v, err = c.snapshotOwned(ctx, tag, identity)
		return err
	})
	return v, err
}

func (c *core) snapshotOwned(ctx context.Context, tag, identity string) (catalog.VDI, error) {
	if err := c.ready(ctx); err != nil {
		return catalog.VDI{}, err
	}
	m := c.mapping.Load()
	src, ok := c.s.cfg.Catalog.Get(m.vid())
	if !ok || src.Ref != m.ref {
		return catalog.VDI{}, fmt.Errorf("%s was changed meanwhile: %w", c.title(), ErrStale)
	}
	if err := c.s.checkTag(src, tag); err != nil {
		return catalog.VDI{}, err
	}
	// What can be done before the pause makes it shorter.
	if err := c.settleAll(ctx, m); err != nil {
		return catalog.VDI{}, err
	}
	ref, err := c.s.reserve(ctx, c.name, src)
	if err != nil {
		return catalog.VDI{}, c.unlessReplaced(src.Ref, err)
	}
	defer c.s.unreserve(ctx, ref)
	if err := c.pauseSettled(ctx, m); err != nil {
		return catalog.VDI{}, err
	}
	defer c.gate.resume()
	if err := c.s.copyMap(ctx, src, ref); err != nil {
		return catalog.VDI{}, err
	}
	cmd := catalog.Snapshot{
		Source: src.Ref, Reserved: ref, Tag: tag, Identity: identity, By: c.s.self(), Generation: m.under, At: c.s.now(),
	}
	res, err := c.s.propose(ctx, catalog.Command{Snapshot: &cmd})
	if err != nil {
		c.doubt(m) // it may be applied nevertheless: the next write looks
		return catalog.VDI{}, c.unlessReplaced(src.Ref, err)
	}
	taken, ok := c.s.cfg.Catalog.Get(src.VID)
	if !ok || taken.Ref != src.Ref || !taken.Snapshot {
		return catalog.VDI{}, fmt.Errorf("the snapshot was taken, and deleted meanwhile: %w", ErrNotFound)
	}
	// Nodes that do not know yet would go on reading the snapshot instead of the volume.
	if err := c.s.fence(ctx, taken); err != nil && !errors.Is(err, object.ErrStale) { // or it is deleted already
		return catalog.VDI{}, fmt.Errorf("the snapshot was taken, but other nodes may not know it: %w", err)
	}
	next := &mapping{table: m.table, ref: ref, policy: res.VDI.Policy, moves: res.VDI.Moves, under: res.VDI.Generation}
	c.s.taken.Store(ref, next.under)
	c.adopt(next, *res.VDI, true)
	return taken, nil
}

// doubtTries bounds how often a snapshot pauses in vain.
const doubtTries = 4

// pauseSettled pauses the volume with everything durable and settled. An entry whose
// storing failed just before the pause is stored again with the gate open.
func (c *core) pauseSettled(ctx context.Context, m *mapping) error {
	for try := 1; ; try++ {
		c.gate.pause()
		err := c.settleAll(ctx, m)
		if err == nil && !c.inDoubt() {
			return nil
		}
		c.gate.resume()
		switch {
		case err != nil:
			return err
		case try == doubtTries:
			return fmt.Errorf("the map could not be written: try again: %w", ErrIO)
		}
		if err := c.ready(ctx); err != nil {
			return err
		}
		if c.mapping.Load() != m {
			return fmt.Errorf("%s was taken over meanwhile: %w", c.title(), ErrStale)
		}
	}
}

// checkTag refuses early what the catalog would refuse.
func (s *Service) checkTag(v catalog.VDI, tag string) error {
	if err := catalog.CheckTag(tag, v.SnapshotID); err != nil {
		return err
	}
	for _, w := range s.cfg.Catalog.Snapshots(v.Name) {
		if tag != "" && w.Tag == tag {
			return fmt.Errorf("there is a snapshot of that tag: %w", ErrExists)
		}
	}
	return nil
}

// ready prepares a VDI for a change as a whole: no shrinking is unfinished, and every
// entry that a crash left unsettled has been looked at. The caller holds admin and owns
// the VDI; the gate is open.
func (c *core) ready(ctx context.Context) error {
	if err := c.finishTrim(ctx); err != nil {
		return err
	}
	m := c.mapping.Load()
	if err := c.scan(ctx, m); err != nil {
		return err
	}
	return c.resolve(ctx, m)
}

// settleAll makes everything durable, and then every entry settled in the stored map, but
// for what is written meanwhile. The caller holds admin.
func (c *core) settleAll(ctx context.Context, m *mapping) error {
	if err := c.syncNow(ctx); err != nil {
		return err
	}
	return c.settle(ctx, m)
}

func (c *core) inDoubt() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.book.doubtful)+len(c.book.uncertain) > 0
}

// Clone makes a new VDI dst that begins as the snapshot (src, tag) and shares its objects.
func (s *Service) Clone(ctx context.Context, src, tag, dst string) (Info, error) {
	v, err := s.clone(ctx, src, tag, dst)
	if err != nil {
		return Info{}, explain(err, "clone %q of %q to %q", tag, src, dst)
	}
	return s.describe(v), nil
}

func (s *Service) clone(ctx context.Context, src, tag, dst string) (catalog.VDI, error) {
	if tag == "" {
		return catalog.VDI{}, fmt.Errorf("a clone is made of a snapshot: take one and name it: %w", ErrInvalid)
	}
	if err := catalog.CheckName(dst); err != nil {
		return catalog.VDI{}, err
	}
	v, err := s.find(ctx, src, tag)
	if err != nil {
		return catalog.VDI{}, err
	}
	if _, err := s.cfg.Catalog.Find(dst, ""); err == nil {
		return catalog.VDI{}, fmt.Errorf("there is a VDI of that name: %w", ErrExists)
	}
	ref, err := s.reserve(ctx, dst, v)
	if err != nil {
		return catalog.VDI{}, err
	}
	defer s.unreserve(ctx, ref)
	if err := s.copyMap(ctx, v, ref); err != nil {
		return catalog.VDI{}, err
	}
	res, err := s.propose(ctx, catalog.Command{Clone: &catalog.Clone{Source: v.Ref, Reserved: ref, Name: dst, At: s.now()}})
	if err != nil {
		return catalog.VDI{}, err
	}
	return *res.VDI, nil
}

// Rollback makes the VDI again what its snapshot is. What was written since is lost, but
// for what other snapshots have. A deleted VDI comes back. Open volumes go on with the
// snapshot's content and size.
func (s *Service) Rollback(ctx context.Context, name, tag string) (Info, error) {
	v, err := s.rollback(ctx, name, tag)
	if err != nil {
		return Info{}, explain(err, "rollback of %q to %q", name, tag)
	}
	s.tell(ctx, "rolled back", name)
	return s.describe(v), nil
}

func (s *Service) rollback(ctx context.Context, name, tag string) (catalog.VDI, error) {
	if tag == "" {
		return catalog.VDI{}, fmt.Errorf("a snapshot's tag or number is needed: %w", ErrInvalid)
	}
	v, err := s.find(ctx, name, tag)
	if err != nil {
		return catalog.VDI{}, err
	}
	c, err := s.acquire(ctx, name, "")
	if errors.Is(err, catalog.ErrNotFound) {
		made, err := s.rollbackCommand(ctx, v, catalog.Ref{}, 0)
		if err != nil {
			return catalog.VDI{}, err
		}
		if err := s.fenceFormer(ctx, made); err != nil { // who deleted it may have told nobody
			return catalog.VDI{}, fmt.Errorf("rolled back, but other nodes may not know it: %w", err)
		}
		return made, nil
	}
	if err != nil {
		return catalog.VDI{}, err
	}
	defer s.release(c)
	return c.rollback(ctx, v)
}

func (c *core) rollback(ctx context.Context, v catalog.VDI) (made catalog.VDI, err error) {
	err = c.asOwner(ctx, func() error {
		made, err = c.rollbackOwned(ctx, v)
		return err
	})
	return made, err
}

func (c *core) rollbackOwned(ctx context.Context, v catalog.VDI) (catalog.VDI, error) {
	c.gate.pause()
	defer c.gate.resume()
	m := c.mapping.Load()
	made, err := c.s.rollbackCommand(ctx, v, m.ref, m.under)
	if err != nil {
		c.doubt(m) // it may be applied nevertheless
		return catalog.VDI{}, err
	}
	if old, ok := c.s.cfg.Catalog.Get(m.vid()); ok && old.Serial == m.ref.Serial {
		if err := c.s.fence(ctx, old); err != nil && !errors.Is(err, object.ErrStale) {
			return catalog.VDI{}, fmt.Errorf("rolled back, but other nodes may not know it: %w", err)
		}
	}
	c.s.taken.Store(made.Ref, made.Generation)
	if made.Family != c.family { // a snapshot of a former VDI of that name: this one is deleted, for who has it open too
		c.doubt(m)
		return made, nil
	}
	c.adopt(newMapping(made), made, false)
	return made, nil
}

// rollbackCommand copies the snapshot's map and puts it in place of working.
func (s *Service) rollbackCommand(ctx context.Context, v catalog.VDI, working catalog.Ref, generation uint64) (catalog.VDI, error) {
	ref, err := s.reserve(ctx, v.Name, v)
	if err != nil {
		return catalog.VDI{}, err
	}
	defer s.unreserve(ctx, ref)
	if err := s.copyMap(ctx, v, ref); err != nil {
		return catalog.VDI{}, err
	}
	cmd := catalog.Rollback{Source: v.Ref, Reserved: ref, Working: working, By: s.self(), Generation: generation, At: s.now()}
	res, err := s.propose(ctx, catalog.Command{Rollback: &cmd})
	if err != nil {
		return catalog.VDI{}, err
	}
	return *res.VDI, nil
}
