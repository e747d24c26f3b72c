package peer

import (
	"context"
	"fmt"
	"time"
)

// Peer is another node. Its methods may be called from any goroutine.
type Peer struct {
	t      *Transport
	name   string
	lanes  [classes]lane
	closed context.Context
	close  context.CancelFunc
}

func newPeer(t *Transport, name string) *Peer {
	p := &Peer{t: t, name: name}
	p.closed, p.close = context.WithCancel(t.ctx)
	for class := range classes {
		p.lanes[class].init(p, class)
	}
	return p
}

// Name returns the node's name.
func (p *Peer) Name() string { return p.name }

// Submit begins a call: see Call. It may be held back until Kick. The first call of a
// class connects and waits for it; while connecting has failed and until it succeeds,
// calls fail at once.
func (p *Peer) Submit(c *Call) {
	if c.Class >= classes {
		c.abort(ErrUnsupported)
		return
	}
	p.lanes[c.Class].submit(c)
}

// Kick sends what was submitted, as far as that needs no waiting, and leaves the rest to
// others.
func (p *Peer) Kick() {
	for i := range p.lanes {
		p.lanes[i].kick()
	}
}

// Connect connects for a class before the first call.
func (p *Peer) Connect(class Class) {
	l := &p.lanes[class]
	l.mu.Lock()
	l.open()
	l.mu.Unlock()
}

// RTT returns the latest round trip of a heartbeat, by the class that is expected to
// wait least; 0 if it is not known.
func (p *Peer) RTT() time.Duration {
	for _, class := range [...]Class{Control, Commit, Data, Bulk} {
		if d := p.lanes[class].rtt(); d > 0 {
			return d
		}
	}
	return 0
}

// Unreached is for how long this node has tried in vain to connect for requests of clients or
// what follows from them; 0: it is connected, or has no need to be, or the node's machine is
// there.
func (p *Peer) Unreached() (d time.Duration) {
	for _, class := range [...]Class{Commit, Data} {
		l := &p.lanes[class]
		l.mu.Lock()
		if !l.lost.IsZero() {
			d = max(d, time.Since(l.lost))
		}
		l.mu.Unlock()
	}
	return d
}

// Identity returns who the node said it is when a class's connection was made; false if
// there is none now.
func (p *Peer) Identity(class Class) (Identity, bool) { return p.lanes[class].identity() }

// shut fails all calls, and further ones.
func (p *Peer) shut() {
	p.close()
	for i := range p.lanes {
		p.lanes[i].close()
	}
}

// connect makes a connection for a class.
func (p *Peer) connect(class Class) (*conn, error) {
	s, remote, seed, err := p.t.dial(p.closed, p.name, class.kind())
	if err != nil {
		return nil, fmt.Errorf("connect: %w", err)
	}
	c := newConn(s, class, remote, seed, nil)
	c.settled = p.t.cfg.Handler.Kick
	p.t.running.Go(c.out.sendLoop)
	return c, nil
}
