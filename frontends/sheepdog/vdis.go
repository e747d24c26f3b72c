package sheepdog

import (
	"context"
	"errors"
	"fmt"
	"strconv"

	"sheepdog/frontends/sheepdog/internal/wire"
	"sheepdog/storage/object"
	"sheepdog/vdi"
)

// answerVDI answers with a vid.
func (o *op) answerVDI(h vdi.Header) {
	o.s.server.locks.told(o.s.host, h.Name, h.Family)
	o.answer(func(head []byte) { wire.PutVDI(head, uint32(h.VID), uint8(min(max(h.Copies, 1), 255)), h.SizeShift) })
}

// find looks up what a request names.
func (s *session) find(o *op) (vdi.Header, error) {
	name, tag := wire.Names(o.data)
	h, err := s.server.cfg.Volumes.FindHeader(name, tag, o.wire.VDI().SnapID)
	switch {
	case errors.Is(err, vdi.ErrNotFound) && (tag != "" || o.wire.VDI().SnapID != 0):
		if _, working := s.server.cfg.Volumes.FindHeader(name, "", 0); working == nil {
			return h, refuse(wire.SD_RES_NO_TAG, err.Error())
		}
		return h, err
	case err != nil:
		return h, err
	case h.Objects() > vdi.NativeObjects:
		s.server.tooLargeLog.Warn(s.log, "volume refused: it has more objects than the native protocol can name; use NBD, or larger objects",
			"vdi", h.Name, "objects", h.Objects(), "limit", vdi.NativeObjects)
		return h, refuse(wire.SD_RES_INVALID_PARMS, fmt.Sprintf("%q has %d objects", h.Name, h.Objects()))
	}
	return h, nil
}

// lookUpVDI carries out SD_OP_GET_VDI_INFO.
func (s *session) lookUpVDI(o *op) Volume {
	h, err := s.find(o)
	if err != nil {
		o.finish(err)
		return nil
	}
	o.answerVDI(h)
	return nil
}

// lockVDI carries out SD_OP_LOCK_VDI, with which clients open. It keeps nobody away: clients open
// for reading with it too, and during live migration two have a VDI open. See locks.go.
func (s *session) lockVDI(o *op) Volume {
	h, err := s.find(o)
	if err != nil {
		o.finish(err)
		return nil
	}
	s.server.locks.take(s.host, h.Name)
	if o.wire.VDI().Type == wire.LOCK_TYPE_SHARED && !h.Snapshot {
		s.share(h)
	}
	o.answerVDI(h)
	return nil
}

// releaseVDI carries out SD_OP_RELEASE_VDI. tgt sends no name.
func (s *session) releaseVDI(o *op) Volume {
	name, _ := wire.Names(o.data)
	s.unlock()
	if name == "" {
		h, err := s.server.cfg.Volumes.HeaderOf(object.VID(o.wire.VDI().BaseVID) & object.MaxVID)
		if err != nil {
			o.finish(refuse(wire.SD_RES_VDI_NOT_LOCKED, err.Error()))
			return nil
		}
		name = h.Name
	}
	if !s.server.locks.release(s.host, name) {
		o.finish(refuse(wire.SD_RES_VDI_NOT_LOCKED, fmt.Sprintf("%q is not open to this client", name)))
		return nil
	}
	o.finish(nil)
	return nil
}

// readVDIs carries out SD_OP_READ_VDIS.
func (s *session) readVDIs(o *op) Volume {
	s.later(o, func(s *session, _ context.Context, o *op) {
		bitmap := o.data
		clear(bitmap)
		if len(bitmap) < wire.BitmapSize {
			bitmap = make([]byte, wire.BitmapSize)
		}
		s.server.cfg.Volumes.Bitmap(bitmap)
		// Nobody has vid 0, but a run that goes on behind the last vid passes it.
		bitmap[0] |= bitmap[wire.BitmapSize-1] >> 7
		copy(o.data, bitmap)
		o.finish(nil)
	})
	return nil
}

// clusterDefault carries out SD_OP_GET_CLUSTER_DEFAULT.
func (s *session) clusterDefault(o *op) Volume {
	copies, shift, err := s.server.cfg.Volumes.Defaults()
	if err != nil {
		o.finish(refuse(wire.SD_RES_WAIT_FOR_FORMAT, err.Error()))
		return nil
	}
	o.answer(func(head []byte) { wire.PutDefaults(head, uint8(min(copies, 255)), 0, shift) })
	return nil
}

// newVDI carries out SD_OP_NEW_VDI: it creates, clones, takes a snapshot, or ends a rollback.
func (s *session) newVDI(ctx context.Context, o *op) {
	name, tag := wire.Names(o.data)
	v := o.wire.VDI()
	var err error
	switch base := object.VID(v.BaseVID); {
	case v.SnapID != 0:
		err = s.takeSnapshot(ctx, name, tag, base)
	case base != 0:
		err = s.cloneVDI(ctx, name, base, v)
	default:
		err = s.createVDI(ctx, name, v)
	}
	if err != nil {
		o.finish(err)
		return
	}
	h, err := s.server.cfg.Volumes.FindHeader(name, "", 0)
	if err != nil {
		o.finish(err)
		return
	}
	s.log.Info("VDI made by a native client", "vdi", name, "vid", h.VID.String(), "snapshot", v.SnapID != 0, "base", fmt.Sprintf("%06x", v.BaseVID))
	o.answerVDI(h)
}

