package integration

import (
	"fmt"
	"testing"
	"time"

	"sheepdog/integration/rig"
)

// newNetFlock is a cluster in a network that the test can cut.
func newNetFlock(t *testing.T, n, copies int) (*rig.Flock, *rig.Net) {
	t.Helper()
	net := rig.NewNet(t)
	return rig.NewFlockOf(t, n, copies, rig.FlockOptions{Net: net}), net
}

// The peer port of the node that is primary of most is cut, for what comes in and for all.
func TestFlockSurvivesCutPort(t *testing.T) {
	besideOthers(t)
	f, net := newNetFlock(t, 3, 3)
	h, l := newHerder(t, f, "v"), newFio(t, f, "fio")
	i := f.Busiest()
	h.start(f.Nodes[(i+1)%3])
	l.start(f.Nodes[(i+1)%3])
	time.Sleep(time.Second)
	h.stall()
	cuts := []struct {
		what string
		make func()
	}{
		{"nothing comes to the peer port", func() { net.CutPort(i, false) }},
		{"nothing comes to the peer port or from it", func() { net.CutPort(i, true) }},
		{"nothing comes to the node at all", func() { net.Deafen(i) }},
	}
	if !soaking() {
		cuts = cuts[:1] // the others are make soak's
	}
	for _, cut := range cuts {
		cut.make()
		time.Sleep(7 * time.Second)
		net.Heal()
		took := f.WaitWhole(wholeLimit)
		reportStall(t, h, fmt.Sprintf("n%d: %s; whole %v later", i+1, cut.what, took.Round(time.Millisecond)), stallLimit)
	}
	h.end()
	l.end()
	for _, s := range f.Nodes {
		h.verify(s, false)
		l.verify(s)
	}
	f.Nodes[i].Dog("cluster", "check")
}

// leaseLimit bounds how long a node may answer after it was cut off from the others: its lease, and some.
const leaseLimit = 2500 * time.Millisecond

// A part of the cluster that is cut off answers nothing, and the other part goes on; when the
// cut is healed all is one again.
func TestFlockPartition(t *testing.T) {
	besideOthers(t)
	f, net := newNetFlock(t, 3, 3)
	partition(t, f, net, [][]int{{0, 1}, {2}}, 6*time.Second)
}

// partition has clients on both sides of a cut: those of the first part go on, the others' requests
// wait, and are carried out when the cut is healed. What anybody was told is true.
func partition(t *testing.T, f *rig.Flock, net *rig.Net, parts [][]int, long time.Duration) {
	t.Helper()
	most := newHerder(t, f, "most")
	few := newHerder(t, f, "few")
	stale := newReader(t, f, "watched", f.Nodes[parts[0][0]], f.Nodes[parts[1][0]])
	most.start(f.Nodes[parts[0][0]])
	few.start(f.Nodes[parts[1][0]])
	stale.start()
	time.Sleep(time.Second)
	most.stall()
	net.Split(parts...)
	cut := time.Now()
	time.Sleep(long / 2)
	reportStall(t, most, "the part with most nodes after the cut", stallLimit)
	time.Sleep(long / 2)
	if after := few.answered(cut); after > leaseLimit {
		t.Errorf("the part with few nodes has answered a request that was begun %v after the cut", after)
	}
	reportStall(t, most, "the same, later", stallLimit)
	net.Heal()
	took := f.WaitWhole(wholeLimit)
	few.end()
	most.end()
	reads := stale.end()
	t.Logf("parts %v: whole %v after the cut was healed; longest wait in the small part %v; %d reads, none stale", parts, took.Round(time.Millisecond), few.stall().Round(time.Millisecond), reads)
	for _, s := range f.Nodes {
		most.verify(s, false)
		few.verify(s, false)
	}
}

// Two nodes do not reach each other, and both reach the leader: one of them goes, clients of the others
// notice a pause, and it comes back when the link is mended.
func TestFlockSurvivesCutLink(t *testing.T) {
	besideOthers(t)
	f, net := newNetFlock(t, 3, 3)
	for try := 1; !cutLink(t, f, net, try); try++ {
		if try == 3 {
			t.Fatal("the leader never stays the same for ten seconds")
		}
	}
}

