package cluster

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// copyOf copies what a node that is stopped has, as who makes images of machines does.
func (m *member) copyOf() (path string) {
	m.w.t.Helper()
	path = filepath.Join(m.w.base, "copy of "+m.name)
	m.replace(m.dir, path)
	return path
}

// goBack puts a copy in the place of what a node that is stopped has.
func (m *member) goBack(path string) {
	m.w.t.Helper()
	m.replace(path, m.dir)
}

func (m *member) replace(from, to string) {
	m.w.t.Helper()
	if err := os.RemoveAll(to); err != nil {
		m.w.t.Fatal(err)
	}
	if out, err := exec.Command("cp", "-a", from, to).CombinedOutput(); err != nil {
		m.w.t.Fatalf("%v: %s", err, out)
	}
}

// stopAll stops all nodes with the whole cluster: nobody takes over from anybody.
func (w *world) stopAll() {
	w.t.Helper()
	for _, m := range w.nodes {
		m.flock.whole.stops.Store(true)
	}
	done := make(chan bool)
	for _, m := range w.nodes {
		go func() { m.close(); done <- true }()
	}
	for range w.nodes {
		<-done
	}
}

// witness has the leader do what it does once a minute.
func (w *world) witness() {
	w.t.Helper()
	var leader *member
	w.eventually("a node leads", func() bool {
		for _, m := range w.nodes {
			if m.consensus.Load().Leading() {
				leader = m
			}
		}
		return leader != nil
	})
	before := leader.consensus.Load().Applied()
	leader.flock.witness(w.t.Context())
	if after := leader.consensus.Load().Applied(); after == before {
		w.t.Fatal("nothing was noted")
	}
}

// startAll starts nodes that need each other.
func (w *world) startAll(names ...string) {
	w.t.Helper()
	done := make(chan bool)
	for _, name := range names {
		go func() { w.start(name); done <- true }()
	}
	for range names {
		<-done
	}
}

// A node that comes back with what it had some time ago, as when the image of its machine is taken from a backup, is in sync
// with nothing: not even when all nodes have stopped, and it was in sync with everything. What others have replaces what it has.
func TestOlderCopyOfNode(t *testing.T) {
	w := newWorld(t, "n1", "n2", "n3")
	w.form("n1", "n2", "n3")
	putAll(t, w.nodes["n1"].Node, 40, 1)
	n3 := w.nodes["n3"]
	n3.close()
	older := n3.copyOf()
	w.start("n3")
	w.whole(3)
	putAll(t, w.nodes["n1"].Node, 40, 101)
	w.witness()
	w.stopAll()
	n3.goBack(older)
	w.startAll("n1", "n2", "n3")
	for i := range 40 {
		for _, m := range w.nodes {
			got, err := get(m.Node, object.DataID(1, uint32(i)), 8192, 4096)
			if err != nil || !bytes.Equal(got, pattern(101+byte(i))) {
				t.Errorf("object %d, from %s: %v, %x", i, m.name, err, got[:min(len(got), 1)])
			}
		}
	}
	w.whole(3)
	w.clean()
}

// What a node alone once had is not taken for what an older copy of it says: the node waits, with all that it has, until somebody
// has given up what is missing in the copy. Then it goes on with that.
func TestOlderCopyOfLastMember(t *testing.T) {
	w := newWorld(t, "n1", "n2")
	w.formOf(1, "n1", "n2")
	n1, n2 := w.nodes["n1"], w.nodes["n2"]
	theirs := func(i int) bool {
		v := n1.View()
		return v.Node(v.Policies[0].Partitions[object.PartitionOf(object.DataID(1, uint32(i)), 16)].Primary()).Name == "n2"
	}
	w.eventually("n2 has its share", func() bool {
		for _, p := range n1.View().Policies[0].Partitions {
			if !slices.Equal(p.ISR, p.Targets) {
				return false
			}
		}
		return true
	})
	putAll(t, n1.Node, 20, 1)
	n2.close()
	older := n2.copyOf()
	w.start("n2")
	putAll(t, n1.Node, 20, 101)
	n2.close()
	n2.goBack(older)
	started := make(chan bool)
	go func() { w.start("n2"); close(started) }()
	w.eventually("n2 is found to be older", func() bool { return n1.View().NodeByName("n2").Older })
	lacks := n1.Absent()["n2"]
	if m := n1.View().NodeByName("n2"); lacks == 0 || m.State == state.NodeUp {
		t.Fatalf("n2 has an older copy, is %s, and %d partitions wait for the newest", m.State, lacks)
	}
	select {
	case <-started:
		t.Fatal("n2 takes part")
	case <-time.After(500 * time.Millisecond):
	}
	if lost, err := n1.GiveUp(t.Context(), "n2"); err != nil || lost != lacks {
		t.Fatalf("%d of %d partitions were given up: %v", lost, lacks, err)
	}
	<-started
	if absent := n1.Absent(); len(absent) > 0 {
		t.Errorf("what was missing is given up, and %v is absent", absent)
	}
	for i := range 20 {
		want := byte(101 + i)
		if theirs(i) {
			want = byte(1 + i)
		}
		if got, err := get(n1.Node, object.DataID(1, uint32(i)), 8192, 4096); err != nil || !bytes.Equal(got, pattern(want)) {
			t.Errorf("object %d: %v, %x instead of %x", i, err, got[:min(len(got), 1)], want)
		}
	}
	putAll(t, n1.Node, 20, 201) // and it is a node like any other
	n2.close()
	w.start("n2")
	getAll(t, n1.Node, 20, 201)
}
