package replicas

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"sheepdog/cluster/internal/peer"
	"sheepdog/cluster/internal/replica"
	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// slow is a store that has a group, and tells nothing of it as long as it is waited for.
type slow struct {
	Store
	group object.Group
}

func (s *slow) Groups(context.Context) ([]object.Group, error) { return []object.Group{s.group}, nil }
func (s *slow) Rotten() map[object.Key][]uint32                { return nil }
func (s *slow) Kick()                                          {}
func (s *slow) List(ctx context.Context, _ object.Group, _ func(object.Info) error) error {
	<-ctx.Done()
	return ctx.Err()
}

// What waits for an epoch, or for this node to know what it has, is refused when the replicas end: nobody tells them any more
// what becomes of it, and who asked waits for the answer, as the end of the connection to him does.
func TestCloseRefusesWhatWaits(t *testing.T) {
	unread := object.Group{Policy: 1, Partition: 1}
	r, err := New(t.Context(), Config{
		Self: replica.Peer{Node: 1, Incarnation: 1}, Store: &slow{group: unread},
		Fence: func(object.VID, uint64) error { return nil }, Peer: func(state.NodeID) Peer { return nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	policy := &state.Policy{ID: 1, Partitions: make([]state.Partition, 3)}
	for i := range policy.Partitions {
		policy.Partitions[i].Absent = true // nobody has it yet
	}
	r.SetState(&state.View{Epoch: 1, Policies: []*state.Policy{policy}})
	done := make(chan error, 4)
	submit := func(g object.Group) {
		r.Submit(&Task{Group: g, Epoch: 7, Verb: VerbRead, SizeShift: 22, Len: 4096, Data: make([]byte, 4096), Done: func(t *Task) { done <- t.Err }})
	}
	submit(object.Group{Policy: 1, Partition: 0})
	submit(unread)
	if len(done) > 0 {
		t.Fatalf("what is of an epoch that has not come is answered: %v", <-done)
	}
	r.Close()
	for range 2 {
		select {
		case err := <-done:
			if !errors.Is(err, replica.ErrRetry) {
				t.Errorf("it is answered with %v", err)
			}
		case <-time.After(20 * time.Second):
			t.Fatal("it is not answered")
		}
	}
	if marks := r.Marks(); len(marks) > 0 {
		t.Errorf("marks of what nobody knows: %v", marks)
	}
	submit(object.Group{Policy: 1, Partition: 2})
	if err := <-done; !errors.Is(err, object.ErrClosed) {
		t.Errorf("afterwards: %v", err)
	}
	if r.part(object.Group{Policy: 1, Partition: 2}) != nil {
		t.Error("a partition begins afterwards")
	}
}

// Who waits for what is under way does not mind that more begins.
func TestWorksMayBegin(t *testing.T) {
	var w works
	w.ended.L = &w.mu
	var begin sync.WaitGroup
	for range 4 {
		begin.Go(func() {
			for range 1000 {
				w.Go(func() {})
			}
		})
	}
	for range 100 {
		w.Wait()
	}
	begin.Wait()
	w.Wait()
	if w.n != 0 {
		t.Errorf("%d are left", w.n)
	}
}

// silent is a node that answers nothing.
type silent struct{ calls chan *peer.Call }

func (s silent) Submit(c *peer.Call) { s.calls <- c }
func (silent) Kick()                 {}

// lacking is a store that has nothing.
type lacking struct{ held }

func (*lacking) Stat(context.Context, object.Key) (object.Info, error) {
	return object.Info{}, object.ErrNotFound
}

// Who waits for what another node has is through when the replicas end: the other one may wait for a disk that has hung.
func TestCloseEndsRepairs(t *testing.T) {
	first, self := replica.Peer{Node: 1, Incarnation: 1}, replica.Peer{Node: 2, Incarnation: 1}
	other := silent{make(chan *peer.Call, 1)}
	r, err := New(t.Context(), Config{
		Self: self, Store: new(lacking), Peer: func(state.NodeID) Peer { return other },
		Propose: func(state.ChangeISR) {}, Fence: func(object.VID, uint64) error { return nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	r.SetState(&state.View{
		Cluster: state.Cluster{ID: "c", Partitions: 1}, Epoch: 1,
		Nodes:    []*state.Node{{ID: 1, Incarnation: 1, State: state.NodeUp}, {ID: 2, Incarnation: 1, State: state.NodeUp}},
		Policies: []*state.Policy{{ID: 1, Copies: 2, MinInSync: 1, Partitions: []state.Partition{{Epoch: 1, ISR: []state.NodeID{1, 2}, Targets: []state.NodeID{1, 2}}}}},
	})
	local, err := peer.NewLocal(Errors)
	if err != nil {
		t.Fatal(err)
	}
	m := change{route: route{object.Group{Policy: 1}, 1, self.Incarnation}, action: action{id: 7}}
	answer := make(chan error, 1)
	c := &peer.Call{Class: peer.Commit, Op: opRepair, Head: m.append(nil)}
	r.Handle(local.Request(&peer.Identity{Node: first.Node, Incarnation: first.Incarnation}, c, func(_ *peer.Request, err error) { answer <- err }))
	pull := <-other.calls
	closed := make(chan struct{})
	go func() {
		r.Close()
		close(closed)
	}()
	select {
	case <-closed:
	case <-time.After(20 * time.Second):
		t.Fatal("they do not end")
	}
	if err := <-answer; !errors.Is(err, object.ErrClosed) {
		t.Errorf("the repair ends with %v", err)
	}
	pull.Err = peer.ErrDisconnected
	pull.Done(pull) // nobody minds
}
