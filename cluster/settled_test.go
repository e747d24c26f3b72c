package cluster

import (
	"context"
	"errors"
	"testing"
	"time"

	"sheepdog/storage/object"
)

// Who takes a volume over is told how far the log was applied where nothing older happens any more, and is as far when it begins:
// what became of older changes may be a matter of epochs that it has not heard of.
func TestSettledIsAsFarAsOthers(t *testing.T) {
	w := newWorld(t, "n1", "n2")
	w.form("n1", "n2")
	n1, n2 := w.nodes["n1"].Node, w.nodes["n2"].Node
	before := n2.flock.applied()
	index, err := n1.flock.fenceNode(t.Context(), n1.View().NodeByName("n2"), 1, 1)
	if err != nil || index < before || index > n2.flock.applied() || index == 0 {
		t.Fatalf("a node at %d to %d says that it is at %d: %v", before, n2.flock.applied(), index, err)
	}
	if err := n1.flock.catchUp(t.Context(), index); err != nil {
		t.Error(err)
	}
	if at, epoch := n1.flock.replicas().Followed(), n1.View().Epoch; n1.flock.applied() < index || at == 0 || at > epoch {
		t.Errorf("then this node is at %d, and its replicas are at epoch %d of %d", n1.flock.applied(), at, epoch)
	}
	soon, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := n1.flock.catchUp(soon, index+1000); !errors.Is(err, object.ErrUnavailable) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("behind others it ends with %v", err)
	}
	if err := n1.Settled(t.Context(), 1, 2); err != nil {
		t.Error(err)
	}
}
