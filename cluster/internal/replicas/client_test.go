package replicas

import (
	"errors"
	"testing"

	"sheepdog/cluster/internal/replica"
	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// An attempt for which there is no connection was carried out by nobody, and says so: else who gives the request up would have to count
// the members of the partition among those that hold it, and no flush would end before they are back.
func TestWhatNeverLeftTheNodeSaysSo(t *testing.T) {
	r, err := New(t.Context(), Config{
		Self: replica.Peer{Node: 1, Incarnation: 1}, Store: &emptied{}, Fence: func(object.VID, uint64) error { return nil },
		Peer: func(state.NodeID) Peer { return nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	done := make(chan error, 1)
	f := &Forward{Task: Task{Verb: VerbDiscard, SizeShift: 22, Len: 4096}}
	r.Forward(replica.Peer{Node: 2, Incarnation: 1}, 1, f, func(t *Task) { done <- t.Err })
	if err := <-done; !errors.Is(err, replica.ErrRetry) || !errors.Is(err, replica.ErrUnsent) {
		t.Errorf("without a connection: %v", err)
	}
}
