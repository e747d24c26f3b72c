package sim

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"time"

	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// Rot: bits flip in what is at rest on a disk. Nobody may ever read that, and it must be
// replaced by what another member has. So there is rot only where a sound copy is in sync, and
// until it is replaced nothing happens that would take that copy away.

// taint is rot in an object of a node.
type taint struct {
	n     *node
	key   object.Key
	deep  bool // in the header or the table: what is sound cannot be told from what is not
	since time.Duration

	file string // if deep: where it is, and what is there while it is
	off  int64
	bad  []byte
}

// logRot is a place in a node's log that is to rot as soon as what is there is known to be
// durable: when a write after a sync has become durable, too. Before that, what cannot be
// read is taken for what was never written.
type logRot struct {
	file  string
	off   int64
	value uint64 // what is there; the log may have been used anew since
	key   object.Key
	phase int // sync, write, sync
}

// rot flips a bit of a node's disk.
func (w *world) rot(n *node) {
	if !n.running() || n.disk == nil || n.crashing || len(n.life.rots) > 0 {
		return
	}
	var groups []int
	for i := range w.oracle.View().Policies[0].Partitions {
		if w.mayRot(n, i) {
			groups = append(groups, i)
		}
	}
	if len(groups) == 0 {
		return
	}
	if w.chance(0.3) {
		w.rotLog(n)
		return
	}
	dir := fmt.Sprintf("objects/%02d-%04d", policy, groups[w.rng.IntN(len(groups))])
	names, err := n.disk.ReadDir(dir)
	if err != nil || len(names) == 0 {
		return
	}
	name := names[w.rng.IntN(len(names))]
	id, err := strconv.ParseUint(name, 16, 64)
	if err != nil {
		w.fail("object file %s: %v", name, err)
		return
	}
	t := &taint{n: n, key: w.keyOf(object.ID(id)), since: w.now()}
	quiet := len(w.cut) == 0 && !slices.ContainsFunc(w.nodes, func(n *node) bool { return !n.running() || n.apart || n.mute || n.slow })
	off := w.rng.Int64N(int64(w.sectors * sector))
	switch k := w.rng.IntN(10); {
	case k < 2 && quiet: // the sector of the table with the first blocks
		t.deep, off = true, 1<<sizeShift+object.BlockSize+w.rng.Int64N(sector)
	case k < 4 && quiet: // the header
		t.deep, off = true, 1<<sizeShift+w.rng.Int64N(64)
	}
	if n.disk.Flip(dir+"/"+name, off, 1<<w.rng.IntN(8)) != nil {
		return // a hole
	}
	if t.deep {
		t.file, t.off = dir+"/"+name, off&^(sector-1)
		t.bad = n.raw(t.file, t.off)
	}
	w.logf("%s: object %s rots at %d", n.name, t.key, off)
	w.happened(fmt.Sprintf("rot, deep %v", t.deep))
	w.taint(t)
	if t.deep && w.mayKill(n) && w.chance(0.7) { // what it had in memory of the object is gone then
		w.after(w.between(0, 100*ms), func() { n.kill(false) })
		w.after(w.between(100*ms, second), n.revive)
	}
}

// raw reads a sector of a node's disk; nil: there is none.
func (n *node) raw(file string, off int64) []byte {
	f, err := n.disk.OpenFile(file, 0)
	if err != nil {
		return nil
	}
	defer f.Close()
	b := make([]byte, sector)
	if _, err := f.ReadAt(b, off); err != nil && !errors.Is(err, io.EOF) {
		return nil
	}
	return b
}

// replaced reports whether something else is on the disk in place of what is deep, even after a power
// cut: it may be seen after a restart that is not seen before.
func (t *taint) replaced() bool {
	if !t.deep {
		return true
	}
	if bytes.Equal(t.n.raw(t.file, t.off), t.bad) {
		return false
	}
	durable, err := t.n.disk.Durable(t.file)
	return durable || err != nil
}

func (w *world) taint(t *taint) {
	w.taints = append(w.taints, t)
	w.tainted[t.key.Group.Partition] = never
	w.after(w.between(300*ms, 3*second), func() { w.inspect(t) })
}

func (w *world) keyOf(id object.ID) object.Key {
	return object.Key{Group: object.Group{Policy: policy, Partition: object.Partition(w.partitionOf(id))}, ID: id}
}

// mayRot reports whether a node is in sync in a partition with others that are well, none of
// which has any rot.
func (w *world) mayRot(n *node, i int) bool {
	v := w.oracle.View()
	isr := v.Policies[0].Partitions[i].ISR
	if len(isr) < 2 || !slices.Contains(isr, n.id) || w.recovering() {
		return false
	}
	for _, id := range isr {
		o := w.nodes[id-1]
		if !o.running() || o.crashing || v.Node(id).State != state.NodeUp || v.Node(id).Incarnation != o.life.inc {
			return false
		}
	}
	return !slices.ContainsFunc(w.taints, func(t *taint) bool { return int(t.key.Group.Partition) == i && t.n != n })
}

