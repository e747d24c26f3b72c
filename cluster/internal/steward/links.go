package steward

import (
	"cmp"
	"slices"
	"time"

	"sheepdog/cluster/state"
)

// Links between two nodes. While one fails, each is well as far as leases go, and clients of
// one wait for what the other is primary of. So one of the two
// has to go: it gets no lease any more, is told to give up the one that it has, and is down
// when it has said so, or when that has run out. It stays down while it does not reach a node
// that is up, and for a while after that, each time for longer, so that a link that comes and
// goes does not take the cluster along.
//
// Whom the leader itself does not reach gets no lease in any case (Deaf), and would be down for
// its silence some time after the last one has run out. If it still asks, it is told as well:
// that takes half as long.

const (
	// linkPatience is for how long a link must be said to fail, on top of what the nodes wait
	// themselves before they say so.
	linkPatience = 500 * time.Millisecond
	// linkFresh is how old what a node says may be: who is silent is another matter.
	linkFresh = 700 * time.Millisecond
	// linkRest is for how long a node is down at least, when that was the first time in
	// linkForgiven. It doubles with each time, up to linkRestMost.
	linkRest     = 5 * time.Second
	linkRestMost = 5 * time.Minute
	linkForgiven = 10 * time.Minute
)

// Saying is what a node says when it asks for a lease.
type Saying struct {
	// Unreached are nodes that are up and that it has not reached for a while.
	Unreached []state.NodeID
	// Serving: clients of its own have asked it for something lately.
	Serving bool
	// Renounced: it has no lease, and takes no answer to an earlier question for one.
	Renounced bool
	// Number counts the questions of an incarnation: what is said with an earlier one, and
	// comes later, counts no more.
	Number uint64
}

// link is two nodes, the lower number first.
type link [2]state.NodeID

// rest is that of a node that was declared down because of its links.
type rest struct {
	until time.Time
	pause time.Duration
	last  time.Time // when that was
}

// links is what a steward remembers of them.
type links struct {
	failing map[link]time.Time       // since when
	going   map[state.Life]time.Time // have to go, since when
	resting map[state.NodeID]*rest
}

func newLinks() links {
	return links{failing: map[link]time.Time{}, going: map[state.Life]time.Time{}, resting: map[state.NodeID]*rest{}}
}

// fresh reports whether a node is up, and what it says is of now.
func (r *round) fresh(n *state.Node) bool {
	return r.up(n) && (r.self(n) || r.now.Sub(r.facts[n.ID].Said) <= linkFresh)
}

// failing lists the links that have failed for long enough, and remembers the others. Who does
// not reach the leader is silent.
func (r *round) failing() (list []link) {
	seen := map[link]bool{}
	for _, n := range r.v.Nodes {
		if !r.fresh(n) {
			continue
		}
		for _, id := range r.facts[n.ID].Unreached {
			o := r.v.Node(id)
			if o == nil || o == n || r.self(o) || !r.fresh(o) {
				continue
			}
			l := link{min(n.ID, id), max(n.ID, id)}
			if seen[l] {
				continue
			}
			seen[l] = true
			since, ok := r.s.links.failing[l]
			if !ok {
				since = r.now
				r.s.links.failing[l] = since
			}
			if r.now.Sub(since) >= linkPatience {
				list = append(list, l)
			}
		}
	}
	for l := range r.s.links.failing {
		if !seen[l] {
			delete(r.s.links.failing, l)
		}
	}
	slices.SortFunc(list, func(a, b link) int { return slices.Compare(a[:], b[:]) })
	return list
}

// cutLinks finds who has to go because of links that fail, and who has gone.
func (r *round) cutLinks() {
	s := &r.s.links
	left := r.failing()
	for life := range s.going {
		n := r.v.Node(life.Node)
		if n == nil || n.Incarnation != life.Incarnation || n.State != state.NodeUp || !slices.ContainsFunc(left, func(l link) bool { return l[0] == n.ID || l[1] == n.ID }) {
			delete(s.going, life)
		}
	}
	goes := func(n *state.Node) bool { _, ok := s.going[lifeOf(n)]; return ok }
	for {
		left = slices.DeleteFunc(left, func(l link) bool { return goes(r.v.Node(l[0])) || goes(r.v.Node(l[1])) })
		n := r.leastMissed(left, goes)
		if n == nil {
			break
		}
		s.going[lifeOf(n)] = r.now
	}
	r.letGo(goes)
}

