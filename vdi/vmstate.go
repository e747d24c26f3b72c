package vdi

import (
	"context"
	"errors"
	"fmt"
	"time"

	"sheepdog/storage/object"
	"sheepdog/vdi/catalog"
)

// The state of a virtual machine, which native clients keep beside a volume when they take a
// snapshot: objects of a kind of their own, written under the working vid, read under the
// snapshot's. They are in no map: whoever has the vid has them.

// VMState is a place in the state of the machine that uses a VDI.
type VMState struct {
	VID   object.VID
	Index uint32 // of the object
	Off   uint32 // bytes, within the object
}

func (v *VMState) check(shift uint8, n int) error {
	if v.Index >= NativeObjects || uint64(v.Off)+uint64(n) > 1<<shift {
		return fmt.Errorf("machine's state: %d bytes at %d of object %d: %w", n, v.Off, v.Index, ErrInvalid)
	}
	return nil
}

func (v *VMState) id() object.ID { return object.NewID(object.KindVMState, v.VID, v.Index) }

// ReadVMState fills p. What was never written is zero, but ErrNotFound stands for an object of
// which nothing was.
func (s *Service) ReadVMState(ctx context.Context, at VMState, p []byte) error {
	v, err := s.live(at.VID)
	if err != nil {
		return err
	}
	if err := at.check(v.SizeShift, len(p)); err != nil {
		return err
	}
	err = s.doAt(ctx, &object.Request{
		Op: object.OpRead, ID: at.id(), Policy: v.Policy, SizeShift: v.SizeShift, Off: at.Off, Len: uint32(len(p)), Data: p,
	}, placeOf(v))
	if errors.Is(err, errMoved) {
		return s.ReadVMState(ctx, at, p)
	}
	if isMissing(err) {
		return fmt.Errorf("the machine's state has no object %d: %w", at.Index, ErrNotFound)
	}
	return explain(err, "read the machine's state of %q", v.Name)
}

// WriteVMState stores p under a working vid; afresh says that nothing of the object shall be kept that was
// there before. It is durable after a flush of the volume, or at once with FlagFUA. It fails
// with ErrReadOnly if the VDI has another vid by now.
func (s *Service) WriteVMState(ctx context.Context, at VMState, p []byte, afresh bool, f Flags) error {
	v, err := s.live(at.VID)
	if err != nil {
		return err
	}
	if err := at.check(v.SizeShift, len(p)); err != nil {
		return err
	}
	if v.Snapshot {
		return fmt.Errorf("VDI %s is a snapshot of %q: %w", at.VID, v.Name, ErrReadOnly)
	}
	c, err := s.acquire(ctx, v.Name, "")
	if err != nil {
		return explain(err, "write the machine's state of %q", v.Name)
	}
	defer s.release(c)
	for until := time.Now().Add(s.cfg.OwnWithin); ; {
		if err = c.own(ctx); err == nil {
			err = c.writeVMState(ctx, at, p, afresh, f)
		}
		if !errors.Is(err, object.ErrStale) || time.Now().After(until) {
			return explain(err, "write the machine's state of %q", v.Name)
		}
	}
}

func (c *core) writeVMState(ctx context.Context, at VMState, p []byte, afresh bool, f Flags) error {
	st := c.gate.stripe(at.Index)
	st.pass()
	defer st.leave()
	m := c.mapping.Load()
	generation := m.generation.Load()
	if generation == 0 {
		return errDisowned
	}
	if err := c.checkVID(m, at.VID); err != nil {
		return err
	}
	r := object.Request{
		Op: object.OpWrite, ID: at.id(), Policy: m.policy, SizeShift: c.shift, Off: at.Off, Len: uint32(len(p)), Data: p,
		Volume: m.vid(), Generation: generation,
	}
	if f&FlagFUA != 0 {
		r.Flags = object.FlagFUA
	}
	defer c.touched(r.ID)
	var err error
	if afresh {
		err = c.s.cfg.Objects.Delete(ctx, object.DeleteRequest{Policy: m.policy, ID: r.ID, Volume: m.vid(), Generation: generation})
	}
	if err == nil {
		err = c.s.do(ctx, &r)
	}
	if errors.Is(err, object.ErrStale) {
		c.disown(m)
	}
	return err
}

// removeVMState removes the machine's state of a deleted vid: what is known to be there, and
// what a client wrote beyond without ever saying so.
func (s *Service) removeVMState(ctx context.Context, v catalog.VDI) error {
	for i := range uint32(NativeObjects) {
		id := object.NewID(object.KindVMState, v.VID, i)
		_, err := s.cfg.Objects.Stat(ctx, v.Policy, id)
		switch {
		case isMissing(err) && int64(i) >= v.VMStateObjects():
			return nil
		case isMissing(err):
			continue
		case err != nil:
			return err
		}
		if err := s.removeObject(ctx, object.DeleteRequest{Policy: v.Policy, ID: id, Volume: v.VID, Generation: v.Generation}); err != nil {
			return err
		}
	}
	return nil
}
