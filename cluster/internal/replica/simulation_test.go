package replica_test

import (
	"flag"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"sheepdog/cluster/state"
)

var (
	simSeed  = flag.Uint64("sim.seed", 0, "run this seed alone, and tell what happens")
	simSeeds = flag.Int("sim.n", 20, "how many seeds to run; from 500 on also the mistakes that must be noticed")
)

// story is one simulation: faults for some seconds, then peace, in which everything
// must come together again.
func story(seed uint64, m mutation) *sim {
	nodes, copies := 3+int(seed%3), 1+int(seed/3%3)
	s := newSim(seed, nodes, copies, m)
	s.harsh = seed%2 == 0
	if s.full = seed%5 < 2; s.full {
		for _, n := range s.nodes {
			n.disk.capacity = 40 + s.rng.IntN(80)
		}
	}
	s.watch()
	if !s.run(s.settled, 20*second) {
		s.fail("the cluster does not begin to work: %s", s.situation())
		return s
	}
	for i := range simClients {
		c := &simClient{s: s, id: i}
		s.clients = append(s.clients, c)
		s.after(0, c.beat)
	}
	s.trouble = true
	s.after(s.between(0, second), s.fault)
	s.run(func() bool { return false }, 12*second)
	s.peace()
	s.run(func() bool { return false }, second)
	for _, c := range s.clients {
		c.stop = true
	}
	idle := func() bool { return !slices.ContainsFunc(s.clients, func(c *simClient) bool { return c.underway > 0 }) }
	if !s.run(func() bool { return idle() && s.settled() }, 60*second) {
		s.fail("no convergence after a minute of peace: clients idle %v, %s", idle(), s.situation())
		return s
	}
	if err := s.history.check(); err != nil {
		s.fail("%v", err)
	}
	s.compare()
	return s
}

// fault does something bad, now and again.
func (s *sim) fault() {
	if !s.trouble {
		return
	}
	if !s.harsh && s.recovering() {
		s.after(s.between(0, 500*ms), s.fault)
		return
	}
	n := s.nodes[s.rng.IntN(len(s.nodes))]
	kinds := 9
	if s.harsh {
		kinds = 12
	}
	switch s.rng.IntN(kinds) {
	case 9, 10, 11:
		s.blackout()
	case 0, 1:
		if n.alive {
			n.kill(s.chance(0.5) && (s.harsh || s.spare(n)))
			s.after(s.between(100*ms, 6*second), n.revive)
		}
	case 2, 3:
		if n.running() {
			n.hang()
			s.after(s.between(100*ms, 6*second), n.wake)
		}
	case 4:
		other := s.nodes[s.rng.IntN(len(s.nodes))]
		s.logf("cut %s -> %s", n.name, other.name)
		s.cut[[2]state.NodeID{n.id, other.id}] = true
		if s.chance(0.5) {
			s.cut[[2]state.NodeID{other.id, n.id}] = true
		}
	case 5:
		s.logf("links are mended")
		clear(s.cut)
	case 6:
		n.apart = !n.apart
		s.logf("%s apart from the leader: %v", n.name, n.apart)
	case 7:
		n.disk.slow = !n.disk.slow
	case 8:
		s.place()
	}
	s.after(s.between(0, 1500*ms), s.fault)
}

// recovering reports whether a node without power has not been taken out of the in-sync
// sets yet. What was not made durable is then on the others alone.
func (s *sim) recovering() bool {
	if s.weak == nil {
		return false
	}
	v := s.oracle.View()
	if m := v.Node(s.weak.id); m.Incarnation == s.weakInc && m.State == state.NodeUp {
		return true
	}
	s.weak = nil
	return false
}

// spare reports whether a node's power may be cut without loss: wherever it is in sync,
// so is a living one whose memory nobody has taken.
func (s *sim) spare(n *simNode) bool {
	v := s.oracle.View()
	for _, p := range v.Policies[0].Partitions {
		if !slices.Contains(p.ISR, n.id) {
			continue
		}
		if !slices.ContainsFunc(p.ISR, func(id state.NodeID) bool {
			other := s.nodes[id-1]
			return id != n.id && other.running() && !other.apart && v.Node(id).Incarnation == other.inc && v.Node(id).State == state.NodeUp
		}) {
			return false
		}
	}
	return true
}

func (n *simNode) revive() {
	if !n.alive {
		n.s.start(n)
	}
}

