package replicas

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"sheepdog/cluster/internal/peer"
	"sheepdog/cluster/internal/replica"
	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

var (
	errListing = fmt.Errorf("read directory: input/output error: %w", object.ErrIO)
	unread     = object.Group{Policy: 1}
)

// unreadable is a store that has a partition, and does not say what of it.
type unreadable struct {
	emptied
	mu    sync.Mutex
	sound bool
}

func (s *unreadable) Groups(context.Context) ([]object.Group, error) {
	return []object.Group{unread}, nil
}
func (s *unreadable) List(ctx context.Context, g object.Group, fn func(object.Info) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.sound && !s.abandoned {
		return errListing
	}
	return s.emptied.List(ctx, g, fn)
}

func (s *unreadable) repair() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sound = true
}

// loader is a node with such a store, in a test with a clock of its own.
type loader struct {
	*Replicas
	t     *testing.T
	local *peer.Local

	mu       sync.Mutex
	proposed []state.ChangeISR
}

func newLoader(t *testing.T, s Store) *loader {
	l := &loader{t: t}
	r, err := New(t.Context(), Config{
		Self: replica.Peer{Node: 1, Incarnation: 1}, Store: s,
		Fence: func(object.VID, uint64) error { return nil }, Peer: func(state.NodeID) Peer { return nil },
		Propose: func(c state.ChangeISR) {
			l.mu.Lock()
			defer l.mu.Unlock()
			if !slices.Contains(l.proposed, c) {
				l.proposed = append(l.proposed, c)
			}
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	if l.local, err = peer.NewLocal(Errors); err != nil {
		t.Fatal(err)
	}
	l.Replicas = r
	r.SetLease(time.Now().Add(time.Hour))
	return l
}

func (l *loader) view(epoch state.Epoch, isr, learners, former []state.NodeID) {
	l.SetState(&state.View{
		Cluster: state.Cluster{ID: "c", Partitions: 1}, Epoch: epoch,
		Nodes: []*state.Node{{ID: 1, Incarnation: 1, State: state.NodeUp}, {ID: 2, Incarnation: 1, State: state.NodeUp}},
		Policies: []*state.Policy{{ID: 1, Copies: 2, MinInSync: 1, Partitions: []state.Partition{
			{Epoch: epoch, ISR: isr, Learners: learners, Former: former, Targets: []state.NodeID{1, 2}},
		}}},
	})
}

func (l *loader) wanted() []state.ChangeISR {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.proposed)
}

// read begins to read as a client does.
func (l *loader) read() <-chan error {
	done := make(chan error, 1)
	l.Submit(&Task{Group: unread, Epoch: 3, Verb: VerbList, Len: 1, Done: func(t *Task) { done <- t.Err }})
	l.Kick()
	return done
}

// asked has node 2 ask something under an epoch.
func (l *loader) asked(op uint16, class peer.Class, epoch state.Epoch) <-chan error {
	answered := make(chan error, 1)
	q := question{route{unread, epoch, 1}, 1}
	l.Handle(l.local.Request(&peer.Identity{Node: 2, Incarnation: 1}, &peer.Call{Class: class, Op: op, Head: q.append(nil), Want: 4096}, func(_ *peer.Request, err error) {
		answered <- err
	}))
	l.Kick()
	return answered
}

// within is what comes in a time.
func (l *loader) within(d time.Duration, c <-chan error, what string) error {
	l.t.Helper()
	for range d / tickEvery {
		l.Tick()
		synctest.Wait()
		select {
		case err := <-c:
			return err
		case <-time.After(tickEvery):
		}
	}
	l.t.Fatalf("%s: no answer in %v", what, d)
	return nil
}

func (l *loader) pass(d time.Duration) {
	for range d / tickEvery {
		l.Tick()
		time.Sleep(tickEvery)
		synctest.Wait()
	}
}

// A node that cannot tell what it has of a partition leaves it to others that are in sync: as its primary it would keep all clients
// waiting for as long as its disk does that, for it is up, and others ask it in vain. Clients are refused meanwhile, as by a primary that
// serves. Who takes over is told that this node does not serve, and as a learner it begins when its disk says what it has.
func TestWhatCannotBeListedIsLeftToOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &unreadable{emptied: emptied{only: true, objects: map[object.ID]bool{7: true}}}
		l := newLoader(t, s)
		defer l.Close()
		l.view(3, []state.NodeID{1, 2}, nil, nil)
		if err := l.within(6*time.Second, l.read(), "a client"); !errors.Is(err, replica.ErrRetry) {
			t.Errorf("a client is told %v", err)
		}
		l.pass(6 * time.Second)
		if got, want := l.wanted(), (state.ChangeISR{Policy: 1, Epoch: 3, Remove: 1}); !slices.Equal(got, []state.ChangeISR{want}) {
			t.Fatalf("proposed is %+v, not %+v", got, want)
		}
		early := l.asked(opSurvey, peer.Commit, 4)
		l.view(4, []state.NodeID{2}, []state.NodeID{1}, []state.NodeID{1})
		for _, c := range []<-chan error{early, l.asked(opSurvey, peer.Commit, 4)} {
			if err := l.within(100*time.Millisecond, c, "who takes over"); err != nil {
				t.Errorf("who takes over is told %v", err)
			}
		}
		if err := l.within(6*time.Second, l.asked(opAsk, peer.Bulk, 4), "who has it learn"); !errors.Is(err, object.ErrIO) {
			t.Errorf("who has it learn is told %v", err)
		}
		l.pass(20 * time.Second)
		if got := l.wanted(); len(got) > 1 {
			t.Errorf("a learner has proposed %+v", got[1:])
		}
		s.repair()
		if err := l.within(6*time.Second, l.asked(opAsk, peer.Bulk, 4), "who has it learn"); err != nil {
			t.Errorf("when the disk answers again: %v", err)
		}
	})
}

