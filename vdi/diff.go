package vdi

import (
	"context"
	"errors"
	"fmt"

	"sheepdog/storage/object"
)

// Extents calls fn with consecutive extents that cover [off, off+n), until it returns
// false. It reads maps and allocation, no data.
func (v *Volume) Extents(ctx context.Context, off, n int64, fn func(Extent) bool) error {
	c := v.core
	if err := c.checkRange(off, n); err != nil {
		return err
	}
	run := merger[Extent]{same: func(a, b Extent) bool { return a.Hole == b.Hole && a.Zero == b.Zero }, emit: fn,
		join: func(a, b Extent) Extent { a.Len += b.Len; return a }}
	for end := off + n; off < end; {
		k, more, err := c.extentsAt(ctx, off, end, &run)
		if err != nil {
			return explain(err, "look for the extents of %s at %d", c.title(), off)
		}
		if !more {
			return nil
		}
		off += k
	}
	run.flush()
	return nil
}

func (c *core) checkRange(off, n int64) error {
	if size := c.size.Load(); off < 0 || n < 0 || off > size || n > size-off {
		return fmt.Errorf("volume %s has %d bytes, the request is for %d at %d: %w", c.title(), size, n, off, ErrInvalid)
	}
	return nil
}

// extentsAt adds the extents of one object, or of a run of holes, and returns its length.
func (c *core) extentsAt(ctx context.Context, off, end int64, run *merger[Extent]) (int64, bool, error) {
	if skip := c.holeRun(&Request{Op: OpRead}, off, end); skip > 0 {
		return skip, run.add(Extent{Off: off, Len: skip, Hole: true, Zero: true}), nil
	}
	inside := off & (c.objectSize() - 1)
	k := min(end-off, c.objectSize()-inside)
	index := uint32(off >> c.shift)
	m, e, err := c.lookUp(ctx, index)
	if err != nil {
		return 0, false, err
	}
	if e&ownerMask == 0 {
		if k, err = c.holesAfter(ctx, off, k, end); err != nil {
			return 0, false, err
		}
		return k, run.add(Extent{Off: off, Len: k, Hole: true, Zero: true}), nil
	}
	list, err := c.s.cfg.Objects.Extents(ctx, m.policy, object.DataID(object.VID(e&ownerMask), index), uint32(inside), uint32(k))
	if err == nil || isMissing(err) {
		if moved := c.s.unmoved(ctx, m.place()); moved != nil {
			return c.again(moved)
		}
	}
	switch {
	case isMissing(err): // a power cut took it, or it was replaced just now
		return k, run.add(Extent{Off: off, Len: k, Hole: e&unsettled != 0, Zero: e&unsettled != 0}), nil
	case err != nil:
		return 0, false, err
	}
	base := off - inside
	for _, x := range list {
		if !run.add(Extent{Off: base + int64(x.Off), Len: int64(x.Len), Hole: x.Hole, Zero: x.Hole}) {
			return 0, false, nil
		}
	}
	return k, true, nil
}

// again has what is asked object by object be asked anew if the objects were moved meanwhile: it adds nothing.
func (c *core) again(err error) (int64, bool, error) {
	if errors.Is(err, errMoved) {
		return 0, true, nil
	}
	return 0, false, err
}

// Changed calls fn with consecutive extents that cover [off, off+n) and say what is not
// as it was in the snapshot sinceTag of the same VDI, at a grain of 4 KiB, until fn
// returns false. It compares maps and checksums, no data.
func (v *Volume) Changed(ctx context.Context, sinceTag string, off, n int64, fn func(ChangedExtent) bool) error {
	c := v.core
	if err := c.checkRange(off, n); err != nil {
		return err
	}
	since, err := c.s.Open(ctx, c.name, sinceTag, OpenOptions{ReadOnly: true, Client: "comparison with " + c.title()})
	if err != nil {
		return err
	}
	defer since.Close()
	run := merger[ChangedExtent]{same: func(a, b ChangedExtent) bool { return a.Changed == b.Changed }, emit: fn,
		join: func(a, b ChangedExtent) ChangedExtent { a.Len += b.Len; return a }}
	err = c.compare(ctx, since.core, off, n, func(off, n int64, changed, _ bool) bool {
		return run.add(ChangedExtent{Off: off, Len: n, Changed: changed})
	})
	if err == nil {
		run.flush()
	}
	return err
}

