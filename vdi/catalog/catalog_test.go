package catalog

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/cockroachdb/datadriven"

	"sheepdog/storage/object"
)

// Each line of a test is a command, or one of: list, vids, restore, find NAME [TAG].
// Answers of commands are the changed VDI or the refusal.
func TestGolden(t *testing.T) {
	datadriven.Walk(t, "testdata", func(t *testing.T, path string) {
		m := New()
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			var out strings.Builder
			for _, line := range strings.Split(strings.TrimSpace(d.Input), "\n") {
				if line == "" {
					continue
				}
				fmt.Fprintln(&out, run(t, &m, line))
				verifyIndexes(t, &m.state)
			}
			if d.Cmd == "state" {
				dump(m, &out)
			}
			return out.String()
		})
	})
}

func run(t *testing.T, m **Machine, line string) string {
	switch w := strings.Fields(line); w[0] {
	case "find":
		w = append(w, "")
		v, err := (*m).Find(w[1], w[2])
		if err != nil {
			return "no: " + err.Error()
		}
		return describe(v)
	case "restore":
		b, err := (*m).Snapshot()
		if err != nil {
			t.Fatal(err)
		}
		next := New()
		if err := next.Restore(b); err != nil {
			t.Fatal(err)
		}
		again, err := next.Snapshot()
		if err != nil || !bytes.Equal(b, again) {
			t.Fatalf("restored state differs: %v\n%s\n%s", err, b, again)
		}
		*m = next
		return "restored"
	}
	res, err := DecodeResult((*m).Apply([]byte(line)))
	switch {
	case err != nil:
		return res.Refusal + ": " + err.Error()
	case res.VDI != nil:
		return describe(*res.VDI)
	}
	return "ok"
}

func describe(v VDI) string {
	s := fmt.Sprintf("%s#%d %s family %d %q", v.VID, v.Serial, v.State, v.Family, v.Name)
	if v.Snapshot {
		s += fmt.Sprintf(" snapshot %d %q", v.SnapshotID, v.Tag)
	} else {
		s += fmt.Sprintf(" next %d", v.SnapshotID)
	}
	s += fmt.Sprintf(" size %d", v.Size)
	if v.Parent != 0 {
		s += " parent " + v.Parent.String()
	}
	if v.Trim != 0 {
		s += fmt.Sprint(" trim ", v.Trim)
	}
	if v.Owner != nil {
		s += fmt.Sprintf(" owner %s.%d", v.Owner.Name, v.Owner.Incarnation)
	}
	if v.Generation != 0 {
		s += fmt.Sprint(" generation ", v.Generation)
	}
	if v.Lock != nil {
		s += " lock " + v.Lock.Holder
	}
	if len(v.Attributes) > 0 {
		b, _ := json.Marshal(v.Attributes)
		s += " " + string(b)
	}
	if len(v.Previous) > 0 {
		s += fmt.Sprint(" previous ", v.Previous)
	}
	if v.MapGone {
		s += " without map"
	}
	if v.VMStateSize != 0 || v.VMClock != 0 || v.NextTag != "" {
		s += fmt.Sprintf(" state %d clock %d next tag %q", v.VMStateSize, v.VMClock, v.NextTag)
	}
	return s
}

func dump(m *Machine, out *strings.Builder) {
	for _, s := range []State{Live, Reserved, Deleted} {
		for _, v := range m.InState(s) {
			fmt.Fprintln(out, describe(v))
		}
	}
	bitmap := make([]byte, 1<<24/8)
	m.Bitmap(bitmap)
	for i, b := range bitmap {
		for k := range 8 {
			if b>>k&1 != 0 {
				if v, ok := m.Get(object.VID(8*i + k)); !ok || v.VID == 0 {
					fmt.Fprintf(out, "%s freed, but in use for who searches", object.VID(8*i+k))
					if o, ok := m.Freed(object.VID(8*i + k)); ok {
						fmt.Fprintf(out, ", was family %d %q", o.Family, o.Name)
					}
					if m.state.freed[object.VID(8*i+k)].quarantined {
						fmt.Fprint(out, ", in quarantine")
					}
					fmt.Fprintln(out)
				}
			}
		}
	}
}

