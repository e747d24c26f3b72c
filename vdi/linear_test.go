package vdi_test

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"math/bits"
	"slices"
	"testing"

	"sheepdog/storage/object"
	"sheepdog/vdi"
)

// What a register is, beside a value. Beyond the size of its volume it may read as 0, for who has not heard of that yet.
const (
	outside = math.MaxUint32     // the volume is too small for it
	gone    = math.MaxUint32 - 1 // the volume is deleted
)

// deed is what an operation does to a register.
type deed uint8

const (
	reads  deed = iota // finds value
	looks              // finds value, or that it is outside: for who has the volume's size right
	writes             // leaves value; it fails if the register is outside or gone
	swaps              // finds value, leaves next, with nothing in between
	puts               // leaves value, whatever the register was
	grows              // it is not outside any more, and 0 if it was
)

// operation is one on a register. It was carried out at one moment between begin and end.
type operation struct {
	deed        deed
	value, next uint32
	begin, end  int64
	maybe       bool        // it failed: it may not have been carried out. If end is 0 it may still be
	vid         object.VID  // unless 0, what it was meant for: it was carried out before that became a snapshot
	durable     bool        // no power cut undoes it
	volume      *vdi.Volume // through which it was asked for
}

// leaves is what the register is after it, if that is known.
func (o *operation) leaves() uint32 {
	switch o.deed {
	case writes, puts:
		return o.value
	case swaps:
		return o.next
	}
	return 0
}

// step is what the operation makes of a register; false if it cannot be carried out on that.
func (o *operation) step(was uint32) (is uint32, ok bool) {
	switch o.deed {
	case reads:
		return was, was == o.value || was == outside && o.value == 0
	case looks:
		return was, was == o.value
	case writes:
		return o.value, was != outside && was != gone
	case swaps:
		return o.next, was == o.value
	case grows:
		if was == outside {
			was = 0
		}
		return was, was != gone
	}
	return o.value, true
}

func (o *operation) String() string {
	name := func(value uint32) string {
		switch value {
		case outside:
			return "outside"
		case gone:
			return "gone"
		}
		return fmt.Sprint(value)
	}
	s := [...]string{"read ", "look ", "write ", "swap ", "put ", "grow "}[o.deed] + name(o.value)
	if o.deed == swaps {
		s += " for " + name(o.next)
	}
	if s += fmt.Sprintf(" [%d, %d]", o.begin, o.end); o.maybe {
		s += "?"
	}
	return s
}

// possible is what may be so at a time: what the register is, and which operations under way are carried out.
type possible struct {
	value uint32
	done  uint64
}

// linearizable says why these operations on one register, which was 0, cannot have been one after the
// other; "" if they can. It goes through them in time, and has all that may be so. Nothing is thought to be carried
// out before something that ends needs it: later it still can be.
func linearizable(ops []operation) string {
	type event struct {
		at  int64
		end bool
		op  int
	}
	seen := map[uint32]bool{0: true, outside: true, gone: true}
	for _, o := range ops {
		seen[o.value] = seen[o.value] || o.deed == reads || o.deed == looks || o.deed == swaps
	}
	var events []event
	for i, o := range ops {
		if o.maybe && !seen[o.leaves()] {
			continue // nobody has seen it
		}
		events = append(events, event{o.begin, false, i})
		if o.end != 0 {
			events = append(events, event{o.end, true, i})
		}
	}
	slices.SortStableFunc(events, func(a, b event) int {
		if a.at == b.at && a.end != b.end {
			if b.end {
				return -1
			}
			return 1
		}
		return cmp.Compare(a.at, b.at)
	})
	slots := make([]int, 0, 64) // operations under way; -1: none
	all := map[possible]bool{{}: true}
	for _, e := range events {
		o := &ops[e.op]
		if !e.end {
			i := slices.Index(slots, -1)
			if i < 0 {
				if i = len(slots); i == 64 {
					return "too many operations at a time"
				}
				slots = append(slots, -1)
			}
			slots[i] = e.op
			continue
		}
		slot := slices.Index(slots, e.op)
		next := carriedOut(all, ops, slots, slot)
		if next == nil {
			return tooMuch
		}
		if o.maybe {
			for p := range all {
				p.done &^= 1 << slot
				next[p] = true
			}
		}
		if len(next) == 0 {
			return impossible(all, ops, slots, o)
		}
		slots[slot] = -1
		if all = next; len(all) > 16 {
			all = needed(all, ops, slots)
		}
		if len(all) > 1<<14 {
			return tooMuch
		}
	}
	return ""
}