func lifeOf(n *state.Node) state.Life { return state.Life{Node: n.ID, Incarnation: n.Incarnation} }

// leastMissed is the node with whom most of the links go; of several the one that has no
// clients, that holds the least, and that came last. The leader never goes. nil: there is none
// that may go.
func (r *round) leastMissed(left []link, goes func(*state.Node) bool) *state.Node {
	count := map[state.NodeID]int{}
	for _, l := range left {
		count[l[0]]++
		count[l[1]]++
	}
	var best *state.Node
	for _, n := range r.v.Nodes {
		if count[n.ID] == 0 || r.self(n) || !r.spares(n, goes) {
			continue
		}
		if best == nil || cmp.Or(
			cmp.Compare(count[n.ID], count[best.ID]), cmp.Compare(b2i(r.facts[best.ID].Serving), b2i(r.facts[n.ID].Serving)), cmp.Compare(best.Share(), n.Share()),
		) >= 0 {
			best = n
		}
	}
	return best
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

// spares reports whether most nodes stay if a node goes too, and every partition that can be
// served has a member that stays.
func (r *round) spares(n *state.Node, goes func(*state.Node) bool) bool {
	all, stay := 0, 0
	for _, o := range r.v.Nodes {
		if r.up(o) || r.s.links.rests(o.ID, r.now) {
			all++
		}
		if r.up(o) && o != n && !goes(o) {
			stay++
		}
	}
	if 2*stay <= all {
		return false
	}
	for _, p := range r.v.Policies {
		for i := range p.Partitions {
			now, then := 0, 0
			for _, id := range p.Partitions[i].ISR {
				if o := r.v.Node(id); o != nil && r.up(o) {
					now++
					if o != n && !goes(o) {
						then++
					}
				}
			}
			if now > 0 && then == 0 {
				return false
			}
		}
	}
	return true
}

// letGo declares down who has to go and has no lease any more.
func (r *round) letGo(goes func(*state.Node) bool) {
	c := &state.SetNodes{}
	for _, n := range r.v.Nodes {
		if !goes(n) || r.down[n.ID] {
			continue
		}
		// Leases end some time after the last one that this leader, or a former one, has granted;
		// that of this leader also when the node says so.
		all := r.s.opt.Lease + r.s.opt.LeaderLease + r.s.opt.Margin
		since, f := r.s.links.going[lifeOf(n)], r.facts[n.ID]
		renounced := f.Renounced && f.Said.After(since) && r.now.Sub(r.s.since) > all
		if !renounced && r.now.Sub(since) <= all {
			continue
		}
		r.down[n.ID] = true
		r.s.given[lifeOf(n)] = true
		c.Nodes = append(c.Nodes, r.set(n, state.NodeDown))
		pause := r.s.links.rest(n.ID, r.now)
		r.note(n.Name, "node is down", "it does not reach other nodes that are up, or they do not reach it; it is given at least "+pause.String())
	}
	if len(c.Nodes) > 0 {
		r.Commands = append(r.Commands, state.Command{SetNodes: c})
	}
}

// rest begins the rest of a node.
func (s *links) rest(id state.NodeID, now time.Time) time.Duration {
	e := s.resting[id]
	if e == nil || now.Sub(e.last) > linkForgiven {
		e = &rest{pause: linkRest / 2}
		s.resting[id] = e
	}
	e.pause, e.last = min(2*e.pause, linkRestMost), now
	e.until = now.Add(e.pause)
	return e.pause
}

func (s *links) rests(id state.NodeID, now time.Time) bool {
	e := s.resting[id]
	return e != nil && now.Before(e.until)
}

// rests reports whether a node that is down had better stay so, for it does not reach who is
// up, or did not until lately. Who counts as up may not have been heard yet by a new leader: if
// it is silent it will be down soon.
func (r *round) rests(n *state.Node) bool {
	s := &r.s.links
	if slices.ContainsFunc(r.facts[n.ID].Unreached, func(id state.NodeID) bool {
		o := r.v.Node(id)
		return o != nil && o != n && o.State == state.NodeUp && !r.down[id]
	}) {
		e := s.resting[n.ID]
		if e == nil { // a former leader has declared it down
			e = &rest{pause: linkRest}
			s.resting[n.ID] = e
		}
		e.last = r.now
		if until := r.now.Add(linkRest / 2); until.After(e.until) {
			e.until = until
		}
	}
	return s.rests(n.ID, r.now)
}
