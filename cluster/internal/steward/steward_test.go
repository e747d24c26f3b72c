package steward

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

var options = Options{
	Self: "n1", Lease: 2 * time.Second, LeaderLease: 500 * time.Millisecond, Margin: 300 * time.Millisecond,
	Gather: 300 * time.Millisecond, Settle: 2 * time.Second, Moves: 128,
}

const limit = 2800 * time.Millisecond // silence

// world is a cluster whose leader is n1, with a state machine that does what it says.
type world struct {
	t       *testing.T
	machine *state.Machine
	s       *Steward
	facts   Facts
	now     time.Time
	pending []Announcement
	quiet   map[string]bool // nodes that do not answer
	said    []string        // commands since the last said
}

var begin = time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)

func newWorld(t *testing.T, partitions, copies, nodes int) *world {
	w := &world{t: t, machine: state.New(), s: New(options), now: begin, quiet: map[string]bool{}}
	w.apply(state.Command{Format: &state.Format{ID: "c", Partitions: partitions, ObjectSizeShift: 22, Copies: copies}})
	w.s.Lead(w.now)
	for i := range nodes {
		w.start(fmt.Sprint("n", i+1))
	}
	w.pass(10 * time.Second)
	w.said = nil
	return w
}

func (w *world) apply(c state.Command) state.Result {
	res, err := state.DecodeResult(w.machine.Apply(c.Encode()))
	if err != nil {
		w.t.Errorf("refused: %s: %v", c.Encode(), err)
	}
	return res
}

func (w *world) view() *state.View { return w.machine.View() }

func (w *world) start(name string) {
	w.pending = append(w.pending, Announcement{state.Announce{Name: name, Zone: name, At: w.now, Disks: []state.Disk{{ID: "d" + name, Weight: 100}}}, w.now})
}

// pass lets time pass, in steps of 100 ms.
func (w *world) pass(d time.Duration) {
	for end := w.now.Add(d); ; w.now = w.now.Add(100 * time.Millisecond) {
		for _, n := range w.view().Nodes {
			if !w.quiet[n.Name] {
				w.facts.Heard(n.Name, n.Incarnation, w.now.Add(-10*time.Millisecond), Saying{}, true)
			}
		}
		w.step()
		if !w.now.Before(end) {
			return
		}
	}
}

func (w *world) step() {
	for range 20 {
		d := w.s.Step(w.now, w.view(), w.facts.Of(w.now, w.view()), w.pending)
		if len(d.Commands) == 0 {
			return
		}
		for _, c := range d.Commands {
			w.said = append(w.said, w.describe(&c))
			res := w.apply(c)
			if c.AnnounceAll != nil {
				w.pending = nil
				for _, l := range res.Nodes { // it asks at once
					if name := w.view().Node(l.Node).Name; !w.quiet[name] {
						w.facts.Heard(name, l.Incarnation, w.now, Saying{}, true)
					}
				}
			}
		}
	}
	w.t.Fatalf("it never comes to rest: %v", w.said)
}

func (w *world) describe(c *state.Command) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d:", w.now.Sub(begin).Milliseconds())
	switch {
	case c.AnnounceAll != nil:
		for _, a := range c.AnnounceAll.Nodes {
			fmt.Fprintf(&b, " announce %s", a.Name)
		}
		for _, l := range c.AnnounceAll.Live {
			fmt.Fprintf(&b, " live %d", l.Node)
		}
	case c.SetNodes != nil:
		for _, n := range c.SetNodes.Nodes {
			fmt.Fprintf(&b, " %d %s", n.Node, n.State)
		}
	case c.SetTargets != nil:
		fmt.Fprintf(&b, " place %d", c.SetTargets.Policy)
	default:
		b.Write(c.Encode())
	}
	return b.String()
}

// expect compares what was said, with times from the moment at which it is called.
func (w *world) expect(want ...string) {
	w.t.Helper()
	if !slices.Equal(w.said, want) {
		w.t.Errorf("said\n  %s\nwant\n  %s", strings.Join(w.said, "\n  "), strings.Join(want, "\n  "))
	}
	w.said = nil
}

// sync makes all learners members.
func (w *world) sync() {
	for again := true; again; {
		again = false
		for _, p := range w.view().Policies {
			for i, q := range p.Partitions {
				if len(q.Learners) > 0 && w.view().Node(q.Primary()).State == state.NodeUp {
					w.apply(state.Command{ChangeISR: &state.ChangeISR{Policy: p.ID, Partition: object.Partition(i), Epoch: q.Epoch, Add: q.Learners[0]}})
					again = true
					break
				}
			}
		}
	}
}

