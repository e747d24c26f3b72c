package state

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"

	"sheepdog/storage/object"
)

// The files in testdata are stories: each directive is a command in JSON, below it what
// the machine answers and, in short, what the cluster is like then.
func TestStories(t *testing.T) {
	datadriven.Walk(t, "testdata", func(t *testing.T, path string) {
		m := New()
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			switch d.Cmd {
			case "apply":
				res, err := DecodeResult(m.Apply([]byte(d.Input)))
				if err != nil {
					return fmt.Sprintf("refused: %v\n", err)
				}
				return answer(res) + picture(m.View())
			case "restart": // from a snapshot
				b, err := m.Snapshot()
				if err != nil {
					t.Fatal(err)
				}
				m = New()
				if err := m.Restore(b); err != nil {
					t.Fatal(err)
				}
				return picture(m.View())
			}
			t.Fatalf("no directive is called %s", d.Cmd)
			return ""
		})
	})
}

func answer(r Result) string {
	s := fmt.Sprintf("epoch %d", r.Epoch)
	if r.Node != 0 {
		s += fmt.Sprintf(", node %d incarnation %d", r.Node, r.Incarnation)
	}
	for _, l := range r.Nodes {
		s += fmt.Sprintf(", node %d incarnation %d", l.Node, l.Incarnation)
	}
	if r.Policy != 0 {
		s += fmt.Sprintf(", policy %d", r.Policy)
	}
	if r.Partitions != 0 {
		s += fmt.Sprintf(", %d partitions", r.Partitions)
	}
	return s + "\n"
}

// picture shows nodes, policies, and partitions as "epoch: in sync / targets + learners after former primaries".
func picture(v *View) string {
	var b strings.Builder
	for _, n := range v.Nodes {
		fmt.Fprintf(&b, "node %d %s %s incarnation %d weight %d", n.ID, n.Name, n.State, n.Incarnation, n.Weight())
		if n.Share() != float64(n.Weight()) {
			fmt.Fprintf(&b, " share %g", n.Share())
		}
		if n.Leaving {
			b.WriteString(" leaving")
		}
		if n.Drain {
			b.WriteString(" draining")
		}
		if n.Out {
			b.WriteString(" out")
		}
		if n.Log > 0 {
			fmt.Fprintf(&b, " log %d", n.Log)
		}
		if n.Older {
			b.WriteString(" older")
		}
		b.WriteByte('\n')
	}
	if len(v.Gone) > 0 {
		fmt.Fprintf(&b, "gone %v\n", v.Gone)
	}
	if v.Cluster.Hold {
		b.WriteString("on hold\n")
	}
	for _, p := range v.Policies {
		fmt.Fprintf(&b, "policy %d: %d copies, %d in sync needed\n", p.ID, p.Copies, p.MinInSync)
		for i, q := range p.Partitions {
			fmt.Fprintf(&b, "  %d: epoch %d: %v / %v", i, q.Epoch, q.ISR, q.Targets)
			if len(q.Learners) > 0 {
				fmt.Fprintf(&b, " + %v", q.Learners)
			}
			if len(q.Former) > 0 {
				fmt.Fprintf(&b, " after %v", q.Former)
			}
			if len(q.Waiting) > 0 {
				fmt.Fprintf(&b, " waiting %v", q.Waiting)
			}
			if q.Absent {
				b.WriteString(" absent")
			}
			if q.Lost > 0 {
				fmt.Fprintf(&b, " lost at %d", q.Lost)
			}
			if q.Restarted > 0 {
				fmt.Fprintf(&b, " restarted at %d", q.Restarted)
			}
			b.WriteByte('\n')
		}
	}
	return b.String()
}

// TestInvariants applies random commands and checks after each what must always hold.
func TestInvariants(t *testing.T) {
	for seed := range uint64(20) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		a, b := New(), New()
		step := 0
		for range 400 {
			step++
			before := a.View()
			frozen, err := json.Marshal(before)
			if err != nil {
				t.Fatal(err)
			}
			c := randomCommand(rnd, before)
			cmd := c.Encode()
			r1, r2 := a.Apply(cmd), b.Apply(cmd)
			if !bytes.Equal(r1, r2) {
				t.Fatalf("seed %d step %d: two machines answer %s and %s", seed, step, r1, r2)
			}
			if after, _ := json.Marshal(before); !bytes.Equal(frozen, after) {
				t.Fatalf("seed %d step %d: %s changed an old view", seed, step, cmd)
			}
			if err := verify(before, a.View()); err != nil {
				t.Fatalf("seed %d step %d: %s: %v", seed, step, cmd, err)
			}
			if step%50 == 0 { // the second machine goes on from a snapshot
				s, err := a.Snapshot()
				if err != nil {
					t.Fatal(err)
				}
				b = New()
				if err := b.Restore(s); err != nil {
					t.Fatal(err)
				}
			}
		}
		x, _ := a.Snapshot()
		y, _ := b.Snapshot()
		if !bytes.Equal(x, y) {
			t.Fatalf("seed %d: machines differ in the end", seed)
		}
	}
}

