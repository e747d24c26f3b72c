package cluster

import (
	"slices"
	"testing"
	"time"

	"sheepdog/cluster/state"
)

// A node that is down for longer than it may be is replaced without anybody asking for it, and not before; what it held is
// on the others then, and it gets data again when it comes back.
func TestOutAfter(t *testing.T) {
	w := newWorld(t, "n1", "n2", "n3")
	w.formOf(2, "n1", "n2", "n3")
	n1 := w.nodes["n1"]
	putAll(t, n1.Node, 40, 1)
	id := n1.View().NodeByName("n3").ID
	targets := func() (count int) {
		for _, p := range n1.View().Policies {
			for _, q := range p.Partitions {
				if slices.Contains(q.Targets, id) {
					count++
				}
			}
		}
		return count
	}
	if targets() == 0 {
		t.Fatal("n3 holds nothing")
	}
	const outAfter = 3 * time.Second
	wait := func(after time.Duration) { // not for longer than needed: a node that gets no processor for so long is replaced too
		if err := n1.SetOutAfter(t.Context(), after); err != nil {
			t.Fatal(err)
		}
	}
	wait(outAfter)
	w.nodes["n3"].close()
	w.eventually("n3 is down", func() bool { return n1.View().Node(id).State == state.NodeDown })
	putAll(t, n1.Node, 40, 2)
	w.eventually("n3 is replaced", func() bool {
		replaced, n := targets() == 0, n1.View().Node(id)
		if took := time.Since(n.Since); (replaced || n.Out) && took < outAfter-100*time.Millisecond {
			t.Fatalf("replaced when it has been down for %v, although it may be for %v", took, outAfter)
		}
		return replaced && n.Out
	})
	wait(state.DefaultOutAfter)
	w.whole(2)
	getAll(t, w.nodes["n2"].Node, 40, 2)
	if report, err := n1.CheckReplicas(t.Context(), false, nil); err != nil || !report.Clean() {
		t.Errorf("replicas are not the same: %+v: %v", report, err)
	}

	w.start("n3")
	w.eventually("n3 holds data again", func() bool { return !n1.View().Node(id).Out && targets() > 0 && Held(n1.View(), id) > 0 })
	w.whole(2)
	getAll(t, w.nodes["n3"].Node, 40, 2)
}
