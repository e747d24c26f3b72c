package steward

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"sheepdog/cluster/internal/placement"
	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// Options of a Steward. All are needed.
type Options struct {
	Self        string        // name of this node
	Lease       time.Duration // of nodes (INV-R5)
	LeaderLease time.Duration // for how long a leader may not know that it is none any more
	Margin      time.Duration // added to both before a silent node is down
	// Gather is how long nodes that start together are waited for. Should be long enough
	// for the leader to hear of nodes that are well.
	Gather time.Duration
	// Settle is how long no node may have joined before targets are computed.
	Settle time.Duration
	// Moves is how many partitions get other targets, or learners that came back, at once.
	Moves int
}

// patience is how many of Gather and Settle the first one waits at most.
const patience = 5

// Announcement is a node that has started, and when it said so.
type Announcement struct {
	state.Announce
	Came time.Time
}

// Decision is what to do now.
type Decision struct {
	// Commands to propose in this order. If one fails the rest may be left out: what is still
	// to be done is decided again by the next Step, which follows the last of them.
	Commands []state.Command
	// Notes are for the log.
	Notes []Note
}

// Note says why something is done.
type Note struct {
	Node   string // "": it concerns all
	What   string
	Reason string
}

// Steward decides for one leader. Its methods are called by one goroutine at a time.
type Steward struct {
	opt     Options
	leading bool
	since   time.Time
	woke    time.Time                  // see Woke
	ready   map[state.Life]time.Time   // nodes that may be up, since when
	given   map[state.Life]bool        // were declared down, which may not have been carried out yet
	missed  map[state.NodeID]time.Time // nodes that are down, since when by the clock of this process
	links   links

	shape   state.Epoch // of holders
	holders map[state.NodeID]bool
	seen    []placement.Node // where data can be, as of the last Step
	first   time.Time        // when that began to change
	changed time.Time        // and when it last did
	joined  bool             // it is not only less
	tries   map[object.PolicyID]int
	plans   map[object.PolicyID][][]state.NodeID // for seen
	placed  map[object.PolicyID]bool             // the plan was carried out
	moved   time.Time                            // when targets or learners were changed last
	learned state.Epoch                          // view in which nobody has to begin to learn
	doubt   state.Epoch                          // view in which nothing is undecided
}

// New returns the steward of a node that does not lead.
func New(o Options) *Steward { return &Steward{opt: o} }

// Lead says that this node leads since a time. Repeated with the same time it changes nothing.
func (s *Steward) Lead(since time.Time) {
	if s.leading && s.since.Equal(since) {
		return
	}
	*s = Steward{opt: s.opt, leading: true, since: since, ready: map[state.Life]time.Time{}, given: map[state.Life]bool{}, missed: map[state.NodeID]time.Time{}, links: newLinks()}
}

// Follow says that this node does not lead.
func (s *Steward) Follow() { *s = Steward{opt: s.opt} }

// Woke says that this process did not run for a while before a time: what nodes have asked
// meanwhile is still to be read, and their silence says nothing yet.
func (s *Steward) Woke(now time.Time) { s.woke = now }

// Verdict is the answer to a node that asks for a lease. Its numbers travel.
type Verdict uint8

// Verdicts.
const (
	NotLeading Verdict = iota // ask the leader
	Granted
	Down    // the node counts as down, and will be up again soon
	Unknown // there is no such node: it was removed
	Other   // the node's name belongs to a process that has started later
	Deaf    // the leader cannot connect to the node
	Behind  // the node has not followed yet what made it up or down
	Cut     // it does not reach others, or they, the leader among them, do not reach it: it shall give up its lease
)

// Grant decides whether a node that has asked may go on serving for a lease, counted from
// when it asked. The view must have all that was decided before this node led. If the node
// is granted one the caller notes that it was heard now, before the next Step. A lease that
// rests on what a node hears instead is unsafe: the node may hear what was sent long ago,
// or hear and not be heard. With this one, what was granted ends before the node is
// declared down, and nothing is granted from then on.
//
// Who was down and is up again gets none before it has followed that: until then it knows
// nothing of what was decided, and changed, without it, and would answer by what was before.
// The log may reach it seconds after it can ask.
//
// reached says whether the leader can connect to the node.
func (s *Steward) Grant(v *state.View, l state.Life, followed state.Epoch, reached bool) Verdict {
	n := v.Node(l.Node)
	switch {
	case !s.leading:
		return NotLeading
	case n == nil:
		return Unknown
	case n.Incarnation > l.Incarnation:
		return Other
	case n.Incarnation < l.Incarnation || n.State != state.NodeUp || s.given[l]:
		return Down
	case followed < n.Turned:
		return Behind
	}
	if _, goes := s.links.going[l]; goes {
		return Cut
	}
	if !reached {
		return Deaf
	}
	return Granted
}

// InStep reports whether a node has followed what made it up or down. One that has not does not
// count as heard: it could do nothing.
func InStep(v *state.View, node state.NodeID, followed state.Epoch) bool {
	n := v.Node(node)
	return n == nil || followed >= n.Turned
}

