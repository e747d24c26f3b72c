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

// sink takes calls and does not answer.
type sink struct{ calls int }

func (s *sink) Submit(*peer.Call) { s.calls++ }
func (s *sink) Kick()             {}

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

// A request for a partition that is undecided goes on when that is decided, also if no
// other request for it comes.
func TestUndecidedPartition(t *testing.T) {
	var v atomic.Pointer[state.View]
	v.Store(view(3, 2))
	to := &sink{}
	r, err := replicas.New(context.Background(), replicas.Config{
		Self: replica.Peer{Node: 3, Incarnation: 1}, Store: emptyStore{}, Peer: func(state.NodeID) replicas.Peer { return to },
		Propose: func(state.ChangeISR) {}, Fence: func(object.VID, uint64) error { return nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	g := New(Config{
		Replicas: func() *replicas.Replicas { return r }, View: v.Load, Fence: func(object.VID, uint64) error { return nil },
		Now: func() replica.Time { return 0 }, KickSoon: func() {}, Retry: time.Millisecond, Timeout: time.Hour,
	})
	g.Submit(&object.Request{
		Op: object.OpRead, SizeShift: 20, ID: object.DataID(1, 1), Policy: 1, Len: 4096, Data: make([]byte, 4096), Done: func(*object.Request) {},
	})
	if to.calls != 0 {
		t.Fatal("it was sent to somebody who may not be the primary")
	}
	v.Store(view(4))
	g.Moved()
	if to.calls != 1 {
		t.Fatalf("sent %d times", to.calls)
	}
}