func (w *world) targets(id state.NodeID) (count int) {
	for _, p := range w.view().Policies {
		for _, q := range p.Partitions {
			if slices.Contains(q.Targets, id) {
				count++
			}
		}
	}
	return count
}

func TestStart(t *testing.T) {
	w := newWorld(t, 8, 3, 0)
	w.start("n1")
	w.pass(0)
	w.expect("10000: announce n1", "10000: 1 up", "10000: place 1")
	// Three more come, one of them a moment later: nobody waits for those that nobody knows.
	w.start("n2")
	w.start("n3")
	w.pass(200 * time.Millisecond)
	w.start("n4")
	w.pass(4 * time.Second)
	w.expect("10500: announce n2 announce n3 announce n4 live 1", "10500: 2 up 3 up 4 up", "12500: place 1")
	for id := range state.NodeID(4) {
		if n := w.targets(id + 1); n != 6 {
			t.Errorf("node %d is to hold %d partitions of 8 in 3 copies", id+1, n)
		}
	}
}

func TestDown(t *testing.T) {
	w := newWorld(t, 8, 3, 4)
	w.sync()
	w.quiet["n2"] = true
	w.facts.Refused("n2", w.now)
	w.pass(0)
	w.expect("10000: 2 down")
	w.quiet["n3"] = true
	w.apply(state.Command{Leave: &state.Leave{Node: 3, Incarnation: 1, Most: 8}})
	w.apply(state.Command{SetNodes: &state.SetNodes{Nodes: []state.SetNode{{Node: 3, Incarnation: 1, State: state.NodeDown}}}})
	w.pass(0)
	w.expect()
	w.quiet["n4"] = true
	w.pass(limit - 100*time.Millisecond)
	w.expect()
	w.pass(100 * time.Millisecond)
	w.expect("12800: 4 down")
	// It answers again. n2 still refuses, n3 has left.
	w.quiet = map[string]bool{"n2": true}
	w.pass(time.Second)
	w.expect("12800: 4 up")
}

func TestGrant(t *testing.T) {
	w := newWorld(t, 8, 3, 2)
	two := state.Life{Node: 2, Incarnation: 1}
	grant := func(l state.Life, want Verdict) {
		t.Helper()
		if got := w.s.Grant(w.view(), l, w.view().Epoch, true); got != want {
			t.Errorf("lease of %v: %v, want %v", l, got, want)
		}
	}
	grant(two, Granted)
	if got := w.s.Grant(w.view(), two, w.view().Node(2).Turned-1, true); got != Behind {
		t.Errorf("lease of a node that has not followed that it is up: %v", got)
	}
	grant(state.Life{Node: 2, Incarnation: 2}, Down)
	grant(state.Life{Node: 2, Incarnation: 0}, Other)
	grant(state.Life{Node: 3, Incarnation: 1}, Unknown)
	w.now = w.now.Add(5 * time.Second)
	step := func() []state.Command {
		return w.s.Step(w.now, w.view(), w.facts.Of(w.now, w.view()), nil).Commands
	}
	if c := step(); len(c) != 1 || c[0].SetNodes == nil {
		t.Fatalf("said %v", c)
	}
	grant(two, Down) // although the command was lost
	w.facts.Heard("n2", 1, w.now, Saying{}, true)
	c := step()
	if len(c) != 1 || c[0].SetNodes == nil || c[0].SetNodes.Nodes[0].State != state.NodeDown {
		t.Fatalf("said %v", c)
	}
	w.apply(c[0])
	grant(two, Down)
	w.step()
	w.expect("15000: 2 up")
	grant(two, Granted)
	w.s.Follow()
	grant(two, NotLeading)
}

func TestRefusalOfAnEarlierProcess(t *testing.T) {
	w := newWorld(t, 8, 3, 2)
	w.start("n2")
	w.pass(0)
	w.expect("10000: announce n2 live 1", "10000: 2 up")
	w.quiet["n2"] = true
	w.facts.Refused("n2", w.now.Add(100*time.Millisecond)) // by the process that ended
	w.pass(2 * time.Second)
	w.expect()
	w.facts.Refused("n2", w.now)
	w.facts.Connected("n2")
	w.pass(0)
	w.expect()
	w.facts.Refused("n2", w.now)
	w.pass(0)
	w.expect("12000: 2 down")
}