// inspect looks at last whether rot is gone, by reading all of the object, and what is under it if that is deep.
func (w *world) inspect(t *taint) {
	if w.ended || !slices.Contains(w.taints, t) {
		return
	}
	if t.n.running() && !t.n.crashing {
		sums, err := t.n.life.store.Sums(context.Background(), t.key)
		if err == nil {
			_, err = t.n.content(t.key)
		}
		if (err == nil && !slices.Contains(sums, ^uint64(0)) || errors.Is(err, object.ErrNotFound)) && t.replaced() {
			w.logf("%s: object %s is sound again", t.n.name, t.key)
			w.taints = slices.DeleteFunc(w.taints, func(o *taint) bool { return o == t })
			if !w.rotsIn(t.key.Group.Partition) {
				w.tainted[t.key.Group.Partition] = w.now()
			}
			return
		}
	}
	w.after(100*ms, func() { w.inspect(t) })
}

func (w *world) rotsIn(p object.Partition) bool {
	return slices.ContainsFunc(w.taints, func(t *taint) bool { return t.key.Group.Partition == p })
}

// rotting reports whether there is rot anywhere.
func (w *world) rotting() bool { return len(w.taints) > 0 }

// endures reports whether nothing is lost to rot by a fault of a node.
func (w *world) endures(kind fault, n *node) bool {
	for _, t := range w.taints {
		if t.deep && kind != faultPlace && kind != faultRenew && kind != faultMend {
			return false
		}
	}
	return true
}

// mayKill reports whether that does not take the last sound copy of something.
func (w *world) mayKill(n *node) bool {
	return !slices.ContainsFunc(w.taints, func(t *taint) bool { return t.n != n })
}

// excused reports whether a request may have failed because of rot.
func (w *world) excused(a *access) bool { return a.at <= w.tainted[a.Partition] }

// rotLog finds something in the log of a node, which is to rot.
func (w *world) rotLog(n *node) {
	names, err := n.disk.ReadDir("wal")
	if err != nil {
		return
	}
	type place struct {
		file  string
		off   int64
		value uint64
		id    object.ID
	}
	var places []place
	for _, name := range names {
		f, err := n.disk.OpenFile("wal/"+name, 0)
		if err != nil {
			return
		}
		size, _ := f.Size()
		b := make([]byte, size)
		_, _ = f.ReadAt(b, 0)
		f.Close()
		for off := 0; off+sector <= len(b); off += 16 {
			v := wordAt(b[off:])
			id, ok := w.where[v]
			if !ok || wordAt(b[off+8:]) != v || !slices.Contains(values(b[off:off+sector]), v) {
				continue
			}
			places = append(places, place{"wal/" + name, int64(off), v, id})
			off += sector - 16
		}
	}
	if len(places) == 0 {
		return
	}
	p := places[w.rng.IntN(len(places))]
	if key := w.keyOf(p.id); w.mayRot(n, int(key.Group.Partition)) {
		n.life.rots = append(n.life.rots, &logRot{file: p.file, off: p.off + w.rng.Int64N(sector), value: p.value, key: key})
	}
}

// stored is told what the node's store has done, for what is to rot.
func (l *life) stored(op object.Op, n uint32) {
	w := l.n.w
	for _, r := range l.rots {
		if op == object.OpSync && r.phase%2 == 0 || op == object.OpWrite && n <= smallWrite && r.phase == 1 {
			r.phase++
		}
		if r.phase < 3 {
			continue
		}
		l.rots = nil
		if b := l.n.raw(r.file, r.off&^15); b == nil || wordAt(b) != r.value {
			return
		}
		if w.mayRot(l.n, int(r.key.Group.Partition)) && w.trouble && l.n.disk.Flip(r.file, r.off, 1<<w.rng.IntN(8)) == nil {
			w.logf("%s: %s rots at %d: object %s", l.n.name, r.file, r.off, r.key)
			w.happened("rot of the log")
			w.taint(&taint{n: l.n, key: r.key, since: w.now()})
		}
		return
	}
}

// scrub reads everything now and again.
func (l *life) scrub() {
	w := l.n.w
	if l.over || l.store == nil || w.faults[faultRot] == 0 {
		return
	}
	w.after(w.between(w.setup.scrub/4, w.setup.scrub), l.scrub)
	if l.n.running() {
		go func() { _ = l.store.Scrub(context.Background()) }()
	}
}
