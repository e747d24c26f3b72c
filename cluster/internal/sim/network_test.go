package sim

import (
	"bytes"
	"encoding/binary"
	"errors"
	"time"

	"sheepdog/cluster/internal/peer"
	"sheepdog/cluster/internal/replica"
	"sheepdog/cluster/internal/replicas"
	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// Operations between nodes, as package replicas numbers them; the numbers travel.
const (
	opAct    = 1
	opChange = 2
	opSurvey = 4
	opRepair = 7
	opSums   = 8
	opBlocks = 9
)

// connection is one to or from a node.
type connection struct {
	node  replica.Peer
	class peer.Class
}

// link is the connections of a process to another node.
type link struct {
	l  *life
	to *node
}

// peer is Config.Peer of replicas.
func (l *life) peer(id state.NodeID) replicas.Peer {
	if id == 0 || int(id) > len(l.n.w.nodes) || id == l.n.id {
		return nil
	}
	if l.links[id] == nil {
		l.links[id] = &link{l, l.n.w.nodes[id-1]}
	}
	return l.links[id]
}

// Kick implements replicas.Peer. Calls are sent at once.
func (k *link) Kick() {}

// Submit implements replicas.Peer.
func (k *link) Submit(c *peer.Call) {
	k.l.n.w.note(func() {
		if k.l.over {
			c.Err = peer.ErrDisconnected
			c.Done(c)
			return
		}
		k.l.n.w.call(k.l, k.to, c)
	})
}

// flight is a call under way.
type flight struct {
	w       *world
	from    *life
	to      *node
	c       *peer.Call
	head    []byte
	data    []byte
	conn    connection
	over    bool
	lost    bool  // no answer will come
	process *life // that it went to
	paid    func()
	count   uint64 // of the connection
}

// call brings a call to another node, and its answer back.
func (w *world) call(from *life, to *node, c *peer.Call) {
	f := &flight{w: w, from: from, to: to, c: c, head: bytes.Clone(c.Head), data: append(bytes.Clone(c.Data), c.Tail...)}
	f.conn = connection{replica.Peer{Node: to.id}, c.Class}
	f.count = from.conns[f.conn]
	f.paid = from.owe(func() { f.finish(nil, nil, peer.ErrDisconnected) })
	if w.mutate(f) {
		return
	}
	f.process = to.life
	w.send(from.n, to, f.arrive, f.lose)
	if c.Class != peer.Data && w.trouble && w.chance(w.doubled) {
		w.happened("message that came twice")
		w.after(w.between(0, w.delay), func() { w.send(from.n, to, f.arrive, nil) })
	}
	w.after(w.between(300*ms, 800*ms), f.watch)
}

func (f *flight) lose() { f.lost = true }

// watch gives a call up when its connection is lost, or its deadline over.
func (f *flight) watch() {
	if f.over {
		return
	}
	w := f.w
	dead := f.lost || f.to.life == nil || f.to.life != f.process || f.to.hung || w.isCut(f.from.n.id, f.to.id) || w.isCut(f.to.id, f.from.n.id)
	late := !f.c.Deadline.IsZero() && time.Now().After(f.c.Deadline)
	if !dead && !late {
		w.after(w.between(100*ms, 300*ms), f.watch)
		return
	}
	if f.from.conns[f.conn] == f.count {
		f.from.conns[f.conn]++ // what comes late on the old connection is not taken any more
	}
	err := peer.ErrDisconnected
	if late {
		err = peer.ErrTimeout
	}
	f.end(nil, nil, err)
}

// arrive is at the other node.
func (f *flight) arrive() {
	if w := f.w; w.called != nil {
		if w.called(f) {
			return
		}
	}
	l := f.to.life
	from := connection{replica.Peer{Node: f.from.n.id, Incarnation: f.from.inc}, f.c.Class}
	if f.c.Class == peer.Data {
		if f.count < l.newest[from] {
			f.lost = true
			return
		}
		l.newest[from] = f.count
	}
	if l.reps == nil {
		f.reply(nil, nil, replica.ErrRetry)
		return
	}
	if f.w.broken == skipEpoch && f.c.Op == opChange {
		// The epoch in the head's route, and that of the version, become those known here.
		if list, i := l.view.Policies[0].Partitions, int(binary.LittleEndian.Uint16(f.head[1:])); i < len(list) { // else it has not followed yet
			binary.LittleEndian.PutUint64(f.head[3:], uint64(list[i].Epoch))
			binary.LittleEndian.PutUint64(f.head[23:], uint64(list[i].Epoch))
		}
	}
	c := &peer.Call{Class: f.c.Class, Op: f.c.Op, Head: bytes.Clone(f.head), Data: bytes.Clone(f.data), Want: min(max(f.c.Want, len(f.c.ReplyData)), maxReply)}
	r := f.w.local.Request(&peer.Identity{Cluster: "sim", Name: f.from.n.name, Node: f.from.n.id, Incarnation: f.from.inc}, c, func(r *peer.Request, err error) {
		head, data := r.ReplyHead, r.ReplyData
		if f.w.broken == ignoreSpace && c.Op == opChange && errors.Is(err, object.ErrNoSpace) {
			err = nil
		}
		f.w.note(func() {
			if !l.over {
				f.reply(head, data, err)
			}
		})
	})
	if !l.reps.Handle(r) {
		f.w.fail("operation %d is not known", c.Op)
	}
	l.kick()
}

// maxReply is the most that any answer here needs. What calls have room for is much more,
// and takes long to be cleared.
const maxReply = 64 << 10

// reply sends the answer.
func (f *flight) reply(head, data []byte, err error) {
	f.w.send(f.to, f.from.n, func() { f.end(head, data, err) }, f.lose)
}

// end gives the call back, when its owner is awake.
func (f *flight) end(head, data []byte, err error) {
	f.from.whenAwake(func() {
		if !f.over {
			f.paid()
			f.finish(head, data, err)
			f.from.kick()
		}
	})
}

func (f *flight) finish(head, data []byte, err error) {
	f.over = true
	c := f.c
	f.w.logf("%s: call %d to %s has ended: %v", f.from.n.name, c.Op, f.to.name, err)
	c.Err = err
	if err == nil {
		c.ReplyHead = append(c.ReplyHead[:0], head...)
		if c.ReplyData == nil {
			c.ReplyData = data
		} else {
			c.ReplyData = c.ReplyData[:copy(c.ReplyData, data)]
		}
	}
	c.Done(c)
}

func (w *world) isCut(from, to state.NodeID) bool {
	_, ok := w.cut[[2]state.NodeID{from, to}]
	return ok
}

// send brings a message to a node's present process, or calls lost, if that is not nil,
// which stands for what tells the sender in the end.
func (w *world) send(from, to *node, fn, lost func()) {
	l := to.life
	if l == nil || w.isCut(from.id, to.id) || w.trouble && w.chance(w.lost) {
		if lost != nil {
			lost()
		}
		return
	}
	d := w.between(ms/20, 2*ms)
	if w.trouble && w.chance(w.late) {
		d = w.between(2*ms, w.delay)
	}
	w.after(d, func() {
		if !l.over && !w.isCut(from.id, to.id) {
			l.whenAwake(fn)
		} else if lost != nil {
			lost()
		}
	})
}

// mutation is a deliberate mistake, which the simulation must find.
type mutation string

const (
	ackEarly       mutation = "answer before the last member has applied"
	skipSettle     mutation = "serve without settling"
	wrongSource    mutation = "reconcile from the learner"
	ignoreLease    mutation = "serve without a lease"
	skipGeneration mutation = "take changes of former owners"
	forgetDrain    mutation = "answer surveys while older changes are under way"
	trustMarks     mutation = "trust marks from before a restart of all members"
	trustFlushes   mutation = "do not tell flushes of a restart of all members"
	skipEpoch      mutation = "take changes of other epochs"
	takeUndecided  mutation = "serve while it is not decided who holds the partition"
	ignoreSpace    mutation = "take a change for made that a member had no space for"
)

// mutations is all of them, and within how many stories about what they must be found: some times as many
// as it takes, since any change of what is simulated tells other stories. It ends with the first that finds it.
var mutations = []struct {
	mutation mutation
	about    string
	within   int
}{
	{ackEarly, "epochs", 40}, {wrongSource, "epochs", 40}, {skipGeneration, "anything", 40}, {skipSettle, "epochs", 40},
	{ignoreLease, "leases", 1000}, {trustFlushes, "blackouts", 500}, {trustMarks, "blackouts", 500},
	{skipEpoch, "epochs", 500}, {forgetDrain, "epochs", 3000}, {takeUndecided, "doubts", 1000},
	{ignoreSpace, "space", 40},
}

// mutate makes the mistakes that are made on the way; true: the call is dealt with.
func (w *world) mutate(f *flight) bool {
	answer := func(data []byte) { w.after(0, func() { f.end(nil, data, nil) }) }
	switch {
	case w.broken == ackEarly && f.c.Op == opChange:
		w.send(f.from.n, f.to, f.arrive, nil)
		answer(nil)
	case w.broken == skipSettle && f.c.Op == opRepair && f.c.Class == peer.Commit:
		answer(nil)
	case w.broken == forgetDrain && f.c.Op == opSurvey:
		answer(make([]byte, 20)) // a report that says nothing
	case w.broken == wrongSource && (f.c.Op == opSums || f.c.Op == opBlocks):
		// The learner asks itself: the head's route ends with whom it is for.
		binary.LittleEndian.PutUint64(f.head[11:], f.from.inc)
		f.to, f.process = f.from.n, f.from
		w.send(f.to, f.to, f.arrive, f.lose)
		w.after(300*ms, f.watch)
	default:
		return false
	}
	return true
}

// distort makes the mistakes in what nodes take the state for.
func (w *world) distort(v *state.View) *state.View {
	if w.broken != trustMarks && w.broken != takeUndecided && w.broken != trustFlushes || len(v.Policies) == 0 {
		return v
	}
	c := *v
	c.Policies = nil
	for _, p := range v.Policies {
		q := *p
		q.Partitions = nil
		for _, part := range p.Partitions {
			if w.broken == takeUndecided {
				part.Waiting = nil
			} else {
				part.Restarted = 0
			}
			q.Partitions = append(q.Partitions, part)
		}
		c.Policies = append(c.Policies, &q)
	}
	return &c
}
