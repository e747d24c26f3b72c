package steward

import (
	"math/rand/v2"
	"testing"
	"time"

	"sheepdog/cluster/state"
)

// A firewall refuses connections too. As long as the node's own connection is there, its
// process is.
func TestRefusalOfAFirewall(t *testing.T) {
	w := newWorld(t, 8, 3, 2)
	w.facts.Linked("n2", true)
	w.facts.Refused("n2", w.now)
	w.pass(time.Second)
	w.expect()
	w.quiet["n2"] = true
	w.facts.Refused("n2", w.now)
	w.pass(500 * time.Millisecond)
	w.expect()
	w.facts.Linked("n2", false)
	w.pass(0)
	w.expect("11500: 2 down")
}

// Who is heard as an earlier incarnation is not up as a later one.
func TestEarlierIncarnation(t *testing.T) {
	w := newWorld(t, 8, 3, 2)
	w.quiet["n2"] = true
	w.start("n2")
	w.pass(0)
	w.expect("10000: announce n2 live 1")
	w.facts.Heard("n2", 1, w.now, Saying{}, true)
	w.pass(time.Second)
	w.expect()
	w.facts.Heard("n2", 2, w.now, Saying{}, true)
	w.facts.Heard("n2", 1, w.now.Add(time.Hour), Saying{}, true) // not of this life
	w.pass(0)
	w.expect("11000: 2 up")
	if f := w.facts.Of(w.now, w.view())[2]; !f.Heard.Equal(w.now) {
		t.Errorf("it was heard at %v", f.Heard)
	}
}

// A leader that was stopped itself reads what nodes have asked meanwhile before it takes
// them for silent.
func TestLeaderWakes(t *testing.T) {
	w := newWorld(t, 8, 3, 3)
	w.quiet["n3"] = true
	w.now = w.now.Add(10 * time.Second)
	w.s.Woke(w.now)
	w.step()
	w.expect()
	w.pass(options.Gather)
	w.expect("20300: 3 down")
}

// A node that is about to stop does not come up again before it has started anew.
func TestLeaving(t *testing.T) {
	w := newWorld(t, 8, 3, 3)
	w.sync()
	w.apply(state.Command{Leave: &state.Leave{Node: 2, Incarnation: 1, Most: 100}})
	w.pass(time.Second)
	w.expect()
	if v := w.s.Grant(w.view(), state.Life{Node: 2, Incarnation: 1}, w.view().Epoch, true); v != Granted {
		t.Errorf("it holds nothing any more, and may still tell: %v", v)
	}
	for i, q := range w.view().Policies[0].Partitions {
		if len(q.ISR) != 2 || len(q.Learners) != 0 {
			t.Errorf("partition %d: %+v", i, q)
		}
	}
	w.apply(state.Command{SetNode: &state.SetNode{Node: 2, Incarnation: 1, State: state.NodeDown}})
	w.pass(time.Second) // its last questions are still read
	w.expect()
	w.start("n2")
	w.pass(0)
	w.expect("12000: announce n2 live 1 live 3", "12000: 2 up")
	for i, q := range w.view().Policies[0].Partitions {
		if len(q.Learners) != 1 {
			t.Errorf("partition %d: %+v", i, q)
		}
	}
}

// rival is a node that may lead.
type rival struct {
	name    string
	s       *Steward
	facts   Facts
	view    *state.View // as far as it has applied
	contact time.Time   // with a quorum; it does not know of later leaders before that
	leading bool
}

// question is on its way to a leader.
type question struct {
	life  state.Life
	name  string
	asked time.Time
	comes time.Time
	to    *rival
}

// No node that is declared down has a lease, however messages and leaders are delayed.
func TestNoLeaseOfWhoIsDown(t *testing.T) {
	granted, downs := 0, 0
	for seed := range uint64(60) {
		g, d := leases(t, seed)
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
		granted, downs = granted+g, downs+d
	}
	if granted < 10000 || downs < 100 {
		t.Errorf("too little was tried: %d leases, %d nodes down", granted, downs)
	}
}

func leases(t *testing.T, seed uint64) (granted, downs int) {
	rnd := rand.New(rand.NewPCG(seed, 9))
	w := newWorld(t, 4, 3, 5)
	var rivals []*rival
	for _, name := range []string{"n1", "n2", "n3"} {
		o := options
		o.Self = name
		rivals = append(rivals, &rival{name: name, s: New(o), view: w.view()})
	}
	crown := func(r *rival) {
		r.leading, r.contact, r.view = true, w.now, w.view()
		r.facts.Forget()
		r.s.Follow()
		r.s.Lead(w.now)
	}
	now := rivals[0]
	crown(now)
	until := map[state.Life]time.Time{}
	var way []question
	for range 3000 {
		w.now = w.now.Add(50 * time.Millisecond)
		if rnd.IntN(100) == 0 { // a new leader; the former one does not know for a while
			if next := rivals[rnd.IntN(3)]; next != now {
				now = next
				crown(now)
			}
		}
		now.contact = w.now.Add(-time.Duration(rnd.IntN(100)) * time.Millisecond)
		for _, n := range w.view().Nodes {
			life := state.Life{Node: n.ID, Incarnation: n.Incarnation}
			if to := rivals[rnd.IntN(3)]; rnd.IntN(4) == 0 {
				q := question{life: life, name: n.Name, asked: w.now, to: to, comes: w.now.Add(time.Duration(rnd.IntN(300)) * time.Millisecond)}
				if rnd.IntN(20) == 0 || n.ID == state.NodeID(1+w.now.Unix()/20%5) { // as if it, or its link, had been stopped
					q.comes = w.now.Add(time.Duration(rnd.IntN(6000)) * time.Millisecond)
				}
				way = append(way, q)
			}
		}
		rest := way[:0]
		for _, q := range way {
			if q.comes.After(w.now) {
				rest = append(rest, q)
				continue
			}
			r := q.to
			if !r.leading || w.now.Sub(r.contact) > options.LeaderLease {
				continue
			}
			r.facts.Heard(q.name, q.life.Incarnation, w.now, Saying{}, true)
			if r.s.Grant(r.view, q.life, r.view.Epoch, true) == Granted {
				granted++
				if u := q.asked.Add(options.Lease); u.After(until[q.life]) {
					until[q.life] = u
				}
			}
		}
		way = rest
		for _, r := range rivals {
			if !r.leading {
				continue
			}
			if r == now {
				r.view = w.view()
			}
			if self := r.view.NodeByName(r.name); r.s.Grant(r.view, state.Life{Node: self.ID, Incarnation: 1}, r.view.Epoch, true) == Granted {
				granted++
				if u := r.contact.Add(options.Lease); u.After(until[state.Life{Node: self.ID, Incarnation: 1}]) {
					until[state.Life{Node: self.ID, Incarnation: 1}] = u
				}
			}
			for _, c := range r.s.Step(w.now, r.view, r.facts.Of(w.now, r.view), nil).Commands {
				if r != now || rnd.IntN(8) == 0 {
					break // lost
				}
				for _, n := range downOf(&c) {
					downs++
					if until[n].After(w.now) {
						t.Errorf("%v: %+v is declared down and has a lease until %v", w.now, n, until[n])
					}
				}
				w.apply(c)
			}
		}
	}
	return granted, downs
}

func downOf(c *state.Command) (list []state.Life) {
	if c.SetNodes == nil {
		return nil
	}
	for _, n := range c.SetNodes.Nodes {
		if n.State == state.NodeDown {
			list = append(list, state.Life{Node: n.Node, Incarnation: n.Incarnation})
		}
	}
	return list
}
