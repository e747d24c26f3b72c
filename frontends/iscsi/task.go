package iscsi

import (
	"errors"
	"sync"

	"sheepdog/frontends/internal/stream"
	"sheepdog/frontends/iscsi/internal/pdu"
	"sheepdog/frontends/iscsi/internal/scsi"
	"sheepdog/storage/object"
	"sheepdog/vdi"
)

// state of a task.
type state uint8

const (
	collecting state = iota // waits for its data
	executing               // is carried out
)

// task is a SCSI command in flight, from its header to its answer's last byte. It is pooled,
// and carries the request to the volume, so that a command costs no allocation.
type task struct {
	stream.Queued
	req       vdi.Request
	s         *session
	tag       uint32
	lun       uint64
	at        *lun // nil: there is none under that number
	immediate bool
	lapses    uint64 // of this gateway, when it was received or before; see past.go
	plan      scsi.Plan
	outcome   scsi.Outcome
	wantIn    int64 // bytes that the initiator expects to get, and to send
	wantOut   int64

	// Guarded by s.mu.
	state   state
	busy    bool // the reader has it at hand
	counted bool // among those that wait for data
	aborted bool // it will not be answered
	waiters []*waiter
	lost    bool // its answer says that writes may be lost

	// Data from the initiator; the reader's.
	need        int64 // that the command takes
	got         int64 // that was sent, also what is not needed
	unsolicited bool  // more comes without being asked for
	dataSN      uint32
	asked       int64 // up to where data was asked for
	r2tSN       uint32
	r2ts        []r2t

	data    []byte        // from the initiator, or for it
	front   []byte        // a short answer's place: header and data
	in, out *stream.Chunk // pinned by data and front
	long    *stream.Large // else what data lies in
	cost    int64         // bytes charged to the budgets

	pieces  [8][]byte
	heads   []pdu.Header // of long answers
	digests []byte
	head    pdu.Header
	digest  [pdu.DigestSize]byte
	tail    [3 + pdu.DigestSize]byte
}

var tasks sync.Pool

func (s *session) newTask(h *pdu.Header) *task {
	t, _ := tasks.Get().(*task)
	if t == nil {
		t = new(task)
		t.req.Done, t.req.Check = t.done, t.still // once: a method value is an allocation
	}
	t.s, t.tag, t.lun, t.immediate, t.lapses = s, h.TaskTag(), h.LUN(), h.Immediate(), s.lapses.since
	if h.Flags()&pdu.FlagRead != 0 {
		t.wantIn = int64(h.ExpectedLength())
	}
	if h.Flags()&pdu.FlagWrite != 0 {
		t.wantOut = int64(h.ExpectedLength())
		if t.wantIn > 0 { // bidirectional: no command is; what is read would be told in another header
			t.wantIn = 0
		}
	}
	return t
}

// hold gives the task a buffer of n bytes, which were charged for.
func (t *task) hold(n int) {
	t.cost = int64(stream.LargeCost(n))
	t.long = stream.NewLarge(n)
	t.data = t.long.Bytes()[:n]
}

// free gives back all that the task holds.
func (t *task) free() {
	if t.in != nil {
		t.in.Unref()
	}
	if t.out != nil {
		t.out.Unref()
	}
	if t.long != nil {
		t.long.Free()
	}
	if t.cost != 0 {
		t.s.stream.Uncharge(t.cost)
	}
	done, check, r2ts := t.req.Done, t.req.Check, t.r2ts[:0]
	*t = task{r2ts: r2ts}
	t.req.Done, t.req.Check = done, check
	tasks.Put(t)
}

// drop ends a task that nobody will hear of any more, and which was left.
func (t *task) drop() {
	if !t.immediate {
		t.s.credit()
	}
	t.free()
}

// refuse makes the task fail once all of its data is here.
func (t *task) refuse(o scsi.Outcome) {
	if t.outcome.Status == scsi.StatusGood {
		t.outcome = o
	}
}

// complete queues the task's answer. From any goroutine.
func (t *task) complete() {
	s := t.s
	s.stream.CountIn() // before it is left: who waits for the last task then waits for this
	s.mu.Lock()
	s.leave(t)
	waiters := t.waiters
	t.waiters = nil
	last := len(s.tasks) == 0
	s.mu.Unlock()
	if t.outcome.Status != scsi.StatusGood {
		s.stats.errors.Add(1)
	}
	if last {
		s.stream.PutLast(t)
	} else {
		s.stream.Put(t)
	}
	for _, w := range waiters {
		w.done()
	}
}

