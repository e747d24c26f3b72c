package replicas

import (
	"context"
	"maps"
	"slices"
	"sync"
	"time"

	"sheepdog/cluster/internal/peer"
	"sheepdog/cluster/internal/replica"
	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// spaces learns which nodes have little space left, and for what. A member says so with
// its answers to changes; and each node asks the others, so that it hears also when there is
// space again, or before it sends anything.
type spaces struct {
	// Of the goroutine that ticks.
	asked  replica.Time
	strays strays
	hungry map[state.NodeID]bool // as it was told last

	mu   sync.Mutex
	busy map[replica.Peer]bool
}

// spaceEvery is how often the others are asked.
const spaceEvery = replica.Time(time.Second)

// maxSpace bounds an answer, in bytes: room for it is kept from clients' changes.
const maxSpace = 4 + 3*state.MaxPartitions

// tick asks all, if it is time.
func (s *spaces) tick(r *Replicas) {
	now := r.now()
	if !r.current.Load() || now < s.asked+spaceEvery {
		return
	}
	s.asked = now
	r.mu.RLock()
	v := r.view
	r.mu.RUnlock()
	s.strays.look(r)
	r.leaveDisks()
	s.tellHungry(r)
	r.tell(r.cfg.Self, r.cfg.Store.Tight, r.cfg.Store.Failed)
	for _, n := range v.Nodes {
		if n.ID != r.cfg.Self.Node && n.State == state.NodeUp && len(n.Disks) > 0 {
			s.ask(r, replica.Peer{Node: n.ID, Incarnation: n.Incarnation})
		}
	}
}

// tellHungry logs when recovery of a node begins to wait for space, and when it does so no more.
func (s *spaces) tellHungry(r *Replicas) {
	hungry := map[state.NodeID]bool{}
	for _, p := range r.all() {
		if list := p.learning.Load(); list != nil {
			for _, l := range *list {
				if l.NoSpace {
					hungry[l.Node] = true
				}
			}
		}
	}
	for _, id := range slices.Sorted(maps.Keys(hungry)) {
		if !s.hungry[id] {
			r.cfg.Logger.Warn("recovery of a node waits for space there: what needs none is brought; add disks or nodes, or delete volumes or snapshots", "node", id)
		}
	}
	for _, id := range slices.Sorted(maps.Keys(s.hungry)) {
		if !hungry[id] {
			r.cfg.Logger.Info("recovery of a node waits for space no more", "node", id)
		}
	}
	s.hungry = hungry
}

// strays are the partitions of which nothing but a mark is here. Where a disk goes they have to leave it too: what
// is left of them, and how far it went, must not be taken for what is on the next disk.
type strays struct {
	known bool
	list  []object.Group
}

// look has the strays looked at whose disk is out of service, or to be taken out. It is called when the node is
// current, that is, when there is a part for all that anything else is known of: few are left, mostly none.
func (s *strays) look(r *Replicas) {
	if !s.known {
		s.known, s.list = true, slices.SortedFunc(maps.Keys(r.cfg.Marks), compareGroups)
	}
	s.list = slices.DeleteFunc(s.list, func(g object.Group) bool {
		r.mu.RLock()
		p := r.parts[g]
		r.mu.RUnlock()
		return p != nil || r.cfg.Store.Failed(g) && r.part(g) != nil
	})
}

// leaveDisks has partitions leave disks that are out of service, or to be taken out, also those
// that nothing else happens to.
func (r *Replicas) leaveDisks() {
	for _, p := range r.all() {
		if !p.holder.Load() && r.cfg.Store.Failed(p.group) {
			p.post(event{kind: evLeave})
		}
	}
}

func (s *spaces) ask(r *Replicas, to replica.Peer) {
	s.mu.Lock()
	if s.busy[to] {
		s.mu.Unlock()
		return
	}
	if s.busy == nil {
		s.busy = map[replica.Peer]bool{}
	}
	s.busy[to] = true
	s.mu.Unlock()
	q := question{route: route{to: to.Incarnation}}
	c := &peer.Call{Class: peer.Commit, Op: opSpace, Head: q.append(nil), Want: maxSpace, Deadline: r.deadline()}
	c.Done = func(c *peer.Call) {
		tight, failed, err := decodeSpace(c.ReplyData)
		if c.Err == nil && err == nil {
			r.tell(to, func(g object.Group) bool { return tight[g] }, func(g object.Group) bool { return failed[g] })
		}
		c.Release()
		s.mu.Lock()
		delete(s.busy, to)
		s.mu.Unlock()
	}
	r.call(to, c)
}

// tell tells the partitions that this node leads about the space and the disks of a node.
func (r *Replicas) tell(of replica.Peer, tight, failed func(object.Group) bool) {
	for _, p := range r.all() {
		if !p.primary.Load() {
			continue
		}
		if t := tight(p.group); t || p.tight.Load() {
			p.post(event{kind: evSpace, peer: of, tight: t})
		}
		if failed(p.group) {
			p.post(event{kind: evFailed, peer: of})
		}
	}
}

// space answers opSpace.
func (in *incoming) space() error {
	if in.question.to != in.r.cfg.Self.Incarnation {
		return replica.ErrEpoch
	}
	var tight, failed []object.Group
	for _, p := range in.r.all() {
		if len(failed) == state.MaxPartitions {
			break
		}
		if in.r.cfg.Store.Tight(p.group) {
			tight = append(tight, p.group)
		}
		if in.r.cfg.Store.Failed(p.group) {
			failed = append(failed, p.group)
		}
	}
	tight = tight[:min(len(tight), state.MaxPartitions-len(failed))]
	in.req.ReplyData = appendGroups(appendGroups(le.AppendUint32(in.req.ReplyData[:0], uint32(len(tight))), tight), failed)
	in.req.Reply(nil)
	return nil
}

// decodeSpace decodes the reply to opSpace: how many partitions have little space left,
// those, and those whose disk is out of service.
func decodeSpace(b []byte) (tight, failed map[object.Group]bool, err error) {
	d := decoder{b: b}
	n := uint64(d.u32()) * 3
	if d.err != nil || n > uint64(len(d.b)) {
		return nil, nil, errMessage
	}
	if tight, err = decodeGroups(d.b[:n]); err != nil {
		return nil, nil, err
	}
	failed, err = decodeGroups(d.b[n:])
	return tight, failed, err
}

// yield carries out Yield.
func (p *part) yield(e *replica.Effect) {
	to, id, epoch := e.To, e.ID, e.Epoch
	p.r.works.Go(func() {
		gave, err := p.giveUp(to, route{p.group, epoch, to.Incarnation}, id)
		if gave {
			p.r.cfg.Logger.Warn("a change that not every replica had the space for is given up", "object", object.Key{Group: p.group, ID: id}.String(), "node", to.Node)
		}
		p.post(event{kind: evAnswered, answer: func(now replica.Time, q *replica.Partition) {
			q.Yielded(now, to, id, epoch, gave, err)
		}})
	})
}

// giveUp makes holes where another node has some, and reports whether it made any.
func (p *part) giveUp(to replica.Peer, m route, id object.ID) (gave bool, err error) {
	r := p.r
	key := object.Key{Group: p.group, ID: id}
	info, own, err := r.look(r.ctx, key)
	if err != nil {
		return false, err
	}
	src := source{r: r, from: to, route: m, id: id}
	_, theirs, err := src.sums(r.ctx, own)
	switch {
	case isNotFound(err):
		return true, r.cfg.Store.Delete(r.ctx, key)
	case err != nil:
		return false, err
	case len(theirs) != len(own):
		return false, errMessage
	}
	t := transfer{r: r, info: info, key: key}
	for b := 0; b < len(own); b++ {
		n := 0
		for b+n < len(own) && theirs[b+n] == 0 && own[b+n] != 0 {
			n++
		}
		if n == 0 {
			continue
		}
		if err := t.change(object.OpDiscard, uint32(b)*object.BlockSize, uint32(n)*object.BlockSize, nil); err != nil {
			return gave, err
		}
		gave = true
		b += n - 1
	}
	return gave, nil
}

// purgesAtATime bounds the partitions that are being removed.
const purgesAtATime = 4

// purge carries out Purge.
func (p *part) purge(e *replica.Effect) {
	epoch := e.Epoch
	p.marked = false
	p.mark.Store(new(replica.Mark))
	p.r.works.Go(func() {
		err := p.forget()
		if err == nil {
			err = p.remove(uint64(epoch))
		}
		p.post(event{kind: evAnswered, answer: func(now replica.Time, q *replica.Partition) { q.Purged(now, epoch, err) }})
	})
}

// forget sees to it that no mark of the partition is kept.
func (p *part) forget() error {
	for p.r.cfg.KeepMarks != nil {
		if err := p.r.cfg.KeepMarks(p.r.ctx); err == nil {
			return nil
		}
		select {
		case <-time.After(forgetPause):
		case <-p.r.ctx.Done():
			return object.ErrClosed
		}
	}
	return nil
}

// forgetPause is the time between attempts to have marks kept.
const forgetPause = time.Second

// remove removes all objects of a partition, as long as the epoch lasts.
func (p *part) remove(epoch uint64) error {
	r := p.r
	t := time.NewTicker(tickEvery)
	defer t.Stop()
	for {
		select {
		case r.purging <- struct{}{}:
			defer func() { <-r.purging }()
			return p.removeAll(r.ctx, epoch)
		case <-r.ctx.Done():
			return object.ErrClosed
		case <-t.C:
			if p.latest.Load() > epoch {
				return replica.ErrRetry
			}
		}
	}
}

func (p *part) removeAll(ctx context.Context, epoch uint64) error {
	r := p.r
	ids, err := r.objects(p.group)
	if err != nil {
		return err
	}
	for _, id := range ids {
		if p.latest.Load() > epoch {
			return replica.ErrRetry
		}
		if err := r.cfg.Store.Delete(ctx, object.Key{Group: p.group, ID: id}); err != nil {
			return err
		}
	}
	if len(ids) > 0 {
		r.Count.Purged.Add(uint64(len(ids)))
		r.cfg.Logger.Info("replicas of a partition that other nodes hold were removed", "partition", p.group.String(), "objects", len(ids))
	}
	return nil
}