func TestNames(t *testing.T) {
	for _, c := range []struct {
		name string
		ok   bool
	}{
		{"vm1", true}, {"übung 7", true}, {"日本", true}, {strings.Repeat("x", 255), true}, {"-", true},
		{"", false}, {strings.Repeat("x", 256), false}, {"a/b", false}, {"a@b", false}, {"a\nb", false}, {"a\x00", false},
		{"\xff", false}, {"a\ufffd", false}, {".", false}, {"..", false}, {" a", false}, {"a ", false}, {"a\u200bb", false}, {"a\u00a0b", false},
	} {
		err := CheckName(c.name)
		if (err == nil) != c.ok || err != nil && !errors.Is(err, ErrInvalid) {
			t.Errorf("%q: %v", c.name, err)
		}
	}
	for _, c := range []struct {
		tag string
		id  uint32
		ok  bool
	}{{"", 1, true}, {"a", 1, true}, {"1", 1, true}, {"2", 1, false}, {"01", 1, false}, {"1a", 2, true}, {"99999999999999999999", 1, false}, {"x@", 1, false}} {
		if err := CheckTag(c.tag, c.id); (err == nil) != c.ok {
			t.Errorf("tag %q of snapshot %d: %v", c.tag, c.id, err)
		}
	}
}

// Whatever comes in from a log changes the state as a whole or not at all, and the state
// survives being saved.
func FuzzApply(f *testing.F) {
	f.Add(`{"create":{"name":"a","size":1,"size_shift":22}}`, `{"delete":{"ref":{"vid":1,"serial":1}}}`)
	f.Add(`{"acquire":{"ref":{"vid":826092,"serial":1},"by":{"name":"n"}}}`, `{"reserve":{"name":"b","source":{"vid":826092,"serial":1}}}`)
	f.Fuzz(func(t *testing.T, a, b string) {
		m := New()
		for _, c := range []string{`{"create":{"name":"a","size":1,"size_shift":22}}`, a, b} {
			before, _ := m.Snapshot()
			res, err := DecodeResult(m.Apply([]byte(c)))
			after, serr := m.Snapshot()
			if serr != nil {
				t.Fatal(serr)
			}
			if err != nil && !bytes.Equal(before, after) {
				t.Fatalf("refused as %v, but changed\n%s\n%s", res, before, after)
			}
			if utf8.Valid(after) {
				next := New()
				if err := next.Restore(after); err != nil {
					t.Fatal(err)
				}
			}
		}
	})
}

// The native protocol's search must find every live volume of a name: from the name's
// hash upwards there is no unused vid before it. And no vid is used again too early. In a small space runs meet, go around, and fill it.
func TestSearch(t *testing.T) {
	for _, x := range []struct {
		max         object.VID
		names, keep int
	}{{object.MaxVID, 4, 0}, {object.MaxVID, 4, 40}, {63, 8, 12}, {63, 3, 100}, {31, 8, 1}, {15, 8, 6}, {7, 8, 2}} {
		t.Run(fmt.Sprintf("%d vids, %d names, %d kept", x.max, x.names, x.keep), func(t *testing.T) {
			m := New()
			m.state.maxVID = x.max
			s := &search{t: t, m: m, rng: rand.New(rand.NewPCG(1, 2)), keep: x.keep, since: map[object.VID]int{}, past: map[Origin][]object.VID{}}
			for i := range 4000 {
				s.step(fmt.Sprint("n", s.rng.IntN(x.names)))
				if i%100 == 0 {
					s.restore()
				}
			}
			if len(m.state.origins) == 0 && x.keep > 0 {
				t.Error("nothing is seen of vids that were freed")
			}
			s.deleteAll()
			if n := len(m.state.freed); n != len(m.state.quarantine) || n > x.keep || x.keep > 0 && n == 0 {
				t.Errorf("all is deleted, but %d vids are in use, %d in quarantine", n, len(m.state.quarantine))
			}
			s.keep = 0
			s.do(Command{Create: &Create{Name: "last", SizeShift: 22}})
			s.deleteAll()
			bitmap := make([]byte, 1<<24/8)
			m.Bitmap(bitmap)
			if i := bytes.IndexFunc(bitmap, func(r rune) bool { return r != 0 }); i >= 0 {
				t.Errorf("all is deleted, and none is kept, but vid %#x and others are in use", 8*i)
			}
			if len(m.state.origins) > 0 || len(m.state.quarantine) > 0 {
				t.Errorf("all is deleted, but what vids were is remembered: %v, %v", m.state.origins, m.state.quarantine)
			}
		})
	}
}

// A state that an older version has saved: what is freed has a VDI behind it, and nothing is in quarantine. It goes there with the last VDI
// of its run; commands of that version clear bits at once.
func TestOldState(t *testing.T) {
	const old = `{"format":1,"counter":9,"vdis":[{"vid":7396334,"serial":9,"state":"deleted","family":2,"name":"vm","size":0,"size_shift":22,` +
		`"policy":1,"created":"2026-01-02T03:04:05Z"}],"freed":[7396332,7396333],"origins":[{"name":"vm","family":2,"created":5,"vids":[7396333]}]}`
	for _, keep := range []int{0, KeepVIDs} {
		m := New()
		if err := m.Restore([]byte(old)); err != nil {
			t.Fatal(err)
		}
		if _, err := DecodeResult(m.Apply((&Command{Collected: &Collected{Refs: []Ref{{7396334, 9}}, Keep: keep}}).Encode())); err != nil {
			t.Fatal(err)
		}
		for vid := object.VID(7396332); vid <= 7396334; vid++ {
			if m.InUse(vid) != (keep > 0) {
				t.Errorf("%d are kept: %s is in use: %v", keep, vid, m.InUse(vid))
			}
		}
	}
}

