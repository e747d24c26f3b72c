package replicas

import (
	"sync"
	"time"

	"sheepdog/cluster/internal/replica"
)

// Clients go first. As long as this node has a part in requests of clients, it brings
// learners few objects at a time, and pauses between them: in the mean as many are under
// way as leave clients their share. How many that is, is measured: how long changes of
// clients take beside a repair, and how long in the pauses. Without clients, or where they
// wait for a learner, it goes as fast as it can.
//
// Every node keeps the share by itself. Two nodes that bring the same learner in sync at
// the same time, and slow down the same client, leave it the product of both; what the other
// one does is in both of a node's measurements, so that each sees its own part.

const (
	// paceKeep is the share of what they would get done that clients keep beside the repairs of
	// one node; paceKeepLast if something has a single copy left.
	paceKeep     = 0.72
	paceKeepLast = 0.6
	// paceMost bounds the objects under way beside clients. The next step is taken when there
	// were hardly any pauses with as many as there are now, or mostly pauses.
	paceMost  = 4
	paceMore  = 0.9
	paceFewer = 0.5
	// paceIdle is how long after the last request clients count as gone.
	paceIdle = replica.Time(time.Second)
	// paceSaved bounds what is saved up while nothing was to be brought, paceOwed what is
	// owed, in time of one object under way.
	paceSaved = 100 * time.Millisecond
	paceOwed  = time.Second
	// paceSamples are what either measurement is made of, paceEvery how often they are compared.
	paceSamples = 16
	paceEvery   = replica.Time(500 * time.Millisecond)
	// paceFade is how much an older measurement counts beside the next one.
	paceFade = 0.5
)

// pace is the budget of a node that brings learners in sync. The zero value is ready.
type pace struct {
	mu       sync.Mutex
	at       replica.Time // until when underway is accounted for
	underway int64        // objects since then
	active   replica.Time // when there were requests of clients last; 0: never
	seen     uint64       // requests at the last tick
	last     bool         // something has a single copy left
	credit   time.Duration

	beside, alone latencies // of changes beside repairs, and without
	compared      replica.Time
	slowdown      float64 // the former by the latter; 0: not known yet
	most          int64   // objects at a time; 0: one
}

// latencies is a mean that forgets.
type latencies struct{ sum, n float64 }

func (l *latencies) fade() { l.sum, l.n = l.sum*paceFade, l.n*paceFade }

// took notes how long a change of a client took, and whether a repair was under way meanwhile.
func (p *pace) took(d time.Duration, beside bool) {
	p.mu.Lock()
	l := &p.alone
	if beside {
		l = &p.beside
	}
	l.sum += float64(d)
	l.n++
	p.mu.Unlock()
}

// tick lets time pass. requests counts those of clients so far, waiting are under way.
func (p *pace) tick(now replica.Time, requests uint64, waiting, underway int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	busy := p.busy(now)
	if requests != p.seen || waiting > 0 {
		p.seen, p.active = requests, now
	}
	if !busy && p.busy(now) {
		p.credit = 0 // what is under way from before is paid for from now on
	}
	p.pass(now, underway)
	if now >= p.compared+paceEvery {
		p.compared = now
		p.compare()
	}
}

func (p *pace) busy(now replica.Time) bool { return p.active != 0 && now <= p.active+paceIdle }

// pass accounts for the time since the last call.
func (p *pace) pass(now replica.Time, underway int64) {
	d := time.Duration(now - p.at)
	p.credit += time.Duration(float64(d)*p.share()) - d*time.Duration(p.underway)
	p.credit = max(min(p.credit, paceSaved), -paceOwed)
	p.at, p.underway = now, underway
}

// rest forgets what was measured: there is nothing to be brought.
func (p *pace) rest() {
	p.mu.Lock()
	p.beside, p.alone, p.slowdown, p.most = latencies{}, latencies{}, 0, 0
	p.mu.Unlock()
}

// compare learns from what was measured since, if that is enough.
func (p *pace) compare() {
	if p.beside.n < paceSamples || p.alone.n < paceSamples {
		return
	}
	p.slowdown = max(1, p.beside.sum/p.beside.n*p.alone.n/p.alone.sum)
	p.beside.fade()
	p.alone.fade()
	switch f := p.fraction(); {
	case f >= paceMore && p.limitNow() < paceMost:
		p.most = p.limitNow() + 1
	case f < paceFewer && p.most > 1:
		p.most--
	default:
		return
	}
	p.beside, p.alone = latencies{}, latencies{} // of another number
}

func (p *pace) limitNow() int64 { return max(1, p.most) }

// fraction is the part of the time in which repairs may be under way: a client that gets
// 1/slowdown done in it keeps its share of the whole then. There are always some pauses, to
// measure in.
func (p *pace) fraction() float64 {
	keep := paceKeep
	if p.last {
		keep = paceKeepLast
	}
	if p.slowdown == 0 {
		return 1 - keep // as if clients stood still
	}
	return min((1-keep)/max(1-1/p.slowdown, 1e-3), paceMore)
}

// share is how many objects may be under way in the mean.
func (p *pace) share() float64 { return p.fraction() * float64(p.limitNow()) }

// limit is how many objects may be under way: of most as many as it likes without clients.
func (p *pace) limit(now replica.Time, most, underway int64, fewest int32) int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.last = fewest <= 1
	if !p.busy(now) {
		p.at, p.underway, p.credit = now, underway, min(p.credit, paceSaved)
		return most
	}
	p.pass(now, underway)
	if p.credit <= 0 {
		return 0
	}
	return min(p.limitNow(), most)
}