// tooMuch is the answer where it takes too long to find out. Nobody may take it for a good one.
const tooMuch = "too much is possible"

// carriedOut is what may be so when the operation in a slot has ended; nil if that is too much to find out.
func carriedOut(all map[possible]bool, ops []operation, slots []int, slot int) map[possible]bool {
	next := map[possible]bool{}
	seen := map[possible]bool{}
	before := sooner(ops, slots)
	var todo []possible
	for p := range all {
		seen[p] = true
		todo = append(todo, p)
	}
	for len(todo) > 0 {
		if len(seen) > 1<<18 {
			return nil
		}
		p := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		for i, n := range slots { // what only finds something may as well be done when it can be
			if n >= 0 && ops[n].deed <= looks {
				if _, ok := ops[n].step(p.value); ok {
					p.done |= 1 << i
				}
			}
		}
		if p.done>>slot&1 != 0 {
			p.done &^= 1 << slot
			next[p] = true
			continue
		}
		for i, n := range slots {
			if n < 0 || p.done>>i&1 != 0 || before[i]&^p.done != 0 {
				continue
			}
			if value, ok := ops[n].step(p.value); ok && (value != p.value || !ops[n].maybe) {
				if q := (possible{value, p.done | 1<<i}); !seen[q] {
					seen[q] = true
					todo = append(todo, q)
				}
			}
		}
	}
	return next
}

// alike reports whether two operations that failed do the same.
func (o *operation) alike(a *operation) bool {
	return o.maybe && a.maybe && o.deed == a.deed && o.value == a.value && o.next == a.next
}

// sooner says of each slot which others do the same, and may be carried out less long: they may as well be carried out first.
func sooner(ops []operation, slots []int) (before [64]uint64) {
	for i, n := range slots {
		for j, m := range slots {
			if n < 0 || m < 0 || i == j || !ops[n].alike(&ops[m]) {
				continue
			}
			if mine, other := uint64(ops[n].end-1), uint64(ops[m].end-1); other < mine || other == mine && j < i { // 0 is without end
				before[i] |= 1 << j
			}
		}
	}
	return before
}

// sorted is p where those that do the same, and may be carried out without end, are so from the first slot on: it is the same.
func (p possible) sorted(endless []uint64) possible {
	for _, same := range endless {
		n := bits.OnesCount64(p.done & same)
		for p.done &^= same; n > 0; n-- {
			first := same & -same
			p.done |= first
			same &^= first
		}
	}
	return p
}

// needed leaves out what is possible with less: what failed, and made no difference, may as well not have been carried out.
func needed(all map[possible]bool, ops []operation, slots []int) map[possible]bool {
	var failed uint64
	for i, n := range slots {
		if n >= 0 && ops[n].maybe {
			failed |= 1 << i
		}
	}
	var endless []uint64
	for i, n := range slots {
		if n < 0 || !ops[n].maybe || ops[n].end != 0 {
			continue
		}
		at := slices.IndexFunc(endless, func(same uint64) bool { return ops[slots[bits.TrailingZeros64(same)]].alike(&ops[n]) })
		if at < 0 {
			at = len(endless)
			endless = append(endless, 0)
		}
		endless[at] |= 1 << i
	}
	different := map[possible]bool{}
	for p := range all {
		different[p.sorted(endless)] = true
	}
	kept := map[possible][]uint64{} // by all but what failed
	list := slices.SortedFunc(maps.Keys(different), func(a, b possible) int { return bits.OnesCount64(a.done) - bits.OnesCount64(b.done) })
	next := map[possible]bool{}
	for _, p := range list {
		key := possible{p.value, p.done &^ failed}
		if !slices.ContainsFunc(kept[key], func(done uint64) bool { return done&^p.done == 0 }) {
			kept[key] = append(kept[key], p.done)
			next[p] = true
		}
	}
	return next
}

// impossible tells what could have been instead of o.
func impossible(all map[possible]bool, ops []operation, slots []int, o *operation) string {
	var values []uint32
	for p := range all {
		if !slices.Contains(values, p.value) {
			values = append(values, p.value)
		}
	}
	slices.Sort(values)
	s := fmt.Sprintf("%v cannot be: it is one of %v before, and under way are", o, values)
	for _, n := range slots {
		if n >= 0 {
			s += fmt.Sprintf(" (%v)", &ops[n])
		}
	}
	return s
}

