package sim

import (
	"math/rand/v2"
	"slices"
	"time"
)

// setup is what a simulation is like.
type setup struct {
	seed       uint64
	nodes      int
	gateways   int // of these have no disks
	copies     int
	partitions int
	volumes    int
	objects    uint32        // of each volume
	sectors    int           // of each object that are used
	depth      int           // requests of a client at a time
	beat       time.Duration // between them, at most
	flush      float64       // chance that a client flushes at a beat
	trouble    time.Duration
	pause      time.Duration // between faults, at most
	faults     [faultKinds]int
	harsh      bool // power may fail everywhere
	room       int  // of small disks for objects, at most, in bytes
	sudden     bool // others fill disks, too
	shared     bool // the nodes do not compute the same state once more each

	lost    float64       // messages,
	late    float64       // by up to
	delay   time.Duration // and
	doubled float64
	behind  float64       // views,
	lag     time.Duration // by up to

	lease      time.Duration
	patience   time.Duration // of primaries
	contend    time.Duration // between take-overs of a volume, at most
	marks      time.Duration // between keeping marks, at most
	checkpoint time.Duration
	scrub      time.Duration // between scrubbing, at most
}

// fault is a kind of fault.
type fault int

const (
	faultKill fault = iota
	faultHang
	faultCut
	faultMend
	faultApart
	faultSlow
	faultPlace
	faultRenew
	faultBlackout
	faultRot
	faultLink
	faultDepose
	faultDoubt
	faultSpace
	faultKinds
)