func verify(before, after *View) error {
	if after.Epoch < before.Epoch {
		return errors.New("the epoch fell")
	}
	for _, p := range after.Policies {
		old := before.Policy(p.ID)
		if old != nil && p.MinInSync < old.MinInSync {
			return errors.New("min_in_sync fell")
		}
		for i := range p.Partitions {
			q := &p.Partitions[i]
			if len(q.ISR) == 0 {
				return fmt.Errorf("INV-R3: partition %d has no member", i)
			}
			for _, l := range q.Learners {
				if slices.Contains(q.ISR, l) || !slices.Contains(q.Targets, l) || after.Node(l).State != NodeUp {
					return fmt.Errorf("partition %d: learner %d of %v, targets %v", i, l, q.ISR, q.Targets)
				}
			}
			for _, id := range q.Former {
				if id == q.Primary() || after.Node(id).State != NodeUp {
					return fmt.Errorf("partition %d: former primary %d of %v", i, id, q.ISR)
				}
			}
			for _, id := range q.ISR {
				if after.Node(id).State != NodeUp && len(q.ISR) > 1 {
					return fmt.Errorf("partition %d: member %d is down and not the last", i, id)
				}
			}
			for _, id := range q.Waiting {
				if slices.Contains(q.ISR, id) || slices.Contains(q.Learners, id) {
					return fmt.Errorf("partition %d: node %d waits, in sync %v, learners %v", i, id, q.ISR, q.Learners)
				}
				if after.up(id) && !after.up(q.Primary()) {
					return fmt.Errorf("partition %d: node %d waits for nobody", i, id)
				}
			}
			if old == nil || len(old.Partitions) == 0 {
				continue
			}
			was := &old.Partitions[i]
			for _, l := range q.Learners {
				if after.Node(l).Leaving && !slices.Contains(was.Learners, l) {
					return fmt.Errorf("partition %d: node %d is leaving and begins to learn", i, l)
				}
			}
			if id := was.Primary(); id != q.Primary() && after.up(id) && !slices.Contains(q.Former, id) {
				return fmt.Errorf("partition %d: nobody waits for the former primary %d", i, id)
			}
			if q.Epoch < was.Epoch {
				return fmt.Errorf("partition %d: its epoch fell", i)
			}
			if q.Epoch == was.Epoch && !reflect.DeepEqual(q, was) {
				return fmt.Errorf("partition %d changed without a new epoch", i)
			}
			for _, id := range q.ISR {
				if !slices.Contains(was.ISR, id) && !slices.Contains(was.Learners, id) && !slices.Contains(was.Waiting, id) && q.Lost <= was.Lost {
					return fmt.Errorf("partition %d: %d came in sync without learning", i, id)
				}
				if slices.Contains(was.Waiting, id) && q.Restarted <= was.Restarted {
					return fmt.Errorf("partition %d: %d took over, and flushes do not know", i, id)
				}
			}
			if err := verifyLast(before, after, was, q); err != nil {
				return fmt.Errorf("partition %d: %w", i, err)
			}
		}
	}
	return nil
}

// verifyLast checks what happens when nobody has what was not flushed.
func verifyLast(before, after *View, was, q *Partition) error {
	same := func(id NodeID) bool {
		a, b := before.Node(id), after.Node(id)
		return a != nil && b != nil && a.Incarnation == b.Incarnation
	}
	if q.Restarted == was.Restarted && !q.Absent && !slices.ContainsFunc(q.ISR, same) {
		return fmt.Errorf("all of %v have started anew, and flushes do not know", q.ISR)
	}
	for _, id := range was.Waiting { // nothing that was flushed is lost
		if n := after.Node(id); n != nil && !same(id) && before.Node(id).Lacks(n.Disks) {
			continue // but with a disk
		}
		if len(q.Waiting) > 0 && !slices.Contains(q.Waiting, id) && !slices.Contains(q.ISR, id) && after.Node(id) != nil {
			return fmt.Errorf("node %d does not wait any more", id)
		}
	}
	return nil
}

