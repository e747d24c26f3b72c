package vdi

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"sheepdog/storage/object"
)

// writeSlowly carries out a write that is not the usual one: ownership, the page of the
// map, or the object is to be had first. It runs on a goroutine of its own; there are
// never more of those than requests under way.
func (c *core) writeSlowly(p *part) {
	c.finish(p, c.writeOwned(context.Background(), p))
}

// writeOwned carries a write out as the owner, and begins anew when ownership was lost
// before it was carried out: what is refused as stale has changed nothing that is read.
func (c *core) writeOwned(ctx context.Context, p *part) error {
	if p.parent.span.beyond { // the caller holds admin, and owns
		return c.writeOnce(ctx, p)
	}
	for until := time.Now().Add(c.s.cfg.OwnWithin); ; {
		if err := c.own(ctx); err != nil {
			return err
		}
		if r := p.parent; r.Check != nil {
			if err := r.Check(r); err != nil {
				return err
			}
		}
		err := c.writeOnce(ctx, p)
		if !errors.Is(err, object.ErrStale) || time.Now().After(until) || !c.mayResend(p) {
			return err
		}
		c.tenure.Store(min(2*c.tenure.Load(), int64(maxTenure))) // it was too short to get anything done
	}
}

var clock = time.Now()

// mayResend reports whether a write that was refused as stale may be sent again. This is
// as if it had been begun only now, after what the other owner wrote. It is right for who
// still waits for an answer; but what a node that was stopped or cut off for long has in
// hand is the past, and fails.
func (c *core) mayResend(p *part) bool {
	return time.Since(clock)-time.Duration(p.began) < c.s.cfg.ResendWithin
}

func (c *core) writeOnce(ctx context.Context, p *part) error {
	s := c.gate.stripe(p.index)
	s.pass()
	defer s.leave()
	return c.writeHeld(ctx, p)
}

// writeHeld is writeOnce for who passes the index's stripe, or has it closed.
func (c *core) writeHeld(ctx context.Context, p *part) error {
	s := c.gate.stripe(p.index)
	m := c.mapping.Load()
	generation := m.generation.Load()
	if generation == 0 {
		return errDisowned
	}
	if r := p.parent; !r.span.beyond && r.Off+r.Len > c.size.Load() {
		return fmt.Errorf("the volume was shrunk meanwhile: %w", ErrInvalid)
	}
	if err := c.checkVID(m, p.parent.VID); err != nil {
		return err
	}
	pg, err := c.page(ctx, m, p.index)
	if err != nil {
		return err
	}
	s.take(p.index)
	defer s.giveBack(p.index)
	defer c.touched(object.DataID(m.vid(), p.index))
	t := transition{c: c, m: m, pg: pg, p: p, generation: generation, before: pg.entries[p.index%pageEntries].Load()}
	err = t.run(ctx)
	switch {
	case err == nil:
		c.tenure.Store(int64(minTenure))
	case errors.Is(err, object.ErrStale):
		c.disown(m)
	}
	return err
}

// transition carries out a part on an index that nobody else changes the owner of.
// The order of its steps is what crashes are survived by; see DESIGN.md.
type transition struct {
	c          *core
	m          *mapping
	pg         *page
	p          *part
	generation uint64
	before     uint32 // the entry
}

func (t *transition) fua() bool { return t.p.parent.Flags&FlagFUA != 0 }

func (t *transition) whole() bool { return int64(t.p.n) == t.c.objectSize() }

// makesHoles: the part needs no object.
func (t *transition) makesHoles() bool {
	r := t.p.parent
	return r.Op == OpDiscard || r.Op == OpZero && r.Flags&FlagNoHole == 0
}