// The kinds of stories. Each draws its own odds (swarm testing: Groce et al., 2012), so
// that some have much of what others have nothing of. Most are about something.
var themes = []struct {
	name   string
	weight int
	shape  func(s *setup, rng *rand.Rand)
}{
	{"anything", 3, func(s *setup, rng *rand.Rand) {
		for i := range s.faults {
			if rng.IntN(3) > 0 {
				s.faults[i] = 1 + rng.IntN(4)
			}
		}
	}},
	// What is there when all have started anew.
	{"blackouts", 3, func(s *setup, rng *rand.Rand) {
		s.harsh, s.copies, s.gateways = true, 2+rng.IntN(2), min(s.gateways, s.nodes-2)
		s.faults[faultBlackout], s.faults[faultKill], s.faults[faultHang] = 6, rng.IntN(2), rng.IntN(2)
		s.faults[faultSlow], s.faults[faultPlace], s.faults[faultRenew] = rng.IntN(2), rng.IntN(2), rng.IntN(13)
		s.pause, s.trouble = s.between(rng, second/4, 2*second), s.between(rng, second, 5*second)
		s.marks, s.checkpoint, s.flush = s.between(rng, 50*ms, 5*second), s.between(rng, second/2, 20*second), []float64{0, 0, 0.02, 0.1}[rng.IntN(4)]
		if rng.IntN(2) == 0 { // little is changed after marks were kept
			s.objects, s.depth, s.beat = 8+uint32(rng.IntN(16)), 1+rng.IntN(2), s.between(rng, 20*ms, 100*ms)
		}
	}},
	// Messages are late while epochs change.
	{"epochs", 3, func(s *setup, rng *rand.Rand) {
		s.copies, s.partitions = 2+rng.IntN(2), 1
		s.faults[faultRenew], s.faults[faultPlace], s.faults[faultSlow] = 4+rng.IntN(8), rng.IntN(3), rng.IntN(2)
		s.faults[faultCut], s.faults[faultMend], s.faults[faultKill] = rng.IntN(2), rng.IntN(2), rng.IntN(2)
		s.pause, s.trouble = s.between(rng, 20*ms, 200*ms), s.between(rng, second, 3*second)
		s.doubled, s.late, s.delay, s.lost = 0.3*rng.Float64(), 0.2*rng.Float64(), s.between(rng, 50*ms, second), 0.03*rng.Float64()
		s.objects, s.beat = 1+uint32(rng.IntN(2)), s.between(rng, 2*ms, 10*ms)
	}},
	// They go while changes are under way.
	{"primaries", 2, func(s *setup, rng *rand.Rand) {
		s.copies, s.partitions, s.gateways = 3, 1<<rng.IntN(2), 0
		s.faults[faultKill], s.faults[faultPlace], s.faults[faultSlow], s.faults[faultCut], s.faults[faultMend] = 2+rng.IntN(3), rng.IntN(4), 1+rng.IntN(3), rng.IntN(3), 1
		s.pause, s.trouble = s.between(rng, 100*ms, second), s.between(rng, second, 4*second)
		s.lost, s.late, s.delay = 0.1*rng.Float64(), 0.3*rng.Float64(), s.between(rng, 20*ms, second)
		s.lease = s.between(rng, 400*ms, second)
	}},
	{"rot", 2, func(s *setup, rng *rand.Rand) {
		s.copies, s.gateways = 2+rng.IntN(2), min(s.gateways, s.nodes-3)
		s.faults[faultRot], s.faults[faultKill], s.faults[faultPlace], s.faults[faultRenew], s.faults[faultHang] = 8, rng.IntN(3), rng.IntN(3), rng.IntN(2), rng.IntN(2)
		s.checkpoint, s.pause = s.between(rng, 200*ms, 2*second), s.between(rng, 100*ms, second)
		if rng.IntN(2) == 0 { // so many that some are not in memory
			s.objects = 8 + uint32(rng.IntN(16))
		}
	}},
	// Who leads is stopped or cut off, and comes back.
	{"leaders", 2, func(s *setup, rng *rand.Rand) {
		s.faults[faultDepose], s.faults[faultHang], s.faults[faultApart], s.faults[faultCut], s.faults[faultMend] = 5, 1+rng.IntN(2), rng.IntN(3), rng.IntN(3), 1
		s.faults[faultKill], s.faults[faultPlace] = rng.IntN(2), rng.IntN(2)
		s.behind, s.lag, s.lease = 0.3*rng.Float64(), s.between(rng, 100*ms, 3*second), s.between(rng, 300*ms, second)
		s.contend = s.between(rng, 300*ms, 2*second)
	}},
	// Members start anew, and who leads does not know who else lives.
	{"doubts", 2, func(s *setup, rng *rand.Rand) {
		s.harsh, s.copies, s.gateways, s.partitions = true, 2+rng.IntN(2), min(s.gateways, s.nodes-3), 1+rng.IntN(2)
		s.faults[faultDoubt], s.faults[faultHang], s.faults[faultPlace] = 4, rng.IntN(2), rng.IntN(2)
		s.pause, s.trouble = s.between(rng, second/2, 2*second), s.between(rng, second, 4*second)
		s.lease, s.flush = s.between(rng, 500*ms, 2*second), 0.2*rng.Float64()
	}},
	// Nodes that no leader hears serve their clients.
	{"leases", 2, func(s *setup, rng *rand.Rand) {
		s.faults[faultApart], s.faults[faultHang], s.faults[faultCut], s.faults[faultMend] = 5, rng.IntN(3), rng.IntN(2), 1
		s.lease, s.pause, s.trouble = s.between(rng, 300*ms, 800*ms), s.between(rng, 300*ms, 1500*ms), s.between(rng, 2*second, 5*second)
		s.copies, s.volumes, s.objects, s.depth = 2+rng.IntN(2), 2+rng.IntN(2), 1, 2+rng.IntN(3)
	}},
	// Two nodes do not reach each other, and others reach both.
	{"links", 1, func(s *setup, rng *rand.Rand) {
		s.faults[faultLink], s.faults[faultMend], s.faults[faultKill], s.faults[faultPlace] = 6, 2+rng.IntN(3), rng.IntN(2), rng.IntN(2)
		s.pause, s.trouble, s.lease = s.between(rng, 300*ms, 3*second), s.between(rng, 3*second, 8*second), s.between(rng, 400*ms, second)
	}},
	// Disks are full, and have space again.
	{"space", 2, func(s *setup, rng *rand.Rand) {
		s.faults[faultSpace], s.faults[faultKill], s.faults[faultPlace], s.faults[faultRenew], s.faults[faultHang], s.faults[faultSlow] = 8, rng.IntN(3), rng.IntN(4), rng.IntN(3), rng.IntN(2), rng.IntN(2)
		s.copies, s.gateways = []int{1, 2, 2, 3, 3, 3}[rng.IntN(6)], min(s.gateways, s.nodes-3)
		s.pause, s.checkpoint, s.sudden = s.between(rng, 100*ms, second), s.between(rng, 200*ms, 2*second), rng.IntN(4) == 0
		s.objects, s.sectors, s.beat, s.depth = 4+uint32(rng.IntN(20)), []int{40, 96}[rng.IntN(2)], s.between(rng, 2*ms, 10*ms), 2+rng.IntN(4)
	}},
}

