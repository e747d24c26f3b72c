package sheepdog

import (
	"cmp"
	"context"
	"errors"
	"fmt"

	"sheepdog/frontends/internal/listen"
	"sheepdog/frontends/sheepdog/internal/wire"
	"sheepdog/storage/object"
	"sheepdog/vdi"
)

// readObject carries out SD_OP_READ_OBJ.
func (s *session) readObject(o *op) Volume {
	kind, ok := object.ID(o.obj.OID).Kind()
	switch {
	case !ok:
		o.finish(refuse(wire.SD_RES_NO_OBJ, "the oid is of no kind that there is"))
		return nil
	case kind == object.KindInode:
		return s.readInode(o)
	case kind == object.KindVMState:
		s.later(o, (*session).readVMState)
		return nil
	case kind != object.KindData:
		o.finish(refuse(wire.SD_RES_NO_OBJ, "there are no objects of that kind"))
		return nil
	}
	if len(o.data) == 0 {
		o.finish(nil)
		return nil
	}
	if o.wire.Flags&wire.SD_FLAG_CMD_TGT != 0 && s.mayBeStale(object.ID(o.obj.OID).VID()) {
		s.later(o, (*session).readShared)
		return nil
	}
	return s.read(o)
}

// read reads from the data object that the op names: by way of the VDI or snapshot of that vid, for
// that is where clients find vids in maps. From any goroutine; it returns
// what is to be kicked.
//
// Where the session has a VDI open, and the object is another one's of its family, what the VDI has there now is read: that is where
// the client's map has it, which may be an old one, for others have written meanwhile.
func (s *session) read(o *op) Volume {
	id := object.ID(o.obj.OID)
	a, err := s.attach(id.VID(), toRead)
	if err == nil && a.header.Snapshot {
		if h, ok := s.working(); ok && h.Family == a.header.Family {
			a.refs.Add(-1)
			a, err = s.attach(h.VID, toRead)
		}
	}
	if err == nil {
		return s.submit(o, a, vdi.OpRead, id.Index())
	}
	if errors.Is(err, vdi.ErrNotFound) {
		go s.readDeleted(s.ctx, o) // as many as there are requests in flight at most
		return nil
	}
	o.finish(err)
	return nil
}

// readDeleted reads an object of a deleted VDI, which others may still use: by way of the VDI that the session has open, as read does, else of
// anyone that has it. If nobody has, and no VDI is known to be open, there is nothing to be read.
func (s *session) readDeleted(ctx context.Context, o *op) {
	id := object.ID(o.obj.OID)
	family, err := s.server.cfg.Volumes.FamilyOf(id.VID())
	h, found := s.working()
	var a *attached
	if found && err == nil && family == h.Family {
		a, err = s.attach(h.VID, toRead)
	} else {
		var vid object.VID
		if vid, err = s.server.cfg.Volumes.Holder(ctx, id.VID(), id.Index()); err == nil {
			a, err = s.attach(vid, instead)
		}
		if err == nil && !a.header.Snapshot {
			o.owner = id.VID()
		}
	}
	if err != nil {
		o.finish(err)
		return
	}
	if vol := s.submit(o, a, vdi.OpRead, id.Index()); vol != nil {
		vol.Kick()
	}
}

// readInstead ends a read by way of a VDI that the client knows nothing of. That may have got an object of its own meanwhile: then
// what was read may be of that one, and the read begins anew.
func (o *op) readInstead() {
	index := object.ID(o.obj.OID).Index()
	owner, err := o.on.vol.Entry(o.s.ctx, o.on.header.VID, index)
	if wanted := o.owner; err == nil && owner == wanted {
		o.finish(nil)
		return
	}
	if err != nil && !errors.Is(err, vdi.ErrReadOnly) && !errors.Is(err, vdi.ErrNotFound) {
		o.finish(err)
		return
	}
	o.moved()
}

// working is the VDI that the session has open: the one that it writes, else one whose own objects it has read.
func (s *session) working() (vdi.Header, bool) {
	s.mu.Lock()
	name, family := cmp.Or(s.writes, s.reads), s.family
	s.mu.Unlock()
	if name == "" {
		return vdi.Header{}, false
	}
	h, err := s.server.cfg.Volumes.FindHeader(name, "", 0)
	return h, err == nil && h.Family == family
}

// writeObject carries out SD_OP_WRITE_OBJ.
func (s *session) writeObject(o *op) Volume {
	kind, ok := object.ID(o.obj.OID).Kind()
	switch {
	case ok && kind == object.KindData:
		return s.write(o)
	case ok && kind == object.KindInode:
		return s.writeInode(o)
	case ok && kind == object.KindVMState:
		s.later(o, (*session).writeVMState)
		return nil
	}
	o.finish(refuse(wire.SD_RES_INVALID_PARMS, "objects of that kind cannot be written"))
	return nil
}

