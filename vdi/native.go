package vdi

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/zeebo/xxh3"

	"sheepdog/storage/object"
	"sheepdog/vdi/catalog"
)

// The door of the native protocol: its clients name volumes by vid, keep a copy of the map, and
// say which object they mean. See "Native clients" in DESIGN.md.

// NativeObjects is how many objects of a VDI the native protocol can name.
const NativeObjects = 1 << 20

// Header is what is known of a vid, as native clients see it.
type Header struct {
	Name        string
	Tag         string // of a snapshot; of a VDI, the one that its next snapshot gets
	VID         object.VID
	Parent      object.VID // the snapshot it began as; 0: none
	Family      uint64     // the same for all that may share objects
	Snapshot    bool
	SnapshotID  uint32 // of a VDI, the one that its next snapshot gets
	Created     time.Time
	Snapped     time.Time // zero unless Snapshot
	Size        int64     // bytes
	SizeShift   uint8
	Copies      int
	VMStateSize int64  // bytes
	VMClock     uint64 // ns
}

// Objects is the number of objects that make up the size.
func (h *Header) Objects() int64 { return (h.Size + 1<<h.SizeShift - 1) >> h.SizeShift }

func (s *Service) header(v catalog.VDI) Header {
	h := Header{
		Name: v.Name, Tag: v.Tag, VID: v.VID, Parent: v.Parent, Family: v.Family, Snapshot: v.Snapshot, SnapshotID: v.SnapshotID,
		Created: v.Created, Snapped: v.Snapped, Size: v.Size, SizeShift: v.SizeShift, Copies: s.cfg.CopiesOf(v.Policy),
		VMStateSize: v.VMStateSize, VMClock: v.VMClock,
	}
	if !v.Snapshot {
		h.Tag = v.NextTag
	}
	return h
}

// FindHeader looks up a VDI (tag "" and id 0), or the snapshot of that tag or, if that is "", that id.
// It fails with ErrNotFound.
func (s *Service) FindHeader(name, tag string, id uint32) (Header, error) {
	if tag == "" && id != 0 {
		tag = fmt.Sprint(id)
	}
	v, err := s.cfg.Catalog.Find(name, tag)
	if err != nil {
		return Header{}, explain(err, "look up volume")
	}
	return s.header(v), nil
}

// HeaderOf looks up a VDI or snapshot by its vid. It fails with ErrNotFound.
func (s *Service) HeaderOf(vid object.VID) (Header, error) {
	v, err := s.live(vid)
	if err != nil {
		return Header{}, err
	}
	return s.header(v), nil
}

func (s *Service) live(vid object.VID) (catalog.VDI, error) {
	if v, ok := s.cfg.Catalog.Get(vid); ok && v.State == catalog.Live {
		return v, nil
	}
	return catalog.VDI{}, fmt.Errorf("there is no VDI %s: %w", vid, ErrNotFound)
}

// FamilyOf tells to which family a vid belongs, also of deleted ones as long as there are objects
// of them, or a VDI goes on from them. It fails with ErrNotFound.
func (s *Service) FamilyOf(vid object.VID) (uint64, error) {
	if v, ok := s.cfg.Catalog.Get(vid); ok {
		return v.Family, nil
	}
	if o, ok := s.cfg.Catalog.Freed(vid); ok {
		return o.Family, nil
	}
	return 0, fmt.Errorf("there is no VDI %s: %w", vid, ErrNotFound)
}

// Successor is the working VDI that has come in the place of a vid, by a snapshot or a
// rollback, also if the snapshot is deleted by now and has left nothing. Another VDI of the same name, made when that one
// was deleted, is none. It fails with ErrNotFound.
func (s *Service) Successor(vid object.VID) (Header, error) {
	o, ok := s.origin(vid)
	if ok {
		if w, err := s.cfg.Catalog.Find(o.Name, ""); err == nil && w.Origin() == o {
			return s.header(w), nil
		}
	}
	return Header{}, fmt.Errorf("there is no VDI %s, and none in its place: %w", vid, ErrNotFound)
}

// origin is what a vid is or was; false if that is no VDI, or is not known any more.
func (s *Service) origin(vid object.VID) (catalog.Origin, bool) {
	if v, ok := s.cfg.Catalog.Get(vid); ok {
		return v.Origin(), v.State != catalog.Reserved
	}
	return s.cfg.Catalog.Freed(vid)
}

