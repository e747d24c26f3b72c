package replica

import (
	"cmp"
	"errors"
	"slices"
	"time"

	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// learner is a node that the primary brings in sync.
type learner struct {
	session  uint32 // tells attempts of one epoch apart
	phase    learnerPhase
	at       Time // when to begin (resting) or to propose again (admitting)
	report   Report
	have     []object.ID            // its objects
	touched  map[object.ID]struct{} // changed while this node's objects were being listed
	pending  map[object.ID]struct{} // not equal yet: changes do not flow there
	queue    []object.ID            // of pending: not begun
	fresh    int                    // of queue, at its end: the learner has nothing of them
	wanting  []object.ID            // of pending: wait for space
	probe    object.ID              // of those, the one that is tried, if probing
	probing  bool
	underway int // repairs
}

type learnerPhase uint8

const (
	resting learnerPhase = iota // until learner.at
	asking
	listing
	repairing
	syncing
	admitting
)

// flowing reports whether changes are sent to the learner.
func (l *learner) flowing() bool { return l.phase >= repairing }

// takes reports whether a change of an object is sent to the learner.
func (l *learner) takes(id object.ID) bool {
	switch l.phase {
	case resting, asking:
		return false
	case listing:
		l.touched[id] = struct{}{}
		return false
	}
	_, later := l.pending[id]
	return !later
}

// patience is how long a change may take on a peer.
func (p *Partition) patience(i int) time.Duration {
	if p.peers[i].learner != nil {
		return p.opt.LearnerTimeout
	}
	return p.opt.AckTimeout
}

func (p *Partition) newLearner(at Time) *learner {
	p.sessions++
	return &learner{session: p.sessions, at: at}
}

// session is what messages to the peer carry.
func (m *peer) session() uint32 {
	if m.learner == nil {
		return 0
	}
	return m.learner.session
}

func (p *Partition) tickLearner(now Time, i int) {
	l := p.peers[i].learner
	if now < l.at {
		return
	}
	switch l.phase {
	case resting:
		l.phase = asking
		p.emit(Effect{Kind: Ask, To: p.peers[i].Peer, Session: l.session})
	case repairing:
		p.peers[i].tryHungry(now)
	case admitting:
		if p.peers[i].expel {
			return
		}
		l.at = now + Time(p.opt.Resend)
		p.emit(Effect{Kind: Admit, To: p.peers[i].Peer})
	}
}

// Asked says how an Ask has ended: where the learner stands, and which objects it has.
func (p *Partition) Asked(now Time, from Peer, epoch state.Epoch, r Report, have []object.ID, err error) {
	l := p.learner(from, epoch, asking)
	if l == nil {
		return
	}
	if err != nil {
		p.rest(now, from, p.opt.Resend)
		return
	}
	l.phase, l.report, l.have = listing, r, have
	l.touched = make(map[object.ID]struct{})
	for op := p.sequenced.front; op != nil; op = op.after {
		l.touched[op.ID] = struct{}{}
	}
	p.emit(Effect{Kind: List, To: from, Mark: r.Mark})
}

// learner finds the learner in the phase that an event belongs to; nil: it is late.
func (p *Partition) learner(m Peer, epoch state.Epoch, ph learnerPhase) *learner {
	i := p.index(m)
	if epoch != p.view.Epoch || p.role != primary || i < 0 || p.peers[i].learner == nil || p.peers[i].learner.phase != ph {
		return nil
	}
	return p.peers[i].learner
}

// rest lets a learner to which nothing flows begin anew after a pause.
func (p *Partition) rest(now Time, m Peer, pause time.Duration) {
	p.peers[p.index(m)].learner = p.newLearner(now + Time(pause))
}

// Listed says how a List has ended: which of this node's objects changed after the mark,
// and which there are.
func (p *Partition) Listed(now Time, to Peer, epoch state.Epoch, changed, have []object.ID, err error) {
	l := p.learner(to, epoch, listing)
	if l == nil {
		return
	}
	if err != nil {
		p.rest(now, to, p.opt.LearnerTimeout)
		return
	}
	l.pending = l.touched
	if l.report.Mark == (Mark{}) {
		changed = have // whatever their versions say
	}
	for _, ids := range [][]object.ID{changed, l.report.Recent} {
		for _, id := range ids {
			l.pending[id] = struct{}{}
		}
	}
	difference(l.pending, have, l.have)
	l.line(have)
	l.touched, l.have, l.report = nil, nil, Report{}
	l.phase = repairing
	p.holders = nil
	p.caughtUp(to, l)
}

// line makes the queue of what is pending, of objects some of which this node has: first what the learner is to
// remove, which gives space back, then what both have, and last what takes space in any case.
func (l *learner) line(have []object.ID) {
	here, there := setOf(have), setOf(l.have)
	rank := func(id object.ID) int {
		switch {
		case !here[id]:
			return 0
		case there[id]:
			return 1
		}
		return 2
	}
	for id := range l.pending {
		if l.queue = append(l.queue, id); rank(id) == 2 {
			l.fresh++
		}
	}
	slices.SortFunc(l.queue, func(a, b object.ID) int { return cmp.Or(rank(a)-rank(b), cmp.Compare(a, b)) })
}

func setOf(list []object.ID) map[object.ID]bool {
	set := make(map[object.ID]bool, len(list))
	for _, id := range list {
		set[id] = true
	}
	return set
}

// difference adds what only one of two lists has.
func difference(to map[object.ID]struct{}, a, b []object.ID) {
	in := setOf(a)
	for _, id := range b {
		if in[id] {
			delete(in, id)
		} else {
			to[id] = struct{}{}
		}
	}
	for id := range in {
		to[id] = struct{}{}
	}
}

// Wanted is how many objects wait to be brought to learners.
func (p *Partition) Wanted() (n int) {
	for i := range p.peers {
		if l := p.peers[i].learner; l != nil {
			n += len(l.queue)
		}
	}
	return n
}

// Underway is how many repairs of learners were granted and have not ended.
func (p *Partition) Underway() (n int) {
	for i := range p.peers {
		if l := p.peers[i].learner; l != nil {
			n += l.underway
		}
	}
	return n
}

// Grant lets up to n more repairs of learners begin, and reports how many did.
func (p *Partition) Grant(now Time, n int) (begun int) {
	if p.role != primary || p.phase != serving {
		return 0
	}
	for i := range p.peers {
		l := p.peers[i].learner
		for l != nil && len(l.queue) > 0 && begun < n && now >= l.at {
			begun++
			id := l.queue[0]
			l.queue = l.queue[1:]
			l.fresh = min(l.fresh, len(l.queue))
			l.underway++
			// It is like a read of all of the object: changes wait, reads do not.
			op := &Op{ID: id, Read: true, Whole: true, learner: l, need: 1 << i}
			if p.enqueue(op) {
				p.run(now, op)
			}
		}
	}
	return begun
}

// repair brings an object to the learner.
func (p *Partition) repair(op *Op) {
	for i := range p.peers {
		if op.need.has(i) && p.peers[i].learner == op.learner && op.learner.phase == repairing {
			op.state = opRunning
			op.refs++
			p.emit(Effect{Kind: Repair, To: p.peers[i].Peer, Session: op.learner.session, Op: op, ID: op.ID, Mark: p.committed()})
			return
		}
	}
}

// dropRepair gives up the repair of a learner that is none any more.
func (p *Partition) dropRepair(now Time, op *Op) {
	op.state = opDone
	p.dequeue(now, op)
}

// brought is Repaired for a learner.
func (p *Partition) brought(now Time, op *Op, current bool, err error) {
	op.refs--
	l := op.learner
	mine := current && l.phase == repairing && err == nil
	if mine {
		delete(l.pending, op.ID) // before a change goes on, which then flows
	}
	if op.object != nil {
		op.state = opDone
		p.dequeue(now, op)
	}
	i := p.indexOf(l)
	switch {
	case !current || i < 0:
	case errors.Is(err, ErrBusy) && l.phase == repairing:
		l.underway--
		l.queue, l.at = slices.Insert(l.queue, 0, op.ID), now+Time(p.opt.Resend)
	case errors.Is(err, object.ErrNoSpace) && l.phase == repairing:
		l.underway--
		p.setTight(p.peers[i].Peer, true)
		p.peers[i].starve(now, op.ID, p.opt)
	case err != nil:
		p.dropLearner(now, i)
	case mine:
		l.underway--
		p.peers[i].fed(op.ID)
		p.caughtUp(p.peers[i].Peer, l)
	}
}

func (p *Partition) indexOf(l *learner) int {
	return slices.IndexFunc(p.peers, func(m peer) bool { return m.learner == l })
}

// caughtUp has the learner make everything durable when nothing is pending.
func (p *Partition) caughtUp(to Peer, l *learner) {
	if len(l.pending) > 0 || l.underway > 0 {
		return
	}
	l.phase = syncing
	p.peers[p.indexOf(l)].hunger = 0
	p.emit(Effect{Kind: SyncPeer, To: to, Session: l.session})
}

// Synced says how a SyncPeer has ended.
func (p *Partition) Synced(now Time, to Peer, epoch state.Epoch, err error) {
	l := p.learner(to, epoch, syncing)
	if l == nil {
		return
	}
	if err != nil {
		p.dropLearner(now, p.index(to))
		return
	}
	l.phase, l.at = admitting, now+Time(p.opt.Resend)
	p.emit(Effect{Kind: Admit, To: to})
}

// dropLearner lets a learner begin anew after a pause. What waits for it goes on.
func (p *Partition) dropLearner(now Time, i int) {
	l := p.peers[i].learner
	if l == nil {
		return
	}
	if l.phase == admitting {
		// It may be a member by now, and nothing may be answered without it. Only a new
		// epoch tells.
		p.expel(now, i)
		return
	}
	// Repairs under way end by themselves and find that the learner is another one.
	p.peers[i].learner = p.newLearner(max(now+Time(p.opt.LearnerTimeout), p.peers[i].hungryUntil))
	l.phase = resting
	p.holders = nil
	for _, q := range p.queues() {
		for op := q.first; op != nil; {
			next := op.next
			if op.learner == l && op.state == opWaiting {
				p.dropRepair(now, op)
			}
			op = next
		}
	}
	for op := p.sequenced.front; op != nil; {
		next := op.after
		p.abandon(op, 1<<i)
		op.lost &^= 1 << i
		if op.need.has(i) {
			op.need &^= 1 << i
			if op.state == opRunning {
				p.complete(now, op)
			}
		}
		op = next
	}
}
