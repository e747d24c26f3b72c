package gateway

import (
	"fmt"
	"maps"
	"slices"

	"sheepdog/cluster/internal/replica"
	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// holding says who holds changes of a partition that may not be durable.
type holding struct {
	volume object.VID
	group  object.Group
	epoch  state.Epoch    // in which they were answered
	peers  []replica.Peer // not known to have made them durable
}

// syncing is a Sync under way, and who waits for one that begins later.
type syncing struct {
	running []*Flush // covered by the one under way
	next    []*Flush // came after it had begun
	retryAt replica.Time
}

// hold notes the holders of what was answered.
func (g *Gateway) hold(h holding) { g.volumes[h.volume] = with(g.volumes[h.volume], h) }

// with adds to a list who holds something, with one holding for each epoch of a partition.
func with(list []holding, h holding) []holding {
	for i := range list {
		if list[i].volume == h.volume && list[i].group == h.group && list[i].epoch == h.epoch {
			list[i].peers = union(list[i].peers, h.peers)
			return list
		}
	}
	h.peers = slices.Clone(h.peers)
	return append(list, h)
}

func union(a, b []replica.Peer) []replica.Peer {
	for _, m := range b {
		if !slices.Contains(a, m) {
			a = append(a, m)
		}
	}
	return a
}

// Flush starts a flush: of all changes of the volume that were answered before. What other
// flushes wait for is waited for too, for this one promises the same.
func (g *Gateway) Flush(now replica.Time, f *Flush) {
	f.Err, f.began, f.left = nil, now, nil
	if f.All {
		for _, v := range slices.Sorted(maps.Keys(g.volumes)) {
			f.left = append(f.left, g.volumes[v]...)
		}
		clear(g.volumes)
	} else {
		f.left = g.volumes[f.Volume]
		delete(g.volumes, f.Volume)
	}
	own := holders(f.left)
	for _, o := range g.flushes {
		for _, h := range o.left {
			if (f.All || h.volume == f.Volume) && len(h.peers) > 0 {
				f.left = with(f.left, h)
			}
		}
	}
	earlier := slices.Clone(g.flushes)
	g.flushes = append(g.flushes, f)
	for _, m := range holders(f.left) {
		g.sync(m, f, earlier, !slices.Contains(own, m))
	}
	g.progress(now)
}

// holders are the nodes that hold any of it.
func holders(list []holding) (peers []replica.Peer) {
	for _, h := range list {
		peers = union(peers, h.peers)
	}
	return peers
}

// sync asks a node for a sync that begins after now, or after what earlier flushes wait
// for was answered if it is wanted for nothing else: then the sync under way will do, if
// it does for all of them.
func (g *Gateway) sync(m replica.Peer, f *Flush, earlier []*Flush, shared bool) {
	s := g.syncs[m]
	switch {
	case s == nil:
		g.syncs[m] = &syncing{running: []*Flush{f}}
		g.emit(Effect{Kind: Sync, To: m})
	case shared && !slices.ContainsFunc(earlier, func(o *Flush) bool { return o.needs(m) && !slices.Contains(s.running, o) }):
		s.running = append(s.running, f)
	default:
		s.next = append(s.next, f)
	}
}

// Synced says how a Sync has ended.
func (g *Gateway) Synced(now replica.Time, m replica.Peer, err error) {
	s := g.syncs[m]
	if err != nil {
		s.next = append(s.next, s.running...)
		s.running = nil
		s.retryAt = now + replica.Time(g.opt.Retry)
		g.progress(now)
		return
	}
	for _, f := range s.running {
		f.durable(m)
	}
	s.running = nil
	g.progress(now)
	g.resync(m, s)
}

// resync begins the next sync of a node, if somebody still waits for it.
func (g *Gateway) resync(m replica.Peer, s *syncing) {
	s.running, s.next = slices.DeleteFunc(s.next, func(f *Flush) bool { return !f.needs(m) }), nil
	s.retryAt = 0
	if len(s.running) == 0 {
		delete(g.syncs, m)
		return
	}
	g.emit(Effect{Kind: Sync, To: m})
}

// durable notes that a node has made durable what the flush covers.
func (f *Flush) durable(m replica.Peer) {
	for i := range f.left {
		f.left[i].peers = slices.DeleteFunc(f.left[i].peers, func(p replica.Peer) bool { return p == m })
	}
}

func (f *Flush) needs(m replica.Peer) bool {
	return slices.ContainsFunc(f.left, func(h holding) bool { return slices.Contains(h.peers, m) })
}

// progress ends the flushes that have nothing to wait for any more.
func (g *Gateway) progress(now replica.Time) {
	for _, f := range slices.Clone(g.flushes) {
		var err error
		for i := range f.left {
			if e := g.review(&f.left[i]); e != nil {
				err = e
			}
		}
		left := slices.ContainsFunc(f.left, func(h holding) bool { return len(h.peers) > 0 })
		switch {
		case err != nil:
			g.keep(f)
			g.flushed(f, err)
		case !left:
			g.flushed(f, nil)
		case now >= f.began+replica.Time(g.opt.Timeout):
			g.keep(f)
			g.flushed(f, fmt.Errorf("%w: not every node that holds data of volume %s has made it durable in time", object.ErrUnavailable, f.left[0].volume))
		}
	}
}

// review drops holders that have no part in the partition any more.
func (g *Gateway) review(h *holding) error {
	v := &g.part(h.group).view
	if v.Restarted > h.epoch && len(h.peers) > 0 {
		h.peers = nil
		return fmt.Errorf("%w: the last member of partition %s has restarted: what was written before may be lost", object.ErrLost, h.group)
	}
	if v.Epoch > h.epoch {
		h.peers = slices.DeleteFunc(h.peers, func(m replica.Peer) bool { return !slices.Contains(v.ISR, m) })
	}
	return nil
}

// keep lets the next flush cover what this one has not.
func (g *Gateway) keep(f *Flush) {
	for _, h := range f.left {
		if len(h.peers) > 0 {
			g.hold(h)
		}
	}
}

func (g *Gateway) flushed(f *Flush, err error) {
	g.flushes = slices.DeleteFunc(g.flushes, func(o *Flush) bool { return o == f })
	f.Err, f.left = err, nil
	g.emit(Effect{Kind: Flushed, Flush: f})
}

// tickFlushes repeats what failed, and gives up in time.
func (g *Gateway) tickFlushes(now replica.Time) {
	g.progress(now)
	peers := slices.SortedFunc(maps.Keys(g.syncs), func(a, b replica.Peer) int { return int(a.Node) - int(b.Node) })
	for _, m := range peers {
		if s := g.syncs[m]; s.retryAt != 0 && now >= s.retryAt {
			g.resync(m, s)
		}
	}
}