func TestLinearizable(t *testing.T) {
	read := func(value uint32, begin, end int64) operation { return operation{value: value, begin: begin, end: end} }
	look := func(value uint32, begin, end int64) operation {
		return operation{deed: looks, value: value, begin: begin, end: end}
	}
	write := func(value uint32, begin, end int64) operation {
		return operation{deed: writes, value: value, begin: begin, end: end}
	}
	put := func(value uint32, begin, end int64) operation {
		return operation{deed: puts, value: value, begin: begin, end: end}
	}
	swap := func(value, next uint32, begin, end int64) operation {
		return operation{deed: swaps, value: value, next: next, begin: begin, end: end}
	}
	grow := func(begin, end int64) operation { return operation{deed: grows, begin: begin, end: end} }
	failed := func(o operation) operation { o.maybe = true; return o }
	for _, c := range []struct {
		ops []operation
		ok  bool
	}{
		{[]operation{write(1, 1, 2), read(1, 3, 4)}, true},
		{[]operation{write(1, 1, 2), read(0, 3, 4)}, false},
		{[]operation{write(1, 1, 5), read(0, 3, 4)}, true},
		{[]operation{write(1, 1, 9), read(1, 2, 3), read(0, 4, 5)}, false},
		{[]operation{write(1, 1, 2), write(2, 3, 4), read(1, 5, 6)}, false},
		{[]operation{write(1, 1, 4), write(2, 3, 4), read(1, 5, 6)}, true},
		{[]operation{write(1, 1, 4), write(2, 3, 4), read(1, 5, 6), read(2, 7, 8)}, false},
		{[]operation{read(3, 1, 4)}, false},
		{[]operation{write(1, 1, 2), write(0, 3, 4), write(2, 5, 6), write(0, 7, 8), read(0, 9, 10)}, true},
		{[]operation{write(1, 1, 2), write(0, 3, 4), write(2, 5, 6), read(0, 9, 10)}, false},
		{[]operation{write(1, 1, 8), swap(0, 2, 2, 3), read(1, 9, 10)}, true},
		{[]operation{write(1, 1, 8), swap(0, 2, 2, 3), read(1, 4, 5), read(2, 9, 10)}, false},
		{[]operation{swap(0, 1, 1, 5), swap(0, 2, 1, 5)}, false},
		{[]operation{swap(0, 1, 1, 5), swap(1, 2, 1, 5)}, true},
		{[]operation{write(1, 1, 2), failed(write(2, 3, 0)), read(1, 5, 6), read(2, 7, 8), read(2, 9, 10)}, true},
		{[]operation{write(1, 1, 2), failed(write(2, 3, 0)), read(2, 5, 6), read(1, 7, 8)}, false},
		{[]operation{write(1, 1, 2), failed(write(2, 3, 4)), read(1, 5, 6), read(2, 7, 8)}, false},
		{[]operation{write(1, 1, 2), failed(write(2, 3, 4)), read(2, 7, 8)}, true},
		{[]operation{write(1, 1, 2), put(outside, 3, 4), read(0, 5, 6), look(outside, 7, 8)}, true},
		{[]operation{write(1, 1, 2), put(outside, 3, 4), look(0, 5, 6)}, false},
		{[]operation{write(1, 1, 2), put(outside, 3, 4), write(2, 5, 6)}, false},
		{[]operation{write(1, 1, 2), put(outside, 3, 4), grow(5, 6), read(1, 7, 8)}, false},
		{[]operation{write(1, 1, 2), put(outside, 3, 4), grow(5, 8), write(2, 6, 7), look(2, 9, 10)}, true},
		{[]operation{put(gone, 1, 2), read(0, 3, 4)}, false},
	} {
		if why := linearizable(c.ops); (why == "") != c.ok {
			t.Errorf("%v: %q", c.ops, why)
		}
	}

	// Twenty writes of the same failed and may still be carried out: it does not matter which. Each makes one read what it is.
	for _, needs := range []int{10, 20, 21} {
		var ops []operation
		for i := range int64(20) {
			ops = append(ops, failed(write(0, i, 0)))
		}
		for i := range int64(needs) {
			at := 100 + 10*i
			ops = append(ops, write(uint32(i+1), at, at+1), read(uint32(i+1), at+2, at+3), read(0, at+4, at+5))
		}
		if why := linearizable(ops); (why == "") != (needs <= 20) || why == tooMuch {
			t.Errorf("%d of 20 alike: %q", needs, why)
		}
	}
}
