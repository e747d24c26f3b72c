package sim

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"sheepdog/cluster/internal/steward"
	"sheepdog/cluster/state"
	"sheepdog/vdi/catalog"
)

// The order of commands, as raft makes it, in short: terms, votes, heartbeats, a quorum for
// each command. Who has voted in a term takes nothing of earlier ones, and nobody becomes the
// leader who lacks a command that was decided. Entries that were not decided are left out:
// they are lost with their leader. What matters here is what raft leaves to others: who led
// goes on believing so for a while, and what nodes know lags.

// Names of the machines.
const (
	machineState   = "state"
	machineCatalog = "catalog"
)

const (
	electionTime = 300 * ms // without a leader, from one to two times this
	beatTime     = 60 * ms
	leaderLease  = 200 * ms // for how long a leader may not know that it is none any more
)

var errLost = errors.New("the command was not decided, or nobody knows")

// reign is a term of a leader, as it knows it itself.
type reign struct {
	l        *life
	term     int
	since    time.Time
	upTo     int                            // of the log, decided before
	contacts map[state.NodeID]time.Duration // when what they have answered was sent
	ready    bool                           // all of that is applied
	over     bool
	starts   []*starting
	looked   time.Duration
	busy     bool // carrying out what the steward has decided
}

// voters are few, and an odd number.
func (w *world) voters() []*node { return w.nodes[:min(5, (len(w.nodes)-1)|1)] }

func (w *world) quorum() int { return len(w.voters())/2 + 1 }

// reign returns the newest leader's, nil if there is none that knows.
func (w *world) reign() *reign {
	for _, n := range w.nodes {
		if n.life != nil && n.life.reign != nil && n.life.reign.term == w.term {
			return n.life.reign
		}
	}
	return nil
}

// control sends what belongs to the order of commands.
func (w *world) control(from, to *node, fn func()) {
	if from.apart || to.apart || from.mute {
		return
	}
	w.send(from, to, func() {
		if !to.apart {
			fn()
		}
	}, nil)
}

// elect has a voter look now and then whether there is a leader, and want to be it.
func (l *life) elect() {
	w, n := l.n.w, l.n
	if l.over {
		return
	}
	w.after(w.between(electionTime/4, electionTime/2), l.elect)
	if n.hung || l.reign != nil || !slices.Contains(w.voters(), n) || w.now() < l.heard+w.between(electionTime, 2*electionTime) {
		return
	}
	n.promised++
	l.leader = nil
	term, votes := n.promised, 1
	for _, o := range w.voters() {
		if o == n {
			continue
		}
		w.control(n, o, func() {
			if term <= o.promised || w.now() < o.life.heard+electionTime {
				return
			}
			o.promise(term)
			if o.stored > n.stored {
				return
			}
			w.control(o, n, func() {
				if votes++; votes == w.quorum() && n.promised == term {
					l.lead(term)
				}
			})
		})
	}
}

// promise has a node take nothing of earlier terms any more.
func (n *node) promise(term int) {
	if term <= n.promised {
		return
	}
	n.promised = term
	if n.life != nil && n.life.reign != nil {
		n.life.stepDown("another term")
	}
}

// lead begins a reign.
func (l *life) lead(term int) {
	w := l.n.w
	w.logf("%s leads in term %d", l.n.name, term)
	w.happened("election")
	if term > w.term && l.n.stored < len(w.log) {
		w.fail("%s was elected and lacks commands", l.n.name)
		return
	}
	w.term = max(w.term, term) // those who voted for it may have voted in a later one since
	g := &reign{l: l, term: term, since: time.Now(), upTo: len(w.log), contacts: map[state.NodeID]time.Duration{}, looked: w.now()}
	l.reign, l.leader = g, l
	l.steward = steward.New(steward.Options{
		Self: l.n.name, Lease: w.lease, LeaderLease: leaderLease, Margin: 100 * ms, Gather: 200 * ms, Settle: 300 * ms, Moves: max(1, w.partitions/4),
	})
	l.follow()
	g.beat()
	g.work()
}

