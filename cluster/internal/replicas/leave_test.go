package replicas

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"sheepdog/cluster/internal/peer"
	"sheepdog/cluster/internal/replica"
	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// emptied is a store of two disks, of which the first goes out of service: what was there is not on the other one.
type emptied struct {
	Store
	failed, abandoned bool
	only              bool               // there is no other disk
	objects           map[object.ID]bool // where the group lives
}

func (s *emptied) Groups(context.Context) ([]object.Group, error) { return nil, nil }
func (s *emptied) Rotten() map[object.Key][]uint32                { return nil }
func (s *emptied) Tight(object.Group) bool                        { return false }
func (s *emptied) Failed(object.Group) bool                       { return s.failed && !s.abandoned }
func (s *emptied) Kick()                                          {}
func (s *emptied) Delete(_ context.Context, k object.Key) error   { delete(s.objects, k.ID); return nil }
func (s *emptied) Abandon(object.Group) bool {
	if s.only {
		return false
	}
	s.abandoned, s.objects = true, map[object.ID]bool{}
	return true
}
func (s *emptied) List(_ context.Context, g object.Group, fn func(object.Info) error) error {
	for id := range s.objects {
		if err := fn(object.Info{Key: object.Key{Group: g, ID: id}}); err != nil {
			return err
		}
	}
	return nil
}
func (s *emptied) Submit(r *object.Request) {
	if r.Op == object.OpWrite {
		s.objects[r.ID] = true
	}
	r.Complete(nil)
}

// What the primary has brought to a learner is there as long as it counts on that: a disk that goes meanwhile is left in the next
// epoch, in which the primary asks anew what the learner has. Else it would have it in sync without.
func TestLearnerLeavesItsDiskBetweenEpochs(t *testing.T) {
	first := replica.Peer{Node: 1, Incarnation: 1}
	self := replica.Peer{Node: 2, Incarnation: 1}
	store := &emptied{objects: map[object.ID]bool{}}
	var proposed []state.ChangeISR
	r, err := New(t.Context(), Config{
		Self: self, Store: store, Peer: func(state.NodeID) Peer { return nil }, Fence: func(object.VID, uint64) error { return nil },
		Propose: func(c state.ChangeISR) { proposed = append(proposed, c) },
	})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	local, err := peer.NewLocal(Errors)
	if err != nil {
		t.Fatal(err)
	}
	view := func(epoch state.Epoch) {
		r.SetState(&state.View{
			Cluster: state.Cluster{ID: "c", Partitions: 1}, Epoch: epoch,
			Nodes: []*state.Node{{ID: 1, Incarnation: 1, State: state.NodeUp}, {ID: 2, Incarnation: 1, State: state.NodeUp}},
			Policies: []*state.Policy{{ID: 1, Copies: 2, MinInSync: 1, Partitions: []state.Partition{
				{Epoch: epoch, ISR: []state.NodeID{1}, Learners: []state.NodeID{2}, Targets: []state.NodeID{1, 2}},
			}}},
		})
	}
	group := object.Group{Policy: 1}
	// call has this node carry out a call of the primary.
	call := func(c *peer.Call) (data []byte, err error) {
		t.Helper()
		done := make(chan struct{})
		req := local.Request(&peer.Identity{Node: first.Node, Incarnation: first.Incarnation}, c, func(r *peer.Request, e error) {
			data, err = slices.Clone(r.ReplyData), e
			close(done)
		})
		r.Handle(req)
		r.Kick()
		select {
		case <-done:
		case <-time.After(20 * time.Second):
			t.Fatal("no answer")
		}
		return data, err
	}
	ask := func(epoch state.Epoch, session uint32) []object.ID {
		t.Helper()
		q := question{route{group, epoch, self.Incarnation}, session}
		data, err := call(&peer.Call{Class: peer.Bulk, Op: opAsk, Head: q.append(nil), Want: 4096})
		if err != nil {
			t.Fatal(err)
		}
		_, have, err := decodeReport(data)
		if err != nil {
			t.Fatal(err)
		}
		return have
	}
	change := func(epoch state.Epoch, seq uint64, id object.ID) error {
		m := change{
			route: route{group, epoch, self.Incarnation}, session: 1, version: object.Version{Epoch: uint64(epoch), Seq: seq},
			action: action{verb: VerbWrite, shift: 22, id: id, len: 4096},
		}
		data := make([]byte, 4096)
		var c content
		c.of(0, data)
		m.sum = c.sum
		_, err := call(&peer.Call{Class: peer.Commit, Op: opChange, Head: m.append(nil), Data: data})
		return err
	}
	sync := func(epoch state.Epoch) error {
		q := question{route: route{group, epoch, self.Incarnation}}
		_, err := call(&peer.Call{Class: peer.Commit, Op: opSync, Head: q.append(nil)})
		return err
	}

	view(1)
	if have := ask(1, 1); len(have) > 0 {
		t.Fatalf("a learner that has nothing has %v", have)
	}
	if err := change(1, 1, 7); err != nil {
		t.Fatal(err)
	}
	if err := sync(1); err != nil {
		t.Fatal(err)
	}
	store.failed = true
	if err := sync(1); !errors.Is(err, object.ErrIO) {
		t.Errorf("what is on a disk that is out of service is said to be durable: %v", err)
	}
	r.leaveDisks()
	if !store.objects[7] {
		t.Error("what the primary has brought is gone, and it does not know")
	}
	want := state.ChangeISR{Policy: 1, Epoch: 1, Remove: self.Node}
	if len(proposed) != 1 || proposed[0] != want {
		t.Fatalf("proposed is %+v, not %+v", proposed, want)
	}
	// There is no other disk: it is not tried again soon, for every epoch keeps clients waiting.
	store.only = true
	view(2)
	ask(2, 1)
	r.leaveDisks()
	r.leaveDisks()
	if !store.objects[7] || len(proposed) != 1 {
		t.Fatalf("without another disk there is %v, and proposed is %+v", store.objects, proposed)
	}
	store.only = false // some other reason begins the next epoch
	view(3)
	if !store.abandoned {
		t.Fatal("the disk is not left in the next epoch")
	}
	if have := ask(3, 1); len(have) > 0 {
		t.Errorf("the primary is told of %v", have)
	}
	if err := change(3, 1, 8); err != nil {
		t.Fatal(err)
	}
	if err := sync(3); err != nil || !store.objects[8] {
		t.Errorf("on the next disk: %v, %v", store.objects, err)
	}
}

