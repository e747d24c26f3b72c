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

// holdings are who holds what. There is one for each partition of a volume, however many epochs there were, unless
// its last member has restarted between two: what was before is lost, and what came later is not.
type holdings struct {
	list []holding
	last map[place]int // in list: the one of the latest epoch
}

type place struct {
	volume object.VID
	group  object.Group
}

// add adds a holding, of a partition of which v is known.
func (s *holdings) add(h holding, v *View) {
	key := place{h.volume, h.group}
	i, ok := s.last[key]
	if ok {
		o := &s.list[i]
		switch {
		case o.epoch == h.epoch:
			o.peers = union(o.peers, h.peers)
			return
		case o.epoch < h.epoch && v.Restarted <= o.epoch:
			o.peers, o.epoch = union(v.stay(o.peers), h.peers), h.epoch
			return
		case o.epoch > h.epoch && v.Restarted <= h.epoch:
			o.peers = union(o.peers, v.stay(slices.Clone(h.peers)))
			return
		}
	}
	if s.last == nil {
		s.last = map[place]int{}
	}
	if !ok || s.list[i].epoch < h.epoch {
		s.last[key] = len(s.list)
	}
	h.peers = slices.Clone(h.peers)
	s.list = append(s.list, h)
}

// stay leaves those of the holders in an earlier epoch that have to make it durable still. It changes the list.
func (v *View) stay(peers []replica.Peer) []replica.Peer {
	return slices.DeleteFunc(peers, func(m replica.Peer) bool { return !slices.Contains(v.ISR, m) })
}

// hold notes the holders of what was answered.
func (g *Gateway) hold(h holding) {
	s := g.volumes[h.volume]
	if s == nil {
		s = new(holdings)
		g.volumes[h.volume] = s
	}
	s.add(h, &g.part(h.group).view)
}

// holdDoubtful notes who may hold a change that has failed, and may have been carried out all the same: what is read of it, a flush
// has to cover. That is all who have a part in the partition: what some of them have a new epoch brings to the others, and not durably, so it
// does not matter either whether the change was durable where it was made. In the present epoch, for they have it from there; but if
// the last member has restarted since, what it may have had is lost like what was answered.
func (g *Gateway) holdDoubtful(r *Request) {
	v := &r.part.view
	epoch := v.Epoch
	if v.Restarted > r.doubt {
		epoch = r.doubt
	}
	g.hold(holding{volume: r.Volume, group: r.Group, epoch: epoch, peers: slices.Concat(v.ISR, v.Learners)})
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
	f.Err, f.began, f.left = nil, now, holdings{}
	if f.All {
		for _, v := range slices.Sorted(maps.Keys(g.volumes)) {
			for _, h := range g.volumes[v].list {
				f.left.add(h, &g.part(h.group).view)
			}
		}
		clear(g.volumes)
	} else if s := g.volumes[f.Volume]; s != nil {
		f.left = *s
		delete(g.volumes, f.Volume)
	}
	own := holders(f.left.list)
	for _, o := range g.flushes {
		for _, h := range o.left.list {
			if (f.All || h.volume == f.Volume) && len(h.peers) > 0 {
				f.left.add(h, &g.part(h.group).view)
			}
		}
	}
	earlier := slices.Clone(g.flushes)
	g.flushes = append(g.flushes, f)
	for _, m := range holders(f.left.list) {
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
	for i := range f.left.list {
		f.left.list[i].peers = slices.DeleteFunc(f.left.list[i].peers, func(p replica.Peer) bool { return p == m })
	}
}

func (f *Flush) needs(m replica.Peer) bool {
	return slices.ContainsFunc(f.left.list, func(h holding) bool { return slices.Contains(h.peers, m) })
}

// progress ends the flushes that have nothing to wait for any more.
func (g *Gateway) progress(now replica.Time) {
	for _, f := range slices.Clone(g.flushes) {
		var err error
		for i := range f.left.list {
			if e := g.review(&f.left.list[i]); e != nil {
				err = e
			}
		}
		left := slices.ContainsFunc(f.left.list, func(h holding) bool { return len(h.peers) > 0 })
		switch {
		case err != nil:
			g.keep(f)
			g.flushed(f, err)
		case !left:
			g.flushed(f, nil)
		case now >= f.began+replica.Time(g.opt.Timeout):
			g.keep(f)
			g.flushed(f, fmt.Errorf("%w: not every node that holds data of volume %s has made it durable in time", object.ErrUnavailable, f.left.list[0].volume))
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
		h.peers = v.stay(h.peers)
	}
	return nil
}

// keep lets the next flush cover what this one has not.
func (g *Gateway) keep(f *Flush) {
	for _, h := range f.left.list {
		if len(h.peers) > 0 {
			g.hold(h)
		}
	}
}

func (g *Gateway) flushed(f *Flush, err error) {
	g.flushes = slices.DeleteFunc(g.flushes, func(o *Flush) bool { return o == f })
	f.Err, f.left = err, holdings{}
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
