package cluster

import (
	"testing"

	"sheepdog/cluster/state"
)

// A node without a disk that it had starts only if nothing counts on that disk.
func TestLostDisk(t *testing.T) {
	had := []state.Disk{{ID: "a", Path: "/a"}, {ID: "b", Path: "/b"}}
	view := func(isr, waiting []state.NodeID) *state.View {
		return &state.View{
			Nodes:    []*state.Node{{ID: 1, Name: "n1", Disks: had}, {ID: 2, Name: "n2"}},
			Policies: []*state.Policy{{ID: 1, Partitions: []state.Partition{{ISR: []state.NodeID{2}}, {ISR: isr, Waiting: waiting}}}},
		}
	}
	one, two := []state.NodeID{1}, []state.NodeID{2}
	for name, c := range map[string]struct {
		view   *state.View
		disks  []state.Disk
		refuse bool
	}{
		"new node":            {&state.View{}, had[:1], false},
		"all there":           {view(one, nil), had, false},
		"one more":            {view(one, nil), append([]state.Disk{{ID: "c"}}, had...), false},
		"member, one missing": {view(one, nil), had[1:], true},
		"waits, one missing":  {view(two, one), had[1:], true},
		"no member any more":  {view(two, nil), had[1:], false},
	} {
		if err := lostDisk(c.view, "n1", c.disks); (err != nil) != c.refuse {
			t.Errorf("%s: %v", name, err)
		}
	}
}
