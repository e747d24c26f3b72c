package replicas

import (
	"slices"
	"time"

	"sheepdog/cluster/internal/replica"
	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// loading is what is known while a part finds out what is in the store.
type loading struct {
	begun    bool
	attempts int       // that have failed
	toldAt   time.Time // when the log was told last
}

const (
	// loadAttempts is after how many attempts a node gives up what others have as well, about 4 s after the first: what a
	// disk does not say in that time it will not say soon, and clients wait.
	loadAttempts   = 5
	firstLoadPause = 250 * time.Millisecond
	// lastLoadPause is the longest time between attempts. Who asks for something of the partition meanwhile is kept waiting until the
	// next one: it is less than the patience of others.
	lastLoadPause = 5 * time.Second
	// loadTold is the time between messages in the log about one partition.
	loadTold = time.Minute
)

// pause is how long to wait after an attempt that has failed.
func (l *loading) pause() time.Duration {
	return min(firstLoadPause<<min(l.attempts-1, 10), lastLoadPause)
}

// load finds out what is in the store before anything else is done. It reports whether
// that is known.
func (p *part) load(e *event) bool {
	r := p.r
	switch {
	case e.kind == evLoaded && e.report != nil:
		p.begin(*e.report)
	case e.kind == evLoaded:
		if !p.unloaded(e.err) {
			return false
		}
	case e.kind == evClose:
		p.unknown, p.first = true, nil
		p.begin(replica.Report{})
		p.p.Close()
	case !p.loading.begun && !r.stored[p.group]:
		p.begin(replica.Report{})
		return true
	default:
		p.wait(e)
		if !p.loading.begun {
			p.loading.begun = true
			p.attempt(0)
		}
		return false
	}
	waiting := p.waiting
	p.waiting = nil
	for i := range waiting {
		p.handle(waiting[i], true)
	}
	return false
}

// wait keeps an event until it is known what is in the store, if it means anything then.
func (p *part) wait(e *event) {
	switch e.kind {
	case evView:
		if p.first == nil || p.first.Epoch < e.view.Epoch {
			p.first = e.view
			p.waiting = slices.DeleteFunc(p.waiting, p.told)
		}
	case evTick, evCurrent, evLeave: // nothing has begun; see begin and unloaded
	default:
		if !p.told(*e) {
			p.waiting = append(p.waiting, *e)
		}
	}
}

// told answers a survey by who has taken over, and waits for nothing but that.
func (p *part) told(e event) bool {
	if e.kind != evSurvey || !p.former(e.in) {
		return false
	}
	e.in.reply(&replica.Effect{})
	return true
}

// former reports whether a survey is by the primary of the latest epoch, of which this node is no member. It has not
// served since it started, and does not then.
func (p *part) former(in *incoming) bool {
	v := p.first
	return p.loading.attempts > 0 && v != nil && v.Epoch == in.question.epoch && !slices.Contains(v.ISR, p.r.cfg.Self) && in.from == v.ISR[0]
}

// attempt asks the store what it has, after a pause.
func (p *part) attempt(pause time.Duration) {
	r := p.r
	r.works.Go(func() {
		if pause > 0 {
			select {
			case <-time.After(pause):
			case <-r.ctx.Done():
				return
			}
		}
		report, err := r.report(p.group)
		if r.ctx.Err() != nil {
			return
		}
		p.post(event{kind: evLoaded, report: report, err: err})
	})
}

// report is what is in the store of a partition; nil if it fails.
func (r *Replicas) report(g object.Group) (*replica.Report, error) {
	report := &replica.Report{Mark: r.cfg.Marks[g]}
	err := r.cfg.Store.List(r.ctx, g, func(i object.Info) error {
		if i.Uncertain || report.Mark.Less(i.Version) {
			report.Recent = append(report.Recent, i.Key.ID)
		}
		report.Holds = true
		return nil
	})
	if err != nil {
		return nil, err
	}
	return report, nil
}

// unloaded is called when the store has not said what it has. Who waits for that is refused, and asks again. After some attempts
// the node gives the partition up where others are in sync, lest nobody serves it; as a learner it goes to another disk if this one is
// out of service, and begins with nothing. It reports whether it does. Else it tries again.
func (p *part) unloaded(err error) (begins bool) {
	r, l, v := p.r, &p.loading, p.first
	l.attempts++
	p.unlisted.Store(&err)
	member := v == nil || slices.Contains(v.ISR, r.cfg.Self)
	if !member && r.cfg.Store.Failed(p.group) && p.abandon() {
		r.cfg.Logger.Info("partition gets another disk, for its own is out of service", "partition", p.group.String())
		p.begin(replica.Report{})
		p.p.Renounce()
		p.perform()
		p.note()
		return true
	}
	gives := member && v != nil && len(v.ISR) > 1 && l.attempts >= loadAttempts
	if gives {
		r.cfg.Propose(state.ChangeISR{Policy: p.group.Policy, Partition: p.group.Partition, Epoch: v.Epoch, Remove: r.cfg.Self.Node})
	}
	if now := time.Now(); l.attempts == 1 || l.attempts == loadAttempts || now.Sub(l.toldAt) >= loadTold {
		l.toldAt = now
		msg := "objects of a partition cannot be listed: this node takes no part in it"
		switch {
		case l.attempts < loadAttempts: // it may be over soon
		case gives:
			msg = "objects of a partition cannot be listed: this node leaves it to others that are in sync; repair its disk, or take it out with dog node md unplug"
		case member && v != nil:
			msg = "objects of a partition cannot be listed: nobody serves it, for this node is the last that is in sync; repair its disk"
		}
		r.cfg.Logger.Error(msg, "partition", p.group.String(), "err", err)
	}
	p.refuseWaiting(err)
	p.attempt(l.pause())
	return false
}

// refuseWaiting refuses what waits for the store.
func (p *part) refuseWaiting(err error) {
	waiting := p.waiting
	p.waiting = nil
	for i := range waiting {
		switch e := &waiting[i]; e.kind {
		case evSubmit:
			e.task.op.Err, e.task.op.Open = replica.ErrRetry, false
			e.task.finish(nil)
		case evAsk:
			e.in.reply(&replica.Effect{Err: err})
		case evSurvey, evReceive:
			e.in.reply(&replica.Effect{Err: replica.ErrEpoch})
		}
	}
}

func (p *part) begin(report replica.Report) {
	p.marked = p.r.cfg.Marks[p.group] != replica.Mark{}
	p.unlisted.Store(nil)
	p.p = replica.New(p.r.opt, report)
	if p.r.current.Load() {
		p.p.Current()
	}
	if p.first != nil {
		p.p.SetLease(p.r.now(), replica.Time(p.r.lease.Load()))
		p.p.SetView(p.r.now(), *p.first)
		p.first = nil
		p.perform()
	}
}

// Unlisted are partitions of which this node does not know what it has, for its store does not say.
type Unlisted struct {
	Unserved int          // of which it is the last member
	Example  object.Group // one of them
	Err      error        // its failure
}

// Unlisted tells of those.
func (r *Replicas) Unlisted() (u Unlisted) {
	r.mu.RLock()
	v := r.view
	r.mu.RUnlock()
	for _, p := range r.all() {
		err := p.unlisted.Load()
		policy := v.Policy(p.group.Policy)
		if err == nil || policy == nil {
			continue
		}
		if isr := policy.Partitions[p.group.Partition].ISR; len(isr) == 1 && isr[0] == r.cfg.Self.Node {
			if u.Unserved++; u.Err == nil || compareGroups(p.group, u.Example) < 0 {
				u.Example, u.Err = p.group, *err
			}
		}
	}
	return u
}