// create carries out SD_OP_CREATE_AND_WRITE_OBJ.
//
// The volume makes the object by itself when it is written, from the ancestor's that its own map
// names, and enters it into its map. So the client says nothing new, if its map is not an
// old one; and if it is, what others wrote is not lost.
func (s *session) create(o *op) Volume {
	kind, ok := object.ID(o.obj.OID).Kind()
	switch {
	case ok && kind == object.KindData:
		if err := s.checkCow(o); err != nil {
			o.finish(err)
			return nil
		}
		return s.write(o)
	case ok && kind == object.KindVMState:
		s.later(o, (*session).writeVMState)
		return nil
	}
	o.finish(refuse(wire.SD_RES_INVALID_PARMS, "objects of that kind cannot be made"))
	return nil
}

// checkCow refuses to copy what is not the same place of another vid of the family.
func (s *session) checkCow(o *op) error {
	if o.wire.Flags&wire.SD_FLAG_CMD_COW == 0 {
		return nil
	}
	id, from := object.ID(o.obj.OID), object.ID(o.obj.CowOID)
	kind, ok := from.Kind()
	if !ok || kind != object.KindData || from.Index() != id.Index() {
		return refuse(wire.SD_RES_INVALID_PARMS, fmt.Sprintf("object %s cannot be made of %s", id, from))
	}
	mine, err := s.server.cfg.Volumes.FamilyOf(id.VID())
	if err != nil {
		return nil // write says what is wrong
	}
	if other, err := s.server.cfg.Volumes.FamilyOf(from.VID()); err == nil && other != mine {
		return refuse(wire.SD_RES_INVALID_PARMS, fmt.Sprintf("object %s cannot be made of %s, which has nothing to do with it", id, from))
	}
	return nil
}

// write stores the payload in the data object that the op names.
func (s *session) write(o *op) Volume {
	id := object.ID(o.obj.OID)
	a, err := s.attachToWrite(id.VID())
	if err != nil {
		o.finish(err)
		return nil
	}
	if len(o.data) == 0 {
		a.refs.Add(-1)
		o.finish(nil)
		return nil
	}
	return s.submit(o, a, vdi.OpWrite, id.Index())
}

// attachToWrite returns a working VDI; it fails with READONLY if the vid is none any more.
func (s *session) attachToWrite(vid object.VID) (*attached, error) {
	a, err := s.attach(vid, toWrite)
	switch {
	case errors.Is(err, vdi.ErrNotFound):
		return nil, s.gone(vid)
	case err != nil:
		return nil, err
	case a.header.Snapshot:
		a.refs.Add(-1)
		return nil, s.gone(vid)
	}
	return a, nil
}

// discard carries out SD_OP_DISCARD_OBJ.
func (s *session) discard(o *op) Volume {
	id := object.ID(o.obj.OID)
	if kind, ok := id.Kind(); !ok || kind != object.KindData {
		o.finish(refuse(wire.SD_RES_INVALID_PARMS, "only data objects can be discarded"))
		return nil
	}
	return s.clearObject(o, id)
}

// clearObject makes an object of a working VDI a hole.
func (s *session) clearObject(o *op, id object.ID) Volume {
	a, err := s.attachToWrite(id.VID())
	if err != nil {
		o.finish(err)
		return nil
	}
	return s.submit(o, a, vdi.OpDiscard, id.Index())
}

// submit hands an op to a volume, with a reference to it. It may complete, and be freed, at once.
// It returns what is to be kicked.
func (s *session) submit(o *op, a *attached, what vdi.Op, index uint32) Volume {
	o.on = a
	shift := a.header.SizeShift
	base, off, n := int64(index)<<shift, o.obj.Offset, int64(len(o.data))
	if what == vdi.OpDiscard {
		off = 0
		n = max(0, min(1<<shift, a.size(base+1<<shift)-base))
	}
	switch {
	case index >= vdi.NativeObjects || off > 1<<shift || n > 1<<shift-int64(off):
		o.finish(refuse(wire.SD_RES_INVALID_PARMS, fmt.Sprintf("%d bytes at %d of object %s, which has %d", n, off, object.ID(o.obj.OID), 1<<shift)))
		return nil
	case n == 0:
		o.finish(nil)
		return nil
	}
	end := base + int64(off) + n
	r := &o.req
	r.Op, r.Off, r.Len, r.Data, r.VID = what, base+int64(off), n, o.data, a.header.VID
	if what == vdi.OpDiscard {
		r.Data = nil
	}
	if what != vdi.OpRead && o.wire.Flags&wire.SD_FLAG_CMD_CACHE == 0 {
		r.Flags = vdi.FlagFUA
	}
	if size := a.size(end); end > size {
		if what != vdi.OpRead || r.Off >= size {
			o.beyond(what, size)
			return nil
		}
		// Objects are always of full size for clients: what is beyond the end is zero.
		clear(o.data[size-r.Off:])
		r.Len, r.Data = size-r.Off, o.data[:size-r.Off]
	}
	if what != vdi.OpRead && o.wire.Flags&wire.SD_FLAG_CMD_TGT != 0 {
		o.changes = true
		o.begins()
	}
	vol := a.vol // the op may be freed, and the volume closed, at once
	vol.Submit(r)
	return vol
}

