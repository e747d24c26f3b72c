package catalog

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
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
// hash upwards there is no unused vid before it.
func TestSearch(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	m := New()
	bitmap := make([]byte, 1<<24/8)
	past := map[Origin][]object.VID{} // that each had while it was there
	for i := range 2000 {
		name := fmt.Sprint("n", rng.IntN(4))
		live := m.List()
		switch rng.IntN(4) {
		case 0:
			m.Apply((&Command{Create: &Create{Name: name, SizeShift: 22}}).Encode())
		case 1:
			if v, err := m.Find(name, ""); err == nil {
				n := Node{"n", 1}
				m.Apply((&Command{Acquire: &Acquire{Ref: v.Ref, By: n, Since: v.Generation}}).Encode())
				res, err := DecodeResult(m.Apply((&Command{Reserve: &Reserve{Name: name, Source: v.Ref, By: n}}).Encode()))
				if err != nil {
					t.Fatal(err)
				}
				if _, err := DecodeResult(m.Apply((&Command{Snapshot: &Snapshot{Source: v.Ref, Reserved: res.VDI.Ref, By: n}}).Encode())); err != nil {
					t.Fatal(err)
				}
			}
		case 2:
			if len(live) > 0 {
				v := live[rng.IntN(len(live))]
				m.Apply((&Command{Delete: &Delete{Ref: v.Ref}}).Encode())
			}
		case 3:
			for _, v := range m.InState(Deleted) {
				if rng.IntN(2) == 0 {
					m.Apply((&Command{Collected: &Collected{Refs: []Ref{v.Ref}}}).Encode())
				}
			}
		}
		clear(bitmap)
		m.Bitmap(bitmap)
		for _, v := range m.List() {
			for vid := hashVID(v.Name); vid != v.VID; vid = nextVID(vid) {
				if bitmap[vid/8]>>(vid%8)&1 == 0 {
					t.Fatalf("%s is not found from %s on: %s is unused", describe(v), hashVID(v.Name), vid)
				}
			}
		}
		if i%100 == 0 {
			b, err := m.Snapshot()
			if err == nil {
				err = m.Restore(b)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		checkOrigins(t, m, past)
	}
	if len(m.state.origins) == 0 {
		t.Error("nothing is seen of vids that were freed")
	}
	for _, v := range m.List() {
		m.Apply((&Command{Delete: &Delete{Ref: v.Ref}}).Encode())
	}
	for _, v := range m.InState(Deleted) {
		m.Apply((&Command{Collected: &Collected{Refs: []Ref{v.Ref}}}).Encode())
	}
	clear(bitmap)
	m.Bitmap(bitmap)
	if i := bytes.IndexFunc(bitmap, func(r rune) bool { return r != 0 }); i >= 0 {
		t.Errorf("all is deleted, but vid %#x and others are in use", 8*i)
	}
	if len(m.state.origins) > 0 {
		t.Errorf("all is deleted, but what vids were is remembered: %v", m.state.origins)
	}
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
