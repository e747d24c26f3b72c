package consensus

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"github.com/hashicorp/raft"
)

// A node that a new leader has made drop the end of its log finds the rest when it is
// started again, wherever the end was.
func TestLogWithoutItsEndOpens(t *testing.T) {
	for _, kept := range []uint64{1, 7, 19} {
		dir := t.TempDir()
		if err := os.Mkdir(filepath.Join(dir, logDir), 0o700); err != nil {
			t.Fatal(err)
		}
		s, err := createStable(filepath.Join(dir, stableName), map[string][]byte{})
		if err != nil {
			t.Fatal(err)
		}
		w, err := openWAL(dir, s, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		store := func(first, last, term uint64) {
			t.Helper()
			for i := first; i <= last; i++ {
				if err := w.StoreLog(&raft.Log{Index: i, Term: term, Data: fmt.Append(nil, i, term)}); err != nil {
					t.Fatal(err)
				}
			}
		}
		check := func(when string) {
			t.Helper()
			for i := uint64(1); i <= 30; i++ {
				term := uint64(1)
				if i > kept {
					term = 2
				}
				var l raft.Log
				if err := w.GetLog(i, &l); err != nil || l.Term != term || string(l.Data) != string(fmt.Append(nil, i, term)) {
					t.Fatalf("%s, the first %d of 20 kept: entry %d is %d %q, %v", when, kept, i, l.Term, l.Data, err)
				}
			}
		}
		store(1, 20, 1)
		if err := w.DeleteRange(kept+1, 20); err != nil {
			t.Fatal(err)
		}
		store(kept+1, 30, 2)
		check("at once")
		for range 2 {
			if err := errors.Join(w.Close(), s.Close()); err != nil {
				t.Fatal(err)
			}
			if s, err = openStable(filepath.Join(dir, stableName)); err != nil {
				t.Fatal(err)
			}
			if w, err = openWAL(dir, s, slog.New(slog.DiscardHandler)); err != nil {
				t.Fatal(err)
			}
			check("opened again")
		}
		if err := errors.Join(w.Close(), s.Close()); err != nil {
			t.Fatal(err)
		}
	}
}
