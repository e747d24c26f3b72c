package replicas

import (
	"math"
	"sync"
	"time"

	"sheepdog/cluster/internal/replica"
)

// Clients go first. As long as this node has a part in requests of clients, it brings
// learners few objects at a time, and pauses between them: in the mean as many are under
// way as leave clients their share. How many that is, is found by trying: from time to time
// nothing is brought for a moment, which tells how long changes of clients take then; how
// long they take otherwise tells what is left of it for them. So all counts that repairs cost
// clients, wherever: also what disks do about them afterwards. Without clients, or where they
// wait for a learner, it goes as fast as it can.
//
// Nodes that bring the same learner in sync slow down the same clients. They pause at the same
// moments of the day, so that each sees what all of them do, and all of them together leave the
// share. Where clocks differ, each takes what the others do for usual, and less is left.

const (
	// paceKeep is the share of what they would get done that clients keep beside repairs;
	// paceKeepLast if something has a single copy left.
	paceKeep     = 0.74
	paceKeepLast = 0.62
	// paceBegin is how many objects are under way in the mean until it is known what that costs.
	// It stays between paceLeast and paceMost.
	paceBegin = 0.25
	paceLeast = 0.02
	paceMost  = 3.6
	// paceFull is the part of the time in which objects are under way before there is one more at
	// a time: there are always some pauses.
	paceFull = 0.9
	// paceSlower and paceFaster bound what one look at the share changes.
	paceSlower = 0.6
	paceFaster = 1.4
	// paceIdle is how long after the last request clients count as gone.
	paceIdle = replica.Time(time.Second)
	// paceSaved bounds what is saved up while nothing was to be brought, paceOwed what is
	// owed, in time of one object under way.
	paceSaved = 100 * time.Millisecond
	paceOwed  = time.Second
	// In each pacePeriod nothing is begun for paceRest, and what clients do counts as usual when
	// nothing has been under way for paceCalm.
	pacePeriod = 3 * time.Second
	paceRest   = 300 * time.Millisecond
	paceCalm   = replica.Time(100 * time.Millisecond)
	// paceSamples are what a measurement is made of, paceEvery how often the share is looked at.
	paceSamples = 8
	paceEvery   = replica.Time(500 * time.Millisecond)
	// paceFade is how much an older measurement of what is usual counts beside the next one.
	paceFade = 0.5
)

// pace is the budget of a node that brings learners in sync.
type pace struct {
	// phase is the time of day at the beginning of the node's clock: all nodes rest together.
	phase time.Duration

	mu       sync.Mutex
	at       replica.Time // until when underway is accounted for
	underway int64        // objects since then
	active   replica.Time // when there were requests of clients last; 0: never
	seen     uint64       // requests at the last tick
	last     bool         // something has a single copy left
	credit   time.Duration

	calm     replica.Time // since when this node rests and nothing is under way; 0: it does not
	resting  latencies    // of changes in this rest
	working  latencies    // of others since compared
	usual    float64      // of changes while this node rests, in ns; 0: not known yet
	compared replica.Time
	mean     float64 // objects under way in the mean; 0: paceBegin
}

// latencies are how long changes took, in ns.
type latencies struct{ sum, n float64 }

func (l *latencies) add(d replica.Time) { l.sum, l.n = l.sum+float64(d), l.n+1 }

// took notes from when to when a change of a client was under way.
func (p *pace) took(began, ended replica.Time) {
	p.mu.Lock()
	if p.calm != 0 && began >= p.calm+paceCalm {
		p.resting.add(ended - began)
	} else {
		p.working.add(ended - began)
	}
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
	if !busy && p.busy(now) { // other clients, perhaps
		p.credit = 0 // what is under way from before is paid for from now on
		p.usual, p.resting, p.working = 0, latencies{}, latencies{}
	}
	p.pass(now, underway)
	switch calm := p.rests(now) && underway == 0; {
	case calm && p.calm == 0:
		p.calm = now
	case !calm && p.calm != 0:
		p.calm = 0
		p.rested()
	}
	if now >= p.compared+paceEvery {
		p.compared = now
		p.compare()
	}
}

func (p *pace) busy(now replica.Time) bool { return p.active != 0 && now <= p.active+paceIdle }

// rests reports whether it is a moment in which nothing is begun.
func (p *pace) rests(now replica.Time) bool {
	return (p.phase+time.Duration(now))%pacePeriod < paceRest
}

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
	p.resting, p.working, p.usual, p.mean = latencies{}, latencies{}, 0, 0
	p.mu.Unlock()
}

// rested learns from a rest what is usual.
func (p *pace) rested() {
	if p.resting.n >= paceSamples {
		usual := p.resting.sum / p.resting.n
		if p.usual != 0 {
			usual = p.usual*paceFade + usual*(1-paceFade)
		}
		p.usual = usual
	}
	p.resting = latencies{}
}

// compare brings what clients keep closer to their share.
func (p *pace) compare() {
	if p.usual == 0 || p.working.n < paceSamples {
		return
	}
	keep := paceKeep
	if p.last {
		keep = paceKeepLast
	}
	kept := p.usual / (p.working.sum / p.working.n)
	p.mean = max(paceLeast, min(paceMost, p.share()*max(paceSlower, min(paceFaster, kept/keep))))
	p.working = latencies{}
}

// share is how many objects may be under way in the mean.
func (p *pace) share() float64 {
	if p.mean == 0 {
		return paceBegin
	}
	return p.mean
}

// limitNow is how many objects may be under way at a time.
func (p *pace) limitNow() int64 { return int64(math.Ceil(p.share() / paceFull)) }

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
	if p.credit <= 0 || p.rests(now) {
		return 0
	}
	return min(p.limitNow(), most)
}
