package catalog

import (
	"encoding/json"
	"slices"
	"time"

	"sheepdog/storage/object"
)

// apply carries out a command and returns what it made or changed, if that is one VDI.
// What it refuses has changed nothing.
func (s *state) apply(command []byte) (*VDI, error) {
	var c Command
	if err := json.Unmarshal(command, &c); err != nil {
		return nil, refuse(ErrInvalid, "%v", err)
	}
	switch {
	case c.Create != nil:
		return s.create(c.Create)
	case c.Reserve != nil:
		return s.reserve(c.Reserve)
	case c.Snapshot != nil:
		return s.takeSnapshot(c.Snapshot)
	case c.Clone != nil:
		return s.clone(c.Clone)
	case c.Rollback != nil:
		return s.rollback(c.Rollback)
	case c.Cancel != nil:
		return nil, s.cancel(c.Cancel)
	case c.Delete != nil:
		return nil, s.delete(c.Delete)
	case c.Resize != nil:
		return s.resize(c.Resize)
	case c.Trimmed != nil:
		return s.trimmed(c.Trimmed)
	case c.SetAttr != nil:
		return s.setAttr(c.SetAttr)
	case c.Describe != nil:
		return s.describe(c.Describe)
	case c.Acquire != nil:
		return s.acquire(c.Acquire)
	case c.Release != nil:
		return s.release(c.Release)
	case c.Lock != nil:
		return s.lock(c.Lock)
	case c.Unlock != nil:
		return s.unlock(c.Unlock)
	case c.MapGone != nil:
		return nil, s.mapGone(c.MapGone)
	case c.Collected != nil:
		return nil, s.collected(c.Collected)
	case c.Adopt != nil:
		return nil, s.adopt(c.Adopt)
	case c.Settled != nil:
		return s.settled(c.Settled)
	case c.Hold != nil:
		return s.setHold(c.Hold)
	case c.Record != nil:
		return nil, s.setRecord(c.Record)
	case c.Move != nil:
		return s.move(c.Move)
	case c.Moved != nil:
		return s.moved(c.Moved)
	case c.Removal != nil:
		return s.removal(c.Removal)
	case c.Barrier != nil:
		return nil, nil
	}
	return nil, refuse(ErrInvalid, "a command that this version does not know")
}

func checkSize(size int64, shift uint8) error {
	switch {
	case shift < object.MinSizeShift || shift > object.MaxSizeShift:
		return refuse(ErrInvalid, "object size 2^%d: must be a power of two from 1 MiB to 2 GiB", shift)
	case size < 0 || size > MaxSize:
		return refuse(ErrInvalid, "size of %d bytes: must be from 0 to 64 TiB", size)
	}
	return nil
}

func (s *state) create(c *Create) (*VDI, error) {
	if err := CheckName(c.Name); err != nil {
		return nil, err
	}
	if err := checkSize(c.Size, c.SizeShift); err != nil {
		return nil, err
	}
	if s.workingOf(c.Name) != nil {
		return nil, refuse(ErrExists, "there is a VDI %q already", c.Name)
	}
	vid, err := s.allocate(c.Name)
	if err != nil {
		return nil, err
	}
	v := &VDI{
		Ref: Ref{vid, s.next()}, State: Live, Family: s.next(), Name: c.Name, SnapshotID: s.nextSnapshotID(c.Name),
		Size: c.Size, SizeShift: c.SizeShift, Policy: c.Policy, Created: c.At,
	}
	v.Generation = v.Serial // above all that the vid had before
	s.put(v)
	return v, nil
}

func (s *state) reserve(c *Reserve) (*VDI, error) {
	if err := CheckName(c.Name); err != nil {
		return nil, err
	}
	if err := checkField("node's name", c.By.Name); err != nil {
		return nil, err
	}
	src, err := s.find(c.Source, Live)
	if err != nil {
		return nil, err
	}
	vid, err := s.allocate(c.Name)
	if err != nil {
		return nil, err
	}
	v := &VDI{
		Ref: Ref{vid, s.next()}, State: Reserved, Family: src.Family, Name: c.Name, Source: src.VID, By: &c.By,
		Size: src.Size, SizeShift: src.SizeShift, Policy: src.Policy, Moves: src.Moves, Created: c.At,
	}
	v.Generation = v.Serial
	s.put(v)
	return v, nil
}

