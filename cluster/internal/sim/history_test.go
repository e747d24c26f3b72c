package sim

import (
	"fmt"
	"time"

	"sheepdog/storage/object"
)

// history has for each sector what was written and read: a register of its own, for
// volumes promise no more than that (INV-S2).
type history map[register]map[uint64]*cluster

type register struct {
	id     object.ID
	sector int
}

const never = time.Duration(1) << 62

// cluster is one value of a sector, which is written once: by whom, and who has read it.
type cluster struct {
	from    time.Duration // the write began
	first   time.Duration // earliest end and
	last    time.Duration // latest beginning of all that had the value
	limit   time.Duration // when the write can have happened at the latest
	seen    bool          // it was acknowledged or read
	flushed bool          // with a flush that has ended
}

// end is the earliest end.
func (c *cluster) end() time.Duration { return min(c.first, c.limit) }

func (h history) of(r register) map[uint64]*cluster {
	if h[r] == nil {
		h[r] = map[uint64]*cluster{0: {from: -1, first: -1, last: -1, limit: never, seen: true}}
	}
	return h[r]
}

func (a *access) registers(fn func(r register, k int)) {
	if a.scratch {
		return
	}
	for k := range a.n {
		fn(register{a.ID, a.first + k}, k)
	}
}

func (h history) begin(a *access) {
	limit := never
	if v := a.s.v; a.Generation < v.settled {
		limit = v.at
	}
	a.registers(func(r register, k int) {
		h.of(r)[a.values[k]] = &cluster{from: a.at, first: never, last: a.at, limit: limit}
	})
}

// limit says that a write which was not answered has happened by now, or never will.
func (h history) limit(a *access, now time.Duration) {
	if a.ended {
		return
	}
	a.registers(func(r register, k int) {
		if c := h.of(r)[a.values[k]]; c != nil {
			c.limit = min(c.limit, now)
		}
	})
}

func (h history) end(now time.Duration, a *access) {
	a.registers(func(r register, k int) {
		if c := h.of(r)[a.values[k]]; c != nil {
			c.seen, c.first = true, min(c.first, now)
		}
	})
}

// flushed notes what a flush has covered. If the partition was begun again after the
// write was answered, it cannot have begun with anything older.
func (h history) flushed(w *world, covers []*access) {
	for _, a := range covers {
		era := w.eras[a.Partition]
		a.registers(func(r register, k int) {
			if a.at >= era {
				if c := h.of(r)[a.values[k]]; c != nil {
					c.flushed = true
				}
				return
			}
			old := w.previous[r]
			written := old[a.values[k]]
			if written == nil {
				return // long ago
			}
			for v, c := range old {
				now := h.of(r)[v]
				if c.end() >= written.from || now == nil || now.from >= 0 {
					continue
				}
				if now.seen {
					w.fail("%v was read as %d, which is older than %d, whose flush succeeds", r, v, a.values[k])
				}
				delete(h.of(r), v)
			}
		})
	}
}

// restart begins a new history of registers whose members have all lost their memory.
// Each has one of the values that it may have had: none that was overwritten before
// something newer was flushed.
func (h history) restart(now time.Duration, concerned func(object.ID) bool) error {
	if err := h.check(); err != nil {
		return err
	}
	for r, old := range h {
		if !concerned(r.id) {
			continue
		}
		next := map[uint64]*cluster{}
		for v, c := range old {
			lost := false
			for _, w := range old {
				lost = lost || w.flushed && c.end() < w.from
			}
			switch {
			case lost:
			case c.first == never && c.limit > now: // it may come, or come again
				next[v] = &cluster{from: c.from, first: never, last: c.from, limit: c.limit}
			default:
				next[v] = &cluster{from: -1, first: -1, last: -1, limit: never}
			}
		}
		h[r] = next
	}
	return nil
}

// read notes what a read has found, which began at a.at and ends now.
func (h history) read(w *world, a *access) {
	now := w.now()
	a.registers(func(r register, k int) {
		c := h.of(r)[a.values[k]]
		switch {
		case a.values[k] == torn:
			w.fail("%v has content that is neither old nor new", r)
		case c == nil:
			w.fail("%v has %d, which nobody wrote there, or was overwritten before a flush", r, a.values[k])
		case now < c.from:
			w.fail("%v was read as %d before that was written", r, a.values[k])
		case c.limit < c.from:
			w.fail("%v has %d, which a former owner wrote after there was another one", r, a.values[k])
		default:
			c.seen, c.first, c.last = true, min(c.first, now), max(c.last, a.at)
		}
	})
}

// check says whether the history is linearizable. That is decided, not searched for: every
// value is written once, and so a register's history is linearizable iff no two zones of
// values contradict each other (Gibbons and Korach, "Testing shared memories", 1997). A
// forward zone, from the first end to the last beginning of what has the value, excludes
// every other one, and no backward zone lies within it. A search as porcupine's finds the
// same, with time that grows with the writes whose outcome is unknown, of which there are
// many here.
func (h history) check() error {
	type zone struct {
		value   uint64
		a, b    time.Duration
		forward bool
	}
	var zones []zone
	for r, values := range h {
		zones = zones[:0]
		for v, c := range values {
			switch end := c.end(); {
			case !c.seen:
			case end < c.last:
				zones = append(zones, zone{v, end, c.last, true})
			default:
				zones = append(zones, zone{v, c.last, end, false})
			}
		}
		for i := range zones {
			for _, y := range zones[i+1:] {
				x := zones[i]
				if !x.forward {
					x, y = y, x
				}
				if x.forward && (y.forward && x.a < y.b && y.a < x.b || !y.forward && x.a < y.a && y.b < x.b) {
					return fmt.Errorf("object %s, sector %d: values %d (%v) and %d (%v) cannot be put in order", r.id, r.sector, x.value, x, y.value, y)
				}
			}
		}
	}
	return nil
}

func (r register) String() string { return fmt.Sprintf("object %s, sector %d", r.id, r.sector) }
