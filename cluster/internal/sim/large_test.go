package sim

import (
	"runtime"
	"runtime/debug"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"sheepdog/cluster/state"
)

// cpu is the processor time that this process has used. Inside a bubble no clock tells
// how long anything takes.
func cpu() time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		panic(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// heapInUse is the memory in use, in bytes.
func heapInUse() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// leading is what leading costs.
type leading struct {
	cpu   time.Duration // of decisions and of carrying out commands once
	steps int
	worst time.Duration // of one step with its commands
}

// TestSimulationOfMany: one of many nodes dies. That is agreed, its partitions go on with
// others, after out_after others hold them, and clients notice nothing but a pause. It has
// 300 nodes in make soak, and 60 in make sim.
func TestSimulationOfMany(t *testing.T) {
	s := calm(1)
	s.nodes, s.partitions, s.volumes, s.objects, s.depth, s.shared = 60, 1024, 6, 20, 2, true
	switch {
	case *simSeeds < 500:
		t.Skip("it takes long: make sim does it")
	case *simSeeds >= 10_000:
		s.nodes, s.partitions, s.volumes, s.objects = 300, 4096, 12, 40
	}
	defer debug.SetGCPercent(debug.SetGCPercent(400))
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(s, "")
		w.manyNodes(t)
		w.finish()
		if w.failure != nil {
			t.Error(w.failure)
		}
	})
}

func (w *world) manyNodes(t *testing.T) {
	began := cpu()
	w.bring()
	w.decide(state.Command{SetOutAfter: &state.SetOutAfter{Seconds: 5}})
	if !w.run(w.converged, 30*second) {
		w.fail("the cluster does not begin to work")
		return
	}
	t.Logf("%d nodes, %d partitions of %d copies: served after %v of the cluster's time, %v of the processor's", len(w.nodes), w.partitions, w.copies, w.now().Round(ms), (cpu() - began).Round(ms))
	w.populate()
	w.run(nil, second)
	t.Logf("after a second with clients: %d requests, %v of the processor", w.ops, (cpu() - began).Round(ms))
	w.costs = leading{}
	began, from, ops := cpu(), w.now(), w.ops

	victim := w.nodes[slices.IndexFunc(w.nodes, func(n *node) bool { return n.life.reign == nil })]
	holds := w.holdings(victim.id)
	victim.kill(true)
	w.run(func() bool { return w.oracle.View().Node(victim.id).State == state.NodeDown }, 10*second)
	agreed := w.now() - from
	t.Logf("a node with %d partitions died: agreed after %v, %v of the processor", holds, agreed.Round(ms), (cpu() - began).Round(ms))
	w.run(func() bool { return w.served(victim.id) }, 10*second)
	served := w.now() - from
	t.Logf("served by others after %v, %v of the processor", served.Round(ms), (cpu() - began).Round(ms))
	moved := func() bool {
		for _, p := range w.oracle.View().Policies[0].Partitions {
			if slices.Contains(p.Targets, victim.id) || len(p.ISR) < w.copies {
				return false
			}
		}
		return true
	}
	if !w.run(moved, 60*second) {
		w.fail("the partitions of the node that died were not brought to others: %d still name it", w.holdings(victim.id))
		return
	}
	t.Logf("held by others after %v; %d requests meanwhile, longest %v", (w.now() - from).Round(ms), w.ops-ops, w.longest.Round(ms))
	t.Logf("the leader's part of that: %v of the processor in %d steps, the worst %v; all nodes, stores and clients together %v",
		w.costs.cpu.Round(ms), w.costs.steps, w.costs.worst.Round(ms), (cpu() - began).Round(ms))
	w.leaderMemory(t)
	if w.ops == ops || w.longest > 6*second {
		w.fail("I/O did not go on: %d requests, longest %v", w.ops-ops, w.longest)
	}
	for _, v := range w.volumes {
		v.stop = true
	}
	if !w.run(w.idle, 10*second) {
		w.fail("requests were not answered")
	}
	w.readBack()
	if err := w.history.check(); err != nil {
		w.fail("%v", err)
	}
}

// holdings counts the partitions that a node is to hold.
func (w *world) holdings(id state.NodeID) (n int) {
	for _, p := range w.oracle.View().Policies[0].Partitions {
		if slices.Contains(p.Targets, id) {
			n++
		}
	}
	return n
}

// served reports whether all partitions are served, by others than a node.
func (w *world) served(but state.NodeID) bool {
	serving := 0
	for _, n := range w.nodes {
		if n.running() && n.id != but {
			serving += n.life.reps.Progress().Serving
		}
	}
	return serving >= w.partitions
}

// leaderMemory reports what the state takes that every node has, the leader too.
func (w *world) leaderMemory(t *testing.T) {
	before := heapInUse()
	m := state.New()
	for _, c := range w.log {
		if c[0] == machineState {
			m.Apply([]byte(c[1]))
		}
	}
	size := heapInUse() - before
	snapshot, err := m.Snapshot()
	if err != nil {
		w.fail("%v", err)
	}
	t.Logf("the state that the leader decides on takes %d KiB of memory, %d KiB as a snapshot", size>>10, len(snapshot)>>10)
	runtime.KeepAlive(m)
}
