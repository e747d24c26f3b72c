package sim

import (
	"context"
	"errors"
	"log/slog"
	"slices"
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
