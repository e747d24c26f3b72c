package access

import (
	"errors"
	"net/netip"
	"reflect"
	"strconv"
	"testing"
)

const (
	alice = "iqn.2001-01.a:alice"
	bob   = "iqn.2001-01.a:bob"
)

// Who is let in, after each of some changes.
func TestAdmits(t *testing.T) {
	here, there := netip.MustParseAddr("10.1.2.3"), netip.MustParseAddr("192.0.2.1")
	target := Target{Name: "vm"}
	steps := []struct {
		what   string
		change func(Target) (Target, error)
		who    string // of alice here, bob here, alice there, bob there: + is let in
	}{
		{"nothing is said", func(t Target) (Target, error) { return t, nil }, "++++"},
		{"a name", func(t Target) (Target, error) { return t.Allow([]string{"IQN.2001-01.A:Alice"}) }, "+-+-"},
		{"and a network", func(t Target) (Target, error) { return t.Allow([]string{"10.1.0.0/16"}) }, "+---"},
		{"another name and an address", func(t Target) (Target, error) { return t.Allow([]string{bob, "192.0.2.1"}) }, "++++"},
		{"one name less", func(t Target) (Target, error) { return t.Deny([]string{alice}) }, "-+-+"},
		{"the last name less", func(t Target) (Target, error) { return t.Deny([]string{bob}) }, "----"},
		{"everybody", func(t Target) (Target, error) { return t.AllowAll(), nil }, "++++"},
		{"nobody", func(t Target) (Target, error) { return t.DenyAll(), nil }, "----"},
		{"one after nobody", func(t Target) (Target, error) { return t.Allow([]string{bob}) }, "-+-+"},
	}
	for _, s := range steps {
		next, err := s.change(target)
		if err != nil {
			t.Fatalf("%s: %v", s.what, err)
		}
		target = next
		if text := target.Encode(); text != "" {
			if target, err = Decode(text); err != nil || !reflect.DeepEqual(target, next) {
				t.Errorf("%s: %+v became %+v: %v", s.what, next, target, err)
			}
		}
		got := ""
		for _, from := range []netip.Addr{here, there} {
			for _, who := range []string{alice, bob} {
				if target.Admits(who, from) {
					got += "+"
				} else {
					got += "-"
				}
			}
		}
		if got != s.who {
			t.Errorf("%s: %s, want %s", s.what, got, s.who)
		}
	}
	if target.Admits(bob, netip.MustParseAddr("::ffff:10.1.2.3")) != target.Admits(bob, here) {
		t.Error("an address in the other family's words is another one")
	}
}

func TestRefusals(t *testing.T) {
	vm, group := Target{Name: "vm"}, Target{Name: "g", Group: true}
	full := group
	for i := range MaxLUN + 1 {
		full, _, _ = full.Add(-1, strconv.Itoa(i), "")
	}
	with, _, _ := group.Add(3, "vm", "")
	listed, _ := vm.Allow([]string{alice})
	for what, c := range map[string]struct {
		err  func() error
		kind error
	}{
		"neither name nor network":     {func() error { _, err := vm.Allow([]string{"alice"}); return err }, ErrInvalid},
		"a name with a comma":          {func() error { _, err := vm.Allow([]string{"iqn.a,b"}); return err }, ErrInvalid},
		"taken from no list":           {func() error { _, err := vm.Deny([]string{alice}); return err }, ErrNotFound},
		"who is not in the list":       {func() error { _, err := listed.Deny([]string{bob}); return err }, ErrNotFound},
		"a unit of a VDI's target":     {func() error { _, _, err := vm.Add(0, "x", ""); return err }, ErrInvalid},
		"a number that is taken":       {func() error { _, _, err := with.Add(3, "x", ""); return err }, ErrExists},
		"a VDI twice":                  {func() error { _, _, err := with.Add(4, "vm", ""); return err }, ErrExists},
		"a number too high":            {func() error { _, _, err := with.Add(256, "x", ""); return err }, ErrInvalid},
		"one unit too many":            {func() error { _, _, err := full.Add(-1, "x", ""); return err }, ErrInvalid},
		"a unit that is not there":     {func() error { _, err := with.Remove(2); return err }, ErrNotFound},
		"one secret for both":          {func() error { _, err := vm.WithChap(Chap{Credential: "a", Mutual: "a"}); return err }, ErrInvalid},
		"a credential out of its room": {func() error { _, err := vm.WithChap(Chap{Credential: "../x"}); return err }, ErrInvalid},
		"a hidden credential":          {func() error { _, err := vm.WithChap(Chap{Credential: ".x"}); return err }, ErrInvalid},
		"no such entry":                {func() error { _, err := vm.WithoutChap(bob); return err }, ErrNotFound},
		"capitals in a group's name":   {func() error { return CheckGroup("Disks") }, ErrInvalid},
		"a group without a name":       {func() error { return CheckGroup("") }, ErrInvalid},
	} {
		if err := c.err(); !errors.Is(err, c.kind) {
			t.Errorf("%s: %v, want %v", what, err, c.kind)
		}
	}
}

// Units keep their numbers, and the lowest free one is taken.
func TestLUNs(t *testing.T) {
	g := Target{Name: "g", Group: true}
	for _, vdi := range []string{"a", "b", "c"} {
		g, _, _ = g.Add(-1, vdi, "")
	}
	g, err := g.Remove(1)
	if err != nil {
		t.Fatal(err)
	}
	g, l, err := g.Add(-1, "d", "daily")
	want := []LUN{{0, "a", ""}, {1, "d", "daily"}, {2, "c", ""}}
	if err != nil || l != want[1] || !reflect.DeepEqual(g.LUNs, want) {
		t.Errorf("%v, %v: %v", l, g.LUNs, err)
	}
}

// The entry for an initiator goes before that for all.
func TestChapFor(t *testing.T) {
	target, _ := Target{Name: "vm"}.WithChap(Chap{Credential: "all"})
	target, _ = target.WithChap(Chap{Initiator: alice, Credential: "a", Mutual: "t"})
	if c, ok := target.ChapFor("IQN.2001-01.a:ALICE"); !ok || c.Credential != "a" || c.Mutual != "t" {
		t.Errorf("%+v", c)
	}
	if c, ok := target.ChapFor(bob); !ok || c.Credential != "all" {
		t.Errorf("%+v", c)
	}
	target, _ = target.WithoutChap("")
	if _, ok := target.ChapFor(bob); ok {
		t.Error("there is no entry for him")
	}
}
