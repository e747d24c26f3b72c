package iscsi

import (
	"context"

	"sheepdog/frontends/iscsi/internal/scsi"
)

func (t *task) reserveIn(context.Context) error {
	t.at.unit.refresh()
	t.answerWith(t.at.unit.reserved.Load().In(t.plan.Action()))
	return nil
}

// reserveOut changes persistent reservations. It answers when every gateway goes by them, and
// when what it has to abort has ended.
func (t *task) reserveOut(ctx context.Context) error {
	s, u := t.s, t.at.unit
	var effect scsi.Effect
	var outcome scsi.Outcome
	err := u.change(ctx, t.past, func(r scsi.Reservations) (scsi.Reservations, bool, bool) {
		var next scsi.Reservations
		r = u.live(r)
		if l := r.Legacy; l != nil && l.Nexus != s.nexus {
			outcome, effect = scsi.Outcome{Status: scsi.StatusConflict}, scsi.Effect{}
			return r, false, false
		}
		next, effect, outcome = r.Out(s.nexus, &t.plan, t.data)
		if len(effect.Abort) > 0 {
			next.Add(scsi.Event{Node: s.server.cfg.Node, Kind: scsi.Aborted, Nexus: effect.Abort})
		}
		return next, effect.Takes, outcome.Status == scsi.StatusGood
	})
	if err != nil {
		return err
	}
	t.outcome = outcome
	if outcome.Status != scsi.StatusGood {
		return nil
	}
	u.mu.Lock()
	for other := range u.members {
		for _, told := range effect.Tell {
			if other.nexus == told.Nexus {
				u.tell(other, told.Code)
			}
		}
	}
	u.mu.Unlock()
	if len(effect.Abort) > 0 {
		w := newWaiter(nil)
		u.abort(w, func(other *session) bool {
			for _, n := range effect.Abort {
				if other.nexus == n {
					return true
				}
			}
			return false
		}, t)
		w.wait()
	}
	return nil
}

// reserveLegacy is RESERVE: the unit is the initiator's until RELEASE, a reset, or the end
// of its session.
func (t *task) reserveLegacy(ctx context.Context) error {
	s := t.s
	conflict := false
	err := t.at.unit.change(ctx, t.past, func(r scsi.Reservations) (scsi.Reservations, bool, bool) {
		r = t.at.unit.live(r)
		if conflict = r.Legacy != nil && r.Legacy.Nexus != s.nexus || len(r.Keys) > 0; conflict || r.Legacy != nil {
			return r, false, false
		}
		r.Legacy = &scsi.Legacy{Nexus: s.nexus, Node: s.server.cfg.Node, Life: s.server.cfg.Volumes.Life()}
		return r, true, true
	})
	if conflict {
		return &conflictError{}
	}
	return err
}

func (t *task) releaseLegacy(ctx context.Context) error {
	s := t.s
	return t.at.unit.change(ctx, t.past, func(r scsi.Reservations) (scsi.Reservations, bool, bool) {
		next, ok := r.Forget(s.nexus)
		return next, false, ok
	})
}
