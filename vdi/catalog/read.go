package catalog

import (
	"cmp"
	"slices"

	"sheepdog/storage/object"
)

// Get returns what a vid is used for.
func (m *Machine) Get(vid object.VID) (VDI, bool) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if v := m.state.vdis[vid]; v != nil {
		return *v, true
	}
	return VDI{}, false
}

// Generation is what requests under an older generation are refused by, for a vid: its own, or of one that nobody uses that which
// is above all that it had, and below those that it will have.
func (m *Machine) Generation(vid object.VID) uint64 {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if v := m.state.vdis[vid]; v != nil {
		return v.Generation
	}
	return m.state.counter
}

// Find returns the VDI of that name (tag "") or its snapshot of that tag or number.
// It fails with ErrNotFound.
func (m *Machine) Find(name, tag string) (VDI, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	n := m.state.names[name]
	switch {
	case n == nil:
		return VDI{}, refuse(ErrNotFound, "there is no VDI %q", name)
	case tag == "" && n.working == nil:
		return VDI{}, refuse(ErrNotFound, "the VDI %q is deleted, only snapshots of it are left", name)
	case tag == "":
		return *n.working, nil
	}
	id := snapshotID(tag)
	for _, v := range n.snapshots {
		if v.Tag == tag || id != 0 && v.SnapshotID == id {
			return *v, nil
		}
	}
	return VDI{}, refuse(ErrNotFound, "%q has no snapshot %q", name, tag)
}

// Snapshots returns the snapshots of that name by their number.
func (m *Machine) Snapshots(name string) []VDI {
	m.mu.RLock()
	defer m.mu.RUnlock()
	n := m.state.names[name]
	if n == nil {
		return nil
	}
	list := make([]VDI, len(n.snapshots))
	for i, v := range n.snapshots {
		list[i] = *v
	}
	return list
}

// List returns all VDIs and snapshots: by name, the VDI before its snapshots, those by
// number.
func (m *Machine) List() []VDI {
	list := m.filter(func(v *VDI) bool { return v.State == Live })
	slices.SortFunc(list, func(a, b VDI) int {
		if a.Name != b.Name {
			return cmp.Compare(a.Name, b.Name)
		}
		if a.Snapshot != b.Snapshot {
			if b.Snapshot {
				return -1
			}
			return 1
		}
		return cmp.Compare(a.SnapshotID, b.SnapshotID)
	})
	return list
}

// Family returns all of a family, the deleted and reserved too, by vid.
func (m *Machine) Family(family uint64) []VDI {
	return m.sorted(func(v *VDI) bool { return v.Family == family })
}

// InState returns all vids of a state, by vid.
func (m *Machine) InState(s State) []VDI {
	return m.sorted(func(v *VDI) bool { return v.State == s })
}

// Policies returns the policies that have VDIs, deleted ones included, ascending.
func (m *Machine) Policies() []object.PolicyID {
	var list []object.PolicyID
	for _, v := range m.filter(func(*VDI) bool { return true }) {
		if i, found := slices.BinarySearch(list, v.Policy); !found {
			list = slices.Insert(list, i, v.Policy)
		}
	}
	return list
}

// InUse reports whether the vid's bit is set in Bitmap.
func (m *Machine) InUse(vid object.VID) bool {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.state.inUse(vid)
}

// Freed returns what a vid was that nobody uses any more, as long as it is not used again: it is not while there is a VDI
// that goes on from it, nor in quarantine.
func (m *Machine) Freed(vid object.VID) (Origin, bool) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if f := m.state.freed[vid]; f != nil && f.was != nil {
		return f.was.Origin, true
	}
	return Origin{}, false
}

// Bitmap sets the bit of each vid that is in use in the sense of the native protocol, in
// bitmap, which has a bit for each of 2^24 vids, the lowest first.
func (m *Machine) Bitmap(bitmap []byte) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	for v := range m.state.vdis {
		bitmap[v/8] |= 1 << (v % 8)
	}
	for v := range m.state.freed {
		bitmap[v/8] |= 1 << (v % 8)
	}
}

func (m *Machine) sorted(want func(*VDI) bool) []VDI {
	list := m.filter(want)
	slices.SortFunc(list, func(a, b VDI) int { return cmp.Compare(a.VID, b.VID) })
	return list
}

func (m *Machine) filter(want func(*VDI) bool) []VDI {
	m.mu.RLock()
	defer m.mu.RUnlock()
	var list []VDI
	for _, v := range m.state.vdis {
		if want(v) {
			list = append(list, *v)
		}
	}
	return list
}