func (s *session) createVDI(ctx context.Context, name string, v wire.VDIRequest) error {
	if v.CopyPolicy != 0 {
		return refuse(wire.SD_RES_INVALID_PARMS, "erasure coding is not possible: ask for a number of copies")
	}
	_, shift, err := s.server.cfg.Volumes.Defaults()
	if err != nil {
		return refuse(wire.SD_RES_WAIT_FOR_FORMAT, err.Error())
	}
	if v.BlockSizeShift != 0 {
		shift = v.BlockSizeShift
	}
	if shift > object.MaxSizeShift || v.Size > vdi.NativeObjects<<shift {
		return refuse(wire.SD_RES_INVALID_PARMS, fmt.Sprintf("size of %d bytes with objects of 2^%d bytes", v.Size, shift))
	}
	_, err = s.server.cfg.Volumes.Create(ctx, vdi.CreateOptions{Name: name, Size: int64(v.Size), ObjectSizeShift: shift, Copies: int(v.Copies)})
	return err
}

// cloneVDI makes a VDI of a snapshot. With the name of the snapshot's own VDI it is the second half of a
// rollback: that VDI becomes what the snapshot is.
func (s *session) cloneVDI(ctx context.Context, name string, base object.VID, v wire.VDIRequest) error {
	from, err := s.baseSnapshot(base)
	if err != nil {
		return err
	}
	number := strconv.FormatUint(uint64(from.SnapshotID), 10)
	if from.Name == name {
		_, err := s.server.cfg.Volumes.FindHeader(name, "", 0)
		if err == nil && !s.server.rollbacks.announced(name, base) {
			return refuse(wire.SD_RES_VDI_EXIST, fmt.Sprintf("there is a VDI %q", name))
		}
		if _, err = s.server.cfg.Volumes.Rollback(ctx, name, number); err == nil {
			s.server.rollbacks.done(name)
		}
		return err
	}
	if v.Size > vdi.NativeObjects<<from.SizeShift {
		return refuse(wire.SD_RES_INVALID_PARMS, fmt.Sprintf("size of %d bytes with objects of 2^%d bytes", v.Size, from.SizeShift))
	}
	if _, err := s.server.cfg.Volumes.Clone(ctx, from.Name, number, name); err != nil {
		return err
	}
	if v.Size == 0 || int64(v.Size) == from.Size {
		return nil
	}
	_, err = s.server.cfg.Volumes.Resize(ctx, name, int64(v.Size))
	return err
}

func (s *session) baseSnapshot(vid object.VID) (vdi.Header, error) {
	h, err := s.server.cfg.Volumes.HeaderOf(vid)
	switch {
	case errors.Is(err, vdi.ErrNotFound):
		return h, refuse(wire.SD_RES_NO_BASE_VDI, err.Error())
	case err == nil && !h.Snapshot:
		return h, refuse(wire.SD_RES_INVALID_PARMS, fmt.Sprintf("VDI %s, %q, is no snapshot", vid, h.Name))
	}
	return h, err
}

// takeSnapshot makes a snapshot of what the VDI is, by the tag that its header has. If base is another
// snapshot of it, the VDI goes on as what that is.
func (s *session) takeSnapshot(ctx context.Context, name, tag string, base object.VID) error {
	h, err := s.server.cfg.Volumes.FindHeader(name, "", 0)
	if err != nil {
		return err
	}
	if tag == "" {
		tag = h.Tag
	}
	back := ""
	unaware := s.server.heirs.announced(name, base)
	if base != 0 && base != h.VID && !unaware {
		from, err := s.baseSnapshot(base)
		if err == nil && from.Name != name {
			err = refuse(wire.SD_RES_INVALID_PARMS, fmt.Sprintf("VDI %s is no snapshot of %q", base, name))
		}
		if err != nil {
			return err
		}
		back = strconv.FormatUint(uint64(from.SnapshotID), 10)
	}
	if _, err = s.server.cfg.Volumes.Snapshot(ctx, name, tag); err == nil && back != "" {
		_, err = s.server.cfg.Volumes.Rollback(ctx, name, back)
	}
	if err == nil && unaware {
		s.server.heirs.done(name)
	}
	return err
}

// deleteVDI carries out SD_OP_DEL_VDI. If it names a snapshot of the VDI as its base it is the first
// half of a rollback, and nothing is done before the second. So nothing is done either if that snapshot is deleted by now.
func (s *session) deleteVDI(ctx context.Context, o *op) {
	name, tag := wire.Names(o.data)
	v := o.wire.VDI()
	if tag == "" && v.SnapID != 0 {
		tag = strconv.FormatUint(uint64(v.SnapID), 10)
	}
	if tag == "" && v.BaseVID != 0 {
		base, err := s.server.cfg.Volumes.HeaderOf(object.VID(v.BaseVID) & object.MaxVID)
		switch {
		case err != nil || base.Name != name:
			o.finish(refuse(wire.SD_RES_NO_BASE_VDI, fmt.Sprintf("%q is not deleted: it was to be made anew of VDI %06x, which is not of its snapshots any more", name, v.BaseVID)))
			return
		case base.Snapshot:
			s.server.rollbacks.announce(name, base.VID)
			o.finish(nil)
			return
		}
	}
	o.finish(s.server.cfg.Volumes.Delete(ctx, name, tag))
}
