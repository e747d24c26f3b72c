package vdi

import (
	"context"
	"sync"
)

// longLock is a mutex that is held while something is waited for; so waiting for it can be given up.
// In a simulation, who waits for one counts as waiting, which who waits for a sync.Mutex does not.
type longLock struct {
	once sync.Once
	held chan struct{} // has a value while somebody has the lock
}

func (l *longLock) made() chan struct{} {
	l.once.Do(func() { l.held = make(chan struct{}, 1) })
	return l.held
}

func (l *longLock) Lock() { l.made() <- struct{}{} }

// LockWithin is Lock, but fails with ctx's error if it would have to wait for longer than that.
func (l *longLock) LockWithin(ctx context.Context) error {
	held := l.made()
	select {
	case held <- struct{}{}:
		return nil
	default:
	}
	select {
	case held <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (l *longLock) Unlock() { <-l.held }