// The last member stays what it is: nobody else has what it has. It says so, and serves when its disk says what is there.
func TestLastMemberStaysThoughItCannotList(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &unreadable{emptied: emptied{only: true, objects: map[object.ID]bool{7: true}}}
		l := newLoader(t, s)
		defer l.Close()
		l.view(3, []state.NodeID{1}, []state.NodeID{2}, nil)
		for range 3 {
			if err := l.within(6*time.Second, l.read(), "a client"); !errors.Is(err, replica.ErrRetry) {
				t.Errorf("a client is told %v", err)
			}
		}
		if got := l.wanted(); len(got) > 0 {
			t.Errorf("proposed is %+v", got)
		}
		if u := l.Unlisted(); u.Unserved != 1 || u.Example != unread || !errors.Is(u.Err, errListing) {
			t.Errorf("what is told is %+v", u)
		}
		p := l.all()[0]
		if l.pass(10 * time.Second); len(p.waiting) > 0 {
			t.Errorf("%d events wait", len(p.waiting))
		}
		s.repair()
		l.pass(6 * time.Second)
		if err := l.within(time.Second, l.read(), "a client"); err != nil {
			t.Errorf("when the disk answers again a client is told %v", err)
		}
		if u := l.Unlisted(); u.Unserved != 0 {
			t.Errorf("when the disk answers again there is %+v", u)
		}
	})
}

// Of a disk that is out of service from the start a learner goes to another one: nothing there can be listed, ever.
func TestLearnerLeavesADiskThatCannotBeListed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &unreadable{emptied: emptied{failed: true, objects: map[object.ID]bool{7: true}}}
		l := newLoader(t, s)
		defer l.Close()
		l.cfg.Marks = map[object.Group]replica.Mark{unread: {Epoch: 2, Seq: 9}}
		l.view(3, []state.NodeID{2}, []state.NodeID{1}, nil)
		if err := l.within(6*time.Second, l.asked(opAsk, peer.Bulk, 3), "who has it learn"); err != nil {
			t.Errorf("on another disk: %v", err)
		}
		if len(s.objects) > 0 {
			t.Errorf("on the other disk there is %v", s.objects)
		}
		if m, ok := l.Marks()[unread]; ok {
			t.Errorf("the mark %v of what was on the other disk is kept", m)
		}
	})
}