// blackout cuts the power of most nodes, or of those that hold a partition, at about the
// same time. Some come back together, some alone, and some late.
func (s *sim) blackout() {
	power := s.chance(0.8)
	hit := func(*simNode) bool { return s.chance(0.9) }
	if s.chance(0.5) {
		p := s.oracle.View().Policies[0].Partitions[s.rng.IntN(simPartitions)]
		hit = func(n *simNode) bool { return slices.Contains(p.ISR, n.id) || slices.Contains(p.Waiting, n.id) }
	}
	s.logf("blackout, power cut: %v", power)
	var together []*simNode
	for _, n := range s.nodes {
		if !hit(n) {
			continue
		}
		s.after(s.between(0, 20*ms), func() {
			if n.alive {
				n.kill(power)
			}
		})
		if s.chance(0.6) {
			together = append(together, n)
		} else {
			s.after(s.between(100*ms, 6*second), n.revive)
		}
	}
	s.after(s.between(100*ms, second), func() {
		together = slices.DeleteFunc(together, func(n *simNode) bool { return n.alive })
		if len(together) > 0 {
			s.start(together...)
		}
	})
}

func (s *sim) peace() {
	s.logf("peace")
	s.trouble = false
	clear(s.cut)
	for _, n := range s.nodes {
		n.apart, n.disk.slow, n.disk.capacity = false, false, 1<<30
		n.wake()
		n.revive()
	}
}

// settled reports whether every partition is held by its targets, and served.
func (s *sim) settled() bool {
	v := s.oracle.View()
	for i, p := range v.Policies[0].Partitions {
		if !slices.Equal(p.ISR, p.Targets) {
			return false
		}
		n := s.nodes[p.Primary()-1]
		if !n.running() || !n.parts[i].Serving() || !n.parts[i].Idle() || n.parts[i].Epoch() != p.Epoch {
			return false
		}
		for _, o := range s.nodes { // who holds it no more has nothing of it
			if len(o.have(i)) > 0 && !slices.Contains(p.ISR, o.id) && p.Lost == 0 {
				return false
			}
		}
	}
	return true
}

func (s *sim) situation() string {
	var b strings.Builder
	v := s.oracle.View()
	for i, p := range v.Policies[0].Partitions {
		fmt.Fprintf(&b, "partition %d: %+v", i, p)
		n := s.nodes[p.Primary()-1]
		fmt.Fprintf(&b, ", primary running %v serving %v epoch %d; ", n.running(), n.parts[i].Serving(), n.parts[i].Epoch())
	}
	for _, n := range s.nodes {
		fmt.Fprintf(&b, "%s has %v %v; ", n.name, n.have(0), n.have(1))
	}
	for _, n := range v.Nodes {
		fmt.Fprintf(&b, "%s %s inc %d; ", n.Name, n.State, n.Incarnation)
	}
	return b.String()
}

// compare finds replicas that differ.
func (s *sim) compare() {
	for i, p := range s.oracle.View().Policies[0].Partitions {
		want := s.nodes[p.ISR[0]-1]
		for _, id := range p.ISR[1:] {
			n := s.nodes[id-1]
			for _, o := range slices.Sorted(maps.Keys(merged(want.have(i), n.have(i)))) {
				a, b := want.disk.objects[o], n.disk.objects[o]
				if a == nil || b == nil || a.blocks != b.blocks {
					s.fail("partition %d: object %s is %v on %s and %v on %s", i, o, a, want.name, b, n.name)
				}
			}
		}
	}
}

func merged[T comparable](lists ...[]T) map[T]bool {
	m := map[T]bool{}
	for _, l := range lists {
		for _, v := range l {
			m[v] = true
		}
	}
	return m
}

func TestSimulation(t *testing.T) {
	if *simSeed != 0 {
		s := story(*simSeed, "")
		t.Log(strings.Join(s.trace, "\n"))
		if s.failure != nil {
			t.Fatal(s.failure)
		}
		return
	}
	ops, yields, purges, refused := 0, 0, 0, 0
	for seed := range uint64(*simSeeds) {
		s := story(seed+1, "")
		if s.failure != nil {
			t.Fatalf("seed %d: %v", seed+1, s.failure)
		}
		for _, c := range s.clients {
			ops += c.ops
		}
		yields, purges, refused = yields+s.yields, purges+s.purges, refused+s.refused
	}
	t.Logf("%d stories, %d operations, %d refused for want of space, %d changes given up for it, %d partitions removed", *simSeeds, ops, refused, yields, purges)
}

// The simulation must find each of these mistakes.
func TestSimulationNotices(t *testing.T) {
	if *simSeeds < 500 {
		t.Skip("make sim does it, without the race detector")
	}
	// trustMarks is left out: since small disks and removals are part of the stories, 3000 of them do not show it.
	for _, m := range []mutation{ackEarly, skipEpoch, skipSettle, wrongSource, ignoreLease, skipGeneration, forgetDrain, trustFlushes, takeUndecided, ignoreSpace} {
		t.Run(string(m), func(t *testing.T) {
			for seed := range uint64(3000) {
				if s := story(seed+1, m); s.failure != nil {
					t.Logf("seed %d: %v", seed+1, s.failure)
					return
				}
			}
			t.Error("3000 stories passed")
		})
	}
}
