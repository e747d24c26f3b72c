package replicas

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/zeebo/xxh3"

	"sheepdog/cluster/internal/peer"
	"sheepdog/cluster/internal/replica"
	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// shortReport is how much room for a report is kept at first, in bytes. When a node comes or
// goes there are thousands of surveys at the same time, and nearly all reports are empty;
// with room for the longest one, a few would fill what both sides have for calls.
const shortReport = 4 << 10

// ask carries out Survey and Ask.
func (p *part) ask(e *replica.Effect) {
	p.askFor(e.To, e.Epoch, e.Session, e.Kind == replica.Ask, shortReport)
}

func (p *part) askFor(to replica.Peer, epoch state.Epoch, session uint32, asks bool, room int) {
	q := question{route{p.group, epoch, to.Incarnation}, session}
	c := &peer.Call{Class: peer.Commit, Op: opSurvey, Head: q.append(nil), Want: room, Deadline: p.r.deadline()}
	if asks {
		c.Class, c.Op = peer.Bulk, opAsk
	}
	p.do(to, c, func(now replica.Time, q *replica.Partition, c *peer.Call) {
		err := c.Err
		if errors.Is(err, peer.ErrTooLong) && room < peer.MaxData {
			p.askFor(to, epoch, session, asks, peer.MaxData)
			return
		}
		var report replica.Report
		var have []object.ID
		if err == nil {
			report, have, err = decodeReport(c.ReplyData)
		}
		if asks {
			p.r.recovery.tried(now, to, false, err)
			q.Asked(now, to, epoch, report, have, err)
		} else {
			q.Surveyed(now, to, epoch, report, err)
		}
	})
}

// list carries out List.
func (p *part) list(e *replica.Effect) {
	to, epoch, mark := e.To, e.Epoch, e.Mark
	p.r.works.Go(func() {
		var changed, have []object.ID
		err := p.r.cfg.Store.List(p.r.ctx, p.group, func(i object.Info) error {
			have = append(have, i.Key.ID)
			if i.Uncertain || mark.Less(i.Version) {
				changed = append(changed, i.Key.ID)
			}
			return nil
		})
		p.post(event{kind: evAnswered, answer: func(now replica.Time, q *replica.Partition) {
			q.Listed(now, to, epoch, changed, have, err)
		}})
	})
}

// sync carries out SyncPeer.
func (p *part) sync(e *replica.Effect) {
	to, epoch := e.To, e.Epoch
	burden := int64(0)
	if p.brought {
		p.brought, burden = false, 1
	}
	p.r.settling.Add(burden)
	c := p.r.syncCall(to, p.group, epoch)
	p.do(to, c, func(now replica.Time, q *replica.Partition, c *peer.Call) {
		if p.r.settling.Add(-burden); burden > 0 {
			signal(p.r.wake)
		}
		p.r.recovery.tried(now, to, true, c.Err)
		q.Synced(now, to, epoch, c.Err)
	})
}

// syncCall is for a group alone if an epoch is given: then it fails if the disk that the group is on is out of service.
func (r *Replicas) syncCall(to replica.Peer, g object.Group, epoch state.Epoch) *peer.Call {
	q := question{route: route{g, epoch, to.Incarnation}}
	return &peer.Call{Class: peer.Commit, Op: opSync, Head: q.append(nil)}
}

// Sync makes durable all that a node has stored before, this one included, and then calls
// done. It may be held back until Kick.
func (r *Replicas) Sync(to replica.Peer, done func(error)) {
	if to == r.cfg.Self {
		r.syncHere(done)
		return
	}
	c := r.syncCall(to, object.Group{}, 0)
	c.Done = func(c *peer.Call) { done(c.Err) }
	r.call(to, c)
}

// syncHere makes durable what this node's store has. A disk that is out of service fails it
// only as long as this node counts as having something that is there.
func (r *Replicas) syncHere(done func(error)) {
	r.cfg.Store.Submit(&object.Request{Op: object.OpSync, Done: func(w *object.Request) {
		if !errors.Is(w.Err, object.ErrIO) {
			done(w.Err)
			return
		}
		err := w.Err
		r.works.Go(func() {
			if !r.countsOnFailed() {
				err = r.write(&object.Request{Op: object.OpSync, Flags: object.FlagWorking})
			}
			done(err)
		})
	}})
}

// countsOnFailed reports whether this node counts as having partitions whose disk is out of
// service.
func (r *Replicas) countsOnFailed() bool {
	for _, p := range r.all() {
		if p.holder.Load() && r.cfg.Store.Failed(p.group) {
			return true
		}
	}
	return false
}

