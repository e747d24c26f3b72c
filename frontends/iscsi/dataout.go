package iscsi

import (
	"sheepdog/frontends/iscsi/internal/pdu"
	"sheepdog/frontends/iscsi/internal/scsi"
)

// r2t is data that was asked for and has not come yet.
type r2t struct {
	tag    uint32
	off, n int64 // of what was asked for
	got    int64 // of it
	dataSN uint32
}

// ask asks for as much of the data that is missing as may be outstanding. The caller is the
// reader and holds the session's mu.
func (t *task) ask() {
	s := t.s
	if t.unsolicited || t.outcome.Status != scsi.StatusGood {
		return
	}
	for t.asked < t.need && len(t.r2ts) < s.params.MaxR2T {
		n := min(t.need-t.asked, int64(s.params.MaxBurst))
		s.nextTag = (s.nextTag + 1) &^ (1 << 31) // never NoTag
		s.answer(pdu.R2T(t.lun, t.tag, s.nextTag, t.r2tSN, uint32(t.asked), uint32(n)), nil, noSN)
		t.r2ts = append(t.r2ts, r2t{tag: s.nextTag, off: t.asked, n: n})
		t.r2tSN++
		t.asked += n
	}
}

// takeData takes a Data-Out. What comes for a task that is not there any more is what was
// on its way when it was aborted, and is thrown away.
func (s *session) takeData(h *pdu.Header, seg *segment) error {
	s.mu.Lock()
	t := s.tasks[h.TaskTag()]
	if t == nil || t.state != collecting {
		s.mu.Unlock()
		return nil
	}
	t.busy = true
	s.mu.Unlock()
	s.current = t
	if seg.damaged {
		t.refuse(scsi.Outcome{Status: scsi.StatusCheck, Sense: scsi.Sense{Code: scsi.ServiceCRC}})
	}
	if h.TransferTag() == pdu.NoTag {
		return t.takeUnsolicited(h, seg)
	}
	return t.takeSolicited(h, seg)
}

func incorrect() scsi.Outcome {
	return scsi.Outcome{Status: scsi.StatusCheck, Sense: scsi.Sense{Code: scsi.IncorrectAmount}}
}

func (t *task) takeUnsolicited(h *pdu.Header, seg *segment) error {
	n, off := int64(seg.size), int64(h.BufferOffset())
	switch {
	case !t.unsolicited:
		t.refuse(scsi.Outcome{Status: scsi.StatusCheck, Sense: scsi.Sense{Code: scsi.UnexpectedData}})
		return nil
	case h.DataSN() != t.dataSN || off != t.got || off+n > min(t.wantOut, int64(t.s.params.FirstBurst)):
		t.refuse(incorrect())
	}
	t.dataSN++
	t.unsolicited = !h.Final()
	return t.place(seg, off)
}

func (t *task) takeSolicited(h *pdu.Header, seg *segment) error {
	if len(t.r2ts) == 0 || t.r2ts[0].tag != h.TransferTag() { // they are fulfilled in order
		t.refuse(incorrect())
		return nil
	}
	r := &t.r2ts[0]
	n, off := int64(seg.size), int64(h.BufferOffset())
	if h.DataSN() != r.dataSN || off != r.off+r.got || n > r.n-r.got || h.Final() != (r.got+n == r.n) {
		t.refuse(incorrect())
	}
	r.dataSN++
	r.got += n
	if h.Final() || r.got >= r.n {
		t.r2ts = append(t.r2ts[:0], t.r2ts[1:]...)
	}
	return t.place(seg, off)
}

// place receives the segment to where it belongs, if it is still wanted.
func (t *task) place(seg *segment, off int64) error {
	n := int64(seg.size)
	if t.outcome.Status == scsi.StatusGood && t.data != nil && off < t.need {
		if err := t.s.read(seg, t.data[off:min(off+n, t.need)]); err != nil {
			return err
		}
	}
	t.got += n
	if t.asked < t.got {
		t.asked = t.got
	}
	return nil
}
