package vdi

import (
	"context"
	"errors"
	"fmt"
	"time"

	"sheepdog/storage/object"
	"sheepdog/vdi/catalog"
)

// Ownership: see DESIGN.md.

const (
	// minTenure is how long who takes ownership keeps it, so that something gets done. It is
	// doubled, up to maxTenure, as long as nothing did.
	minTenure = 20 * time.Millisecond
	maxTenure = 4 * time.Second
	// adminHold is for how long others are kept away from a volume that is changed as a whole.
	adminHold = 20 * time.Second
	// heldPoll is how often who waits for another owner's tenure looks whether it is over.
	heldPoll = 2 * time.Millisecond
	// adminAttempts bounds how often a change of the volume as a whole begins anew because
	// ownership went. From the second time on others are kept away.
	adminAttempts = 4
)

// errDisowned says that ownership went while something waited.
var errDisowned = fmt.Errorf("ownership went meanwhile: %w", object.ErrStale)

// isStale: what failed may be tried again after asking who owns the VDI.
func isStale(err error) bool {
	return errors.Is(err, object.ErrStale) || errors.Is(err, catalog.ErrStale) || errors.Is(err, ErrStale)
}

// own makes this node the owner of the VDI, if it is not yet.
func (c *core) own(ctx context.Context) error {
	if c.mapping.Load().generation.Load() != 0 {
		return nil
	}
	if err := c.admin.LockWithin(ctx); err != nil {
		return err
	}
	defer c.admin.Unlock()
	return c.ownLocked(ctx, time.Duration(c.tenure.Load()))
}

// asOwner calls fn with admin held and this node the owner. If another node takes the
// VDI meanwhile fn is called again, with others kept away.
func (c *core) asOwner(ctx context.Context, fn func() error) error {
	if err := c.admin.LockWithin(ctx); err != nil {
		return err
	}
	defer c.admin.Unlock()
	defer c.letGo(ctx)
	var err error
	for n := range adminAttempts {
		owned := c.mapping.Load().generation.Load() != 0
		if n > 0 || !owned {
			err = c.ownLocked(ctx, adminHold)
		}
		if err == nil {
			err = fn()
		}
		if !isStale(err) {
			break
		}
	}
	return err
}

// letGo ends what keeps others away.
func (c *core) letGo(ctx context.Context) {
	if !c.held {
		return
	}
	c.held = false
	v, err := c.current()
	if err != nil || v.Owner == nil || *v.Owner != c.s.self() || !v.HeldAt(c.s.now()) {
		return
	}
	acquire := catalog.Acquire{Ref: v.Ref, By: c.s.self(), Since: v.Generation, At: c.s.now()}
	if _, err := c.s.propose(context.WithoutCancel(ctx), catalog.Command{Acquire: &acquire}); err != nil {
		c.s.log.Info("volume is kept from other nodes a little longer", "vdi", c.name, "error", err)
	}
}

// ownLocked is own for who holds admin. What was cached before somebody else owned the
// VDI is dropped. Others are kept away for hold.
func (c *core) ownLocked(ctx context.Context, hold time.Duration) error {
	if c.mapping.Load().generation.Load() != 0 && hold < adminHold {
		return nil
	}
	c.gate.pause()
	defer c.gate.resume()
	until := time.Now().Add(c.s.cfg.OwnWithin)
	for {
		err := c.ask(ctx, hold)
		again := isStale(err)
		if errors.Is(err, object.ErrStale) { // the next owner was quicker than this node's catalog
			err = c.s.catchUp(ctx)
			again = err == nil
		}
		if errors.Is(err, catalog.ErrBusy) {
			err = c.awaitTenure(ctx, until, err)
			again = err == nil
		}
		if !again || time.Now().After(until) {
			return explain(err, "take ownership of %s", c.title())
		}
	}
}

// awaitTenure waits until the owner may be followed. It looks at the local catalog only.
func (c *core) awaitTenure(ctx context.Context, until time.Time, busy error) error {
	t := time.NewTicker(heldPoll)
	defer t.Stop()
	for {
		v, err := c.current()
		if err != nil || !v.HeldAt(c.s.now()) {
			return err
		}
		if time.Now().After(until) {
			return busy
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-t.C:
		}
	}
}

