package iscsi

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"sheepdog/frontends/iscsi/internal/scsi"
)

// What initiators are shown of two gateways: each row is a second.
func TestPathsSettle(t *testing.T) {
	states := map[byte]scsi.State{'o': scsi.ActiveOptimized, 'n': scsi.ActiveNonOptimized, 'x': scsi.Unavailable}
	groups := func(s string) (list []scsi.Group) {
		for i := range s {
			list = append(list, scsi.Group{ID: uint16(i + 1), State: states[s[i]]})
		}
		return list
	}
	text := func(list []scsi.Group) (s string) {
		for _, g := range list {
			s += map[scsi.State]string{scsi.ActiveOptimized: "o", scsi.ActiveNonOptimized: "n", scsi.Unavailable: "x"}[g.State]
		}
		return s
	}
	for _, c := range []struct{ what, now, shown string }{
		{"it stays", "on on on on", "on on on on"},
		{"it goes over and stays", "on no no no no no", "on on on on no no"},
		{"to and fro", "on no on no on no on no", "on on on on on on on on"},
		{"a gateway dies, and is back", "on xo xo no no", "on xo xo no no"},
		{"one more", "on onn onn", "on onn onn"},
	} {
		var p paths
		var shown []string
		for i, now := range strings.Fields(c.now) {
			shown = append(shown, text(p.show(groups(now), time.Unix(int64(i), 0), 3*time.Second)))
		}
		if got := fmt.Sprint(strings.Join(shown, " ")); got != c.shown {
			t.Errorf("%s: %s is shown as %s, want %s", c.what, c.now, got, c.shown)
		}
	}
}
