package peer

import (
	"time"
)

// ticksPerBeat is how often connections are looked at between two heartbeats.
const ticksPerBeat = 2

// watch does for all connections what is due by time.
func (t *Transport) watch() {
	every := t.cfg.Heartbeat / ticksPerBeat
	ticker := time.NewTicker(every)
	defer ticker.Stop()
	last := time.Now()
	for n := 0; ; n++ {
		select {
		case <-ticker.C:
		case <-t.ctx.Done():
			return
		}
		now := time.Now()
		// If this process did not run for a while, what others sent waits in the sockets.
		paused := now.Sub(last) > t.cfg.Silence/2
		last = now
		t.tick(now, n%ticksPerBeat == 0, paused)
	}
}

func (t *Transport) tick(now time.Time, beat, paused bool) {
	t.mu.Lock()
	conns := make([]*conn, 0, len(t.conns))
	for c := range t.conns {
		conns = append(conns, c)
	}
	peers := make([]*Peer, 0, len(t.peers))
	for _, p := range t.peers {
		peers = append(peers, p)
	}
	t.mu.Unlock()
	for _, c := range conns {
		if paused {
			c.heard.Store(true)
		}
		c.tick(now, t.cfg.Silence, t.cfg.Stall)
		if beat {
			c.beat()
		}
	}
	for _, p := range peers {
		for i := range p.lanes {
			p.lanes[i].tick(now)
		}
	}
}