func (t *transition) run(ctx context.Context) error {
	owner := object.VID(t.before & ownerMask)
	switch {
	case owner == t.m.vid() && t.before&pending == 0:
		return t.change(ctx)
	case t.makesHoles() && owner == 0 && t.before&pending == 0:
		if err := t.confirm(ctx); err != nil {
			return err
		}
		return t.settleNow(ctx)
	case t.makesHoles() && owner != t.m.vid() && (t.whole() || owner == 0):
		return t.enter(ctx, 0, t.fua())
	case owner == t.m.vid() && t.before&unsettled != 0: // its entry may not be stored, the object not be there
		return t.begin(ctx)
	case owner == t.m.vid(): // the object is there, its entry may not be stored
		if err := t.enter(ctx, t.before&(ownerMask|unsettled), false); err != nil {
			return err
		}
		return t.change(ctx)
	}
	return t.create(ctx, owner)
}

// confirm is for what is answered out of memory: without a lease, another node may own
// the VDI and have been told that this one answers nothing. Then the objects know.
func (t *transition) confirm(ctx context.Context) error {
	if t.c.s.leased() { // before it is asked who owns: see trusts
		if t.m.generation.Load() == 0 {
			return errDisowned
		}
		return nil
	}
	_, _, err := t.c.peek(ctx, t.p.index)
	return err
}

// change carries out the part on the volume's own object.
func (t *transition) change(ctx context.Context) error {
	if err := t.apply(ctx); err != nil {
		return err
	}
	if t.c.emptied(t.p) {
		t.c.noteEmpty(t.p.index)
	}
	return t.settleNow(ctx)
}

// settleNow makes an entry durable on which a FUA part relies.
func (t *transition) settleNow(ctx context.Context) error {
	if !t.fua() || t.before&volatile == 0 {
		return nil
	}
	return t.c.syncNow(ctx)
}

// apply submits the object request and waits for it.
func (t *transition) apply(ctx context.Context) error {
	t.c.fill(t.p, t.m, t.generation)
	return t.c.s.do(ctx, &t.p.req)
}

// create makes the volume's own object where there was a hole or an ancestor's.
//
// An entry that replaces an ancestor's object must not become durable before the object: so that is
// made durable first, and with it what the volume wrote into it.
func (t *transition) create(ctx context.Context, ancestor object.VID) error {
	if err := t.clean(ctx); err != nil {
		return err
	}
	if ancestor == 0 {
		return t.begin(ctx)
	}
	if !t.whole() {
		if err := t.copy(ctx, ancestor); err != nil {
			return err
		}
	}
	if err := t.apply(ctx); err != nil {
		return err
	}
	if err := t.sync(ctx); err != nil {
		return err
	}
	if err := t.enter(ctx, uint32(t.m.vid()), t.fua()); err != nil {
		return err
	}
	t.c.noteOrphan(ancestor, t.p.index)
	return nil
}

// begin makes an object over a hole: the entry first, which reads as zeros, as before, until the object is there. The other
// way round, who has looked into the map before a former object of that id was removed, and reads
// only now, would find what nobody finds who looks now.
func (t *transition) begin(ctx context.Context) error {
	e := uint32(t.m.vid()) | unsettled
	slot := &t.pg.entries[t.p.index%pageEntries]
	if err := t.store(ctx, e, t.fua()); err != nil {
		return err
	}
	if err := t.apply(ctx); err != nil {
		t.c.noteDoubt(t.p.index)
		return err
	}
	if t.makesHoles() { // an object that may not be there
		t.c.noteDoubt(t.p.index)
		return nil
	}
	slot.Store(e | volatile)
	if t.fua() {
		t.c.noteDurable(t.p.index, e|volatile)
	} else {
		t.c.noteChange(t.p.index, e|volatile)
	}
	return nil
}

// clean removes what a crash may have left under the id of the object to be made: bytes
// that were never read as content of the volume shall not become so.
func (t *transition) clean(ctx context.Context) error {
	there, err := t.c.hasObject(ctx, t.m, t.p.index)
	if err != nil || !there {
		return err
	}
	if err := t.sync(ctx); err != nil { // the stored map must not name it any more
		return err
	}
	if err := t.c.remove(ctx, t.m, t.p.index); err != nil {
		return err
	}
	return t.sync(ctx)
}

