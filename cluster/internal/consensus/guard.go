package consensus

import (
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"

	"github.com/hashicorp/raft"
)

// guard stands between raft and the disk. raft panics when it cannot read an entry or
// store its term. In place of that the guard reports the failure and ends the calling
// goroutine, which is raft's own: the node stops deciding, and its process goes on to
// an orderly end.
type guard struct {
	raft.LogStore
	stable *stable
	mark   *mark

	running  atomic.Bool // raft runs on its own goroutines: see fail
	once     sync.Once
	failure  chan error            // buffered, gets the first failure
	storeErr atomic.Pointer[error] // of the latest StoreLogs
}

func newGuard(logs raft.LogStore, s *stable, m *mark) *guard {
	return &guard{LogStore: logs, stable: s, mark: m, failure: make(chan error, 1)}
}

// fail returns err while Open waits, and does not return later.
func (g *guard) fail(err error) error {
	if !g.running.Load() {
		return err
	}
	g.once.Do(func() { g.failure <- err })
	runtime.Goexit()
	return err
}

// GetLog implements raft.LogStore and checks the entry.
func (g *guard) GetLog(index uint64, l *raft.Log) error {
	err := g.LogStore.GetLog(index, l)
	if errors.Is(err, raft.ErrLogNotFound) {
		return err // an answer that raft knows how to handle, outside of the start
	}
	if err == nil && l.Index != index {
		err = errDamaged
	}
	if err == nil && l.Type == raft.LogCommand {
		_, err = decodeEntry(l.Data)
	}
	if err != nil {
		return g.fail(fmt.Errorf("read entry %d of the log: %w", index, err))
	}
	return nil
}

// StoreLog implements raft.LogStore.
func (g *guard) StoreLog(l *raft.Log) error { return g.StoreLogs([]*raft.Log{l}) }

// StoreLogs implements raft.LogStore. A failure is raft's to handle: it steps down.
func (g *guard) StoreLogs(logs []*raft.Log) error {
	err := g.LogStore.StoreLogs(logs)
	if err == nil && len(logs) > 0 {
		err = g.mark.set(logs[len(logs)-1].Index, false)
	}
	if err != nil {
		g.storeErr.Store(&err)
	} else if g.storeErr.Load() != nil {
		g.storeErr.Store(nil)
	}
	return err
}

// lastStoreError is nil if the latest append succeeded.
func (g *guard) lastStoreError() error {
	if p := g.storeErr.Load(); p != nil {
		return *p
	}
	return nil
}

func (g *guard) Set(key, val []byte) error {
	if err := g.stable.Set(key, val); err != nil {
		return g.fail(err)
	}
	return nil
}

func (g *guard) SetUint64(key []byte, val uint64) error {
	if err := g.stable.SetUint64(key, val); err != nil {
		return g.fail(err)
	}
	return nil
}

func (g *guard) Get(key []byte) ([]byte, error)       { return g.stable.Get(key) }
func (g *guard) GetUint64(key []byte) (uint64, error) { return g.stable.GetUint64(key) }

// IsMonotonic implements raft.MonotonicLogStore, as raft-wal does: entries without gaps.
func (g *guard) IsMonotonic() bool { return true }
