package steward

import (
	"time"

	"sheepdog/cluster/state"
)

// Fact is what the leader knows of a node in its present incarnation.
type Fact struct {
	// Heard is when the node asked for a lease last in the present term; zero: it has not
	// asked. Who asks has caught up with the log, and takes connections.
	Heard time.Time
	Known time.Time // since when its incarnation is known
	Gone  bool      // its machine is there and its process is not
	// Saying is what it said last, and Said when.
	Saying
	Said time.Time
}

// Facts collects what is heard of nodes, by their names. The zero value knows nothing.
type Facts struct {
	nodes map[string]*evidence
}

type evidence struct {
	spoke   time.Time // in whatever state it is
	heard   time.Time
	life    uint64 // incarnation that was heard
	saying  Saying
	said    time.Time
	refused time.Time
	linked  bool
	known   uint64    // the present one
	knownAt time.Time // since when
}

func (f *Facts) of(node string) *evidence {
	e := f.nodes[node]
	if e == nil {
		if f.nodes == nil {
			f.nodes = map[string]*evidence{}
		}
		e = new(evidence)
		f.nodes[node] = e
	}
	return e
}

// Heard says that an incarnation of the node asked for a lease, at a time or before, what it
// said, and that it is in step. A node that the leader cannot connect to is not reached: it does
// not count as heard, but what it says counts.
func (f *Facts) Heard(node string, incarnation uint64, at time.Time, what Saying, reached bool) {
	e := f.of(node)
	if incarnation > e.life {
		e.life, e.heard, e.saying, e.said = incarnation, time.Time{}, what, at
	}
	if incarnation == e.life && what.Number > e.saying.Number {
		e.saying, e.said = what, at
	}
	if reached && incarnation == e.life && at.After(e.heard) {
		e.heard = at
	}
}

// Spoke says that the node asked for a lease, as Heard does, but may not be in step.
func (f *Facts) Spoke(node string, at time.Time) { f.of(node).spoke = at }

// LastSpoke is when any incarnation of the node asked in the present term; zero: never.
func (f *Facts) LastSpoke(node string) time.Time { return f.of(node).spoke }

// Refused says that the node's machine refused the connection to the peer port at a time.
func (f *Facts) Refused(node string, at time.Time) { f.of(node).refused = at }

// Connected says that there is a connection to the node's process.
func (f *Facts) Connected(node string) { f.of(node).refused = time.Time{} }

// Linked says whether there is a connection that the node's process has made. While there
// is, a refused connection is the work of a firewall.
func (f *Facts) Linked(node string, linked bool) { f.of(node).linked = linked }

// Forget drops what is known only in the present term: who leads again begins anew.
func (f *Facts) Forget() {
	for _, e := range f.nodes {
		e.heard, e.spoke, e.saying, e.said = time.Time{}, time.Time{}, Saying{}, time.Time{}
	}
}

// refusalGuard is how long after a node's incarnation became known a refused connection
// says nothing: the attempt may have begun when the node was just starting.
const refusalGuard = time.Second

// Of gives the facts about the nodes of a view.
func (f *Facts) Of(now time.Time, v *state.View) map[state.NodeID]Fact {
	facts := make(map[state.NodeID]Fact, len(v.Nodes))
	names := make(map[string]bool, len(v.Nodes))
	for _, n := range v.Nodes {
		names[n.Name] = true
		e := f.of(n.Name)
		if e.known != n.Incarnation {
			e.known, e.knownAt = n.Incarnation, now
		}
		fact := Fact{
			Known: e.knownAt,
			Gone:  !e.linked && e.refused.After(e.heard) && e.refused.After(e.knownAt.Add(refusalGuard)),
		}
		if e.life == n.Incarnation {
			fact.Heard, fact.Saying, fact.Said = e.heard, e.saying, e.said
		}
		facts[n.ID] = fact
	}
	for name, e := range f.nodes { // of nodes that were removed
		if !names[name] && e.known != 0 {
			delete(f.nodes, name)
		}
	}
	return facts
}
