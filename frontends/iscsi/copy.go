package iscsi

import (
	"context"
	"fmt"
	"slices"

	"sheepdog/frontends/iscsi/internal/scsi"
	"sheepdog/vdi"
)

// copies are a session's copies by list identifier: those that run, and the results that are kept.
type copies struct {
	states map[byte]*scsi.CopyState
	order  []byte // oldest first
}

// start notes that a copy begins; false if one of that identifier runs. The caller holds the session's mu.
func (c *copies) start(list byte) (*scsi.CopyState, bool) {
	if s := c.states[list]; s != nil {
		if s.Status == scsi.CopyRuns {
			return nil, false
		}
		c.forget(list)
	}
	for len(c.order) >= scsi.MaxCopies {
		i := slices.IndexFunc(c.order, func(n byte) bool { return c.states[n].Status != scsi.CopyRuns })
		if i < 0 {
			return nil, false
		}
		c.forget(c.order[i])
	}
	if c.states == nil {
		c.states = map[byte]*scsi.CopyState{}
	}
	s := new(scsi.CopyState)
	c.states[list], c.order = s, append(c.order, list)
	return s, true
}

func (c *copies) forget(list byte) {
	delete(c.states, list)
	c.order = slices.DeleteFunc(c.order, func(n byte) bool { return n == list })
}

// copyResult answers COPY STATUS. A result is told once (SPC-4 section 6.18).
func (t *task) copyResult(context.Context) error {
	s, list := t.s, t.plan.CDB[2]
	s.mu.Lock()
	state := s.copies.states[list]
	var b []byte
	if state != nil {
		b = state.Encode()
		if state.Status != scsi.CopyRuns {
			s.copies.forget(list)
		}
	}
	s.mu.Unlock()
	if b == nil {
		return told(scsi.Sense{Code: scsi.InvalidFieldInCDB, Field: 2, HasField: true, InCommand: true})
	}
	t.answerWith(b)
	return nil
}

// extendedCopy copies between units. What was copied before a failure stays copied.
func (t *task) extendedCopy(ctx context.Context) error {
	c, sense := scsi.DecodeCopy(t.data)
	if sense != (scsi.Sense{}) {
		return told(sense)
	}
	if len(c.Segments) == 0 {
		return nil
	}
	s := t.s
	state := new(scsi.CopyState)
	if c.Kept {
		s.mu.Lock()
		kept, ok := s.copies.start(c.List)
		s.mu.Unlock()
		if !ok {
			return told(scsi.Sense{Code: scsi.InvalidFieldInParameter, HasField: true})
		}
		state = kept
	}
	p := &copyUnits{t: t}
	defer p.close()
	err := p.run(ctx, c.Segments, state)
	s.mu.Lock()
	if state.Status = scsi.CopyDone; err != nil {
		state.Status = scsi.CopyFailed
	}
	s.mu.Unlock()
	return err
}

// copyUnits are the units of one copy, opened for it.
type copyUnits struct {
	t    *task
	list []*copyUnit
}

type copyUnit struct {
	unit  *unit
	vol   Volume
	nexus scsi.Nexus // by which the initiator has it
	own   bool       // the volume is the session's
}

// open finds a unit that is designated: one that the initiator has through this gateway. Others
// are none of its business.
func (p *copyUnits) open(ctx context.Context, target scsi.CopyTarget) (*copyUnit, error) {
	s := p.t.s
	for _, c := range p.list {
		if target.Is(c.unit.id) {
			return c, nil
		}
	}
	c := &copyUnit{}
	if target.Is(p.t.at.unit.id) {
		*c = copyUnit{unit: p.t.at.unit, vol: p.t.at.vol, nexus: s.nexus, own: true}
		p.list = append(p.list, c)
		return c, nil
	}
	s.server.clients.Each(func(other *session) {
		if c.unit != nil || other.params.Initiator != s.params.Initiator || other.params.User != s.params.User {
			return
		}
		for _, l := range other.units() {
			if target.Is(l.unit.id) {
				c.unit, c.nexus = l.unit, other.nexus
			}
		}
	})
	if c.unit == nil {
		return nil, told(scsi.Sense{Code: scsi.NotReachable})
	}
	v, err := s.server.open(ctx, Disk{Name: c.unit.name, Tag: c.unit.tag}, s.client)
	if err != nil {
		return nil, fmt.Errorf("open a unit to copy: %w", err)
	}
	c.vol = v
	p.list = append(p.list, c)
	return c, nil
}

