package replica

import (
	"errors"
	"slices"

	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// settling is what a new primary does before it serves.
type settling struct {
	doubtful map[object.ID]struct{} // changed somewhere, perhaps not everywhere
	copying  bool                   // all have answered
	left     []copyTo               // repairs to be done or repeated
	underway int
}

type copyTo struct {
	peer int
	id   object.ID
}

// survey asks the members which objects are in doubt. Nothing of earlier epochs is
// under way here any more.
func (p *Partition) survey(now Time) {
	p.phase = surveying
	p.settling.doubtful = make(map[object.ID]struct{})
	p.trim()
	for id := range p.recent {
		p.settling.doubtful[id] = struct{}{}
	}
	for i := 1; i < len(p.view.ISR); i++ {
		p.peers[i].asked = now
		p.emit(Effect{Kind: Survey, To: p.peers[i].Peer})
	}
	for i := range p.formers {
		p.emit(Effect{Kind: Survey, To: p.formers[i].Peer})
	}
	p.surveyed(now)
}

// Surveyed says how a Survey has ended.
func (p *Partition) Surveyed(now Time, from Peer, epoch state.Epoch, r Report, err error) {
	if epoch != p.view.Epoch || p.phase != surveying || p.settling.copying {
		return
	}
	m := p.asked(from)
	if err != nil {
		m.later(now, p.opt)
		return
	}
	m.answer = true
	for _, id := range r.Recent {
		p.settling.doubtful[id] = struct{}{}
	}
	p.surveyed(now)
}

// asked finds whom a Survey went to.
func (p *Partition) asked(m Peer) *peer {
	for i := range p.formers {
		if p.formers[i].Peer == m {
			return &p.formers[i]
		}
	}
	return &p.peers[p.index(m)]
}

// surveyed goes on when all members have answered.
func (p *Partition) surveyed(now Time) {
	s := &p.settling
	for i := range p.view.ISR {
		if !p.peers[i].answer {
			return
		}
	}
	if slices.ContainsFunc(p.formers, func(m peer) bool { return !m.answer }) {
		return
	}
	s.copying = true
	ids := make([]object.ID, 0, len(s.doubtful))
	for id := range s.doubtful {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	for i := 1; i < len(p.view.ISR); i++ {
		p.peers[i].asked = now
		for _, id := range ids {
			s.left = append(s.left, copyTo{i, id})
		}
	}
	p.settle(now)
}

// settle copies the primary's content of what is in doubt, then serves.
func (p *Partition) settle(now Time) {
	s := &p.settling
	if p.renewing {
		return
	}
	for _, c := range s.left {
		s.underway++
		p.emit(Effect{Kind: Repair, To: p.peers[c.peer].Peer, ID: c.id})
	}
	s.left = nil
	if s.underway > 0 {
		return
	}
	p.phase = serving
	p.settling = settling{}
	for i := range p.peers {
		p.peers[i].asked, p.peers[i].askAt = 0, 0
	}
	p.mark = p.committed()
	p.trim()
	p.release(now)
}

// settled is Repaired while settling.
func (p *Partition) settled(now Time, to Peer, id object.ID, err error) {
	i := p.index(to)
	s := &p.settling
	s.underway--
	if errors.Is(err, object.ErrNoSpace) {
		p.setTight(to, true)
		s.underway++
		p.emit(Effect{Kind: Yield, To: to, ID: id})
		return
	}
	if err != nil {
		s.left = append(s.left, copyTo{i, id})
		p.peers[i].later(now, p.opt)
		return
	}
	p.peers[i].asked = now // it makes progress
	if s.underway == 0 && len(s.left) == 0 {
		p.settle(now)
	}
}

// tickSurvey asks again, and finds members that do not answer.
func (p *Partition) tickSurvey(now Time) {
	again := false
	for i := 1; i < len(p.view.ISR); i++ {
		m := &p.peers[i]
		waiting := !m.answer || p.settling.copying && p.settling.underway+len(p.settling.left) > 0
		if waiting && now >= m.asked+Time(p.opt.AckTimeout) && p.owes(i) && !p.renewing {
			p.expel(now, i)
		}
		if m.askAt == 0 || now < m.askAt {
			continue
		}
		m.askAt = 0
		if m.answer {
			again = true
		} else {
			p.emit(Effect{Kind: Survey, To: m.Peer})
		}
	}
	for i := range p.formers {
		if m := &p.formers[i]; m.askAt != 0 && now >= m.askAt {
			m.askAt = 0
			p.emit(Effect{Kind: Survey, To: m.Peer})
		}
	}
	if again && p.settling.copying {
		p.settle(now)
	}
}

// owes reports whether a member has not answered, or has failed to take a repair.
func (p *Partition) owes(i int) bool {
	if !p.peers[i].answer {
		return true
	}
	return p.settling.underway > 0 || slices.ContainsFunc(p.settling.left, func(c copyTo) bool { return c.peer == i })
}

// Repaired says how a Repair has ended. op is that of the effect, or nil.
func (p *Partition) Repaired(now Time, op *Op, to Peer, id object.ID, epoch state.Epoch, err error) {
	current := epoch == p.view.Epoch
	switch {
	case op == nil && current && p.phase == surveying:
		p.settled(now, to, id, err)
	case op != nil:
		p.brought(now, op, current, err)
	}
}
