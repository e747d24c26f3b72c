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
	return v == 0 || s.vdis[v] != nil || s.freed[v]
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
	delete(s.vdis, v)
	s.freed[v] = true
	for s.freed[v] && !s.inUse(nextVID(v)) {
		delete(s.freed, v)
		v = previousVID(v)
	}
}
