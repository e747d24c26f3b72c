package vdi

import (
	"context"
	"fmt"
	"maps"
	"strings"

	"sheepdog/storage/object"
	"sheepdog/vdi/catalog"
)

// Delete deletes the VDI (tag "") or one of its snapshots, in any order. Snapshots of a
// deleted VDI stay. Its space comes back in the background. It fails with ErrBusy while
// somebody has it open through this node, and with ErrLocked. Who has it open through
// another node is not known here: their requests fail with ErrNotFound from then on. To
// prevent that, lock the VDI.
func (s *Service) Delete(ctx context.Context, name, tag string) error {
	if err := s.delete(ctx, name, tag); err != nil {
		if tag != "" {
			return explain(err, "delete snapshot %q of %q", tag, name)
		}
		return explain(err, "delete VDI %q", name)
	}
	s.tell(ctx, "deleted", name)
	return nil
}

func (s *Service) delete(ctx context.Context, name, tag string) error {
	c, err := s.acquire(ctx, name, tag)
	if err != nil {
		return err
	}
	defer s.release(c)
	if err := c.admin.LockWithin(ctx); err != nil {
		return err
	}
	defer c.admin.Unlock()
	for range deleteAttempts {
		if err = c.delete(ctx); !isStale(err) {
			break
		}
	}
	return err
}

// deleteAttempts bounds how often deleting begins anew because the VDI has another vid by then, after a snapshot through another
// node. Nobody is kept away meanwhile, so it is more than adminAttempts.
const deleteAttempts = 32

// delete is Delete for who holds admin. It fails as stale if the VDI has another vid by now.
func (c *core) delete(ctx context.Context) error {
	s := c.s
	v, err := s.beginDelete(c)
	if err != nil {
		return err
	}
	_, err = s.propose(ctx, catalog.Command{Delete: &catalog.Delete{Ref: v.Ref, Working: !c.snapshot, At: s.now()}})
	s.endDelete(c, v, err)
	if err != nil {
		return c.unlessReplaced(v.Ref, err)
	}
	// Other nodes may not know yet. From here on the objects refuse what they ask for; if
	// this fails, the collector does it before it removes anything.
	if gone, ok := s.cfg.Catalog.Get(v.VID); ok && gone.Serial == v.Serial {
		fence := s.fence
		if !c.snapshot {
			fence = s.fenceFormer // itself, too
		}
		if err := fence(ctx, gone); err != nil {
			s.log.Info("deleted volume may be used by other nodes for a while", "vdi", c.name, "error", err)
		}
	}
	return nil
}

// beginDelete keeps a volume from being opened.
func (s *Service) beginDelete(c *core) (catalog.VDI, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if who := c.openers(); len(who) > 0 {
		return catalog.VDI{}, fmt.Errorf("%s is in use by %s: %w", c.title(), strings.Join(who, ", "), ErrBusy)
	}
	tag := ""
	if c.snapshot {
		tag = c.tag
	}
	v, err := s.cfg.Catalog.Find(c.name, tag)
	if err != nil {
		return catalog.VDI{}, err
	}
	s.deleting[v.Ref] = true
	return v, nil
}

func (s *Service) endDelete(c *core, v catalog.VDI, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.deleting, v.Ref)
	if !c.snapshot {
		// Nothing is stored any more under a vid that is deleted, and collected soon.
		c.doubt(c.mapping.Load())
	}
	if err != nil {
		return
	}
	delete(s.usage, v.Ref)
	if c.snapshot {
		delete(s.snapshot, v.VID)
	} else if s.working[c.name] == c {
		delete(s.working, c.name)
	}
}

