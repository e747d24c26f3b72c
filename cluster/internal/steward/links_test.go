package steward

import (
	"fmt"
	"testing"
	"time"

	"sheepdog/cluster/state"
)

// cut is a world whose nodes say which links fail, and hold leases as production's do.
type cut struct {
	*world
	failing map[link]bool
	serving map[state.NodeID]bool
	mute    map[state.NodeID]bool // do not say that they have renounced
	deaf    map[state.NodeID]bool // the leader cannot connect to them
	number  uint64
	last    map[state.NodeID]Verdict
}

func newCut(t *testing.T, copies, nodes int) *cut {
	return &cut{newWorld(t, 8, copies, nodes), map[link]bool{}, map[state.NodeID]bool{}, map[state.NodeID]bool{}, map[state.NodeID]bool{}, 0, map[state.NodeID]Verdict{}}
}

func (w *cut) pass(d time.Duration) {
	for end := w.now.Add(d); w.now.Before(end); w.now = w.now.Add(100 * time.Millisecond) {
		v := w.view()
		for _, n := range v.Nodes {
			if w.quiet[n.Name] {
				continue
			}
			w.number++
			s := Saying{Serving: w.serving[n.ID], Number: w.number, Renounced: w.last[n.ID] == Cut && !w.mute[n.ID]}
			for _, o := range v.Nodes {
				if w.failing[link{min(n.ID, o.ID), max(n.ID, o.ID)}] && o.State == state.NodeUp {
					s.Unreached = append(s.Unreached, o.ID)
				}
			}
			w.facts.Heard(n.Name, n.Incarnation, w.now, s, !w.deaf[n.ID])
			w.last[n.ID] = w.s.Grant(v, lifeOf(n), v.Epoch, !w.deaf[n.ID])
		}
		w.step()
	}
}

func (w *cut) isUp(id state.NodeID) bool { return w.view().Node(id).State == state.NodeUp }

// Of two nodes that do not reach each other the one without clients goes, as soon as it has
// given up its lease, and comes back some time after the link did.
func TestLinkFails(t *testing.T) {
	w := newCut(t, 2, 3)
	w.sync()
	w.serving[3] = true
	w.failing[link{2, 3}] = true
	w.pass(400 * time.Millisecond)
	w.expect()
	w.pass(400 * time.Millisecond)
	w.expect("10700: 2 down")
	w.pass(time.Minute)
	w.expect()
	clear(w.failing)
	w.pass(2 * time.Second)
	w.expect()
	w.pass(time.Second)
	w.expect("73200: 2 up")
}

// Who does not say that it has given up its lease is down when that has run out.
func TestLinkFailsAndLeaseRunsOut(t *testing.T) {
	w := newCut(t, 2, 3)
	w.sync()
	w.mute[3] = true
	w.failing[link{2, 3}] = true
	w.pass(2 * time.Second)
	w.expect()
	if v := w.last[3]; v != Cut {
		t.Fatalf("it is told %v", v)
	}
	w.pass(2 * time.Second)
	w.expect("13400: 3 down")
}

// Whom the leader does not reach, and who still asks, is told to give up its lease: it is down long
// before that would have run out.
func TestLeaderDoesNotReach(t *testing.T) {
	w := newCut(t, 2, 3)
	w.sync()
	w.failing[link{1, 2}], w.deaf[2] = true, true
	w.pass(400 * time.Millisecond)
	w.expect()
	w.pass(400 * time.Millisecond)
	w.expect("10700: 2 down")
	w.pass(time.Minute)
	w.expect()
	clear(w.failing)
	clear(w.deaf)
	w.pass(time.Second)
	w.expect("70800: 2 up")
}

// If it hears nothing, or may not be spared, it is down for its silence.
func TestLeaderDoesNotReachSilent(t *testing.T) {
	w := newCut(t, 2, 3)
	w.sync()
	w.failing[link{1, 2}], w.deaf[2], w.mute[2] = true, true, true
	w.pass(2500 * time.Millisecond)
	w.expect()
	w.pass(time.Second)
	w.expect("12800: 2 down")

	w = newCut(t, 2, 2)
	w.sync()
	w.failing[link{1, 2}], w.deaf[2] = true, true
	w.pass(2500 * time.Millisecond)
	w.expect()
	if w.last[2] == Cut {
		t.Error("one of two is told to go")
	}
	w.pass(time.Second)
	w.expect("12800: 2 down")
}

// A new leader does not believe who has renounced a lease of his: former ones may have
// granted others.
func TestLinkFailsAfterElection(t *testing.T) {
	w := newCut(t, 2, 3)
	w.sync()
	w.s.Follow()
	w.facts.Forget()
	w.s.Lead(w.now)
	w.failing[link{2, 3}] = true
	w.pass(2500 * time.Millisecond)
	w.expect()
	w.pass(time.Second)
	w.expect("12900: 3 down")
}

