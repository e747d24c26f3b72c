package gates

import (
	"context"
	"sync/atomic"
	"testing"
	"time"

	"sheepdog/cluster/internal/peer"
	"sheepdog/cluster/internal/replica"
	"sheepdog/cluster/internal/replicas"
	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// emptyStore is a gateway node's.
type emptyStore struct{ replicas.Store }

func (emptyStore) Groups(context.Context) ([]object.Group, error) { return nil, nil }
func (emptyStore) Kick()                                          {}

// sink takes calls, and leaves it to the test to answer the last one.
type sink struct {
	calls int
	last  *peer.Call
}

func (s *sink) Submit(c *peer.Call) { s.calls, s.last = s.calls+1, c }
func (s *sink) Kick()               {}

// view has one partition, of which node 1 is the primary and node 2 waits or learns.
func view(epoch state.Epoch, waiting ...state.NodeID) *state.View {
	return &state.View{
		Cluster: state.Cluster{ID: "c", Partitions: 1}, Epoch: epoch,
		Nodes: []*state.Node{{ID: 1, Incarnation: 1, State: state.NodeUp}, {ID: 2, Incarnation: 1, State: state.NodeUp}},
		Policies: []*state.Policy{{ID: 1, Copies: 1, MinInSync: 1, Partitions: []state.Partition{
			{Epoch: epoch, ISR: []state.NodeID{1}, Targets: []state.NodeID{1}, Waiting: waiting},
		}}},
	}
}

// gatesOf are the gates of node 3, whose calls all go to the sink.
func gatesOf(t *testing.T, view func() *state.View, kickSoon func()) (*Gates, *sink, *replicas.Replicas) {
	t.Helper()
	to := &sink{}
	r, err := replicas.New(t.Context(), replicas.Config{
		Self: replica.Peer{Node: 3, Incarnation: 1}, Store: emptyStore{}, Peer: func(state.NodeID) replicas.Peer { return to },
		Propose: func(state.ChangeISR) {}, Fence: func(object.VID, uint64) error { return nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	return New(Config{
		Replicas: func() *replicas.Replicas { return r }, View: view, Fence: func(object.VID, uint64) error { return nil },
		Now: func() replica.Time { return 0 }, KickSoon: kickSoon, Retry: time.Millisecond, Timeout: time.Hour,
	}), to, r
}

func read(done func(*object.Request)) *object.Request {
	return &object.Request{Op: object.OpRead, SizeShift: 20, ID: object.DataID(1, 1), Policy: 1, Len: 4096, Data: make([]byte, 4096), Done: done}
}

// A client that is answered sends its next request, which another goroutine submits, and kicks, while the one that answers
// is still at work in the gate. The request goes on when that is done.
func TestLateRequestIsKicked(t *testing.T) {
	v := view(4)
	soon := 0
	g, to, r := gatesOf(t, func() *state.View { return v }, func() { soon++ })
	g.Submit(read(func(*object.Request) {
		other := make(chan struct{})
		go func() {
			defer close(other)
			g.Submit(read(func(*object.Request) {}))
			r.Kick()
		}()
		<-other
	}))
	if to.calls != 1 || soon > 0 {
		t.Fatalf("sent %d times, kicked %d times", to.calls, soon)
	}
	to.last.Err = object.ErrNotFound
	to.last.Done(to.last)
	if to.calls != 2 || soon == 0 {
		t.Errorf("sent %d times, kicked %d times afterwards", to.calls, soon)
	}
}

// A request for a partition that is undecided goes on when that is decided, also if no
// other request for it comes.
func TestUndecidedPartition(t *testing.T) {
	var v atomic.Pointer[state.View]
	v.Store(view(3, 2))
	g, to, _ := gatesOf(t, v.Load, func() {})
	g.Submit(read(func(*object.Request) {}))
	if to.calls != 0 {
		t.Fatal("it was sent to somebody who may not be the primary")
	}
	v.Store(view(4))
	g.Moved()
	if to.calls != 1 {
		t.Fatalf("sent %d times", to.calls)
	}
}

// held is a store that takes requests, and leaves it to the test when they end.
type held struct {
	emptyStore
	requests []*object.Request
}

func (h *held) Rotten() map[object.Key][]uint32 { return nil }
func (h *held) Tight(object.Group) bool         { return false }
func (h *held) Failed(object.Group) bool        { return false }
func (h *held) Submit(r *object.Request)        { h.requests = append(h.requests, r) }

// The owner of a volume that reads its own replica does not take what it finds there if a change of that has begun meanwhile, or
// one has failed: what is on one member alone may be undone.
func TestChangeOvertakesReadOfOwnReplica(t *testing.T) {
	v := view(4)
	v.Nodes = append(v.Nodes, &state.Node{ID: 3, Incarnation: 1, State: state.NodeUp})
	v.Policies[0].Partitions[0].ISR, v.Policies[0].Partitions[0].Targets = []state.NodeID{3}, []state.NodeID{3}
	for _, c := range []struct {
		name    string
		off     uint32
		outcome error
		ended   bool
		again   bool
	}{
		{name: "of something else", off: 4096},
		{name: "under way", again: true},
		{name: "done", ended: true},
		{name: "failed", ended: true, outcome: object.ErrNoSpace, again: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			store := &held{}
			r, err := replicas.New(t.Context(), replicas.Config{
				Self: replica.Peer{Node: 3, Incarnation: 1}, Store: store, Peer: func(state.NodeID) replicas.Peer { return nil },
				Propose: func(state.ChangeISR) {}, Fence: func(object.VID, uint64) error { return nil },
			})
			if err != nil {
				t.Fatal(err)
			}
			r.SetLease(time.Now().Add(time.Hour))
			r.SetState(v)
			g := New(Config{
				Replicas: func() *replicas.Replicas { return r }, View: func() *state.View { return v }, Fence: func(object.VID, uint64) error { return nil },
				Now: func() replica.Time { return 0 }, KickSoon: func() {}, Retry: time.Millisecond, Timeout: time.Hour,
			})
			answered := false
			own := read(func(*object.Request) { answered = true })
			own.Volume, own.Generation = 1, 1
			g.Submit(own)
			if len(store.requests) != 1 || store.requests[0].Op != object.OpRead {
				t.Fatalf("the owner does not read its own replica")
			}
			change := read(func(*object.Request) {})
			change.Op, change.Volume, change.Generation, change.Off = object.OpWrite, 1, 1, c.off
			g.Submit(change)
			if len(store.requests) != 2 || store.requests[1].Op != object.OpWrite {
				t.Fatalf("the change does not begin")
			}
			if c.ended {
				store.requests[1].Complete(c.outcome)
			}
			store.requests[0].Complete(nil)
			if answered == c.again {
				t.Errorf("the read is answered by what the replica had meanwhile: %v", answered)
			}
			for i := 1; i < len(store.requests); i++ {
				if r := store.requests[i]; r.Op == object.OpRead || !c.ended {
					r.Complete(nil)
				}
			}
			if !answered {
				t.Error("the read is not answered in the end")
			}
		})
	}
}
