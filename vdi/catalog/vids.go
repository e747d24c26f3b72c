package catalog

import (
	"hash/fnv"

	"sheepdog/storage/object"
)

// hashVID is where the search for a vid of that name begins.
func hashVID(name string) object.VID {
	h := fnv.New64a()
	h.Write([]byte(name))
	return object.VID(h.Sum64()) & object.MaxVID
}

// nextVID is the vid after v; 0 is none.
func nextVID(v object.VID) object.VID {
	if v == object.MaxVID {
		return 1
	}
	return v + 1
}

func previousVID(v object.VID) object.VID {
	if v <= 1 {
		return object.MaxVID
	}
	return v - 1
}

// inUse reports whether the vid's bit is set for the native protocol.
func (s *state) inUse(v object.VID) bool {
	return v == 0 || s.vdis[v] != nil || s.isFreed(v)
}

// allocate finds the vid for a name.
func (s *state) allocate(name string) (object.VID, error) {
	first := hashVID(name)
	if !s.inUse(first) {
		return first, nil
	}
	for v := nextVID(first); v != first; v = nextVID(v) {
		if !s.inUse(v) {
			return v, nil
		}
	}
	return 0, refuse(ErrFull, "all %d VDI ids are in use: delete VDIs or snapshots", object.MaxVID)
}

// free takes the vid out of use as soon as no run of used vids goes on behind it: who
// searches for a name stops at the first unused one.
func (s *state) free(v object.VID) {
	was := s.vdis[v].Origin()
	delete(s.vdis, v)
	s.setFreed(v, &was)
	for s.isFreed(v) && !s.inUse(nextVID(v)) {
		s.unsetFreed(v)
		v = previousVID(v)
	}
}

func (s *state) isFreed(v object.VID) bool {
	_, ok := s.freed[v]
	return ok
}

// setFreed notes that a vid is freed, and what it was; nil: that is not known.
func (s *state) setFreed(v object.VID, was *Origin) {
	if was == nil {
		s.freed[v] = nil
		return
	}
	o := s.origins[*was]
	if o == nil {
		o = &origin{Origin: *was}
		s.origins[*was] = o
	}
	o.vids++
	s.freed[v] = o
}

func (s *state) unsetFreed(v object.VID) {
	o := s.freed[v]
	delete(s.freed, v)
	if o == nil {
		return
	}
	if o.vids--; o.vids == 0 {
		delete(s.origins, o.Origin)
	}
}
