package consensus

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"sheepdog/storage/object"
)

// Over TCP and in memory: nodes join, all follow, each may propose.
func TestFlockGrows(t *testing.T) {
	for _, memory := range []bool{false, true} {
		t.Run(fmt.Sprint("memory ", memory), func(t *testing.T) {
			f := newFlock(t, memory, 2)
			f.voters("n1")
			f.join("n3")
			f.voters("n1", "n2", "n3")
			f.join("n4")
			f.join("n5")
			f.voters("n1", "n2", "n3", "n4", "n5")
			f.join("n6")
			var want []string
			for _, name := range f.names() {
				want = append(want, "by "+name)
				got, err := f.node(name).Propose(t.Context(), "j", []byte("by "+name))
				if err != nil || string(got) != fmt.Sprint(len(want)) {
					t.Fatalf("propose through %s: %q, %v", name, got, err)
				}
				if !slices.Equal(f.node(name).journal.list(), want) {
					t.Errorf("%s has %q when Propose returns, want %q", name, f.node(name).journal.list(), want)
				}
			}
			f.once(f.same(), want)
			f.countVoters(5)
		})
	}
}

// A command that comes from another node does not wait for raft's timers.
func TestForwardedProposalsAreQuick(t *testing.T) {
	const election = 4 * time.Second
	f := newPatientFlock(t, false, 3, election)
	f.voters("n1", "n2", "n3")
	var follower *testNode
	for _, name := range f.names() {
		if n := f.node(name); n != f.leader() {
			follower = n
		}
	}
	const rounds = 20
	var times []time.Duration
	for i := range rounds {
		start := time.Now()
		if _, err := follower.Propose(t.Context(), "j", fmt.Append(nil, i)); err != nil {
			t.Fatal(err)
		}
		times = append(times, time.Since(start))
	}
	slices.Sort(times)
	t.Logf("median %v", times[rounds/2])
	if median := times[rounds/2]; median > election/8 { // half of the pause between raft's messages
		t.Errorf("it took %v", median)
	}
}

// The leader is killed again and again, and comes back; nothing answered is lost, nothing
// is applied twice.
func TestLeadersDie(t *testing.T) {
	for _, n := range []int{3, 5} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			f := newFlock(t, false, n)
			f.countVoters(n)
			name := f.leader().name()
			others := slices.DeleteFunc(f.names(), func(o string) bool { return o == name })
			w := f.write(others...)
			w.more(20)
			for range 2 {
				f.stop(name, false)
				w.more(20)
				f.start(name)
				f.ready(name)
				// The next one to die must not be one that writes.
				for f.leader().name() != name {
					f.eventually("hand the lead back", func() error {
						l := f.leader()
						if l.name() == name {
							return nil
						}
						_, err := l.await(t.Context(), l.raft.LeadershipTransferToServer(raftID(name), raftAddress(name)).Error)
						return err
					})
				}
			}
			answered := w.stop()
			f.once(f.same(), answered)
			t.Logf("%d answers, the longest after %v", len(answered), w.longest)
			if w.longest > 20*testElection {
				t.Errorf("a proposal took %v", w.longest)
			}
		})
	}
}

// Answers get lost, so commands are sent twice, with the lead changing hands meanwhile.
func TestExactlyOnce(t *testing.T) {
	f := newFlock(t, true, 3)
	f.countVoters(3)
	var replies atomic.Int64
	f.fabric.mu.Lock()
	f.fabric.onReply = func(string) bool { return replies.Add(1)%3 != 0 }
	f.fabric.mu.Unlock()
	w := f.write(f.names()...)
	for range 5 {
		w.more(15)
		f.leader().StepDown(t.Context())
	}
	w.more(15)
	answered := w.stop()
	f.once(f.same(), answered)
}

