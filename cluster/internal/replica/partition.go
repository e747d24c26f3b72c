package replica

import (
	"slices"
	"time"

	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// Partition is one node's part in one partition. Its methods are called by one goroutine
// at a time; after each, Effects has what is to be done.
type Partition struct {
	opt     Options
	view    View
	role    role
	phase   phase // of a primary
	lease   Time
	peers   []peer // of a primary: itself, the other members, the learners
	formers []peer // of a primary: former ones that are no members

	holders  []Peer // see Op.Holders; nil: to be made anew
	seq      uint64 // last sequence number given
	told     Mark   // the members know of
	mark     Mark   // everything up to it is in the store here
	recent   map[object.ID]object.Version
	trimmed  int    // length of recent after it was last trimmed
	gaveUp   uint64 // sequence number of the first change that was given up before all had made it; 0: none
	unleased bool   // an op is ready, but there was no lease
	failed   bool   // this node's own store; it asks to be expelled

	tight    []Peer // members and learners without space, this node included; see space.go
	renewing bool   // a new epoch is wanted, and nothing begins before
	renewAt  Time   // when that is proposed again
	closed   bool   // see Close
	holds    bool   // there may be something of the partition in the store
	current  bool   // see Current
	purging  bool   // that is under way
	purgeAt  Time   // when to try again to remove that; 0: not

	applying  int                // changes under way in the store in this epoch and session
	earlier   int                // and in earlier ones
	session   uint32             // of a learner: the primary's last Ask
	sessions  uint32             // of a primary: given to learners in this epoch
	served    bool               // the primary has settled in this epoch
	floor     uint64             // everything up to it is committed in this epoch
	repaired  map[object.ID]bool // in this session: true once stored
	received  map[uint64]bool    // beyond floor: true once stored
	questions []question
	early     []early // in the order they came

	objects   map[object.ID]*objectQueue
	spare     []*objectQueue
	sequenced opList
	held      opList
	settling  settling

	effects []Effect
}

type role uint8

const (
	outside role = iota
	learning
	member
	primary
)

type phase uint8

const (
	draining phase = iota // what was begun under earlier epochs is not done
	surveying
	serving
)

// peer is another node, or this one, as the primary sees it.
type peer struct {
	Peer
	learner *learner // nil: a member
	expel   bool     // it shall be no member any more
	expelAt Time     // when that is proposed again
	asked   Time     // first in this phase; see settle.go
	askAt   Time     // when to ask again; 0: an answer is under way
	answer  bool     // it has answered the survey

	// A learner that lacks space is tried again after longer and longer pauses; 0: it lacks none, as far as is known.
	hunger      time.Duration
	hungryUntil Time
}

// New returns the partition of a node that has started: the report says what is in its
// store. It does nothing before SetView.
func New(o Options, r Report) *Partition {
	p := &Partition{opt: o, mark: r.Mark, holds: r.Holds}
	for _, id := range r.Recent {
		// Beyond the mark, and covered by the marks of later epochs.
		p.remember(id, object.Version{Epoch: r.Mark.Epoch, Seq: ^uint64(0)})
	}
	return p
}

// Effects returns what is to be done, in this order, since the last call. It is valid
// until the next call of any method.
func (p *Partition) Effects() []Effect {
	e := p.effects
	p.effects = p.effects[:0]
	return e
}

func (p *Partition) emit(e Effect) {
	e.Epoch = p.view.Epoch
	p.effects = append(p.effects, e)
}

// Mark is the version up to which everything is in this node's store.
func (p *Partition) Mark() Mark {
	if p.role == primary && p.phase == serving {
		return p.committed()
	}
	return p.mark
}

// Epoch is that of the last view.
func (p *Partition) Epoch() state.Epoch { return p.view.Epoch }

// Primary reports whether this node is the primary.
func (p *Partition) Primary() bool { return p.role == primary }

// Serving reports whether this node is the primary and has settled.
func (p *Partition) Serving() bool { return p.role == primary && p.phase == serving }

// Readable reports whether what this node has is what every member has, but for changes
// under way: who knows those may read here (while it has a lease).
func (p *Partition) Readable() bool { return p.Serving() || p.role == member && p.served }

// Idle reports whether Tick has nothing to do before another event comes.
func (p *Partition) Idle() bool {
	if p.role != primary || p.closed || len(p.early) > 0 {
		return p.purgeAt == 0 && len(p.early) == 0
	}
	return p.phase == serving && !p.renewing && p.sequenced.front == nil && p.held.front == nil && len(p.view.Learners) == 0 &&
		!p.failed && p.told == p.committed() && !slices.ContainsFunc(p.peers, func(m peer) bool { return m.expel })
}

// SetView says what the replicated state has become. Older views change nothing.
func (p *Partition) SetView(now Time, v View) {
	p.Follow(now, v)
	p.TakeEarly(now)
}

// Follow is SetView without the messages of the new epoch that have come before it: they are for TakeEarly. Until then this
// node has not been Taught in that epoch.
func (p *Partition) Follow(now Time, v View) {
	if v.Epoch <= p.view.Epoch || p.closed {
		return
	}
	if p.Serving() {
		p.mark = p.committed() // everything up to it is here and on all members
	}
	p.refuseAll()
	p.view = v
	p.role = p.roleIn(v)
	p.earlier += p.applying
	p.applying, p.seq, p.told, p.failed, p.unleased, p.holders = 0, 0, Mark{}, false, false, nil
	p.renewing, p.purgeAt, p.gaveUp = false, 0, 0
	p.tight = slices.DeleteFunc(p.tight, func(m Peer) bool { return !v.has(m) })
	p.received, p.repaired, p.served, p.floor, p.session, p.sessions = nil, nil, false, 0, 0, 0
	p.peers, p.formers = p.peers[:0], p.formers[:0]
	for _, q := range p.questions {
		p.emit(Effect{Kind: Reply, To: q.from, Token: q.token, Err: ErrEpoch})
	}
	p.questions = p.questions[:0]
	p.phase = draining
	p.settling = settling{}
	switch p.role {
	case primary:
		p.holds = true
		p.reign(now)
	case outside:
		p.purge()
	default:
		p.holds = true
	}
}

// Close ends the partition's part here: all that was asked for is refused, and so is what comes later. Who asked
// hears of it as soon as no effect uses what he gave.
func (p *Partition) Close() {
	if p.Serving() {
		p.mark = p.committed()
	}
	p.closed = true
	p.refuseAll()
	p.peers, p.formers, p.renewing, p.purgeAt, p.settling = nil, nil, false, 0, settling{}
	for _, q := range p.questions {
		p.reply(q.from, q.token, ErrEpoch)
	}
	early := p.early
	p.questions, p.early = nil, nil
	for _, e := range early {
		e.refuse()
	}
}

// has reports whether a node is a member or learner.
func (v *View) has(m Peer) bool { return slices.Contains(v.ISR, m) || slices.Contains(v.Learners, m) }

func (p *Partition) roleIn(v View) role {
	is := func(m Peer) bool { return m == p.opt.Self }
	switch i := slices.IndexFunc(v.ISR, is); {
	case i == 0:
		return primary
	case i > 0:
		return member
	case slices.ContainsFunc(v.Learners, is):
		return learning
	}
	return outside
}

// refuseAll ends everything under way: who asked for it turns to the new epoch, with
// what may have become of it settled by then. Nothing is done twice, for requests are
// of one epoch too.
func (p *Partition) refuseAll() {
	p.phase = draining
	for _, q := range p.queues() {
		for op := q.first; op != nil; {
			next := op.next
			op.object, op.previous, op.next = nil, nil, nil
			op.unlist()
			p.abandon(op, ^slots(0))
			p.end(op, ErrRetry)
			op = next
		}
	}
	clear(p.objects)
}

// abandon says that nobody waits for the sends of op to some of the peers any more.
func (p *Partition) abandon(op *Op, which slots) {
	for i := range p.peers {
		if (op.sending & which).has(i) {
			p.emit(Effect{Kind: Abandon, To: p.peers[i].Peer, Op: op})
		}
	}
	op.sending &^= which
}

// reign makes this node the primary of the view. It serves once the members have
// settled.
func (p *Partition) reign(now Time) {
	for i, m := range p.view.ISR {
		p.peers = append(p.peers, peer{Peer: m, answer: i == 0})
	}
	for _, m := range p.view.Learners {
		p.peers = append(p.peers, peer{Peer: m, learner: p.newLearner(now)})
	}
	for _, m := range p.view.Former {
		if !slices.Contains(p.view.ISR, m) {
			p.formers = append(p.formers, peer{Peer: m})
		}
	}
	p.drained(now)
}

// end gives op back with its outcome, as soon as no effect uses it.
func (p *Partition) end(op *Op, err error) {
	op.Err, op.state = err, opDone
	p.unused(op)
}

// unused answers an op that has waited only for its effects to end.
func (p *Partition) unused(op *Op) {
	if op.refs == 0 && op.state == opDone && op.learner == nil {
		p.emit(Effect{Kind: Answer, Op: op})
	}
}

// drained goes on when nothing of earlier epochs is under way in the store.
func (p *Partition) drained(now Time) {
	if p.earlier > 0 || p.closed {
		return
	}
	for _, q := range p.questions {
		p.emit(Effect{Kind: Reply, To: q.from, Token: q.token, Report: p.disclose()})
	}
	p.questions = p.questions[:0]
	switch {
	case p.role == primary && p.phase == draining:
		p.survey(now)
	case p.role == outside:
		p.purge()
	}
}

// SetLease says until when this node may answer (INV-R5).
func (p *Partition) SetLease(now, until Time) {
	p.lease = until
	if p.role == primary && p.phase == serving && p.leased(now) {
		p.release(now)
	}
}

func (p *Partition) leased(now Time) bool { return now < p.lease }

// release goes on with what waited for the lease or for the members.
func (p *Partition) release(now Time) {
	if p.unleased && p.leased(now) {
		p.unleased = false
		for op := p.sequenced.front; op != nil; {
			next := op.after
			if op.state == opReady {
				p.finish(now, op, nil)
			}
			op = next
		}
	}
	for n := p.held.n; n > 0 && p.held.front != nil; n-- {
		op := p.held.front
		op.unlist()
		op.state = opWaiting
		if op.object.free(op) { // a repair may have gone before it
			p.run(now, op)
		}
	}
}

// remember notes that an object was changed beyond the mark.
func (p *Partition) remember(id object.ID, v object.Version) {
	if p.recent == nil {
		p.recent = make(map[object.ID]object.Version)
	}
	p.recent[id] = v
	if len(p.recent) > 2*p.trimmed+minRecent {
		p.trim()
	}
}

// minRecent is how many recent objects are not worth trimming.
const minRecent = 64

// trim forgets what the mark covers.
func (p *Partition) trim() {
	mark := p.Mark()
	for id, v := range p.recent {
		if !mark.Less(v) {
			delete(p.recent, id)
		}
	}
	p.trimmed = len(p.recent)
}

func (p *Partition) report() Report {
	p.trim()
	r := Report{Mark: p.mark}
	for id := range p.recent {
		r.Recent = append(r.Recent, id)
	}
	slices.Sort(r.Recent)
	return r
}
