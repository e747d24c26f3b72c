package sim

import (
	"fmt"
	"slices"
	"time"

	"sheepdog/cluster/internal/steward"
	"sheepdog/cluster/state"
	"sheepdog/storage/object"
	"sheepdog/vdi/catalog"
)

// Names of the machines.
const (
	machineState   = "state"
	machineCatalog = "catalog"
)

// leaderLease is for how long a leader may not know that it is none any more.
const leaderLease = 500 * ms

// leader is who leads, and what it knows. Elections and the order of commands are taken
// for granted: who leads can decide, and no command is lost that has been decided.
type leader struct {
	l       *life // nil: nobody leads
	term    int
	steward *steward.Steward
	starts  []*starting
}

// starting is a node that has announced itself.
type starting struct {
	steward.Announcement
	l *life
}

// decide appends a command for the state to the log, which the nodes follow at their own pace.
func (w *world) decide(c state.Command) state.Result {
	b := c.Encode()
	before := w.oracle.View()
	r, err := state.DecodeResult(w.oracle.Apply(b))
	w.append(machineState, b)
	if err == nil {
		w.compareEras(before, w.oracle.View())
		w.checkView()
	}
	return r
}

// decideCatalog does so for a command of the catalog.
func (w *world) decideCatalog(c catalog.Command) (catalog.Result, error) {
	b := c.Encode()
	r, err := catalog.DecodeResult(w.catalog.Apply(b))
	w.append(machineCatalog, b)
	return r, err
}

func (w *world) append(machine string, command []byte) {
	w.log = append(w.log, [2]string{machine, string(command)})
	w.views = append(w.views, w.oracle.View())
	for _, n := range w.nodes {
		if n.life != nil {
			n.life.follow()
		}
	}
}

// checkView looks at what has been decided (INV-R3).
func (w *world) checkView() {
	for _, p := range w.oracle.View().Policies {
		for i, q := range p.Partitions {
			if len(q.ISR) == 0 {
				w.fail("partition %d has no member", i)
			}
		}
	}
}

// eligible reports whether a node can lead.
func (n *node) eligible() bool { return n.life != nil && !n.hung && !n.apart }

// elect looks now and then whether there is a leader, and finds another one.
func (w *world) elect() {
	w.after(w.between(50*ms, 150*ms), w.elect)
	var able []*node
	for _, n := range w.nodes {
		if n.eligible() {
			able = append(able, n)
		}
	}
	quorum := 2*len(able) > len(w.nodes)
	if l := w.leader.l; l != nil {
		if !l.over && l.n.eligible() && quorum {
			return
		}
		w.logf("nobody leads")
		w.leader.l, w.leader.starts = nil, nil
		w.leader.term++
		return
	}
	if !quorum || !w.chance(0.2) {
		return
	}
	l := able[w.rng.IntN(len(able))].life
	w.logf("%s leads", l.n.name)
	w.happened("election")
	w.leader.l, w.leader.term, w.leader.starts = l, w.leader.term+1, nil
	w.leader.steward = steward.New(steward.Options{
		Self: l.n.name, Lease: leaseTime, LeaderLease: leaderLease, Margin: 300 * ms, Gather: 300 * ms, Settle: 500 * ms,
	})
	l.facts.Forget()
	w.leader.steward.Lead(time.Now())
	w.lead(w.leader.term)
}

// lead does what a leader does every now and then.
func (w *world) lead(term int) {
	if w.leader.term != term || w.leader.l == nil {
		return
	}
	l := w.leader.l
	w.after(w.between(80*ms, 120*ms), func() { w.lead(term) })
	if l.over || !l.n.eligible() {
		return
	}
	w.probe(l, term)
	v := w.oracle.View()
	if !v.Formatted() {
		return
	}
	waiting := slices.Clone(w.leader.starts)
	announcements := make([]steward.Announcement, len(waiting))
	for i, s := range waiting {
		announcements[i] = s.Announcement
	}
	began := cpu()
	d := w.leader.steward.Step(time.Now(), v, l.facts.Of(time.Now(), v), announcements)
	for _, n := range d.Notes {
		w.logf("leader: %s %s: %s", n.Node, n.What, n.Reason)
	}
	for _, c := range d.Commands {
		r := w.decide(c)
		if c.AnnounceAll != nil {
			w.announced(c.AnnounceAll, r, waiting)
		}
	}
	took := cpu() - began
	w.costs.steps++
	w.costs.cpu += took
	w.costs.worst = max(w.costs.worst, took)
}

