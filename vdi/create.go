package vdi

import (
	"context"
	"fmt"

	"sheepdog/storage/object"
	"sheepdog/vdi/catalog"
)

// Create makes an empty VDI. It fails with ErrExists, ErrInvalid, ErrUnavailable.
// Without Preallocate it takes no space and its time does not grow with the size.
func (s *Service) Create(ctx context.Context, o CreateOptions) (Info, error) {
	c := catalog.Create{Name: o.Name, Size: o.Size, SizeShift: o.ObjectSizeShift, Policy: s.cfg.DefaultPolicy(), At: s.now()}
	if c.SizeShift == 0 {
		c.SizeShift = s.cfg.DefaultSizeShift()
	}
	if c.Policy == 0 {
		return Info{}, fmt.Errorf("create VDI %q: %w: the cluster is not formatted: run \"dog cluster format\"", o.Name, ErrUnavailable)
	}
	if o.Copies != 0 {
		policy, err := s.cfg.PolicyOf(ctx, o.Copies)
		if err != nil {
			return Info{}, explain(err, "create VDI %q", o.Name)
		}
		c.Policy = policy
	}
	res, err := s.propose(ctx, catalog.Command{Create: &c})
	if err != nil {
		return Info{}, explain(err, "create VDI %q", o.Name)
	}
	if o.Preallocate {
		if err := s.preallocate(ctx, o.Name); err != nil {
			return Info{}, explain(err, "preallocate VDI %q, which is created", o.Name)
		}
	}
	return s.describe(*res.VDI), nil
}

// preallocatePiece is how many objects are allocated by one request.
const preallocatePiece = 16

func (s *Service) preallocate(ctx context.Context, name string) error {
	v, err := s.Open(ctx, name, "", OpenOptions{Client: "preallocation"})
	if err != nil {
		return err
	}
	defer v.Close()
	for off := int64(0); off < v.Size(); {
		n := min(v.Size()-off, preallocatePiece*v.ObjectSize())
		if err := v.Zero(ctx, off, n, FlagNoHole); err != nil {
			return err
		}
		off += n
	}
	return v.Flush(ctx)
}

// reserve takes a vid for name, for a copy of the map of src. The caller passes it to
// unreserve in the end.
func (s *Service) reserve(ctx context.Context, name string, src catalog.VDI) (catalog.Ref, error) {
	s.makingMu.Lock() // the collector takes no reservation of this node for forgotten meanwhile
	defer s.makingMu.Unlock()
	res, err := s.propose(ctx, catalog.Command{Reserve: &catalog.Reserve{Name: name, Source: src.Ref, By: s.self(), At: s.now()}})
	if err != nil {
		return catalog.Ref{}, err
	}
	s.making[res.VDI.Ref] = true
	return res.VDI.Ref, nil
}

// unreserve forgets a reservation, and gives it up unless it was used.
func (s *Service) unreserve(ctx context.Context, r catalog.Ref) {
	s.makingMu.Lock()
	delete(s.making, r)
	s.makingMu.Unlock()
	if v, ok := s.cfg.Catalog.Get(r.VID); ok && v.Ref == r && v.State == catalog.Reserved {
		if _, err := s.propose(context.WithoutCancel(ctx), catalog.Command{Cancel: &catalog.Cancel{Ref: r}}); err != nil {
			poke(s.garbage) // the collector tries again
		}
	}
}

// copyMap makes a durable copy of a map. The map does not change meanwhile.
func (s *Service) copyMap(ctx context.Context, src catalog.VDI, dst catalog.Ref) error {
	r, ok := s.cfg.Catalog.Get(dst.VID)
	if !ok || r.Ref != dst {
		return fmt.Errorf("the map made in VDI %s was given up: %w", dst.VID, ErrStale)
	}
	policy := r.Policy // where src is: it is not moved while there is a reservation in its family
	copied := 0
	for i := range mapObjects(src.Objects()) {
		err := s.cfg.Objects.Copy(ctx, object.CopyRequest{
			Dst: object.NewID(object.KindMap, dst.VID, i), Src: object.NewID(object.KindMap, src.VID, i),
			DstPolicy: policy, SrcPolicy: policy, SizeShift: mapShift,
			Volume: dst.VID, Generation: dst.Serial, // below any generation that the new VDI will have
		})
		switch {
		case err == nil:
			copied++
		case !isMissing(err):
			return fmt.Errorf("copy the map: %w", err)
		}
	}
	if copied == 0 {
		return nil
	}
	return s.sync(ctx, policy, dst.VID)
}

// mapObjects is how many objects the map of that many objects has.
func mapObjects(objects int64) uint32 {
	return uint32((objects + 1<<indexShift - 1) >> indexShift)
}