// current returns what the volume is by this node's catalog. A VDI of the same name that
// was made later is another one.
func (c *core) current() (catalog.VDI, error) {
	if c.snapshot {
		m := c.mapping.Load()
		if v, ok := c.s.cfg.Catalog.Get(m.vid()); ok && v.Ref == m.ref && v.State == catalog.Live {
			return v, nil
		}
	} else if v, err := c.s.cfg.Catalog.Find(c.name, ""); err == nil && v.Family == c.family {
		return v, nil
	}
	return catalog.VDI{}, fmt.Errorf("%s was deleted: %w", c.title(), ErrNotFound)
}

// ask finds the VDI in the catalog and becomes its owner. Nobody passes the gate.
func (c *core) ask(ctx context.Context, hold time.Duration) error {
	before, err := c.current()
	if err != nil {
		return err
	}
	v, me, m := before, c.s.self(), c.mapping.Load()
	mine := v.Owner != nil && *v.Owner == me
	c.mu.Lock()
	doubted, unsure := c.doubted, c.unsure
	c.mu.Unlock()
	if mine && unsure {
		if _, err := c.s.propose(ctx, catalog.Command{Release: &catalog.Release{Ref: v.Ref, Generation: v.Generation}}); err != nil {
			return err
		}
	}
	if !mine || doubted || hold >= adminHold {
		acquire := catalog.Acquire{Ref: v.Ref, By: me, Since: v.Generation, At: c.s.now(), Hold: hold}
		res, err := c.s.propose(ctx, catalog.Command{Acquire: &acquire})
		if err != nil {
			return c.unlessReplaced(v.Ref, err)
		}
		v = *res.VDI
		c.held = c.held || hold >= adminHold
	}
	if v.VID != m.vid() { // nobody flushes by the former vid any more: what is lost there would not be told
		if err := c.sync(ctx, m); err != nil && !errors.Is(err, object.ErrLost) {
			return err
		}
	}
	done, _ := c.s.taken.Load(v.Ref)
	kept := v.Ref == m.ref && m.under == v.Generation && done == v.Generation && !m.table.lost.Load()
	if kept {
		m = &mapping{table: m.table, ref: m.ref, policy: m.policy, moves: m.moves, under: m.under}
	} else {
		fresh := !mine && before.Owner == nil && len(before.Previous) == 0
		if err := c.takeOver(ctx, v, fresh); err != nil {
			return err
		}
		m = newMapping(v)
	}
	c.adopt(m, v, kept)
	return nil
}

// unlessReplaced is err, or says that what was not found under a vid was a snapshot by then, and is deleted: the volume has
// another vid.
func (c *core) unlessReplaced(r catalog.Ref, err error) error {
	if now, there := c.current(); errors.Is(err, catalog.ErrNotFound) && there == nil && now.Ref != r {
		return fmt.Errorf("%s has another vid by now: %w", c.title(), ErrStale)
	}
	return err
}

// takeOver returns when nobody answers or writes anything as the VDI's owner before v,
// and all that anybody wrote is durable. fresh: nobody ever did.
func (c *core) takeOver(ctx context.Context, v catalog.VDI, fresh bool) error {
	for _, n := range v.Previous {
		if c.s.cfg.Settled == nil || n.Name == c.s.cfg.Node {
			continue
		}
		if err := c.s.cfg.Settled(ctx, n, v.VID, v.Generation); err != nil {
			return fmt.Errorf("wait for node %q to give it up: %w", n.Name, err)
		}
	}
	if !fresh {
		if err := c.s.fence(ctx, v); err != nil {
			return err
		}
		if err := c.s.fenceFormer(ctx, v); err != nil {
			return err
		}
	}
	c.s.taken.Store(v.Ref, v.Generation)
	return nil
}

// fenceFormer keeps out who goes on using v under a vid that it had before. If that was changed by a snapshot, a rollback or a deletion
// that was rolled back, and who did it ended before others were told, they would read what was there then.
func (s *Service) fenceFormer(ctx context.Context, v catalog.VDI) error {
	s.fenced.Range(func(r, generation any) bool {
		if w, ok := s.cfg.Catalog.Get(r.(catalog.Ref).VID); !ok || w.Ref != r || w.Generation != generation {
			s.fenced.Delete(r)
		}
		return true
	})
	for _, w := range former(v, s.cfg.Catalog.Family(v.Family)) {
		if generation, _ := s.fenced.Load(w.Ref); generation == w.Generation {
			continue
		}
		if err := s.fence(ctx, w); err != nil && !errors.Is(err, object.ErrStale) { // or it was deleted since, or collected
			return err
		}
		s.fenced.Store(w.Ref, w.Generation)
	}
	return nil
}

