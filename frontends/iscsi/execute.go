package iscsi

import (
	"context"
	"errors"
	"fmt"

	"sheepdog/frontends/internal/stream"
	"sheepdog/frontends/iscsi/internal/pdu"
	"sheepdog/frontends/iscsi/internal/scsi"
	"sheepdog/storage/object"
	"sheepdog/vdi"
)

// execute carries out a task whose data is here. The reader calls it.
func (t *task) execute() error {
	if t.outcome.Status != scsi.StatusGood {
		t.complete()
		return nil
	}
	switch t.plan.Kind {
	case scsi.Answer:
		t.data = t.plan.Data[:min(int64(len(t.plan.Data)), t.wantIn)]
		t.complete()
		return nil
	case scsi.ListUnits: // SPC-4 section 6.33: it ends the attention, for all units
		for _, l := range t.s.units() {
			l.unit.untell(l, scsi.LUNsChanged)
		}
		t.answerWith(t.plan.Data)
		t.complete()
		return nil
	case scsi.TakeSense:
		t.takeSense()
		return nil
	case scsi.Read:
		return t.executeRead()
	case scsi.Write:
		t.submit(vdi.OpWrite, t.plan.Off, t.plan.Len)
		return nil
	case scsi.Zero:
		// Zeros that were written are as good as a hole to who reads them, but take no space
		// away later: the initiator did not ask for that to be given back.
		t.submitFlags(vdi.OpZero, vdi.FlagNoHole)
		return nil
	case scsi.Discard:
		return t.executeDiscard()
	case scsi.Flush:
		t.submit(vdi.OpFlush, 0, 0)
		return nil
	case scsi.Cache:
		t.plan.Status = scsi.StatusConditionMet
		t.submit(vdi.OpCache, t.plan.Off, t.plan.Len)
		return nil
	case scsi.Prevent:
		t.complete() // nothing can be removed
		return nil
	}
	run, ok := slowKinds[t.plan.Kind]
	if !ok {
		t.outcome = scsi.Outcome{Status: scsi.StatusCheck, Sense: scsi.Sense{Code: scsi.InvalidCommand}}
		t.complete()
		return nil
	}
	t.s.slow(t, run)
	return nil
}

// submit hands the task to the volume. It may complete at once.
func (t *task) submit(op vdi.Op, off, n int64) {
	t.req.Op, t.req.Flags, t.req.Off, t.req.Len, t.req.Data = op, 0, off, n, nil
	if op == vdi.OpRead || op == vdi.OpWrite {
		t.req.Data = t.data
	}
	if t.plan.FUA && op == vdi.OpWrite {
		t.req.Flags = vdi.FlagFUA
	}
	if n == 0 && op != vdi.OpFlush {
		t.complete() // the layer below knows no empty requests
		return
	}
	s := t.s
	s.touch(t.at)
	t.at.vol.Submit(&t.req)
	s.stream.Submitted(int(min(n, maxBatched)))
}

// maxBatched is what a long request counts for in a batch at most.
const maxBatched = 1 << 20

func (t *task) submitFlags(op vdi.Op, f vdi.Flags) {
	t.req.Op, t.req.Flags, t.req.Off, t.req.Len, t.req.Data = op, f, t.plan.Off, t.plan.Len, nil
	s := t.s
	s.touch(t.at)
	t.at.vol.Submit(&t.req)
	s.stream.Submitted(0)
}

// done is the completion of the request, on any goroutine.
func (t *task) done(r *vdi.Request) {
	err := r.Err
	if t.plan.Kind == scsi.Flush && (err == nil || errors.Is(err, object.ErrLost)) && t.at.lost.Swap(false) && err == nil {
		err = errLost
	}
	if err != nil {
		t.fail(err)
		return
	}
	if t.plan.Kind != scsi.Read {
		t.data = nil
	}
	if t.plan.Status == scsi.StatusConditionMet {
		t.outcome.Status = scsi.StatusConditionMet
	}
	t.complete()
}

