package catalog

import (
	"maps"
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
	quarantine []*freed              // of these, the longest first
	origins    map[Origin]*origin    // of freed vids
	names      map[string]*name      // of live VDIs and snapshots
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
		maxVID: object.MaxVID, vdis: map[object.VID]*VDI{}, freed: map[object.VID]*freed{}, origins: map[Origin]*origin{},
		names: map[string]*name{}, records: map[string]Record{}, putting: func(*VDI) {},
	}
}

func (s *state) next() uint64 {
	s.counter++
	return s.counter
}

// put makes v the state of its vid.
func (s *state) put(v *VDI) {
	if old := s.vdis[v.VID]; old != nil {
		s.unname(old)
	}
	s.vdis[v.VID] = v
	s.enname(v)
	s.putting(v)
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
	list := append([]*VDI(nil), n.snapshots[:i]...)
	n.snapshots = append(append(list, v), n.snapshots[i:]...)
}

func (s *state) unname(v *VDI) {
	n := s.names[v.Name]
	if v.State != Live || n == nil {
		return
	}
	if n.working == v {
		n.working = nil
	}
	for i, w := range n.snapshots {
		if w == v {
			n.snapshots = append(append([]*VDI(nil), n.snapshots[:i]...), n.snapshots[i+1:]...)
			break
		}
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
