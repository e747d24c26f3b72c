package replica_test

import (
	"maps"
	"slices"

	"sheepdog/cluster/internal/replica"
	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// change is what travels with an op.
type change struct {
	first  int
	values []uint64 // nil: the object is deleted
}

// request is an op of a client, as its primary has it.
type request struct {
	replica.Op
	change change
	got    []uint64 // read
	done   func(got []uint64, err error)
}

// requests finds the request of an op.
func (n *simNode) request(op *replica.Op) *request { return n.s.requests[op] }

// perform carries out what a partition wants.
func (n *simNode) perform(p *replica.Partition) {
	for {
		effects := slices.Clone(p.Effects())
		if len(effects) == 0 {
			return
		}
		for _, e := range effects {
			n.effect(p, e)
		}
	}
}

func (n *simNode) effect(p *replica.Partition, e replica.Effect) {
	s := n.s
	switch e.Kind {
	case replica.Apply:
		if e.Op != nil {
			n.applyOwn(p, e)
		} else {
			n.applyReceived(p, e)
		}
	case replica.Send:
		n.sendChange(p, e)
	case replica.Abandon: // the calls of the simulation end by themselves
	case replica.Answer:
		r := n.request(e.Op)
		delete(s.requests, e.Op)
		r.done(r.got, e.Op.Err)
	case replica.Reply:
		e.Token.(func(replica.Report, error))(e.Report, e.Err)
	case replica.Commit:
		to, i, from := s.node(e.To), n.index(p), n.self()
		s.send(n, to, func() {
			q := to.parts[i]
			q.Committed(from, e.Epoch, e.Mark)
			to.perform(q)
		})
	case replica.Survey:
		n.survey(p, e)
	case replica.Ask:
		n.ask(p, e)
	case replica.List:
		n.list(p, e)
	case replica.Repair:
		n.repair(p, e)
	case replica.Fetch:
		s.fail("nothing rots here, but %s fetches", n.name)
	case replica.SyncPeer:
		n.syncPeer(p, e)
	case replica.Expel, replica.Admit, replica.Renew:
		n.propose(p, e)
	case replica.Yield:
		n.yield(p, e)
	case replica.Purge:
		n.purge(p, e)
	}
}

func (s *sim) node(m replica.Peer) *simNode { return s.nodes[m.Node-1] }

func (n *simNode) index(p *replica.Partition) int { return slices.Index(n.parts, p) }

// applyOwn carries out an op of the primary.
func (n *simNode) applyOwn(p *replica.Partition, e replica.Effect) {
	r := n.request(e.Op)
	var err error
	n.do(func() {
		if e.Op.Read {
			r.got = make([]uint64, len(r.change.values))
			if o := n.disk.objects[e.Op.ID]; o != nil {
				copy(r.got, o.blocks[r.change.first:])
			}
			return
		}
		if err = n.room(e.Op.ID, r.change, e.Careful); err == nil {
			n.store(e.Op.ID, e.Version, r.change)
		}
	}, func() {
		p.Applied(n.s.now, e.Op, e.Epoch, err)
		n.perform(p)
	})
}

func (n *simNode) store(id object.ID, v object.Version, c change) {
	if c.values == nil {
		delete(n.disk.objects, id)
		n.disk.dirty[id] = true
		return
	}
	n.put(id, v, c.first, c.values)
}

// room fails if a change needs space that there is not, or if it is careful and needs any.
func (n *simNode) room(id object.ID, c change, careful bool) error {
	grows := 0
	o := n.disk.objects[id]
	for k, v := range c.values {
		if v != 0 && (o == nil || o.blocks[c.first+k] == 0) {
			grows++
		}
	}
	if grows > 0 && (careful || n.disk.used()+grows > n.disk.capacity) {
		n.s.logf("%s: no space for %s %d: %v, careful %v", n.name, id, c.first, c.values, careful)
		return object.ErrNoSpace
	}
	return nil
}

// tight reports whether there is little space left.
func (n *simNode) tight() bool { return n.disk.used()+simSlack > n.disk.capacity }

// yield makes holes where another node has some.
func (n *simNode) yield(p *replica.Partition, e replica.Effect) {
	s, to := n.s, n.s.node(e.To)
	call(s, n, to, func(reply func(*simObject, error)) {
		if to.self() != e.To {
			reply(nil, replica.ErrRetry)
			return
		}
		if o := to.disk.objects[e.ID]; o != nil {
			c := *o
			reply(&c, nil)
			return
		}
		reply(nil, nil)
	}, func(theirs *simObject, err error) {
		gave := false
		n.do(func() {
			own := n.disk.objects[e.ID]
			switch {
			case err != nil || own == nil:
			case theirs == nil:
				n.store(e.ID, object.Version{}, change{})
				gave = true
			default:
				for b := range own.blocks {
					if theirs.blocks[b] == 0 && own.blocks[b] != 0 {
						n.put(e.ID, own.version, b, []uint64{0})
						gave = true
					}
				}
			}
		}, func() {
			s.yields++
			p.Yielded(s.now, e.To, e.ID, e.Epoch, gave, err)
			n.perform(p)
		})
	})
}

// purge removes the objects of a partition.
func (n *simNode) purge(p *replica.Partition, e replica.Effect) {
	n.s.logf("%s: purges partition %d", n.name, n.index(p))
	n.s.purges++
	n.do(func() {
		for _, id := range n.have(n.index(p)) {
			n.store(id, object.Version{}, change{})
		}
	}, func() {
		p.Purged(n.s.now, e.Epoch, nil)
		n.perform(p)
	})
}

// delivery is the token of a received change.
type delivery struct {
	change change
	whole  *simObject // a repair: what the object shall be
	repair bool
	reply  func(replica.Report, error)
}

func (n *simNode) applyReceived(p *replica.Partition, e replica.Effect) {
	d := e.Token.(*delivery)
	var err error
	n.do(func() {
		if d.whole != nil {
			d.change = change{values: d.whole.blocks[:]}
		}
		switch err = n.room(e.ID, d.change, d.repair && e.Session != 0 && n.tight()); {
		case err != nil:
		case !d.repair:
			n.store(e.ID, e.Version, d.change)
		case d.whole == nil:
			n.store(e.ID, object.Version{}, change{})
		default:
			n.put(e.ID, d.whole.version, 0, d.whole.blocks[:])
		}
	}, func() {
		e.Token = d.reply
		if n.s.broken == ignoreSpace {
			err = nil
		}
		p.Stored(n.s.now, e, err)
		n.perform(p)
	})
}

func (n *simNode) sendChange(p *replica.Partition, e replica.Effect) {
	s, to, i, from := n.s, n.s.node(e.To), n.index(p), n.self()
	c, id := n.request(e.Op).change, e.Op.ID
	if s.broken == ackEarly {
		p.Acked(s.now, e.Op, e.Epoch, e.To, nil)
	}
	call(s, n, to, func(reply func(struct{}, error)) {
		to.receive(i, from, e, id, &delivery{change: c, reply: func(_ replica.Report, err error) { reply(struct{}{}, err) }})
	}, func(_ struct{}, err error) {
		if err == nil {
			p.SetTight(e.To, to.tight())
		}
		if s.broken != ackEarly {
			p.Acked(s.now, e.Op, e.Epoch, e.To, err)
		}
		n.perform(p)
	})
}

func (n *simNode) receive(i int, from replica.Peer, e replica.Effect, id object.ID, d *delivery) {
	p := n.parts[i]
	if n.self() != e.To {
		d.reply(replica.Report{}, replica.ErrEpoch)
		return
	}
	epoch := e.Epoch
	if n.s.broken == skipEpoch {
		epoch = p.Epoch()
	}
	p.Receive(from, epoch, e.Session, e.Version, id, e.Mark, d)
	n.performDeliveries(p)
}

// performDeliveries is perform after a Receive: a refusal's token is the delivery.
func (n *simNode) performDeliveries(p *replica.Partition) {
	effects := slices.Clone(p.Effects())
	for _, e := range effects {
		if d, ok := e.Token.(*delivery); ok && e.Kind == replica.Reply {
			d.reply(e.Report, e.Err)
			continue
		}
		n.effect(p, e)
	}
	n.perform(p)
}

func (n *simNode) survey(p *replica.Partition, e replica.Effect) {
	s, to, i, from := n.s, n.s.node(e.To), n.index(p), n.self()
	call(s, n, to, func(reply func(replica.Report, error)) {
		q := to.parts[i]
		if s.broken == forgetDrain {
			reply(replica.Report{}, nil)
			return
		}
		q.AnswerSurvey(from, e.Epoch, reply)
		to.perform(q)
	}, func(r replica.Report, err error) {
		p.Surveyed(s.now, e.To, e.Epoch, r, err)
		n.perform(p)
	})
}

type asked struct {
	report replica.Report
	have   []object.ID
}

func (n *simNode) have(i int) (ids []object.ID) {
	for _, id := range slices.Sorted(maps.Keys(n.disk.objects)) {
		if partitionOf(id) == i {
			ids = append(ids, id)
		}
	}
	return ids
}

func (n *simNode) ask(p *replica.Partition, e replica.Effect) {
	s, to, i, from := n.s, n.s.node(e.To), n.index(p), n.self()
	call(s, n, to, func(reply func(asked, error)) {
		q := to.parts[i]
		q.AnswerAsk(from, e.Epoch, e.Session, func(r replica.Report, err error) { reply(asked{r, to.have(i)}, err) })
		to.perform(q)
	}, func(a asked, err error) {
		p.Asked(s.now, e.To, e.Epoch, a.report, a.have, err)
		n.perform(p)
	})
}

func (n *simNode) list(p *replica.Partition, e replica.Effect) {
	var changed, have []object.ID
	i := n.index(p)
	n.do(func() {
		have = n.have(i)
		for _, id := range have {
			if e.Mark.Less(n.disk.objects[id].version) {
				changed = append(changed, id)
			}
		}
	}, func() {
		p.Listed(n.s.now, e.To, e.Epoch, changed, have, nil)
		n.perform(p)
	})
}

func (n *simNode) repair(p *replica.Partition, e replica.Effect) {
	s, to, i, from := n.s, n.s.node(e.To), n.index(p), n.self()
	var whole *simObject
	finish := func(err error) {
		p.Repaired(s.now, e.Op, e.To, e.ID, e.Epoch, err)
		n.perform(p)
	}
	if s.broken == skipSettle && e.Op == nil {
		finish(nil)
		return
	}
	source := n
	if s.broken == wrongSource {
		source = to
	}
	n.do(func() {
		if o := source.disk.objects[e.ID]; o != nil {
			c := *o
			whole = &c
		}
	}, func() {
		call(s, n, to, func(reply func(struct{}, error)) {
			v := e
			v.Version = object.Version{}
			to.receive(i, from, v, e.ID, &delivery{whole: whole, repair: true, reply: func(_ replica.Report, err error) { reply(struct{}{}, err) }})
		}, func(_ struct{}, err error) { finish(err) })
	})
}

func (n *simNode) syncPeer(p *replica.Partition, e replica.Effect) {
	s, to := n.s, n.s.node(e.To)
	call(s, n, to, func(reply func(struct{}, error)) {
		if to.self() != e.To {
			reply(struct{}{}, replica.ErrRetry)
			return
		}
		to.do(to.disk.sync, func() { reply(struct{}{}, nil) })
	}, func(_ struct{}, err error) {
		p.Synced(s.now, e.To, e.Epoch, err)
		n.perform(p)
	})
}

// propose brings a change of the in-sync set to the leader.
func (n *simNode) propose(p *replica.Partition, e replica.Effect) {
	s := n.s
	if n.apart || s.trouble && s.chance(0.1) {
		return
	}
	c := state.ChangeISR{Policy: s.oracle.View().Policies[0].ID, Partition: object.Partition(n.index(p)), Epoch: e.Epoch}
	switch e.Kind {
	case replica.Expel:
		c.Remove = e.To.Node
	case replica.Admit:
		c.Add = e.To.Node
	case replica.Renew:
		c.Renew = true
	}
	s.after(s.between(ms, 10*ms), func() {
		part := s.oracle.View().Policies[0].Partitions[c.Partition]
		if part.Epoch == c.Epoch {
			s.logf("%s: partition %d: %+v", n.name, c.Partition, c)
		}
		s.decide(state.Command{ChangeISR: &c})
	})
}
