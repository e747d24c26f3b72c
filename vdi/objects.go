package vdi

import (
	"context"
	"encoding/binary"
	"errors"

	"sheepdog/storage/object"
	"sheepdog/vdi/catalog"
)

// ObjectInfo tells about one object of a volume.
type ObjectInfo struct {
	Index     uint32          `json:"index"` // in the volume
	ID        object.ID       `json:"id"`
	Owner     object.VID      `json:"owner"` // whose object it is: the volume's own, or an ancestor's
	Policy    object.PolicyID `json:"policy"`
	Allocated int64           `json:"allocated"` // bytes
	Missing   bool            `json:"missing"`   // the map names it, but it is not there
}

// Objects calls fn for each object of the VDI (tag "") or snapshot that is no hole, by
// index, until fn returns false.
func (s *Service) Objects(ctx context.Context, name, tag string, fn func(ObjectInfo) bool) error {
	v, err := s.find(ctx, name, tag)
	if err != nil {
		return explain(err, "list the objects of a volume")
	}
	stopped := false
	err = s.walkMap(ctx, v, v.Objects(), func(first uint32, entries []byte) error {
		for i := 0; i < len(entries) && !stopped; i += 4 {
			owner := object.VID(binary.LittleEndian.Uint32(entries[i:]) & ownerMask)
			if owner == 0 {
				continue
			}
			o := ObjectInfo{Index: first + uint32(i/4), Owner: owner, Policy: v.Policy}
			o.ID = object.DataID(owner, o.Index)
			info, err := s.statOf(ctx, &v, o.ID)
			o.Policy = v.Policy
			if o.Missing = isMissing(err); err != nil && !o.Missing {
				return err
			}
			o.Allocated = int64(info.Allocated)
			stopped = !fn(o)
		}
		return ctx.Err()
	})
	return explain(err, "list the objects of %q", name)
}

// statOf is Stat of an object that v's map names. If v has been moved, that is noted.
func (s *Service) statOf(ctx context.Context, v *catalog.VDI, id object.ID) (object.Info, error) {
	for {
		info, err := s.cfg.Objects.Stat(ctx, v.Policy, id)
		if !isMissing(err) || !errors.Is(s.unmoved(ctx, placeOf(*v)), errMoved) {
			return info, err
		}
		now, ok := s.cfg.Catalog.Get(v.VID)
		if !ok || now.Ref != v.Ref {
			return info, err
		}
		v.Policy, v.Moves = now.Policy, now.Moves
	}
}
