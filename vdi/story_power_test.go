package vdi_test

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"time"

	"sheepdog/storage/object"
	"sheepdog/vdi"
	"sheepdog/vdi/vditest"
)

// In some stories who keeps the objects loses its power, and what was not durable, while the gateways go on. A register may then
// be what it was at any time since it was last made durable. It stays in doubt, with some gateways that remember what others do not
// find, until all of them have been told, and somebody owns the volume who knows. Each Volume through which something was written that is lost is told by its
// next flush: where that succeeds, what was written before through that Volume is there.

// powerless reports whether this is such a story.
func (s *tale) powerless() bool { return rand.New(rand.NewPCG(s.seed, 11)).IntN(2) == 0 }

// lost reports whether something failed because what was written before may be lost.
func lost(err error) bool { return errors.Is(err, object.ErrLost) }

// cut is a power cut, and until when registers are in doubt.
type cut struct{ begin, end int64 }

// flush is one that has ended.
type flush struct {
	volume     *vdi.Volume
	begin, end int64
	ok         bool
}

// flush flushes a volume of a saga.
func (s *tale) flush(h *saga, v *vdi.Volume) error {
	f := flush{volume: v, begin: s.tick()}
	err := v.Flush(ctx)
	f.ok, f.end = err == nil, s.tick()
	s.mu.Lock()
	defer s.mu.Unlock()
	h.flushes = append(h.flushes, f)
	return err
}

func (s *tale) cutPower(rng *rand.Rand) {
	for s.nap(rng, 60*time.Millisecond) {
		s.cutOnce(rng, []float64{0, 0.5, 0.9}[rng.IntN(3)])
	}
}

// cutOnce cuts the power, and returns when nothing is in doubt any more.
func (s *tale) cutOnce(rng *rand.Rand, keep float64) {
	c := &cut{begin: s.tick(), end: math.MaxInt64}
	s.mu.Lock()
	s.cuts = append(s.cuts, c)
	gateways := slices.Clone(s.gateways)
	s.mu.Unlock()
	s.cluster.Cut(keep, rng.IntN(2) == 0)
	s.happened("power cuts")
	for _, name := range []string{"v", "w"} {
		for _, g := range gateways {
			s.flushFor(g, name)
		}
		for {
			g := s.some(rng)
			err := g.Own(ctx, name)
			if err == nil || errors.Is(err, vdi.ErrNotFound) && name == "w" {
				break
			}
			if !g.Killed() && !errors.Is(err, vdi.ErrBusy) {
				s.fail("own %s through %s: %v", name, g.Name, err)
				break
			}
			time.Sleep(time.Millisecond)
		}
	}
	c.end = s.tick()
}

// flushFor has a gateway know of all that it has lost.
func (s *tale) flushFor(g *vditest.Gateway, name string) {
	v, err := g.Open(ctx, name, "", vdi.OpenOptions{Client: "story"})
	if err == nil {
		defer v.Close()
		for range 10 { // others may be told at the same time
			if err = s.flush(s.saga(g, v), v); !lost(err) {
				break
			}
		}
	}
	if err != nil && !g.Killed() && !(name == "w" && (errors.Is(err, vdi.ErrNotFound) || errors.Is(err, vdi.ErrBusy))) {
		s.fail("flush %s through %s after a power cut: %v", name, g.Name, err)
	}
}

// saga is that of an open volume.
func (s *tale) saga(g *vditest.Gateway, v *vdi.Volume) *saga {
	if v.Name() == "v" {
		return &s.v
	}
	if d, ok := g.Catalog.Get(v.VID()); ok && d.Name == v.Name() {
		return s.life(d.Family)
	}
	return new(saga) // it was deleted just now
}

// finishPower cuts the power once more, when all is flushed.
func (s *tale) finishPower(rng *rand.Rand) {
	for _, g := range s.gateways {
		s.flushFor(g, "v")
		s.flushFor(g, "w")
	}
	s.cutOnce(rng, 0)
	s.finishVolume(rng)
}

// candidate is a value that a register may have again in the doubt after a power cut.
type candidate struct {
	value uint32
	until int64
	begin int64 // not before
}

