package iscsi

import (
	"fmt"

	"sheepdog/frontends/internal/stream"
	"sheepdog/frontends/iscsi/internal/pdu"
	"sheepdog/frontends/iscsi/internal/scsi"
)

// takeCommand begins a SCSI command.
func (s *session) takeCommand(h *pdu.Header, seg *segment) error {
	if s.params.Discovery { // discovery (RFC 7143 section 4.3)
		s.reject(h, pdu.RejectProtocol)
		if !h.Immediate() {
			s.credit()
		}
		return nil
	}
	t := s.newTask(h)
	t.busy = true
	if ok, crowded := s.enter(t); crowded {
		t.free()
		s.reject(h, pdu.RejectTooMany)
		return nil
	} else if !ok {
		t.free()
		return fmt.Errorf("%w: task tag %#x is in use", errProtocol, h.TaskTag())
	}
	s.current = t
	t.outcome.Status = scsi.StatusGood
	var u *scsi.Unit
	if t.at != nil {
		u = t.at.unit.view()
	}
	t.plan = scsi.Decide(u, s.port.Load(), h.CDB())
	s.stats.begun(&t.plan)
	if o := s.admit(t, u); o.Status != scsi.StatusGood {
		t.refuse(o)
	}
	t.shorten(u)
	return t.begin(h, seg)
}

// admit decides whether the command is carried out, in the order of SAM-5 and SPC-4: what other
// initiators did to the unit is told first, then reservations count, then the command itself.
func (s *session) admit(t *task, u *scsi.Unit) scsi.Outcome {
	c := t.plan.Command
	if u != nil && (c == nil || !c.Quiet) {
		if code, ok := t.at.unit.attention(t.at); ok {
			return scsi.Outcome{Status: scsi.StatusCheck, Sense: scsi.Sense{Code: code}}
		}
	}
	if u != nil && c != nil && t.at.unit.conflicts(s.nexus, &t.plan) {
		return scsi.Outcome{Status: scsi.StatusConflict}
	}
	if t.plan.Kind == scsi.Refuse {
		return scsi.Outcome{Status: t.plan.Status, Sense: t.plan.Sense}
	}
	return scsi.Outcome{Status: scsi.StatusGood}
}

// shorten makes the command one of as many bytes as the initiator will send, where that makes
// sense; the rest is told as a residual.
func (t *task) shorten(u *scsi.Unit) {
	t.need = min(t.plan.DataOut, t.wantOut)
	if t.outcome.Status != scsi.StatusGood || t.wantOut == t.plan.DataOut {
		return
	}
	bad := scsi.Outcome{Status: scsi.StatusCheck, Sense: scsi.Sense{Code: scsi.InvalidFieldInUnit}}
	switch t.plan.Kind {
	case scsi.Write, scsi.WriteVerify:
		if t.need%(1<<u.BlockShift) != 0 {
			t.refuse(bad)
		}
		t.plan.Len = t.need
	case scsi.CompareWrite: // the number of blocks is not that of the data
		bad.Sense = scsi.Sense{Code: scsi.InvalidFieldInCDB, Field: 13, HasField: true, InCommand: true}
		t.refuse(bad)
	case scsi.Fill, scsi.Discard, scsi.Zero:
		t.refuse(bad) // what the data means depends on its length
	default:
		if t.need < t.plan.DataOut {
			t.refuse(bad)
		}
	}
}

// begin takes the immediate data and says what else comes.
func (t *task) begin(h *pdu.Header, seg *segment) error {
	s := t.s
	n := int64(seg.size)
	t.unsolicited = !h.Final() && t.wantOut > 0
	switch {
	case n > 0 && !s.params.ImmediateData, t.unsolicited && s.params.InitialR2T, n > t.wantOut, n > int64(s.params.FirstBurst):
		t.refuse(scsi.Outcome{Status: scsi.StatusCheck, Sense: scsi.Sense{Code: scsi.UnexpectedData}})
	}
	t.got, t.asked = n, n
	if t.outcome.Status != scsi.StatusGood || t.need == 0 {
		return nil
	}
	if seg.whole != nil && n >= t.need && !t.unsolicited {
		t.data = seg.whole[:t.need]
		t.in = s.stream.Pin()
		return nil
	}
	if err := t.obtain(int(t.need)); err != nil || t.data == nil {
		return err
	}
	if n = min(n, t.need); n > 0 {
		return s.read(seg, t.data[:n])
	}
	return nil
}

// obtain gives the task a buffer, or makes it fail for now.
func (t *task) obtain(n int) error {
	ok, err := t.s.reserve(int64(stream.LargeCost(n)))
	switch {
	case err != nil:
		return err
	case !ok:
		t.refuse(scsi.Outcome{Status: scsi.StatusTaskSetFull})
	default:
		t.hold(n)
	}
	return nil
}

// proceed goes on with the task whose PDU was received: asks for its data, or carries it out
// if all is here.
func (s *session) proceed() error {
	t := s.current
	if t == nil {
		return nil
	}
	s.current = nil
	waits := t.unsolicited || len(t.r2ts) > 0 || t.outcome.Status == scsi.StatusGood && t.got < t.need
	s.mu.Lock()
	t.busy = false
	if t.aborted {
		s.mu.Unlock()
		t.drop()
		return nil
	}
	switch {
	case waits && !t.counted:
		t.counted = true
		s.collecting++
	case !waits:
		t.state = executing
		if t.counted {
			s.collecting--
		}
	}
	if waits {
		t.ask() // under the lock: whoever aborts it frees it
	}
	s.mu.Unlock()
	if waits {
		return nil
	}
	return t.execute()
}
