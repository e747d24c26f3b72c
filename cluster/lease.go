package cluster

import (
	"encoding/binary"
	"sync"
	"time"

	"sheepdog/cluster/internal/consensus"
	"sheepdog/cluster/internal/peer"
	"sheepdog/cluster/internal/steward"
	"sheepdog/cluster/state"
)

// Leases (INV-R5). A node may answer for a time that counts from when it asked the leader,
// never from when it heard of it: what it hears may have waited in a socket while its
// process was stopped. All times are of the machine's monotonic clock, which goes on while
// a process is stopped, and durations are all that nodes compare. It may stand still while
// all of the machine is stopped, as a hypervisor does with a guest: see DESIGN.md.

const (
	// askEvery is how often a node asks for its lease. Some questions may be lost before the
	// lease ends.
	askEvery = 200 * time.Millisecond
	// asksAtATime bounds the questions without an answer: a leader that hangs gets no more.
	asksAtATime = 4
	// unreachedAfter is for how long a node is tried to be connected to before the leader is told.
	unreachedAfter = 700 * time.Millisecond
	// maxUnreached bounds how many it is told.
	maxUnreached = 64
	// connectEvery is after how many questions it is looked for voters that are not connected.
	connectEvery = 5
)

// lease is until when this node may answer.
type lease struct {
	mu     sync.Mutex
	holder steward.Holder
	asking int
	again  chan struct{} // ask at once
}

// opLease is a question for a lease. Head: the node's number, incarnation, and the epoch that it
// has followed; the question's number, flags, the numbers of nodes that are not reached. Reply:
// the verdict. Control
const opLease uint16 = 70

// keepLease asks for leases, from when the node has its incarnation.
func (f *flock) keepLease() {
	t := time.NewTicker(askEvery)
	defer t.Stop()
	for n := 0; ; n++ {
		var changed <-chan struct{}
		if l := f.n.consensus.Load(); l != nil && f.replicas() != nil {
			var leader string
			leader, changed = l.Leader()
			f.askForLease(leader)
			if n%connectEvery == 0 {
				f.connectVoters(l)
				f.tryLinks()
			}
		}
		select {
		case <-f.ctx.Done():
			return
		case <-t.C:
		case <-changed:
		case <-f.lease.again:
		}
	}
}

// connectVoters has a connection ready for each node that may be the next leader.
func (f *flock) connectVoters(l *consensus.Log) {
	for _, s := range l.Servers() {
		if s.Voter && s.Node != f.n.cfg.Name {
			f.net.Peer(s.Node).Connect(peer.Control)
		}
	}
}

// tryLinks has a node that is down find out whether it reaches those that are up.
func (f *flock) tryLinks() {
	v := f.n.state.View()
	if self := v.NodeByName(f.n.cfg.Name); self == nil || self.State == state.NodeUp {
		return
	}
	for _, m := range v.Nodes {
		if m.Name != f.n.cfg.Name && m.State == state.NodeUp {
			f.net.Peer(m.Name).Connect(peer.Commit)
		}
	}
}

// unreached are the nodes that are up and that this one has not reached for a while.
func (f *flock) unreached() (list []state.NodeID) {
	for _, m := range f.n.state.View().Nodes {
		if m.State == state.NodeUp && m.Name != f.n.cfg.Name && len(list) < maxUnreached && f.net.Peer(m.Name).Unreached() >= unreachedAfter {
			list = append(list, m.ID)
		}
	}
	return list
}

// Flags of a question for a lease.
const (
	flagServing = 1 << iota
	flagRenounced
)

func appendSaying(b []byte, s steward.Saying) []byte {
	flags := byte(0)
	if s.Serving {
		flags |= flagServing
	}
	if s.Renounced {
		flags |= flagRenounced
	}
	b = append(binary.LittleEndian.AppendUint64(b, s.Number), flags)
	for _, id := range s.Unreached {
		b = binary.LittleEndian.AppendUint16(b, uint16(id))
	}
	return b
}

func decodeSaying(b []byte) steward.Saying {
	s := steward.Saying{Number: binary.LittleEndian.Uint64(b), Serving: b[8]&flagServing != 0, Renounced: b[8]&flagRenounced != 0}
	for b = b[9:]; len(b) >= 2; b = b[2:] {
		s.Unreached = append(s.Unreached, state.NodeID(binary.LittleEndian.Uint16(b)))
	}
	return s
}

// leaseHead is what a question has at least, in bytes.
const leaseHead = 2 + 8 + 8 + 8 + 1

// askForLease asks the leader once, which may be this node itself.
func (f *flock) askForLease(leader string) {
	life, followed := state.Life{Node: state.NodeID(f.n.self.Load()), Incarnation: f.n.inc.Load()}, f.replicas().Followed()
	switch leader {
	case "":
		return
	case f.n.cfg.Name:
		if verdict, at := f.leader.grantSelf(life, followed, f.unreached()); verdict == steward.Granted {
			f.answered(leader, verdict, at)
		}
		return
	}
	unreached, serving := f.unreached(), f.gates.Serving()
	e := &f.lease
	e.mu.Lock()
	asked := time.Now()
	ok := e.asking < asksAtATime
	var say steward.Saying
	if ok {
		say, ok = e.holder.Ask(asked, unreached, serving)
	}
	if !ok {
		e.mu.Unlock()
		return
	}
	e.asking++
	if say.Renounced {
		f.replicas().SetLease(f.start)
	}
	e.mu.Unlock()
	head := binary.LittleEndian.AppendUint16(nil, uint16(life.Node))
	head = binary.LittleEndian.AppendUint64(head, life.Incarnation)
	head = binary.LittleEndian.AppendUint64(head, uint64(followed))
	head = appendSaying(head, say)
	c := &peer.Call{Class: peer.Control, Op: opLease, Head: head, Deadline: asked.Add(f.n.cfg.Network.Lease)}
	c.Done = func(c *peer.Call) {
		e.mu.Lock()
		e.asking--
		e.mu.Unlock()
		if c.Err == nil && len(c.ReplyHead) == 1 {
			f.answered(leader, steward.Verdict(c.ReplyHead[0]), asked)
		}
	}
	p := f.net.Peer(leader)
	p.Submit(c)
	p.Kick()
}