// filled returns the reserved VDI, which is to become live, as a copy of src.
func (s *state) filled(r Ref, src *VDI) (*VDI, error) {
	v, err := s.find(r, Reserved)
	switch {
	case err != nil:
		return nil, refuse(ErrStale, "the map made in VDI %s was given up: try again", r.VID)
	case v.Source != src.VID:
		return nil, refuse(ErrInvalid, "VDI %s is reserved for a copy of %s, not of %s", r.VID, v.Source, src.VID)
	}
	v.State, v.Source, v.By = Live, 0, nil
	v.Parent, v.Size, v.Attributes = src.VID, src.Size, src.Attributes
	return v, nil
}

func (s *state) takeSnapshot(c *Snapshot) (*VDI, error) {
	src, err := s.working(c.Source)
	if err != nil {
		return nil, err
	}
	switch {
	case src.Owner == nil || *src.Owner != c.By:
		return nil, refuse(ErrStale, "node %q does not own %q any more", c.By.Name, src.Name)
	case c.Generation != 0 && c.Generation != src.Generation:
		return nil, elsewhere(src)
	case src.Trim != 0:
		return nil, refuse(ErrBusy, "%q is being trimmed to a smaller size", src.Name)
	}
	if err := s.checkNewTag(src, c.Tag); err != nil {
		return nil, err
	}
	if err := checkField("identity", c.Identity); err != nil {
		return nil, err
	}
	v, err := s.filled(c.Reserved, src)
	if err != nil {
		return nil, err
	}
	v.Name, v.SnapshotID, v.Created, v.Lock = src.Name, src.SnapshotID+1, src.Created, src.Lock
	v.Owner, v.Generation, v.Hold, v.Replaced = src.Owner, s.next(), src.Hold, src.Replaced
	src.Snapshot, src.Tag, src.Identity, src.Snapped = true, c.Tag, c.Identity, c.At
	// Who does not know yet that this is a snapshot now is refused by the objects.
	src.Owner, src.Lock, src.Generation, src.Previous, src.HeldUntil = nil, nil, v.Generation, nil, time.Time{}
	src.NextTag, src.Hold = "", nil
	s.put(src)
	s.put(v)
	return v, nil
}

func (s *state) checkNewTag(src *VDI, tag string) error {
	if err := CheckTag(tag, src.SnapshotID); err != nil {
		return err
	}
	for _, w := range s.names[src.Name].snapshots {
		if tag != "" && w.Tag == tag {
			return refuse(ErrExists, "%q has a snapshot %q already", src.Name, tag)
		}
	}
	return nil
}

func (s *state) clone(c *Clone) (*VDI, error) {
	if err := CheckName(c.Name); err != nil {
		return nil, err
	}
	src, err := s.snapshot(c.Source)
	if err != nil {
		return nil, err
	}
	if s.workingOf(c.Name) != nil {
		return nil, refuse(ErrExists, "there is a VDI %q already", c.Name)
	}
	v, err := s.filled(c.Reserved, src)
	if err != nil {
		return nil, err
	}
	v.Name, v.Created, v.SnapshotID = c.Name, c.At, s.nextSnapshotID(c.Name)
	s.put(v)
	return v, nil
}

func (s *state) rollback(c *Rollback) (*VDI, error) {
	src, err := s.snapshot(c.Source)
	if err != nil {
		return nil, err
	}
	old := s.workingOf(src.Name)
	if old == nil && c.Working != (Ref{}) || old != nil && old.Ref != c.Working {
		return nil, refuse(ErrStale, "%q was changed meanwhile: try again", src.Name)
	}
	v, err := s.filled(c.Reserved, src)
	if err != nil {
		return nil, err
	}
	v.Name, v.Created, v.SnapshotID = src.Name, src.Created, s.nextSnapshotID(src.Name)
	if old != nil {
		if old.Lock != nil {
			return nil, lockedError(old)
		}
		if c.Generation != 0 && c.Generation != old.Generation { // who owned it a moment ago may try again
			return nil, elsewhere(old)
		}
		if old.Owner != nil && *old.Owner != c.By {
			return nil, refuse(ErrBusy, "%q is in use on node %q", old.Name, old.Owner.Name)
		}
		v.SnapshotID, v.Attributes, v.Created, v.Hold, v.Replaced = old.SnapshotID, old.Attributes, old.Created, old.Hold, old.Replaced+1
		s.drop(old)
	}
	v.Owner, v.Generation = &c.By, s.next()
	s.put(v)
	return v, nil
}

func elsewhere(v *VDI) error {
	return refuse(ErrStale, "%q went to another owner meanwhile", v.Name)
}

