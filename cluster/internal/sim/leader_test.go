package sim

import (
	"fmt"
	"slices"
	"time"

	"sheepdog/cluster/internal/steward"
	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// starting is a node that has announced itself.
type starting struct {
	steward.Announcement
	l       *life
	attempt int
}

// work is what a leader does every now and then.
func (g *reign) work() {
	l := g.l
	w := l.n.w
	if g.over || l.over {
		return
	}
	w.after(w.between(80*ms, 120*ms), g.work)
	if l.n.hung {
		return
	}
	if !g.ready {
		if l.applied < g.upTo {
			return
		}
		g.ready = true
		l.facts.Forget()
		l.steward.Lead(g.since)
	}
	if w.now()-g.looked > 500*ms {
		l.steward.Woke(time.Now())
	}
	g.looked = w.now()
	g.probe()
	g.step()
}

// step decides once, and carries it out.
func (g *reign) step() {
	l, v := g.l, g.l.known()
	w := l.n.w
	if g.busy || !v.Formatted() {
		return
	}
	waiting := slices.Clone(g.starts)
	announcements := make([]steward.Announcement, len(waiting))
	for i, s := range waiting {
		announcements[i] = s.Announcement
	}
	began := cpu()
	d := l.steward.Step(time.Now(), v, l.facts.Of(time.Now(), v), announcements)
	for _, n := range d.Notes {
		w.logf("leader: %s %s: %s", n.Node, n.What, n.Reason)
		w.happened(n.What)
	}
	g.busy = true
	g.carryOut(d.Commands, waiting)
	took := cpu() - began
	w.costs.steps++
	w.costs.cpu += took
	w.costs.worst = max(w.costs.worst, took)
}

// carryOut proposes commands one after the other, until one fails.
func (g *reign) carryOut(commands []state.Command, waiting []*starting) {
	if len(commands) == 0 || g.over {
		g.busy = false
		return
	}
	c := commands[0]
	g.command(c, func(r state.Result, err error) {
		if c.AnnounceAll != nil {
			g.announced(c.AnnounceAll, r, err, waiting)
		}
		if err != nil {
			commands = commands[:1]
		}
		g.carryOut(commands[1:], waiting)
	})
}

// probe notes who is there: who answers, and whose process is gone.
func (g *reign) probe() {
	l := g.l
	w := l.n.w
	for _, n := range w.nodes {
		sent := time.Now()
		switch {
		case n == l.n || w.cutBetween(l.n, n):
		case n.life == nil && !n.dark && !n.apart && !l.n.apart:
			l.facts.Refused(n.name, sent)
		case n.life != nil:
			w.control(l.n, n, func() {
				w.control(n, l.n, func() { l.facts.Connected(n.name) })
			})
		}
	}
}

// cutBetween reports whether two nodes do not reach each other, or one the other.
func (w *world) cutBetween(a, b *node) bool {
	return w.isCut(a.id, b.id) || w.isCut(b.id, a.id)
}

// announced tells the nodes that have started who they are.
func (g *reign) announced(c *state.AnnounceAll, r state.Result, err error, waiting []*starting) {
	w := g.l.n.w
	g.starts = slices.DeleteFunc(g.starts, func(s *starting) bool { return slices.Contains(waiting, s) })
	if err != nil {
		return
	}
	for _, s := range waiting {
		i := slices.IndexFunc(c.Nodes, func(a state.Announce) bool { return a.Name == s.Name })
		if i < 0 || slices.ContainsFunc(waiting, func(o *starting) bool { return o.Name == s.Name && o.Came.After(s.Came) }) {
			continue
		}
		life, l := r.Nodes[i], s.l
		if life.Node != l.n.id {
			w.fail("%s got number %d", l.n.name, life.Node)
			return
		}
		tell := func() {
			if !l.over && l.inc == 0 && s.attempt == l.attempts {
				l.enlist(life.Incarnation)
			}
		}
		if l == g.l {
			tell()
		} else {
			w.control(g.l.n, l.n, tell)
		}
	}
}

// announce tells the leader that the process has started, until it has an incarnation. It
// takes the one that answers its last attempt.
func (l *life) announce() {
	w := l.n.w
	if l.over || l.inc != 0 {
		return
	}
	if l.n.hung || l.leader == nil {
		w.after(w.between(10*ms, 30*ms), l.announce)
		return
	}
	w.after(w.between(second/2, second), l.announce)
	a := state.Announce{Name: l.n.name, Address: l.n.name, Zone: l.n.name, At: time.Now()}
	if !l.n.gateway {
		a.Disks = []state.Disk{{ID: l.n.name, Weight: 1 << 20}}
	}
	l.attempts++
	s := &starting{steward.Announcement{Announce: a, Came: time.Now()}, l, l.attempts}
	l.tell(func(g *reign) {
		if s.attempt < l.arrived { // of a connection that the node has replaced
			return
		}
		s.Came, l.arrived = time.Now(), s.attempt
		g.starts = append(g.starts, s)
	})
}

// renew asks the leader for a lease, which counts from now. Who asks may be up.
func (l *life) renew() {
	w := l.n.w
	if l.over {
		return
	}
	w.after(w.between(w.lease/12, w.lease/5), l.renew)
	if l.n.hung {
		return
	}
	if w.broken == ignoreLease {
		l.reps.SetLease(time.Now().Add(1000 * second))
	}
	if l.leader == nil {
		return
	}
	w.questions++
	asked, followed, say := time.Now(), l.reps.Followed(), steward.Saying{Unreached: l.unreached(), Number: w.questions}
	if l.leader != l {
		if say, _ = l.holder.Ask(asked, l.unreached(), false); say.Renounced && w.broken != ignoreLease {
			l.reps.SetLease(w.begin)
		}
	}
	l.tell(func(g *reign) {
		verdict, from := g.grant(l, asked, followed, say)
		answer := func() {
			if from, _, better := l.holder.Answered(verdict, from); better {
				l.reps.SetLease(from.Add(w.lease))
			}
		}
		if g.l == l {
			answer()
			return
		}
		w.control(g.l.n, l.n, answer)
	})
}

// grant is what the leader does about a question for a lease, as cluster's leader does.
func (g *reign) grant(l *life, asked time.Time, followed state.Epoch, say steward.Saying) (steward.Verdict, time.Time) {
	w := l.n.w
	contact, self := g.contact(), g.l == l
	if w.now()-contact > leaderLease && !self {
		return steward.NotLeading, asked
	}
	reached := self || !w.cutBetween(g.l.n, l.n)
	if steward.InStep(g.l.known(), l.n.id, followed) {
		g.l.facts.Heard(l.n.name, l.inc, time.Now(), say, reached)
	}
	if self {
		asked = w.begin.Add(contact)
	}
	return g.l.steward.Grant(g.l.known(), state.Life{Node: l.n.id, Incarnation: l.inc}, followed, reached), asked
}

// unreached are the nodes that are up and to which the connections are cut for a while.
func (l *life) unreached() (list []state.NodeID) {
	w := l.n.w
	for _, n := range w.nodes {
		if m := l.known().Node(n.id); n == l.n || m == nil || m.State != up {
			continue
		}
		for _, c := range [][2]nodeID{{l.n.id, n.id}, {n.id, l.n.id}} {
			if at, ok := w.cut[c]; ok && w.now()-at > w.lease/4 {
				list = append(list, n.id)
				break
			}
		}
	}
	return list
}

// propose brings changes of in-sync sets to the leader, those that come within some
// milliseconds together.
func (l *life) propose(c state.ChangeISR) {
	w := l.n.w
	w.note(func() {
		if l.over || w.trouble && w.chance(w.lost) {
			return
		}
		if l.proposals = append(l.proposals, c); len(l.proposals) > 1 {
			return
		}
		w.after(w.between(0, 5*ms), func() {
			list := l.proposals
			l.proposals = nil
			if l.n.hung {
				return
			}
			l.tell(func(g *reign) {
				w.logf("%s: %+v", l.n.name, list)
				g.command(state.Command{ChangeISRs: &state.ChangeISRs{Changes: list}}, func(_ state.Result, err error) {
					if err == nil {
						w.happened(fmt.Sprintf("changes of in-sync sets together: %d", len(list)))
					}
				})
			})
		})
	})
}

// place gives each partition random targets.
func (w *world) place() {
	v := w.oracle.View()
	p := v.Policies[0]
	if len(p.Partitions) == 0 {
		return
	}
	var able []state.NodeID
	for _, n := range w.nodes {
		if !n.gateway {
			able = append(able, n.id)
		}
	}
	c := state.SetTargets{Policy: p.ID, Since: v.Epoch, Targets: make([][]state.NodeID, len(p.Partitions))}
	for i := range c.Targets {
		for _, k := range w.rng.Perm(len(able))[:min(p.Copies, len(able))] {
			c.Targets[i] = append(c.Targets[i], able[k])
		}
	}
	w.happened("other targets")
	w.order(state.Command{SetTargets: &c})
}

// renewOne begins a new epoch of a partition in which nothing else changes.
func (w *world) renewOne() {
	v := w.oracle.View()
	parts := v.Policies[0].Partitions
	i := w.rng.IntN(len(parts))
	w.happened("new epoch for no reason")
	w.order(state.Command{ChangeISR: &state.ChangeISR{Policy: policy, Partition: object.Partition(i), Epoch: parts[i].Epoch, Renew: true}})
}

// compareEras finds partitions that are begun again.
func (w *world) compareEras(before, after *state.View) {
	if len(before.Policies) == 0 || len(before.Policies[0].Partitions) == 0 {
		return
	}
	for i := range after.Policies[0].Partitions {
		if after.Policies[0].Partitions[i].Restarted > before.Policies[0].Partitions[i].Restarted {
			w.logf("partition %d is begun again", i)
			w.happened("partition begun again")
			w.eras[i] = w.now()
			for r, values := range w.history {
				if w.partitionOf(r.id) == i {
					w.previous[r] = values
				}
			}
			if err := w.history.restart(w.eras[i], func(id object.ID) bool { return w.partitionOf(id) == i }); err != nil {
				w.fail("%v", err)
			}
		}
	}
}

func (w *world) partitionOf(id object.ID) int { return int(object.PartitionOf(id, w.partitions)) }
