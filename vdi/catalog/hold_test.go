package catalog

import (
	"errors"
	"strings"
	"testing"
	"time"
)

// A hold changes by its revision alone, goes with the VDI's name through snapshots and
// rollbacks, and not to snapshots and clones.
func TestHold(t *testing.T) {
	m := New()
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	do := func(c Command) VDI {
		t.Helper()
		res, err := DecodeResult(m.Apply(c.Encode()))
		if err != nil {
			t.Fatal(err)
		}
		return *res.VDI
	}
	hold := func(v VDI, revision uint64, text string) error {
		_, err := DecodeResult(m.Apply((&Command{Hold: &SetHold{Ref: v.Ref, Revision: revision, Text: text}}).Encode()))
		return err
	}
	text := func(name, tag string) string {
		t.Helper()
		v, err := m.Find(name, tag)
		if err != nil {
			t.Fatal(err)
		}
		s, _ := v.Reserved()
		return s
	}
	n1 := Node{Name: "n1", Incarnation: 1}
	v := do(Command{Create: &Create{Name: "vm", Size: 1 << 20, SizeShift: 22, At: at}})
	v = do(Command{Acquire: &Acquire{Ref: v.Ref, By: n1, Since: v.Generation}})
	before := m.Changes()
	if err := hold(v, 0, "mine"); err != nil {
		t.Fatal(err)
	}
	if m.Changes() == before {
		t.Error("the change is not counted")
	}
	if err := hold(v, 0, "yours"); !errors.Is(err, ErrStale) {
		t.Errorf("hold by an old revision: %v", err)
	}
	now, _ := m.Get(v.VID)
	_, revision := now.Reserved()
	if err := hold(v, revision, strings.Repeat("x", MaxHoldText+1)); !errors.Is(err, ErrInvalid) {
		t.Errorf("a text that is too long: %v", err)
	}

	copyOf := do(Command{Reserve: &Reserve{Name: "vm", Source: v.Ref, By: n1, At: at}})
	v2 := do(Command{Snapshot: &Snapshot{Source: v.Ref, Reserved: copyOf.Ref, Tag: "one", Identity: "i", By: n1, At: at}})
	if text("vm", "") != "mine" || text("vm", "one") != "" {
		t.Errorf("after a snapshot: %q, the snapshot %q", text("vm", ""), text("vm", "one"))
	}
	copyOf = do(Command{Reserve: &Reserve{Name: "other", Source: v.Ref, By: n1, At: at}})
	do(Command{Clone: &Clone{Source: v.Ref, Reserved: copyOf.Ref, Name: "other", At: at}})
	if text("other", "") != "" {
		t.Errorf("a clone has %q", text("other", ""))
	}
	copyOf = do(Command{Reserve: &Reserve{Name: "vm", Source: v.Ref, By: n1, At: at}})
	do(Command{Rollback: &Rollback{Source: v.Ref, Reserved: copyOf.Ref, Working: v2.Ref, By: n1, At: at}})
	if text("vm", "") != "mine" {
		t.Errorf("after a rollback: %q", text("vm", ""))
	}
	if v, _ := m.Find("vm", ""); v.Replaced != 1 {
		t.Errorf("after a rollback the content was replaced %d times", v.Replaced)
	}
	b, err := m.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	m = New()
	if err := m.Restore(b); err != nil {
		t.Fatal(err)
	}
	if text("vm", "") != "mine" {
		t.Errorf("after a restart: %q", text("vm", ""))
	}
}
