package replicas

import (
	"testing"

	"sheepdog/cluster/internal/replica"
	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// failing is a store of which one disk is out of service, and how often that was asked.
type failing struct {
	Store
	groups map[object.Group]bool
	asked  int
}

func (f *failing) Failed(g object.Group) bool {
	f.asked++
	return f.groups[g]
}

// A partition of which there is only a mark is looked at when its disk goes; one that is there anyway is asked about by
// itself, and one of a policy that is not known yet later.
func TestStraysLeaveDisks(t *testing.T) {
	group := func(p object.PolicyID, i object.Partition) object.Group { return object.Group{Policy: p, Partition: i} }
	held, stray, later, sound := group(1, 0), group(1, 1), group(2, 0), group(1, 2)
	store := &failing{groups: map[object.Group]bool{}}
	r := &Replicas{parts: map[object.Group]*part{}}
	r.cfg.Store = store
	r.cfg.Marks = map[object.Group]replica.Mark{held: {Epoch: 1}, stray: {Epoch: 1}, later: {Epoch: 1}, sound: {Epoch: 1}}
	policy := func(id object.PolicyID) *state.Policy {
		p := &state.Policy{ID: id, Partitions: make([]state.Partition, 3)}
		for i := range p.Partitions {
			p.Partitions[i].Absent = true // nobody has it
		}
		return p
	}
	r.view = &state.View{Policies: []*state.Policy{policy(1)}}
	r.part(held)
	var s strays
	s.look(r)
	if len(r.parts) != 1 || store.asked != 3 {
		t.Errorf("while all disks work: %d parts, the disks of %d were asked for", len(r.parts), store.asked)
	}
	store.groups[held], store.groups[stray], store.groups[later] = true, true, true
	s.look(r)
	if r.parts[stray] == nil || len(r.parts) != 2 {
		t.Errorf("when a disk has gone there are %d parts", len(r.parts))
	}
	r.view = &state.View{Policies: []*state.Policy{policy(1), policy(2)}}
	s.look(r)
	if r.parts[later] == nil || len(r.parts) != 3 {
		t.Errorf("when its policy is known there are %d parts", len(r.parts))
	}
	store.asked = 0
	if s.look(r); store.asked != 1 {
		t.Errorf("in the end the disks of %d are asked for", store.asked)
	}
}
