package replicas

import (
	"errors"
	"testing"
	"time"

	"sheepdog/cluster/internal/peer"
	"sheepdog/cluster/internal/replica"
	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// lost is a node that has nothing in doubt, and is not reached by changes.
type lost struct{}

func (lost) Submit(c *peer.Call) {
	if c.Op == opSurvey {
		c.ReplyData = appendReport(nil, replica.Report{}, nil)
	} else {
		c.Err = peer.ErrDisconnected
	}
	c.Done(c)
}
func (lost) Kick() {}

// A change that is given up because a member is not reached, and nobody says that it is none any more, is under way until an epoch
// decides what becomes of it: who takes the volume over waits for that.
func TestGivenUpChangeIsUnderWay(t *testing.T) {
	store := new(held)
	renew := false
	r, err := New(t.Context(), Config{
		Self: replica.Peer{Node: 1, Incarnation: 1}, Store: store, Peer: func(state.NodeID) Peer { return lost{} },
		Propose: func(c state.ChangeISR) { renew = renew || c.Renew }, Fence: func(object.VID, uint64) error { return nil },
		AckTimeout: 20 * time.Millisecond, Resend: 10 * time.Millisecond,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	view := func(epoch state.Epoch) {
		r.SetState(&state.View{
			Cluster: state.Cluster{ID: "c", Partitions: 1}, Epoch: epoch,
			Nodes:    []*state.Node{{ID: 1, Incarnation: 1, State: state.NodeUp}, {ID: 2, Incarnation: 1, State: state.NodeUp}},
			Policies: []*state.Policy{{ID: 1, Copies: 2, MinInSync: 1, Partitions: []state.Partition{{Epoch: epoch, ISR: []state.NodeID{1, 2}, Targets: []state.NodeID{1, 2}}}}},
		})
	}
	r.SetLease(time.Now().Add(time.Hour))
	view(1)
	done := false
	task := &Task{
		Group: object.Group{Policy: 1}, Epoch: 1, Verb: VerbWrite, SizeShift: 22, ID: 7, Len: 4096, Data: make([]byte, 4096), Volume: 1, Generation: 1,
		Done: func(*Task) { done = true },
	}
	r.Submit(task)
	if len(store.requests) != 1 {
		t.Fatalf("the store has %d requests", len(store.requests))
	}
	store.requests[0].Complete(nil)
	for begin := time.Now(); !done; time.Sleep(time.Millisecond) {
		if r.Tick(); time.Since(begin) > 20*time.Second {
			t.Fatal("the change does not end")
		}
	}
	if !errors.Is(task.Err, replica.ErrRetry) || !renew {
		t.Errorf("it ends with %v; a new epoch is proposed: %v", task.Err, renew)
	}
	landed := r.Landed(1, 2)
	select {
	case <-landed:
		t.Error("it is under way no more, and may be undone")
	default:
	}
	view(2)
	select {
	case <-landed:
	default:
		t.Error("it is under way in the next epoch")
	}
}