// drop makes a VDI a deleted one. Nobody writes it any more: its generation is a new one.
func (s *state) drop(v *VDI) {
	s.put(&VDI{
		Ref: v.Ref, State: Deleted, Family: v.Family, Name: v.Name, Snapshot: v.Snapshot, Tag: v.Tag, SnapshotID: v.SnapshotID,
		Size: v.Size, SizeShift: v.SizeShift, Policy: v.Policy, Moves: v.Moves, Parent: v.Parent, Created: v.Created, Trim: v.Trim,
		VMStateSize: v.VMStateSize, Generation: s.next(), Move: v.Move,
	})
}

func (s *state) cancel(c *Cancel) error {
	v, err := s.find(c.Ref, Reserved)
	if err != nil {
		return err
	}
	s.drop(v)
	return nil
}

func lockedError(v *VDI) error {
	return refuse(ErrLocked, "%q is locked by %q on node %q: see \"dog vdi lock list\"", v.Name, v.Lock.Holder, v.Lock.Node)
}

func (s *state) delete(c *Delete) error {
	v := s.vdis[c.Ref.VID]
	if v != nil && v.Serial == c.Ref.Serial && v.State == Deleted {
		return nil
	}
	var err error
	if c.Working {
		v, err = s.working(c.Ref)
	} else {
		v, err = s.find(c.Ref, Live)
	}
	if err != nil {
		return err
	}
	if v.Lock != nil {
		return lockedError(v)
	}
	s.drop(v)
	return nil
}

func (s *state) resize(c *Resize) (*VDI, error) {
	v, err := s.working(c.Ref)
	if err != nil {
		return nil, err
	}
	if err := checkSize(c.Size, v.SizeShift); err != nil {
		return nil, err
	}
	switch {
	case c.Generation != 0 && c.Generation != v.Generation:
		return nil, elsewhere(v)
	case c.Size < v.Size && v.Lock != nil:
		return nil, lockedError(v)
	case c.Size > v.Size && v.Trim != 0:
		return nil, refuse(ErrBusy, "%q is still being trimmed to a smaller size: try again", v.Name)
	case c.Size < v.Size:
		v.Trim = max(v.Trim, v.Size)
	}
	v.Size = c.Size
	s.put(v)
	return v, nil
}

func (s *state) trimmed(c *Trimmed) (*VDI, error) {
	v, err := s.working(c.Ref)
	if err != nil {
		return nil, err
	}
	if v.Size != c.Size {
		return nil, refuse(ErrStale, "%q has another size than the one it was trimmed to", v.Name)
	}
	if c.Generation != 0 && c.Generation != v.Generation {
		return nil, elsewhere(v)
	}
	v.Trim = 0
	s.put(v)
	return v, nil
}

func (s *state) setAttr(c *SetAttr) (*VDI, error) {
	v, err := s.find(c.Ref, Live)
	if err != nil {
		return nil, err
	}
	if c.Value == nil {
		if _, ok := v.Attributes[c.Key]; !ok {
			return nil, refuse(ErrNotFound, "%q has no attribute %q", v.Name, c.Key)
		}
	} else if err := checkText("attribute's key", c.Key); err != nil {
		return nil, err
	}
	v.Attributes = withAttribute(v.Attributes, c.Key, c.Value)
	if c.Value != nil && attributesSize(v.Attributes) > MaxAttributes {
		return nil, refuse(ErrInvalid, "the attributes of %q would take more than %d bytes", v.Name, MaxAttributes)
	}
	s.put(v)
	return v, nil
}

func (s *state) describe(c *Describe) (*VDI, error) {
	v, err := s.working(c.Ref)
	if err != nil {
		return nil, err
	}
	if err := s.checkNewTag(v, c.Tag); err != nil {
		return nil, err
	}
	if c.VMStateSize < 0 || c.VMStateSize > MaxVMState {
		return nil, refuse(ErrInvalid, "a machine's state of %d bytes: must be from 0 to 16 TiB", c.VMStateSize)
	}
	v.NextTag, v.VMStateSize, v.VMClock = c.Tag, c.VMStateSize, c.VMClock
	s.put(v)
	return v, nil
}

func (s *state) acquire(c *Acquire) (*VDI, error) {
	v, err := s.working(c.Ref)
	if err != nil {
		return nil, err
	}
	if err := checkField("node's name", c.By.Name); err != nil {
		return nil, err
	}
	if v.Owner != nil && *v.Owner == c.By {
		v.hold(c)
		s.put(v)
		return v, nil
	}
	switch {
	case v.Generation != c.Since:
		return nil, elsewhere(v)
	case v.Lock != nil && v.Lock.Node != c.By.Name:
		return nil, lockedError(v)
	case v.HeldAt(c.At):
		return nil, refuse(ErrBusy, "%q is needed by node %q a little longer", v.Name, v.Owner.Name)
	}
	v.leave()
	v.Previous = slices.DeleteFunc(slices.Clone(v.Previous), func(n Node) bool { return n.Name == c.By.Name })
	v.Owner, v.Generation = &c.By, s.next()
	v.hold(c)
	s.put(v)
	return v, nil
}

