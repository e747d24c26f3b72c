package replicas

import (
	"fmt"
	"sync/atomic"

	"github.com/zeebo/xxh3"

	"sheepdog/cluster/internal/peer"
	"sheepdog/cluster/internal/replica"
	"sheepdog/storage/object"
)

// incoming is a request of another node. One belongs to each pooled peer.Request.
type incoming struct {
	r    *Replicas
	req  *peer.Request
	part *part
	from replica.Peer

	change   change
	effect   replica.Effect // the Apply of change
	data     []byte         // of change
	own      *[]byte        // what it lies in, if this node had kept it
	content  content        // of data
	write    object.Request
	question question
	task     Task          // opAct
	moved    atomic.Uint64 // bytes that a repair took
}

// Handle carries out a request of another node, if it is one of this package's
// operations; else it reports false. See peer.Handler.
func (r *Replicas) Handle(req *peer.Request) bool {
	if req.Op > lastOp {
		return false
	}
	in, ok := req.State.(*incoming)
	if !ok || in.r != r {
		in = &incoming{r: r}
		req.State = in
	}
	in.req, in.part = req, nil
	in.from = replica.Peer{Node: req.From.Node, Incarnation: req.From.Incarnation}
	if err := in.dispatch(); err != nil {
		req.Reply(err)
	}
	return true
}

// classes are the operations' classes: a request that comes in another one would
// break what package peer promises about waiting.
var classes = map[uint16][]peer.Class{
	opAct: {peer.Data}, opChange: {peer.Commit}, opCommitted: {peer.Commit}, opSurvey: {peer.Commit}, opSync: {peer.Commit},
	opAsk: {peer.Bulk}, opRepair: {peer.Bulk, peer.Commit}, opSums: {peer.Bulk}, opBlocks: {peer.Bulk},
	opSpace: {peer.Commit}, opCheck: {peer.Bulk}, opHave: {peer.Bulk},
}

// dispatch begins what was asked for; an error is the answer.
func (in *incoming) dispatch() error {
	if in.r.closed.Load() {
		return object.ErrClosed
	}
	ok := false
	for _, c := range classes[in.req.Op] {
		ok = ok || c == in.req.Class
	}
	if !ok {
		return peer.ErrUnsupported
	}
	switch in.req.Op {
	case opAct:
		return in.act()
	case opChange, opRepair:
		return in.takeChange()
	case opCommitted:
		return in.committed()
	case opSums, opBlocks:
		return in.serve()
	}
	q, err := decodeQuestion(in.req.Head)
	if err != nil {
		return err
	}
	in.question = q
	switch in.req.Op {
	case opSync:
		return in.sync()
	case opSpace:
		return in.space()
	}
	if err := in.find(&q.route); err != nil {
		return err
	}
	switch in.req.Op {
	case opCheck:
		in.r.works.Go(in.check)
		return nil
	case opHave:
		in.r.works.Go(in.have)
		return nil
	}
	kind := evSurvey
	if in.req.Op == opAsk {
		kind = evAsk
	}
	in.part.post(event{kind: kind, batch: true, in: in})
	return nil
}

// find finds the partition of a message that is for this life of this node.
func (in *incoming) find(m *route) error {
	if m.to != in.r.cfg.Self.Incarnation {
		return replica.ErrEpoch
	}
	if in.part = in.r.part(m.group); in.part == nil {
		return replica.ErrEpoch // it will be heard of
	}
	return nil
}

// act carries out a gateway's request.
func (in *incoming) act() error {
	m, err := decodeAct(in.req.Head)
	if err != nil {
		return err
	}
	if m.to != in.r.cfg.Self.Incarnation {
		return replica.ErrRetry
	}
	if m.verb == VerbCompare {
		return errMessage
	}
	t := &in.task
	t.Group, t.Epoch, t.Verb, t.Flags, t.SizeShift = m.group, m.epoch, m.verb, m.flags, m.shift
	t.ID, t.Off, t.Len, t.Volume, t.Generation = m.id, m.off, m.len, m.volume, m.generation
	t.Data, t.Done = nil, in.acted
	t.number, t.keeper = m.keeps, in.from
	switch m.verb {
	case VerbRead:
		if len(in.req.ReplyData) < int(m.len) {
			return errMessage
		}
		in.req.ReplyData = in.req.ReplyData[:m.len]
		t.Data = in.req.ReplyData
	case VerbWrite:
		t.Data = in.req.Data
		if err := t.content.arrived(&m.action, t.Data); err != nil {
			return err
		}
	}
	in.r.Submit(t)
	return nil
}

// acted answers a gateway.
func (in *incoming) acted(t *Task) {
	req := in.req
	if t.Err != nil {
		req.Reply(t.Err)
		return
	}
	switch t.Verb {
	case VerbRead:
		req.ReplyHead = le.AppendUint64(req.ReplyHead, xxh3.Hash(t.Data))
	case VerbStat:
		req.ReplyData = appendInfo(req.ReplyData[:0], t.Info)
	case VerbSums:
		req.ReplyData = appendSums(req.ReplyData[:0], t.Sums)
	case VerbList:
		req.ReplyData = req.ReplyData[:0]
		for _, i := range t.Infos {
			req.ReplyData = appendInfo(req.ReplyData, i)
		}
	default:
		req.ReplyHead = appendPeers(req.ReplyHead, t.Holders)
		req.ReplyData = nil
	}
	req.Reply(nil)
}

