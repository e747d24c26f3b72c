package iscsi

import (
	"context"
	"slices"

	"sheepdog/frontends/iscsi/internal/scsi"
)

// echo is what something done through another gateway means here. It ends when the commands that it
// aborts have ended and the initiators are told.
type echo struct {
	u      *unit
	event  scsi.Event
	waiter *waiter
}

// echoes notes what r says that other gateways have done since it was last looked. From here on settle
// waits for it; the caller runs it when it has given back mu, which it holds.
func (u *unit) echoes(r *scsi.Reservations) (list []*echo) {
	for _, event := range r.Since(u.serial, u.server.cfg.Node) {
		e := &echo{u: u, event: event}
		e.waiter = newWaiter(e.end)
		u.ending[e] = struct{}{}
		list = append(list, e)
	}
	return list
}

// run aborts what is to be aborted. Changes of reservations are not: they are in order with the
// event by the catalog, and may be waiting for other gateways themselves.
func (e *echo) run() {
	e.u.abortWhich(e.waiter, func(t *task) bool {
		switch t.plan.Kind {
		case scsi.ReserveOut, scsi.Reserve, scsi.Release:
			return false
		}
		return e.event.Kind != scsi.Aborted || slices.Contains(e.event.Nexus, t.s.nexus)
	})
	e.waiter.done()
}

// end is called when nothing is left of what was aborted.
func (e *echo) end() {
	u := e.u
	switch e.event.Kind {
	case scsi.Cleared:
		u.tellOthers(nil, scsi.CommandsCleared)
	case scsi.Cold:
		u.restore()
		u.dropAll(nil)
	case scsi.Reset:
		u.restore()
	}
	u.mu.Lock()
	delete(u.ending, e)
	u.mu.Unlock()
}

// settle returns when the unit is as this node's catalog says, and nothing is under way any more
// that has been aborted through other gateways.
func (u *unit) settle(ctx context.Context) {
	u.refresh()
	u.mu.Lock()
	var list []*echo
	for e := range u.ending {
		list = append(list, e)
	}
	u.mu.Unlock()
	for _, e := range list {
		select {
		case <-e.waiter.ended:
		case <-ctx.Done():
			return
		}
	}
}

// Settle returns when this gateway goes by all that its catalog says: see Volumes.Known. It is given up
// with ctx.
func (s *Server) Settle(ctx context.Context) {
	s.mu.Lock()
	list := make([]*unit, 0, len(s.units))
	for _, u := range s.units {
		list = append(list, u)
	}
	s.mu.Unlock()
	for _, u := range list {
		u.settle(ctx)
	}
}
