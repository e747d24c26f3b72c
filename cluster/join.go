package cluster

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"sheepdog/cluster/internal/consensus"
	"sheepdog/cluster/internal/members"
	"sheepdog/cluster/internal/peer"
	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// Operations between nodes, beside those of package replicas. Their numbers travel.
const (
	firstNodeOp uint16 = 64
	opPropose   uint16 = 64 // an entry for the log, for the leader. Data
	opJoin      uint16 = 65 // let me in. Head: the node's name. Reply: the cluster's id. Data
	opAdmit     uint16 = 66 // the same, from a member that has been asked, for the leader. Data
	opFence     uint16 = 67 // nothing older of a volume happens here any more. Head: vid, generation. Reply's head: how far the log was applied then. Data
)

const (
	opKnown    uint16 = 69 // this node has applied the log up to an index. Head: the index. Data
	opAnnounce uint16 = 68 // a node has started, for the leader. Data: state.Announce in JSON. Reply: its number and incarnation. Data
)

// serve carries out opPropose, opJoin and opAdmit.
func (f *flock) serve(r *peer.Request) {
	if f.ctx.Err() != nil {
		r.Reply(object.ErrClosed)
		return
	}
	member := r.From.Cluster != "" && r.From.Cluster == f.net.Identity().Cluster
	switch {
	case r.Op == opPropose && member:
		f.tasks.Go(func() { f.applyForwarded(r) })
	case r.Op == opAnnounce && member:
		f.tasks.Go(func() { f.takeAnnounce(r) })
	case r.Op == opLease && member && r.Class == peer.Control && len(r.Head) >= leaseHead:
		f.answerLease(r)
	case r.Op == opFence && member && len(r.Head) == 12:
		vid, generation := object.VID(binary.LittleEndian.Uint32(r.Head)), binary.LittleEndian.Uint64(r.Head[4:])
		f.tasks.Go(func() {
			err := f.fence(f.ctx, vid, generation)
			r.ReplyData = nil
			r.ReplyHead = binary.LittleEndian.AppendUint64(r.ReplyHead, f.applied())
			r.Reply(err)
		})
	case r.Op == opWitness && member:
		r.ReplyData = nil
		r.ReplyHead = f.appendWitness(r.ReplyHead)
		r.Reply(nil)
	case r.Op == opKnown && member && len(r.Head) == 8:
		index := binary.LittleEndian.Uint64(r.Head)
		f.tasks.Go(func() {
			r.ReplyData = nil
			r.Reply(f.knows(f.ctx, index))
		})
	case r.Op == opJoin:
		name := r.From.Name
		f.tasks.Go(func() { f.reply(r, f.invite(name)) })
	case r.Op == opAdmit && member:
		name := string(r.Head)
		f.tasks.Go(func() { f.reply(r, f.letIn(name)) })
	default:
		if !f.operate(r, member) {
			r.Reply(peer.ErrUnsupported)
		}
	}
}

func (f *flock) reply(r *peer.Request, err error) {
	r.ReplyData = nil
	r.ReplyHead = append(r.ReplyHead, f.n.state.View().Cluster.ID...)
	r.Reply(err)
}

