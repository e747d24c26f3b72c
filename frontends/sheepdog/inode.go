package sheepdog

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"sheepdog/frontends/sheepdog/internal/wire"
	"sheepdog/storage/object"
	"sheepdog/vdi"
)

// The inode of a VDI is no object here: its header is made of what the catalog knows, its map
// is the volume's.

func inodeHeader(h vdi.Header) wire.InodeHeader {
	return wire.InodeHeader{
		Name: h.Name, Tag: h.Tag, Created: h.Created, Snapped: h.Snapped, VMClock: h.VMClock, Size: uint64(h.Size),
		VMStateSize: uint64(h.VMStateSize), Copies: uint8(min(max(h.Copies, 1), 255)), BlockSizeShift: h.SizeShift, SnapID: h.SnapshotID,
		VID: uint32(h.VID), ParentVID: uint32(h.Parent),
	}
}

// readInode carries out SD_OP_READ_OBJ of an inode. Headers may be read by everybody: clients look for
// snapshots by going through them.
func (s *session) readInode(o *op) Volume {
	vid := object.ID(o.obj.OID).VID()
	off, n := o.obj.Offset, uint64(len(o.data))
	if off > wire.LongInodeSize || n > wire.LongInodeSize-off {
		o.finish(refuse(wire.SD_RES_INVALID_PARMS, fmt.Sprintf("%d bytes at %d of an inode", n, off)))
		return nil
	}
	h, err := s.server.cfg.Volumes.HeaderOf(vid)
	if errors.Is(err, vdi.ErrNotFound) && s.server.cfg.Volumes.InUse(vid) && off+n <= wire.InodeHeaderSize {
		// A deleted VDI has no name, but a header: who goes through them would be told of errors.
		h, err = vdi.Header{VID: vid, SizeShift: object.DefaultSizeShift}, nil
	}
	if err != nil {
		o.finish(err)
		return nil
	}
	if o.wire.Flags&wire.SD_FLAG_CMD_TGT != 0 && s.follow(h) != nil {
		s.later(o, (*session).readSharedInode)
		return nil
	}
	return s.fillInode(o, h)
}

// fillInode answers a read of an inode.
func (s *session) fillInode(o *op, h vdi.Header) Volume {
	if s.fillHeader(o, h) {
		o.finish(nil)
		return nil
	}
	s.later(o, (*session).readMap)
	return nil
}

// fillHeader fills what is wanted of the header, and reports whether nothing else is.
func (s *session) fillHeader(o *op, h vdi.Header) bool {
	rest := o.data
	if off := o.obj.Offset; off < wire.InodeHeaderSize {
		var b [wire.InodeHeaderSize]byte
		in := inodeHeader(h)
		in.Put(b[:])
		rest = rest[copy(rest, b[off:]):]
	}
	return len(rest) == 0
}

// readMap fills what the header has left of the data wanted.
func (s *session) readMap(ctx context.Context, o *op) {
	from := uint64(max(wire.InodeHeaderSize, int64(o.obj.Offset))) - wire.InodeHeaderSize
	p := o.data[from+wire.InodeHeaderSize-o.obj.Offset:]
	clear(p)
	const end = 4 * wire.MapEntries
	p = p[:max(0, min(int64(len(p)), end-int64(from)))]
	if len(p) == 0 {
		o.finish(nil)
		return
	}
	if from%4 == 0 && len(p)%4 == 0 {
		o.finish(s.readEntries(ctx, o, uint32(from/4), p))
		return
	}
	first, last := from/4, (from+uint64(len(p))+3)/4
	whole := make([]byte, 4*(last-first)) // 4 MiB at most
	err := s.readEntries(ctx, o, uint32(first), whole)
	copy(p, whole[from-4*first:])
	o.finish(err)
}

// readEntries reads entries of a map, from the first on, for a client that keeps them.
//
// QEMU never reads them again: it takes a hole for zeros without asking, and asks for an ancestor's object where the VDI has got one of
// its own. So the process that a machine is migrated to, which opens the VDI while the one that it comes from still writes, would read what is no
// more. Where others may have the VDI open it is therefore given a map that has the VDI's own vid everywhere. Then it asks for all
// it reads, and writes without creating anything first; the volume knows what is there. What is lost is that the client knows holes.
// Those who share a VDI by other means (shared.go) are told of changes.
func (s *session) readEntries(ctx context.Context, o *op, first uint32, p []byte) error {
	vid := object.ID(o.obj.OID).VID()
	used := o.wire.Flags&wire.SD_FLAG_CMD_TGT == 0 && s.usedByOthers(ctx, vid) // those who end before the map is read are in it
	if err := s.server.cfg.Volumes.ReadMap(ctx, vid, first, p); err != nil || !used {
		return err
	}
	h, err := s.server.cfg.Volumes.HeaderOf(vid)
	if err != nil || h.Snapshot {
		return err // it has become one: what was read stays as it is
	}
	for i := range max(0, min(int64(len(p)/4), h.Objects()-int64(first))) {
		binary.LittleEndian.PutUint32(p[4*i:], uint32(vid))
	}
	return nil
}

