package replicas

import (
	"errors"
	"fmt"
	"testing"

	"sheepdog/cluster/internal/peer"
	"sheepdog/cluster/internal/replica"
)

// Whoever asks why a learner is not brought in sync is told what fails, until something was completed.
func TestRecoveryTellsFailure(t *testing.T) {
	var r recovery
	to := replica.Peer{Node: 2, Incarnation: 3}
	failure := func() error { return r.of(0, to).failure }
	for _, err := range []error{nil, replica.ErrEpoch, replica.ErrBusy} {
		if r.tried(0, to, false, err); failure() != nil {
			t.Errorf("%v counts as a failure", err)
		}
	}
	for _, err := range []error{replica.ErrRetry, fmt.Errorf("%w: n2", peer.ErrTimeout)} {
		if r.tried(0, to, true, err); !errors.Is(failure(), err) {
			t.Errorf("%v counts as no failure", err)
		}
		if r.tried(0, to, false, nil); failure() == nil {
			t.Error("a step that does not complete anything hides the failure")
		}
	}
	if r.tried(0, to, true, nil); failure() != nil {
		t.Error("a failure is told although something was completed since")
	}
}

// A recovery goes on although a node learns nothing for a moment, since partitions get learners some at a time, and is
// another one after a while, whether somebody has looked meanwhile or not.
func TestRecoveryIsOneForAMoment(t *testing.T) {
	var r recovery
	to := replica.Peer{Node: 2, Incarnation: 1}
	r.brought(0, to, 10)
	r.tried(0, to, true, nil)
	if b := r.of(forgetAfter, to); b.objects != 1 || b.partitions != 1 || b.began != 0 {
		t.Errorf("after a moment: %+v", b)
	}
	if b := r.of(2*forgetAfter+1, to); b.objects != 0 || b.partitions != 0 || b.began != 2*forgetAfter+1 {
		t.Errorf("after a while: %+v", b)
	}
}