func (v *VDI) hold(c *Acquire) {
	v.HeldUntil = time.Time{}
	if c.Hold > 0 {
		v.HeldUntil = c.At.Add(min(c.Hold, MaxHold))
	}
}

// leave makes the owner a previous one. A list that was given out stays as it was.
func (v *VDI) leave() {
	if v.Owner == nil {
		return
	}
	var list []Node
	for _, n := range v.Previous {
		if n.Name != v.Owner.Name { // a node that has started anew knows nothing of before
			list = append(list, n)
		}
	}
	v.Previous, v.Owner, v.HeldUntil = append(list, *v.Owner), nil, time.Time{}
}

func (s *state) settled(c *Settled) (*VDI, error) {
	v, err := s.working(c.Ref)
	if err != nil {
		return nil, err
	}
	if v.Generation != c.Generation {
		return nil, elsewhere(v)
	}
	v.Previous = nil
	s.put(v)
	return v, nil
}

func (s *state) release(c *Release) (*VDI, error) {
	v, err := s.working(c.Ref)
	if err != nil {
		return nil, err
	}
	if v.Generation != c.Generation {
		return nil, elsewhere(v)
	}
	v.leave()
	s.put(v)
	return v, nil
}

func (s *state) lock(c *SetLock) (*VDI, error) {
	v, err := s.working(c.Ref)
	if err != nil {
		return nil, err
	}
	if c.Holder == "" {
		return nil, refuse(ErrInvalid, "a lock needs a holder")
	}
	if err := checkField("holder", c.Holder); err != nil {
		return nil, err
	}
	if err := checkField("node's name", c.Node); err != nil {
		return nil, err
	}
	if l := v.Lock; l != nil {
		if l.Holder == c.Holder && l.Node == c.Node {
			return v, nil
		}
		return nil, lockedError(v)
	}
	v.Lock = &Lock{c.Holder, c.Node, c.At}
	s.put(v)
	return v, nil
}

func (s *state) unlock(c *Unlock) (*VDI, error) {
	v, err := s.working(c.Ref)
	if err != nil {
		return nil, err
	}
	switch {
	case v.Lock == nil:
		return nil, refuse(ErrNotFound, "%q is not locked", v.Name)
	case c.Holder != "" && c.Holder != v.Lock.Holder:
		return nil, lockedError(v)
	}
	v.Lock = nil
	s.put(v)
	return v, nil
}

func (s *state) setHold(c *SetHold) (*VDI, error) {
	v, err := s.find(c.Ref, Live)
	if err != nil {
		return nil, err
	}
	if _, revision := v.Reserved(); revision != c.Revision {
		return nil, refuse(ErrStale, "the reservations of %q were changed meanwhile", v.Name)
	}
	if len(c.Text) > MaxHoldText {
		return nil, refuse(ErrInvalid, "the reservations of %q would take more than %d bytes", v.Name, MaxHoldText)
	}
	v.Hold = &Hold{Revision: s.next(), Text: c.Text}
	s.put(v)
	return v, nil
}

func (s *state) mapGone(c *MapGone) error {
	if err := s.collectable(c.Refs); err != nil {
		return err
	}
	for _, r := range c.Refs {
		if v, err := s.find(r, Deleted); err == nil {
			v.MapGone = true
			s.put(v)
		}
	}
	return nil
}

// collected passes over what it does not know: the command may come twice.
func (s *state) collected(c *Collected) error {
	if err := s.collectable(c.Refs); err != nil {
		return err
	}
	for _, r := range c.Refs {
		if v, err := s.find(r, Deleted); err == nil && v.Move && v.Generation != c.Generation {
			return removedElsewhere(v)
		}
	}
	for _, r := range c.Refs {
		if _, err := s.find(r, Deleted); err == nil {
			s.free(r.VID, c.Keep)
		}
	}
	return nil
}

func (s *state) adopt(c *Adopt) error {
	if c.VID == 0 || c.VID > object.MaxVID || s.vdis[c.VID] != nil {
		return nil
	}
	s.unsetFreed(c.VID)
	v := &VDI{Ref: Ref{c.VID, s.next()}, State: Deleted, Family: s.next(), Policy: c.Policy, SizeShift: object.DefaultSizeShift}
	v.Generation = v.Serial
	s.put(v)
	return nil
}