// search is a catalog whose VDIs come and go.
type search struct {
	t     *testing.T
	m     *Machine
	rng   *rand.Rand
	keep  int
	gone  []string                // names of vids that were given up, in that order
	since map[object.VID]int      // how many had been when this one was first, as long as its bit is set
	past  map[Origin][]object.VID // that each had while it was there
}

func (s *search) do(c Command) (*VDI, error) {
	res, err := DecodeResult(s.m.Apply(c.Encode()))
	if errors.Is(err, ErrFull) {
		s.full()
	}
	return res.VDI, err
}

// step does something to a VDI of that name, or to any.
func (s *search) step(name string) {
	s.t.Helper()
	before := s.used()
	live := s.m.List()
	switch s.rng.IntN(5) {
	case 0:
		s.do(Command{Create: &Create{Name: name, SizeShift: 22}})
	case 1:
		if v, err := s.m.Find(name, ""); err == nil {
			n := Node{"n", 1}
			s.do(Command{Acquire: &Acquire{Ref: v.Ref, By: n, Since: v.Generation}})
			if copied, err := s.do(Command{Reserve: &Reserve{Name: name, Source: v.Ref, By: n}}); err == nil {
				s.do(Command{Snapshot: &Snapshot{Source: v.Ref, Reserved: copied.Ref, By: n}})
			}
		}
	case 2, 3:
		if len(live) > 0 {
			s.do(Command{Delete: &Delete{Ref: live[s.rng.IntN(len(live))].Ref}})
		}
	case 4:
		for _, v := range s.m.InState(Deleted) {
			if s.rng.IntN(2) == 0 {
				s.collect(v)
				before = s.used()
			}
		}
	}
	s.reused(before)
	s.check()
}

func (s *search) restore() {
	s.t.Helper()
	b, err := s.m.Snapshot()
	if err == nil {
		err = s.m.Restore(b)
	}
	if err != nil {
		s.t.Fatal(err)
	}
	if again, _ := s.m.Snapshot(); !bytes.Equal(b, again) {
		s.t.Fatalf("restored state differs:\n%s\n%s", b, again)
	}
}

func (s *search) deleteAll() {
	for _, v := range s.m.List() {
		s.do(Command{Delete: &Delete{Ref: v.Ref}})
	}
	for _, v := range s.m.InState(Deleted) {
		s.do(Command{Collected: &Collected{Refs: []Ref{v.Ref}, Keep: s.keep}})
	}
}

// used are the vids whose bit is set, by the serial of their VDI, 0 for none.
func (s *search) used() map[object.VID]uint64 {
	list := map[object.VID]uint64{}
	for v := range s.m.state.freed {
		list[v] = 0
	}
	for v, d := range s.m.state.vdis {
		list[v] = d.Serial
	}
	return list
}

// collect frees a vid, and notes which are given up by that: those of its run that no VDI is behind of.
func (s *search) collect(d VDI) {
	before := s.used()
	followed := func(v object.VID) bool {
		for w := s.m.state.nextVID(v); w != v; w = s.m.state.nextVID(w) {
			if serial, used := before[w]; !used || serial != 0 {
				return used
			}
		}
		return false
	}
	var list []object.VID
	was := map[object.VID]bool{}
	for v, serial := range before {
		was[v] = serial == 0 && !followed(v)
	}
	before[d.VID] = 0
	for v, n := d.VID, 0; n < len(before) && !followed(v); v, n = s.m.state.previousVID(v), n+1 {
		serial, used := before[v]
		if !used || serial != 0 {
			break
		}
		if !was[v] {
			list = append(list, v)
		}
	}
	for _, v := range slices.Backward(list) {
		name := d.Name
		if o, ok := s.m.Freed(v); ok {
			name = o.Name
		}
		s.gone = append(s.gone, name)
		if _, known := s.since[v]; !known {
			s.since[v] = len(s.gone)
		}
	}
	before = s.used()
	s.do(Command{Collected: &Collected{Refs: []Ref{d.Ref}, Keep: s.keep}})
	before[d.VID] = 0
	s.reused(before)
}

