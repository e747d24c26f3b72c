package replica

import (
	"maps"

	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// question is a Survey or an Ask that waits for earlier changes to end.
type question struct {
	from  Peer
	token any
}

// Receive takes a change of the object id that the primary has sent. It is applied,
// found to be applied already, or refused. A repair is a change that makes the object
// like the primary's; its version is zero.
func (p *Partition) Receive(from Peer, epoch state.Epoch, session uint32, version object.Version, id object.ID, mark Mark, token any) {
	if !p.follows(from, epoch) || session != p.session || p.earlier > 0 {
		p.reply(from, token, ErrEpoch)
		return
	}
	p.confirm(mark)
	stored, known := p.receivedBefore(version, id)
	repaired, repairing := p.repaired[id]
	switch {
	case stored:
		p.reply(from, token, nil)
		return
	case known, repairing && !repaired:
		p.reply(from, token, ErrEpoch) // and will be sent again
		return
	case version.Seq == 0:
		put(&p.repaired, id, false)
		p.remember(id, object.Version{Epoch: uint64(epoch)})
	default:
		put(&p.received, version.Seq, false)
		p.remember(id, version)
	}
	p.applying++
	p.emit(Effect{Kind: Apply, Session: session, To: from, Version: version, ID: id, Token: token})
}

// receivedBefore reports whether a change or repair is known here, as it is if it was
// sent twice, and whether it is stored. An object is repaired once in a session, and
// when the primary has settled no late repair is taken from the time before.
func (p *Partition) receivedBefore(version object.Version, id object.ID) (stored, known bool) {
	if version.Seq > 0 {
		stored, known = p.received[version.Seq]
		return stored || version.Seq <= p.floor, known
	}
	stored, known = p.repaired[id]
	return stored || p.session == 0 && p.served, known
}

func put[K comparable](m *map[K]bool, k K, v bool) {
	if *m == nil {
		*m = make(map[K]bool)
	}
	(*m)[k] = v
}

func (p *Partition) reply(to Peer, token any, err error) {
	p.emit(Effect{Kind: Reply, To: to, Token: token, Err: err})
}

// follows reports whether a message is of this node's primary and epoch.
func (p *Partition) follows(from Peer, epoch state.Epoch) bool {
	return epoch == p.view.Epoch && !p.closed && (p.role == member || p.role == learning) && from == p.view.ISR[0]
}

// Stored says how the Apply of a received change has ended. All but err are those of
// the effect.
func (p *Partition) Stored(now Time, e Effect, err error) {
	current := e.Epoch == p.view.Epoch && e.Session == p.session
	switch {
	case !current:
	case e.Version.Seq > 0:
		stored(p.received, e.Version.Seq, err)
	default:
		stored(p.repaired, e.ID, err)
	}
	p.landed(now, current)
	p.reply(e.To, e.Token, err)
}

func stored[K comparable](m map[K]bool, k K, err error) {
	if err != nil {
		delete(m, k)
	} else if _, ok := m[k]; ok {
		m[k] = true
	}
}

// Committed takes the primary's mark.
func (p *Partition) Committed(from Peer, epoch state.Epoch, mark Mark) {
	if p.follows(from, epoch) {
		p.confirm(mark)
	}
}

// confirm notes what is on all members. A learner misses some of it.
func (p *Partition) confirm(mark Mark) {
	if p.role == member && p.mark.Less(mark) {
		p.mark = mark
	}
	if mark.Epoch != uint64(p.view.Epoch) {
		return
	}
	p.served = true
	if mark.Seq <= p.floor {
		return
	}
	if mark.Seq-p.floor < uint64(len(p.received)) {
		for s := p.floor + 1; s <= mark.Seq; s++ {
			delete(p.received, s)
		}
	} else {
		maps.DeleteFunc(p.received, func(s uint64, _ bool) bool { return s <= mark.Seq })
	}
	p.floor = mark.Seq
}

// AnswerSurvey answers the primary's survey of the members, and of those who were
// primaries: by the answer it knows that this node takes itself for one no more.
func (p *Partition) AnswerSurvey(from Peer, epoch state.Epoch, token any) {
	if epoch > p.view.Epoch && !p.closed {
		p.wait(epoch, func(Time) { p.AnswerSurvey(from, epoch, token) }, func() { p.reply(from, token, ErrEpoch) })
		return
	}
	switch {
	case epoch != p.view.Epoch || p.closed || p.role == primary || from != p.view.ISR[0]:
		p.reply(from, token, ErrEpoch)
	case p.role == member:
		p.answer(from, token)
	default:
		p.reply(from, token, nil)
	}
}

// AnswerAsk answers the primary that begins to bring this learner in sync. The objects
// that this node has are added by the caller.
func (p *Partition) AnswerAsk(from Peer, epoch state.Epoch, session uint32, token any) {
	if epoch > p.view.Epoch && !p.closed {
		p.wait(epoch, func(Time) { p.AnswerAsk(from, epoch, session, token) }, func() { p.reply(from, token, ErrEpoch) })
		return
	}
	if !p.follows(from, epoch) || p.role != learning || session < p.session {
		p.reply(from, token, ErrEpoch)
		return
	}
	if session > p.session {
		p.session = session
		p.received, p.repaired = nil, nil
		p.earlier += p.applying
		p.applying = 0
	}
	p.answer(from, token)
}

// answer waits for what was begun earlier.
func (p *Partition) answer(from Peer, token any) {
	if p.earlier > 0 {
		p.questions = append(p.questions, question{from, token})
		return
	}
	p.emit(Effect{Kind: Reply, To: from, Token: token, Report: p.disclose()})
}

// disclose is what the primary may know. Of a learner whose mark is from before the partition
// was begun again, everything is to be compared: it may have what the primary has lost.
func (p *Partition) disclose() Report {
	r := p.report()
	if p.role == learning && r.Mark.Epoch < uint64(p.view.Restarted) {
		r.Mark = Mark{}
	}
	return r
}