// former are those of its family that may be taken for v by who does not know of the last changes of it. The collector has fenced
// those whose maps are gone.
func former(v catalog.VDI, family []catalog.VDI) (list []catalog.VDI) {
	parents := map[object.VID]bool{v.Parent: true}
	for _, w := range family {
		if w.State == catalog.Deleted && !w.Snapshot && !w.Move && !w.MapGone && w.Name == v.Name {
			list = append(list, w)
			parents[w.Parent] = true // by a snapshot that was just taken
		}
	}
	for _, w := range family {
		if parents[w.VID] && w.Snapshot && !w.MapGone {
			list = append(list, w)
		}
	}
	return list
}

// adopt makes m, which nobody has seen yet, the volume's mapping. Nobody passes the gate;
// but readers do not pass it, and would trust what is no longer theirs: so what the catalog
// says by now is known before m is seen.
func (c *core) adopt(m *mapping, v catalog.VDI, keepBook bool) {
	c.mapping.Load().generation.Store(0) // the catalog does not tell it any more
	m.generation.Store(m.under)
	// From here on noticed sees changes of the catalog; the ones before are seen here.
	c.s.owned.Store(m.vid(), m)
	if now, ok := c.s.cfg.Catalog.Get(m.vid()); !ok || !c.s.isMine(now, m) {
		c.s.lost(m)
	}
	c.mu.Lock()
	c.doubted, c.unsure = false, false
	if !keepBook {
		c.book = book{}
	}
	c.mapping.Store(m)
	c.mu.Unlock()
	if m.table.lost.Load() { // since it was looked whether it may be kept
		c.forget(m)
	}
	c.changed.Store(true)
	c.setSize(m, v.Size)
}

// isMine reports whether by v this node owns what m is the map of.
func (s *Service) isMine(v catalog.VDI, m *mapping) bool {
	return v.Ref == m.ref && v.State == catalog.Live && !v.Snapshot && v.Owner != nil && v.Owner.Name == s.cfg.Node && v.Generation == m.under
}

// noticed is called with each VDI that the catalog changes, while it does. When the
// command is applied that gives a VDI to another node, nothing is answered as the owner any more.
func (s *Service) noticed(v catalog.VDI) {
	if m, ok := s.owned.Load(v.VID); ok && !s.isMine(v, m.(*mapping)) {
		s.lost(m.(*mapping))
	}
}

func (s *Service) lost(m *mapping) {
	m.generation.Store(0)
	s.taken.Delete(m.ref)
	s.owned.CompareAndDelete(m.vid(), m)
}

// disown gives up ownership that the objects refused: the next write asks anew.
func (c *core) disown(m *mapping) {
	if c.mapping.Load() != m || c.snapshot {
		return // something older, or only read
	}
	c.s.lost(m)
	c.doubt(m)
}

// stillOwned fails if this node does not own the VDI by m any more. Then the next owner may have removed what m names.
func (c *core) stillOwned(ctx context.Context, m *mapping) error {
	if err := c.s.catchUp(ctx); err != nil {
		return err
	}
	if m.generation.Load() == 0 {
		return errDisowned
	}
	return nil
}

// doubt gives up ownership for the time being, because a command that ends it may still
// be applied. The next write asks through the log.
func (c *core) doubt(m *mapping) {
	c.mu.Lock()
	c.doubted = true
	c.mu.Unlock()
	m.generation.Store(0)
}

// catchUp returns when this node has applied every command that was answered before.
func (s *Service) catchUp(ctx context.Context) error {
	_, err := s.propose(ctx, catalog.Command{Barrier: &catalog.Barrier{}})
	return err
}

func (s *Service) leased() bool { return s.cfg.Leased == nil || s.cfg.Leased() }

func (s *Service) leading() bool { return s.cfg.Leading == nil || s.cfg.Leading() }
