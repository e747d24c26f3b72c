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
	// connectEvery is after how many questions it is looked for voters that are not connected.
	connectEvery = 5
)

// lease is until when this node may answer.
type lease struct {
	mu     sync.Mutex
	from   time.Time // when it was asked for
	left   bool      // there is none any more
	asking int
	last   steward.Verdict
	again  chan struct{} // ask at once
}

// opLease is a question for a lease. Head: the node's number, incarnation, and the epoch that it
// has followed. Reply: the verdict. Control
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

// askForLease asks the leader once, which may be this node itself.
func (f *flock) askForLease(leader string) {
	life, followed := state.Life{Node: state.NodeID(f.n.self.Load()), Incarnation: f.n.inc.Load()}, f.replicas().Followed()
	switch leader {
	case "":
		return
	case f.n.cfg.Name:
		if verdict, at := f.leader.grant(leader, life, followed); verdict == steward.Granted {
			f.extend(at)
		}
		return
	}
	e := &f.lease
	e.mu.Lock()
	if e.left || e.asking == asksAtATime {
		e.mu.Unlock()
		return
	}
	e.asking++
	e.mu.Unlock()
	head := binary.LittleEndian.AppendUint16(nil, uint16(life.Node))
	head = binary.LittleEndian.AppendUint64(head, life.Incarnation)
	head = binary.LittleEndian.AppendUint64(head, uint64(followed))
	asked := time.Now()
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
	was := e.last
	if v != steward.NotLeading {
		e.last = v
	}
	e.mu.Unlock()
	if v == steward.Granted {
		f.extend(asked)
	}
	if v == was {
		return
	}
	switch v {
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

// extend has the lease end not before a lease's time after the given one.
func (f *flock) extend(from time.Time) {
	e := &f.lease
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.left || !from.After(e.from) {
		return
	}
	e.from = from
	f.replicas().SetLease(from.Add(f.n.cfg.Network.Lease))
}

// granted is when the lease was last asked for with success; the zero time: never.
func (e *lease) granted() time.Time {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.from
}

// endLease gives the lease up for good.
func (f *flock) endLease() {
	e := &f.lease
	e.mu.Lock()
	defer e.mu.Unlock()
	e.left = true
	if r := f.replicas(); r != nil {
		r.SetLease(f.start)
	}
}

// answerLease answers a node that asks, as the leader or as one that is not.
func (f *flock) answerLease(r *peer.Request) {
	life := state.Life{Node: state.NodeID(binary.LittleEndian.Uint16(r.Head)), Incarnation: binary.LittleEndian.Uint64(r.Head[2:])}
	verdict, _ := f.leader.grant(r.From.Name, life, state.Epoch(binary.LittleEndian.Uint64(r.Head[10:])))
	r.ReplyData = nil
	r.ReplyHead = append(r.ReplyHead, byte(verdict))
	r.Reply(nil)
}

// grant decides about a lease of a node, this one or another. If it is granted, it is good
// for a question that was asked at the time it returns, or before.
func (l *leader) grant(node string, life state.Life, followed state.Epoch) (steward.Verdict, time.Time) {
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
	if !self && !l.reaches(node) {
		return steward.Deaf, time.Time{}
	}
	v := l.f.n.state.View()
	l.facts.Spoke(node, now)
	if steward.InStep(v, life.Node, followed) {
		l.facts.Heard(node, life.Incarnation, now)
	}
	verdict := l.steward.Grant(v, life, followed)
	if verdict == steward.Down {
		signal(l.wake) // it may be up again
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
