// Package mailbox lets one goroutine at a time handle events that many post, without a
// goroutine of its own: who posts into an idle mailbox handles what comes until it is
// empty again.
package mailbox

import "sync"

// Mailbox hands events to a handler, one at a time, in the order in which they were
// posted. The zero value is ready.
type Mailbox[E any] struct {
	mu      sync.Mutex
	events  []E
	spare   []E
	running bool
}

// Post has handle called with e: by this goroutine before Post returns, or by the one
// that is handling events now. It is late then: who posted it may have gone on by the time
// it is handled. handle may post; what it posts is handled after it has returned, and is
// late too. All calls must give the same handle.
func (m *Mailbox[E]) Post(e E, handle func(e E, late bool)) {
	m.mu.Lock()
	if m.running {
		m.events = append(m.events, e)
		m.mu.Unlock()
		return
	}
	m.running = true
	m.mu.Unlock()
	handle(e, false)
	m.rest(handle)
}

// rest handles what was posted meanwhile.
func (m *Mailbox[E]) rest(handle func(e E, late bool)) {
	for {
		m.mu.Lock()
		batch := m.events
		if len(batch) == 0 {
			m.running = false
			m.mu.Unlock()
			return
		}
		m.events, m.spare = m.spare[:0], nil
		m.mu.Unlock()
		for i := range batch {
			handle(batch[i], true)
		}
		clear(batch)
		m.mu.Lock()
		if cap(batch) <= maxSpare {
			m.spare = batch[:0]
		}
		m.mu.Unlock()
	}
}

// maxSpare bounds the events whose memory an idle mailbox keeps.
const maxSpare = 256
