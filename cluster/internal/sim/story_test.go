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

// setupOf is what the simulation of a seed is like.
func setupOf(seed uint64) setup {
	return setup{
		seed: seed, nodes: 3 + int(seed%3), gateways: int(seed / 2 % 2), copies: 1 + int(seed/3%3), partitions: 2, volumes: 3, objects: 3, depth: 3,
		trouble: 6 * second, harsh: seed%2 == 0, behind: seed%8 == 5,
	}
}

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
	if w.behind {
		w.after(w.between(300*ms, second), w.leaveBehind)
	} else {
		w.after(w.between(0, second), w.fault)
	}
	w.run(nil, w.setup.trouble)
	w.peace()
	w.run(nil, second)
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
}

// bring makes the cluster, and starts its nodes.
func (w *world) bring() {
	at := w.begin
	w.decide(state.Command{Format: &state.Format{ID: "sim", Created: at, Partitions: w.partitions, ObjectSizeShift: sizeShift, Copies: w.copies}})
	c := &state.AnnounceAll{} // for their numbers
	for i := range w.setup.nodes {
		n := &node{w: w, id: state.NodeID(i + 1), name: fmt.Sprint("n", i+1), gateway: i >= w.setup.nodes-w.gateways, died: -time.Hour}
		if !n.gateway {
			n.disk = disktest.New(n.name)
		}
		w.nodes = append(w.nodes, n)
		c.Nodes = append(c.Nodes, state.Announce{Name: n.name, Address: n.name, Zone: n.name})
	}
	w.decide(state.Command{AnnounceAll: c})
	for _, n := range w.nodes {
		n.start()
	}
	w.elect()
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

// fault does something bad, now and again.
func (w *world) fault() {
	if !w.trouble {
		return
	}
	w.after(w.between(0, 1500*ms), w.fault)
	if !w.harsh && w.recovering() {
		return
	}
	n := w.nodes[w.rng.IntN(len(w.nodes))]
	kinds := 9
	if w.harsh {
		kinds = 11
	}
	switch w.rng.IntN(kinds) {
	case 9, 10:
		w.blackout()
	case 0, 1:
		power := w.chance(0.5) && (w.harsh || w.spare(n))
		if w.chance(0.5) && n.disk != nil {
			n.doom(power)
		} else {
			n.kill(power)
		}
		w.after(w.between(100*ms, 4*second), n.revive)
	case 2, 3:
		n.hang()
		w.after(w.between(100*ms, 4*second), n.wake)
	case 4:
		other := w.nodes[w.rng.IntN(len(w.nodes))]
		w.logf("cut %s -> %s", n.name, other.name)
		w.happened("cut")
		w.cut[[2]state.NodeID{n.id, other.id}] = true
		if w.chance(0.5) {
			w.cut[[2]state.NodeID{other.id, n.id}] = true
		}
	case 5:
		w.logf("links are mended")
		clear(w.cut)
	case 6:
		w.separate(n)
	case 7:
		n.slow = !n.slow
		w.logf("%s has a slow disk: %v", n.name, n.slow)
	case 8:
		w.place()
	}
}

// separate cuts a node off from the leader, or ends that. Who leads sends commands again after longer
// and longer pauses; that a node is there again is known sooner.
func (w *world) separate(n *node) {
	if n.apart {
		n.deaf = w.now() + w.between(0, 4*second)
	} else if w.chance(0.5) {
		w.after(w.between(second, 5*second), func() {
			if n.apart {
				w.separate(n)
			}
		})
	}
	n.apart = !n.apart
	w.logf("%s apart from the leader: %v", n.name, n.apart)
}

// leaveBehind cuts a node with clients off from the leader until it is down, and lets it come back long
// before it hears what has been decided meanwhile.
func (w *world) leaveBehind() {
	n := w.volumes[w.rng.IntN(len(w.volumes))].current.l.n
	n.apart = false
	w.separate(n)
	w.after(w.between(3*second, 4*second), func() {
		if n.apart {
			w.separate(n)
		}
		n.deaf = w.now() + w.between(second, 3*second)
		w.happened("left behind")
	})
}

// recovering reports whether a node without power has not been taken out of the in-sync
// sets yet. What was not made durable is then on the others alone.
func (w *world) recovering() bool {
	if slices.ContainsFunc(w.nodes, func(n *node) bool { return n.crashing && n.power }) {
		return true
	}
	if w.weak == nil {
		return false
	}
	v := w.oracle.View()
	if m := v.Node(w.weak.id); m.Incarnation == w.weakInc && m.State == state.NodeUp {
		return true
	}
	w.weak = nil
	return false
}

// spare reports whether a node's power may be cut without loss: wherever it is in sync,
// so is a living one whose memory nobody has taken.
func (w *world) spare(n *node) bool {
	v := w.oracle.View()
	for _, p := range v.Policies[0].Partitions {
		if slices.Contains(p.ISR, n.id) && !slices.ContainsFunc(p.ISR, func(id state.NodeID) bool {
			o := w.nodes[id-1]
			return id != n.id && o.running() && !o.crashing && !o.apart && v.Node(id).Incarnation == o.life.inc && v.Node(id).State == state.NodeUp
		}) {
			return false
		}
	}
	return true
}

// blackout cuts the power of most nodes, or of those that hold a partition, at about the
// same time. Some come back together, some alone, and some late.
func (w *world) blackout() {
	power := w.chance(0.8)
	hit := func(*node) bool { return w.chance(0.9) }
	if w.chance(0.5) {
		p := w.oracle.View().Policies[0].Partitions[w.rng.IntN(w.partitions)]
		hit = func(n *node) bool { return slices.Contains(p.ISR, n.id) || slices.Contains(p.Waiting, n.id) }
	}
	w.logf("blackout, power cut: %v", power)
	w.happened("blackout")
	together := w.between(100*ms, second)
	for _, n := range w.nodes {
		if !hit(n) {
			continue
		}
		w.after(w.between(0, 20*ms), func() { n.kill(power) })
		back := together
		if w.chance(0.4) {
			back = w.between(100*ms, 4*second)
		}
		w.after(back, n.revive)
	}
}

func (w *world) peace() {
	w.logf("peace")
	w.trouble = false
	clear(w.cut)
	for _, n := range w.nodes {
		n.apart, n.slow, n.deaf = false, false, 0
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
	if len(v.Policies[0].Partitions) == 0 {
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
	fmt.Fprintf(&b, "log %d, leader %v", len(w.log), w.leader.l != nil)
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
			a := &access{s: &session{v: vol}, n: simSectors, at: w.now()}
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
	data := make([]byte, simSectors*sector)
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