// Resize changes the size of a VDI, to any number of bytes. What was beyond a smaller
// size is gone, also if it grows again. Open volumes keep their size, but requests
// beyond a smaller one fail with ErrInvalid.
func (s *Service) Resize(ctx context.Context, name string, size int64) (Info, error) {
	c, err := s.acquire(ctx, name, "")
	if err != nil {
		return Info{}, explain(err, "resize")
	}
	defer s.release(c)
	v, err := c.resize(ctx, size)
	if err != nil {
		return Info{}, explain(err, "resize VDI %q to %d bytes", name, size)
	}
	s.tell(ctx, "resized", name)
	return s.describe(v), nil
}

// resize changes the size once: when another node takes the VDI in the middle, and changes it in its turn, that comes after.
func (c *core) resize(ctx context.Context, size int64) (v catalog.VDI, err error) {
	done := false
	err = c.asOwner(ctx, func() error {
		err := c.finishTrim(ctx)
		if err != nil || done {
			return err
		}
		if v, err = c.changeSize(ctx, size); err != nil || v.Trim == 0 {
			return err
		}
		done = true
		return c.finishTrim(ctx)
	})
	if err != nil && done {
		return v, fmt.Errorf("the size is changed, the space beyond it is still to be freed: %w", err)
	}
	v.Trim = 0
	return v, err
}

// changeSize has nobody write meanwhile: a write is inside the size, or refused.
func (c *core) changeSize(ctx context.Context, size int64) (catalog.VDI, error) {
	c.gate.pause()
	defer c.gate.resume()
	m := c.mapping.Load()
	res, err := c.s.propose(ctx, catalog.Command{Resize: &catalog.Resize{Ref: m.ref, Size: size, Generation: m.under}})
	if err != nil {
		c.doubt(m) // it may be applied nevertheless
		return catalog.VDI{}, c.unlessReplaced(m.ref, err)
	}
	c.setSize(m, size)
	return *res.VDI, nil
}

// finishTrim frees what is beyond the size after a VDI was shrunk; also what was begun
// before a crash. It is done before the VDI may grow or be copied, so that nobody sees
// what was cut off. The caller holds admin; the gate is open.
func (c *core) finishTrim(ctx context.Context) error {
	m := c.mapping.Load()
	v, ok := c.s.cfg.Catalog.Get(m.vid())
	if !ok || v.Ref != m.ref || v.Trim == 0 {
		return nil
	}
	if v.Trim > v.Size {
		if err := c.clearRange(ctx, v.Size, v.Trim); err != nil {
			return err
		}
	}
	if err := c.removeCleared(ctx, m); err != nil {
		return err
	}
	if err := c.syncAs(ctx, m); err != nil {
		return err
	}
	_, err := c.s.propose(ctx, catalog.Command{Trimmed: &catalog.Trimmed{Ref: v.Ref, Size: v.Size, Generation: m.under}})
	return c.unlessReplaced(v.Ref, err)
}

// clearBatch is after how many objects clearRange removes them.
const clearBatch = maxEmpty / 2

func (c *core) removeCleared(ctx context.Context, m *mapping) error {
	if err := c.settleAll(ctx, m); err != nil {
		return err
	}
	return c.removeEmpty(ctx, m)
}