func (l *life) stepDown(why string) {
	l.n.w.logf("%s leads no more: %s", l.n.name, why)
	l.reign.over = true
	l.reign = nil
	l.steward.Follow()
	l.facts.Forget()
	l.leader = nil
}

// beat tells all that there is a leader, and what is decided.
func (g *reign) beat() {
	l := g.l
	w, n := l.n.w, l.n
	if g.over || l.over {
		return
	}
	w.after(w.between(beatTime/2, beatTime), g.beat)
	if n.hung {
		return
	}
	if w.now()-g.contact() > leaderLease && time.Since(g.since) > leaderLease {
		l.stepDown("no quorum answers")
		return
	}
	sent, upTo := w.now(), n.stored
	for _, o := range w.nodes {
		if o == n {
			continue
		}
		w.control(n, o, func() {
			if !o.follows(g) {
				return
			}
			if o.stored < upTo {
				o.stored = upTo
			}
			o.life.follow()
			w.control(o, n, func() { g.contacts[o.id] = max(g.contacts[o.id], sent) })
		})
	}
}

// follows takes a message of a leader, and reports whether it is not of an earlier term.
func (n *node) follows(g *reign) bool {
	if n.promised > g.term {
		return false
	}
	n.promise(g.term)
	n.life.heard, n.life.leader = n.w.now(), g.l
	return true
}

// contact is when a quorum's last answers were sent for, as consensus.Log.QuorumContact is.
func (g *reign) contact() time.Duration {
	w := g.l.n.w
	var times []time.Duration
	for _, o := range w.voters() {
		if o == g.l.n {
			times = append(times, w.now())
		} else {
			times = append(times, g.contacts[o.id])
		}
	}
	slices.Sort(times)
	return times[len(times)-w.quorum()]
}

// propose has a command decided, if a quorum takes it in time, and applied here before it
// calls then.
func (g *reign) propose(machine string, command []byte, then func(result []byte, err error)) {
	w, n := g.l.n.w, g.l.n
	ended := false
	end := func(result []byte, err error) {
		if !ended {
			ended = true
			if !g.l.over {
				then(result, err)
			}
		}
	}
	acks := []*node{n}
	for _, o := range w.voters() {
		if o == n {
			continue
		}
		w.control(n, o, func() {
			if !o.follows(g) {
				return
			}
			w.control(o, n, func() {
				if acks = append(acks, o); len(acks) != w.quorum() || ended {
					return
				}
				if g.term != w.term || slices.ContainsFunc(acks, func(o *node) bool { return o.promised > g.term }) {
					return
				}
				result := w.append(machine, command)
				for _, o := range acks {
					o.stored = len(w.log)
				}
				g.l.apply(len(w.log))
				end(result, nil)
			})
		})
	}
	w.after(w.between(300*ms, second), func() { g.l.whenAwake(func() { end(nil, errLost) }) })
}

// command has a command for the state decided.
func (g *reign) command(c state.Command, then func(state.Result, error)) {
	g.propose(machineState, c.Encode(), func(result []byte, err error) {
		var r state.Result
		if err == nil {
			r, err = state.DecodeResult(result)
		}
		then(r, err)
	})
}

// order has a command for the state decided, if there is a leader that can, on behalf of
// somebody outside.
func (w *world) order(c state.Command) {
	if g := w.reign(); g != nil && !g.l.n.hung && g.ready {
		g.command(c, func(state.Result, error) {})
	}
}

// decide decides a command at once, with the consent of all: before there is a leader.
func (w *world) decide(c state.Command) { w.ordain(machineState, c.Encode()) }

func (w *world) ordain(machine string, command []byte) []byte {
	result := w.append(machine, command)
	for _, n := range w.nodes {
		n.stored = len(w.log)
		if n.life != nil {
			n.life.follow()
		}
	}
	return result
}