// A clean stop hands the lead over: nobody waits for an election.
func TestCleanStopHandsOver(t *testing.T) {
	const election = 4 * time.Second
	f := newPatientFlock(t, false, 3, election)
	f.countVoters(3)
	old := f.leader().name()
	others := slices.DeleteFunc(f.names(), func(o string) bool { return o == old })
	w := f.write(others...)
	w.more(10)
	f.stop(old, true)
	w.more(10)
	answered := w.stop()
	f.once(f.same(), answered)
	t.Logf("longest proposal %v", w.longest)
	if w.longest > election/2 {
		t.Errorf("a proposal took %v", w.longest)
	}
}

// Voters die one after the other. Others take their places, and when there are no others,
// three of three are better than three of five.
func TestVotersAreReplaced(t *testing.T) {
	f := newFlock(t, false, 7)
	f.countVoters(5)
	w := f.write("n7")
	for _, victim := range []string{"n1", "n2", "n3", "n4"} {
		w.more(10)
		f.stop(victim, false)
		// Of four nodes that are left, all vote beside a dead one, or three: if the machine
		// was so busy that another one seemed dead for a moment.
		want := map[string][]int{"n1": {5}, "n2": {5}, "n3": {4, 3}, "n4": {3}}[victim]
		f.eventually("voters after the death of "+victim, func() error {
			up, down := 0, 0
			for _, s := range f.leader().Servers() {
				if s.Node == victim && s.Health == HealthOK {
					return errors.New("it is not known yet") // and must be, before the next one dies
				}
				if s.Voter && s.Health == HealthOK {
					up++
				} else if s.Voter {
					down++
				}
			}
			if !slices.Contains(want, up) || down > max(5-len(f.names()), 0) {
				return fmt.Errorf("%d voters are up, %d are not; want %v up", up, down, want)
			}
			return nil
		})
	}
	f.voters("n5", "n6", "n7")
	f.stop("n5", false)
	w.more(10)
	answered := w.stop()
	f.once(f.same(), answered)
}

// A leader that is cut off steps down, and its time of contact stands still. What it was
// asked meanwhile is done when the cable is back.
func TestPartitionedLeader(t *testing.T) {
	f := newFlock(t, false, 3)
	f.countVoters(3)
	old := f.leader()
	first, _ := old.Reign()
	rest := slices.DeleteFunc(f.names(), func(o string) bool { return o == old.name() })
	w := f.write(rest...)
	w.more(10)
	cut := time.Now()
	f.fabric.split([]string{old.name()}, rest)
	result := make(chan error, 1)
	go func() {
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		_, err := old.Propose(ctx, "j", []byte("asked alone"))
		result <- err
	}()
	f.eventually("step down", func() error {
		if old.Leading() {
			return errors.New("it still leads")
		}
		return nil
	})
	next := f.leader(rest...)
	w.more(10)
	second, _ := next.Reign()
	if c := old.QuorumContact(first); c.After(cut.Add(testElection/2)) || c.After(second.Since) {
		t.Errorf("the old leader was cut off and had contact %v later", c.Sub(cut))
	}
	// The quorum answers all the time; when it is looked at, the machine may be busy.
	f.eventually("contact of the new leader", func() error {
		if since := time.Since(next.QuorumContact(second)); since > testElection {
			return fmt.Errorf("%v ago", since)
		}
		return nil
	})
	if c := next.QuorumContact(second); c.Before(cut) {
		t.Errorf("the new leader had contact %v ago", time.Since(c))
	}
	if err := next.CatchUp(t.Context()); err != nil {
		t.Error(err)
	}
	if err := old.CatchUp(t.Context()); !errors.Is(err, ErrNotLeader) {
		t.Errorf("the old leader takes itself for up to date: %v", err)
	}
	if r, leading := old.Reign(); leading || second.Term <= first.Term {
		t.Errorf("it leads: %v, since %+v; the reigns were %+v and %+v", leading, r, first, second)
	}
	f.fabric.heal()
	if err := <-result; err != nil {
		t.Errorf("after the cut: %v", err)
	}
	answered := append(w.stop(), "asked alone")
	f.once(f.same(), answered)
}