// Step decides what is to be done. It is called when a fact has changed, and several times
// in Gather. The announcements are all those that have not been carried out.
func (s *Steward) Step(now time.Time, v *state.View, facts map[state.NodeID]Fact, announcements []Announcement) Decision {
	if !s.leading || !v.Formatted() {
		return Decision{}
	}
	r := round{s: s, now: now, v: v, facts: facts, started: map[string]bool{}, down: map[state.NodeID]bool{}}
	for i := range announcements {
		r.started[announcements[i].Name] = true
	}
	r.declareDown()
	r.cutLinks()
	r.announce(announcements)
	r.confirm()
	r.declareUp()
	r.putOut()
	if len(r.Commands) == 0 {
		r.enroll()
	}
	if len(r.Commands) == 0 {
		r.place()
	}
	return r.Decision
}

// round is one Step.
type round struct {
	Decision
	s       *Steward
	now     time.Time
	v       *state.View
	facts   map[state.NodeID]Fact
	started map[string]bool       // announced and not carried out
	down    map[state.NodeID]bool // are declared so
}

func (r *round) note(node, what, reason string) {
	r.Notes = append(r.Notes, Note{node, what, reason})
}

func (r *round) self(n *state.Node) bool { return n.Name == r.s.opt.Self }

// heard is when a node was heard last, or the leader elected.
func (r *round) heard(n *state.Node) time.Time {
	if h := r.facts[n.ID].Heard; h.After(r.s.since) {
		return h
	}
	return r.s.since
}

// alive reports whether a node's process is known to live.
func (r *round) alive(n *state.Node) bool {
	f := r.facts[n.ID]
	return r.self(n) || !f.Gone && !f.Heard.Before(r.s.since) && r.now.Sub(f.Heard) <= r.s.opt.Lease
}

// up reports whether a node is up and known to live. One that has started anew is not.
func (r *round) up(n *state.Node) bool {
	return n.State == state.NodeUp && !r.down[n.ID] && !r.started[n.Name] && r.alive(n)
}

// starting reports whether the leader itself has only just started, as after a power cut of
// the whole cluster. Then those that are missing are given some time: who is down when
// others are up already has no part in what they begin with.
func (r *round) starting() bool {
	n := r.v.NodeByName(r.s.opt.Self)
	return (n == nil || n.State == state.NodeDown || r.started[n.Name]) && r.now.Sub(r.s.since) < 2*patience*r.s.opt.Gather
}

// declareDown finds the nodes that are down.
func (r *round) declareDown() {
	if r.starting() {
		return
	}
	for l := range r.s.given {
		if n := r.v.Node(l.Node); n == nil || n.Incarnation != l.Incarnation {
			delete(r.s.given, l)
		}
	}
	type dead struct {
		node *state.Node
		rank int // gone, silent
	}
	var list []dead
	limit := r.s.opt.Lease + r.s.opt.LeaderLease + r.s.opt.Margin
	awake := r.s.woke.IsZero() || r.now.Sub(r.s.woke) >= r.s.opt.Gather
	for _, n := range r.v.Nodes {
		life := state.Life{Node: n.ID, Incarnation: n.Incarnation}
		if n.State != state.NodeUp {
			delete(r.s.given, life)
		}
		if n.State != state.NodeUp || r.self(n) || r.started[n.Name] {
			continue
		}
		f, silence := r.facts[n.ID], r.now.Sub(r.heard(n))
		switch {
		case f.Gone:
			list = append(list, dead{n, 0})
			r.note(n.Name, "node is down", "its process is gone")
		case silence > limit && awake:
			list = append(list, dead{n, 1})
			r.note(n.Name, "node is down", "it has not answered for "+silence.Round(time.Millisecond).String())
		case r.s.given[life]: // the command may have been lost, or come late: it gets no lease until one is there
			list = append(list, dead{n, 1})
		default:
			continue
		}
		r.s.given[life] = true
	}
	if len(list) == 0 {
		return
	}
	slices.SortStableFunc(list, func(a, b dead) int {
		return cmp.Or(cmp.Compare(a.rank, b.rank), r.heard(a.node).Compare(r.heard(b.node)))
	})
	c := &state.SetNodes{}
	for _, d := range list {
		r.down[d.node.ID] = true
		c.Nodes = append(c.Nodes, r.set(d.node, state.NodeDown))
	}
	r.Commands = append(r.Commands, state.Command{SetNodes: c})
}

func (r *round) set(n *state.Node, to state.NodeState) state.SetNode {
	return state.SetNode{Node: n.ID, Incarnation: n.Incarnation, State: to, At: r.at()}
}

// at is the time as commands have it.
func (r *round) at() time.Time { return r.now.UTC().Truncate(time.Millisecond) }

