package sim

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"sheepdog/cluster/state"
	"sheepdog/storage/disk/disktest"
	"sheepdog/storage/object"
)

// story is one simulation: faults for some seconds, then peace, in which everything
// must come together again.
func story(t *testing.T, s setup, m mutation, tracing bool) (w *world) {
	began := time.Now()
	defer func() { w.took = time.Since(began) }()
	synctest.Test(t, func(*testing.T) {
		w = newWorld(s, m)
		w.tracing = tracing
		w.tell()
		w.finish()
	})
	return w
}

func (w *world) tell() {
	w.bring()
	if !w.run(w.converged, 20*second) {
		w.fail("the cluster does not begin to work: %s", w.situation())
		return
	}
	w.logf("the cluster works")
	w.populate()
	w.trouble = true
	w.after(w.between(0, w.pause), w.fault)
	w.run(nil, w.setup.trouble)
	w.peace()
	if w.chance(0.3) {
		w.run(nil, second) // clients go on
	}
	for _, v := range w.volumes {
		v.stop = true
	}
	if !w.run(func() bool { return w.idle() && w.converged() }, 60*second) {
		w.fail("no convergence after a minute of peace: clients idle %v, %s", w.idle(), w.situation())
		return
	}
	w.readBack()
	if err := w.history.check(); err != nil {
		w.fail("%v", err)
	}
	w.compare()
	w.compareMachines()
	if !w.run(func() bool { return !w.strays() }, 15*second) {
		w.fail("nodes keep what others hold: %s", w.situation())
	}
}

// bring makes the cluster, and starts its nodes.
func (w *world) bring() {
	at := w.begin
	w.decide(state.Command{Format: &state.Format{ID: "sim", Created: at, Partitions: w.partitions, ObjectSizeShift: sizeShift, Copies: w.copies}})
	c := &state.AnnounceAll{} // for their numbers
	for i := range w.setup.nodes {
		n := &node{w: w, id: state.NodeID(i + 1), name: fmt.Sprint("n", i+1), gateway: i >= w.setup.nodes-w.gateways, died: -time.Hour, marks: w.marks}
		if w.chance(0.5) {
			n.marks = 50 * ms
		}
		if !n.gateway {
			n.disk = disktest.New(n.name)
			w.shrink(n)
		}
		w.nodes = append(w.nodes, n)
		c.Nodes = append(c.Nodes, state.Announce{Name: n.name, Address: n.name, Zone: n.name})
	}
	w.decide(state.Command{AnnounceAll: c})
	for _, n := range w.nodes {
		n.start()
	}
}

// finish ends all processes, so that the bubble can end.
func (w *world) finish() {
	w.ended, w.trouble = true, false
	for _, n := range w.nodes {
		if n.disk != nil {
			n.disk.Crash() // nobody needs a checkpoint any more
		}
		if n.life != nil {
			n.end()
		}
	}
	w.settle()
	time.Sleep(10 * second) // timers end
	w.settle()
}

func (w *world) peace() {
	w.logf("peace")
	w.trouble = false
	w.mend()
	for _, n := range w.nodes {
		n.apart, n.mute, n.slow, n.deaf = false, false, false, 0
		if n.narrow {
			w.squeeze(n)
		}
		if n.crashing && n.life != nil {
			n.kill(n.power)
		}
		n.wake()
		n.revive()
	}
}

// idle reports whether no client waits for anything.
func (w *world) idle() bool {
	return !slices.ContainsFunc(w.nodes, func(n *node) bool { return n.life != nil && !n.life.over && n.life.underway > 0 })
}

// converged reports whether every partition is held by its targets, and served.
func (w *world) converged() bool {
	v := w.oracle.View()
	if len(v.Policies[0].Partitions) == 0 || w.rotting() {
		return false
	}
	for _, n := range w.nodes {
		if !n.running() || v.Node(n.id).State != state.NodeUp || n.life.applied < len(w.log) {
			return false
		}
	}
	serving := 0
	for _, n := range w.nodes {
		serving += n.life.reps.Progress().Serving
	}
	for _, p := range v.Policies[0].Partitions {
		if !slices.Equal(p.ISR, p.Targets) || p.Undecided() {
			return false
		}
	}
	return serving == len(v.Policies[0].Partitions)
}