// With nobody to lead, proposals fail in time with a kind that the layers above know.
func TestNoQuorum(t *testing.T) {
	f := newFlock(t, false, 3)
	f.countVoters(3)
	f.stop("n2", false)
	f.stop("n3", false)
	ctx, cancel := context.WithTimeout(t.Context(), 4*testElection)
	defer cancel()
	if _, err := f.node("n1").Propose(ctx, "j", []byte("x")); !errors.Is(err, object.ErrUnavailable) {
		t.Errorf("propose without a quorum: %v", err)
	}
	if _, err := f.node("n1").Reconcile(t.Context(), nil); !errors.Is(err, ErrNotLeader) {
		t.Errorf("reconcile without the lead: %v", err)
	}
	if err := f.node("n1").Admit(t.Context(), "n9", true); !errors.Is(err, ErrNotLeader) {
		t.Errorf("admit without the lead: %v", err)
	}
}

// Of two nodes one votes: the loss of the other one is no harm, and without the voter
// nothing is decided.
func TestTwoNodes(t *testing.T) {
	f := newFlock(t, false, 2)
	f.voters("n1")
	f.stop("n2", false)
	if _, err := f.node("n1").Propose(t.Context(), "j", []byte("without n2")); err != nil {
		t.Error(err)
	}
	f.start("n2")
	f.ready("n2")
	if got := f.node("n2").journal.list(); !slices.Equal(got, []string{"without n2"}) {
		t.Errorf("n2 is ready and has %q", got)
	}
	f.stop("n1", false)
	ctx, cancel := context.WithTimeout(t.Context(), 5*testElection)
	defer cancel()
	if _, err := f.node("n2").Propose(ctx, "j", []byte("without n1")); !errors.Is(err, object.ErrUnavailable) {
		t.Errorf("without the voter: %v", err)
	}
	f.start("n1")
	f.ready("n2")
	for _, c := range f.same() {
		if c != "without n2" && c != "without n1" { // the latter may have come through, once
			t.Errorf("there is %q", c)
		}
	}
}

// A new node gets a snapshot when the log does not reach back; all of it survives a stop
// of all nodes, in any order.
func TestSnapshotsAndRestart(t *testing.T) {
	f := newFlock(t, false, 3)
	f.countVoters(3)
	for _, name := range f.names() {
		r := f.node(name).raft
		rc := r.ReloadableConfig()
		rc.TrailingLogs = 1
		if err := r.ReloadConfig(rc); err != nil {
			t.Fatal(err)
		}
	}
	// raft-wal forgets whole segments, so there must be more than one.
	var want []string
	padding := strings.Repeat("x", segmentBytes/15)
	for i := range 20 {
		want = append(want, fmt.Sprint("early ", i, padding))
		if _, err := f.node("n2").Propose(t.Context(), "j", []byte(want[i])); err != nil {
			t.Fatal(err)
		}
	}
	f.same()
	for _, name := range f.names() {
		if err := f.node(name).Snapshot(); err != nil {
			t.Fatal(err)
		}
	}
	f.join("n4")
	if got := f.node("n4").journal.list(); !slices.Equal(got, want) {
		t.Errorf("the new node has %d commands", len(got))
	}
	if n := f.node("n4"); n.raft.Stats()["last_snapshot_index"] == "0" {
		t.Error("it got no snapshot")
	}
	for i, name := range f.names() {
		want = append(want, "late "+name)
		if _, err := f.node(name).Propose(t.Context(), "j", []byte(want[20+i])); err != nil {
			t.Fatal(err)
		}
	}
	f.same()
	for _, name := range f.names() {
		f.stop(name, false)
	}
	for _, name := range []string{"n3", "n4", "n1", "n2"} {
		f.start(name)
	}
	for _, name := range f.names() {
		f.ready(name)
	}
	if got := f.same(); !slices.Equal(got, want) {
		t.Errorf("after a restart there are %d commands of %d, or others", len(got), len(want))
	}
	if _, err := f.node("n4").Propose(t.Context(), "j", []byte("after")); err != nil {
		t.Error(err)
	}
}

