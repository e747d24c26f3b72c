package replicas

import (
	"slices"
	"sync/atomic"
	"time"

	"sheepdog/cluster/internal/mailbox"
	"sheepdog/cluster/internal/peer"
	"sheepdog/cluster/internal/replica"
	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// part is one partition: what package replica decides, and who carries it out. Events
// are handled one at a time, by the goroutine that posts the first.
type part struct {
	r     *Replicas
	group object.Group
	box   mailbox.Mailbox[event]

	// Of the goroutine that handles events.
	p       *replica.Partition // nil: it is not known yet what is in the store
	first   *replica.View      // the latest before that is known; nil: there is none
	loading loading
	unknown bool     // it was closed before it was known what is in the store
	marked  bool     // there was a mark at the start, and it was in sync then, perhaps with nothing
	waiting []event  // until it is known
	unsent  bool     // something was submitted and not kicked
	open    []flight // changes that were given up, as long as nothing has decided what becomes of them

	leaving    bool          // an epoch is to begin anew, so that it can leave its disk
	leavePause time.Duration // after one that did in vain
	leaveAt    replica.Time  // when the next one may

	underway int  // repairs of learners, as counted in Replicas.repairs
	brought  bool // something was, since a learner made things durable last

	idle     atomic.Bool
	primary  atomic.Bool
	serving  atomic.Bool
	wanted   atomic.Int64
	tight    atomic.Bool  // somebody has no space
	copies   atomic.Int32 // in sync
	starved  atomic.Bool  // changes wait for more to be in sync
	learning atomic.Pointer[[]replica.Learning]
	learners []replica.Learning // memory for that
	holder   atomic.Bool        // what this node has of it counts
	returns  atomic.Bool        // it was in sync here before
	latest   atomic.Uint64      // epoch
	readable atomic.Uint64      // epoch in which this node's content may be read; 0: none
	granting atomic.Bool        // evGrant was posted
	mark     atomic.Pointer[replica.Mark]
	unlisted atomic.Pointer[error] // why it is not known what is in the store; nil: it is, or is being found out
}

type eventKind uint8

const (
	evView eventKind = iota
	evTick
	evLoaded
	evSubmit
	evApplied
	evFetched
	evAcked
	evReceive
	evStored
	evCommitted
	evSurvey
	evAsk
	evAnswered // a call of do has ended
	evGrant
	evSpace  // of peer: tight
	evFailed // peer's disk
	evLeave  // this node's disk is out of service, or to be taken out
	evCurrent
	evClose
)

// event is something that happened. Only the fields of its kind are set.
type event struct {
	kind   eventKind
	batch  bool // who posts it kicks afterwards, which is of use only if it is handled before
	task   *Task
	in     *incoming
	send   *send
	epoch  state.Epoch
	err    error
	view   *replica.View
	report *replica.Report // of evLoaded; nil: err says why
	answer func(now replica.Time, p *replica.Partition)
	peer   replica.Peer
	mark   replica.Mark
	tight  bool
}

func newPart(r *Replicas, g object.Group) *part {
	return &part{r: r, group: g}
}

func (p *part) post(e event) { p.box.Post(e, p.take) }

func (p *part) take(e event, late bool) {
	p.handle(e, late)
	if e.kind == evView {
		p.r.viewTaken()
	}
}

func (p *part) handle(e event, late bool) {
	if p.p == nil && !p.load(&e) {
		return
	}
	p.event(&e)
	p.perform()
	p.note()
	if p.unsent && (late || !e.batch) {
		p.r.kickSoon()
	}
	p.unsent = false
}

func (p *part) event(e *event) {
	r := p.r
	now := r.now()
	p.p.SetLease(now, replica.Time(r.lease.Load()))
	switch e.kind {
	case evView:
		was := p.p.Epoch()
		if p.p.Follow(now, *e.view); p.p.Epoch() > was {
			p.closeOpen()
		}
		p.leaveDisk() // before the primary counts on anything in this epoch
		p.p.TakeEarly(now)
	case evLeave:
		p.leaveDisk()
	case evTick:
		p.p.Tick(now)
	case evSubmit:
		p.p.Submit(now, e.epoch, &e.task.op)
	case evApplied:
		p.p.Applied(now, &e.task.op, e.epoch, e.err)
	case evFetched:
		p.p.Fetched(now, &e.task.op, e.epoch, e.err)
	case evAcked:
		s := e.send
		to, epoch, err, task := s.to, s.epoch, unknown(s.call.Err), s.task
		s.busy = false
		if err == nil {
			p.p.SetTight(to, len(s.call.ReplyHead) > 0 && s.call.ReplyHead[0]&flagTight != 0)
		}
		p.p.Acked(now, &task.op, epoch, to, err)
	case evReceive:
		m := &e.in.change
		p.p.Receive(e.in.from, m.epoch, m.session, m.version, m.id, m.mark, e.in)
	case evStored:
		p.p.Stored(now, e.in.effect, e.err)
	case evCommitted:
		p.p.Committed(e.peer, e.epoch, e.mark)
	case evSurvey:
		p.p.AnswerSurvey(e.in.from, e.in.question.epoch, e.in)
	case evAsk:
		p.p.AnswerAsk(e.in.from, e.in.question.epoch, e.in.question.session, e.in)
	case evAnswered:
		e.answer(now, p.p)
	case evGrant:
		p.p.Grant(now, 1)
		p.granting.Store(false)
	case evFailed:
		p.p.Fail(now, e.peer)
	case evSpace:
		p.p.SetTight(e.peer, e.tight)
	case evCurrent:
		p.p.Current()
	case evClose:
		p.p.Close()
		p.closeOpen()
	}
}

// closeOpen says that what was given up is under way no more.
func (p *part) closeOpen() {
	for _, k := range p.open {
		p.r.flights.ended(k)
	}
	p.open = nil
}

// abandon gives the partition another disk, if it can have one. Marks that are taken from then on are not of what is on this one.
func (p *part) abandon() bool {
	was := p.mark.Swap(new(replica.Mark))
	if p.r.cfg.Store.Abandon(p.group) {
		return true
	}
	p.mark.Store(was)
	return false
}

// leaveDisk gives the partition another disk if its own is out of service, or to be taken out, and
// nothing counts of what is there. It begins with nothing then. To a learner the primary has
// brought something that it takes for being there, and would have it in sync with the rest: so that ends first,
// with the epoch, which then begins anew.
func (p *part) leaveDisk() {
	r := p.r
	switch {
	case p.p.Holder() || !r.cfg.Store.Failed(p.group):
	case p.p.Taught():
		if r.now() >= p.leaveAt {
			p.leaving = true
			r.cfg.Propose(state.ChangeISR{Policy: p.group.Policy, Partition: p.group.Partition, Epoch: p.p.Epoch(), Remove: r.cfg.Self.Node})
		}
	case p.abandon():
		p.p.Renounce()
		p.leaving, p.leavePause, p.leaveAt = false, 0, 0
		r.cfg.Logger.Info("partition gets another disk, for its own is out of service", "partition", p.group.String())
	case p.leaving: // an epoch has begun anew for it in vain: there is no other disk, or not now
		p.leaving = false
		p.leavePause = max(firstLeavePause, min(2*p.leavePause, lastLeavePause))
		p.leaveAt = r.now() + replica.Time(p.leavePause)
	}
}

// The pauses between epochs that begin anew so that a learner can leave its disk, and in which it could not.
const (
	firstLeavePause = 2 * time.Second
	lastLeavePause  = 10 * time.Minute
)

// perform carries out what the partition wants. What completes at once is posted, and
// handled afterwards.
func (p *part) perform() {
	effects := p.p.Effects()
	for i := range effects {
		p.effect(&effects[i])
	}
}

// note publishes what others want to know.
func (p *part) note() {
	p.idle.Store(p.p.Idle())
	p.primary.Store(p.p.Primary())
	p.serving.Store(p.p.Serving())
	if n := int64(p.p.Wanted()); n != p.wanted.Load() {
		p.r.wanted.Add(n - p.wanted.Swap(n))
	}
	p.tight.Store(p.p.Tight())
	p.copies.Store(int32(p.p.Copies()))
	p.starved.Store(p.p.Starved())
	p.noteLearning()
	p.holder.Store(p.p.Holder())
	p.returns.Store(p.marked || p.p.Returns())
	p.latest.Store(uint64(p.p.Epoch()))
	epoch := uint64(0)
	if p.p.Readable() {
		epoch = uint64(p.p.Epoch())
	}
	if p.readable.Load() != epoch {
		p.readable.Store(epoch)
	}
	if n := p.p.Underway(); n != p.underway {
		p.r.repairs.Add(int64(n - p.underway))
		if n < p.underway {
			signal(p.r.wake)
		}
		p.underway = n
	}
	if m, old := p.p.Mark(), p.mark.Load(); !p.unknown && (old == nil || m.Epoch != old.Epoch || m.Seq > old.Seq+markStep) {
		p.mark.Store(&m)
	}
}

// noteLearning publishes how far learners are.
func (p *part) noteLearning() {
	old := p.learning.Load()
	if !p.p.HasLearners() {
		if old != nil {
			p.learning.Store(nil)
		}
		return
	}
	p.learners = p.p.Learning(p.learners[:0])
	if old == nil || !slices.Equal(*old, p.learners) {
		list := slices.Clone(p.learners)
		p.learning.Store(&list)
	}
}

// markStep is by how much a published mark may be behind: a mark is an allocation.
const markStep = 64

func (p *part) effect(e *replica.Effect) {
	r := p.r
	switch e.Kind {
	case replica.Apply:
		p.unsent = true
		if e.Op != nil {
			e.Op.Owner.(*Task).apply(e)
		} else {
			in := e.Token.(*incoming)
			in.effect = *e
			in.store()
		}
	case replica.Send:
		p.unsent = true
		e.Op.Owner.(*Task).send(e)
	case replica.Abandon: // calls end by themselves: see ackDeadline
	case replica.Answer:
		t := e.Op.Owner.(*Task)
		t.finish(p.p.Holders())
	case replica.Reply:
		e.Token.(*incoming).reply(e)
	case replica.Commit:
		r.marks.add(e.To, committed{route{p.group, e.Epoch, e.To.Incarnation}, e.Mark})
	case replica.Survey, replica.Ask:
		p.unsent = true
		p.ask(e)
	case replica.List:
		p.list(e)
	case replica.Repair:
		p.unsent = true
		p.repair(e)
	case replica.Fetch:
		p.fetch(e)
	case replica.SyncPeer:
		p.unsent = true
		p.sync(e)
	case replica.Expel:
		if e.To != r.cfg.Self && len(p.p.Members()) > 1 && r.cfg.Store.Failed(p.group) {
			// What the other one could not take in time was to come from here: it may be all that is left.
			p.post(event{kind: evFailed, peer: r.cfg.Self})
			return
		}
		r.cfg.Propose(state.ChangeISR{Policy: p.group.Policy, Partition: p.group.Partition, Epoch: e.Epoch, Remove: e.To.Node})
	case replica.Admit:
		r.cfg.Propose(state.ChangeISR{Policy: p.group.Policy, Partition: p.group.Partition, Epoch: e.Epoch, Add: e.To.Node})
	case replica.Renew:
		r.cfg.Propose(state.ChangeISR{Policy: p.group.Policy, Partition: p.group.Partition, Epoch: e.Epoch, Renew: true})
	case replica.Yield:
		p.yield(e)
	case replica.Purge:
		p.purge(e)
	}
}

// deadline is when a call to a member is given up. Its op is answered then at the latest,
// also if the member has hung.
func (r *Replicas) deadline() time.Time {
	return time.Now().Add(r.cfg.AckTimeout + 500*time.Millisecond)
}

// do makes a call and has its outcome handled as an event.
func (p *part) do(to replica.Peer, c *peer.Call, answer func(now replica.Time, q *replica.Partition, c *peer.Call)) {
	c.Done = func(c *peer.Call) {
		p.post(event{kind: evAnswered, batch: true, answer: func(now replica.Time, q *replica.Partition) {
			answer(now, q, c)
			c.Release()
		}})
	}
	p.r.call(to, c)
}
