package replica

import (
	"errors"

	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// Submit starts an op that a gateway has addressed to the primary of an epoch. A gateway
// may address it to another epoch once this one has ended or ErrRetry is the outcome.
func (p *Partition) Submit(now Time, epoch state.Epoch, op *Op) {
	op.Err, op.Open, op.list, op.learner, op.refs, op.began = nil, false, nil, nil, 0, now
	if epoch > p.view.Epoch && !p.closed {
		p.wait(epoch, func(now Time) { p.Submit(now, epoch, op) }, func() { p.end(op, ErrRetry) })
		return
	}
	if p.role != primary || epoch != p.view.Epoch || p.closed {
		p.end(op, ErrRetry)
		return
	}
	op.state = opWaiting
	if p.enqueue(op) {
		p.run(now, op)
	}
}

// Holders are the nodes that may hold what was answered lately: a flush must make it
// durable on each that is still a member. The slice is never changed.
func (p *Partition) Holders() []Peer {
	if p.holders == nil {
		for _, m := range p.peers {
			if m.learner == nil || m.learner.flowing() {
				p.holders = append(p.holders, m.Peer)
			}
		}
	}
	return p.holders
}

func (p *Partition) hold(op *Op) {
	op.unlist()
	op.state = opHeld
	p.held.push(op)
}

// run begins an op that nothing before it keeps from that.
func (p *Partition) run(now Time, op *Op) {
	switch {
	case op.learner != nil:
		p.repair(op)
	case p.phase != serving || p.failed || p.renewing || !p.leased(now) || !op.Read && len(p.view.ISR) < p.view.MinInSync:
		p.hold(op)
	case op.Read:
		op.unlist()
		op.state, op.fetched = opRunning, 0
		op.refs++
		p.emit(Effect{Kind: Apply, Op: op})
	default:
		p.sequence(now, op)
	}
}

// sequence gives a change its number and sends it to everybody.
func (p *Partition) sequence(now Time, op *Op) {
	op.unlist()
	p.seq++
	op.state, op.sent = opRunning, now
	op.version = object.Version{Epoch: uint64(p.view.Epoch), Seq: p.seq}
	op.need, op.sending, op.lost, op.fetched, op.short = 1, 0, 0, 0, 0
	p.sequenced.push(op)
	p.remember(op.ID, op.version)
	if op.careful = op.Grows && p.short(); !op.careful {
		p.spread(op)
	}
	p.apply(op)
}

// spread sends a change to everybody else.
func (p *Partition) spread(op *Op) {
	for i := 1; i < len(p.peers); i++ {
		if l := p.peers[i].learner; l == nil || l.takes(op.ID) {
			op.need |= 1 << i
			p.send(op, i)
		}
	}
}

// apply has a change carried out here.
func (p *Partition) apply(op *Op) {
	op.refs++
	p.applying++
	p.emit(Effect{Kind: Apply, Op: op, Version: op.version, Careful: op.careful})
}

func (p *Partition) send(op *Op, i int) {
	op.sending |= 1 << i
	op.lost &^= 1 << i
	op.refs++
	p.emit(Effect{Kind: Send, To: p.peers[i].Peer, Session: p.peers[i].session(), Op: op, Version: op.version, Mark: p.committed()})
}

// committed is the highest version up to which everything is on all members.
func (p *Partition) committed() Mark {
	m := Mark{Epoch: uint64(p.view.Epoch), Seq: p.seq}
	if p.sequenced.front != nil {
		m.Seq = p.sequenced.front.version.Seq - 1
	}
	if p.gaveUp != 0 {
		m.Seq = min(m.Seq, p.gaveUp-1)
	}
	return m
}

// Applied says how an Apply of an op has ended.
func (p *Partition) Applied(now Time, op *Op, epoch state.Epoch, err error) {
	op.refs--
	current := epoch == p.view.Epoch
	if !op.Read {
		p.landed(now, current)
	}
	switch {
	case !current || op.state != opRunning:
		p.unused(op)
	case errors.Is(err, object.ErrCorrupt) && p.fetch(op):
	case op.Read && !p.leased(now):
		p.hold(op) // and read again: who knows what has been written elsewhere
	case op.Read && errors.Is(err, object.ErrIO) && len(p.view.ISR) > 1:
		p.Fail(now, p.opt.Self) // others can read it
	case op.Read:
		p.finish(now, op, err)
	case errors.Is(err, object.ErrNoSpace) && p.noSpaceHere(now, op, err):
	case err != nil:
		p.failure(now, op, err)
	default:
		op.need &^= 1
		if op.careful {
			op.careful, op.sent = false, now
			p.spread(op)
		}
		p.complete(now, op)
	}
}

// landed counts a change that is no longer under way in the store.
func (p *Partition) landed(now Time, current bool) {
	if current {
		p.applying--
		return
	}
	p.earlier--
	p.drained(now)
}

// fetch asks the next member for sound content of an object that is rotten here.
func (p *Partition) fetch(op *Op) bool {
	for i := 1; i < len(p.view.ISR); i++ {
		if !op.fetched.has(i) {
			op.fetched |= 1 << i
			op.refs++
			p.emit(Effect{Kind: Fetch, To: p.peers[i].Peer, Op: op, ID: op.ID})
			return true
		}
	}
	return false
}

// Fetched says how a Fetch has ended.
func (p *Partition) Fetched(now Time, op *Op, epoch state.Epoch, err error) {
	op.refs--
	switch {
	case epoch != p.view.Epoch || op.state != opRunning:
		p.unused(op)
	case err != nil && p.fetch(op):
	case op.Read && err != nil:
		p.finish(now, op, object.ErrCorrupt)
	case op.Read:
		op.refs++
		p.emit(Effect{Kind: Apply, Op: op})
	case err != nil:
		p.failure(now, op, err)
	default:
		p.apply(op)
	}
}

// failure deals with a change that this node's store could not make. Others may have:
// then this node must be no member any more.
func (p *Partition) failure(now Time, op *Op, err error) {
	if len(p.view.ISR) > 1 {
		p.failed = true
		p.expel(now, 0)
		return
	}
	for i := 1; i < len(p.peers); i++ {
		p.dropLearner(now, i) // it may have made the change
	}
	p.finish(now, op, err)
}

// Fail says that the disk of a member or learner, or of this node, is out of service. It is
// no member any more then, unless it is the last one.
func (p *Partition) Fail(now Time, m Peer) {
	i := p.index(m)
	if p.role != primary || i < 0 || len(p.view.ISR) == 1 && i == 0 {
		return
	}
	switch {
	case i == 0:
		p.failed = true
		p.expel(now, 0)
	case p.peers[i].learner == nil:
		p.expel(now, i)
	}
}

// Acked says how a Send has ended: with nil, ErrRetry if the answer is unknown, or with
// what the other side replied.
func (p *Partition) Acked(now Time, op *Op, epoch state.Epoch, to Peer, err error) {
	op.refs--
	i := p.index(to)
	if epoch != p.view.Epoch || op.state != opRunning || i < 0 || !op.sending.has(i) {
		p.unused(op)
		return
	}
	op.sending &^= 1 << i
	switch {
	case err == nil:
		op.need &^= 1 << i
		p.complete(now, op)
	case errors.Is(err, ErrRetry) || errors.Is(err, ErrEpoch):
		op.lost |= 1 << i
		p.peers[i].later(now, p.opt)
	case errors.Is(err, object.ErrNoSpace):
		p.noSpaceThere(now, op, i)
	case p.peers[i].learner != nil:
		p.dropLearner(now, i)
	default:
		p.expel(now, i)
	}
}

func (p *Partition) index(m Peer) int {
	for i := range p.peers {
		if p.peers[i].Peer == m {
			return i
		}
	}
	return -1
}

// later sets the time to try again, if it is not set.
func (m *peer) later(now Time, o Options) {
	if m.askAt == 0 {
		m.askAt = now + Time(o.Resend)
	}
}

// complete answers a change that everybody has made.
func (p *Partition) complete(now Time, op *Op) {
	switch {
	case op.need != 0:
	case !p.leased(now):
		op.state, p.unleased = opReady, true
	default:
		p.finish(now, op, nil)
	}
}

// finish ends an op that ran, and starts those that waited for it.
func (p *Partition) finish(now Time, op *Op, err error) {
	op.unlist()
	p.abandon(op, ^slots(0))
	op.state = opDone
	p.dequeue(now, op)
	p.end(op, err)
}

// expel proposes that a member be none any more.
func (p *Partition) expel(now Time, i int) {
	m := &p.peers[i]
	if m.expel && now < m.expelAt {
		return
	}
	m.expel, m.expelAt = true, now+Time(p.opt.Resend)
	p.emit(Effect{Kind: Expel, To: m.Peer})
}

// Tick lets time pass.
func (p *Partition) Tick(now Time) {
	p.tickEarly(now)
	if p.role != primary {
		if p.purgeAt != 0 && now >= p.purgeAt {
			p.purge()
		}
		return
	}
	if p.renewing {
		p.renew(now)
	}
	for i := range p.peers {
		m := &p.peers[i]
		if m.expel {
			p.expel(now, i)
		}
		if m.learner != nil && p.phase == serving {
			p.tickLearner(now, i)
		}
	}
	switch p.phase {
	case surveying:
		p.tickSurvey(now)
	case serving:
		p.tickOps(now)
		p.tell()
	}
	p.refuseLate(now)
}

// refuseLate refuses what has waited for long: who asked for it may have somebody who shall not wait for ever, and only he
// can tell. A change that all have made, but that there was no lease to answer, is among it. Of one that some
// have not made nobody may see anything before it is certain what becomes of it: so nothing begins then before a new epoch, which
// makes all equal.
func (p *Partition) refuseLate(now Time) {
	late := func(op *Op) bool { return op.learner == nil && now >= op.began+Time(p.opt.Patience) }
	if !p.held.any(late) && !p.sequenced.any(late) {
		return
	}
	var list []*Op
	for _, q := range p.queues() {
		for op := q.first; op != nil; op = op.next {
			if late(op) {
				list = append(list, op)
			}
		}
	}
	for _, op := range list {
		switch {
		case op.state != opRunning:
			p.finish(now, op, ErrRetry)
		case !op.Read && op.refs == 0:
			p.renew(now)
			if p.gaveUp == 0 || op.version.Seq < p.gaveUp {
				p.gaveUp = op.version.Seq
			}
			op.Open = true
			p.finish(now, op, ErrRetry)
		}
	}
}

// tickOps finds who is late, and sends again what was lost.
func (p *Partition) tickOps(now Time) {
	var late, due slots
	for i := 1; i < len(p.peers); i++ {
		if m := &p.peers[i]; m.askAt != 0 && now >= m.askAt {
			m.askAt = 0
			due |= 1 << i
		}
	}
	for op := p.sequenced.front; op != nil; op = op.after {
		for i := 1; i < len(p.peers); i++ {
			if !op.need.has(i) {
				continue
			}
			if op.lost.has(i) && due.has(i) {
				p.send(op, i)
			}
			if now >= op.sent+Time(p.patience(i)) && !op.short.has(i) {
				late |= 1 << i
			}
		}
	}
	for i := 1; i < len(p.peers); i++ {
		switch {
		case !late.has(i):
		case p.peers[i].learner != nil:
			p.dropLearner(now, i)
		default:
			p.expel(now, i)
		}
	}
	p.release(now)
}

// tell lets the members know what is committed when nothing else does.
func (p *Partition) tell() {
	mark := p.committed()
	if p.sequenced.front != nil || p.told == mark {
		return
	}
	p.told = mark
	for i := 1; i < len(p.view.ISR); i++ {
		p.emit(Effect{Kind: Commit, To: p.peers[i].Peer, Mark: mark})
	}
}