// A voter that comes back without its state must not vote on with what it has forgotten:
// it is removed first and joins anew.
func TestVoterLosesItsState(t *testing.T) {
	f := newFlock(t, false, 3)
	f.countVoters(3)
	leader := f.leader().name()
	victim := slices.DeleteFunc(f.names(), func(o string) bool { return o == leader })[0]
	if _, err := f.node(victim).Propose(t.Context(), "j", []byte("x")); err != nil {
		t.Fatal(err)
	}
	f.stop(victim, false)
	f.join(victim) // with an empty directory
	f.voters("n1", "n2", "n3")
	f.once(f.same(), []string{"x"})
	if err := f.leader().Admit(t.Context(), f.leader().name(), true); !errors.Is(err, object.ErrInvalid) {
		t.Errorf("the leader's name was given to another node: %v", err)
	}
	if err := f.leader().Admit(t.Context(), victim, false); err != nil {
		t.Errorf("admit a known node: %v", err)
	}
}

// Nodes leave, the leader among them.
func TestLeaving(t *testing.T) {
	f := newFlock(t, false, 4)
	f.countVoters(3)
	w := f.write("n4")
	w.more(5)
	for i, name := range []string{f.leader().name(), "n2", "n3"} {
		if f.node(name) == nil {
			continue
		}
		f.member(Member{Node: name, Zone: name, Leaving: true})
		f.eventually(name+" leaves", func() error {
			for _, s := range f.leader().Servers() {
				if s.Node == name {
					return errors.New("it is still there")
				}
			}
			return nil
		})
		f.stop(name, true)
		t.Logf("%d: %s is gone", i, name)
		w.more(5)
	}
	answered := w.stop()
	f.once(f.same(), answered)
}

// The only voter leads at once, whatever the election timeout.
func TestOnlyVoterIsQuick(t *testing.T) {
	f := newFlock(t, true, 0)
	f.stop("n1", true)
	l, err := Open(Config{
		Dir: f.dirs["n1"], Node: "n1", Machines: map[string]Machine{"j": new(journal)}, OnApply: func(string) {}, Logger: quiet,
		Transport: f.fabric.plug(t, "n1"), Forwarder: forwarder{f.fabric, "n1"}, Election: time.Minute,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := l.Ready(ctx); err != nil {
		t.Error(err)
	}
	reign, _ := l.Reign()
	if since := time.Since(l.QuorumContact(reign)); since > 10*time.Second { // of the election's minute
		t.Errorf("the only voter had contact %v ago", since)
	}
}

// within is a machine that runs what it is told where commands are applied.
type within struct{ run func() }

func (m *within) Apply([]byte) []byte       { m.run(); return nil }
func (m *within) Snapshot() ([]byte, error) { return nil, nil }
func (m *within) Restore([]byte) error      { return nil }

// What nobody can know any more is refused, unless the command was tried once only.
func TestForgottenCommands(t *testing.T) {
	c := config(bootstrapped(t))
	c.Machines["w"] = new(within)
	l := open(t, c)
	forget := func(upTo func() uint64) {
		c.Machines["w"].(*within).run = func() { l.host.window.forgot = upTo() }
		propose(t, l, "w", "", "")
	}
	propose(t, l, "a", "x", "1 x")
	forget(func() uint64 { return l.host.applied + 2 }) // as if a lagging node proposed
	propose(t, l, "a", "y", "2 y")
	forget(func() uint64 { return 1 << 40 }) // more than can be
	if _, err := l.Propose(t.Context(), "a", []byte("z")); !errors.Is(err, errForgotten) || !errors.Is(err, object.ErrUnavailable) {
		t.Errorf("a command that cannot be told from an older one: %v", err)
	}
}