// repair carries out Repair: the other node takes what is different from here.
func (p *part) repair(e *replica.Effect) {
	op, to, id, epoch := e.Op, e.To, e.ID, e.Epoch
	m := change{route: route{p.group, epoch, to.Incarnation}, session: e.Session, mark: e.Mark, action: action{id: id}}
	c := &peer.Call{Class: peer.Commit, Op: opRepair, Head: m.append(nil)}
	if op != nil {
		c.Class, p.brought = peer.Bulk, true
	}
	p.do(to, c, func(now replica.Time, q *replica.Partition, c *peer.Call) {
		if d := (decoder{b: c.ReplyHead}); op != nil && c.Err == nil {
			p.r.recovery.brought(now, to, d.u64())
		} else if op != nil {
			p.r.recovery.tried(now, to, false, c.Err)
		}
		q.Repaired(now, op, to, id, epoch, unknown(c.Err))
	})
}

// repair makes an object of this node like the primary's.
func (in *incoming) repair() (err error) {
	r, m := in.r, &in.change
	r.Count.Repaired.Add(1)
	key := object.Key{Group: m.group, ID: m.id}
	src := source{r: r, from: in.from, route: route{m.group, m.epoch, in.from.Incarnation}, id: m.id, moved: &in.moved}
	mine, own, err := r.look(r.ctx, key)
	r.distrust(key, own)
	theirs, sums, failure := src.sums(r.ctx, own)
	if isNotFound(failure) {
		if err := r.cfg.Store.Delete(r.ctx, key); err != nil {
			return err
		}
		r.damaged.Delete(key)
		return nil
	}
	if failure != nil {
		return failure
	}
	switch {
	case isNotFound(err):
	case errors.Is(err, object.ErrCorrupt) || err == nil && mine.SizeShift != theirs.SizeShift:
		r.damaged.Store(key, true) // what is missing here is not missing for want of space
		// The object is as old as the mark, or older: half of it would pass for the whole after a crash.
		if err := in.part.forget(); err != nil {
			return err
		}
		if err := r.cfg.Store.Delete(r.ctx, key); err != nil {
			return err
		}
		own = nil
	case err != nil:
		return err
	}
	t := transfer{r: r, src: &src, info: theirs, key: key, flags: in.frugal()}
	defer func() {
		if err == nil {
			r.damaged.Delete(key)
		}
	}()
	return t.run(sums, own, err == nil && own != nil && mine.Version == theirs.Version)
}

// frugal is what keeps recovery from filling a disk: a partition that is new to this node gets nothing more where little space
// is left. One in which this node was in sync does: it would have taken as much had it not been away.
func (in *incoming) frugal() object.Flags {
	if in.change.session == 0 || in.part.returns.Load() || !in.r.cfg.Store.Tight(in.part.group) {
		return 0
	}
	return object.FlagNoGrow
}

func isNotFound(err error) bool { return errors.Is(err, object.ErrNotFound) }

// look finds out what this node has of an object.
func (r *Replicas) look(ctx context.Context, k object.Key) (object.Info, []uint64, error) {
	info, err := r.cfg.Store.Stat(ctx, k)
	if err != nil {
		return info, nil, err
	}
	sums, err := r.cfg.Store.Sums(ctx, k)
	return info, sums, err
}

// rotting is a Store that knows which blocks are corrupt although their checksums are there.
type rotting interface{ RottenBlocks(object.Key) []uint32 }

// rottenSum is a checksum that no content is believed to have.
const rottenSum = ^uint64(0)

// distrust makes a table of this node say of blocks that are known to be corrupt that they
// are like nobody's: so a comparison finds them, and a repair takes them from the primary.
func (r *Replicas) distrust(k object.Key, sums []uint64) {
	s, ok := r.cfg.Store.(rotting)
	if !ok {
		return
	}
	for _, b := range s.RottenBlocks(k) {
		if int(b) < len(sums) {
			sums[b] = rottenSum
		}
	}
}

// source is an object on another node.
type source struct {
	r     *Replicas
	from  replica.Peer
	route route
	id    object.ID
	moved *atomic.Uint64 // bytes that came from there or went there; may be nil
}

func (s *source) count(n int) {
	if s.moved != nil {
		s.moved.Add(uint64(n))
	}
	s.r.Count.MovedBytes.Add(uint64(n))
}

// wait makes a call and waits for it, or for ctx. Then the call, and all that it uses, is left to the transport: it ends with
// the connection at the latest, which may be when what the other node waits for ends.
func (r *Replicas) wait(ctx context.Context, to replica.Peer, c *peer.Call) error {
	done := make(chan struct{})
	c.Done = func(*peer.Call) { close(done) }
	r.call(to, c)
	r.kickSoon()
	select {
	case <-done:
		return c.Err
	case <-ctx.Done():
		return fmt.Errorf("%w: %w", object.ErrClosed, ctx.Err())
	}
}