// size is the volume's size, as far as needed: at least end, or as it is.
func (a *attached) size(end int64) int64 {
	if a.header.Size >= end && a.header.Snapshot {
		return a.header.Size
	}
	return a.vol.Refresh()
}

// beyond answers a request that is all beyond the end.
func (o *op) beyond(what vdi.Op, size int64) {
	if what == vdi.OpRead {
		clear(o.data)
		o.finish(nil)
		return
	}
	o.finish(refuse(wire.SD_RES_INVALID_PARMS, fmt.Sprintf("change of %d bytes at %d, the volume has %d", o.req.Len, o.req.Off, size)))
}

// flush carries out SD_OP_FLUSH_VDI.
func (s *session) flush(o *op) Volume {
	id := object.ID(o.obj.OID)
	a, err := s.attach(id.VID(), toRead)
	switch {
	case errors.Is(err, vdi.ErrNotFound) || err == nil && a.header.Snapshot:
		if err == nil {
			a.refs.Add(-1)
		}
		if _, gone := s.server.cfg.Volumes.Successor(id.VID()); gone == nil {
			s.later(o, (*session).flushSuccessor)
			return nil
		}
		fallthrough
	case err != nil:
		o.finish(err)
		return nil
	}
	o.on = a
	o.req.Op, o.req.Off, o.req.Len, o.req.Data = vdi.OpFlush, 0, 0, nil
	vol := a.vol
	vol.Submit(&o.req)
	return vol
}

// flushSuccessor is flush for a vid that has another one in its place. What was written under it was made durable then; but what
// may have been lost by that time is said to who flushes what has come.
func (s *session) flushSuccessor(ctx context.Context, o *op) {
	next, err := s.server.cfg.Volumes.Successor(object.ID(o.obj.OID).VID())
	var vol Volume
	if err == nil {
		vol, err = s.server.cfg.Volumes.OpenVID(next.VID, "sheepdog "+listen.PeerName(s.conn), true)
	}
	if errors.Is(err, vdi.ErrNotFound) || errors.Is(err, vdi.ErrBusy) { // it is deleted, or about to be
		o.finish(nil)
		return
	}
	if err != nil {
		o.finish(err)
		return
	}
	o.on = &attached{header: next, vol: vol}
	o.on.refs.Add(1)
	done := make(chan error, 1)
	r := vdi.Request{Op: vdi.OpFlush, Done: func(r *vdi.Request) { done <- r.Err }}
	vol.Submit(&r)
	vol.Kick()
	err = <-done
	s.close(o.on)
	o.finish(err)
}

// readVMState carries out SD_OP_READ_OBJ of a machine's state.
func (s *session) readVMState(ctx context.Context, o *op) {
	at, err := s.vmState(o)
	if err == nil {
		err = s.server.cfg.Volumes.ReadVMState(ctx, at, o.data)
	}
	o.finish(err)
}

// writeVMState carries out SD_OP_WRITE_OBJ and SD_OP_CREATE_AND_WRITE_OBJ of a machine's state.
func (s *session) writeVMState(ctx context.Context, o *op) {
	at, err := s.vmState(o)
	if err == nil {
		if heir, ok := s.heir(at.VID); ok && s.continues(ctx, heir.VID, at, o.wire.Op == wire.SD_OP_CREATE_AND_WRITE_OBJ) {
			at.VID = heir.VID
		}
		var a *attached
		if a, err = s.attachToWrite(at.VID); err == nil {
			o.on = a
			f := vdi.FlagFUA
			if o.wire.Flags&wire.SD_FLAG_CMD_CACHE != 0 {
				f = 0
			}
			err = s.server.cfg.Volumes.WriteVMState(ctx, at, o.data, o.wire.Op == wire.SD_OP_CREATE_AND_WRITE_OBJ, f)
		}
	}
	if errors.Is(err, vdi.ErrReadOnly) {
		err = s.gone(at.VID)
	}
	o.finish(err)
}

// continues reports whether what comes before a piece of a state, if anything, went to that vid: a state
// that others cut in two by taking a snapshot is in neither.
func (s *session) continues(ctx context.Context, vid object.VID, at vdi.VMState, begins bool) bool {
	if !begins {
		return s.hasState(ctx, vid, at.Index)
	}
	return at.Index == 0 || s.hasState(ctx, vid, at.Index-1)
}

func (s *session) vmState(o *op) (vdi.VMState, error) {
	id := object.ID(o.obj.OID)
	if o.obj.Offset > 1<<object.MaxSizeShift {
		return vdi.VMState{}, refuse(wire.SD_RES_INVALID_PARMS, fmt.Sprintf("offset %d is beyond every object", o.obj.Offset))
	}
	return vdi.VMState{VID: id.VID(), Index: id.Index(), Off: uint32(o.obj.Offset)}, nil
}