func randomCommand(rnd *rand.Rand, v *View) Command {
	if !v.Formatted() {
		return Command{Format: &Format{ID: "c", Partitions: 4, ObjectSizeShift: 22, Copies: 3}}
	}
	at := time.Unix(int64(v.Epoch), 0).UTC()
	node := func() *Node {
		if len(v.Nodes) == 0 {
			return &Node{ID: 1}
		}
		return v.Nodes[rnd.IntN(len(v.Nodes))]
	}
	policy := v.Policies[rnd.IntN(len(v.Policies))]
	var lives []Life
	for _, n := range v.Nodes {
		if rnd.IntN(2) == 0 {
			lives = append(lives, Life{n.ID, n.Incarnation - uint64(rnd.IntN(8)/7)})
		}
	}
	rnd.Shuffle(len(lives), func(i, k int) { lives[i], lives[k] = lives[k], lives[i] })
	switch rnd.IntN(16) {
	case 8, 9:
		c := &AnnounceAll{}
		for _, k := range rnd.Perm(5)[:1+rnd.IntN(4)] {
			a := Announce{Name: fmt.Sprint("n", k), At: at, Disks: []Disk{{ID: []string{"d", "d", "d", "e"}[rnd.IntN(4)], Weight: 1}}, Partial: rnd.IntN(6) == 0}
			if rnd.IntN(2) == 0 { // as how much of the log they have, epochs will do
				a.Log = max(1, uint64(v.Epoch)-uint64(rnd.IntN(4)/3*rnd.IntN(20)))
			}
			for i := range 4 {
				if a.Partial && rnd.IntN(2) == 0 {
					a.Held = append(a.Held, object.Group{Policy: policy.ID, Partition: object.Partition(i)})
				}
			}
			c.Nodes = append(c.Nodes, a)
		}
		if rnd.IntN(2) == 0 {
			c.Live = lives
		}
		return Command{AnnounceAll: c}
	case 10, 11, 12:
		c := &SetNodes{Enroll: rnd.IntN(4)}
		for _, l := range lives {
			c.Nodes = append(c.Nodes, SetNode{l.Node, l.Incarnation, []NodeState{NodeUp, NodeUp, NodeDown}[rnd.IntN(3)], at, uint64(v.Epoch) * uint64(rnd.IntN(2))})
		}
		return Command{SetNodes: c}
	case 13:
		return Command{Confirm: &Confirm{Live: lives}}
	case 14:
		switch rnd.IntN(9) {
		case 7, 8:
			c := &Witness{}
			for _, l := range lives {
				c.Nodes = append(c.Nodes, Witnessed{l, uint64(v.Epoch)})
			}
			return Command{Witness: c}
		case 5, 6:
			return Command{Enroll: &Enroll{Most: 1 + rnd.IntN(3)}}
		case 4:
			n := node()
			return Command{Leave: &Leave{Node: n.ID, Incarnation: n.Incarnation, Most: 1 + rnd.IntN(3)}}
		case 3:
			return Command{Welcome: &Welcome{Name: fmt.Sprint("n", rnd.IntN(5))}}
		case 0:
			return Command{SetOut: &SetOut{Nodes: lives}}
		case 1:
			return Command{Drain: &Drain{node().ID, rnd.IntN(2) == 0}}
		}
		return Command{Reweight: &Reweight{node().ID, 1 + rnd.IntN(200)}}
	case 15:
		n := node()
		if rnd.IntN(2) == 0 {
			return Command{Force: &Force{Node: n.ID, Name: n.Name, Absent: rnd.IntN(2) == 0}}
		}
		return Command{Remove: &Remove{Node: n.ID, Force: []string{"", n.Name}[rnd.IntN(2)]}}
	case 0:
		name := fmt.Sprint("n", rnd.IntN(5))
		return Command{Announce: &Announce{Name: name, At: at, Disks: []Disk{{ID: "d" + name, Weight: 1}}}}
	case 1, 2, 3:
		n := node()
		return Command{SetNode: &SetNode{Node: n.ID, Incarnation: n.Incarnation - uint64(rnd.IntN(8)/7), State: []NodeState{NodeUp, NodeUp, NodeDown}[rnd.IntN(3)], At: at}}
	case 4:
		return Command{AddPolicy: &AddPolicy{Copies: rnd.IntN(4)}}
	case 5:
		if len(v.Nodes) == 0 {
			return Command{AddPolicy: &AddPolicy{Copies: 2}}
		}
		c := &SetTargets{Policy: policy.ID, Since: v.Epoch, Targets: make([][]NodeID, 4)}
		for i := range c.Targets {
			for _, k := range rnd.Perm(len(v.Nodes)) {
				if len(c.Targets[i]) < policy.Copies {
					c.Targets[i] = append(c.Targets[i], v.Nodes[k].ID)
				}
			}
		}
		return Command{SetTargets: c}
	}
	if rnd.IntN(2) == 0 {
		return Command{ChangeISR: randomChange(rnd, policy)}
	}
	c := &ChangeISRs{}
	for range rnd.IntN(5) {
		c.Changes = append(c.Changes, *randomChange(rnd, v.Policies[rnd.IntN(len(v.Policies))]))
	}
	return Command{ChangeISRs: c}
}