// A new leader does not have it up again as long as the link fails, also if it hears it before
// the other node.
func TestLinkFailsUnderTwoLeaders(t *testing.T) {
	w := newCut(t, 2, 3)
	w.sync()
	w.failing[link{2, 3}] = true
	w.pass(2 * time.Second)
	w.expect("10700: 3 down")
	w.s.Follow()
	w.facts.Forget()
	w.s.Lead(w.now)
	w.quiet["n2"] = true
	w.pass(time.Second)
	w.quiet["n2"] = false
	w.pass(20 * time.Second)
	w.expect()
	clear(w.failing)
	w.pass(10 * time.Second)
	if !w.isUp(3) {
		t.Error("it does not come back")
	}
}

// A link that comes and goes takes nobody along but one node, for longer each time.
func TestLinkFlaps(t *testing.T) {
	w := newCut(t, 2, 3)
	w.sync()
	downs := 0
	for range 120 {
		w.failing[link{2, 3}] = true
		w.pass(time.Second)
		clear(w.failing)
		w.pass(4 * time.Second)
		if !w.isUp(1) || !w.isUp(2) {
			t.Fatal("a node is down that need not be")
		}
	}
	for _, s := range w.said {
		var at, id int
		var to string
		if n, _ := fmt.Sscanf(s, "%d: %d %s", &at, &id, &to); n == 3 && to == "down" {
			downs++
		}
	}
	if downs < 2 || downs > 8 {
		t.Errorf("in ten minutes it was down %d times: %v", downs, w.said)
	}
	short := newCut(t, 2, 3)
	short.sync()
	for range 100 { // shorter than anybody minds
		short.failing[link{2, 3}] = true
		short.pass(400 * time.Millisecond)
		clear(short.failing)
		short.pass(400 * time.Millisecond)
	}
	short.expect()
}

// The node goes with which most links are mended, never the leader, and never so many that
// partitions have no member left or that most are gone.
func TestLinksOfMany(t *testing.T) {
	w := newCut(t, 3, 5)
	w.sync()
	for id := range state.NodeID(5) {
		if id++; id != 3 {
			w.failing[link{min(3, id), max(3, id)}] = true
		}
	}
	w.pass(2 * time.Second)
	w.expect("10700: 3 down")

	w = newCut(t, 3, 5)
	w.sync()
	for a := state.NodeID(1); a <= 5; a++ {
		for b := a + 1; b <= 5; b++ {
			w.failing[link{a, b}] = true
		}
	}
	w.pass(10 * time.Second)
	if up := []bool{w.isUp(1), w.isUp(2), w.isUp(3), w.isUp(4), w.isUp(5)}; fmt.Sprint(up) != "[true true true false false]" {
		t.Errorf("up: %v", up)
	}

	w = newCut(t, 1, 3)
	w.sync()
	w.failing[link{2, 3}] = true
	w.pass(10 * time.Second)
	w.expect()
	for i, q := range w.view().Policies[0].Partitions {
		if len(q.ISR) != 1 {
			t.Errorf("partition %d: %+v", i, q)
		}
	}
}

// Who is silent is not to blame on links: it comes back as soon as it is heard again.
func TestSilenceIsNoLink(t *testing.T) {
	w := newCut(t, 2, 3)
	w.sync()
	w.quiet["n3"] = true
	w.failing[link{2, 3}] = true
	w.pass(limit + 300*time.Millisecond)
	if w.isUp(3) || !w.isUp(2) {
		t.Errorf("up: %v %v", w.isUp(2), w.isUp(3))
	}
	w.quiet["n3"] = false
	clear(w.failing)
	w.pass(time.Second)
	if !w.isUp(3) {
		t.Error("it is not up again at once")
	}
}

// Holder: once a lease is given up, answers to earlier questions say nothing, and a later
// question may be granted.
func TestHolder(t *testing.T) {
	var h Holder
	at := func(ms int) time.Time { return begin.Add(time.Duration(ms) * time.Millisecond) }
	if s, ok := h.Ask(at(0), nil, true); !ok || s.Renounced || !s.Serving || s.Number != 1 {
		t.Fatalf("it says %+v", s)
	}
	if from, _, better := h.Answered(Granted, at(0)); !better || from != at(0) {
		t.Fatal("what is granted is not taken")
	}
	h.Ask(at(100), nil, false) // is answered late
	h.Answered(Cut, at(50))
	if s, _ := h.Ask(at(200), nil, false); !s.Renounced {
		t.Fatal("it does not give up its lease")
	}
	if _, _, better := h.Answered(Granted, at(100)); better {
		t.Fatal("it has a lease that it has said not to have")
	}
	if _, _, better := h.Answered(Granted, at(200)); !better {
		t.Fatal("it does not take a new one")
	}
	if s, _ := h.Ask(at(300), nil, false); s.Renounced {
		t.Fatal("it gives up what it was just granted")
	}
	h.Leave()
	if _, ok := h.Ask(at(400), nil, false); ok {
		t.Fatal("it has left, and asks")
	}
	if _, _, better := h.Answered(Granted, at(300)); better {
		t.Fatal("it has left, and takes a lease")
	}
}
