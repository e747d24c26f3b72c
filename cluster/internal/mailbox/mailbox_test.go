package mailbox

import (
	"sync"
	"testing"
)

// Each event is handled once, by one goroutine at a time, in the order of its poster;
// also events that the handler posts.
func TestOrder(t *testing.T) {
	const posters, each = 8, 2000
	type event struct{ poster, n int }
	var (
		m      Mailbox[event]
		busy   bool // not guarded: the race detector sees two handlers at a time
		last   [posters * 2]int
		total  int
		handle func(e event, late bool)
	)
	handle = func(e event, late bool) {
		if busy {
			t.Error("two handlers at a time")
		}
		if !late && e.poster >= posters {
			t.Error("what the handler posts is not late")
		}
		busy = true
		if e.n != last[e.poster]+1 {
			t.Errorf("event %d of %d came after %d", e.n, e.poster, last[e.poster])
		}
		last[e.poster] = e.n
		total++
		if e.poster < posters {
			m.Post(event{e.poster + posters, e.n}, handle)
		}
		busy = false
	}
	var wg sync.WaitGroup
	for p := range posters {
		wg.Go(func() {
			for n := range each {
				m.Post(event{p, n + 1}, handle)
			}
		})
	}
	wg.Wait()
	m.Post(event{0, each + 1}, handle) // is handled by whoever runs; nobody does now
	if want := 2 * (posters*each + 1); total != want {
		t.Errorf("%d events handled, not %d", total, want)
	}
}

func TestNothingAllocated(t *testing.T) {
	var m Mailbox[[16]uint64]
	n := 0
	handle := func(_ [16]uint64, late bool) {
		if n++; late {
			t.Error("what is handled by who posts it is late")
		}
	}
	if a := testing.AllocsPerRun(1000, func() { m.Post([16]uint64{}, handle) }); a > 0 {
		t.Errorf("%v allocations per event", a)
	}
}
