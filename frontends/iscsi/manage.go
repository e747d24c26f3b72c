package iscsi

import (
	"maps"
	"slices"
	"sync/atomic"

	"sheepdog/frontends/iscsi/internal/pdu"
	"sheepdog/frontends/iscsi/internal/scsi"
)

// waiter waits until tasks that were aborted have ended.
type waiter struct {
	left  atomic.Int32
	then  func() // may be nil
	ended chan struct{}
}

// newWaiter makes a waiter; it has ended once done was called as often as add and once more.
// then is called in the end.
func newWaiter(then func()) *waiter {
	w := &waiter{then: then, ended: make(chan struct{})}
	w.left.Store(1)
	return w
}

func (w *waiter) done() {
	if w.left.Add(-1) > 0 {
		return
	}
	if w.then != nil {
		w.then()
	}
	close(w.ended)
}

// wait waits for all that add announced.
func (w *waiter) wait() {
	w.done()
	<-w.ended
}

// abort aborts the tasks of the session for which which is true: what waits for its data is
// gone at once; what is carried out ends without an answer, and w waits for it.
func (s *session) abort(w *waiter, which func(*task) bool) {
	var drop []*task
	s.mu.Lock()
	for _, t := range s.tasks {
		if !which(t) {
			continue
		}
		t.aborted = true
		if t.state == executing {
			w.left.Add(1)
			t.waiters = append(t.waiters, w)
			continue
		}
		s.leave(t)
		if t.counted {
			s.collecting--
		}
		if !t.busy { // else the reader drops it
			drop = append(drop, t)
		}
	}
	s.mu.Unlock()
	for _, t := range drop {
		t.drop()
	}
}

// abort aborts all tasks that use the unit, of the sessions for which which is true, but for one.
func (u *unit) abort(w *waiter, which func(*session) bool, but *task) {
	u.mu.Lock()
	list := make([]*session, 0, len(u.members))
	for s := range u.members {
		if which(s) {
			list = append(list, s)
		}
	}
	u.mu.Unlock()
	for _, s := range list {
		s.abort(w, func(t *task) bool { return t != but && t.at != nil && t.at.unit == u })
	}
}

func everySession(*session) bool { return true }

// abortWhich aborts the tasks that use the unit for which which is true.
func (u *unit) abortWhich(w *waiter, which func(*task) bool) {
	u.mu.Lock()
	list := slices.Collect(maps.Keys(u.members))
	u.mu.Unlock()
	for _, s := range list {
		s.abort(w, func(t *task) bool { return t.at != nil && t.at.unit == u && which(t) })
	}
}

// takeManagement carries out a task management request. It is answered when all that it aborted
// has ended.
func (s *session) takeManagement(h *pdu.Header) error {
	q := *h
	s.stats.managed.Add(1)
	answer := func(response byte) error {
		s.finish(&q, pdu.TaskAnswer(q.TaskTag(), response), nil)
		return nil
	}
	f := h.TaskFunction()
	s.mu.Lock()
	at := s.find(h.LUN())
	s.mu.Unlock()
	switch {
	case s.params.Discovery || f == pdu.TaskClearACA:
		return answer(pdu.TaskNoFunction)
	case f == pdu.TaskReassign:
		return answer(pdu.TaskNoReassign)
	case f < pdu.TaskAbort || f > pdu.TaskReassign:
		return answer(pdu.TaskNoFunction)
	case at == nil && f != pdu.TaskWarmReset && f != pdu.TaskColdReset:
		return answer(pdu.TaskNoLUN)
	}
	var units []*unit // that the function is about
	switch f {
	case pdu.TaskClearSet, pdu.TaskLUNReset:
		units = []*unit{at.unit}
	case pdu.TaskWarmReset, pdu.TaskColdReset:
		for _, l := range s.units() {
			units = append(units, l.unit)
		}
	}
	w := newWaiter(nil)
	if len(units) == 0 {
		w.then = func() { answer(pdu.TaskComplete) }
	}
	s.stream.FinishBatch() // what is to be aborted shall not be held back
	switch f {
	case pdu.TaskAbort:
		if !s.abortOne(w, h.ReferencedTag()) {
			return answer(pdu.TaskUnknown)
		}
	case pdu.TaskAbortSet:
		s.abort(w, func(t *task) bool { return t.at == at })
	}
	for _, u := range units {
		// The request itself is a reason to be answered: the session must not end before.
		u.abort(w, everySession, nil)
	}
	if f != pdu.TaskAbort && f != pdu.TaskAbortSet {
		s.background.Go(func() {
			w.wait()
			response := byte(pdu.TaskComplete)
			if err := s.afterManagement(f, units); err != nil {
				s.log.Warn("a reset has not reached all gateways", "err", err)
				response = pdu.TaskRejected
			}
			answer(response)
		})
		return nil
	}
	w.done()
	return nil
}

func (s *session) abortOne(w *waiter, tag uint32) (found bool) {
	s.abort(w, func(t *task) bool {
		if t.tag != tag {
			return false
		}
		found = true
		return true
	})
	return found
}

// afterManagement does what a function means beside aborting, at all gateways.
func (s *session) afterManagement(f byte, units []*unit) error {
	var kind scsi.EventKind
	for _, u := range units {
		switch f {
		case pdu.TaskClearSet:
			kind = scsi.Cleared
			u.tellOthers(s, scsi.CommandsCleared)
		case pdu.TaskColdReset:
			kind = scsi.Cold
			u.restore()
			u.dropAll(s)
		default:
			kind = scsi.Reset
			u.restore()
		}
		err := u.change(s.ctx, nil, func(r scsi.Reservations) (scsi.Reservations, bool, bool) {
			if kind != scsi.Cleared {
				r.Legacy = nil
			}
			r.Add(scsi.Event{Node: s.server.cfg.Node, Kind: kind})
			return r, false, true
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// restore makes the unit as it was at first, but for reservations. Everybody here is told.
func (u *unit) restore() {
	u.mu.Lock()
	u.modes = scsi.Modes{}
	now := *u.view()
	now.Protected, now.Descriptor = false, false
	u.state.Store(&now)
	u.mu.Unlock()
	u.tellOthers(nil, scsi.BusDeviceReset)
}

// dropAll ends the sessions of others: after a cold reset all initiators log in anew (RFC 7143
// section 11.5.1).
func (u *unit) dropAll(but *session) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for s := range u.members {
		if s != but {
			s.End(errReset)
		}
	}
}
