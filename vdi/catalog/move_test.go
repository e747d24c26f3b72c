package catalog

import (
	"bytes"
	"errors"
	"testing"
	"time"

	"sheepdog/storage/object"
)

// A family moves as a whole, by one command, if it is what the copy was made of; what is left in the former policy
// goes under the copy's vid.
func TestMove(t *testing.T) {
	m := New()
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	n1, n2 := Node{Name: "n1", Incarnation: 1}, Node{Name: "n2", Incarnation: 1}
	try := func(c Command) (VDI, error) {
		res, err := DecodeResult(m.Apply(c.Encode()))
		if err != nil || res.VDI == nil {
			return VDI{}, err
		}
		return *res.VDI, nil
	}
	do := func(c Command) VDI {
		t.Helper()
		v, err := try(c)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	refused := func(what string, kind error, c Command) {
		t.Helper()
		before, _ := m.Snapshot()
		if _, err := try(c); !errors.Is(err, kind) {
			t.Errorf("%s: %v, want a %v", what, err, kind)
		}
		if after, _ := m.Snapshot(); !bytes.Equal(before, after) {
			t.Errorf("%s: it was refused, and has changed something", what)
		}
	}
	get := func(r Ref) VDI { v, _ := m.Get(r.VID); return v }
	members := func(family uint64) (list []Member) {
		for _, v := range m.Family(family) {
			if !v.Move {
				list = append(list, Member{v.Ref, v.Generation})
			}
		}
		return list
	}

	v := do(Command{Create: &Create{Name: "vm", Size: 1 << 30, SizeShift: 22, Policy: 1, At: at}})
	other := do(Command{Create: &Create{Name: "other", Size: 1 << 30, SizeShift: 22, Policy: 1, At: at}})
	do(Command{Acquire: &Acquire{Ref: v.Ref, By: n1, Since: v.Generation}})
	snapshot := func(tag string) {
		t.Helper()
		v, _ = m.Find("vm", "")
		r := do(Command{Reserve: &Reserve{Name: "vm", Source: v.Ref, By: n1, At: at}})
		v = do(Command{Snapshot: &Snapshot{Source: v.Ref, Reserved: r.Ref, Tag: tag, Identity: "i", By: n1, At: at}})
	}
	snapshot("one")
	snapshot("gone")
	gone, _ := m.Find("vm", "gone")
	do(Command{Delete: &Delete{Ref: gone.Ref, At: at}})
	gone = get(gone.Ref)

	refused("to where it is", ErrInvalid, Command{Move: &Move{Name: "vm", Source: v.Ref, Policy: 1, By: n1, At: at}})
	x := do(Command{Move: &Move{Name: "vm", Source: v.Ref, Policy: 2, By: n1, At: at}})
	if x.Family != v.Family || x.State != Reserved || x.Policy != 2 || x.Generation <= v.Generation {
		t.Errorf("the copy is %+v", x)
	}
	refused("another copy", ErrBusy, Command{Move: &Move{Name: "vm", Source: v.Ref, Policy: 3, By: n2, At: at}})
	refused("freeing a vid meanwhile", ErrBusy, Command{Collected: &Collected{Refs: []Ref{gone.Ref}}})
	refused("its map is gone meanwhile", ErrBusy, Command{MapGone: &MapGone{Refs: []Ref{gone.Ref}}})
	before := members(v.Family)
	moved := func(by Node, list []Member) Command {
		return Command{Moved: &Moved{Ref: x.Ref, By: by, From: 1, Members: list}}
	}
	refused("by who does not own it", ErrStale, moved(n2, before))
	wrong := moved(n1, before)
	wrong.Moved.From = 3
	refused("from where it is not", ErrStale, wrong)
	refused("without one of them", ErrStale, moved(n1, before[1:]))
	reserved := do(Command{Reserve: &Reserve{Name: "clone", Source: v.Ref, By: n2, At: at}})
	refused("of which a clone is made", ErrStale, moved(n1, before))
	refused("of which a clone is made", ErrBusy, moved(n1, members(v.Family)))
	do(Command{Cancel: &Cancel{Ref: reserved.Ref}})
	do(Command{Acquire: &Acquire{Ref: v.Ref, By: n2, Since: v.Generation}})
	refused("that another node has taken", ErrStale, moved(n1, before))
	v = do(Command{Acquire: &Acquire{Ref: v.Ref, By: n1, Since: get(v.Ref).Generation}})
	refused("as it was before", ErrStale, moved(n1, before))

	now := members(v.Family)
	do(moved(n1, now))
	for _, old := range now {
		w := get(old.Ref)
		if w.Policy != 2 || w.Generation <= old.Generation || w.Moves != 1 || (w.Serial == old.Serial) != (w.State == Live) {
			t.Errorf("moved: %+v", w)
		}
	}
	if w := get(other.Ref); w.Policy != 1 || w.Moves != 0 {
		t.Errorf("of another family: %+v", w)
	}
	if w := get(v.Ref); w.Owner == nil || *w.Owner != n1 {
		t.Errorf("its owner is %v", w.Owner)
	}
	left := get(x.Ref)
	if left.State != Deleted || left.Policy != 1 || !left.Move || left.Ref != x.Ref || left.Generation <= x.Generation {
		t.Errorf("what is left is %+v", left)
	}
	if p := m.Policies(); len(p) != 2 {
		t.Errorf("policies %v", p)
	}
	refused("twice", ErrStale, moved(n1, members(v.Family)))
	do(Command{Collected: &Collected{Refs: []Ref{gone.Ref}}}) // decided before: it is another one by now
	if w := get(gone.Ref); w.State != Deleted {
		t.Errorf("freed by what was found in the former policy: %+v", w)
	}

	// Back, before what is left is removed: it is the copy then.
	back := do(Command{Move: &Move{Name: "vm", Source: v.Ref, Policy: 1, By: n2, At: at}})
	if back.VID != left.VID || back.Serial == left.Serial || back.Generation <= left.Generation || back.State != Reserved {
		t.Errorf("the copy back is %+v", back)
	}
	b, err := m.Snapshot()
	again := New()
	if err := errors.Join(err, again.Restore(b)); err != nil {
		t.Fatal(err)
	}
	if w, _ := again.Get(back.VID); !w.Move || w.Policy != 1 {
		t.Errorf("restored: %+v", w)
	}
	do(Command{Cancel: &Cancel{Ref: back.Ref}})
	if w := get(back.Ref); w.State != Deleted || !w.Move || w.Policy != object.PolicyID(1) {
		t.Errorf("given up: %+v", w)
	}
	back = get(back.Ref)
	refused("of who has not taken its removal upon itself", ErrStale, Command{Collected: &Collected{Refs: []Ref{back.Ref}}})
	removed := do(Command{Removal: &Removal{Ref: back.Ref, Generation: back.Generation}})
	if removed.Generation <= back.Generation || removed.State != Deleted || removed.Ref != back.Ref {
		t.Errorf("being removed: %+v", removed)
	}
	refused("what another one removes by now", ErrStale, Command{Removal: &Removal{Ref: back.Ref, Generation: back.Generation}})
	refused("what is no copy", ErrNotFound, Command{Removal: &Removal{Ref: gone.Ref, Generation: gone.Generation}})
	next := do(Command{Removal: &Removal{Ref: back.Ref, Generation: removed.Generation}})
	refused("of who was overtaken", ErrStale, Command{Collected: &Collected{Refs: []Ref{back.Ref}, Generation: removed.Generation}})
	do(Command{Collected: &Collected{Refs: []Ref{back.Ref}, Generation: next.Generation}})
	if _, there := m.Get(back.VID); there {
		t.Error("what was left is removed, its vid is not")
	}
	do(Command{Collected: &Collected{Refs: []Ref{get(gone.Ref).Ref}}})
	if _, there := m.Get(gone.VID); there {
		t.Error("a deleted snapshot is not freed")
	}
}
