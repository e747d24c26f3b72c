package consensus

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/raft"
	"github.com/zeebo/xxh3"

	"sheepdog/storage/object"
)

// tally counts its commands and answers with the count and the command.
type tally struct {
	mu    sync.Mutex
	count int
	fail  bool
}

func (m *tally) Apply(c []byte) []byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.count++
	return fmt.Appendf(nil, "%d %s", m.count, c)
}

func (m *tally) Snapshot() ([]byte, error) { return fmt.Append(nil, m.count), nil }

func (m *tally) Restore(b []byte) error {
	if m.fail {
		return errors.New("not mine")
	}
	_, err := fmt.Sscan(string(b), &m.count)
	return err
}

var quiet = slog.New(slog.DiscardHandler)

func config(dir string) Config {
	return Config{Dir: dir, Node: "n1", Machines: map[string]Machine{"a": new(tally), "b": new(tally)}, OnApply: func(string) {}, Logger: quiet}
}

func open(t *testing.T, c Config) *Log {
	t.Helper()
	l, err := Open(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	if err := l.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	return l
}

func bootstrapped(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := Bootstrap(dir, "n1", quiet); err != nil {
		t.Fatal(err)
	}
	return dir
}

func propose(t *testing.T, l *Log, machine, command, want string) {
	t.Helper()
	b, err := l.Propose(t.Context(), machine, []byte(command))
	if err != nil || string(b) != want {
		t.Fatalf("propose %q to %s: %q, %v; want %q", command, machine, b, err, want)
	}
}

func TestProposeAndRestart(t *testing.T) {
	dir := bootstrapped(t)
	l := open(t, config(dir))
	propose(t, l, "a", "x", "1 x")
	propose(t, l, "a", "y", "2 y")
	propose(t, l, "b", "z", "1 z")
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l = open(t, config(dir))
	propose(t, l, "a", "x", "3 x")
	// Snapshots, with and without entries behind them.
	for i := range 3 {
		if err := l.Snapshot(); err != nil {
			t.Fatal(err)
		}
		if i == 1 {
			propose(t, l, "b", "z", "2 z")
		}
		l.Close()
		l = open(t, config(dir))
	}
	propose(t, l, "a", "x", "4 x")
	propose(t, l, "b", "z", "3 z")
}

// counted is a tally that knows what it was told itself.
type counted struct {
	tally
	applies atomic.Int64
}

func (m *counted) Apply(c []byte) []byte {
	m.applies.Add(1)
	return m.tally.Apply(c)
}

// What one start had to apply of a long log the next one need not: also a node that never runs for long has snapshots, else each of its
// starts would take longer than the one before.
func TestLongLogIsAppliedOnce(t *testing.T) {
	dir := bootstrapped(t)
	l := open(t, config(dir))
	var all sync.WaitGroup
	for range 64 {
		all.Go(func() {
			for range maxReplay/64 + 1 {
				if _, err := l.Propose(t.Context(), "a", []byte("x")); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	covered := func() string { return l.raft.Stats()["last_snapshot_index"] }
	if covered() != "0" {
		t.Fatal("there is a snapshot before the restart")
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l = open(t, config(dir))
	for deadline := time.Now().Add(time.Minute); covered() == "0"; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("no snapshot is made")
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	c, again := config(dir), new(counted)
	c.Machines["a"] = again
	l = open(t, c)
	propose(t, l, "a", "x", fmt.Sprintf("%d x", 64*(maxReplay/64+1)+1))
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if n := again.applies.Load(); n != 1 {
		t.Errorf("%d entries were applied once more", n-1)
	}
}

// A single voter need not wait for others: it leads long before the time is up after which followers of others would.
func TestLeaderIsQuick(t *testing.T) {
	best := time.Hour
	for i := 0; i < 10 && best > defaultElection; i++ { // the machine may be busy
		dir := bootstrapped(t)
		start := time.Now()
		open(t, config(dir))
		best = min(best, time.Since(start))
	}
	if best > defaultElection {
		t.Errorf("a single voter took %v to lead", best)
	}
}

func TestManyProposals(t *testing.T) {
	dir := bootstrapped(t)
	c := config(dir)
	l := open(t, c)
	const workers, each = 16, 50
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for range each {
				if _, err := l.Propose(t.Context(), "a", []byte("x")); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if n := c.Machines["a"].(*tally).count; n != workers*each {
		t.Errorf("%d of %d commands were applied", n, workers*each)
	}
}

// raft may take something and shut down before it looks at it: who waits for that waits no longer than until Close, and
// neither does Close.
func TestCloseEndsWhatRaftForgets(t *testing.T) {
	l := open(t, config(bootstrapped(t)))
	forgotten := make(chan struct{})
	t.Cleanup(func() { close(forgotten) })
	l.wait.Add(1)
	ended := make(chan error, 1)
	go func() {
		defer l.wait.Done()
		_, err := l.await(context.Background(), func() error { <-forgotten; return nil })
		ended <- err
	}()
	closed := make(chan error, 1)
	go func() { closed <- l.Close() }()
	select {
	case err := <-closed:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("Close waits for what raft has forgotten")
	}
	if err := <-ended; !errors.Is(err, raft.ErrRaftShutdown) {
		t.Errorf("the end of the wait is %v", err)
	}
}

func TestIdempotence(t *testing.T) {
	h := newHost(map[string]Machine{"a": new(tally)}, func(string) {})
	index := uint64(10)
	apply := func(id byte) string {
		e := entry{id: requestID{id}, since: 10, machine: "a", command: []byte("x")}
		b, err := e.encode()
		if err != nil {
			t.Fatal(err)
		}
		index++
		o := h.Apply(&raft.Log{Index: index, Data: b}).(outcome)
		if o.err != nil || o.index != index {
			t.Fatalf("entry %d: %+v", index, o)
		}
		return string(o.result)
	}
	first, second, again := apply(1), apply(2), apply(1)
	if first != "1 x" || second != "2 x" || again != first {
		t.Errorf("%q, %q, %q", first, second, again)
	}
	// The answers survive a snapshot.
	s, err := h.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	restored := newHost(map[string]Machine{"a": new(tally)}, func(string) {})
	if err := restored.Restore(readCloser{strings.NewReader(string(s.(hostSnapshot)))}); err != nil {
		t.Fatal(err)
	}
	if restored.applied != 13 || restored.progress.index() != 13 {
		t.Errorf("a snapshot of entry 13 is one of entry %d, %d", restored.applied, restored.progress.index())
	}
	h = restored
	if got := apply(2); got != second {
		t.Errorf("after a snapshot: %q, want %q", got, second)
	}
	if got := apply(3); got != "3 x" {
		t.Errorf("after a snapshot: %q", got)
	}
}

type readCloser struct{ *strings.Reader }

func (readCloser) Close() error { return nil }

func TestWindowIsBounded(t *testing.T) {
	w := newWindow()
	id := func(i int) requestID { return requestID{byte(i), byte(i >> 8), byte(i >> 16)} }
	for i := range 5 * windowEntries {
		w.add(answer{id(i), uint64(i), []byte("12345")})
	}
	if len(w.answers) != windowEntries || len(w.byID) != windowEntries || w.bytes != 5*windowEntries {
		t.Errorf("%d answers, %d ids, %d bytes", len(w.answers), len(w.byID), w.bytes)
	}
	if _, ok := w.find(id(4*windowEntries - 1)); ok {
		t.Error("an old answer is still there")
	}
	if b, ok := w.find(id(5*windowEntries - 1)); !ok || string(b) != "12345" {
		t.Error("the newest answer is gone")
	}
	if w.covers(4*windowEntries-2) || !w.covers(4*windowEntries-1) {
		t.Errorf("it says it has forgotten up to %d", w.forgot)
	}
	w.add(answer{id(-1), 0, make([]byte, 2*windowBytes)})
	if len(w.answers) != 1 {
		t.Errorf("%d answers beside one of %d bytes", len(w.answers), 2*windowBytes)
	}
}

func TestRefusedProposals(t *testing.T) {
	l := open(t, config(bootstrapped(t)))
	if _, err := l.Propose(t.Context(), "none", nil); err == nil || !strings.Contains(err.Error(), "none") {
		t.Errorf("unknown machine: %v", err)
	}
	if _, err := l.Propose(t.Context(), "a", make([]byte, maxCommand+1)); !errors.Is(err, object.ErrInvalid) {
		t.Errorf("long command: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := l.Propose(ctx, "a", nil); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	l.Close()
	if _, err := l.Propose(t.Context(), "a", nil); !errors.Is(err, object.ErrClosed) {
		t.Errorf("closed: %v", err)
	}
}

// What is missing or damaged is refused with a message that names the place.
func TestDamage(t *testing.T) {
	for _, c := range []struct {
		name, says string
		damage     func(t *testing.T, dir string)
	}{
		{"stable is missing", "restore", func(t *testing.T, dir string) { remove(t, filepath.Join(dir, "stable")) }},
		{"stable is damaged", "damaged", func(t *testing.T, dir string) {
			overwrite(t, filepath.Join(dir, "stable"), 10)
			overwrite(t, filepath.Join(dir, "stable"), stableSlot+10)
		}},
		{"stable is short", "restore", func(t *testing.T, dir string) {
			if err := os.Truncate(filepath.Join(dir, "stable"), 100); err != nil {
				t.Fatal(err)
			}
		}},
		{"log is missing", "restore", func(t *testing.T, dir string) { remove(t, filepath.Join(dir, "log")) }},
		{"segment is missing", "restore", func(t *testing.T, dir string) { remove(t, segment(t, dir)) }},
		{"entry is damaged", "restore", func(t *testing.T, dir string) {
			b, err := os.ReadFile(segment(t, dir))
			if err != nil {
				t.Fatal(err)
			}
			overwrite(t, segment(t, dir), int64(strings.Index(string(b), "command-1")))
		}},
		{"log begins with rot", "restore", func(t *testing.T, dir string) { overwrite(t, segment(t, dir), 4) }},
		{"length of an entry is damaged", "restore", func(t *testing.T, dir string) { overwrite(t, segment(t, dir), 32) }},
		{"last entry is damaged", "restore", func(t *testing.T, dir string) {
			b, err := os.ReadFile(segment(t, dir))
			if err != nil {
				t.Fatal(err)
			}
			overwrite(t, segment(t, dir), int64(strings.Index(string(b), "command-2")))
		}},
		{"log is cut off", "restore", func(t *testing.T, dir string) {
			if err := os.Truncate(segment(t, dir), 300); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := bootstrapped(t)
			l := open(t, config(dir))
			for i := range 3 {
				propose(t, l, "a", fmt.Sprint("command-", i), fmt.Sprintf("%d command-%d", i+1, i))
			}
			l.Close()
			c.damage(t, filepath.Join(dir, raftDir))
			l, err := Open(config(dir))
			if err == nil {
				l.Close()
				t.Fatal("it was opened")
			}
			if !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), dir) {
				t.Errorf("%v; want %q and the directory in it", err, c.says)
			}
		})
	}
}

// Rot in any 512 bytes of the log is noticed, or takes nothing away. The same goes for
// a process that was killed and did not close its log.
func TestRotAnywhereInTheLog(t *testing.T) {
	for _, killed := range []bool{false, true} {
		dir := bootstrapped(t)
		l := open(t, config(dir))
		for i := range 3 {
			propose(t, l, "a", fmt.Sprint("command-", i), fmt.Sprintf("%d command-%d", i+1, i))
		}
		if !killed {
			l.Close()
		}
		for off := int64(0); off < 2048; off += 32 {
			copied := t.TempDir()
			if err := os.CopyFS(copied, os.DirFS(dir)); err != nil {
				t.Fatal(err)
			}
			overwrite(t, segment(t, filepath.Join(copied, raftDir)), off)
			c := config(copied)
			l, err := Open(c)
			if err != nil {
				if !strings.Contains(err.Error(), "restore") {
					t.Errorf("rot at %d: %v", off, err)
				}
				continue
			}
			if err := l.Ready(t.Context()); err == nil && c.Machines["a"].(*tally).count != 3 {
				t.Errorf("rot at %d: %d commands are left", off, c.Machines["a"].(*tally).count)
			}
			l.Close()
		}
	}
}

func segment(t *testing.T, dir string) string {
	t.Helper()
	list, err := filepath.Glob(filepath.Join(dir, "log", "*.wal"))
	if err != nil || len(list) != 1 {
		t.Fatalf("segments %q, %v", list, err)
	}
	return list[0]
}

func remove(t *testing.T, path string) {
	t.Helper()
	if err := os.RemoveAll(path); err != nil {
		t.Fatal(err)
	}
}

func overwrite(t *testing.T, path string, off int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte("~~~~"), off); err != nil {
		t.Fatal(err)
	}
}

func TestDamagedSnapshot(t *testing.T) {
	dir := bootstrapped(t)
	l := open(t, config(dir))
	propose(t, l, "a", "x", "1 x")
	if err := l.Snapshot(); err != nil {
		t.Fatal(err)
	}
	l.Close()
	c := config(dir)
	c.Machines["a"].(*tally).fail = true
	if l, err := Open(c); err == nil {
		l.Close()
		t.Error("a machine that refuses its snapshot was started")
	} else if !strings.Contains(err.Error(), dir) {
		t.Error(err)
	}
	delete(c.Machines, "a")
	if l, err := Open(c); err == nil {
		l.Close()
		t.Error("a log was opened without one of its machines")
	}
	open(t, config(dir))
}

func TestOtherNode(t *testing.T) {
	c := config(bootstrapped(t))
	c.Node = "n2"
	if _, err := Open(c); err == nil || !strings.Contains(err.Error(), "node.name") {
		t.Error(err)
	}
}

func TestBootstrapIsAllOrNothing(t *testing.T) {
	dir := t.TempDir()
	// What a crash in the middle leaves.
	if err := os.MkdirAll(filepath.Join(dir, newRaftDir, logDir), 0o700); err != nil {
		t.Fatal(err)
	}
	overwriteNew(t, filepath.Join(dir, newRaftDir, stableName))
	if ok, err := Exists(dir); ok || err != nil {
		t.Fatalf("exists: %v, %v", ok, err)
	}
	if err := Bootstrap(dir, "n1", quiet); err != nil {
		t.Fatal(err)
	}
	if ok, err := Exists(dir); !ok || err != nil {
		t.Fatalf("exists: %v, %v", ok, err)
	}
	open(t, config(dir))
}

func overwriteNew(t *testing.T, path string) {
	t.Helper()
	if err := os.WriteFile(path, []byte("junk"), 0o600); err != nil {
		t.Fatal(err)
	}
}

// A crash while a slot is written leaves the other one.
func TestStableSurvivesTornWrites(t *testing.T) {
	path := filepath.Join(t.TempDir(), "stable")
	s, err := createStable(path, map[string][]byte{})
	if err != nil {
		t.Fatal(err)
	}
	for i := range uint64(6) {
		if err := s.SetUint64([]byte("term"), i); err != nil {
			t.Fatal(err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		next := int64((s.seq + 1) % 2)
		overwrite(t, path, next*stableSlot+9) // the slot that the next write goes to
		if s, err = openStable(path); err != nil {
			t.Fatal(err)
		}
		if got, err := s.GetUint64([]byte("term")); got != i || err != nil {
			t.Fatalf("term %d, %v; want %d", got, err, i)
		}
	}
	if _, err := s.Get([]byte("none")); err == nil || err.Error() != "not found" {
		t.Errorf("missing value: %v", err)
	}
	s.Close()
}

// When the disk with term and vote fails, the log reports it and panics nowhere.
func TestFailingDisk(t *testing.T) {
	l := open(t, config(bootstrapped(t)))
	l.guard.stable.file.Close()
	done := make(chan struct{})
	go func() { // as raft's thread does
		defer close(done)
		l.guard.SetUint64([]byte("CurrentTerm"), 99)
		t.Error("the thread went on")
	}()
	<-done
	select {
	case <-l.Failed():
	case <-time.After(10 * time.Second):
		t.Fatal("the failure was not reported")
	}
	if l.Err() == nil {
		t.Error("no reason")
	}
}

func FuzzDecodeEntry(f *testing.F) {
	e := entry{id: requestID{1}, since: 7, machine: "catalog", command: []byte("command")}
	b, err := e.encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add(oldEntry(requestID{1}, "catalog", "command"))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := decodeEntry(b)
		if err != nil || b[0] == entryFormatOne {
			return
		}
		again, err := e.encode()
		if err != nil || string(again) != string(b) {
			t.Errorf("%x became %x, %v", b, again, err)
		}
	})
}

// oldEntry is an entry of format 1.
func oldEntry(id requestID, machine, command string) []byte {
	b := append([]byte{entryFormatOne}, id[:]...)
	b = append(append(append(b, byte(len(machine))), machine...), command...)
	return binary.LittleEndian.AppendUint64(b, xxh3.Hash(b))
}

func TestOldEntry(t *testing.T) {
	e, err := decodeEntry(oldEntry(requestID{1}, "a", "x"))
	if err != nil || e.id != (requestID{1}) || e.since != neverRepeated || e.machine != "a" || string(e.command) != "x" {
		t.Errorf("%+v, %v", e, err)
	}
}
