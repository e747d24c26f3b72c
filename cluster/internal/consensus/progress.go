package consensus

import (
	"context"
	"slices"
	"sync"
)

// progress is how far the machines of this node have come in the log. (raft's own
// AppliedIndex counts what it has handed over, not what was applied.)
type progress struct {
	mu      sync.Mutex
	applied uint64
	waiting []waiter
}

type waiter struct {
	index uint64
	done  chan struct{}
}

func (p *progress) index() uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.applied
}

func (p *progress) advance(index uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.applied = max(p.applied, index)
	p.waiting = slices.DeleteFunc(p.waiting, func(w waiter) bool {
		reached := w.index <= p.applied
		if reached {
			close(w.done)
		}
		return reached
	})
}

// await waits until the machines have applied the entry at an index.
func (p *progress) await(ctx context.Context, index uint64, failed <-chan struct{}, stop <-chan struct{}) error {
	p.mu.Lock()
	if index <= p.applied {
		p.mu.Unlock()
		return nil
	}
	w := waiter{index, make(chan struct{})}
	p.waiting = append(p.waiting, w)
	p.mu.Unlock()
	select {
	case <-w.done:
		return nil
	case <-ctx.Done():
	case <-failed:
	case <-stop:
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.waiting = slices.DeleteFunc(p.waiting, func(other waiter) bool { return other.done == w.done })
	select {
	case <-w.done: // reached in the same moment
		return nil
	default:
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return errStopped
}