// sums asks what the object is like there. own are the checksums here, nil if there is
// nothing: what is equal does not travel.
func (s *source) sums(ctx context.Context, own []uint64) (object.Info, []uint64, error) {
	m := pull{route: s.route, id: s.id}
	c := &peer.Call{Class: peer.Bulk, Op: opSums, Head: m.append(nil), Data: appendSums(nil, digests(own)), Want: peer.MaxData}
	if err := s.r.wait(ctx, s.from, c); err != nil {
		return object.Info{}, nil, err
	}
	defer c.Release()
	s.count(len(c.Data) + len(c.ReplyData))
	d := decoder{b: c.ReplyHead}
	info := d.info(s.route.group)
	if err := d.end(); err != nil {
		return info, nil, err
	}
	if info.SizeShift < object.MinSizeShift || info.SizeShift > object.MaxSizeShift {
		return info, nil, errMessage
	}
	sums := make([]uint64, 1<<(info.SizeShift-blockShift))
	if len(own) == len(sums) {
		copy(sums, own)
	}
	return info, sums, decodeDifference(c.ReplyData, sums)
}

const blockShift = 12

// blocks takes content of the object: whole blocks, verified.
func (s *source) blocks(ctx context.Context, off uint32, data []byte) error {
	m := pull{s.route, s.id, off, uint32(len(data))}
	c := &peer.Call{Class: peer.Bulk, Op: opBlocks, Head: m.append(nil), ReplyData: data, Want: len(data)}
	if err := s.r.wait(ctx, s.from, c); err != nil {
		return err
	}
	d := decoder{b: c.ReplyHead}
	if sum := d.u64(); d.end() != nil || len(c.ReplyData) != len(data) || xxh3.Hash(data) != sum {
		return errDamaged
	}
	s.count(len(data))
	return nil
}

// transfer brings an object of this node up to date.
type transfer struct {
	r     *Replicas
	src   *source
	info  object.Info // the source's
	key   object.Key
	flags object.Flags // of what is written
}

// pieceBytes is how much content travels at once.
const pieceBytes = 1 << 20

// run takes what differs, holes first: they give back space for the rest. If nothing differs, but versions, the object
// still gets the source's: who lists what has changed goes by it.
func (t *transfer) run(theirs, own []uint64, current bool) error {
	exists := own != nil
	if !exists {
		own = make([]uint64, len(theirs))
	}
	holes, err := t.take(theirs, own, true)
	if err != nil {
		return err
	}
	content, err := t.take(theirs, own, false)
	if err != nil || holes || content || current {
		return err
	}
	return t.touch(theirs, exists)
}

// take takes the holes that differ, or the content, and reports whether there was any.
func (t *transfer) take(theirs, own []uint64, holes bool) (wrote bool, err error) {
	var buf []byte
	for b := 0; b < len(theirs); {
		if theirs[b] == own[b] || (theirs[b] == 0) != holes {
			b++
			continue
		}
		n := 1
		for b+n < len(theirs) && theirs[b+n] != own[b+n] && (theirs[b+n] == 0) == (theirs[b] == 0) && n < pieceBytes/object.BlockSize {
			n++
		}
		off, length := uint32(b)*object.BlockSize, n*object.BlockSize
		if err := t.r.ctx.Err(); err != nil {
			return wrote, object.ErrClosed
		}
		if holes {
			if err := t.change(object.OpDiscard, off, uint32(length), nil); err != nil {
				return wrote, err
			}
		} else {
			if cap(buf) < length {
				buf = make([]byte, length)
			}
			buf = buf[:length]
			if err := t.src.blocks(t.r.ctx, off, buf); err != nil {
				return wrote, err
			}
			if err := t.change(object.OpWrite, off, uint32(length), buf); err != nil {
				return wrote, err
			}
			t.r.Count.RepairedBytes.Add(uint64(length))
		}
		wrote = true
		b += n
	}
	return wrote, nil
}

// touch gives the object its version, by writing something that does not change it.
func (t *transfer) touch(sums []uint64, exists bool) error {
	buf := make([]byte, object.BlockSize)
	for b, sum := range sums {
		if sum == 0 {
			continue
		}
		if err := t.src.blocks(t.r.ctx, uint32(b)*object.BlockSize, buf); err != nil {
			return err
		}
		return t.change(object.OpWrite, uint32(b)*object.BlockSize, object.BlockSize, buf)
	}
	if exists {
		t.flags |= object.FlagTouch
		return t.change(object.OpDiscard, 0, object.BlockSize, nil)
	}
	// It has no content: made with some, it has none again, and exists.
	if err := t.change(object.OpWrite, 0, object.BlockSize, buf); err != nil {
		return err
	}
	return t.change(object.OpDiscard, 0, object.BlockSize, nil)
}