// clearRange discards [from, to), which is beyond the size, by whole objects but for the
// first.
func (c *core) clearRange(ctx context.Context, from, to int64) error {
	last := (to + c.objectSize() - 1) &^ (c.objectSize() - 1)
	for off, n := from, int64(0); off < last; off += n {
		if skip := c.holeRun(&Request{Op: OpDiscard}, off, last); skip > 0 {
			n = skip
			continue
		}
		n = min(last-off, c.objectSize()-off&(c.objectSize()-1))
		if err := c.clearPart(ctx, off, n); err != nil {
			return err
		}
		if off>>c.shift%clearBatch == 0 {
			if err := c.removeCleared(ctx, c.mapping.Load()); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *core) clearPart(ctx context.Context, off, n int64) error {
	done := make(chan struct{})
	r := Request{Op: OpDiscard, Off: off, Len: n, Done: func(*Request) { close(done) }}
	r.span.core, r.span.left, r.span.beyond = c, 1, true
	c.start(c.cut(&r.span.one, &r, off, n))
	c.s.cfg.Objects.Kick()
	<-done
	if r.Err != nil {
		return r.Err
	}
	return ctx.Err()
}

// SetAttr sets an attribute of a VDI.
func (s *Service) SetAttr(ctx context.Context, name, key, value string) error {
	return s.changeAttr(ctx, name, key, &value)
}

// DelAttr removes an attribute; ErrNotFound if there is none.
func (s *Service) DelAttr(ctx context.Context, name, key string) error {
	return s.changeAttr(ctx, name, key, nil)
}

func (s *Service) changeAttr(ctx context.Context, name, key string, value *string) error {
	v, err := s.find(ctx, name, "")
	if err == nil {
		_, err = s.propose(ctx, catalog.Command{SetAttr: &catalog.SetAttr{Ref: v.Ref, Key: key, Value: value}})
	}
	return explain(err, "change attribute %q of %q", key, name)
}

// GetAttr returns an attribute; ErrNotFound if there is none.
func (s *Service) GetAttr(ctx context.Context, name, key string) (string, error) {
	v, err := s.find(ctx, name, "")
	if err != nil {
		return "", explain(err, "get attribute %q", key)
	}
	value, ok := v.Attributes[key]
	if !ok {
		return "", fmt.Errorf("%q has no attribute %q: %w", name, key, ErrNotFound)
	}
	return value, nil
}

// ListAttr returns all attributes of a VDI.
func (s *Service) ListAttr(ctx context.Context, name string) (map[string]string, error) {
	v, err := s.find(ctx, name, "")
	if err != nil {
		return nil, explain(err, "list attributes")
	}
	list := maps.Clone(v.Attributes)
	if list == nil {
		list = map[string]string{}
	}
	return list, nil
}

// Lock keeps other nodes from taking ownership of a VDI, and anybody from deleting,
// shrinking or rolling it back. ErrLocked if another holder has it.
func (s *Service) Lock(ctx context.Context, name, holder string) error {
	v, err := s.find(ctx, name, "")
	if err == nil {
		_, err = s.propose(ctx, catalog.Command{Lock: &catalog.SetLock{Ref: v.Ref, Holder: holder, Node: s.cfg.Node, At: s.now()}})
	}
	if err != nil {
		return explain(err, "lock %q", name)
	}
	s.tell(ctx, "locked", name)
	return nil
}

// Unlock removes the holder's lock, anybody's if holder is "". ErrNotFound if there is
// none, ErrLocked if it is another's.
func (s *Service) Unlock(ctx context.Context, name, holder string) error {
	v, err := s.find(ctx, name, "")
	if err == nil {
		_, err = s.propose(ctx, catalog.Command{Unlock: &catalog.Unlock{Ref: v.Ref, Holder: holder}})
	}
	if err != nil {
		return explain(err, "unlock %q", name)
	}
	s.tell(ctx, "unlocked", name)
	return nil
}

// Locks lists the locked VDIs by name.
func (s *Service) Locks(context.Context) ([]LockInfo, error) {
	list := []LockInfo{}
	for _, v := range s.cfg.Catalog.List() {
		if v.Lock != nil {
			list = append(list, lockInfo(v))
		}
	}
	return list, nil
}

func lockInfo(v catalog.VDI) LockInfo {
	return LockInfo{Name: v.Name, Holder: v.Lock.Holder, Node: v.Lock.Node, Since: v.Lock.Since}
}

// removeObject removes one object, for good.
func (s *Service) removeObject(ctx context.Context, r object.DeleteRequest) error {
	if err := s.gc.pace(ctx, s.cfg.GCRate); err != nil {
		return err
	}
	if err := s.cfg.Objects.Delete(ctx, r); err != nil {
		return err
	}
	s.gc.deleted.Add(1)
	return nil
}