func TestNewLeaderWaits(t *testing.T) {
	w := newWorld(t, 8, 3, 4)
	w.facts.Forget()
	w.s.Follow()
	w.quiet = map[string]bool{"n2": true, "n3": true, "n4": true}
	w.pass(time.Minute)
	w.expect()
	w.s.Lead(w.now)
	w.facts.Refused("n3", w.now)
	w.pass(limit)
	w.expect("70000: 3 down")
	w.facts.Heard("n4", 1, w.now.Add(-time.Second), Saying{}, true)
	w.pass(100 * time.Millisecond)
	w.expect("72900: 2 down")
	w.pass(10 * time.Second)
	w.expect("74700: 4 down")
}

// A cut leaves the leader's side with a majority of the votes and a minority of members.
func TestManyDown(t *testing.T) {
	w := newWorld(t, 8, 3, 6)
	w.sync()
	for i, name := range []string{"n5", "n2", "n6"} {
		w.pass(time.Duration(i) * 100 * time.Millisecond)
		w.quiet[name] = true
	}
	w.facts.Refused("n4", w.now)
	w.quiet["n4"] = true
	w.pass(0)
	w.expect("10300: 4 down")
	w.pass(limit - 400*time.Millisecond)
	w.now = w.now.Add(time.Second) // the leader was busy
	w.facts.Refused("n3", w.now)
	w.step()
	w.expect("13700: 3 down 5 down 2 down 6 down")
	for i, q := range w.view().Policies[0].Partitions {
		if len(q.ISR) == 1 && q.ISR[0] == 3 || len(q.ISR) > 1 && !slices.Contains(q.ISR, 1) {
			t.Errorf("partition %d: %v stays of %v", i, q.ISR, q.Targets)
		}
	}
}

// Those that are known to be dead go first, so that the last member is one that may live.
func TestLastMember(t *testing.T) {
	w := newWorld(t, 1, 2, 3)
	w.quiet = map[string]bool{"n2": true, "n3": true}
	w.apply(state.Command{SetTargets: &state.SetTargets{Policy: 1, Since: w.view().Epoch, Targets: [][]state.NodeID{{2, 3}}}})
	w.sync()
	w.now = w.now.Add(5 * time.Second)
	w.facts.Heard("n3", 1, w.now.Add(-4*time.Second), Saying{}, true)
	w.facts.Heard("n2", 1, w.now.Add(-3*time.Second), Saying{}, true)
	w.facts.Refused("n2", w.now)
	w.step()
	w.expect("15000: 2 down 3 down")
	if isr := w.view().Policies[0].Partitions[0].ISR; !slices.Equal(isr, []state.NodeID{3}) {
		t.Errorf("in sync: %v", isr)
	}
}

func TestRestartOfOne(t *testing.T) {
	w := newWorld(t, 8, 3, 3)
	w.sync()
	w.start("n3")
	w.pass(0)
	w.expect("10000: announce n3 live 1 live 2", "10000: 3 up")
	for i, q := range w.view().Policies[0].Partitions {
		if q.Undecided() || len(q.ISR) != 2 || !slices.Equal(q.Learners, []state.NodeID{3}) {
			t.Errorf("partition %d: %+v", i, q)
		}
	}
}

// powerCut begins a new reign in which nobody was heard.
func (w *world) powerCut() {
	w.facts, w.s = Facts{}, New(options)
	w.quiet = map[string]bool{"n1": true, "n2": true, "n3": true, "n4": true}
	w.now = w.now.Add(time.Minute)
	w.s.Lead(w.now)
}

func TestPowerCut(t *testing.T) {
	w := newWorld(t, 8, 3, 3)
	w.sync()
	w.powerCut()
	w.start("n1")
	w.pass(100 * time.Millisecond)
	w.start("n2")
	w.pass(200 * time.Millisecond)
	w.start("n3")
	w.quiet = map[string]bool{}
	w.pass(5 * time.Second)
	w.expect("70600: announce n1 announce n2 announce n3", "70600: 1 up 2 up 3 up")
	for i, q := range w.view().Policies[0].Partitions {
		if q.Undecided() || len(q.ISR) != 1 || q.ISR[0] != q.Targets[0] && len(q.Learners) != 2 || q.Restarted == 0 {
			t.Errorf("partition %d: %+v", i, q)
		}
	}
}