// cutLink reports false if another node has become the leader meanwhile, for which the link may be
// one of its own.
func cutLink(t *testing.T, f *rig.Flock, net *rig.Net, try int) bool {
	t.Helper()
	leader := f.Leader()
	a, b := (leader+1)%3, (leader+2)%3
	one, two := newHerder(t, f, fmt.Sprint("one", try)), newHerder(t, f, fmt.Sprint("two", try))
	one.start(f.Nodes[a])
	two.start(f.Nodes[leader])
	time.Sleep(time.Second)
	one.stall()
	two.stall()
	same := f.Leader() == leader
	if same {
		net.CutLink(a, b)
		var members map[string]rig.Member
		down := func(i int) bool { return members[fmt.Sprintf("n%d", i+1)].State != "up" }
		for deadline := time.Now().Add(5 * time.Second * patience()); ; time.Sleep(100 * time.Millisecond) {
			members = f.Members(f.Nodes[leader])
			if same = f.Leader() == leader; !same || down(a) != down(b) || time.Now().After(deadline) {
				break
			}
		}
		time.Sleep(2 * time.Second) // what was held up goes on
		if same = same && f.Leader() == leader; same {
			members = f.Members(f.Nodes[leader])
			if down(a) == down(b) || down(leader) {
				t.Errorf("one of n%d and n%d should be down: %+v", a+1, b+1, members)
			}
			reportStall(t, two, fmt.Sprintf("n%d and n%d do not reach each other: a client of n%d, which leads", a+1, b+1, leader+1), stallLimit)
			if !down(a) { // else its client waits for the link
				reportStall(t, one, fmt.Sprintf("a client of n%d, which stays", a+1), stallLimit)
			}
		}
		net.Heal()
		took := f.WaitWhole(wholeLimit)
		t.Logf("whole %v after the link was mended", took.Round(time.Millisecond))
	}
	for _, h := range []*herder{one, two} {
		h.end()
		for _, s := range f.Nodes {
			h.verify(s, false)
		}
	}
	return same
}

// Where no part has most of the voters, nobody is answered; when the cut is healed all go on, and
// nothing is lost.
func TestFlockPartitionWithoutMajority(t *testing.T) {
	if !soaking() {
		t.Skip("takes five nodes and half a minute: make soak")
	}
	f, net := newNetFlock(t, 5, 3)
	parts := [][]int{{0, 1}, {2, 3}, {4}}
	var herds []*herder
	for k, part := range parts {
		h := newHerder(t, f, fmt.Sprint("v", k))
		h.start(f.Nodes[part[0]])
		herds = append(herds, h)
	}
	time.Sleep(time.Second)
	net.Split(parts...)
	cut := time.Now()
	time.Sleep(8 * time.Second)
	for k, h := range herds {
		if after := h.answered(cut); after > leaseLimit {
			t.Errorf("part %v has answered a request that was begun %v after the cut", parts[k], after)
		}
	}
	net.Heal()
	took := f.WaitWhole(wholeLimit)
	for _, h := range herds {
		h.end()
		for _, s := range f.Nodes {
			h.verify(s, false)
		}
	}
	t.Logf("whole %v after the cut was healed", took.Round(time.Millisecond))
}

// Sixteen nodes find each other and share everything.
func TestFlockOfSixteen(t *testing.T) {
	if !soaking() {
		t.Skip("takes sixteen daemons: make soak")
	}
	began := time.Now()
	f := rig.NewFlock(t, 16, 3)
	took := time.Since(began)
	t.Logf("16 nodes were one cluster, with all replicas in place, %v after the first one was started", took.Round(time.Millisecond))
	if took > 30*time.Second*patience() {
		t.Errorf("it took %v", took)
	}
	h := newHerder(t, f, "v")
	h.start(f.Nodes[0])
	time.Sleep(time.Second)
	h.stall()
	f.Nodes[15].Kill()
	time.Sleep(3 * time.Second)
	reportStall(t, h, "kill -9 of one of 16", stallLimit)
	h.end()
}