func (t *transition) sync(ctx context.Context) error { return t.c.syncAs(ctx, t.m) }

// remove removes the volume's own object of an index.
func (c *core) remove(ctx context.Context, m *mapping, index uint32) error {
	id := object.DataID(m.vid(), index)
	defer c.touched(id)
	return c.s.cfg.Objects.Delete(ctx, object.DeleteRequest{Policy: m.policy, ID: id, Volume: m.vid(), Generation: m.under})
}

func (t *transition) copy(ctx context.Context, ancestor object.VID) error {
	err := t.c.s.cfg.Objects.Copy(ctx, object.CopyRequest{
		Dst: object.DataID(t.m.vid(), t.p.index), Src: object.DataID(ancestor, t.p.index), DstPolicy: t.m.policy, SrcPolicy: t.m.policy,
		SizeShift: t.c.shift, Volume: t.m.vid(), Generation: t.generation,
	})
	if isMissing(err) {
		err = cmp.Or(t.c.s.unmoved(ctx, t.m.place()), err)
	}
	if err != nil {
		return fmt.Errorf("copy on write: %w", err)
	}
	return nil
}

// enter stores the new entry of an index whose object is as it shall be; durably, then e must be settled, or else with the next
// flush.
func (t *transition) enter(ctx context.Context, e uint32, durably bool) error {
	if err := t.store(ctx, e, durably); err != nil {
		return err
	}
	slot := &t.pg.entries[t.p.index%pageEntries]
	if durably {
		slot.Store(e)
	} else {
		slot.Store(e | volatile)
		t.c.noteChange(t.p.index, e|volatile)
	}
	if e == 0 {
		t.c.noteOrphan(object.VID(t.before&ownerMask), t.p.index)
	}
	return nil
}

// store stores the new entry, which stays a pending one in memory. If there is no space for it the entry is what it
// was. If it fails otherwise nobody knows whether it is stored, so the next write stores it again.
func (t *transition) store(ctx context.Context, e uint32, durably bool) error {
	slot := &t.pg.entries[t.p.index%pageEntries]
	t.c.changed.Store(true)
	var was uint32
	err := t.c.storeWith(ctx, t.m, t.p.index, t.pg, durably, func() { was = slot.Swap(e | pending | volatile) }, func() { slot.Store(was) })
	t.c.changes.Add(1) // not before: who knows of the change shall read the new entry
	atomic.StoreInt32(&t.p.parent.span.changed, 1)
	if err != nil && slot.Load()&pending != 0 {
		t.c.noteDoubt(t.p.index)
	}
	return err
}

func (c *core) noteDoubt(index uint32) {
	c.mu.Lock()
	c.book.doubtful = append(c.book.doubtful, index)
	c.mu.Unlock()
}

// syncNow is a flush that waits, for who goes on from what is stored then: see syncAs.
func (c *core) syncNow(ctx context.Context) error {
	m, list := c.takeVolatile()
	err := c.syncAs(ctx, m)
	c.bookFlush(m, list, err)
	return err
}

// syncAs is sync for who goes on as the owner by m. It fails as stale if a power cut has undone some of what m has stored: another flush may have
// been told of that, and this one covers only what was done since.
func (c *core) syncAs(ctx context.Context, m *mapping) error {
	if err := c.sync(ctx, m); err != nil || !m.table.lost.Load() {
		return err
	}
	return errDisowned
}

// sync makes durable what this node has completed for the volume.
func (c *core) sync(ctx context.Context, m *mapping) error {
	r := &object.Request{Op: object.OpSync, Policy: m.policy, Volume: m.vid()}
	return c.s.doThen(ctx, r, func() { c.noteSync(m, r.Err) })
}
