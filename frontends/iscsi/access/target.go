package access

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Target is what is said of one target. The zero value says nothing: a VDI's own target that
// everybody may log in to as far as the gateways' configuration lets them. Values are copies: methods return new ones.
type Target struct {
	Name string `json:"name"` // of the VDI, or of the group
	// Group: its logical units are LUNs; else it is the VDI's own target, and its snapshots'.
	Group bool  `json:"group,omitempty"`
	LUNs  []LUN `json:"luns,omitempty"` // by number

	// Initiators are the iSCSI names, Networks the addresses, that may log in. nil: all; empty: none.
	Initiators *[]string `json:"initiators,omitempty"`
	Networks   *[]string `json:"networks,omitempty"`

	// Chap says who proves to be who. The entry for an initiator goes before that for all.
	Chap []Chap `json:"chap,omitempty"`
}

// LUN is a logical unit of a group.
type LUN struct {
	Number int    `json:"number"`
	VDI    string `json:"vdi"`
	Tag    string `json:"tag,omitempty"` // of a snapshot
}

// Chap names credentials: how an initiator proves itself, and how the target does to it.
type Chap struct {
	Initiator  string `json:"initiator,omitempty"` // "": all that have no entry of their own
	Credential string `json:"credential"`
	Mutual     string `json:"mutual,omitempty"`
}

// Limits of a target.
const (
	MaxLUN        = 255 // the highest number
	MaxInitiators = 512
	MaxNetworks   = 256
	MaxChap       = 512
	maxName       = 180 // bytes of a group's: with a prefix it is an iSCSI name of 223
	maxIQN        = 223
	maxCredential = 223
)

// What changes are refused with.
var (
	ErrInvalid  = errors.New("invalid")
	ErrNotFound = errors.New("not found")
	ErrExists   = errors.New("exists")
)

func refuse(kind error, format string, args ...any) error {
	return &refusal{kind, fmt.Sprintf(format, args...)}
}

type refusal struct {
	kind   error
	reason string
}

func (r *refusal) Error() string { return r.reason }
func (r *refusal) Unwrap() error { return r.kind }

// Decode reads what Encode wrote.
func Decode(text string) (t Target, err error) {
	if err := json.Unmarshal([]byte(text), &t); err != nil {
		return t, fmt.Errorf("decode a target: %w", err)
	}
	return t, nil
}

// Encode gives the target as a text, "" if nothing is said of it.
func (t Target) Encode() string {
	if !t.Group && t.Initiators == nil && t.Networks == nil && len(t.Chap) == 0 {
		return ""
	}
	b, err := json.Marshal(t)
	if err != nil {
		panic(fmt.Sprintf("encode a target: %v", err)) // numbers and strings
	}
	return string(b)
}

// CheckGroup refuses names that initiators could not say: they have no upper case and few signs
// (RFC 3722).
func CheckGroup(name string) error {
	for _, r := range name {
		if (r < 'a' || r > 'z') && (r < '0' || r > '9') && !strings.ContainsRune("-:.", r) {
			return refuse(ErrInvalid, "the name of a group has lower case letters, digits and the signs - . : only, not %q", r)
		}
	}
	if name == "" || len(name) > maxName {
		return refuse(ErrInvalid, "the name of a group has 1 to %d letters", maxName)
	}
	return nil
}

// CheckCredential refuses what could not be the name of a file.
func CheckCredential(name string) error {
	if name == "" || len(name) > maxCredential || name[0] == '.' || strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r == '/' || r == '\\' || r > '~' }) {
		return refuse(ErrInvalid, "%.60q is no name of a credential: it is the name of a file with a secret on the gateways", name)
	}
	return nil
}

// initiator puts an iSCSI name as it is compared.
func initiator(name string) (string, error) {
	name = strings.ToLower(name)
	ok := strings.HasPrefix(name, "iqn.") || strings.HasPrefix(name, "eui.") || strings.HasPrefix(name, "naa.")
	if !ok || len(name) > maxIQN || strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r == ',' || r == 0x7f }) {
		return "", refuse(ErrInvalid, "%.60q is no iSCSI name as iqn.1993-08.org.debian:01:abc", name)
	}
	return name, nil
}

// network puts an address or a network as it is kept.
func network(s string) (string, error) {
	if a, err := netip.ParseAddr(s); err == nil {
		a = a.Unmap().WithZone("")
		return netip.PrefixFrom(a, a.BitLen()).String(), nil
	}
	p, err := netip.ParsePrefix(s)
	if err != nil {
		return "", refuse(ErrInvalid, "%.60q is no network as 10.0.0.0/8", s)
	}
	return p.Masked().String(), nil
}

// Admits reports whether an initiator may log in from an address; one that is not IP (a test's
// pipe) has no network to be in.
func (t Target) Admits(name string, from netip.Addr) bool {
	if t.Initiators != nil && !slices.Contains(*t.Initiators, strings.ToLower(name)) {
		return false
	}
	if t.Networks == nil {
		return true
	}
	from = from.Unmap().WithZone("")
	return slices.ContainsFunc(*t.Networks, func(s string) bool {
		p, err := netip.ParsePrefix(s)
		return err == nil && p.Contains(from)
	})
}

// ChapFor gives the entry that an initiator goes by; false if there is none.
func (t Target) ChapFor(name string) (Chap, bool) {
	name = strings.ToLower(name)
	for _, who := range []string{name, ""} {
		for _, c := range t.Chap {
			if c.Initiator == who {
				return c, true
			}
		}
	}
	return Chap{}, false
}

