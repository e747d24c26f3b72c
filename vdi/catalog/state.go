package catalog

import (
	"cmp"
	"maps"
	"slices"
	"unicode/utf8"

	"sheepdog/storage/object"
)

// state is all that there is. A VDI in it is replaced, never changed, so that readers
// may keep it.
type state struct {
	maxVID     object.VID // 2^n - 1: fewer than there are in tests
	counter    uint64     // last serial, family and generation given
	vdis       map[object.VID]*VDI
	freed      map[object.VID]*freed // used by nobody, but their bit is still set: see free
	freedBits  map[object.VID]uint64 // a bit for each of them, by vid/64
	quarantine []*freed              // of these, the longest first
	isolated   map[string]int        // how many of them have a name
	origins    map[Origin]*origin    // of freed vids
	names      map[string]*name      // of live VDIs and snapshots
	moves      map[uint64]int        // how many vids stand for objects of a family in another policy: VDI.Move
	records    map[string]Record     // by key
	putting    func(*VDI)            // told of each that is put
}

// origin is what some freed vids were. They share it: a VDI leaves one for each snapshot that was deleted.
type origin struct {
	Origin
	vids int
}

// name is what bears it.
type name struct {
	working   *VDI
	snapshots []*VDI // by SnapshotID
}

func newState() state {
	return state{
		maxVID: object.MaxVID, vdis: map[object.VID]*VDI{}, freed: map[object.VID]*freed{}, freedBits: map[object.VID]uint64{},
		isolated: map[string]int{}, origins: map[Origin]*origin{}, names: map[string]*name{}, moves: map[uint64]int{}, records: map[string]Record{}, putting: func(*VDI) {},
	}
}

func (s *state) next() uint64 {
	s.counter++
	return s.counter
}

// put makes v the state of its vid.
func (s *state) put(v *VDI) {
	old := s.vdis[v.VID]
	s.count(old, -1)
	s.count(v, 1)
	s.vdis[v.VID] = v
	if !s.rename(old, v) {
		s.unname(old)
		s.enname(v)
	}
	s.putting(v)
}

// count notes a vid that is there, or not any more, if it stands for objects in another policy.
func (s *state) count(v *VDI, n int) {
	if v == nil || !v.Move {
		return
	}
	if s.moves[v.Family] += n; s.moves[v.Family] == 0 {
		delete(s.moves, v.Family)
	}
}

// rename puts a snapshot in its own place among those of its name, if it is one: a family may have many, which are all changed at once.
func (s *state) rename(old, v *VDI) bool {
	if old == nil || old.State != Live || v.State != Live || !old.Snapshot || !v.Snapshot || old.Name != v.Name || old.SnapshotID != v.SnapshotID {
		return false
	}
	n := s.names[v.Name]
	n.snapshots[n.index(old)] = v
	return true
}

// index returns where a snapshot is.
func (n *name) index(v *VDI) int {
	i, _ := slices.BinarySearchFunc(n.snapshots, v.SnapshotID, func(w *VDI, id uint32) int { return cmp.Compare(w.SnapshotID, id) })
	for n.snapshots[i] != v {
		i++
	}
	return i
}

func (s *state) enname(v *VDI) {
	if v.State != Live {
		return
	}
	n := s.names[v.Name]
	if n == nil {
		n = new(name)
		s.names[v.Name] = n
	}
	if !v.Snapshot {
		n.working = v
		return
	}
	i := len(n.snapshots)
	for i > 0 && n.snapshots[i-1].SnapshotID > v.SnapshotID {
		i--
	}
	n.snapshots = slices.Insert(n.snapshots, i, v)
}

func (s *state) unname(v *VDI) {
	if v == nil || v.State != Live || s.names[v.Name] == nil {
		return
	}
	n := s.names[v.Name]
	if n.working == v {
		n.working = nil
	}
	if v.Snapshot {
		i := n.index(v)
		n.snapshots = slices.Delete(n.snapshots, i, i+1)
	}
	if n.working == nil && len(n.snapshots) == 0 {
		delete(s.names, v.Name)
	}
}

// find returns a copy of what the reference names, to be changed and put.
func (s *state) find(r Ref, want State) (*VDI, error) {
	v := s.vdis[r.VID]
	if v == nil || v.Serial != r.Serial || v.State != want {
		return nil, refuse(ErrNotFound, "VDI %s is not there any more", r.VID)
	}
	c := *v
	return &c, nil
}

// working is find for a live VDI that is not a snapshot.
func (s *state) working(r Ref) (*VDI, error) {
	v, err := s.find(r, Live)
	if err == nil && v.Snapshot {
		return nil, refuse(ErrStale, "VDI %s has become a snapshot of %q", r.VID, v.Name)
	}
	return v, err
}

func (s *state) snapshot(r Ref) (*VDI, error) {
	v, err := s.find(r, Live)
	if err == nil && !v.Snapshot {
		return nil, refuse(ErrInvalid, "%q is not a snapshot", v.Name)
	}
	return v, err
}

// nextSnapshotID is for a new working VDI of the name.
func (s *state) nextSnapshotID(of string) uint32 {
	n := s.names[of]
	if n == nil || len(n.snapshots) == 0 {
		return 1
	}
	return n.snapshots[len(n.snapshots)-1].SnapshotID + 1
}

func (s *state) workingOf(of string) *VDI {
	if n := s.names[of]; n != nil {
		return n.working
	}
	return nil
}

func attributesSize(a map[string]string) (n int) {
	for k, v := range a {
		n += len(k) + len(v)
	}
	return n
}

func checkField(what, s string) error {
	if len(s) > maxText || !utf8.ValidString(s) {
		return refuse(ErrInvalid, "the %s is longer than %d bytes or not UTF-8", what, maxText)
	}
	return nil
}

func withAttribute(a map[string]string, key string, value *string) map[string]string {
	b := maps.Clone(a)
	if value == nil {
		delete(b, key)
		return b
	}
	if b == nil {
		b = map[string]string{}
	}
	b[key] = *value
	return b
}
