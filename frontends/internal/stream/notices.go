package stream

import (
	"slices"
	"sync"
	"sync/atomic"
)

// Hearer is a volume that says something once, and again to who comes later until somebody has heard it: see vdi.Volume.Heard.
type Hearer interface{ Heard() }

// Notices are answers of a session that say what volumes say once. Nothing tells when a client gets an answer; but when it sends
// something after one was sent, as when it ends the session as it should, it is there. An answer that is made for nobody, as that of
// a connection that is lost or of a command that is aborted, is not heard.
type Notices struct {
	some atomic.Bool // there are any
	mu   sync.Mutex
	list []notice
}

type notice struct {
	from Hearer
	sent bool
}

// Said is called when such an answer is made. From any goroutine, as the others.
func (n *Notices) Said(from Hearer) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if slices.ContainsFunc(n.list, func(x notice) bool { return x.from == from && !x.sent }) {
		return // of an answer that nobody got
	}
	n.list = append(n.list, notice{from: from})
	n.some.Store(true)
}

// Sent is called when it was sent.
func (n *Notices) Sent(from Hearer) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for i := range n.list {
		if n.list[i].from == from {
			n.list[i].sent = true
		}
	}
}

// Heard is called when the client has shown that it is there.
func (n *Notices) Heard() {
	if !n.some.Load() {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.list = slices.DeleteFunc(n.list, func(x notice) bool {
		if x.sent {
			x.from.Heard()
		}
		return x.sent
	})
	n.some.Store(len(n.list) > 0)
}
