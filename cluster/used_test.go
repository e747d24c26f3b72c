package cluster

import (
	"testing"
	"time"

	"sheepdog/storage/object"
)

// Whether a volume is open through another node is what that says; whoever does not answer may have it open, who is down has not.
func TestUsedElsewhere(t *testing.T) {
	w := newWorld(t, "n1", "n2", "n3")
	w.formOf(3, "n1", "n2", "n3")
	n1, n2, n3 := w.nodes["n1"], w.nodes["n2"], w.nodes["n3"]
	const vid = object.VID(7)
	expect := func(what string, want bool) {
		t.Helper()
		if got := n1.UsedElsewhere(t.Context(), vid); got != want {
			t.Errorf("%s: %v, want %v", what, got, want)
		}
	}
	expect("nobody knows yet", true)
	n1.Using(func(object.VID) bool { return true })
	n2.Using(func(object.VID) bool { return false })
	n3.Using(func(object.VID) bool { return false })
	expect("open here", false)
	n3.Using(func(v object.VID) bool { return v == vid })
	expect("open through one", true)
	n3.Using(func(v object.VID) bool { return v != vid })
	expect("another one is open", false)

	wait := make(chan struct{})
	n2.Using(func(object.VID) bool { <-wait; return false })
	began := time.Now()
	expect("one does not answer", true)
	if took := time.Since(began); took > usedTimeout+5*time.Second {
		t.Errorf("it took %v", took)
	}
	close(wait)
}
