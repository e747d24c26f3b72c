package replicas

import (
	"context"
	"errors"
	"testing"
	"time"

	"sheepdog/cluster/internal/peer"
	"sheepdog/cluster/internal/replica"
	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// held is a store that takes requests, and leaves it to the test when they end.
type held struct {
	Store
	requests []*object.Request
}

func (h *held) Groups(context.Context) ([]object.Group, error) { return nil, nil }
func (h *held) Rotten() map[object.Key][]uint32                { return nil }
func (h *held) Tight(object.Group) bool                        { return false }
func (h *held) Failed(object.Group) bool                       { return false }
func (h *held) Kick()                                          {}
func (h *held) Submit(r *object.Request)                       { h.requests = append(h.requests, r) }

// A request that comes while another goroutine is at work in its partition goes on when that is done, when who submitted it
// has kicked already. Nobody else may come for long.
func TestLateRequestIsKicked(t *testing.T) {
	var store held
	self := replica.Peer{Node: 1, Incarnation: 1}
	r, err := New(t.Context(), Config{
		Self: self, Store: &store, Peer: func(state.NodeID) Peer { return nil },
		Propose: func(state.ChangeISR) {}, Fence: func(object.VID, uint64) error { return nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	r.SetLease(time.Now().Add(time.Hour))
	r.SetState(&state.View{
		Cluster: state.Cluster{ID: "c", Partitions: 1}, Epoch: 1, Nodes: []*state.Node{{ID: 1, Incarnation: 1, State: state.NodeUp}},
		Policies: []*state.Policy{{ID: 1, Copies: 1, MinInSync: 1, Partitions: []state.Partition{{Epoch: 1, ISR: []state.NodeID{1}, Targets: []state.NodeID{1}}}}},
	})
	for r.Pump() {
	}
	write := func(id object.ID, done func(*Task)) *Task {
		return &Task{Group: object.Group{Policy: 1}, Epoch: 1, Verb: VerbWrite, SizeShift: 22, ID: id, Len: 4096, Data: make([]byte, 4096), Done: done}
	}
	r.Submit(write(object.DataID(1, 1), func(task *Task) {
		if task.Err != nil {
			t.Error(task.Err)
		}
		other := make(chan struct{})
		go func() {
			defer close(other)
			r.Submit(write(object.DataID(1, 2), func(*Task) {}))
			r.Kick()
		}()
		<-other
	}))
	if len(store.requests) != 1 {
		t.Fatalf("the store has %d requests of the first write", len(store.requests))
	}
	store.requests[0].Complete(nil)
	if len(store.requests) != 2 {
		t.Fatalf("the store has %d requests of both writes", len(store.requests))
	}
	if !r.Pump() {
		t.Error("nobody kicks what came late")
	}
}

// A node that never answers does not keep who asked for ever.
func TestForwardHasADeadline(t *testing.T) {
	to := new(lastCall)
	r := &Replicas{}
	r.cfg.Peer = func(state.NodeID) Peer { return to }
	for _, at := range []time.Time{time.Now(), {}} {
		f := &Forward{Deadline: at, Task: Task{Verb: VerbRead, ID: 7, SizeShift: 22, Len: 4096, Data: make([]byte, 4096)}}
		done := false
		r.Forward(replica.Peer{Node: 2, Incarnation: 5}, 1, f, func(*Task) { done = true })
		if !to.Deadline.Equal(at) {
			t.Errorf("the call ends at %v, not %v", to.Deadline, at)
		}
		to.Err = peer.ErrTimeout
		if to.Done(to.Call); !done || !errors.Is(f.Err, replica.ErrRetry) {
			t.Errorf("the attempt ends with %v", f.Err)
		}
	}
}

// asleep is a store of which one question takes until the test wants.
type asleep struct {
	held
	asked, answer chan struct{}
}

func (s *asleep) Failed(g object.Group) bool {
	if g.Partition == 1 {
		s.asked <- struct{}{}
		<-s.answer
	}
	return false
}

// A state is followed when all partitions have taken note of it, and who waits for that hears of it then.
func TestAwaitFollowed(t *testing.T) {
	store := &asleep{asked: make(chan struct{}, 1), answer: make(chan struct{})}
	r, err := New(t.Context(), Config{
		Self: replica.Peer{Node: 1, Incarnation: 1}, Store: store, Peer: func(state.NodeID) Peer { return nil },
		Propose: func(state.ChangeISR) {}, Fence: func(object.VID, uint64) error { return nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	policy := &state.Policy{ID: 1, Copies: 1, MinInSync: 1}
	for range 2 {
		policy.Partitions = append(policy.Partitions, state.Partition{Epoch: 4, ISR: []state.NodeID{2}, Learners: []state.NodeID{1}, Targets: []state.NodeID{2, 1}})
	}
	v := &state.View{
		Cluster: state.Cluster{ID: "c", Partitions: 2}, Epoch: 5, Policies: []*state.Policy{policy},
		Nodes: []*state.Node{{ID: 1, Incarnation: 1, State: state.NodeDown}, {ID: 2, Incarnation: 1, State: state.NodeUp}},
	}
	followed, told := make(chan error, 1), make(chan struct{})
	go func() { followed <- r.AwaitFollowed(t.Context(), 5) }()
	go func() {
		r.SetState(v)
		close(told)
	}()
	<-store.asked // in the midst of it
	soon, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if err := r.AwaitFollowed(soon, 5); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("while a partition is being told: %v", err)
	}
	select {
	case err := <-followed:
		t.Errorf("a state is followed before a partition knows it: %v", err)
	default:
	}
	close(store.answer)
	<-told
	if err := <-followed; err != nil {
		t.Error(err)
	}
	if err := r.AwaitFollowed(t.Context(), 5); err != nil {
		t.Error(err)
	}
}
