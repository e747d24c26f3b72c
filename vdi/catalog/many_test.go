package catalog

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"sheepdog/storage/object"
)

// many is a catalog with a VDI that has had n snapshots, which are deleted. With gone the VDI is, too.
func many(t testing.TB, n int, gone bool) (m *Machine, dead []Ref) {
	t.Helper()
	m = New()
	node := Node{Name: "a"}
	do := func(c Command) *VDI {
		res, err := DecodeResult(m.Apply(c.Encode()))
		if err != nil {
			t.Fatal(err)
		}
		return res.VDI
	}
	v := do(Command{Create: &Create{Name: "v", SizeShift: object.DefaultSizeShift, Policy: 1}})
	for range n {
		v = do(Command{Acquire: &Acquire{Ref: v.Ref, By: node, Since: v.Generation}})
		x := do(Command{Reserve: &Reserve{Source: v.Ref, Name: "v", By: node}})
		before := v.Ref
		v = do(Command{Snapshot: &Snapshot{Source: v.Ref, Reserved: x.Ref, By: node}})
		do(Command{Delete: &Delete{Ref: before}})
		dead = append(dead, before)
	}
	if gone {
		do(Command{Delete: &Delete{Ref: v.Ref}})
		dead = append(dead, v.Ref)
	}
	return m, dead
}

// orders are those in which vids may be freed.
var orders = []struct {
	name string
	sort func([]Ref)
}{
	{"ascending", func([]Ref) {}},
	{"descending", slices.Reverse[[]Ref]},
	{"at random", func(l []Ref) {
		rand.New(rand.NewPCG(1, 1)).Shuffle(len(l), func(i, k int) { l[i], l[k] = l[k], l[i] })
	}},
}

// While a command is applied no client is served, so none may take long: not one about thousands of snapshots, in whatever order, nor
// by what others were freed before. Each takes much less than a second, if what it does grows with their number alone.
func TestManyFreed(t *testing.T) {
	const n, limit = 5000, time.Second
	for _, gone := range []bool{false, true} {
		for _, o := range orders {
			t.Run(fmt.Sprintf("%s, VDI gone %v", o.name, gone), func(t *testing.T) {
				m, dead := many(t, n, gone)
				defer verifyIndexes(t, &m.state)
				o.sort(dead)
				for _, c := range []struct {
					name string
					Command
				}{
					{"map gone", Command{MapGone: &MapGone{Refs: dead}}},
					{"collected", Command{Collected: &Collected{Refs: dead, Keep: KeepVIDs}}},
				} {
					began := time.Now()
					if _, err := DecodeResult(m.Apply(c.Encode())); err != nil {
						t.Fatal(err)
					}
					took := time.Since(began)
					t.Logf("%s: %v", c.name, took)
					if took > limit {
						t.Errorf("%s: %d snapshots take %v", c.name, n, took)
					}
				}
			})
		}
	}
}

// verifyIndexes fails unless what is kept to find things quickly is what looking at everything finds.
func verifyIndexes(t testing.TB, s *state) {
	t.Helper()
	followed := func(v object.VID) bool {
		for w := range s.around(s.nextVID(v), s.nextVID) {
			if s.vdis[w] != nil || s.freed[w] == nil {
				return s.vdis[w] != nil
			}
		}
		return false
	}
	bits := map[object.VID]uint64{}
	for v := range s.freed {
		bits[v/64] |= 1 << (v % 64)
		if want := followed(v); s.followed(v) != want {
			t.Errorf("%s is followed by a VDI: %v, want %v", v, !want, want)
		}
	}
	isolated, moves := map[string]int{}, map[uint64]int{}
	for _, f := range s.quarantine {
		isolated[f.name()]++
	}
	live := 0
	for _, v := range s.vdis {
		if v.Move {
			moves[v.Family]++
		}
		if v.State == Live && v.Snapshot {
			live++
		}
	}
	for _, n := range s.names {
		for i, v := range n.snapshots {
			if live--; s.vdis[v.VID] != v || i > 0 && n.snapshots[i-1].SnapshotID > v.SnapshotID {
				t.Errorf("snapshot %d of %q is %+v", i, v.Name, v)
			}
		}
	}
	if !maps.Equal(bits, s.freedBits) || !maps.Equal(isolated, s.isolated) || !maps.Equal(moves, s.moves) || live != 0 {
		t.Errorf("freed %v, want %v; in quarantine %v, want %v; moves %v, want %v; %d snapshots are not found by name", s.freedBits, bits, s.isolated, isolated, s.moves, moves, live)
	}
}

// The whole of a family with many snapshots is moved, and a state that has them is restored, as quickly.
func TestManyMoved(t *testing.T) {
	const n, limit = 5000, time.Second
	m := New()
	node := Node{Name: "a"}
	for i := range object.VID(n) {
		v := &VDI{Ref: Ref{VID: i + 1, Serial: m.state.next()}, State: Live, Snapshot: i > 0, Family: 1, Name: "v", SnapshotID: uint32(i), SizeShift: object.DefaultSizeShift, Policy: 1}
		if i == 0 {
			v.Owner = &node
		}
		m.state.put(v)
	}
	x, err := m.state.move(&Move{Name: "v", Source: m.state.vdis[1].Ref, Policy: 2, By: node})
	if err != nil {
		t.Fatal(err)
	}
	c := Moved{Ref: x.Ref, By: node, From: 1}
	for _, v := range m.state.family(1) {
		if !v.Move {
			c.Members = append(c.Members, Member{v.Ref, v.Generation})
		}
	}
	began := time.Now()
	moved := Command{Moved: &c}
	if _, err := DecodeResult(m.Apply(moved.Encode())); err != nil {
		t.Fatal(err)
	}
	took := time.Since(began)
	b, err := m.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	began = time.Now()
	if err := New().Restore(b); err != nil {
		t.Fatal(err)
	}
	t.Logf("moved: %v; restored: %v", took, time.Since(began))
	if took > limit || time.Since(began) > limit {
		t.Errorf("a family of %d is moved in %v and restored in %v", n, took, time.Since(began))
	}
}
