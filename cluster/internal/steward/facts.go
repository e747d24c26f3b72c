package steward

import (
	"time"

	"sheepdog/cluster/state"
)

// Fact is what the leader knows of a node in its present incarnation.
type Fact struct {
	// Heard is when the message left that the node answered last in the present term; zero: it
	// has answered none. If in doubt whether the answer was of the present incarnation, it was:
	// a node that answers renews its lease.
	Heard time.Time
	Gone  bool // its machine is there and its process is not
	Left  bool // it said good-bye, and serves nothing any more
	Ready bool // it has caught up with the log, and takes connections
}

// Facts collects what is heard of nodes, by their names. The zero value knows nothing.
type Facts struct {
	nodes map[string]*evidence
}

type evidence struct {
	heard   time.Time
	refused time.Time
	left    uint64 // incarnations
	ready   uint64
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

// Heard says that the node has answered a message that left at a time.
func (f *Facts) Heard(node string, at time.Time) {
	if e := f.of(node); at.After(e.heard) {
		e.heard = at
	}
}

// Refused says that the node's machine refused the connection to the peer port at a time.
func (f *Facts) Refused(node string, at time.Time) { f.of(node).refused = at }

// Connected says that there is a connection to the node's process.
func (f *Facts) Connected(node string) { f.of(node).refused = time.Time{} }

// Left says that an incarnation of the node has said good-bye.
func (f *Facts) Left(node string, incarnation uint64) {
	e := f.of(node)
	e.left = max(e.left, incarnation)
}

// Ready says that an incarnation of the node may be up.
func (f *Facts) Ready(node string, incarnation uint64) {
	e := f.of(node)
	e.ready = max(e.ready, incarnation)
}

// Forget drops what is known only in the present term: who leads again begins anew.
func (f *Facts) Forget() {
	for _, e := range f.nodes {
		e.heard = time.Time{}
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
		facts[n.ID] = Fact{
			Heard: e.heard,
			Gone:  e.refused.After(e.heard) && e.refused.After(e.knownAt.Add(refusalGuard)),
			Left:  e.left != 0 && e.left >= n.Incarnation,
			Ready: e.ready != 0 && e.ready == n.Incarnation,
		}
	}
	for name, e := range f.nodes { // of nodes that were removed
		if !names[name] && e.known != 0 {
			delete(f.nodes, name)
		}
	}
	return facts
}
