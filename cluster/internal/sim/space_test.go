package sim

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"testing"
	"time"

	"sheepdog/storage/object"
)

// Full disks: those of most nodes are small, and fill up. What needs space is refused then; what needs none goes
// on, nodes restart, and others learn as far as there is room. At times there is space, and then there is none again.

const (
	// logSize is that of a node's log, which has its full length from the beginning, in bytes.
	logSize = 2 << 20
	// reserve is what storage leaves free of a small disk, in bytes: marks need some.
	reserve = 64 << 10
	// slack is more than a node takes before it looks again how much is free, in bytes.
	slack = 512 << 10
)

// shrink gives a node a small disk, before anything is on it.
func (w *world) shrink(n *node) {
	if w.faults[faultSpace] > 0 && w.chance(0.7) {
		n.capacity = logSize + reserve + int64(w.between(64<<10, time.Duration(w.room)))
		n.narrow = true
		n.disk.SetCapacity(n.capacity)
	}
}

// squeeze gives a node's disk much space, or takes that away again. What storage has promised to
// pending writes is left, but in stories in which others fill the disk, too.
func (w *world) squeeze(n *node) {
	switch {
	case n.disk == nil:
	case n.narrow:
		n.narrow = false
		n.disk.SetCapacity(0)
		w.logf("%s has space again", n.name)
		w.happened("space came back")
	case w.sudden:
		n.narrow = true
		n.disk.SetCapacity(n.disk.Used() + reserve + int64(w.between(0, reserve)))
		w.logf("others fill the disk of %s", n.name)
		w.happened("disk was filled by others")
	case n.capacity > 0 && n.running():
		d := n.life.store.Status().Disks[0]
		if taken := int64(d.TotalBytes - d.FreeBytes); taken+reserve+slack < n.capacity {
			n.narrow = true
			n.disk.SetCapacity(n.capacity)
			w.logf("%s has a small disk again", n.name)
			w.happened("space went")
		}
	}
}

// look counts what waits for space.
func (w *world) look() {
	for _, n := range w.nodes {
		if !n.running() {
			continue
		}
		for _, r := range n.life.reps.Recovery() {
			if r.NoSpace {
				w.happened("recovery waited for space")
			}
		}
	}
}

// refused deals with a request that failed for want of space, and reports whether it may: it is a write where nobody has
// written yet. A part of it may have been carried out.
func (a *access) refused() bool {
	w := a.s.v.w
	if !errors.Is(a.Err, object.ErrNoSpace) || w.faults[faultSpace] == 0 || a.Op == object.OpRead || !w.sudden && (a.Op != object.OpWrite || !w.history.grows(a)) {
		return false
	}
	a.ended = false
	w.happened("change refused for want of space")
	return true
}

// grows reports whether a write is of a block of which nobody has seen any content.
func (h history) grows(a *access) bool {
	const sectors = object.BlockSize / sector
	for b := a.first / sectors; b <= (a.first+a.n-1)/sectors; b++ {
		filled := false
		for k := range sectors {
			for v, c := range h[register{a.ID, b*sectors + k}] {
				filled = filled || v != 0 && c.seen
			}
		}
		if !filled {
			return true
		}
	}
	return false
}

// strays are objects on nodes that hold their partition no more.
func (w *world) strays() bool {
	v := w.oracle.View()
	for i, p := range v.Policies[0].Partitions {
		if p.Lost != 0 { // it may be all that is left
			continue
		}
		for _, n := range w.nodes {
			if n.disk == nil || slices.Contains(p.ISR, n.id) {
				continue
			}
			found := false
			g := object.Group{Policy: policy, Partition: object.Partition(i)}
			if err := n.life.store.List(context.Background(), g, func(object.Info) error { found = true; return nil }); err != nil || found {
				return true
			}
		}
	}
	return false
}

// warnings count what production code warns of.
type warnings struct{ w *world }

func (warnings) Enabled(_ context.Context, l slog.Level) bool { return l >= slog.LevelWarn }
func (h warnings) WithAttrs([]slog.Attr) slog.Handler         { return h }
func (h warnings) WithGroup(string) slog.Handler              { return h }
func (h warnings) Handle(_ context.Context, r slog.Record) error {
	h.w.note(func() { h.w.happened("warning: " + r.Message) })
	return nil
}

