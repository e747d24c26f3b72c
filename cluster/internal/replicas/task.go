package replicas

import (
	"errors"
	"fmt"

	"sheepdog/cluster/internal/peer"
	"sheepdog/cluster/internal/replica"
	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// Verb says what a Task does.
type Verb uint8

// Verbs. Their numbers travel. Those above VerbDelete are reads of the whole object.
const (
	VerbRead    Verb = 0
	VerbWrite   Verb = 1
	VerbZero    Verb = 2
	VerbDiscard Verb = 3
	VerbDelete  Verb = 4
	VerbStat    Verb = 5 // Info
	VerbSums    Verb = 6 // Sums
	VerbList    Verb = 7 // Infos: objects of the partition with ids from ID on, Len of them at most
	VerbCompare Verb = 8 // Findings: the object as the members have it. Not from gateways
	verbs            = 9
)

// Changes reports whether the verb changes anything.
func (v Verb) Changes() bool { return v >= VerbWrite && v <= VerbDelete }

// Task is a request of a gateway for the primary of a partition. Its owner may use it
// again after Done.
type Task struct {
	Group      object.Group
	Epoch      state.Epoch // that the gateway believes in
	Verb       Verb
	Flags      object.Flags
	SizeShift  uint8
	ID         object.ID
	Off, Len   uint32
	Data       []byte // VerbRead, VerbWrite: Len bytes
	Volume     object.VID
	Generation uint64

	// Err is the outcome. replica.ErrRetry: nothing was acknowledged, ask again.
	Err     error
	Holders []replica.Peer // who may hold the change. Not to be changed
	Info    object.Info
	Sums    []uint64
	Infos   []object.Info
	Done    func(*Task)
	Owner   any // the caller's

	members  []replica.Peer // VerbCompare: with whom
	findings []Finding

	began replica.Time // 0: not measured

	op      replica.Op
	part    *part
	epoch   state.Epoch // of the Apply under way
	req     object.Request
	content content // of Data

	// The data is kept under a number until the task is answered: by this node, or by the gateway
	// that the task came from. 0: it is not.
	number uint64
	keeper replica.Peer

	sends []*send
}

// send is a change on its way to a member.
type send struct {
	task  *Task
	to    replica.Peer
	epoch state.Epoch
	busy  bool
	call  peer.Call
	head  [maxHead]byte

	message change
}

// Submit starts a task. It may be held back until Kick. Done is called once, possibly
// within Submit; it must not wait.
func (r *Replicas) Submit(t *Task) {
	p := r.part(t.Group)
	err := t.check()
	switch {
	case r.closed.Load():
		err = object.ErrClosed
	case err != nil:
	case p == nil: // this node has not heard of the partition yet
		err = replica.ErrRetry
	case t.counts():
		r.flights.began(t)
		if err = r.cfg.Fence(t.Volume, t.Generation); err != nil {
			r.flights.ended(t.flight())
		}
	case t.Generation != 0 && t.Volume != 0:
		err = r.cfg.Fence(t.Volume, t.Generation)
	}
	t.Holders = nil
	if t.Verb < VerbCompare {
		r.clients.Add(1)
	}
	if err != nil {
		t.Err, t.content.made = err, false
		t.Done(t)
		return
	}
	t.part, t.began = p, 0
	if t.Verb < VerbCompare {
		r.waiting.Add(1)
		if t.counts() && r.paced.Load() {
			t.began = r.now()
		}
	}
	t.op = replica.Op{ID: t.ID, Read: !t.Verb.Changes(), Whole: t.Verb >= VerbDelete, Grows: t.grows(), Owner: t}
	first := uint64(t.Off) &^ (object.BlockSize - 1)
	end := (uint64(t.Off) + uint64(t.Len) + object.BlockSize - 1) &^ (object.BlockSize - 1)
	t.op.Off, t.op.Len = uint32(first), uint32(end-first)
	p.post(event{kind: evSubmit, batch: true, task: t, epoch: t.Epoch})
}

// grows reports whether the task may need new space.
func (t *Task) grows() bool {
	return t.Verb == VerbWrite || t.Verb == VerbZero && t.Flags&object.FlagNoHole != 0
}

func (t *Task) check() error {
	switch {
	case t.Verb >= verbs:
		return fmt.Errorf("verb %d: %w", t.Verb, object.ErrInvalid)
	case t.Verb >= VerbDelete:
		return nil
	case t.SizeShift < object.MinSizeShift || t.SizeShift > object.MaxSizeShift || uint64(t.Off)+uint64(t.Len) > 1<<t.SizeShift || t.Len == 0:
		return fmt.Errorf("range %d+%d of an object of 2^%d bytes: %w", t.Off, t.Len, t.SizeShift, object.ErrInvalid)
	case t.Verb <= VerbWrite && len(t.Data) != int(t.Len):
		return fmt.Errorf("%d bytes for a range of %d: %w", len(t.Data), t.Len, object.ErrInvalid)
	}
	return nil
}

// apply carries the task out in this node's store.
func (t *Task) apply(e *replica.Effect) {
	t.epoch = e.Epoch
	if t.Verb >= VerbDelete {
		t.part.r.works.Go(func() { t.applied(t.whole()) })
		return
	}
	t.req = object.Request{
		Op:    [...]object.Op{VerbRead: object.OpRead, VerbWrite: object.OpWrite, VerbZero: object.OpZero, VerbDiscard: object.OpDiscard}[t.Verb],
		Flags: t.Flags, SizeShift: t.SizeShift, ID: t.ID, Policy: t.Group.Policy, Partition: t.Group.Partition,
		Off: t.Off, Len: t.Len, Data: t.Data, Version: e.Version, Done: taskStored, Owner: t,
	}
	if t.Verb == VerbWrite && t.content.made {
		t.req.Sums = t.content.sums
	}
	if e.Careful {
		t.req.Flags |= object.FlagNoGrow
	}
	t.part.r.cfg.Store.Submit(&t.req)
}

func taskStored(r *object.Request) { r.Owner.(*Task).applied(r.Err) }

func (t *Task) applied(err error) {
	t.part.post(event{kind: evApplied, task: t, epoch: t.epoch, err: err})
}

// whole does what concerns all of the object. It may take long.
func (t *Task) whole() (err error) {
	r := t.part.r
	key := object.Key{Group: t.Group, ID: t.ID}
	switch t.Verb {
	case VerbDelete:
		return r.cfg.Store.Delete(r.ctx, key)
	case VerbStat:
		t.Info, err = r.cfg.Store.Stat(r.ctx, key)
	case VerbSums:
		t.Sums, err = r.cfg.Store.Sums(r.ctx, key)
	case VerbCompare:
		t.findings, err = t.compare(key)
	case VerbList:
		t.Infos = t.Infos[:0]
		err = r.cfg.Store.List(r.ctx, t.Group, func(i object.Info) error {
			if i.Key.ID < t.ID {
				return nil
			}
			if t.Infos = append(t.Infos, i); len(t.Infos) >= int(t.Len) {
				return errEnough
			}
			return nil
		})
		if err == errEnough {
			err = nil
		}
	}
	return err
}

// errEnough ends a listing.
var errEnough = errors.New("enough")

// send brings the change to a member or learner.
func (t *Task) send(e *replica.Effect) {
	var s *send
	for _, x := range t.sends {
		if !x.busy {
			s = x
		}
	}
	if s == nil {
		s = &send{task: t}
		s.call.State, s.call.Done = s, sendDone
		t.sends = append(t.sends, s)
	}
	s.busy, s.to, s.epoch = true, e.To, e.Epoch
	m := &s.message
	*m = change{
		route: route{t.Group, e.Epoch, e.To.Incarnation}, session: e.Session, version: e.Version, mark: e.Mark,
		action: action{t.Verb, t.Flags, t.SizeShift, t.ID, t.Off, t.Len, 0},
	}
	c := &s.call
	c.Data = nil
	if t.Verb == VerbWrite {
		t.content.of(t.Off, t.Data)
		if c.Data, m.sum = t.Data, t.content.sum; t.keeps(e.To) {
			c.Data, m.kept = nil, t.number
		}
	}
	c.Class, c.Op, c.Head = peer.Commit, opChange, m.append(s.head[:0])
	c.Deadline = t.part.r.deadline()
	t.part.r.call(e.To, c)
}

func sendDone(c *peer.Call) {
	s := c.State.(*send)
	if s.withData() {
		return
	}
	s.task.part.post(event{kind: evAcked, batch: true, send: s})
}

// counts reports whether the task is one of flights.
func (t *Task) counts() bool { return t.Volume != 0 && t.Verb.Changes() }

// finish gives the task back.
func (t *Task) finish(holders []replica.Peer) {
	r := t.part.r
	switch {
	case !t.counts():
	case t.op.Open:
		t.part.open = append(t.part.open, t.flight())
	default:
		r.flights.ended(t.flight())
	}
	if t.Verb < VerbCompare {
		r.waiting.Add(-1)
	}
	if t.began != 0 && t.op.Err == nil {
		r.pace.took(t.began, r.now())
	}
	t.Err, t.part, t.content.made = t.op.Err, nil, false
	if t.Err == nil && t.Verb.Changes() {
		t.Holders = holders
	}
	t.Done(t)
}