// probe notes who is there: who answers, and whose process is gone.
func (w *world) probe(l *life, term int) {
	for _, n := range w.nodes {
		sent := time.Now()
		switch {
		case n == l.n:
		case n.life == nil && !n.dark && !n.apart && !w.cut[[2]state.NodeID{l.n.id, n.id}] && !w.cut[[2]state.NodeID{n.id, l.n.id}]:
			l.facts.Refused(n.name, sent)
		case n.life != nil && !n.apart && w.leader.term == term:
			w.send(l.n, n, func() {
				w.send(n, l.n, func() {
					if w.leader.term == term && w.leader.l == l {
						l.facts.Connected(n.name)
					}
				}, nil)
			}, nil)
		}
	}
}

// announced tells the nodes that have started who they are.
func (w *world) announced(c *state.AnnounceAll, r state.Result, waiting []*starting) {
	w.leader.starts = nil
	for i := range c.Nodes {
		for _, s := range waiting {
			if i >= len(r.Nodes) || s.Name != c.Nodes[i].Name || s.l.over || s.l.known {
				continue
			}
			life, l := r.Nodes[i], s.l
			l.known = true
			if life.Node != l.n.id {
				w.fail("%s got number %d", l.n.name, life.Node)
				return
			}
			w.after(w.between(ms, 5*ms), func() {
				l.whenAwake(func() { l.enlist(life.Incarnation) })
			})
		}
	}
}

// tell brings something to the leader, if there is one and it can be reached.
func (l *life) tell(fn func(lead *life)) {
	w := l.n.w
	if w.leader.l == nil || l.n.apart {
		return
	}
	to, term := w.leader.l, w.leader.term
	arrive := func() {
		if w.leader.term == term && w.leader.l == to {
			fn(to)
		}
	}
	if to == l {
		w.after(0, func() { l.whenAwake(arrive) })
		return
	}
	w.send(l.n, to.n, arrive, nil)
}

// announce tells the leader that the process has started, until it has an incarnation.
func (l *life) announce() {
	w := l.n.w
	if l.over || l.inc != 0 {
		return
	}
	w.after(w.between(80*ms, 120*ms), l.announce)
	if l.n.hung {
		return
	}
	a := state.Announce{Name: l.n.name, Address: l.n.name, Zone: l.n.name, At: time.Now()}
	if !l.n.gateway {
		a.Disks = []state.Disk{{ID: l.n.name, Weight: 1 << 20}}
	}
	l.tell(func(*life) {
		s := &w.leader.starts
		if !l.known && !l.over && !slices.ContainsFunc(*s, func(o *starting) bool { return o.l == l }) {
			*s = slices.DeleteFunc(*s, func(o *starting) bool { return o.Name == a.Name })
			*s = append(*s, &starting{steward.Announcement{Announce: a, Came: time.Now()}, l})
		}
	})
}

// renew asks the leader for a lease, which counts from now. Who asks may be up.
func (l *life) renew() {
	w := l.n.w
	if l.over {
		return
	}
	w.after(w.between(150*ms, 400*ms), l.renew)
	if l.n.hung {
		return
	}
	sent, followed := w.now(), l.reps.Followed()
	if w.broken == ignoreLease {
		l.hold(sent + 1000*second)
		return
	}
	l.tell(func(lead *life) {
		if steward.InStep(w.oracle.View(), l.n.id, followed) {
			lead.facts.Heard(l.n.name, l.inc, time.Now())
		}
		if w.leader.steward.Grant(w.oracle.View(), state.Life{Node: l.n.id, Incarnation: l.inc}, followed) != steward.Granted {
			return
		}
		if lead == l {
			l.hold(sent + leaseTime)
			return
		}
		w.send(lead.n, l.n, func() { l.hold(sent + leaseTime) }, nil)
	})
}

func (l *life) hold(until time.Duration) {
	if l.lease = max(l.lease, until); !l.over {
		l.reps.SetLease(l.n.w.begin.Add(l.lease))
	}
}

// propose brings changes of in-sync sets to the leader, those that come within some
// milliseconds together.
func (l *life) propose(c state.ChangeISR) {
	w := l.n.w
	w.note(func() {
		if l.over || w.trouble && w.chance(0.1) {
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
			l.tell(func(*life) {
				w.happened(fmt.Sprintf("changes of in-sync sets together: %d", len(list)))
				w.logf("%s: %+v", l.n.name, list)
				w.decide(state.Command{ChangeISRs: &state.ChangeISRs{Changes: list}})
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
	w.logf("targets %v", c.Targets)
	w.happened("other targets")
	w.decide(state.Command{SetTargets: &c})
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
