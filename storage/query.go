package storage

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"

	"sheepdog/storage/object"
)

func compareKeys(a, b object.Key) int {
	return cmp.Or(cmp.Compare(a.Group.Policy, b.Group.Policy), cmp.Compare(a.Group.Partition, b.Group.Partition), cmp.Compare(a.ID, b.ID))
}

// at calls fn with the disk on which a group lives. It calls it again if the group goes to another one
// meanwhile, once it is there: fn fails with errAway or errHeld then, and has done nothing.
func (s *Store) at(ctx context.Context, g object.Group, fn func(*drive) error) error {
	for {
		if s.closed.Load() {
			return object.ErrClosed
		}
		d := s.routes.find(g)
		err := d.failed()
		if err == nil {
			err = fn(d)
		}
		if err == nil || !errors.Is(err, errAway) && !errors.Is(err, errHeld) && !d.moved(g) {
			return err
		}
		if err := d.awaitHandover(ctx, g); err != nil {
			return err
		}
	}
}

// existing returns the object loaded and locked for writing, or ErrNotFound.
func (d *drive) existing(k object.Key) (*obj, error) {
	o, err := d.lock(k)
	if err != nil {
		return nil, d.explain(err)
	}
	if !o.exists {
		o.mu.Unlock()
		return nil, fmt.Errorf("object %s: %w", k, object.ErrNotFound)
	}
	return o, nil
}

// sumsPiece bounds how long an object stays locked for the sake of a query, in blocks.
const sumsPiece = 64 * sumsPerPage

// eachSum calls fn for every block of [first, end) with its checksum, pending or not.
// The object is locked piece by piece: writes that happen meanwhile are seen or not.
// An end of 0 stands for the object's.
func (d *drive) eachSum(ctx context.Context, k object.Key, first, end uint32, fn func(b uint32, sum uint64)) error {
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		o, err := d.existing(k)
		if err != nil {
			return err
		}
		limit := o.blocks()
		if end == 0 {
			end = limit
		}
		if end > limit {
			o.mu.Unlock()
			return fmt.Errorf("range is past the end of object %s: %w", k, object.ErrInvalid)
		}
		stop := min(end, first+sumsPiece)
		if err := d.ensurePages(o, first, stop); err != nil {
			o.mu.Unlock()
			return d.explain(err)
		}
		for ; first < stop; first++ {
			sum, _ := o.sum(first)
			fn(first, sum)
		}
		o.mu.Unlock()
		if first >= end {
			return nil
		}
	}
}

// Extents tells which parts of [off, off+n) are holes, in ascending order, with
// neighbours of one kind joined. The grain is a block.
func (s *Store) Extents(ctx context.Context, k object.Key, off, n uint32) ([]object.Extent, error) {
	if n == 0 {
		return nil, nil
	}
	first, end := blockRange(off, n)
	limit := uint64(off) + uint64(n)
	var list []object.Extent
	err := s.at(ctx, k.Group, func(d *drive) error {
		list = list[:0]
		return d.eachSum(ctx, k, first, end, func(b uint32, sum uint64) {
			from := max(uint64(off), uint64(b)*blockSize)
			length := uint32(min(limit, uint64(b+1)*blockSize) - from)
			if last := len(list) - 1; last >= 0 && list[last].Hole == (sum == 0) {
				list[last].Len += length
				return
			}
			list = append(list, object.Extent{Off: uint32(from), Len: length, Hole: sum == 0})
		})
	})
	if err != nil {
		return nil, err
	}
	return list, nil
}

// Sums returns the checksum of every block as a reader would see it; 0 is a hole.
func (s *Store) Sums(ctx context.Context, k object.Key) ([]uint64, error) {
	var sums []uint64
	err := s.at(ctx, k.Group, func(d *drive) error {
		sums = sums[:0]
		return d.eachSum(ctx, k, 0, 0, func(_ uint32, sum uint64) { sums = append(sums, sum) })
	})
	if err != nil {
		return nil, err
	}
	return sums, nil
}

// Stat describes an object, or fails with ErrNotFound.
func (s *Store) Stat(ctx context.Context, k object.Key) (info object.Info, err error) {
	err = s.at(ctx, k.Group, func(d *drive) (err error) {
		info, err = d.stat(ctx, k)
		return err
	})
	return info, err
}

func (d *drive) stat(ctx context.Context, k object.Key) (object.Info, error) {
	o, err := d.existing(k)
	if err != nil {
		return object.Info{}, err
	}
	info := object.Info{Key: k, SizeShift: o.shift, Version: o.version, Uncertain: o.uncertain}
	o.mu.Unlock()
	err = d.eachSum(ctx, k, 0, 0, func(_ uint32, sum uint64) {
		if sum != 0 {
			info.Allocated += blockSize
		}
	})
	return info, err
}