func (t *task) executeRead() error {
	n := int(min(t.plan.Len, t.wantIn))
	if n == 0 {
		t.complete()
		return nil
	}
	if err := t.makeRoom(n); err != nil || t.outcome.Status != scsi.StatusGood {
		if err != nil {
			t.outcome = scsi.Outcome{Status: scsi.StatusBusy}
		}
		t.complete()
		return err
	}
	if t.plan.FUA {
		t.s.slow(t, (*task).readDurable)
		return nil
	}
	t.submit(vdi.OpRead, t.plan.Off, int64(n))
	return nil
}

// makeRoom gives a read n bytes for its data: beside those of other short reads if it is one.
func (t *task) makeRoom(n int) error {
	s := t.s
	if n <= stream.ChunkDataMax && !s.params.HeaderDigest && !s.params.DataDigest {
		if front, in := s.stream.Place(pdu.HeaderSize + pdu.Padded(n)); front != nil {
			t.front, t.out, t.data = front, in, front[pdu.HeaderSize:][:n]
			return nil
		}
	}
	return t.obtain(n)
}

// readDurable is a read with FUA: what it answers survives a power cut. That something else may be lost is not for
// who reads: the volume says it once, and it is kept for who flushes.
func (t *task) readDurable(context.Context) error {
	err := t.do(vdi.OpFlush, 0, 0, 0, nil)
	if errors.Is(err, object.ErrLost) {
		t.at.lost.Store(true)
		err = t.do(vdi.OpFlush, 0, 0, 0, nil) // what is there now
	}
	if err != nil {
		if errors.Is(err, object.ErrLost) {
			t.at.lost.Store(true)
		}
		return err
	}
	return t.do(vdi.OpRead, 0, t.plan.Off, int64(len(t.data)), t.data)
}

// errLost is what a flush fails with that would say that all is durable, after a read has heard that it may not be.
var errLost = fmt.Errorf("flush: %w: %w: some of what was written since the last one", vdi.ErrIO, object.ErrLost)

// executeDiscard is WRITE SAME with UNMAP: blocks are deallocated if that leaves what was to be
// written, which is so for zeros (SBC-3 section 5.43).
func (t *task) executeDiscard() error {
	if len(t.data) > 0 && !allZero(t.data) {
		t.s.slow(t, (*task).fill)
		return nil
	}
	t.submitFlags(vdi.OpZero, 0)
	return nil
}

func allZero(p []byte) bool {
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}

// takeSense answers a unit attention as data.
func (t *task) takeSense() {
	code, ok := t.at.unit.attention(t.at)
	if !ok {
		code = scsi.NoSense
	}
	b := scsi.Sense{Code: code}.Encode(t.plan.CDB[1]&1 != 0)
	t.answerWith(b)
	t.complete()
}

// answerWith makes b, as far as the command and the initiator want it, the task's answer.
func (t *task) answerWith(b []byte) {
	t.plan.Kind, t.plan.Data = scsi.Answer, b[:min(int64(len(b)), t.plan.Limit)]
	t.data = t.plan.Data[:min(int64(len(t.plan.Data)), t.wantIn)]
}

// slow runs a command that has to wait on a goroutine of its own. The window bounds how many.
func (s *session) slow(t *task, run func(*task, context.Context) error) {
	s.stream.FinishBatch()
	go func() {
		if err := run(t, s.ctx); err != nil {
			t.fail(err)
			return
		}
		if t.plan.Kind != scsi.Read && t.plan.Kind != scsi.Answer {
			t.data = nil
		}
		t.complete()
	}()
}

// do carries out a request to the volume and waits for it.
func (t *task) do(op vdi.Op, f vdi.Flags, off, n int64, data []byte) error {
	s := t.s
	if err := s.ctx.Err(); err != nil {
		return fmt.Errorf("session has ended: %w", err)
	}
	done := make(chan error, 1)
	r := vdi.Request{Op: op, Flags: f, Off: off, Len: n, Data: data, Check: t.req.Check, Done: func(r *vdi.Request) { done <- r.Err }}
	t.at.vol.Submit(&r)
	t.at.vol.Kick()
	return <-done
}