func TestPowerCutAndOneDoesNotComeBack(t *testing.T) {
	for _, alive := range []bool{false, true} {
		w := newWorld(t, 8, 3, 3)
		w.sync()
		w.powerCut()
		w.start("n1")
		w.start("n2")
		delete(w.quiet, "n1")
		delete(w.quiet, "n2")
		w.pass(time.Second)
		w.expect("70300: announce n1 announce n2", "70300: 1 up 2 up")
		for i, q := range w.view().Policies[0].Partitions {
			if !q.Undecided() {
				t.Errorf("partition %d: %+v", i, q)
			}
		}
		if alive { // it was only cut off
			w.quiet = nil
		}
		w.pass(5 * time.Second)
		for i, q := range w.view().Policies[0].Partitions {
			if q.Undecided() || len(q.ISR) != 1 || len(q.Learners) == 0 || (q.ISR[0] == 3) != alive || (q.Restarted == 0) != alive {
				t.Errorf("alive %v, partition %d: %+v", alive, i, q)
			}
		}
		if alive {
			w.expect(`71000:{"confirm":{"live":[{"node":3,"incarnation":1}]}}`)
		} else {
			w.expect("72900: 3 down")
		}
	}
}

func TestOut(t *testing.T) {
	w := newWorld(t, 16, 2, 4)
	w.sync()
	before := w.targets(4)
	w.quiet["n4"] = true
	w.pass(5 * time.Minute)
	if w.targets(4) != before {
		t.Error("a node that is down for a moment loses its place")
	}
	w.said = nil
	w.pass(5*time.Minute + 10*time.Second)
	w.expect(`612800:{"set_out":{"nodes":[{"node":4,"incarnation":1}]}}`, "612800: place 1")
	if w.targets(4) != 0 {
		t.Error("it is out and keeps its place")
	}
	w.sync()
	w.start("n4")
	w.quiet = nil
	w.pass(10 * time.Second)
	if w.targets(4) == 0 {
		t.Error("it is back and gets nothing")
	}
}

func TestOutIsWatchedByOneLeader(t *testing.T) {
	w := newWorld(t, 16, 2, 4)
	w.apply(state.Command{SetOutAfter: &state.SetOutAfter{Seconds: 30}})
	w.quiet["n4"] = true
	w.pass(20 * time.Second)
	w.s.Lead(w.now)
	w.said = nil
	w.pass(29 * time.Second)
	w.expect()
	w.pass(2 * time.Second)
	if len(w.said) != 2 {
		t.Errorf("said %v", w.said)
	}
	// With half of the cluster down nobody is out any more.
	w.quiet = map[string]bool{"n2": true, "n3": true, "n4": true}
	w.pass(5 * time.Minute)
	if w.targets(2) == 0 || w.targets(3) == 0 {
		t.Error("everything is brought to the only node that is left")
	}
	w.apply(state.Command{SetOutAfter: &state.SetOutAfter{Seconds: -1}})
	w.quiet = map[string]bool{"n2": true}
	w.pass(time.Hour)
	if w.targets(2) == 0 {
		t.Error("a node is out, although that was switched off")
	}
}

// For how long a node has been down is measured by the leader's clock that only goes on: what others have written, whose clocks
// differ, or what its own has been set to since, brings no data elsewhere after a moment, nor keeps it from that.
func TestOutDoesNotDependOnTimeOfDay(t *testing.T) {
	for _, wrong := range []time.Duration{-50 * time.Minute, 50 * time.Minute} {
		w := newWorld(t, 16, 2, 4)
		w.pass(time.Hour)
		w.quiet["n4"] = true
		w.pass(limit - 200*time.Millisecond) // this leader would declare it down with the next step
		n4 := w.view().NodeByName("n4")
		w.apply(state.Command{SetNode: &state.SetNode{Node: n4.ID, Incarnation: n4.Incarnation, State: state.NodeDown, At: w.now.Add(wrong)}})
		w.pass(state.DefaultOutAfter - time.Second)
		if w.view().NodeByName("n4").Out {
			t.Errorf("clocks differ by %v: it is out too soon", wrong)
		}
		w.pass(3 * time.Second)
		if !w.view().NodeByName("n4").Out {
			t.Errorf("clocks differ by %v: it is not out in time", wrong)
		}
	}
}