// fail ends the task with an error of the volume.
func (t *task) fail(err error) {
	t.outcome = outcomeOf(err, t.plan.Kind != scsi.Read)
	t.data = nil
	if t.plan.Kind == scsi.Flush && errors.Is(err, object.ErrLost) {
		t.lost = true
		t.s.notices.Said(t.at.vol)
	}
	t.s.logFailure(t, err)
	t.complete()
}

// Sent implements stream.Item.
func (t *task) Sent() {
	if t.lost && !t.aborted {
		t.s.notices.Sent(t.at.vol)
	}
	t.free()
}

// Render implements stream.Item: Data-In, then the status, in the last Data-In if it is good.
func (t *task) Render() [][]byte {
	if !t.immediate {
		t.s.credit()
	}
	if t.aborted { // set before it was left, so no lock is needed
		return nil
	}
	answers := t.plan.Kind == scsi.Read || t.plan.Kind == scsi.Answer
	if t.outcome.Status == scsi.StatusGood && answers && len(t.data) > 0 {
		return t.renderData()
	}
	var sense []byte
	if t.outcome.Status == scsi.StatusCheck {
		sense = senseSegment(t.outcome.Sense.Encode(t.descriptors()))
	}
	t.head = pdu.Response(t.tag, pdu.ResponseDone, byte(t.outcome.Status), t.residual(), t.r2tSN)
	t.head.SetDataSize(len(sense))
	t.head.SetNumbers(t.s.numbers(true))
	return t.s.frame(t.pieces[:0], &t.head, sense, t.digest[:], t.tail[:])
}

// residual is what differs between the command's length and the expected one (RFC 7143
// section 11.4.5).
func (t *task) residual() pdu.Residual {
	length, want := t.plan.DataOut, t.wantOut
	switch {
	case t.wantOut > 0:
	case t.plan.Kind == scsi.Read:
		length, want = t.plan.Len, t.wantIn
	case t.plan.DataOut == 0:
		length, want = int64(len(t.plan.Data)), t.wantIn
	}
	if t.outcome.Status != scsi.StatusGood && t.wantOut == 0 && t.plan.DataOut == 0 {
		length = 0
	}
	switch {
	case length > want:
		return pdu.Residual{Overflow: true, Count: uint32(length - want)}
	case length < want:
		return pdu.Residual{Count: uint32(want - length)}
	}
	return pdu.Residual{}
}

// renderData makes the Data-In PDUs: segments as long as the initiator takes, bursts as long
// as was agreed on.
func (t *task) renderData() [][]byte {
	s := t.s
	most := int(s.maxSend.Load())
	if t.front != nil && len(t.data) <= most && len(t.data) <= s.params.MaxBurst {
		h := pdu.DataIn(t.tag, true, 0, 0, len(t.data))
		h.SetStatus(byte(t.outcome.Status), t.residual())
		h.SetNumbers(s.numbers(true))
		copy(t.front, h[:])
		clear(t.front[pdu.HeaderSize+len(t.data):])
		return append(t.pieces[:0], t.front)
	}
	pieces := t.pieces[:0]
	count := len(t.data)/min(most, s.params.MaxBurst) + 1 + len(t.data)/s.params.MaxBurst
	t.heads = make([]pdu.Header, 0, count)
	const room = pdu.DigestSize + 3 + pdu.DigestSize
	t.digests = make([]byte, count*room)
	for off, burst, sn := 0, 0, uint32(0); off < len(t.data); sn++ {
		n := min(most, len(t.data)-off, s.params.MaxBurst-burst)
		burst += n
		last := off+n == len(t.data)
		h := pdu.DataIn(t.tag, burst == s.params.MaxBurst || last, sn, uint32(off), n)
		if last {
			h.SetStatus(byte(t.outcome.Status), t.residual())
		}
		h.SetNumbers(s.numbers(last))
		if burst == s.params.MaxBurst {
			burst = 0
		}
		t.heads = append(t.heads, h)
		b := t.digests[int(sn)*room:][:room]
		pieces = s.frame(pieces, &t.heads[len(t.heads)-1], t.data[off:off+n], b[:pdu.DigestSize], b[pdu.DigestSize:])
		off += n
	}
	return pieces
}

// descriptors reports whether sense data is to be in descriptors.
func (t *task) descriptors() bool { return t.at != nil && t.at.unit.view().Descriptor }