// announce takes the nodes that have started, when no more are to be expected.
func (r *round) announce(list []Announcement) {
	if len(list) == 0 || !r.gathered(list) {
		return
	}
	c := &state.AnnounceAll{}
	for _, n := range r.v.Nodes {
		if r.up(n) {
			c.Live = append(c.Live, state.Life{Node: n.ID, Incarnation: n.Incarnation})
		}
	}
	latest := map[string]time.Time{} // of each node its last start counts
	for i := range list {
		if came := list[i].Came; !came.Before(latest[list[i].Name]) {
			latest[list[i].Name] = came
		}
	}
	for i := range list {
		a := &list[i]
		if came, ok := latest[a.Name]; ok && came.Equal(a.Came) && len(c.Nodes) < state.MaxNodes {
			delete(latest, a.Name)
			c.Nodes = append(c.Nodes, a.Announce)
		}
	}
	r.Commands = append(r.Commands, state.Command{AnnounceAll: c})
}

// gathered reports whether announcements need not wait for others.
func (r *round) gathered(list []Announcement) bool {
	first, last := list[0].Came, list[0].Came
	for i := range list {
		if came := list[i].Came; came.Before(first) {
			first = came
		} else if came.After(last) {
			last = came
		}
	}
	gather := r.s.opt.Gather
	if r.now.Sub(last) >= gather && r.now.Sub(r.s.since) >= gather || r.now.Sub(first) >= patience*gather {
		return true
	}
	return len(list) == 1 && !slices.ContainsFunc(r.v.Nodes, func(n *state.Node) bool {
		return n.State == state.NodeUp && !r.up(n) && !r.started[n.Name]
	})
}

// confirm ends the doubt about partitions whose members live.
func (r *round) confirm() {
	if r.s.doubt == r.v.Epoch {
		return
	}
	members := r.v.UndecidedMembers()
	if len(members) == 0 {
		r.s.doubt = r.v.Epoch
		return
	}
	c := &state.Confirm{}
	for _, n := range r.v.Nodes {
		if slices.Contains(members, n.ID) && r.up(n) {
			c.Live = append(c.Live, state.Life{Node: n.ID, Incarnation: n.Incarnation})
			r.note(n.Name, "partitions go on with the node", "others have started anew, it has not")
		}
	}
	if len(c.Live) > 0 {
		r.Commands = append(r.Commands, state.Command{Confirm: c})
	}
}

// declareUp finds the nodes that are up again.
func (r *round) declareUp() {
	c := &state.SetNodes{}
	first, others := r.now, false
	for _, n := range r.v.Nodes {
		life := state.Life{Node: n.ID, Incarnation: n.Incarnation}
		f := r.facts[n.ID]
		switch {
		case n.State == state.NodeUp || n.Leaving:
			delete(r.s.ready, life)
		case r.started[n.Name]:
			delete(r.s.ready, life)
			others = true
		case f.Heard.Before(r.s.since) || !r.alive(n):
			delete(r.s.ready, life)
			others = others || !f.Gone && r.now.Sub(f.Known) < r.s.opt.Gather // it may have begun this moment
		case r.rests(n):
			delete(r.s.ready, life)
		default:
			at, ok := r.s.ready[life]
			if !ok {
				at = r.now
				r.s.ready[life] = at
			}
			if at.Before(first) {
				first = at
			}
			c.Nodes = append(c.Nodes, r.set(n, state.NodeUp))
		}
	}
	if len(c.Nodes) == 0 || others && r.now.Sub(first) < r.s.opt.Gather {
		return
	}
	clear(r.s.ready)
	c.Enroll, r.s.moved = r.s.opt.Moves, r.now
	for i := range c.Nodes {
		r.note(r.v.Node(c.Nodes[i].Node).Name, "node is up", "it is ready")
	}
	r.Commands = append(r.Commands, state.Command{SetNodes: c})
}

// miss notes since when nodes are down. The state says it too, but by the time of day of whoever led then, which may differ from
// this node's, and may be set.
func (r *round) miss() {
	for id := range r.s.missed {
		if n := r.v.Node(id); n == nil || n.State == state.NodeUp {
			delete(r.s.missed, id)
		}
	}
	for _, n := range r.v.Nodes {
		if _, ok := r.s.missed[n.ID]; !ok && n.State != state.NodeUp {
			r.s.missed[n.ID] = r.now
		}
	}
}

// putOut finds nodes that have been down for too long.
func (r *round) putOut() {
	r.miss()
	after, ever := r.v.Cluster.OutAfter()
	if !ever || r.v.Cluster.Hold {
		return
	}
	var up, all float64
	c := &state.SetOut{}
	for _, n := range r.v.Nodes {
		share := n.Share()
		all += share
		if n.State == state.NodeUp {
			up += share
			continue
		}
		if share > 0 && r.now.Sub(r.s.missed[n.ID]) >= after {
			c.Nodes = append(c.Nodes, state.Life{Node: n.ID, Incarnation: n.Incarnation})
		}
	}
	if len(c.Nodes) == 0 || 2*up < all {
		return
	}
	for _, l := range c.Nodes {
		r.note(r.v.Node(l.Node).Name, "node is out: its data is brought to others", fmt.Sprintf("it has been down for %v", after))
	}
	r.Commands = append(r.Commands, state.Command{SetOut: c})
}