// decideCatalog does so for the catalog.
func (w *world) decideCatalog(c catalog.Command) (catalog.Result, error) {
	return catalog.DecodeResult(w.ordain(machineCatalog, c.Encode()))
}

// append puts a decided command into the log, which the nodes follow at their own pace.
func (w *world) append(machine string, command []byte) (result []byte) {
	w.log = append(w.log, [2]string{machine, string(command)})
	if machine == machineCatalog {
		result = w.catalog.Apply(command)
	} else {
		before := w.oracle.View()
		result = w.oracle.Apply(command)
		if w.tracing {
			w.logf("decided: %s", command)
		}
		w.compareEras(before, w.oracle.View())
		w.checkView()
	}
	w.views = append(w.views, w.oracle.View())
	w.forget()
	return result
}

// forget drops states that no node will look at any more: each has tables of all partitions.
func (w *world) forget() {
	if len(w.views)%viewsAtATime != 0 {
		return
	}
	first := len(w.views) - 1
	for _, n := range w.nodes {
		if n.life != nil {
			first = min(first, n.life.applied-1)
		}
	}
	if !w.shared { // every node has its own
		first = len(w.views)
	}
	for i := first - 1; i >= 0 && w.views[i] != nil; i-- {
		w.views[i] = nil
	}
}

// viewsAtATime is after how many commands states are forgotten.
const viewsAtATime = 16

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

// tell brings something to whom this node takes for the leader, and fn is told if that
// takes itself for one.
func (l *life) tell(fn func(g *reign)) {
	to := l.leader
	if to == nil {
		return
	}
	arrive := func() {
		if to.reign != nil && to.reign.ready {
			fn(to.reign)
		}
	}
	if to == l {
		l.n.w.after(0, func() { l.whenAwake(arrive) })
		return
	}
	l.n.w.control(l.n, to.n, func() {
		if to.n.life == to {
			arrive()
		}
	})
}

// depose does something bad to the leader.
func (w *world) depose() {
	g := w.reign()
	if g == nil {
		return
	}
	n := g.l.n
	switch w.rng.IntN(5) {
	case 0, 1:
		n.hang()
		w.after(w.between(leaderLease, 2*w.lease+second/2), n.wake)
	case 2: // it reaches few, and goes on for a while
		for _, o := range w.nodes {
			if o != n && w.chance(0.7) {
				w.cutLink(n, o, w.chance(0.7))
			}
		}
		w.after(w.between(leaderLease, 2*w.lease), func() { w.mend() })
	case 3:
		n.apart = true
		w.after(w.between(leaderLease, w.lease), func() { n.apart = false })
	case 4:
		g.l.stepDown("it hands over")
		g.l.heard = w.now() + electionTime
	}
	w.happened("leader deposed")
}

func (g *reign) String() string { return fmt.Sprintf("%s in term %d", g.l.n.name, g.term) }

// doubt has members of a partition start anew when a leader has just come that has not heard
// of another one, which hears, and serves.
func (w *world) doubt() {
	g := w.reign()
	parts := w.oracle.View().Policies[0].Partitions
	p := parts[w.rng.IntN(len(parts))]
	if g == nil || len(p.ISR) < 2 || !w.harsh {
		return
	}
	w.happened("members start anew when it is not known who lives")
	last := w.nodes[p.ISR[w.rng.IntN(len(p.ISR))]-1]
	if last.life == nil || last.mute {
		return
	}
	last.mute = true
	w.after(w.between(w.lease, 3*w.lease), func() { last.mute = false })
	for _, id := range p.ISR {
		if n := w.nodes[id-1]; n != last {
			w.after(w.between(0, 100*ms), func() { n.kill(w.chance(0.5)) })
			w.after(w.between(100*ms, 400*ms), n.revive)
		}
	}
	if !g.over && g.l != last.life && w.chance(0.8) {
		g.l.stepDown("it hands over")
	}
}