// A learner that has heard of the primary's question before it hears of the epoch leaves its disk all the same before it answers: else every
// epoch that begins so that it can would begin in vain.
func TestLearnerLeavesItsDiskBeforeItAnswers(t *testing.T) {
	self, other := replica.Peer{Node: 2, Incarnation: 1}, replica.Peer{Node: 1, Incarnation: 1}
	store := &emptied{objects: map[object.ID]bool{7: true}}
	r, err := New(t.Context(), Config{
		Self: self, Store: store, Peer: func(state.NodeID) Peer { return nil }, Fence: func(object.VID, uint64) error { return nil },
		Propose: func(c state.ChangeISR) { t.Errorf("proposed is %+v", c) },
	})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	local, err := peer.NewLocal(Errors)
	if err != nil {
		t.Fatal(err)
	}
	view := func(epoch state.Epoch) {
		r.SetState(&state.View{
			Cluster: state.Cluster{ID: "c", Partitions: 1}, Epoch: epoch,
			Nodes: []*state.Node{{ID: 1, Incarnation: 1, State: state.NodeUp}, {ID: 2, Incarnation: 1, State: state.NodeUp}},
			Policies: []*state.Policy{{ID: 1, Copies: 2, MinInSync: 1, Partitions: []state.Partition{
				{Epoch: epoch, ISR: []state.NodeID{1}, Learners: []state.NodeID{2}, Targets: []state.NodeID{1, 2}},
			}}},
		})
	}
	view(1)
	store.failed = true
	q := question{route{object.Group{Policy: 1}, 2, self.Incarnation}, 1}
	var have []object.ID
	answered := make(chan error, 1)
	req := local.Request(&peer.Identity{Node: other.Node, Incarnation: other.Incarnation}, &peer.Call{Class: peer.Bulk, Op: opAsk, Head: q.append(nil), Want: 4096}, func(r *peer.Request, err error) {
		if err == nil {
			_, have, err = decodeReport(r.ReplyData)
		}
		answered <- err
	})
	r.Handle(req)
	r.Kick()
	view(2)
	r.leaveDisks()
	select {
	case err := <-answered:
		if err != nil || len(have) > 0 || !store.abandoned {
			t.Errorf("the primary is told of %v (%v), the disk is left: %v", have, err, store.abandoned)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("no answer")
	}
}

// leftMidway is a store whose disk goes, and is left, while it is asked about an object.
type leftMidway struct {
	emptied
	leave func()
}

func (s *leftMidway) Stat(_ context.Context, k object.Key) (object.Info, error) {
	return object.Info{Key: k, SizeShift: 22, Version: object.Version{Epoch: 1, Seq: 1}}, nil
}
func (s *leftMidway) Sums(context.Context, object.Key) ([]uint64, error) {
	s.leave()
	return nil, object.ErrNotFound
}
func (s *leftMidway) Submit(r *object.Request) {
	if r.Op == object.OpRead {
		s.leave()
		r.Complete(object.ErrNotFound)
		return
	}
	s.emptied.Submit(r)
}

// A former primary whose disk is left while a member takes an object from it does not say that the object is not there: the member,
// which is the primary now, would remove its own.
func TestWhatIsLeftMidwayIsNotMissing(t *testing.T) {
	self, other := replica.Peer{Node: 1, Incarnation: 1}, replica.Peer{Node: 2, Incarnation: 1}
	for _, op := range []uint16{opSums, opBlocks} {
		store := &leftMidway{emptied: emptied{objects: map[object.ID]bool{7: true}}}
		r, err := New(t.Context(), Config{
			Self: self, Store: store, Peer: func(state.NodeID) Peer { return unsound{} }, Fence: func(object.VID, uint64) error { return nil },
			Propose: func(state.ChangeISR) {},
		})
		if err != nil {
			t.Fatal(err)
		}
		local, err := peer.NewLocal(Errors)
		if err != nil {
			t.Fatal(err)
		}
		view := func(p state.Partition) {
			p.Targets = []state.NodeID{2, 1}
			r.SetState(&state.View{
				Cluster: state.Cluster{ID: "c", Partitions: 1}, Epoch: p.Epoch,
				Nodes:    []*state.Node{{ID: 1, Incarnation: 1, State: state.NodeUp}, {ID: 2, Incarnation: 1, State: state.NodeUp}},
				Policies: []*state.Policy{{ID: 1, Copies: 2, MinInSync: 1, Partitions: []state.Partition{p}}},
			})
		}
		view(state.Partition{Epoch: 1, ISR: []state.NodeID{1, 2}})
		store.leave = func() {
			store.failed = true
			view(state.Partition{Epoch: 2, ISR: []state.NodeID{2}, Learners: []state.NodeID{1}})
		}
		m := pull{route: route{object.Group{Policy: 1}, 1, self.Incarnation}, id: 7, len: 4096}
		c := &peer.Call{Class: peer.Bulk, Op: op, Head: m.append(nil), ReplyData: make([]byte, 4096), Want: 4096}
		answered := make(chan error, 1)
		r.Handle(local.Request(&peer.Identity{Node: other.Node, Incarnation: other.Incarnation}, c, func(_ *peer.Request, err error) { answered <- err }))
		r.Kick()
		select {
		case err := <-answered:
			if !errors.Is(err, replica.ErrEpoch) || !store.abandoned {
				t.Errorf("operation %d is answered with %v, the disk is left: %v", op, err, store.abandoned)
			}
		case <-time.After(20 * time.Second):
			t.Fatal("no answer")
		}
		r.Close()
	}
}

// unsound is a member of partitions that cannot be made equal to the primary.
type unsound struct{}

func (unsound) Kick() {}
func (unsound) Submit(c *peer.Call) {
	switch c.Op {
	case opSurvey:
		c.ReplyData = appendReport(nil, replica.Report{Recent: []object.ID{7}}, nil)
	default:
		c.Err = object.ErrIO
	}
	c.Done(c)
}

// A primary whose disk is out of service does not have a member taken out that could not be made equal to it: that one has what the
// primary has not any more. It goes itself.
func TestPrimaryWithoutItsDiskGoesItself(t *testing.T) {
	self, other := replica.Peer{Node: 1, Incarnation: 1}, replica.Peer{Node: 2, Incarnation: 1}
	for _, failed := range []bool{true, false} {
		proposed := make(chan state.ChangeISR, 1000)
		r, err := New(t.Context(), Config{
			Self: self, Store: &emptied{failed: failed, only: true, objects: map[object.ID]bool{}}, Peer: func(state.NodeID) Peer { return unsound{} },
			Fence: func(object.VID, uint64) error { return nil }, Propose: func(c state.ChangeISR) { proposed <- c },
			AckTimeout: 10 * time.Millisecond, Resend: time.Millisecond,
		})
		if err != nil {
			t.Fatal(err)
		}
		r.SetLease(time.Now().Add(time.Hour))
		r.SetState(&state.View{
			Cluster: state.Cluster{ID: "c", Partitions: 1}, Epoch: 3,
			Nodes: []*state.Node{{ID: 1, Incarnation: 1, State: state.NodeDown}, {ID: 2, Incarnation: 1, State: state.NodeUp}},
			Policies: []*state.Policy{{ID: 1, Copies: 2, MinInSync: 1, Partitions: []state.Partition{
				{Epoch: 3, ISR: []state.NodeID{1, 2}, Targets: []state.NodeID{1, 2}},
			}}},
		})
		want := other.Node
		if failed {
			want = self.Node
		}
		for end := time.After(20 * time.Second); len(proposed) == 0; {
			r.Tick()
			select {
			case <-end:
				t.Fatal("nobody is to be taken out")
			case <-time.After(time.Millisecond):
			}
		}
		if c := <-proposed; c.Remove != want {
			t.Errorf("with its disk failed %v, the primary would have node %d taken out, not %d", failed, c.Remove, want)
		}
		r.Close()
	}
}
