package consensus

import (
	"os"
	"path/filepath"
	"testing"
)

// With how much a node was started is known until the cluster has taken note of it, however often the node is started until
// then, and however much of the log it has got meanwhile: else an older copy of a node would be the newest at its second start.
func TestBegan(t *testing.T) {
	dir := bootstrapped(t)
	l := open(t, config(dir))
	began := func(low, high uint64) uint64 {
		t.Helper()
		if at := l.Began(); at < low || at > high {
			t.Fatalf("the log was at %d when it began, not at %d to %d", at, low, high)
		}
		return l.Began()
	}
	again := func() {
		t.Helper()
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		l = open(t, config(dir))
	}
	first := began(1, 1) // the entry that made it
	propose(t, l, "a", "x", "1 x")
	again()
	began(first, first)
	propose(t, l, "a", "x", "2 x")
	last := l.Applied()
	if err := l.Noted(); err != nil {
		t.Fatal(err)
	}
	again()
	at := began(last, last+5) // and what raft notes for itself
	propose(t, l, "a", "x", "3 x")
	again()
	began(at, at)

	// Also when the entries are in a snapshot only, as the leader sends one.
	if err := l.Noted(); err != nil {
		t.Fatal(err)
	}
	last = l.Applied()
	if err := l.Snapshot(); err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	empty := t.TempDir()
	if err := Prepare(empty, "n1", quiet); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(dir, raftDir, "snapshots"), filepath.Join(empty, raftDir, "moved")); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(empty, raftDir, "snapshots")); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(empty, raftDir, "moved"), filepath.Join(empty, raftDir, "snapshots")); err != nil {
		t.Fatal(err)
	}
	s, err := openStable(filepath.Join(empty, raftDir, stableName))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	w, err := openWAL(filepath.Join(empty, raftDir), s, quiet)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	b, err := openBegan(filepath.Join(empty, raftDir), w, quiet)
	if err != nil {
		t.Fatal(err)
	}
	defer b.close()
	if b.at < last {
		t.Errorf("a snapshot has what was applied up to %d, and the log began at %d", last, b.at)
	}
}