func (s *setup) between(rng *rand.Rand, a, b time.Duration) time.Duration {
	return a + time.Duration(rng.Int64N(int64(b-a)+1))
}

// setupOf is what the simulation of a seed is like, and what it is about: if that is not
// given the seed decides that, too.
func setupOf(seed uint64, about string) (setup, string) {
	rng := rand.New(rand.NewPCG(seed, 2))
	s := setup{seed: seed, nodes: 3 + rng.IntN(3), partitions: 1 << rng.IntN(2), volumes: 1 + rng.IntN(3), objects: uint32(1 + rng.IntN(3)), depth: 1 + rng.IntN(4)}
	s.gateways = rng.IntN(2)
	s.copies = 1 + rng.IntN(3)
	s.sectors = []int{maxSectors, 40, 40, 96}[rng.IntN(4)]
	s.beat = s.between(rng, 4*ms, 20*ms)
	s.flush = []float64{0, 0.02, 0.02, 0.1}[rng.IntN(4)]
	s.trouble, s.pause = s.between(rng, second, 5*second), s.between(rng, 200*ms, 1500*ms)
	s.harsh = rng.IntN(2) == 0
	s.lost, s.late, s.delay, s.doubled = 0.02*rng.Float64(), 0.04*rng.Float64(), s.between(rng, 10*ms, 500*ms), 0.04*rng.Float64()
	s.behind, s.lag = 0.2*rng.Float64(), s.between(rng, 10*ms, second)
	s.lease = s.between(rng, 300*ms, 2*second)
	s.patience = []time.Duration{2 * ackTimeout, ackTimeout / 2, 100 * ms}[seed%3] // not drawn: the stories stay the same
	s.contend = s.between(rng, second, 6*second)
	s.marks, s.checkpoint, s.scrub = s.between(rng, 100*ms, 2*second), s.between(rng, 300*ms, 4*second), s.between(rng, second, 6*second)
	s.room = 128<<10 + rng.IntN(1<<20)
	sum := 0
	for _, t := range themes {
		sum += t.weight
	}
	k := rng.IntN(sum)
	for _, t := range themes {
		if k -= t.weight; about == "" && k < 0 || about == t.name {
			t.shape(&s, rng)
			return s, t.name
		}
	}
	panic("no stories about " + about)
}

// calm is a setup without faults.
func calm(seed uint64) setup {
	return setup{
		seed: seed, copies: 3, sectors: 40, beat: 8 * ms, flush: 0.02, lease: 2 * second, patience: 2 * ackTimeout, contend: 4 * second, marks: 2 * second,
		checkpoint: 2 * second, scrub: time.Hour, delay: 300 * ms, lag: 800 * ms,
	}
}

// fault does something bad, now and again.
func (w *world) fault() {
	if !w.trouble {
		return
	}
	w.after(w.between(0, w.pause), w.fault)
	w.look()
	sum := 0
	for _, weight := range w.faults {
		sum += weight
	}
	if sum == 0 {
		return
	}
	k, kind := w.rng.IntN(sum), fault(0)
	for i, weight := range w.faults {
		if k -= weight; k < 0 {
			kind = fault(i)
			break
		}
	}
	w.strikeWith(kind, w.nodes[w.rng.IntN(len(w.nodes))])
}

