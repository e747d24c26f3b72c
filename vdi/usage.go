package vdi

import (
	"context"
	"encoding/binary"
	"errors"
	"sync"
	"time"

	"sheepdog/storage/object"
	"sheepdog/vdi/catalog"
)

// Space is known in two ways. List counts map entries, times the objects' size: an upper
// bound, counted once for a snapshot, and for a VDI again when entries changed. Info
// asks each object how much is allocated.

// counted is what the map of a VDI or snapshot says, in objects.
type counted struct{ own, shared int64 }

// listBudget is how long List counts maps; what is left is known the next time.
const listBudget = 300 * time.Millisecond

// List describes all VDIs and snapshots: by name, the VDI before its snapshots, those
// by number.
func (s *Service) List(ctx context.Context) ([]Info, error) {
	all := s.cfg.Catalog.List()
	list := make([]Info, len(all))
	until := time.Now().Add(listBudget)
	for i, v := range all {
		list[i] = s.describe(v)
		n, known, err := s.count(ctx, v, time.Now().Before(until))
		if err != nil {
			return nil, explain(err, "count the space of %q", v.Name)
		}
		list[i].Known = known
		list[i].Used, list[i].Shared = n.own<<v.SizeShift, n.shared<<v.SizeShift
	}
	return list, nil
}

// count tells how many objects a map has. Without look it only says what is known.
func (s *Service) count(ctx context.Context, v catalog.VDI, look bool) (counted, bool, error) {
	s.mu.Lock()
	n, known := s.usage[v.Ref]
	c := s.working[v.Name]
	if c != nil && !v.Snapshot && look && c.changed.Swap(false) {
		known = false
	}
	s.mu.Unlock()
	if known || !look {
		return n, known, nil
	}
	n = counted{}
	err := s.walkMap(ctx, v, v.Objects(), func(_ uint32, entries []byte) error {
		for i := 0; i < len(entries); i += 4 {
			switch object.VID(binary.LittleEndian.Uint32(entries[i:]) & ownerMask) {
			case 0:
			case v.VID:
				n.own++
			default:
				n.shared++
			}
		}
		return nil
	})
	if errors.Is(err, errMoved) {
		return counted{}, false, nil // it is known the next time
	}
	if err != nil {
		return n, false, err
	}
	s.mu.Lock()
	s.usage[v.Ref] = n
	s.mu.Unlock()
	return n, true, nil
}

// Info describes one VDI (tag "") or snapshot, with its space counted block by block.
func (s *Service) Info(ctx context.Context, name, tag string) (Info, error) {
	v, err := s.find(ctx, name, tag)
	if err != nil {
		return Info{}, explain(err, "look up volume")
	}
	u, err := s.usageOf(ctx, v)
	if err != nil {
		return Info{}, err
	}
	i := s.describe(v)
	i.Used, i.Shared, i.Exact, i.Known = u.Used, u.Shared, u.Exact, true
	return i, nil
}

// Usage counts the space of a VDI (tag "") or snapshot block by block.
func (s *Service) Usage(ctx context.Context, name, tag string) (Usage, error) {
	v, err := s.find(ctx, name, tag)
	if err != nil {
		return Usage{}, explain(err, "look up volume")
	}
	return s.usageOf(ctx, v)
}

// statWorkers is how many objects are asked at a time.
const statWorkers = 16

func (s *Service) usageOf(ctx context.Context, v catalog.VDI) (Usage, error) {
	for {
		u, err := s.usageIn(ctx, v)
		if err == nil {
			err = s.unmoved(ctx, placeOf(v))
		}
		if now, ok := s.cfg.Catalog.Get(v.VID); errors.Is(err, errMoved) && ok && now.Ref == v.Ref {
			v = now
			continue
		}
		return u, explain(err, "count the space of %q", v.Name)
	}
}

// usageIn is usageOf where v is kept as it says: else it may miss some.
func (s *Service) usageIn(ctx context.Context, v catalog.VDI) (Usage, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	u := Usage{Exact: true}
	var mu sync.Mutex
	var wg sync.WaitGroup
	ids := make(chan object.ID, statWorkers)
	for range statWorkers {
		wg.Go(func() {
			for id := range ids {
				i, err := s.cfg.Objects.Stat(ctx, v.Policy, id)
				if err != nil && !isMissing(err) {
					cancel(err)
				}
				mu.Lock()
				if id.VID() == v.VID {
					u.Used += int64(i.Allocated)
				} else {
					u.Shared += int64(i.Allocated)
				}
				mu.Unlock()
			}
		})
	}
	err := s.walkMap(ctx, v, v.Objects(), func(first uint32, entries []byte) error {
		for i := 0; i < len(entries); i += 4 {
			if o := binary.LittleEndian.Uint32(entries[i:]) & ownerMask; o != 0 && ctx.Err() == nil {
				ids <- object.DataID(object.VID(o), first+uint32(i/4))
			}
		}
		return context.Cause(ctx)
	})
	close(ids)
	wg.Wait()
	if err == nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		return Usage{}, err
	}
	return u, nil
}

// describe tells what the catalog knows, and who has the volume open here.
func (s *Service) describe(v catalog.VDI) Info {
	i := Info{
		Name: v.Name, VID: v.VID, Parent: v.Parent, Snapshot: v.Snapshot, Size: v.Size, ObjectSize: 1 << v.SizeShift, Policy: v.Policy,
		Copies: s.cfg.CopiesOf(v.Policy), Created: v.Created, Attributes: v.Attributes, State: StateOK,
	}
	if v.Snapshot {
		taken := v.Snapped
		i.Tag, i.SnapshotID, i.Identity, i.Snapped = v.Tag, v.SnapshotID, v.Identity, &taken
	}
	if v.Trim != 0 {
		i.State = StateTrimming
	}
	if v.Owner != nil {
		i.Owner, i.Generation = v.Owner.Name, v.Generation
	}
	if v.Lock != nil {
		l := lockInfo(v)
		i.Lock = &l
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.working[v.Name]
	if v.Snapshot {
		c = s.snapshot[v.VID]
	}
	if c != nil {
		i.Openers = c.openers()
	}
	return i
}

// Snapshots lists the snapshots that Changed of the volume (name, tag) can compare with,
// oldest first: those of the VDI, of a snapshot those before it.
func (s *Service) Snapshots(ctx context.Context, name, tag string) ([]SnapshotInfo, error) {
	v, err := s.find(ctx, name, tag)
	if err != nil {
		return nil, explain(err, "list snapshots")
	}
	list := []SnapshotInfo{}
	for _, w := range s.cfg.Catalog.Snapshots(name) {
		if !v.Snapshot || w.SnapshotID < v.SnapshotID {
			list = append(list, SnapshotInfo{Tag: tagOf(w), ID: w.SnapshotID, Taken: w.Snapped, Identity: w.Identity})
		}
	}
	return list, nil
}