func TestDrainAndWeights(t *testing.T) {
	w := newWorld(t, 64, 2, 4)
	w.sync()
	w.apply(state.Command{Drain: &state.Drain{Node: 2, Drain: true}})
	w.pass(0)
	w.expect("10000: place 1")
	if w.targets(2) != 0 {
		t.Error("a drained node is a target")
	}
	for i, q := range w.view().Policies[0].Partitions {
		if len(q.ISR) < 2 {
			t.Errorf("partition %d lost a member before another one was in sync: %+v", i, q)
		}
	}
	w.sync()
	w.apply(state.Command{Drain: &state.Drain{Node: 2}})
	w.apply(state.Command{Reweight: &state.Reweight{Node: 2, Percent: 50}})
	w.pass(3 * time.Second)
	w.expect("12000: place 1")
	if a, b := w.targets(1), w.targets(2); b < a/3 || b > a*2/3 {
		t.Errorf("half the weight has %d targets, all of it %d", b, a)
	}
	w.sync()
	w.apply(state.Command{SetDisks: &state.SetDisks{Node: 3, Incarnation: 1, Disks: nil}})
	w.pass(0)
	if w.targets(3) != 0 {
		t.Error("a node without disks is a target")
	}
	// Fewer nodes than copies.
	w.apply(state.Command{Drain: &state.Drain{Node: 2, Drain: true}})
	w.apply(state.Command{Drain: &state.Drain{Node: 4, Drain: true}})
	w.pass(0)
	for i, q := range w.view().Policies[0].Partitions {
		if !slices.Equal(q.Targets, []state.NodeID{1}) {
			t.Errorf("partition %d: %+v", i, q)
		}
	}
}

func TestEveryPolicyIsPlaced(t *testing.T) {
	w := newWorld(t, 8, 2, 3)
	w.apply(state.Command{AddPolicy: &state.AddPolicy{Copies: 3}})
	w.apply(state.Command{AddPolicy: &state.AddPolicy{Copies: 1}})
	w.pass(0)
	w.expect("10000: place 2", "10000: place 3")
	// Changes of partitions do not make anybody compute again.
	w.quiet["n3"] = true
	w.pass(5 * time.Second)
	w.quiet = nil
	w.pass(5 * time.Second)
	w.sync()
	w.pass(5 * time.Second)
	w.expect("12800: 3 down", "15000: 3 up")
}

// TestInvariants lets nodes come, go and hang at random.
func TestInvariants(t *testing.T) {
	for seed := range uint64(40) {
		rnd := rand.New(rand.NewPCG(seed, 2))
		w := newWorld(t, 4, 1+rnd.IntN(3), 2+rnd.IntN(5))
		dead := map[string]bool{}
		for range 150 {
			n := w.view().Nodes[rnd.IntN(len(w.view().Nodes))]
			switch rnd.IntN(8) {
			case 0:
				w.start(n.Name)
				delete(dead, n.Name)
				delete(w.quiet, n.Name)
			case 1:
				w.quiet[n.Name] = true
			case 2:
				if !dead[n.Name] {
					delete(w.quiet, n.Name)
				}
			case 3:
				if n.Name != "n1" {
					dead[n.Name], w.quiet[n.Name] = true, true
					w.facts.Refused(n.Name, w.now)
				}
			case 4:
				w.s.Lead(w.now)
			case 5:
				w.apply(state.Command{Drain: &state.Drain{Node: n.ID, Drain: rnd.IntN(2) == 0}})
			case 6:
				w.sync()
			case 7:
				w.start(fmt.Sprint("n", 1+rnd.IntN(8)))
			}
			w.check(func() { w.pass(time.Duration(rnd.IntN(3000)) * time.Millisecond) })
		}
		// In the end all that can be well is.
		for _, n := range w.view().Nodes {
			w.start(n.Name)
			w.apply(state.Command{Drain: &state.Drain{Node: n.ID}})
		}
		w.quiet = map[string]bool{}
		w.pass(20 * time.Second)
		w.sync()
		w.said = nil
		w.pass(20 * time.Second)
		w.expect()
		for _, p := range w.view().Policies {
			for i, q := range p.Partitions {
				if !slices.Equal(q.ISR, q.Targets) || q.Undecided() || len(q.ISR) != min(p.Copies, len(w.view().Nodes)) {
					t.Fatalf("seed %d: partition %d: %+v", seed, i, q)
				}
			}
		}
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}

// check watches which nodes are declared down.
func (w *world) check(do func()) {
	before := w.view()
	do()
	for _, n := range w.view().Nodes {
		old := before.Node(n.ID)
		if old == nil || old.State == state.NodeDown || n.State == state.NodeUp || n.Incarnation != old.Incarnation {
			continue
		}
		f := w.facts.Of(w.now, w.view())[n.ID]
		switch {
		case n.Name == "n1":
			w.t.Error("the leader says that it is down itself")
		case !f.Gone && n.Since.Sub(f.Heard) <= limit-100*time.Millisecond:
			w.t.Errorf("%s was down at %v, and heard at %v", n.Name, n.Since, f.Heard)
		}
	}
}
