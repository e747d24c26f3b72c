package steward

import (
	"time"

	"sheepdog/cluster/state"
)

// Holder is a node's own part in its lease: what it says when it asks, and what answers
// count. The zero value has no lease. It is pure; its methods are called by one goroutine at
// a time, and who calls them acts on what they return before the next call.
type Holder struct {
	from      time.Time // the last question that was granted
	renounced time.Time // answers to earlier questions count no more
	left      bool
	number    uint64
	last      Verdict
}

// Ask is called right before a question for a lease leaves. It fills in what the node says
// beside what it knows, and reports whether the node may ask. If Renounced is set the node
// has no lease any more from here on.
func (h *Holder) Ask(now time.Time, unreached []state.NodeID, serving bool) (Saying, bool) {
	if h.left {
		return Saying{}, false
	}
	h.number++
	s := Saying{Unreached: unreached, Serving: serving, Number: h.number}
	if h.last == Cut {
		s.Renounced, h.renounced = true, now
	}
	return s, true
}

// Answered takes the answer to a question of a time. It returns from when a lease counts that
// is better than the one before, if it is, and whether the verdict is another one than last
// time; was is that.
func (h *Holder) Answered(v Verdict, asked time.Time) (from time.Time, was Verdict, better bool) {
	was = h.last
	if v != NotLeading {
		h.last = v
	}
	if v == Granted && !h.left && asked.After(h.from) && !asked.Before(h.renounced) {
		h.from, better = asked, true
	}
	return h.from, was, better
}

// Leave gives the lease up for good.
func (h *Holder) Leave() { h.left = true }

// From is when the lease was last asked for with success; the zero time: never.
func (h *Holder) From() time.Time { return h.from }