func randomChange(rnd *rand.Rand, policy *Policy) *ChangeISR {
	c := &ChangeISR{Policy: policy.ID, Partition: object.Partition(rnd.IntN(4))}
	if len(policy.Partitions) > 0 {
		p := policy.Partitions[c.Partition]
		c.Epoch = p.Epoch
		if rnd.IntN(8) == 0 {
			c.Renew = true
		} else if len(p.Learners) > 0 && rnd.IntN(3) > 0 {
			c.Add = p.Learners[rnd.IntN(len(p.Learners))]
		} else {
			c.Remove = p.ISR[rnd.IntN(len(p.ISR))]
		}
	}
	return c
}

// What many changes in one command come to is what they come to one by one, but for epochs.
func TestManyChangesAtOnce(t *testing.T) {
	for seed := range uint64(200) {
		rnd := rand.New(rand.NewPCG(seed, 2))
		one, many := New(), New()
		for range 150 {
			c := randomCommand(rnd, one.View())
			if c.ChangeISRs == nil {
				one.Apply(c.Encode())
				many.Apply(c.Encode())
			}
		}
		if len(one.View().Policies) == 0 {
			continue
		}
		all := &ChangeISRs{}
		seen := map[[2]int]bool{}
		for range 10 {
			p := one.View().Policies[rnd.IntN(len(one.View().Policies))]
			c := randomChange(rnd, p)
			if key := [2]int{int(c.Policy), int(c.Partition)}; !seen[key] {
				seen[key] = true
				all.Changes = append(all.Changes, *c)
			}
		}
		made := 0
		for _, c := range all.Changes {
			if _, err := DecodeResult(one.Apply((&Command{ChangeISR: &c}).Encode())); err == nil {
				made++
			}
		}
		before := many.View().Epoch
		r, err := DecodeResult(many.Apply((&Command{ChangeISRs: all}).Encode()))
		if r.Partitions != made || (err == nil) != (made > 0) {
			t.Fatalf("seed %d: %d changes were made at once, %d one by one: %v", seed, r.Partitions, made, err)
		}
		if made > 0 && many.View().Epoch != before+1 {
			t.Fatalf("seed %d: %d epochs for one command", seed, many.View().Epoch-before)
		}
		if a, b := timeless(one.View()), timeless(many.View()); !reflect.DeepEqual(a, b) {
			t.Fatalf("seed %d: at once %+v, one by one %+v", seed, b, a)
		}
	}
}

// timeless are the partitions of all policies without their epochs.
func timeless(v *View) (all [][]Partition) {
	for _, p := range v.Policies {
		parts := slices.Clone(p.Partitions)
		for i := range parts {
			parts[i].Epoch = 0
		}
		all = append(all, parts)
	}
	return all
}

func TestRestoreRefusesNonsense(t *testing.T) {
	m := New()
	m.Apply((&Command{Format: &Format{ID: "c", Partitions: 1, ObjectSizeShift: 22, Copies: 1}}).Encode())
	for _, s := range []string{
		"", "{", "{}", `{"format":2,"view":{}}`, `{"format":1}`, `{"format":1,"view":{"nodes":[null]}}`,
		`{"format":1,"view":{"nodes":[{"id":2},{"id":1}]}}`,
		`{"format":1,"view":{"cluster":{"partitions":2},"policies":[{"id":1,"partitions":[{"e":1,"i":[1],"t":[1]}]}]}}`,
		`{"format":1,"view":{"cluster":{"partitions":1},"policies":[{"id":1,"partitions":[{"e":1,"i":[],"t":[1]}]}]}}`,
	} {
		if err := m.Restore([]byte(s)); err == nil {
			t.Errorf("%s was accepted", s)
		}
	}
	if m.View().Cluster.ID != "c" {
		t.Error("a refused snapshot changed the state")
	}
}

func FuzzApply(f *testing.F) {
	f.Add([]byte(`{"format":{"id":"c","partitions":4,"object_size_shift":22,"copies":2}}`))
	f.Add([]byte(`{"announce":{"name":"n","disks":[{"id":"d","weight":1}]}}`))
	f.Add([]byte(`{"set_targets":{"policy":1,"since":1,"targets":[[1],[1],[1],[1]]}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		m := New()
		m.Apply((&Command{Format: &Format{ID: "c", Partitions: 4, ObjectSizeShift: 22, Copies: 2}}).Encode())
		m.Apply((&Command{Announce: &Announce{Name: "n", Disks: []Disk{{ID: "d", Weight: 1}}}}).Encode())
		before := m.View()
		if _, err := DecodeResult(m.Apply(b)); err != nil && m.View() != before {
			t.Error("a refused command changed the state")
		}
		if err := m.View().check(); err != nil {
			t.Error(err)
		}
	})
}
