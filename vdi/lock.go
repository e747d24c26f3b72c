package vdi

import "sync"

// longLock is a mutex that is held while something is waited for. In a simulation, who waits for
// one counts as waiting, which who waits for a sync.Mutex does not.
type longLock struct {
	mu    sync.Mutex
	freed sync.Cond
	held  bool
}

func (l *longLock) Lock() {
	l.mu.Lock()
	l.freed.L = &l.mu
	for l.held {
		l.freed.Wait()
	}
	l.held = true
	l.mu.Unlock()
}

func (l *longLock) Unlock() {
	l.mu.Lock()
	l.held = false
	l.freed.Signal()
	l.mu.Unlock()
}