func appendSums(b []byte, sums []uint64) []byte {
	for _, s := range sums {
		b = le.AppendUint64(b, s)
	}
	return b
}

func decodeSums(b []byte) []uint64 {
	sums := make([]uint64, len(b)/8)
	for i := range sums {
		sums[i] = le.Uint64(b[i*8:])
	}
	return sums
}

// takeChange takes a change or repair of the primary.
func (in *incoming) takeChange() error {
	m, err := decodeChange(in.req.Head)
	if err != nil {
		return err
	}
	switch {
	case (m.version == object.Version{}) != (in.req.Op == opRepair):
		return errMessage
	case in.req.Op == opChange && m.version.Epoch != uint64(m.epoch):
		return errMessage
	case in.req.Op == opChange && !m.verb.Changes():
		return errMessage
	case m.kept != 0 && (m.verb != VerbWrite || in.req.Op != opChange || len(in.req.Data) > 0):
		return errMessage
	case m.verb == VerbWrite && in.req.Op == opChange && m.kept == 0:
		if err := in.content.arrived(&m.action, in.req.Data); err != nil {
			return err
		}
	}
	if err := in.find(&m.route); err != nil {
		return err
	}
	in.change = m
	if err := in.takeData(); err != nil {
		return err
	}
	if in.req.Op == opChange {
		in.r.clients.Add(1)
	}
	in.part.post(event{kind: evReceive, batch: true, in: in})
	return nil
}

// store carries out the change that in.effect is about.
func (in *incoming) store() {
	m := &in.change
	switch {
	case in.req.Op == opRepair:
		in.moved.Store(0)
		in.takeRepair()
	case m.verb == VerbDelete:
		in.r.works.Go(func() { in.stored(in.r.cfg.Store.Delete(in.r.ctx, object.Key{Group: m.group, ID: m.id})) })
	default:
		in.write = object.Request{
			Op:    [...]object.Op{VerbWrite: object.OpWrite, VerbZero: object.OpZero, VerbDiscard: object.OpDiscard}[m.verb],
			Flags: m.flags | in.frugal(), SizeShift: m.shift, ID: m.id, Policy: m.group.Policy, Partition: m.group.Partition,
			Off: m.off, Len: m.len, Data: in.data, Sums: in.content.sums, Version: m.version, Done: incomingStored, Owner: in,
		}
		in.r.cfg.Store.Submit(&in.write)
	}
}

// takeRepair begins a repair, or refuses it if a learner has enough to do.
func (in *incoming) takeRepair() {
	r := in.r
	if in.change.session == 0 {
		r.works.Go(func() { in.stored(in.repair()) })
		return
	}
	if r.taking.Add(1) > repairsTaken {
		r.taking.Add(-1)
		in.stored(replica.ErrBusy)
		return
	}
	r.works.Go(func() {
		err := in.repair()
		r.taking.Add(-1)
		in.stored(err)
	})
}

func incomingStored(r *object.Request) { r.Owner.(*incoming).stored(r.Err) }

func (in *incoming) stored(err error) {
	in.part.post(event{kind: evStored, in: in, err: err})
}

// reply answers what the partition was asked.
func (in *incoming) reply(e *replica.Effect) {
	req := in.req
	in.leaveData()
	switch {
	case e.Err != nil || req.Op == opChange || req.Op == opRepair:
		if req.Op == opChange && e.Err == nil && in.r.cfg.Store.Tight(in.part.group) {
			req.ReplyHead = append(req.ReplyHead, flagTight)
		}
		if req.Op == opRepair {
			req.ReplyHead = le.AppendUint64(req.ReplyHead, in.moved.Load())
		}
		req.ReplyData = nil
		req.Reply(e.Err)
	case req.Op == opSurvey:
		req.ReplyData = appendReport(req.ReplyData[:0], e.Report, nil)
		req.Reply(nil)
	default:
		report := e.Report
		in.r.works.Go(func() {
			have, err := in.r.objects(in.part.group)
			req.ReplyData = appendReport(req.ReplyData[:0], report, have)
			req.Reply(err)
		})
	}
}

// committed takes the marks of many partitions.
func (in *incoming) committed() error {
	d := decoder{b: in.req.Data}
	for len(d.b) > 0 {
		var m route
		m.decode(&d)
		mark := d.version()
		if d.err != nil {
			return d.err
		}
		if m.to != in.r.cfg.Self.Incarnation {
			continue
		}
		if p := in.r.part(m.group); p != nil {
			p.post(event{kind: evCommitted, batch: true, peer: in.from, epoch: m.epoch, mark: mark})
		}
	}
	in.req.ReplyData = nil
	in.req.Reply(nil)
	return nil
}

// sync makes everything durable that was stored before. Who asks for a learner's group, to have it in sync, is not told so if
// its disk is out of service: what does not count yet keeps no other flush from ending, but it must not count then.
func (in *incoming) sync() error {
	q := in.question
	if q.to != in.r.cfg.Self.Incarnation {
		return replica.ErrEpoch
	}
	in.r.syncHere(func(err error) {
		if err == nil && q.epoch != 0 && in.r.cfg.Store.Failed(q.group) {
			err = fmt.Errorf("partition %s is on a disk that is out of service: %w", q.group, object.ErrIO)
		}
		in.req.ReplyData = nil
		in.req.Reply(err)
	})
	return nil
}
