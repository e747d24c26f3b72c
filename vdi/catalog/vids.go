package catalog

import (
	"hash/fnv"
	"iter"
	"math/bits"
	"slices"

	"sheepdog/storage/object"
)

// KeepVIDs is how many vids are in quarantine at most, for Collected.Keep. Of one name it is a quarter, for
// clients that look for snapshots of it ask about each.
const KeepVIDs = 4096

// freed is a vid that nobody uses, but whose bit is still set: a VDI is behind it, or it is in quarantine. See free.
type freed struct {
	vid         object.VID
	was         *origin // nil: that is not known
	quarantined bool
}

func (f *freed) name() string {
	if f.was == nil {
		return ""
	}
	return f.was.Name
}

// hashVID is where the search for a vid of that name begins.
func (s *state) hashVID(name string) object.VID {
	h := fnv.New64a()
	h.Write([]byte(name))
	return object.VID(h.Sum64()) & s.maxVID
}

// nextVID is the vid after v; 0 is none.
func (s *state) nextVID(v object.VID) object.VID {
	if v == s.maxVID {
		return 1
	}
	return v + 1
}

func (s *state) previousVID(v object.VID) object.VID {
	if v <= 1 {
		return s.maxVID
	}
	return v - 1
}

// around yields all vids, from v on.
func (s *state) around(v object.VID, step func(object.VID) object.VID) iter.Seq[object.VID] {
	return func(yield func(object.VID) bool) {
		for w := v; yield(w); {
			if w = step(w); w == v {
				return
			}
		}
	}
}

// inUse reports whether the vid's bit is set for the native protocol.
func (s *state) inUse(v object.VID) bool { return s.vdis[v] != nil || s.freed[v] != nil }

// allocate finds the vid for a name.
func (s *state) allocate(name string) (object.VID, error) {
	first := max(s.hashVID(name), 1)
	for v := range s.around(first, s.nextVID) {
		if !s.inUse(v) {
			return v, nil
		}
	}
	if f := s.spare(first); f != nil {
		s.unsetFreed(f.vid)
		return f.vid, nil
	}
	return 0, refuse(ErrFull, "all %d VDI ids are in use: delete VDIs or snapshots", s.maxVID)
}

// spare is what may be used again when all bits are set: what was longest in quarantine, else the next that is freed; nil if there is
// none. What a VDI goes on from is not to be had even then.
func (s *state) spare(first object.VID) *freed {
	free := func(f *freed) bool {
		if f == nil || f.was == nil {
			return f != nil
		}
		w := s.workingOf(f.was.Name)
		return w == nil || w.Origin() != f.was.Origin
	}
	if i := slices.IndexFunc(s.quarantine, free); i >= 0 {
		return s.quarantine[i]
	}
	for v := range s.around(first, s.nextVID) {
		if f := s.freed[v]; free(f) {
			return f
		}
	}
	return nil
}

// free takes the vid out of use. Its bit stays as long as a VDI is behind it in the run of used vids: who searches for a name
// stops at the first unused one. And then it is in quarantine, for clients may have it open that hear of
// nothing: what they write must not go to another VDI.
func (s *state) free(v object.VID, keep int) {
	was := s.vdis[v].Origin()
	s.count(s.vdis[v], -1)
	delete(s.vdis, v)
	s.setFreed(v, &was)
	if s.followed(v) {
		return
	}
	var enter []*freed // those next to v: others would be driven out at once
	names := map[string]int{}
	for _, f := range s.givenUp(v) {
		if names[f.name()]++; len(enter) < keep && names[f.name()] <= keepOfName(keep) {
			enter = append(enter, f)
		} else {
			s.unsetFreed(f.vid)
		}
	}
	for _, f := range slices.Backward(enter) {
		s.isolate(f, keepOfName(keep))
	}
	for len(s.quarantine) > max(keep, 0) {
		s.discharge(0)
	}
}

func keepOfName(keep int) int { return (keep + 3) / 4 }

// followed reports whether a VDI is behind v in its run. It is asked for each vid that is freed, of runs that may have
// thousands: so freed ones are passed over 64 at a time.
func (s *state) followed(v object.VID) bool {
	w, ok := s.firstNotFreed(v+1, s.maxVID)
	if !ok {
		w, ok = s.firstNotFreed(1, v)
	}
	return ok && s.vdis[w] != nil
}

// firstNotFreed returns the first vid of a range, both ends included, that is not freed.
func (s *state) firstNotFreed(from, to object.VID) (object.VID, bool) {
	for from <= to {
		if others := ^s.freedBits[from/64] >> (from % 64); others != 0 {
			from += object.VID(bits.TrailingZeros64(others))
			return from, from <= to
		}
		from += 64 - from%64
	}
	return 0, false
}

// givenUp are v, which no VDI is behind of, and those of its run that waited for that, the next to v first.
func (s *state) givenUp(v object.VID) (list []*freed) {
	for w := range s.around(v, s.previousVID) {
		f := s.freed[w]
		if f == nil {
			break
		}
		if !f.quarantined {
			list = append(list, f)
		}
	}
	return list
}

// isolate puts a freed vid into quarantine, in place of what of the same name is longest in it if there are so many.
func (s *state) isolate(f *freed, keep int) {
	s.enter(f)
	for s.isolated[f.name()] > keep {
		s.discharge(slices.IndexFunc(s.quarantine, func(g *freed) bool { return g.name() == f.name() }))
	}
}

func (s *state) enter(f *freed) {
	f.quarantined = true
	s.quarantine = append(s.quarantine, f)
	s.isolated[f.name()]++
}

func (s *state) leave(i int) {
	f := s.quarantine[i]
	s.quarantine = slices.Delete(s.quarantine, i, i+1)
	f.quarantined = false
	if s.isolated[f.name()]--; s.isolated[f.name()] == 0 {
		delete(s.isolated, f.name())
	}
}

// discharge ends a quarantine. If there is a VDI behind the vid by now, its bit stays as long as that does.
func (s *state) discharge(i int) {
	f := s.quarantine[i]
	s.leave(i)
	if !s.followed(f.vid) {
		s.unsetFreed(f.vid)
	}
}

// setFreed notes that a vid is freed, and what it was; nil: that is not known.
func (s *state) setFreed(v object.VID, was *Origin) {
	f := &freed{vid: v}
	s.freed[v] = f
	s.freedBits[v/64] |= 1 << (v % 64)
	if was == nil {
		return
	}
	o := s.origins[*was]
	if o == nil {
		o = &origin{Origin: *was}
		s.origins[*was] = o
	}
	o.vids++
	f.was = o
}

// unsetFreed forgets that a vid is freed, if it is.
func (s *state) unsetFreed(v object.VID) {
	f := s.freed[v]
	if f == nil {
		return
	}
	delete(s.freed, v)
	if s.freedBits[v/64] &^= 1 << (v % 64); s.freedBits[v/64] == 0 {
		delete(s.freedBits, v/64)
	}
	if f.quarantined {
		s.leave(slices.Index(s.quarantine, f))
	}
	if f.was == nil {
		return
	}
	if f.was.vids--; f.was.vids == 0 {
		delete(s.origins, f.was.Origin)
	}
}