// answered takes the answer to a question of a time.
func (f *flock) answered(leader string, v steward.Verdict, asked time.Time) {
	e := &f.lease
	e.mu.Lock()
	from, was, better := e.holder.Answered(v, asked)
	if better {
		f.replicas().SetLease(from.Add(f.n.cfg.Network.Lease))
	}
	e.mu.Unlock()
	if v == was {
		return
	}
	switch v {
	case steward.Cut:
		f.log.Warn("this node and another one do not reach each other, and the leader has them do without this one", "leader", leader)
		signal(e.again)
	case steward.Unknown:
		f.log.Warn("the leader knows no such node", "leader", leader) // watchRemoval finds out
	case steward.Other:
		f.log.Error("another process has started as this node and has taken its place: stop one of the two, or give it a name of its own", "leader", leader)
	case steward.Deaf:
		if was == steward.Granted {
			f.log.Warn("the leader cannot connect to this node, which is reached by nobody then: is there a firewall before its peer port?", "leader", leader)
		}
	case steward.Down:
		if was == steward.Granted {
			f.log.Warn("the cluster counts this node as down: it has not answered for too long", "leader", leader)
		}
	}
}

// granted is when the lease was last asked for with success; the zero time: never.
func (e *lease) granted() time.Time {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.holder.From()
}

// endLease gives the lease up for good.
func (f *flock) endLease() {
	e := &f.lease
	e.mu.Lock()
	defer e.mu.Unlock()
	e.holder.Leave()
	if r := f.replicas(); r != nil {
		r.SetLease(f.start)
	}
}

// answerLease answers a node that asks, as the leader or as one that is not.
func (f *flock) answerLease(r *peer.Request) {
	life := state.Life{Node: state.NodeID(binary.LittleEndian.Uint16(r.Head)), Incarnation: binary.LittleEndian.Uint64(r.Head[2:])}
	verdict, _ := f.leader.grant(r.From.Name, life, state.Epoch(binary.LittleEndian.Uint64(r.Head[10:])), decodeSaying(r.Head[18:]))
	r.ReplyData = nil
	r.ReplyHead = append(r.ReplyHead, byte(verdict))
	r.Reply(nil)
}

// grantSelf is grant for this node, which says whom it does not reach.
func (l *leader) grantSelf(life state.Life, followed state.Epoch, unreached []state.NodeID) (steward.Verdict, time.Time) {
	l.questions++
	return l.grant(l.f.n.cfg.Name, life, followed, steward.Saying{Unreached: unreached, Number: l.questions})
}

// grant decides about a lease of a node, this one or another. If it is granted, it is good
// for a question that was asked at the time it returns, or before.
func (l *leader) grant(node string, life state.Life, followed state.Epoch, what steward.Saying) (steward.Verdict, time.Time) {
	log := l.f.n.consensus.Load()
	if log == nil {
		return steward.NotLeading, time.Time{}
	}
	self := node == l.f.n.cfg.Name
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	contact := log.QuorumContact(l.reign)
	if !l.reigning || now.Sub(contact) > log.LeaderLease() && !self {
		return steward.NotLeading, time.Time{}
	}
	v := l.f.n.state.View()
	reached := self || l.reaches(node)
	if reached {
		l.facts.Spoke(node, now)
	}
	if steward.InStep(v, life.Node, followed) {
		l.facts.Heard(node, life.Incarnation, now, what, reached)
	}
	verdict := l.steward.Grant(v, life, followed, reached)
	if verdict == steward.Down || verdict == steward.Cut {
		signal(l.wake) // it may be up again, or down at last
	}
	if self { // a new leader waits from its election, and that came after the contact
		return verdict, contact
	}
	return verdict, now
}

// reaches reports whether this node can connect to another one. One that can ask and that
// nobody reaches would be primary of what no client gets at: it must not stay up.
func (l *leader) reaches(node string) bool {
	p := l.f.net.Peer(node)
	p.Connect(peer.Commit)
	_, ok := p.Identity(peer.Commit)
	return ok
}

// deafAfter is how long a leader may hear no questions of a majority of the voters.
const deafAfter = time.Second

// deaf reports whether this node leads and is not reached by those who follow it: they get
// no leases. Raft does not notice, for it asks them by connections that the leader makes.
func (l *leader) deaf(log *consensus.Log, now time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	voters, heard := 0, 0
	for _, s := range log.Servers() {
		if !s.Voter {
			continue
		}
		voters++
		if s.Node == l.f.n.cfg.Name || now.Sub(l.facts.LastSpoke(s.Node)) < deafAfter {
			heard++
		}
	}
	return now.Sub(l.reign.Since) > deafAfter && 2*heard <= voters
}