// InUse reports whether a vid's bit is set by Bitmap.
func (s *Service) InUse(vid object.VID) bool { return s.cfg.Catalog.InUse(vid) }

// Bitmap sets the bit of each vid that is in use in the sense of the native protocol: b has a
// bit for each of 2^24 vids, the lowest first.
func (s *Service) Bitmap(b []byte) { s.cfg.Catalog.Bitmap(b) }

// OpenVID opens a VDI or snapshot by its vid; see Open. A Request for the vid says so in
// Request.VID. If quiet nobody is told that it is open, and it may be deleted meanwhile:
// that is for ancestors, whose objects are read on behalf of others.
func (s *Service) OpenVID(vid object.VID, client string, quiet bool) (*Volume, error) {
	d, err := s.live(vid)
	if err != nil {
		return nil, err
	}
	tag := ""
	if d.Snapshot {
		tag = fmt.Sprint(d.SnapshotID)
	}
	c, err := s.acquire(context.Background(), d.Name, tag)
	if err != nil {
		return nil, explain(err, "open VDI %s", vid)
	}
	v := &Volume{core: c, size: c.size.Load(), readOnly: c.snapshot, client: client, vid: vid, quiet: quiet}
	v.told.Store(c.told.Load())
	if quiet {
		return v, nil // it stays one of the core's users
	}
	s.mu.Lock()
	c.handles[v] = struct{}{}
	c.users--
	s.mu.Unlock()
	return v, nil
}

// Refresh asks the catalog for the size, which another node may have changed, and returns it.
func (v *Volume) Refresh() int64 {
	c := v.core
	if c.snapshot || c.mapping.Load().generation.Load() != 0 {
		return c.size.Load()
	}
	c.renewSize()
	return c.size.Load()
}

// Entry tells which vid owns the object of an index, 0 for a hole, as the map is now. It
// fails with ErrReadOnly if the volume does not have that vid any more.
func (v *Volume) Entry(ctx context.Context, vid object.VID, index uint32) (object.VID, error) {
	if int64(index)<<v.core.shift >= v.core.size.Load() {
		return 0, nil
	}
	m, e, err := v.core.lookUp(ctx, index)
	if err == nil {
		err = v.core.checkVID(m, vid)
	}
	return object.VID(e & ownerMask), explain(err, "look into the map of %s", v.core.title())
}

// checkVID refuses a request that is meant for another vid than the one of m.
func (c *core) checkVID(m *mapping, vid object.VID) error {
	if vid == 0 || vid == m.vid() {
		return nil
	}
	return fmt.Errorf("%s is VDI %s by now, no longer %s: %w", c.title(), m.vid(), vid, ErrReadOnly)
}

// ReadMap reads entries of a map as they are stored, which is as they are for everything that
// was answered: little-endian vids, from the index first on, len(p)/4 of them. What is
// beyond the size is 0. It fails with ErrNotFound.
func (s *Service) ReadMap(ctx context.Context, vid object.VID, first uint32, p []byte) error {
	clear(p)
	var err error
	for range lookAttempts {
		var v catalog.VDI
		if v, err = s.live(vid); err != nil {
			return err
		}
		if err = s.readMapOnce(ctx, v, first, p); !errors.Is(err, object.ErrStale) {
			break
		}
		if err = s.catchUp(ctx); err != nil {
			break
		}
	}
	return explain(err, "read the map of VDI %s", vid)
}

func (s *Service) readMapOnce(ctx context.Context, v catalog.VDI, first uint32, p []byte) error {
	count := min(int64(len(p)/4), v.Objects()-int64(first))
	if count <= 0 {
		return nil
	}
	buf := make([]byte, min(walkPiece, (count+2*pageEntries)*4/object.BlockSize*object.BlockSize))
	for done := int64(0); done < count; {
		at := int64(first) + done
		inside := at % pageEntries
		left := 1<<indexShift - (at-inside)&(1<<indexShift-1) // entries in this map object
		n := min(int64(len(buf)), left*4, (inside+count-done+pageEntries-1)/pageEntries*object.BlockSize)
		r := mapRead(v.Policy, v.VID, uint32(at/pageEntries), buf[:n])
		r.Volume, r.Generation = v.VID, v.Generation
		err := s.doAt(ctx, r, placeOf(v))
		if errors.Is(err, object.ErrNotFound) {
			clear(buf[:n])
			err = nil
		}
		if err != nil {
			return err
		}
		got := min(count-done, n/4-inside)
		for i := range got {
			e := binary.LittleEndian.Uint32(buf[4*(inside+i):])
			binary.LittleEndian.PutUint32(p[4*(done+i):], e&ownerMask)
		}
		done += got
	}
	return nil
}

