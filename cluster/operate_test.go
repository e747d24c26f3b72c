package cluster

import (
	"errors"
	"testing"

	"sheepdog/cluster/state"
)

// A node is drained only where its data can go; who insists may have fewer copies, but not none.
func TestMayDrain(t *testing.T) {
	node := func(id state.NodeID, st state.NodeState, weight uint64) *state.Node {
		n := &state.Node{ID: id, Name: string(rune('a' + id)), State: st}
		if weight > 0 {
			n.Disks = []state.Disk{{ID: "d", Weight: weight}}
		}
		return n
	}
	drained := node(3, state.NodeUp, 10)
	drained.Drain = true
	placed := []state.Partition{{ISR: []state.NodeID{1}}}
	for _, c := range []struct {
		name   string
		others []*state.Node
		copies int
		parts  []state.Partition
		hold   bool
		insist bool
		want   error
	}{
		{"others are enough", []*state.Node{node(2, state.NodeUp, 10), node(3, state.NodeUp, 10)}, 2, placed, false, false, nil},
		{"others are too few", []*state.Node{node(2, state.NodeUp, 10)}, 2, placed, false, false, ErrTooFew},
		{"somebody insists", []*state.Node{node(2, state.NodeUp, 10)}, 2, placed, false, true, nil},
		{"a policy that nobody uses", []*state.Node{node(2, state.NodeUp, 10)}, 3, nil, false, false, nil},
		{"nobody else", nil, 1, placed, false, true, state.ErrNeeded},
		{"the other one is down", []*state.Node{node(2, state.NodeDown, 10)}, 1, placed, false, true, state.ErrNeeded},
		{"the other one is a gateway", []*state.Node{node(2, state.NodeUp, 0)}, 1, placed, false, true, state.ErrNeeded},
		{"the other one is drained", []*state.Node{drained}, 1, placed, false, true, state.ErrNeeded},
		{"nothing is moved now", []*state.Node{node(2, state.NodeUp, 10)}, 1, placed, true, true, ErrOnHold},
	} {
		self := node(1, state.NodeUp, 10)
		v := &state.View{Nodes: append([]*state.Node{self}, c.others...), Policies: []*state.Policy{{ID: 1, Copies: c.copies, Partitions: c.parts}}}
		v.Cluster.Hold = c.hold
		if err := mayDrain(v, self, c.insist); !errors.Is(err, c.want) || (err == nil) != (c.want == nil) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
	}
}

// What is moved is counted for those that miss it and those that still have it.
func TestMoving(t *testing.T) {
	m := Moving{Missing: map[state.NodeID]int{}, Leaving: map[state.NodeID]int{}}
	for _, p := range []state.Partition{
		{ISR: []state.NodeID{1, 2}, Targets: []state.NodeID{2, 1}},
		{ISR: []state.NodeID{1, 2}, Targets: []state.NodeID{1, 3}},
		{ISR: []state.NodeID{1}, Targets: []state.NodeID{1, 3}},
	} {
		m.add(&p)
	}
	if m.Partitions != 2 || m.Missing[3] != 2 || m.Leaving[2] != 1 || len(m.Missing)+len(m.Leaving) != 2 {
		t.Errorf("%+v", m)
	}
}
