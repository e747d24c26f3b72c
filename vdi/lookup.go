package vdi

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"sheepdog/storage/object"
	"sheepdog/vdi/catalog"
)

// lookAttempts bounds how often a reader begins anew because the VDI changed hands.
const lookAttempts = 64

// trusts reports whether what m has in memory is what the map is. It is asked after
// looking: when it says yes, it was so when m was looked at, because who takes the VDI
// over changes nothing before this node knows or its lease is over.
//
// The lease is asked for first. One that was over comes back when this node has applied what
// others did meanwhile, which has ended the ownership then. The other way round the end of
// both would be missed.
func (c *core) trusts(m *mapping) bool {
	return c.snapshot || m.generation.Load() != 0 && c.s.leased() && m.generation.Load() != 0
}

// lookUp returns an index's entry, and the mapping whose vid and generation it belongs
// to. The owner, and who reads a snapshot, remembers the pages of the map; everybody else
// asks each time, and so does the owner while an entry is being stored.
func (c *core) lookUp(ctx context.Context, index uint32) (*mapping, uint32, error) {
	var m *mapping
	var e uint32
	var err error
	for n := range lookAttempts {
		if n > 0 {
			if err := c.s.catchUp(ctx); err != nil {
				return nil, 0, err
			}
		}
		m = c.renewed()
		if c.trusts(m) {
			var ok bool
			if e, ok = m.lookup(index); !ok {
				if _, err = c.page(ctx, m, index); err == nil {
					e, _ = m.lookup(index)
				}
			}
			if err == nil && e&pending == 0 && c.trusts(m) {
				return m, e, nil
			}
		}
		if m, e, err = c.peek(ctx, index); err == nil || !errors.Is(err, object.ErrStale) {
			return m, e, err
		}
	}
	return nil, 0, err
}

// peek reads an index's entry from the stored map. A write is answered only after the
// entry it needs is stored. If the objects know of a newer generation than this node's
// catalog does, the VDI may have another vid by now: ErrStale.
func (c *core) peek(ctx context.Context, index uint32) (*mapping, uint32, error) {
	v, err := c.current()
	if err != nil {
		return nil, 0, err
	}
	if int64(index) >= v.MaxObjects() {
		return nil, 0, fmt.Errorf("%s was shrunk meanwhile: %w", c.title(), ErrInvalid)
	}
	var b [4]byte
	r := entryRead(v, index, b[:])
	r.Volume, r.Generation = v.VID, v.Generation
	m := &mapping{ref: v.Ref, policy: v.Policy, moves: v.Moves, under: v.Generation}
	if err = c.s.doAt(ctx, r, placeOf(v)); errors.Is(err, object.ErrNotFound) {
		return m, 0, nil
	}
	if err != nil {
		return nil, 0, fmt.Errorf("read the map of %s: %w", c.title(), err)
	}
	c.mayOwn(v)
	return m, binary.LittleEndian.Uint32(b[:]), nil
}

// holesAfter returns how many bytes from off on, which is in a hole, are holes, as far as
// one page of the stored map tells: for who may not remember it. It is at least n.
func (c *core) holesAfter(ctx context.Context, off, n, end int64) (int64, error) {
	m := c.mapping.Load()
	inside := off & (c.objectSize() - 1)
	if run := c.holeRunIn(m, off-inside, end); c.trusts(m) {
		return max(n, run-inside), nil
	}
	v, err := c.current()
	if err != nil || n >= end-off {
		return n, err
	}
	index := uint32(off >> c.shift)
	var b [object.BlockSize]byte
	r := mapRead(v.Policy, v.VID, index/pageEntries, b[:])
	r.Volume, r.Generation = v.VID, v.Generation
	run := int64(pageEntries - index%pageEntries)
	switch err := c.s.doAt(ctx, r, placeOf(v)); {
	case errors.Is(err, object.ErrStale): // asked anew with the next object
		return n, nil
	case errors.Is(err, object.ErrNotFound):
		run = 1<<indexShift - int64(index&(1<<indexShift-1))
	case err != nil:
		return n, fmt.Errorf("read the map of %s: %w", c.title(), err)
	default:
		for i := range run {
			if binary.LittleEndian.Uint32(b[4*(int64(index%pageEntries)+i):])&ownerMask != 0 {
				run = i
				break
			}
		}
	}
	return min(end-off, max(n, (int64(index)+run)<<c.shift-off)), nil
}

func entryRead(v catalog.VDI, index uint32, b []byte) *object.Request {
	return &object.Request{
		Op: object.OpRead, ID: object.NewID(object.KindMap, v.VID, index>>indexShift), Policy: v.Policy, SizeShift: mapShift,
		Off: index & (1<<indexShift - 1) * 4, Len: 4, Data: b,
	}
}

// loneReads is how many reads ask for their map entry before the VDI is asked for.
const loneReads = 16

// mayOwn makes this node the owner of a VDI that it reads much and nobody else has, only
// to remember the map: it was the owner before it was started anew, or nobody ever was.
func (c *core) mayOwn(v catalog.VDI) {
	if v.Snapshot || v.Owner != nil && v.Owner.Name != c.s.cfg.Node || c.mapping.Load().generation.Load() != 0 {
		return
	}
	if n := c.lone.Add(1); n >= loneReads && n&(n-1) == 0 {
		c.s.background(c, func() {
			if err := c.own(context.Background()); err != nil {
				c.s.log.Info("map of volume is not remembered", "vdi", c.name, "error", err)
			}
		})
	}
}