// Opened is how often a working VDI is open through this node; see OpenVID for what does not count.
func (s *Service) Opened(vid object.VID) int {
	v, err := s.live(vid)
	if err != nil || v.Snapshot {
		return 0
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if c := s.working[v.Name]; c != nil { // it may not know yet that others took a snapshot
		return len(c.handles)
	}
	return 0
}

// Owner is the node through which a working VDI was written last, in that life of it; false if nobody may write it.
func (s *Service) Owner(vid object.VID) (catalog.Node, bool) {
	v, err := s.live(vid)
	if err != nil || v.Owner == nil {
		return catalog.Node{}, false
	}
	return *v.Owner, true
}

// Holder finds a VDI or snapshot whose map has vid at index: what may be read in its
// place when it is deleted, but its object is not. It fails with ErrNotFound.
func (s *Service) Holder(ctx context.Context, vid object.VID, index uint32) (object.VID, error) {
	v, ok := s.cfg.Catalog.Get(vid)
	if !ok {
		return 0, fmt.Errorf("there is no VDI %s: %w", vid, ErrNotFound)
	}
	for _, w := range s.liveOf(v.Family) {
		used, err := s.referenced(ctx, []catalog.VDI{w}, vid, index)
		if errors.Is(err, errMoved) {
			return s.Holder(ctx, vid, index)
		}
		if err != nil {
			return 0, explain(err, "look for who uses object %d of VDI %s", index, vid)
		}
		if used {
			return w.VID, nil
		}
	}
	return 0, fmt.Errorf("VDI %s is deleted, and nobody uses its object %d: %w", vid, index, ErrNotFound)
}

// Describe notes what a native client says of the next snapshot of a working VDI. It
// fails with ErrReadOnly if the vid is none any more.
func (s *Service) Describe(ctx context.Context, vid object.VID, tag string, vmStateSize int64, vmClock uint64) error {
	v, err := s.live(vid)
	switch {
	case err != nil:
		return err
	case v.Snapshot:
		return fmt.Errorf("VDI %s is a snapshot of %q: %w", vid, v.Name, ErrReadOnly)
	case v.NextTag == tag && v.VMStateSize == vmStateSize && v.VMClock == vmClock:
		return nil
	}
	_, err = s.propose(ctx, catalog.Command{Describe: &catalog.Describe{Ref: v.Ref, Tag: tag, VMStateSize: vmStateSize, VMClock: vmClock}})
	if errors.Is(err, catalog.ErrStale) {
		err = fmt.Errorf("%w: %w", ErrReadOnly, err)
	}
	return explain(err, "note what the next snapshot of %q is", v.Name)
}

// MapVersion is another one whenever a map may be another one. Generation is 0 where this node does
// not own the VDI: then only whole versions can be compared.
type MapVersion struct {
	Generation uint64
	Changes    uint64 // by this node, as the owner
	Stored     uint64 // a checksum of the map that others write
}

// MapVersion tells the version of the map as it is now.
func (v *Volume) MapVersion(ctx context.Context) (MapVersion, error) {
	c := v.core
	if m := c.mapping.Load(); !c.snapshot {
		version := MapVersion{Generation: m.generation.Load(), Changes: c.changes.Load()}
		if version.Generation != 0 && c.trusts(m) {
			return version, nil
		}
	}
	d, err := c.current()
	if err != nil {
		return MapVersion{}, err
	}
	h := xxh3.New()
	for i := range mapObjects(d.Objects()) {
		sums, err := c.s.cfg.Objects.Sums(ctx, d.Policy, object.NewID(object.KindMap, d.VID, i))
		if err != nil && !isMissing(err) {
			return MapVersion{}, explain(err, "look at the map of %s", c.title())
		}
		for _, sum := range sums {
			var b [8]byte
			binary.LittleEndian.PutUint64(b[:], sum)
			h.Write(b[:])
		}
	}
	return MapVersion{Stored: h.Sum64()}, nil
}

// MapChanged reports whether a request that is done changed the map.
func (r *Request) MapChanged() bool { return atomic.LoadInt32(&r.span.changed) != 0 }
