package catalog

import (
	"errors"
	"strings"
	"testing"
)

// Records change by their revision alone, and outlive a restart.
func TestRecords(t *testing.T) {
	m := New()
	set := func(key string, revision uint64, text string) error {
		_, err := DecodeResult(m.Apply((&Command{Record: &SetRecord{Key: key, Revision: revision, Text: text}}).Encode()))
		return err
	}
	before := m.Changes()
	if err := set("a/1", 0, "one"); err != nil {
		t.Fatal(err)
	}
	if m.Changes() == before {
		t.Error("the change is not counted")
	}
	for _, key := range []string{"a/2", "b/1"} {
		if err := set(key, 0, "text of "+key); err != nil {
			t.Fatal(err)
		}
	}
	if err := set("a/1", 0, "two"); !errors.Is(err, ErrStale) {
		t.Errorf("a change that does not know of the one before: %v", err)
	}
	r := m.Record("a/1")
	if err := set("a/1", r.Revision, "two"); err != nil || r.Text != "one" {
		t.Errorf("%v after %+v", err, r)
	}
	if err := set("a/1", r.Revision, "three"); !errors.Is(err, ErrStale) {
		t.Errorf("an old revision: %v", err)
	}
	for _, bad := range []struct{ key, text string }{{"", "x"}, {strings.Repeat("k", MaxRecordKey+1), "x"}, {"k", strings.Repeat("x", MaxRecordText+1)}} {
		if err := set(bad.key, 0, bad.text); !errors.Is(err, ErrInvalid) {
			t.Errorf("key of %d, text of %d bytes: %v", len(bad.key), len(bad.text), err)
		}
	}
	b, err := m.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	m = New()
	if err := m.Restore(b); err != nil {
		t.Fatal(err)
	}
	list := m.Records("a/")
	if len(list) != 2 || list[0].Text != "two" || list[1].Key != "a/2" {
		t.Errorf("after a restart: %+v", list)
	}
	if err := set("a/1", list[0].Revision, ""); err != nil {
		t.Fatal(err)
	}
	if r := m.Record("a/1"); r.Revision != 0 || len(m.Records("")) != 2 {
		t.Errorf("after the removal: %+v, %+v", r, m.Records(""))
	}
}