// change writes here and waits.
func (t *transfer) change(op object.Op, off, n uint32, data []byte) error {
	return t.r.write(&object.Request{
		Op: op, Flags: t.flags, SizeShift: t.info.SizeShift, ID: t.key.ID, Policy: t.key.Group.Policy, Partition: t.key.Group.Partition,
		Off: off, Len: n, Data: data, Version: t.info.Version,
	})
}

// write submits a request to the store and waits for it.
func (r *Replicas) write(w *object.Request) error {
	var wg sync.WaitGroup
	wg.Add(1)
	w.Done = func(*object.Request) { wg.Done() }
	r.cfg.Store.Submit(w)
	r.cfg.Store.Kick()
	wg.Wait()
	return w.Err
}

// serve answers opSums and opBlocks: what this node has now.
func (in *incoming) serve() error {
	m, err := decodePull(in.req.Head)
	if err != nil {
		return err
	}
	if err := in.find(&m.route); err != nil {
		return err
	}
	r, req := in.r, in.req
	key := object.Key{Group: m.group, ID: m.id}
	if req.Op == opBlocks && (m.len == 0 || m.off%object.BlockSize != 0 || m.len%object.BlockSize != 0 || int(m.len) > len(req.ReplyData)) {
		return errMessage
	}
	r.works.Go(func() {
		info, err := r.cfg.Store.Stat(r.ctx, key)
		if _, damaged := r.damaged.Load(key); damaged {
			err = object.ErrCorrupt
		}
		switch {
		case err != nil:
		case req.Op == opSums:
			var sums []uint64
			sums, err = r.cfg.Store.Sums(r.ctx, key)
			if !in.part.primary.Load() { // of whom others take what they have not
				r.distrust(key, sums)
			}
			req.ReplyHead = appendInfo(req.ReplyHead, info)
			req.ReplyData = appendDifference(req.ReplyData[:0], sums, decodeSums(req.Data))
		default:
			req.ReplyData = req.ReplyData[:m.len]
			err = r.write(&object.Request{
				Op: object.OpRead, SizeShift: info.SizeShift, ID: m.id, Policy: m.group.Policy, Partition: m.group.Partition,
				Off: m.off, Len: m.len, Data: req.ReplyData,
			})
			req.ReplyHead = le.AppendUint64(req.ReplyHead, xxh3.Hash(req.ReplyData))
		}
		if isNotFound(err) && !in.part.counts(r.ctx, m.epoch) { // whenever it has gone
			err = replica.ErrEpoch
		}
		req.Reply(err)
	})
	return nil
}

// counts reports whether it still means something in an epoch what this node lacks: who holds
// the partition no more may have removed it. Who asks may not know that, if it was stopped
// for a while, and would remove its own. Whatever was removed before this is called was
// removed in an epoch that is known here now.
func (p *part) counts(ctx context.Context, epoch state.Epoch) (ok bool) {
	err := p.inspect(ctx, func(_ replica.Time, q *replica.Partition) { ok = q.Epoch() == epoch && q.Holder() })
	return err == nil && ok
}

// fetch carries out Fetch: what is rotten here is taken from another member.
func (p *part) fetch(e *replica.Effect) {
	t, to, id, epoch := e.Op.Owner.(*Task), e.To, e.ID, e.Epoch
	off, length := t.op.Off, t.op.Len
	p.r.works.Go(func() {
		err := p.heal(to, route{p.group, epoch, to.Incarnation}, id, off, length, t.op.Whole)
		p.post(event{kind: evFetched, task: t, epoch: epoch, err: unknown(err)})
	})
}

// heal overwrites the range, or all, of an object by what another node has.
func (p *part) heal(from replica.Peer, m route, id object.ID, off, length uint32, whole bool) error {
	r := p.r
	src := source{r: r, from: from, route: m, id: id}
	info, sums, err := src.sums(r.ctx, nil)
	if err != nil {
		return err
	}
	if whole {
		off, length = 0, uint32(len(sums))*object.BlockSize
	}
	t := transfer{r: r, src: &src, info: info, key: object.Key{Group: p.group, ID: id}}
	first, end := off>>blockShift, (off+length)>>blockShift
	own := make([]uint64, len(sums))
	copy(own, sums)
	for b := first; b < end && int(b) < len(own); b++ {
		own[b] = ^sums[b] // not equal, whatever it is here
	}
	if err := t.run(sums, own, true); err != nil {
		return err
	}
	r.Count.Fetched.Add(1)
	r.cfg.Logger.Info("corrupt content was replaced by that of another replica", "object", t.key.String(), "from", fmt.Sprint(from.Node), "offset", off, "bytes", length)
	return nil
}

// objects lists what there is of a partition.
func (r *Replicas) objects(g object.Group) (list []object.ID, err error) {
	err = r.cfg.Store.List(r.ctx, g, func(i object.Info) error {
		list = append(list, i.Key.ID)
		return nil
	})
	return list, err
}