// brimful takes all space away from a node but what storage keeps free and so many bytes.
func (n *node) brimful(left int64) {
	d := n.life.store.Status().Disks[0]
	n.narrow = true
	n.disk.SetCapacity(int64(d.TotalBytes-d.FreeBytes) + reserve + left)
}

// On disks that are full, nodes that were away become whole, one after the other, without anybody giving them space:
// what was written over needs none, and what was deleted gives way to what came in its place.
func TestFullNodesBecomeWhole(t *testing.T) {
	for seed := range some(8) {
		s := calm(seed + 1)
		s.nodes, s.partitions, s.volumes, s.objects, s.depth, s.contend, s.beat, s.checkpoint = 3, 2, 2, 12, 4, 1000*second, 3*ms, second
		s.faults[faultSpace], s.room = 1, 1<<20
		tale(t, s, func(w *world) {
			w.run(nil, 4*second)
			for _, n := range w.nodes {
				n.brimful(32 << 10)
			}
			for round := range 6 {
				n := w.nodes[round%len(w.nodes)]
				n.kill(seed%2 == 1)
				w.run(nil, 2500*ms)
				n.revive()
				if !w.run(w.converged, 30*second) {
					w.fail("%s, full, does not become whole: %s", n.name, w.situation())
					return
				}
			}
			if w.seen["change refused for want of space"] == 0 {
				w.fail("no disk was full")
			}
			w.rest()
		})
	}
}

// A node without space for what others took while it was away is brought what needs none, and the rest as soon as it
// has space.
func TestFullNodeGoesOnWithSpace(t *testing.T) {
	s := calm(1)
	s.nodes, s.partitions, s.volumes, s.objects, s.depth, s.contend, s.beat = 3, 1, 1, 40, 4, 1000*second, 4*ms
	s.faults[faultSpace], s.room = 1, 1<<20
	tale(t, s, func(w *world) {
		for _, n := range w.nodes {
			n.narrow = false
			n.disk.SetCapacity(0)
		}
		w.run(nil, second/2)
		n := w.nodes[w.oracle.View().Policies[0].Partitions[0].ISR[2]-1]
		n.brimful(0)
		n.kill(false)
		w.run(nil, 4*second)
		n.revive()
		waits := func() bool {
			w.look()
			return w.seen["recovery waited for space"] > 0
		}
		if !w.run(waits, 20*second) {
			w.fail("nothing waits for space: %s", w.situation())
			return
		}
		for _, v := range w.volumes {
			v.stop = true
		}
		w.run(nil, 5*second)
		if w.converged() {
			w.fail("there was space for everything")
			return
		}
		w.sameBlocks(n)
		n.narrow = false
		n.disk.SetCapacity(0)
		if !w.run(w.converged, 20*second) {
			w.fail("there is space, and recovery does not go on: %s", w.situation())
			return
		}
		w.rest()
	})
}

// sameBlocks finds blocks of a node, in objects that it has room for, that are not those of the primary.
func (w *world) sameBlocks(n *node) {
	p := w.oracle.View().Policies[0].Partitions[0]
	primary := w.nodes[p.Primary()-1]
	g := object.Group{Policy: policy}
	equal, fewer := 0, 0
	err := n.life.store.List(context.Background(), g, func(o object.Info) error {
		own, err := n.life.store.Sums(context.Background(), o.Key)
		if err != nil {
			return err
		}
		theirs, err := primary.life.store.Sums(context.Background(), o.Key)
		switch {
		case errors.Is(err, object.ErrNotFound):
			w.fail("object %s, which was deleted, still takes space", o.Key)
			return nil
		case err != nil:
			return err
		case slices.Equal(own, theirs):
			equal++
			return nil
		}
		fewer++
		for b := range own {
			if own[b] != 0 && theirs[b] == 0 {
				w.fail("block %d of object %s, which was discarded, still takes space", b, o.Key)
			}
		}
		return nil
	})
	if err != nil {
		w.fail("%s: %v", n.name, err)
	}
	w.logf("%d objects are equal, %d wait for space", equal, fewer)
	if equal == 0 {
		w.fail("nothing was brought that needs no space")
	}
}