// reused fails if a vid's bit was cleared, or it is used again, before enough others were given up after it.
func (s *search) reused(before map[object.VID]uint64) {
	s.t.Helper()
	now := s.used()
	full := len(before) == int(s.m.state.maxVID)
	for v, serial := range before {
		if now, used := now[v]; serial != 0 || used && now == 0 {
			continue
		}
		if full && serial == 0 && now[v] != 0 {
			delete(s.since, v)
			continue
		}
		if s.since[v] == 0 {
			s.t.Fatalf("%s is used again while a VDI is behind it", v)
		}
		after := s.gone[s.since[v]:]
		n := 0
		for _, name := range after {
			if name == s.gone[s.since[v]-1] {
				n++
			}
		}
		if len(after) < s.keep && n < keepOfName(s.keep) {
			s.t.Fatalf("%s is used again after %d others, %d of its name", v, len(after), n)
		}
		delete(s.since, v)
	}
}

// full fails if a vid could have been had.
func (s *search) full() {
	s.t.Helper()
	for v := object.VID(1); v <= s.m.state.maxVID; v++ {
		d, f := s.m.state.vdis[v], s.m.state.freed[v]
		switch {
		case d != nil:
		case f == nil || f.was == nil:
			s.t.Fatalf("%s is unused, or nothing is known of it", v)
		default:
			if w, err := s.m.Find(f.was.Name, ""); err != nil || w.Origin() != f.was.Origin {
				s.t.Fatalf("nothing goes on from %s, and it is not to be had", v)
			}
		}
	}
}

func (s *search) check() {
	s.t.Helper()
	st := &s.m.state
	for _, v := range s.m.List() {
		for vid := max(st.hashVID(v.Name), 1); vid != v.VID; vid = st.nextVID(vid) {
			if !s.m.InUse(vid) {
				s.t.Fatalf("%s is not found from %s on: %s is unused", describe(v), st.hashVID(v.Name), vid)
			}
		}
	}
	names := map[string]int{}
	for _, f := range st.quarantine {
		names[f.name()]++
		if names[f.name()] > keepOfName(s.keep) || !f.quarantined || st.freed[f.vid] != f {
			s.t.Fatalf("%v is in quarantine, %d of its name", *f, names[f.name()])
		}
	}
	for v, f := range st.freed {
		if !f.quarantined && !st.followed(v) {
			s.t.Fatalf("%v is kept for nothing", *f)
		}
	}
	if n := len(st.quarantine); n > s.keep {
		s.t.Fatalf("%d are in quarantine", n)
	}
	checkOrigins(s.t, s.m, s.past)
	verifyIndexes(s.t, st)
}

// checkOrigins fails unless of each vid that a VDI ever had, as long as the VDI is there, it is known that it had it.
func checkOrigins(t *testing.T, m *Machine, past map[Origin][]object.VID) {
	t.Helper()
	there := map[Origin]bool{}
	for _, v := range m.List() {
		if !v.Snapshot {
			there[v.Origin()] = true
			if list := past[v.Origin()]; len(list) == 0 || list[len(list)-1] != v.VID {
				past[v.Origin()] = append(list, v.VID)
			}
		}
	}
	for o, list := range past {
		if !there[o] {
			delete(past, o)
			continue
		}
		for _, vid := range list {
			was, known := m.Freed(vid)
			if v, ok := m.Get(vid); ok {
				was, known = v.Origin(), true
			}
			if !known || was != o {
				t.Fatalf("%s was %v: now it is %v, known: %v", vid, o, was, known)
			}
		}
	}
}

// A vid that nobody uses has a generation above all that it had, and below what it will have.
func TestGenerationOfFreed(t *testing.T) {
	m := New()
	do := func(c Command) VDI {
		t.Helper()
		res, err := DecodeResult(m.Apply(c.Encode()))
		if err != nil {
			t.Fatal(err)
		}
		if res.VDI == nil {
			return VDI{}
		}
		return *res.VDI
	}
	v := do(Command{Create: &Create{Name: "vm", Size: 1 << 30, SizeShift: 22, Policy: 1}})
	if g := m.Generation(v.VID); g != v.Generation {
		t.Errorf("generation %d, want %d", g, v.Generation)
	}
	do(Command{Delete: &Delete{Ref: v.Ref}})
	deleted, _ := m.Get(v.VID)
	do(Command{Collected: &Collected{Refs: []Ref{v.Ref}}})
	freed := m.Generation(v.VID)
	again := do(Command{Create: &Create{Name: "vm", Size: 1 << 30, SizeShift: 22, Policy: 1}})
	if again.VID != v.VID || freed < deleted.Generation || freed >= again.Generation {
		t.Errorf("generation %d when deleted, %d when freed, %d when used again", deleted.Generation, freed, again.Generation)
	}
}