// Groups lists the groups that have objects, or had some.
func (s *Store) Groups(ctx context.Context) ([]object.Group, error) {
	seen := make(map[object.Group]bool)
	for _, d := range s.routes.drives() {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		for _, k := range d.loggedKeys() { // first, as in ids
			seen[k.Group] = true
		}
		d.groupMu.Lock()
		for g := range d.groups {
			seen[g] = true
		}
		d.groupMu.Unlock()
	}
	list := make([]object.Group, 0, len(seen))
	for g := range seen {
		list = append(list, g)
	}
	slices.SortFunc(list, func(a, b object.Group) int {
		return compareKeys(object.Key{Group: a}, object.Key{Group: b})
	})
	return list, nil
}

// loggedKeys lists the objects that the log has something about, deleted ones included.
func (d *drive) loggedKeys() []object.Key {
	d.listMu.Lock()
	defer d.listMu.Unlock()
	keys := make([]object.Key, len(d.logged))
	for i, o := range d.logged {
		keys[i] = o.key
	}
	return keys
}

// ids lists what may be objects of a group, ascending. The log is asked first: an
// object that a checkpoint moves meanwhile is then seen twice rather than not at all.
func (d *drive) ids(g object.Group) ([]object.ID, error) {
	ids := d.shardKeys(g)
	names, err := d.fs.ReadDir(groupDir(g))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, d.explain(fmt.Errorf("list group %s: %w", g, err))
	}
	for _, name := range names {
		if id, ok := parseID(name); ok {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return slices.Compact(ids), nil
}

// shardKeys lists the objects of a group that are in memory.
func (d *drive) shardKeys(g object.Group) []object.ID {
	var ids []object.ID
	for i := range d.shards {
		s := &d.shards[i]
		s.mu.RLock()
		for k := range s.objects {
			if k.Group == g {
				ids = append(ids, k.ID)
			}
		}
		s.mu.RUnlock()
	}
	return ids
}

// List calls fn for every object of a group in ascending order of ids, holding no
// lock, until it returns an error. Objects made or deleted meanwhile may be missed.
// Objects whose header is corrupt are listed with their key only.
func (s *Store) List(ctx context.Context, g object.Group, fn func(object.Info) error) error {
	next := object.ID(0)
	var stopped error
	err := s.at(ctx, g, func(d *drive) error {
		return d.list(ctx, g, next, func(info object.Info) error {
			if stopped == nil {
				stopped = fn(info)
			}
			next = info.Key.ID + 1
			return stopped
		})
	})
	return cmp.Or(stopped, err)
}

// list is List from an id on.
func (d *drive) list(ctx context.Context, g object.Group, from object.ID, fn func(object.Info) error) error {
	ids, err := d.ids(g)
	if err != nil {
		return err
	}
	if d.away(g) {
		return errAway
	}
	for _, id := range ids {
		if id < from {
			continue
		}
		k := object.Key{Group: g, ID: id}
		info, err := d.peek(ctx, k)
		if errors.Is(err, object.ErrNotFound) {
			continue
		}
		if errors.Is(err, object.ErrCorrupt) {
			info = object.Info{Key: k, Uncertain: true}
		} else if err != nil {
			return err
		}
		if err := fn(info); err != nil {
			return err
		}
	}
	return nil
}

// peek is stat without leaving its mark on the cache: a listing of a million objects
// must not throw out those that are in use.
func (d *drive) peek(ctx context.Context, k object.Key) (object.Info, error) {
	if o := d.lookup(k); o != nil {
		return d.stat(ctx, k)
	}
	f, h, err := d.openObject(k, objectPath(k))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return d.stat(ctx, k) // gone, or moved into memory meanwhile
	case errors.Is(err, errHeader):
		err = &object.CorruptError{Key: k, Disk: d.String()}
		return object.Info{}, d.explain(err)
	case err != nil:
		return object.Info{}, d.explain(err)
	}
	defer f.Close()
	info := object.Info{Key: k, SizeShift: h.shift, Version: h.version, Uncertain: h.uncertain}
	table := make([]byte, pagesOf(h.shift)*blockSize)
	if _, err := f.ReadAt(table, tableOffset(h.shift)); err != nil && !errors.Is(err, io.EOF) {
		return info, d.explain(err)
	}
	left := blocksOf(h.shift)
	for p := 0; left > 0; p++ {
		var page sumPage
		page.decode(table[p*blockSize:], p, h.generation)
		n := min(left, sumsPerPage)
		for _, sum := range page.sums[:n] {
			if sum != 0 {
				info.Allocated += blockSize
			}
		}
		left -= n
	}
	if d.away(k.Group) { // the file is a leftover
		return object.Info{}, errAway
	}
	return info, nil
}