// Allow lets more initiators and networks in. Where all were, others are not any more.
func (t Target) Allow(who []string) (Target, error) {
	for _, w := range who {
		list, s, most, err := t.listFor(w)
		if err != nil {
			return t, err
		}
		var now []string
		if *list != nil {
			now = **list
		}
		if slices.Contains(now, s) {
			continue
		}
		if len(now) == most {
			return t, refuse(ErrInvalid, "more than %d entries", most)
		}
		now = append(slices.Clone(now), s)
		slices.Sort(now)
		*list = &now
	}
	return t, nil
}

// Deny takes initiators and networks out. When the last is, nobody may log in.
func (t Target) Deny(who []string) (Target, error) {
	for _, w := range who {
		list, s, _, err := t.listFor(w)
		if err != nil {
			return t, err
		}
		if *list == nil {
			return t, refuse(ErrNotFound, "all are let in to %q, there is no list that %s could be taken from: allow those who may first", t.Name, s)
		}
		i := slices.Index(**list, s)
		if i < 0 {
			return t, refuse(ErrNotFound, "%s is not let in to %q", s, t.Name)
		}
		now := slices.Delete(slices.Clone(**list), i, i+1)
		*list = &now
	}
	return t, nil
}

// listFor finds the list that an entry belongs to: what has a known beginning is a name.
func (t *Target) listFor(w string) (list **[]string, s string, most int, err error) {
	if s, err := network(w); err == nil {
		return &t.Networks, s, MaxNetworks, nil
	}
	if s, err := initiator(w); err == nil {
		return &t.Initiators, s, MaxInitiators, nil
	}
	return nil, "", 0, refuse(ErrInvalid, "%.60q is neither an iSCSI name as iqn.1993-08.org.debian:01:abc nor a network as 10.0.0.0/8", w)
}

// AllowAll lets everybody in, as far as the gateways' configuration does. CHAP stays.
func (t Target) AllowAll() Target {
	t.Initiators, t.Networks = nil, nil
	return t
}

// DenyAll lets nobody in.
func (t Target) DenyAll() Target {
	t.Initiators = &[]string{} // not a nil slice: that would be kept as null, which is everybody
	return t
}

// WithChap sets an entry.
func (t Target) WithChap(c Chap) (Target, error) {
	var err error
	if c.Initiator != "" {
		if c.Initiator, err = initiator(c.Initiator); err != nil {
			return t, err
		}
	}
	if err := CheckCredential(c.Credential); err != nil {
		return t, err
	}
	if c.Mutual != "" {
		if err := CheckCredential(c.Mutual); err != nil {
			return t, err
		}
	}
	if c.Mutual == c.Credential {
		return t, refuse(ErrInvalid, "the target must prove itself by another secret than the initiator (RFC 7143 section 9.2.1)")
	}
	list := slices.DeleteFunc(slices.Clone(t.Chap), func(x Chap) bool { return x.Initiator == c.Initiator })
	if len(list) == MaxChap {
		return t, refuse(ErrInvalid, "more than %d entries", MaxChap)
	}
	t.Chap = append(list, c)
	slices.SortFunc(t.Chap, func(a, b Chap) int { return cmp.Compare(a.Initiator, b.Initiator) })
	return t, nil
}

// WithoutChap removes an entry.
func (t Target) WithoutChap(name string) (Target, error) {
	name = strings.ToLower(name)
	list := slices.DeleteFunc(slices.Clone(t.Chap), func(x Chap) bool { return x.Initiator == name })
	if len(list) == len(t.Chap) {
		return t, refuse(ErrNotFound, "%q has no such credential", t.Name)
	}
	t.Chap = list
	return t, nil
}

// Add makes a VDI or a snapshot a logical unit of a group: under the lowest number that is
// free if number is negative.
func (t Target) Add(number int, vdi, tag string) (Target, LUN, error) {
	if !t.Group {
		return t, LUN{}, refuse(ErrInvalid, "%q is a VDI's own target: it has that as unit 0 alone; make a group for several", t.Name)
	}
	if number > MaxLUN {
		return t, LUN{}, refuse(ErrInvalid, "%d is no number of a logical unit: they are 0 to %d", number, MaxLUN)
	}
	for _, l := range t.LUNs {
		switch {
		case l.VDI == vdi && l.Tag == tag:
			return t, l, refuse(ErrExists, "%q is unit %d already", vdi, l.Number)
		case l.Number == number:
			return t, l, refuse(ErrExists, "unit %d is %q", number, l.VDI)
		}
	}
	if number < 0 {
		number = 0
		for _, l := range t.LUNs { // by number
			if l.Number == number {
				number++
			}
		}
		if number > MaxLUN {
			return t, LUN{}, refuse(ErrInvalid, "%q has %d units already", t.Name, MaxLUN+1)
		}
	}
	l := LUN{Number: number, VDI: vdi, Tag: tag}
	t.LUNs = append(slices.Clone(t.LUNs), l)
	slices.SortFunc(t.LUNs, func(a, b LUN) int { return cmp.Compare(a.Number, b.Number) })
	return t, l, nil
}

// Remove takes a unit out of a group. The others keep their numbers.
func (t Target) Remove(number int) (Target, error) {
	i := slices.IndexFunc(t.LUNs, func(l LUN) bool { return l.Number == number })
	if i < 0 {
		return t, refuse(ErrNotFound, "%q has no unit %d", t.Name, number)
	}
	t.LUNs = slices.Delete(slices.Clone(t.LUNs), i, i+1)
	return t, nil
}