// Forward implements consensus.Forwarder.
func (f *flock) Forward(ctx context.Context, leader string, entry []byte) ([]byte, error) {
	c := &peer.Call{Class: peer.Data, Op: opPropose, Data: bytes.Clone(entry), Want: peer.MaxData}
	c.Deadline, _ = ctx.Deadline()
	done := make(chan []byte, 1)
	c.Done = func(c *peer.Call) {
		answer := bytes.Clone(c.ReplyData)
		c.Release()
		done <- answer
	}
	p := f.net.Peer(leader)
	p.Submit(c)
	p.Kick()
	select {
	case answer := <-done:
		return answer, c.Err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// applyForwarded takes an entry of another node to the log.
func (f *flock) applyForwarded(r *peer.Request) {
	l := f.n.consensus.Load()
	if l == nil {
		r.Reply(errUnformatted)
		return
	}
	ctx, cancel := context.WithTimeout(f.ctx, time.Minute)
	defer cancel()
	r.ReplyData = l.ApplyForwarded(ctx, bytes.Clone(r.Data))
	r.Reply(nil)
}

// call makes a call to a node and waits for the head of its reply.
func (f *flock) call(node string, op uint16, head []byte) ([]byte, error) {
	c := &peer.Call{Class: peer.Data, Op: op, Head: head, Deadline: time.Now().Add(joinTimeout)}
	f.finish(node, c)
	return c.ReplyHead, c.Err
}

// joinTimeout bounds an attempt to be let in.
const joinTimeout = 10 * time.Second

// takeAnnounce takes a node that has started, as the leader.
func (f *flock) takeAnnounce(r *peer.Request) {
	var a state.Announce
	if err := json.Unmarshal(r.Data, &a); err != nil || a.Name != r.From.Name {
		r.Reply(fmt.Errorf("announcement of node %q is not well formed: %w", r.From.Name, object.ErrInvalid))
		return
	}
	life, err := f.announceHere(f.ctx, a)
	r.ReplyData = nil
	r.ReplyHead = binary.LittleEndian.AppendUint16(r.ReplyHead, uint16(life.Node))
	r.ReplyHead = binary.LittleEndian.AppendUint64(r.ReplyHead, life.Incarnation)
	r.Reply(err)
}

func (f *flock) announceHere(ctx context.Context, a state.Announce) (state.Life, error) {
	l := f.n.consensus.Load()
	if l == nil || !l.Leading() {
		return state.Life{}, fmt.Errorf("%w: %w", object.ErrUnavailable, consensus.ErrNotLeader)
	}
	ctx, cancel := context.WithTimeout(ctx, joinTimeout)
	defer cancel()
	return f.leader.announce(ctx, a)
}

// announce tells the leader that this node has started, until it has taken note.
func (f *flock) announce(ctx context.Context, a state.Announce) (state.Life, error) {
	data, err := json.Marshal(a)
	if err != nil {
		return state.Life{}, err
	}
	told := false
	for {
		leader, changed := f.n.consensus.Load().Leader()
		var life state.Life
		err := fmt.Errorf("%w: the cluster has no leader now", object.ErrUnavailable)
		switch leader {
		case "":
		case f.n.cfg.Name:
			life, err = f.announceHere(ctx, a)
		default:
			life, err = f.announceTo(leader, data)
		}
		if err == nil || errors.Is(err, object.ErrInvalid) {
			return life, err
		}
		if waited, err := f.awaitNewer(ctx); waited {
			if err != nil {
				return life, err
			}
			continue
		}
		if !told {
			told = true
			f.log.Info("waiting for the cluster's leader to take note of this node", "leader", leader, "reason", err)
		}
		select {
		case <-ctx.Done():
			return life, ctx.Err()
		case <-changed:
		case <-time.After(retryPause):
		}
	}
}

func (f *flock) announceTo(leader string, data []byte) (state.Life, error) {
	c := &peer.Call{Class: peer.Data, Op: opAnnounce, Data: data, Deadline: time.Now().Add(joinTimeout)}
	f.finish(leader, c)
	if c.Err != nil {
		return state.Life{}, c.Err
	}
	if len(c.ReplyHead) != 10 {
		return state.Life{}, fmt.Errorf("answer of the leader is not well formed: %w", object.ErrUnavailable)
	}
	return state.Life{Node: state.NodeID(binary.LittleEndian.Uint16(c.ReplyHead)), Incarnation: binary.LittleEndian.Uint64(c.ReplyHead[2:])}, nil
}

// awaitUp waits until the leader has declared this node up, because it asks for a lease.
func (f *flock) awaitUp(ctx context.Context, life state.Life) error {
	for {
		applied := f.n.follower.changed()
		m := f.n.state.View().Node(life.Node)
		switch {
		case m == nil || m.Incarnation < life.Incarnation: // it is not applied here yet
		case m.Incarnation > life.Incarnation:
			return fmt.Errorf("%w: another process has started as node %q", object.ErrInvalid, f.n.cfg.Name)
		case m.State == state.NodeUp:
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-applied:
		}
	}
}

// finish makes a call and waits for its end.
func (f *flock) finish(node string, c *peer.Call) {
	done := make(chan struct{})
	c.Done = func(*peer.Call) { close(done) }
	p := f.net.Peer(node)
	p.Submit(c)
	p.Kick()
	<-done
}

// invite has the leader let a node in.
func (f *flock) invite(name string) error {
	l := f.n.consensus.Load()
	if l == nil || !f.n.state.View().Formatted() {
		return errUnformatted
	}
	leader, _ := l.Leader()
	switch leader {
	case "":
		return fmt.Errorf("%w: the cluster has no leader now", object.ErrUnavailable)
	case f.n.cfg.Name:
		return f.letIn(name)
	}
	_, err := f.call(leader, opAdmit, []byte(name))
	return err
}

// letIn lets a node in that has no state, as the leader.
func (f *flock) letIn(name string) error {
	l := f.n.consensus.Load()
	if l == nil {
		return errUnformatted
	}
	ctx, cancel := context.WithTimeout(f.ctx, joinTimeout)
	defer cancel()
	if slices.Contains(f.n.state.View().Gone, name) {
		if _, err := f.n.command(ctx, state.Command{Welcome: &state.Welcome{Name: name}}); err != nil {
			return err
		}
	}
	return l.Admit(ctx, name, true)
}

// seek looks for a cluster to be let in, until there is one, this node is formatted, or
// ctx ends.
func (f *flock) seek(ctx context.Context) error {
	t := time.NewTicker(seekEvery)
	defer t.Stop()
	told := ""
	for {
		for _, m := range f.members.List() {
			if m.Cluster == "" || m.State != members.Alive || m.Name == f.n.cfg.Name {
				continue
			}
			err := f.joinThrough(ctx, m)
			if err == nil {
				return nil
			}
			if told != err.Error() {
				told = err.Error()
				f.log.Warn("the cluster did not let this node in; trying again", "cluster", m.Cluster, "through", m.Name, "err", err)
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-f.n.opened:
			return nil
		case <-t.C:
		case <-f.members.Changed():
		}
	}
}

const seekEvery = time.Second

// strangers are the nodes that belong to no cluster and will come to the one that is made now.
func (f *flock) strangers() (names []string) {
	if f == nil {
		return nil
	}
	for _, m := range f.members.List() {
		if m.Cluster == "" && m.State == members.Alive && m.Name != f.n.cfg.Name {
			names = append(names, m.Name)
		}
	}
	return names
}

const (
	// votersTimeout is how long a new cluster waits for its voters, votersPause between two looks.
	votersTimeout = 5 * time.Second
	votersPause   = 50 * time.Millisecond
)

// awaitVoters waits until a new cluster stands the loss of a node, as far as those that are known suffice, but not for long: one of
// them may be of no use.
func (f *flock) awaitVoters(ctx context.Context, known []string) {
	ctx, cancel := context.WithTimeout(ctx, votersTimeout)
	defer cancel()
	l, want := f.n.consensus.Load(), consensus.Voters(1+len(known))
	for {
		voters := 0
		for _, s := range l.Servers() {
			if s.Voter {
				voters++
			}
		}
		if voters >= want {
			return
		}
		select {
		case <-ctx.Done():
			f.log.Warn("the new cluster has fewer voters than it should: do not lose this node before \"dog node list --json\" shows more of them", "voters", voters, "want", want, "known", known)
			return
		case <-time.After(votersPause):
		}
	}
}

// joinThrough asks a member to be let in, and becomes one.
func (f *flock) joinThrough(ctx context.Context, m members.Member) error {
	n := f.n
	if n.cfg.DiskCluster != "" && n.cfg.DiskCluster != m.Cluster {
		return fmt.Errorf("its disks belong to cluster %s: use empty disks, or join that one: %w", n.cfg.DiskCluster, object.ErrInvalid)
	}
	id, err := f.call(m.Name, opJoin, nil)
	if err != nil {
		return err
	}
	if string(id) != m.Cluster {
		return fmt.Errorf("node %q is in cluster %q and says %q: %w", m.Name, m.Cluster, id, object.ErrUnavailable)
	}
	n.mu.Lock()
	if n.consensus.Load() != nil {
		n.mu.Unlock()
		return nil // formatted meanwhile
	}
	err = f.enter(ctx, string(id))
	n.mu.Unlock()
	if err != nil {
		return err
	}
	return n.join(ctx)
}

// enter makes the node's log, and follows the cluster's.
func (f *flock) enter(ctx context.Context, cluster string) error {
	n := f.n
	f.log.Info("joining cluster", "cluster", cluster)
	// In this order: who has a log and does not know of which cluster is let in by nobody, and who
	// has no log asks to be let in.
	if err := n.keepCluster(cluster); err != nil {
		return err
	}
	exists, err := consensus.Exists(n.cfg.Dir)
	if err == nil && !exists {
		err = consensus.Prepare(n.cfg.Dir, n.cfg.Name, n.log)
	}
	if err != nil {
		return err
	}
	id := f.net.Identity()
	id.Cluster = cluster
	if err := errors.Join(f.net.SetIdentity(id), f.members.Update(f.info(cluster))); err != nil {
		return err
	}
	return n.openConsensus(ctx)
}
