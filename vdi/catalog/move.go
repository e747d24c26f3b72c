package catalog

import (
	"cmp"
	"slices"
)

// move makes a vid for the copy. What is left in that policy of an earlier one becomes a part of it, under a new
// generation: who still makes or removes the earlier one is refused.
func (s *state) move(c *Move) (*VDI, error) {
	if err := CheckName(c.Name); err != nil {
		return nil, err
	}
	if err := checkField("node's name", c.By.Name); err != nil {
		return nil, err
	}
	src := s.vdis[c.Source.VID]
	if src == nil || src.Serial != c.Source.Serial || src.Move {
		return nil, refuse(ErrNotFound, "VDI %s is not there any more", c.Source.VID)
	}
	if c.Policy == src.Policy || c.Policy == 0 {
		return nil, refuse(ErrInvalid, "%q is kept by policy %d already", src.Name, src.Policy)
	}
	var left *VDI
	for _, v := range s.family(src.Family) {
		switch {
		case !v.Move:
		case v.State == Reserved:
			return nil, refuse(ErrBusy, "%q is being moved to policy %d by node %q", src.Name, v.Policy, v.By.Name)
		case v.Policy == c.Policy:
			left = v
		}
	}
	v := &VDI{
		State: Reserved, Move: true, Family: src.Family, Name: c.Name, By: &c.By,
		SizeShift: src.SizeShift, Policy: c.Policy, Created: c.At,
	}
	if left != nil {
		v.VID = left.VID
	} else {
		vid, err := s.allocate(c.Name)
		if err != nil {
			return nil, err
		}
		v.VID = vid
	}
	v.Serial = s.next()
	v.Generation = v.Serial
	s.put(v)
	return v, nil
}

// moved changes the policy of all of a family at once. What was decided about deleted ones before, that they have no
// objects or no map, does not hold in the new one: they are named anew.
func (s *state) moved(c *Moved) (*VDI, error) {
	x, err := s.find(c.Ref, Reserved)
	if err != nil || !x.Move {
		return nil, refuse(ErrStale, "the copy made under VDI %s was given up: try again", c.Ref.VID)
	}
	family := slices.DeleteFunc(s.family(x.Family), func(v *VDI) bool { return v.Move })
	if err := checkMembers(family, c); err != nil {
		return nil, err
	}
	generation := s.next()
	for _, v := range family {
		w := *v
		w.Policy, w.Generation = x.Policy, generation
		w.Moves++
		if w.State == Deleted {
			w.Serial = s.next()
		}
		s.put(&w)
	}
	x.Policy = family[0].Policy
	s.drop(x)
	return s.vdis[x.VID], nil
}

// removal gives what stands for objects in another policy to who removes them.
func (s *state) removal(c *Removal) (*VDI, error) {
	v, err := s.find(c.Ref, Deleted)
	if err != nil || !v.Move {
		return nil, refuse(ErrNotFound, "what VDI %s stood for is removed, or copied anew", c.Ref.VID)
	}
	if v.Generation != c.Generation {
		return nil, removedElsewhere(v)
	}
	v.Generation = s.next()
	s.put(v)
	return v, nil
}

func removedElsewhere(v *VDI) error {
	return refuse(ErrStale, "what %q had in policy %d is removed by another node", v.Name, v.Policy)
}

func checkMembers(family []*VDI, c *Moved) error {
	if len(family) == 0 || len(family) != len(c.Members) {
		return refuse(ErrStale, "VDIs or snapshots were made or deleted meanwhile: try again")
	}
	for i, v := range family {
		switch {
		case Member{v.Ref, v.Generation} != c.Members[i]:
			return refuse(ErrStale, "VDI %s of %q was changed meanwhile: try again", v.VID, v.Name)
		case v.Policy != c.From:
			return refuse(ErrStale, "%q is kept by policy %d, not %d: try again", v.Name, v.Policy, c.From)
		case v.State == Reserved:
			return refuse(ErrBusy, "a snapshot or clone of %q is being made: try again", v.Name)
		case v.State == Live && !v.Snapshot && (v.Owner == nil || *v.Owner != c.By):
			return elsewhere(v)
		}
	}
	return nil
}

// family returns all of a family, by vid.
func (s *state) family(family uint64) []*VDI {
	var list []*VDI
	for _, v := range s.vdis {
		if v.Family == family {
			list = append(list, v)
		}
	}
	slices.SortFunc(list, func(a, b *VDI) int { return cmp.Compare(a.VID, b.VID) })
	return list
}

// collectable refuses to have deleted vids be done with while there may be objects of theirs in another policy than
// the family's: those that stand for these go first.
func (s *state) collectable(refs []Ref) error {
	for _, r := range refs {
		v, err := s.find(r, Deleted)
		if err == nil && !v.Move && s.moves[v.Family] > 0 {
			return refuse(ErrBusy, "objects of VDI %s are in two policies", v.VID)
		}
	}
	return nil
}