func (p *copyUnits) close() {
	for _, c := range p.list {
		if c.own {
			continue
		}
		if err := c.vol.Close(); err != nil {
			p.t.s.log.Warn("close of volume failed", "err", err)
		}
	}
}

// do carries out a request on the unit and waits for it.
func (c *copyUnit) do(op vdi.Op, off, n int64, data []byte) error {
	plan := &scsi.CopyWrites
	if op == vdi.OpRead {
		plan = &scsi.CopyReads
	}
	check := func(*vdi.Request) error {
		if c.unit.conflicts(c.nexus, plan) {
			return told(scsi.Sense{Code: scsi.ThirdPartyFailure})
		}
		return nil
	}
	if err := check(nil); err != nil {
		return err
	}
	done := make(chan error, 1)
	c.vol.Submit(&vdi.Request{Op: op, Off: off, Len: n, Data: data, Check: check, Done: func(r *vdi.Request) { done <- r.Err }})
	c.vol.Kick()
	return <-done
}

func (p *copyUnits) run(ctx context.Context, list []scsi.Segment, state *scsi.CopyState) error {
	for i := range list {
		from, err := p.open(ctx, list[i].From)
		if err != nil {
			return err
		}
		to, err := p.open(ctx, list[i].To)
		if err != nil {
			return err
		}
		src, dst, ok := list[i].Ranges(from.unit.view(), to.unit.view())
		switch {
		case !ok:
			return told(scsi.Sense{Code: scsi.CopyOutOfRange})
		case to.vol.ReadOnly() || to.unit.view().Protected:
			return told(scsi.Sense{Code: scsi.ThirdPartyFailure})
		}
		if err := p.segment(ctx, from, to, src, dst, state); err != nil {
			return err
		}
		p.t.s.mu.Lock()
		state.Segments++
		p.t.s.mu.Unlock()
	}
	return nil
}

// segment copies a range. What is a hole there becomes one here.
func (p *copyUnits) segment(ctx context.Context, from, to *copyUnit, src, dst scsi.Range, state *scsi.CopyState) error {
	if src.Len == 0 || from.unit == to.unit && src == dst {
		return nil
	}
	buf, free := p.t.s.scratch(src.Len)
	defer free()
	for at := int64(0); at < src.Len; {
		if err := p.ended(ctx); err != nil {
			return err
		}
		n, hole, err := stretch(ctx, from.vol, src.Off+at, src.Len-at)
		if err != nil {
			return err
		}
		if hole {
			err = to.do(vdi.OpZero, dst.Off+at, n, nil)
		} else {
			n = min(n, int64(len(buf)))
			if err = from.do(vdi.OpRead, src.Off+at, n, buf[:n]); err == nil {
				err = to.do(vdi.OpWrite, dst.Off+at, n, buf[:n])
			}
		}
		if err != nil {
			return err
		}
		at += n
		p.t.s.mu.Lock()
		state.Bytes += uint64(n)
		p.t.s.mu.Unlock()
	}
	return nil
}

// ended is why a copy is given up half way: nobody waits for it.
func (p *copyUnits) ended(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("session has ended: %w", err)
	}
	s := p.t.s
	s.mu.Lock()
	defer s.mu.Unlock()
	if p.t.aborted {
		return context.Canceled
	}
	return nil
}

// stretch gives the extent that begins at off.
func stretch(ctx context.Context, v Volume, off, n int64) (length int64, hole bool, err error) {
	length = n
	err = v.Extents(ctx, off, n, func(e vdi.Extent) bool {
		length, hole = min(e.Off+e.Len-off, n), e.Hole
		return false
	})
	return length, hole, err
}