// usedByOthers reports whether anybody but the client of this session may have a working VDI open.
func (s *session) usedByOthers(ctx context.Context, vid object.VID) bool {
	h, err := s.server.cfg.Volumes.HeaderOf(vid)
	if err != nil || h.Snapshot {
		return false
	}
	return s.server.locks.others(s.host, h.Name) || s.server.idles() || s.server.cfg.Volumes.Opened(vid) > s.ownHandles(h) || s.server.cfg.Volumes.UsedElsewhere(ctx, vid)
}

// ownHandles is how often the client of this session has a working VDI open. Its connections are not known to be one client's. But if its host has
// opened the VDI once, all that have used it since then are; who used it before had opened it when this server did not run yet.
func (s *session) ownHandles(h vdi.Header) (n int) {
	since := s.server.locks.once(s.host, h.Name)
	s.server.clients.Each(func(c *session) {
		if c == s || c.host == s.host && !since.IsZero() {
			n += c.handles(h.Name, since)
		}
	})
	return n
}

// writeInode carries out SD_OP_WRITE_OBJ of an inode. Of the header it takes what a client may say
// of its VDI, and of the map one thing only: that an object is a hole.
func (s *session) writeInode(o *op) Volume {
	off, n := o.obj.Offset, uint64(len(o.data))
	if off > wire.InodeSize || n > wire.InodeSize-off || n == 0 {
		o.finish(refuse(wire.SD_RES_INVALID_PARMS, fmt.Sprintf("%d bytes at %d of an inode", n, off)))
		return nil
	}
	vid := object.ID(o.obj.OID).VID()
	h, err := s.toWrite(vid)
	if err != nil {
		if _, ok := s.heir(vid); ok && off+n <= wire.InodeHeaderSize {
			s.later(o, (*session).writeHeader)
			return nil
		}
		o.finish(err)
		return nil
	}
	if end := off + n; end > wire.InodeHeaderSize {
		from := max(off, wire.InodeHeaderSize)
		if (from-wire.InodeHeaderSize)%4 != 0 || (end-from)%4 != 0 {
			o.finish(refuse(wire.SD_RES_INVALID_PARMS, "a part of a map entry"))
			return nil
		}
		entries := o.data[from-off:]
		first := uint32((from - wire.InodeHeaderSize) / 4)
		if err := s.checkEntries(h, entries); err != nil {
			o.finish(err)
			return nil
		}
		if len(entries) == 4 && off == from && wire.Entry(entries, 0) == 0 {
			return s.clearEntry(o, h, first)
		}
		if off == from && s.requests == 1 && allZero(entries) {
			s.clearing = true
		}
	}
	if off >= wire.InodeHeaderSize {
		o.finish(nil)
		return nil
	}
	s.later(o, (*session).writeHeader)
	return nil
}

// toWrite is the header of a working VDI; it fails with READONLY if the vid is none any more.
func (s *session) toWrite(vid object.VID) (vdi.Header, error) {
	h, err := s.server.cfg.Volumes.HeaderOf(vid)
	if errors.Is(err, vdi.ErrNotFound) || err == nil && h.Snapshot {
		return h, s.gone(vid)
	}
	if err == nil {
		if _, strange := s.server.locks.has(s.host, h.Name, h.Family); strange {
			return h, replaced(h)
		}
	}
	return h, err
}

// heir is the working VDI that goes on from a snapshot. A client that has written nothing since others took that
// names the snapshot's vid still when it takes one itself, or grows: it does not ask for the new vid
// then, as it does where data is refused. What it means is the VDI.
func (s *session) heir(vid object.VID) (vdi.Header, bool) {
	if h, err := s.server.cfg.Volumes.HeaderOf(vid); err != nil || !h.Snapshot {
		return vdi.Header{}, false
	}
	heir, err := s.server.cfg.Volumes.Successor(vid)
	return heir, err == nil && s.comesFrom(heir, vid) // else rolled back
}

// comesFrom reports whether a VDI goes on from a snapshot, perhaps by way of others.
func (s *session) comesFrom(h vdi.Header, vid object.VID) bool {
	const maxAncestors = 4096
	var err error
	for n := 0; err == nil && h.Parent != 0 && n < maxAncestors; n++ {
		if h.Parent == vid {
			return true
		}
		h, err = s.server.cfg.Volumes.HeaderOf(h.Parent)
	}
	return false
}

