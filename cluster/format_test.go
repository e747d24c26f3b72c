package cluster

import (
	"testing"
)

// When format has answered, the cluster stands the loss of any one of the nodes that were there: not only the one that was asked
// has what has been decided, and votes.
func TestFormatWaitsForVoters(t *testing.T) {
	w := newWorld(t, "n1", "n2", "n3")
	for name := range w.nodes {
		w.start(name)
	}
	first := w.nodes["n1"]
	w.eventually("n1 knows the others", func() bool { return len(first.flock.strangers()) == 2 })
	if err := first.Format(t.Context(), FormatOptions{Copies: 3, Partitions: 16}); err != nil {
		t.Fatal(err)
	}
	voters := 0
	for _, s := range first.consensus.Load().Servers() {
		if s.Voter {
			voters++
		}
	}
	if voters != 3 {
		t.Errorf("format has answered, and %d nodes vote", voters)
	}
}
