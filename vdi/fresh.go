package vdi

import (
	"context"
	"errors"
	"sync/atomic"
	"time"

	"sheepdog/vdi/catalog"
)

// freshenTimeout bounds how long it is asked whether this node has merely not heard yet of
// what it was asked for.
const freshenTimeout = 2 * time.Second

// freshener lets all who find nothing share the command that brings this node up to date:
// names that nobody has must not load the cluster's log.
type freshener struct {
	begun atomic.Uint64 // commands

	mu   longLock // held while one is under way
	done uint64   // number of the last one that has ended
	err  error    // what became of it
}

// find looks for a VDI (tag "") or snapshot. What was made through another node a moment
// ago may not be known here yet: so nothing is said to be missing before this node has
// applied all that was answered before it was asked. If that cannot be found out, what
// the node knows counts.
func (s *Service) find(ctx context.Context, name, tag string) (catalog.VDI, error) {
	v, err := s.cfg.Catalog.Find(name, tag)
	if !errors.Is(err, catalog.ErrNotFound) || s.freshen(ctx) != nil {
		return v, err
	}
	return s.cfg.Catalog.Find(name, tag)
}

// freshen returns when this node has applied everything that was answered before the call.
func (s *Service) freshen(ctx context.Context) error {
	f := &s.fresh
	before := f.begun.Load()
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.done > before { // it began after the call
		return f.err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), freshenTimeout) // others share it
	defer cancel()
	number := f.begun.Add(1)
	err := s.catchUp(ctx)
	f.done, f.err = number, err
	return err
}

// tell returns when every gateway goes by what was just changed: who asks another one after this one has
// answered finds it changed. If one can neither be told nor is found to be down, the change stands, and
// that gateway hears of it later.
func (s *Service) tell(ctx context.Context, what, name string) {
	if err := s.known(ctx); err != nil {
		s.log.Warn("a change of a volume may not be known everywhere yet", "change", what, "vdi", name, "error", err)
	}
}

func (s *Service) known(ctx context.Context) error {
	if s.cfg.Known == nil {
		return nil
	}
	return s.cfg.Known(ctx)
}