// hasState reports whether the first byte of an object of a machine's state is there.
func (s *session) hasState(ctx context.Context, vid object.VID, index uint32) bool {
	return s.server.cfg.Volumes.ReadVMState(ctx, vdi.VMState{VID: vid, Index: index}, make([]byte, 1)) == nil
}

// checkEntries refuses entries that name what is not of the VDI's family.
//
// Nothing is stored. The volume has entered by itself what the client has made, before
// that was answered; what else the client writes is its copy of the map, which may be an old one.
func (s *session) checkEntries(h vdi.Header, entries []byte) error {
	known := object.VID(0)
	for i := range len(entries) / 4 {
		vid := object.VID(wire.Entry(entries, i))
		if vid == 0 || vid == h.VID || vid == known {
			continue
		}
		family, err := s.server.cfg.Volumes.FamilyOf(vid)
		if err != nil || family != h.Family {
			return refuse(wire.SD_RES_INVALID_PARMS, fmt.Sprintf("VDI %s cannot own objects of %q", vid, h.Name))
		}
		known = vid
	}
	return nil
}

// clearEntry makes the object of a single entry a hole: that is how QEMU discards. Several entries
// are never cleared: "qemu-img snapshot -d" does so with the map of the VDI, whose snapshot
// it is to delete.
func (s *session) clearEntry(o *op, h vdi.Header, index uint32) Volume {
	if int64(index) >= h.Objects() || s.clearing || s.deletesSnapshot(h) {
		o.finish(nil)
		return nil
	}
	return s.clearObject(o, object.DataID(h.VID, index))
}

// deletesSnapshot reports whether a single entry is cleared as the whole of a map, or the rest of one, by
// "qemu-img snapshot -d": on a connection made for that after the VDI was opened, while the one that it
// was opened with, and that discards come on, is there.
func (s *session) deletesSnapshot(h vdi.Header) bool {
	if s.requests > 1 {
		return false
	}
	opened := s.server.locks.opened(s.host, h.Name)
	return !opened.IsZero() && s.info.Started.After(opened) && s.server.hasIO(s, h.Family, opened)
}

// hasIO reports whether another connection of the session's host, made before that time, is one for data of the
// family, or may become it.
func (s *Server) hasIO(other *session, family uint64, before time.Time) (has bool) {
	s.clients.Each(func(c *session) {
		if c == other || c.host != other.host || !c.info.Started.Before(before) {
			return
		}
		c.mu.Lock()
		uses := c.family
		c.mu.Unlock()
		has = has || uses == family || uses == 0 && !c.used.Load()
	})
	return has
}

func allZero(b []byte) bool {
	for _, x := range b {
		if x != 0 {
			return false
		}
	}
	return true
}

// writeHeader takes from the header what is a request: a larger size, and what is to be
// known of the next snapshot. The rest may be old.
func (s *session) writeHeader(ctx context.Context, o *op) { o.finish(s.changeHeader(ctx, o)) }

func (s *session) changeHeader(ctx context.Context, o *op) error {
	vid := object.ID(o.obj.OID).VID()
	h, err := s.toWrite(vid)
	if err != nil {
		heir, ok := s.heir(vid)
		if !ok {
			return err
		}
		h = heir
	}
	var b [wire.InodeHeaderSize]byte
	is := inodeHeader(h)
	is.Put(b[:])
	copy(b[o.obj.Offset:], o.data)
	want := wire.ParseInodeHeader(b[:])
	switch limit := uint64(vdi.NativeObjects) << h.SizeShift; {
	case want.Name != h.Name:
		return refuse(wire.SD_RES_INVALID_PARMS, fmt.Sprintf("the header of %q with the name %q", h.Name, want.Name))
	case want.Size > limit:
		return refuse(wire.SD_RES_INVALID_PARMS, fmt.Sprintf("size of %d bytes: the native protocol can name %d", want.Size, limit))
	case want.VMStateSize > 1<<62:
		return refuse(wire.SD_RES_INVALID_PARMS, fmt.Sprintf("machine's state of %d bytes", want.VMStateSize))
	}
	if h.VID != vid {
		if want.VMStateSize > 0 && !s.hasState(ctx, h.VID, uint32((want.VMStateSize-1)>>h.SizeShift)) {
			return err // the state went to the snapshot, which was taken meanwhile
		}
		s.server.heirs.announce(h.Name, vid)
	}
	err = s.server.cfg.Volumes.Describe(ctx, h.VID, want.Tag, int64(want.VMStateSize), want.VMClock)
	// A smaller size is never asked for: it is one of before the VDI grew by other means.
	if err == nil && int64(want.Size) > h.Size {
		_, err = s.server.cfg.Volumes.Resize(ctx, h.Name, int64(want.Size))
	}
	if errors.Is(err, vdi.ErrReadOnly) {
		return s.gone(vid)
	}
	return err
}