// Diff calls fn, in order, with the extents of (name, toTag) that differ from
// (name, fromTag), until it returns false. fromTag "" stands for nothing: then all that
// is allocated differs. toTag "" is the VDI itself. Extents that are zero in to have
// Zero set.
func (s *Service) Diff(ctx context.Context, name, fromTag, toTag string, fn func(Extent) bool) error {
	to, err := s.Open(ctx, name, toTag, OpenOptions{ReadOnly: true, Client: "diff"})
	if err != nil {
		return err
	}
	defer to.Close()
	var from *core
	if fromTag != "" {
		f, err := s.Open(ctx, name, fromTag, OpenOptions{ReadOnly: true, Client: "diff"})
		if err != nil {
			return err
		}
		defer f.Close()
		from = f.core
	}
	run := merger[Extent]{same: func(a, b Extent) bool { return a.Zero == b.Zero && a.Off+a.Len == b.Off }, emit: fn,
		join: func(a, b Extent) Extent { a.Len += b.Len; return a }}
	err = to.core.compare(ctx, from, 0, to.Size(), func(off, n int64, changed, zero bool) bool {
		return !changed || run.add(Extent{Off: off, Len: n, Zero: zero, Hole: zero})
	})
	if err == nil {
		run.flush()
	}
	return err
}

// merger joins neighbouring extents that are the same in what counts.
type merger[E any] struct {
	same    func(a, b E) bool
	join    func(a, b E) E
	emit    func(E) bool
	last    E
	any     bool
	stopped bool
}

func (m *merger[E]) add(e E) bool {
	switch {
	case m.stopped:
		return false
	case !m.any:
		m.last, m.any = e, true
	case m.same(m.last, e):
		m.last = m.join(m.last, e)
	default:
		m.stopped = !m.emit(m.last)
		m.last = e
	}
	return !m.stopped
}

func (m *merger[E]) flush() {
	if m.any && !m.stopped {
		m.emit(m.last)
	}
}

// zeroSum is the checksum of a block of zeros that was written, which is no other
// content than a hole.
var zeroSum = object.Sum(make([]byte, object.BlockSize))

// compare calls fn with consecutive extents of [off, off+n) of c, each changed or not in
// comparison with from, nil for nothing, and zero or not in c.
func (c *core) compare(ctx context.Context, from *core, off, n int64, fn func(off, n int64, changed, zero bool) bool) error {
	for end := off + n; off < end; {
		k, more, err := c.compareAt(ctx, from, off, end, fn)
		if err != nil {
			return explain(err, "compare %s at %d", c.title(), off)
		}
		if !more {
			return nil
		}
		off += k
	}
	return nil
}

func (c *core) compareAt(ctx context.Context, from *core, off, end int64, fn func(off, n int64, changed, zero bool) bool) (int64, bool, error) {
	skip := c.holeRun(&Request{Op: OpRead}, off, end)
	if skip > 0 && from != nil {
		skip = min(skip, from.holeRun(&Request{Op: OpRead}, off, end))
	}
	if skip > 0 {
		return skip, fn(off, skip, false, true), nil
	}
	index := uint32(off >> c.shift)
	inside := off & (c.objectSize() - 1)
	k := min(end-off, c.objectSize()-inside)
	m, now, err := c.lookUp(ctx, index)
	if err != nil {
		return 0, false, err
	}
	now &= ownerMask
	var then uint32
	base := m
	if from != nil && off-inside < from.size.Load() {
		if base, then, err = from.lookUp(ctx, index); err != nil {
			return 0, false, err
		}
		then &= ownerMask
	}
	if now|then == 0 {
		n, err := c.holesAfter(ctx, off, k, end)
		if err == nil && from != nil && n > k && off+n <= from.size.Load() {
			n, err = from.holesAfter(ctx, off, k, off+n)
		} else if from != nil {
			n = k
		}
		return n, err == nil && fn(off, n, false, true), err
	}
	if now == then {
		return k, fn(off, k, false, now == 0), nil
	}
	a, err := c.s.sums(ctx, m, now, index)
	if err != nil {
		return c.again(err)
	}
	b, err := c.s.sums(ctx, base, then, index)
	if err != nil {
		return c.again(err)
	}
	return k, compareBlocks(off, inside, k, a, b, fn), nil
}

// sums returns the checksums of the blocks of an object that m has, nil for zeros.
func (s *Service) sums(ctx context.Context, m *mapping, owner uint32, index uint32) ([]uint64, error) {
	if owner == 0 {
		return nil, nil
	}
	sums, err := s.cfg.Objects.Sums(ctx, m.policy, object.DataID(object.VID(owner), index))
	if isMissing(err) {
		sums, err = nil, nil
	}
	if err == nil {
		err = s.unmoved(ctx, m.place())
	}
	return sums, err
}

func sumAt(sums []uint64, block int64) uint64 {
	if block >= int64(len(sums)) || sums[block] == zeroSum {
		return 0
	}
	return sums[block]
}

func compareBlocks(off, inside, n int64, a, b []uint64, fn func(off, n int64, changed, zero bool) bool) bool {
	for n > 0 {
		k := min(n, object.BlockSize-inside%object.BlockSize)
		x, y := sumAt(a, inside/object.BlockSize), sumAt(b, inside/object.BlockSize)
		if !fn(off, k, x != y, x == 0) {
			return false
		}
		off, inside, n = off+k, inside+k, n-k
	}
	return true
}