// powerless is what operations on a register mean with power cuts: what was found in the doubt after one must have been there since it was
// durable, and what was there then may come back.
func (h *saga) powerless(ops []operation, cuts []*cut) ([]operation, string) {
	if len(cuts) == 0 {
		return ops, ""
	}
	ops = append([]operation{{deed: writes, begin: -2, end: -1, durable: true}}, ops...)
	for _, c := range cuts {
		list := h.candidates(ops, c)
		found := map[uint32]bool{} // since
		var left []operation
		for _, o := range ops {
			finds := (o.deed < writes || o.deed == swaps) && o.value != outside
			if finds && (o.end == 0 || o.end > c.begin) {
				found[o.value] = true
			}
			if !finds || o.begin > c.end || o.end != 0 && o.end < c.begin {
				left = append(left, o)
				continue
			}
			if why := mayFind(&o, ops, list); why != "" && !o.maybe {
				return nil, fmt.Sprintf("%v in the doubt [%d, %d] after a power cut: %s", &o, c.begin, c.end, why)
			}
			if o.deed == swaps {
				o.deed, o.value = writes, o.next
				left = append(left, o)
			}
		}
		ops = left
		for _, x := range list {
			if found[x.value] && x.until > c.begin && x.begin <= c.end {
				ops = append(ops, operation{deed: writes, value: x.value, begin: c.begin, end: min(c.end, x.until), maybe: true})
			}
		}
	}
	return ops[1:], ""
}

// mayFind says why an operation cannot have found what it has; "" if it can.
func mayFind(o *operation, ops []operation, list []candidate) string {
	if o.deed == reads && o.value == 0 && slices.ContainsFunc(ops, func(p operation) bool { return p.deed == puts && p.value == outside }) {
		return "" // it may be outside
	}
	k := slices.IndexFunc(list, func(x candidate) bool { return x.value == o.value })
	switch {
	case k < 0:
		return "nobody has written that"
	case o.end != 0 && list[k].begin > o.end:
		return fmt.Sprintf("that was written from %d on", list[k].begin)
	case o.begin > list[k].until:
		return fmt.Sprintf("that is gone for good since %d", list[k].until)
	}
	return ""
}

// candidates are what a register may have been at some time between when it was last durable before a power cut and the end of the doubt, and
// until when it may be that again.
func (h *saga) candidates(ops []operation, c *cut) (list []candidate) {
	var later []candidate // what has come over others, by its begin, and since when it is kept
	for i := range ops {
		if w := &ops[i]; w.deed >= writes && w.deed != grows && !w.maybe {
			later = append(later, candidate{until: h.kept(w, c), begin: w.begin})
		}
	}
	slices.SortFunc(later, func(a, b candidate) int { return cmp.Compare(a.begin, b.begin) })
	for i := len(later) - 2; i >= 0; i-- {
		later[i].until = min(later[i].until, later[i+1].until)
	}
	at := map[uint32]int{}
	for i := range ops {
		o := &ops[i]
		x := candidate{value: o.leaves(), until: math.MaxInt64, begin: o.begin}
		if o.deed < writes || x.value == outside || x.value == gone {
			continue
		}
		k, _ := slices.BinarySearchFunc(later, o.end+1, func(w candidate, end int64) int { return cmp.Compare(w.begin, end) })
		if o.end != 0 && k < len(later) {
			x.until = later[k].until
		}
		if k, ok := at[x.value]; ok {
			list[k].until, list[k].begin = max(list[k].until, x.until), min(list[k].begin, x.begin)
			continue
		}
		at[x.value] = len(list)
		list = append(list, x)
	}
	return list
}

// kept is since when the power cut certainly has not undone w. Where the next flush through its volume has succeeded after the cut, it never has.
func (h *saga) kept(w *operation, c *cut) int64 {
	if w.durable {
		return w.end
	}
	since := int64(math.MaxInt64)
	for _, f := range h.flushes {
		switch {
		case !f.ok || f.begin < w.end:
		case f.end < c.begin:
			since = min(since, f.end)
		case f.volume == w.volume && !h.toldBetween(w, f):
			since = min(since, w.end)
		}
	}
	return since
}

// toldBetween reports whether a flush through the volume that has written w has failed before f, and since.
func (h *saga) toldBetween(w *operation, f flush) bool {
	return slices.ContainsFunc(h.flushes, func(b flush) bool { return !b.ok && b.volume == f.volume && b.end >= w.end && b.begin <= f.end })
}
