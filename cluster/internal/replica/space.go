package replica

import (
	"errors"
	"slices"

	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// A full disk does not take its node out of the in-sync set. While a member is known to
// have no space, a change that may need some is made here first, where it is refused if it
// does: the members have the same blocks, so what needs no space here needs none there.
// Nobody has changed anything then.
//
// A member may run out of space before that is known. Then the change is on some and not
// on all, and nobody has an answer. A new epoch ends that: everything under way is refused,
// and settling makes all members equal to the primary. If a member lacks the space even for
// that, the primary gives up what it has where the member has holes. Everything that was
// acknowledged or read is on the member (INV-R1), so nothing but changes under way can be
// missing there, and those may as well not have been made.

// SetTight says whether the store of a member or learner, or of this node, has no space for
// more.
func (p *Partition) SetTight(m Peer, tight bool) {
	if p.view.has(m) {
		p.setTight(m, tight)
	}
}

func (p *Partition) setTight(m Peer, tight bool) {
	switch i := slices.Index(p.tight, m); {
	case tight && i < 0:
		p.tight = append(p.tight, m)
	case !tight && i >= 0:
		p.tight = slices.Delete(p.tight, i, i+1)
	}
}

func (p *Partition) isTight(m Peer) bool { return slices.Contains(p.tight, m) }

// short reports whether a member has no space. A node that is alone in sync finds out by
// itself.
func (p *Partition) short() bool {
	return len(p.tight) > 0 && len(p.view.ISR) > 1 && slices.ContainsFunc(p.view.ISR, p.isTight)
}

// noSpaceHere deals with a change for which this node has no space. It reports false if
// nobody else is in sync.
func (p *Partition) noSpaceHere(now Time, op *Op, err error) bool {
	switch {
	case op.careful && !errors.Is(err, object.ErrTorn):
		p.finish(now, op, err) // nobody has seen it
	case len(p.view.ISR) == 1:
		return false
	default:
		p.setTight(p.opt.Self, true)
		p.renew(now)
	}
	return true
}

// A learner without space is brought what it needs none for: what is to be removed there comes first, then what it
// has in part, and last what it has nothing of. What it has no space for waits, so that all else goes on, and what was
// given back meanwhile, there and elsewhere, is found by trying one of what waits: when that has found its place the
// rest is tried.

// maxHunger bounds the pause between such attempts, in learner time-outs.
const maxHunger = 8

// starve notes that the learner has no space for an object, nor then for those of which it has nothing.
func (m *peer) starve(now Time, id object.ID, o Options) {
	l := m.learner
	rest := len(l.queue) - l.fresh
	l.wanting = append(append(l.wanting, l.queue[rest:]...), id)
	l.queue, l.fresh = l.queue[:rest], 0
	l.probing = l.probing && l.probe != id
	m.starved(now, o)
}

// starved lets the learner be tried again after a pause.
func (m *peer) starved(now Time, o Options) {
	if m.hunger == 0 || now >= m.hungryUntil {
		m.hunger = max(o.LearnerTimeout, min(2*m.hunger, maxHunger*o.LearnerTimeout))
		m.hungryUntil = now + Time(m.hunger)
	}
}

// tryHungry tries one of the objects that wait for space.
func (m *peer) tryHungry(now Time) {
	l := m.learner
	if len(l.wanting) == 0 || l.probing || now < m.hungryUntil {
		return
	}
	l.probe, l.probing = l.wanting[0], true
	l.wanting = l.wanting[1:]
	l.queue = append(l.queue, l.probe)
}

// fed notes that an object was brought to the learner: if it was the one that was tried there is space again.
func (m *peer) fed(id object.ID) {
	l := m.learner
	if !l.probing || l.probe != id {
		return
	}
	l.probing, m.hunger = false, 0
	l.queue, l.fresh = append(l.queue, l.wanting...), len(l.wanting)
	l.wanting = nil
}

// noSpaceThere deals with a change for which a member or learner has no space.
func (p *Partition) noSpaceThere(now Time, op *Op, i int) {
	p.setTight(p.peers[i].Peer, true)
	if p.peers[i].learner != nil {
		p.peers[i].starved(now, p.opt)
		p.dropLearner(now, i)
		return
	}
	op.short |= 1 << i
	p.renew(now)
}

// renew proposes a new epoch. Nothing begins before it.
func (p *Partition) renew(now Time) {
	if p.renewing && now < p.renewAt {
		return
	}
	p.renewing, p.renewAt = true, now+Time(p.opt.Resend)
	p.emit(Effect{Kind: Renew})
}

// Yielded says how a Yield has ended, and whether anything was given up. If nothing was,
// the member has no excuse.
func (p *Partition) Yielded(now Time, to Peer, id object.ID, epoch state.Epoch, gave bool, err error) {
	if epoch != p.view.Epoch || p.phase != surveying {
		return
	}
	p.settling.underway--
	if err == nil && gave {
		p.doubt(id)
		p.renew(now) // who has been made equal to what is given up now is made equal again
		return
	}
	p.settling.left = append(p.settling.left, copyTo{p.index(to), id})
	p.peers[p.index(to)].later(now, p.opt)
}

// doubt has the next settling make all members equal to the primary in an object.
func (p *Partition) doubt(id object.ID) {
	p.remember(id, object.Version{Epoch: uint64(p.view.Epoch), Seq: ^uint64(0)})
}

// Doubt does that at once, by a new epoch, for objects that are not the same on all
// members although they should be. Only a primary that serves does; it reports whether.
func (p *Partition) Doubt(now Time, epoch state.Epoch, ids []object.ID) bool {
	if epoch != p.view.Epoch || !p.Serving() {
		return false
	}
	for _, id := range ids {
		p.doubt(id)
	}
	p.renew(now)
	return true
}

// Members are those in sync, the primary first. The slice is never changed.
func (p *Partition) Members() []Peer { return p.view.ISR }

// purge removes what this node has of a partition that others hold, when nothing that was
// begun earlier is under way in the store any more. It is never the last
// good copy: all who shall hold the partition are in sync. What was given up for lost is
// kept, for it may be all that is left.
func (p *Partition) purge() {
	p.purgeAt = 0
	v := &p.view
	if !p.holds || p.closed || p.purging || p.earlier > 0 || !p.current || !v.Whole || v.Lost != 0 && p.mark.Epoch < uint64(v.Lost) {
		return
	}
	p.mark, p.recent, p.trimmed = Mark{}, nil, 0
	p.applying++
	p.purging = true
	p.emit(Effect{Kind: Purge})
}

// Current says that what this node knows of the state is no older than its start. Before,
// it may be shown a past in which it did not hold what it has held since.
func (p *Partition) Current() {
	if p.current = true; p.role == outside && p.view.Epoch > 0 {
		p.purge()
	}
}

// Holder reports whether this node is in sync, or may be: what its store has counts.
func (p *Partition) Holder() bool { return p.role == member || p.role == primary }

// Returns reports whether this node was in sync once, and has what it had then: it comes back to what was its own, and
// what its disk has to hold.
func (p *Partition) Returns() bool { return p.mark != Mark{} }

// Tight reports whether a member or learner is known to have no space.
func (p *Partition) Tight() bool { return len(p.tight) > 0 }

// Taught reports whether the primary has begun to bring this node in sync in this epoch: it counts on
// what it has brought.
func (p *Partition) Taught() bool { return p.role == learning && p.session > 0 }

// Renounce says that nothing of what this node had of the partition, in which it is not in
// sync and not Taught, can be reached any more. It begins with nothing.
func (p *Partition) Renounce() {
	if p.Holder() || p.Taught() || p.closed {
		return
	}
	p.mark, p.recent, p.trimmed = Mark{}, nil, 0
	p.applying++
	p.emit(Effect{Kind: Purge})
}

// Purged says how a Purge has ended.
func (p *Partition) Purged(now Time, epoch state.Epoch, err error) {
	current := epoch == p.view.Epoch && p.session == 0 // what is removed was there before the session of a learner
	p.purging = false
	p.landed(now, current)
	switch {
	case !current: // see drained
	case err != nil:
		p.purgeAt = now + purgePause
	case p.role == outside && p.earlier == 0: // a learner is brought something, and what is late may land on the next disk
		p.holds = false
	}
}

// purgePause is the time between attempts to remove a partition.
const purgePause = Time(10e9)