// strikeWith lets a fault happen, for the most part to one node.
func (w *world) strikeWith(kind fault, n *node) {
	if !w.harsh && w.recovering() && kind != faultRenew && kind != faultMend {
		return
	}
	if !w.endures(kind, n) {
		return
	}
	switch kind {
	case faultKill:
		power := w.chance(0.5) && (w.harsh || w.spare(n))
		if !w.mayKill(n) {
			return
		}
		if w.chance(0.5) && n.disk != nil {
			n.doom(power)
		} else {
			n.kill(power)
		}
		w.after(w.between(100*ms, 2*w.lease), n.revive)
	case faultHang:
		n.hang()
		w.after(w.between(100*ms, 2*w.lease+second/2), n.wake)
	case faultCut:
		other := w.nodes[w.rng.IntN(len(w.nodes))]
		w.cutLink(n, other, w.chance(0.5))
	case faultLink:
		other := w.nodes[w.rng.IntN(len(w.nodes))]
		if len(w.cut) == 0 {
			w.cutLink(n, other, true)
		}
	case faultMend:
		w.logf("links are mended")
		w.mend()
	case faultApart:
		w.separate(n)
	case faultSlow:
		n.slow = !n.slow
		w.logf("%s has a slow disk: %v", n.name, n.slow)
	case faultPlace:
		w.place()
	case faultRenew:
		w.renewOne()
	case faultBlackout:
		w.blackout()
	case faultRot:
		w.rot(n)
	case faultDepose:
		w.depose()
	case faultDoubt:
		w.doubt()
	case faultSpace:
		w.squeeze(n)
	}
}

// separate cuts a node off from the leader, or ends that. Who leads sends commands again after
// longer and longer pauses; that a node is there again is known sooner.
func (w *world) separate(n *node) {
	if n.apart && w.chance(0.5) {
		n.deaf = w.now() + w.between(0, 2*w.lease)
	}
	if !n.apart && w.chance(0.5) {
		w.after(w.between(w.lease, 3*w.lease), func() {
			if n.apart {
				w.separate(n)
			}
		})
	}
	n.apart = !n.apart
	w.logf("%s apart from the leader: %v", n.name, n.apart)
}

// cutLink cuts the connections between two nodes, from the first to the second or both.
func (w *world) cutLink(n, other *node, both bool) {
	if n == other {
		return
	}
	w.logf("cut %s -> %s, both ways: %v", n.name, other.name, both)
	w.happened("cut")
	w.cut[[2]nodeID{n.id, other.id}] = w.now()
	if both {
		w.cut[[2]nodeID{other.id, n.id}] = w.now()
	}
}

// recovering reports whether a node without power has not been taken out of the in-sync
// sets yet. What was not made durable is then on the others alone.
func (w *world) recovering() bool {
	if slices.ContainsFunc(w.nodes, func(n *node) bool { return n.crashing && n.power }) {
		return true
	}
	if w.weak == nil {
		return false
	}
	v := w.oracle.View()
	if m := v.Node(w.weak.id); m.Incarnation == w.weakInc && m.State == up {
		return true
	}
	w.weak = nil
	return false
}

// spare reports whether a node's power may be cut without loss: wherever it is in sync,
// so is a living one whose memory nobody has taken.
func (w *world) spare(n *node) bool {
	v := w.oracle.View()
	for _, p := range v.Policies[0].Partitions {
		if slices.Contains(p.ISR, n.id) && !slices.ContainsFunc(p.ISR, func(id nodeID) bool {
			o := w.nodes[id-1]
			return id != n.id && o.running() && !o.crashing && !o.apart && v.Node(id).Incarnation == o.life.inc && v.Node(id).State == up
		}) {
			return false
		}
	}
	return true
}

// blackout cuts the power of most nodes, or of those that hold a partition, at about the
// same time. Some come back together, some alone, and some late.
func (w *world) blackout() {
	power := w.chance(0.8)
	if !w.harsh && power || w.rotting() {
		return
	}
	hit := func(*node) bool { return w.chance(0.9) }
	if w.chance(0.5) {
		p := w.oracle.View().Policies[0].Partitions[w.rng.IntN(w.partitions)]
		hit = func(n *node) bool { return slices.Contains(p.ISR, n.id) || slices.Contains(p.Waiting, n.id) }
	}
	w.logf("blackout, power cut: %v", power)
	w.happened("blackout")
	together := w.between(100*ms, second)
	soon := time.Duration(0)
	if w.chance(0.5) { // some keep marks of a new epoch before, which cover all of the old one
		for range w.partitions {
			w.renewOne()
		}
		soon = w.between(50*ms, 300*ms)
	}
	for _, n := range w.nodes {
		if !hit(n) {
			continue
		}
		w.after(soon+w.between(0, 20*ms), func() { n.kill(power) })
		back := together
		if w.chance(0.4) {
			back = w.between(100*ms, 2*w.lease+second/2)
		}
		w.after(soon+back, n.revive)
	}
}