func (w *world) situation() string {
	var b strings.Builder
	v := w.oracle.View()
	for i, p := range v.Policies[0].Partitions {
		fmt.Fprintf(&b, "partition %d: %+v; ", i, p)
	}
	for _, n := range v.Nodes {
		o := w.nodes[n.ID-1]
		fmt.Fprintf(&b, "%s %s inc %d", n.Name, n.State, n.Incarnation)
		if o.running() {
			fmt.Fprintf(&b, " runs as %d applied %d %+v", o.life.inc, o.life.applied, o.life.reps.Progress())
		}
		b.WriteString("; ")
	}
	for _, t := range w.taints {
		fmt.Fprintf(&b, "%s: object %s is rotten since %v: %v; ", t.n.name, t.key, t.since, t.n.life.store.Rotten())
	}
	fmt.Fprintf(&b, "log %d, leader %v", len(w.log), w.reign())
	return b.String()
}

// readBack reads everything once more, from the stores of the primaries.
func (w *world) readBack() {
	v := w.oracle.View()
	for _, vol := range w.volumes {
		for i := range w.objects {
			id := object.DataID(vol.ref.VID, i)
			p := w.partitionOf(id)
			n := w.nodes[v.Policies[0].Partitions[p].Primary()-1]
			a := &access{s: &session{v: vol}, n: w.sectors, at: w.now()}
			a.ID, a.Partition = id, object.Partition(p)
			data, err := n.content(object.Key{Group: object.Group{Policy: policy, Partition: a.Partition}, ID: id})
			if err != nil {
				w.fail("%s: read object %s: %v", n.name, id, err)
				return
			}
			a.values = values(data)
			w.logf("in the end, object %s: %s", id, brief(a.values))
			w.history.read(w, a)
		}
	}
}

// content reads what clients use of an object, from the disk itself.
func (n *node) content(k object.Key) ([]byte, error) {
	data := make([]byte, n.w.sectors*sector)
	r := &object.Request{
		Op: object.OpRead, SizeShift: sizeShift, ID: k.ID, Policy: k.Group.Policy, Partition: k.Group.Partition, Len: uint32(len(data)), Data: data,
	}
	done := make(chan struct{})
	r.Done = func(*object.Request) { close(done) }
	n.life.store.Submit(r)
	n.life.store.Kick()
	<-done
	if errors.Is(r.Err, object.ErrNotFound) {
		return make([]byte, len(data)), nil
	}
	return data, r.Err
}

// compare finds replicas that differ.
func (w *world) compare() {
	ctx := context.Background()
	for i, p := range w.oracle.View().Policies[0].Partitions {
		g := object.Group{Policy: policy, Partition: object.Partition(i)}
		var first map[object.ID][]uint64
		for k, id := range p.ISR {
			n := w.nodes[id-1]
			sums := map[object.ID][]uint64{}
			err := n.life.store.List(ctx, g, func(o object.Info) error {
				list, err := n.life.store.Sums(ctx, o.Key)
				if err != nil {
					return err
				}
				sums[o.Key.ID] = list
				_, err = n.content(o.Key)
				return err
			})
			if err != nil {
				w.fail("%s: partition %d: %v", n.name, i, err)
				return
			}
			if k == 0 {
				first = sums
				continue
			}
			for _, o := range slices.Sorted(maps.Keys(merged(first, sums))) {
				if !slices.Equal(first[o], sums[o]) {
					w.fail("partition %d: object %s differs between %s and %s", i, o, w.nodes[p.ISR[0]-1].name, n.name)
				}
			}
		}
	}
}

func merged(a, b map[object.ID][]uint64) map[object.ID][]uint64 {
	m := maps.Clone(a)
	maps.Copy(m, b)
	return m
}

// compareMachines finds nodes whose state is not that of all (INV-C1).
func (w *world) compareMachines() {
	type machine interface{ Snapshot() ([]byte, error) }
	snap := func(m machine) []byte {
		b, err := m.Snapshot()
		if err != nil {
			w.fail("snapshot: %v", err)
		}
		return b
	}
	a, b := snap(w.oracle), snap(w.catalog)
	for _, n := range w.nodes {
		if !bytes.Equal(snap(n.life.machine), a) || !bytes.Equal(snap(n.life.catalog), b) {
			w.fail("%s has another state than the others", n.name)
		}
	}
}
