package replica_test

import (
	"container/heap"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"time"

	"sheepdog/cluster/internal/gateway"
	"sheepdog/cluster/internal/replica"
	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// The simulation: some nodes with the production Partition and the production cluster
// state, in one goroutine with a clock of its own. Messages are lost, delayed,
// duplicated and reordered, links are cut, nodes are killed, lose their power, hang and
// come back, disks are slow and rot. What clients see must be linearizable.

const (
	simPartitions = 2
	simObjects    = 3 // of each partition
	simBlocks     = 6 // of each object
	simSlack      = 4 // blocks left when a disk begins to be tight
	ms            = replica.Time(time.Millisecond)
	second        = replica.Time(time.Second)

	leaseTime   = 2 * second
	downAfter   = leaseTime + second/2 // a silent node
	killedAfter = second / 2           // a process that is known to be gone
)

type sim struct {
	rng    *rand.Rand
	now    replica.Time
	events eventHeap
	count  int
	broken mutation

	nodes    []*simNode
	commands [][]byte // the ordered log
	oracle   *state.Machine
	cut      map[[2]state.NodeID]bool
	weak     *simNode // the last one that lost its power
	weakInc  uint64
	trouble  bool                        // faults are injected
	harsh    bool                        // power may fail everywhere
	eras     [simPartitions]replica.Time // when partitions were last begun again

	clients       []*simClient
	requests      map[*replica.Op]*request
	value         uint64
	generations   [simClients]uint64   // of the volumes, as decided
	generationsAt [][simClients]uint64 // after each command
	history       history
	previous      history // before partitions were begun again
	trace         []string
	failure       error
	full          bool // disks are small
	yields        int
	purges        int
	refused       int // for want of space
}

// mutation is a deliberate mistake, which the simulation must find.
type mutation string

const (
	ackEarly       mutation = "answer before the last member has applied"
	skipEpoch      mutation = "take changes of other epochs"
	skipSettle     mutation = "serve without settling"
	wrongSource    mutation = "reconcile from the learner"
	ignoreLease    mutation = "serve without a lease"
	skipGeneration mutation = "take changes of former owners"
	forgetDrain    mutation = "answer surveys while older changes are under way"
	trustMarks     mutation = "trust marks from before a restart of all members"
	trustFlushes   mutation = "do not tell flushes of a restart of all members"
	ignoreSpace    mutation = "take a change for made that a member had no space for"
	takeUndecided  mutation = "serve while it is not decided who holds the partition"
)

type event struct {
	at  replica.Time
	seq int
	fn  func()
}

type eventHeap []event

func (h eventHeap) Len() int { return len(h) }
func (h eventHeap) Less(i, j int) bool {
	return h[i].at < h[j].at || h[i].at == h[j].at && h[i].seq < h[j].seq
}
func (h eventHeap) Swap(i, j int) { h[i], h[j] = h[j], h[i] }
func (h *eventHeap) Push(x any)   { *h = append(*h, x.(event)) }
func (h *eventHeap) Pop() any {
	old := *h
	e := old[len(old)-1]
	*h = old[:len(old)-1]
	return e
}

func (s *sim) after(d replica.Time, fn func()) {
	s.count++
	heap.Push(&s.events, event{s.now + d, s.count, fn})
}

func (s *sim) run(until func() bool, limit replica.Time) bool {
	end := s.now + limit
	for !until() && s.failure == nil {
		if len(s.events) == 0 || s.events[0].at > end {
			s.now = end
			return until()
		}
		e := heap.Pop(&s.events).(event)
		s.now = e.at
		e.fn()
	}
	return s.failure == nil
}

func (s *sim) between(a, b replica.Time) replica.Time {
	return a + replica.Time(s.rng.Int64N(int64(b-a)+1))
}

func (s *sim) chance(p float64) bool { return s.rng.Float64() < p }

func (s *sim) logf(format string, args ...any) {
	if *simSeed == 0 {
		return
	}
	s.trace = append(s.trace, fmt.Sprintf("%10.3f ", time.Duration(s.now).Seconds())+fmt.Sprintf(format, args...))
}

func newSim(seed uint64, nodes, copies int, m mutation) *sim {
	s := &sim{rng: rand.New(rand.NewPCG(seed, 1)), oracle: state.New(), cut: map[[2]state.NodeID]bool{}, broken: m, history: history{}, previous: history{}, requests: map[*replica.Op]*request{}}
	at := time.Unix(0, 0)
	s.decide(state.Command{Format: &state.Format{ID: "sim", Created: at, Partitions: simPartitions, ObjectSizeShift: object.DefaultSizeShift, Copies: copies}})
	for i := range nodes {
		s.nodes = append(s.nodes, &simNode{s: s, id: state.NodeID(i + 1), name: fmt.Sprint("n", i+1), disk: newSimDisk()})
	}
	s.start(s.nodes...)
	s.place()
	return s
}

// decide appends a command to the log, which the nodes follow at their own pace.
func (s *sim) decide(c state.Command) state.Result {
	b := c.Encode()
	s.commands, s.generationsAt = append(s.commands, b), append(s.generationsAt, s.generations)
	before := s.oracle.View()
	r, err := state.DecodeResult(s.oracle.Apply(b))
	if err == nil {
		s.compareEras(before, s.oracle.View())
		for _, n := range s.nodes {
			n.follow()
		}
	}
	return r
}

// compareEras finds partitions that are begun again.
func (s *sim) compareEras(before, after *state.View) {
	if len(before.Policies) == 0 || len(before.Policies[0].Partitions) == 0 {
		return
	}
	for i := range after.Policies[0].Partitions {
		if after.Policies[0].Partitions[i].Restarted > before.Policies[0].Partitions[i].Restarted {
			s.logf("partition %d is begun again", i)
			s.eras[i] = s.now
			for b, values := range s.history {
				if partitionOf(b.id) == i {
					s.previous[b] = values
				}
			}
			if err := s.history.restart(i, s.now); err != nil {
				s.fail("%v", err)
			}
		}
	}
}

// place gives each partition random targets.
func (s *sim) place() {
	v := s.oracle.View()
	p := v.Policies[0]
	c := state.SetTargets{Policy: p.ID, Since: v.Epoch, Targets: make([][]state.NodeID, simPartitions)}
	for i := range c.Targets {
		for _, k := range s.rng.Perm(len(s.nodes))[:min(p.Copies, len(s.nodes))] {
			c.Targets[i] = append(c.Targets[i], s.nodes[k].id)
		}
	}
	s.logf("targets %v", c.Targets)
	s.decide(state.Command{SetTargets: &c})
}

// watch is the leader: it renews leases, and says who is up and who is down. A lease
// begins when the node asks for it, and is granted when the leader hears that, to nobody
// who has been declared down: else a node that has just been given up might get one.
func (s *sim) watch() {
	for _, n := range s.nodes {
		n := n
		if n.running() && !n.apart {
			sent := s.now
			s.after(s.between(0, 50*ms), func() {
				if n.running() && !n.apart {
					n.heard = s.now
					if m := s.oracle.View().Node(n.id); m.State != state.NodeUp || m.Incarnation != n.inc {
						return // it may ask again when it is up
					}
					n.lease = max(n.lease, sent+leaseTime)
					for _, p := range n.parts {
						p.SetLease(s.now, n.leaseEnd())
						n.perform(p)
					}
				}
			})
		}
		m := s.oracle.View().Node(n.id)
		silent := s.now - n.heard
		switch {
		case m.State == state.NodeUp && (silent > downAfter || !n.alive && s.now-n.died > killedAfter || n.inc != m.Incarnation && n.alive):
			s.logf("%s is down", n.name)
			s.decide(state.Command{SetNode: &state.SetNode{Node: n.id, Incarnation: m.Incarnation, State: state.NodeDown}})
		case m.State == state.NodeDown && n.running() && !n.apart && silent < leaseTime && n.inc == m.Incarnation:
			s.logf("%s is up", n.name)
			s.decide(state.Command{SetNode: &state.SetNode{Node: n.id, Incarnation: m.Incarnation, State: state.NodeUp}})
		}
	}
	if live := s.live(); s.chance(0.2) && slices.ContainsFunc(live, func(l state.Life) bool { return slices.Contains(s.oracle.View().UndecidedMembers(), l.Node) }) {
		s.decide(state.Command{Confirm: &state.Confirm{Live: live}})
	}
	s.after(s.between(200*ms, 400*ms), s.watch)
}

// live are the nodes that the leader has heard of lately. They may have died since.
func (s *sim) live() (list []state.Life) {
	for _, n := range s.nodes {
		if m := s.oracle.View().Node(n.id); m != nil && m.State == state.NodeUp && m.Incarnation == n.inc && s.now-n.heard < second/2 {
			list = append(list, state.Life{Node: n.id, Incarnation: n.inc})
		}
	}
	return list
}

// send brings a message to a node, or not.
func (s *sim) send(from, to *simNode, fn func()) {
	if s.cut[[2]state.NodeID{from.id, to.id}] || s.trouble && s.chance(0.01) {
		return
	}
	d := s.between(ms/20, 2*ms)
	if s.trouble && s.chance(0.02) {
		d = s.between(10*ms, 300*ms)
	}
	inc, back := to.inc, to.alive
	deliver := func() { to.whenAwake(inc, fn) }
	if !back {
		return
	}
	s.after(d, deliver)
}

// errLost: the answer is unknown.
var errLost = fmt.Errorf("connection lost: %w", replica.ErrRetry)

// call sends a request whose answer comes exactly once: that of handle, or errLost. A
// request may arrive twice.
func call[T any](s *sim, from, to *simNode, handle func(reply func(T, error)), done func(T, error)) {
	var zero T
	answered := false
	inc := from.inc
	finish := func(v T, err error) {
		if answered {
			return
		}
		answered = true
		from.whenAwake(inc, func() { done(v, err) })
	}
	arrive := func() {
		handle(func(v T, err error) { s.send(to, from, func() { finish(v, err) }) })
	}
	s.send(from, to, arrive)
	if s.trouble && s.chance(0.02) {
		s.after(s.between(0, 500*ms), func() { s.send(from, to, arrive) })
	}
	s.after(s.between(300*ms, 800*ms), func() { finish(zero, errLost) })
}

// fail ends the simulation.
func (s *sim) fail(format string, args ...any) {
	if s.failure == nil {
		s.failure = fmt.Errorf(format, args...)
		s.logf("FAILURE: %v", s.failure)
	}
}

// simNode is one machine.
type simNode struct {
	s       *sim
	id      state.NodeID
	name    string
	inc     uint64
	alive   bool
	hung    bool
	apart   bool // from the leader
	died    replica.Time
	heard   replica.Time // last contact with the leader
	lease   replica.Time
	machine *state.Machine
	applied int
	parts   []*replica.Partition
	disk    *simDisk
	asleep  []func() // what came while hung

	gate     *gateway.Gateway
	accesses map[*gateway.Request]*access
	flushes  map[*gateway.Flush]*simFlush
	conns    map[replica.Peer]uint64 // numbers of connections to others
	sessions map[replica.Peer]uint64 // newest connections of others
	newest   [simClients]uint64      // generations seen
}

func (n *simNode) running() bool { return n.alive && !n.hung }

func (n *simNode) self() replica.Peer { return replica.Peer{Node: n.id, Incarnation: n.inc} }

func (n *simNode) leaseEnd() replica.Time {
	if n.s.broken == ignoreLease {
		return n.s.now + 1000*second
	}
	return n.lease
}

// whenAwake calls fn unless the process that it was meant for has ended.
func (n *simNode) whenAwake(inc uint64, fn func()) {
	switch {
	case !n.alive || n.inc != inc:
	case n.hung:
		n.asleep = append(n.asleep, fn)
	default:
		fn()
	}
}

// start begins new processes of nodes, which are announced together.
func (s *sim) start(nodes ...*simNode) {
	c := &state.AnnounceAll{}
	for _, n := range nodes {
		c.Nodes = append(c.Nodes, state.Announce{Name: n.name, Address: n.name, Zone: n.name, Disks: []state.Disk{{ID: n.name, Weight: 1}}})
	}
	if s.chance(0.7) { // not by a leader that has only just been elected
		c.Live = slices.DeleteFunc(s.live(), func(l state.Life) bool { return slices.Contains(nodes, s.nodes[l.Node-1]) })
	}
	up := &state.SetNodes{}
	for i, l := range s.decide(state.Command{AnnounceAll: c}).Nodes {
		nodes[i].begin(l.Incarnation)
		if s.chance(0.7) { // else later
			up.Nodes = append(up.Nodes, state.SetNode{Node: l.Node, Incarnation: l.Incarnation, State: state.NodeUp})
		}
	}
	s.decide(state.Command{SetNodes: up})
}

func (n *simNode) begin(incarnation uint64) {
	s := n.s
	n.alive, n.hung, n.inc = true, false, incarnation
	n.heard, n.lease = s.now, 0
	n.machine, n.applied, n.parts = state.New(), 0, nil
	n.asleep = nil
	n.gate, n.accesses = gateway.New(gateway.Options{Retry: 20 * time.Millisecond, Timeout: time.Hour}), map[*gateway.Request]*access{}
	n.flushes = map[*gateway.Flush]*simFlush{}
	n.conns, n.sessions, n.newest = map[replica.Peer]uint64{}, map[replica.Peer]uint64{}, [simClients]uint64{}
	o := replica.Options{
		Self: n.self(), AckTimeout: time.Second, LearnerTimeout: 500 * time.Millisecond, Resend: 20 * time.Millisecond,
	}
	for i := range simPartitions {
		n.parts = append(n.parts, replica.New(o, n.disk.report(i)))
	}
	s.logf("%s starts as %d", n.name, n.inc)
	n.follow()
	n.tick(n.inc)
}

func (n *simNode) tick(inc uint64) {
	if !n.alive || n.inc != inc {
		return
	}
	if !n.hung {
		for _, p := range n.parts {
			p.Tick(n.s.now)
			p.Grant(n.s.now, 1)
			n.perform(p)
		}
		n.gate.Tick(n.s.now)
		n.performGate()
		if n.s.full && n.s.chance(0.03) {
			n.askSpace()
		}
		if n.s.chance(0.05) {
			n.syncMarks()
		}
	}
	n.s.after(10*ms, func() { n.tick(inc) })
}

// askSpace learns from a node whether it has space.
func (n *simNode) askSpace() {
	s, to := n.s, n.s.nodes[n.s.rng.IntN(len(n.s.nodes))]
	m := to.self()
	call(s, n, to, func(reply func(bool, error)) { reply(to.tight(), nil) }, func(tight bool, err error) {
		for _, p := range n.parts {
			if err == nil {
				p.SetTight(m, tight)
			}
		}
	})
}

// syncMarks makes the marks durable, with all that they cover.
func (n *simNode) syncMarks() {
	marks := make([]replica.Mark, len(n.parts))
	for i, p := range n.parts {
		marks[i] = p.Mark()
	}
	n.disk.sync()
	for i, m := range marks {
		n.disk.mark(i, m)
	}
}

// kill ends the process; what it wrote is there, unless the power goes with it.
func (n *simNode) kill(power bool) {
	n.s.logf("%s is killed, power cut: %v", n.name, power)
	n.alive, n.hung, n.died = false, false, n.s.now
	n.disk.crash(n.s, power)
	if power {
		n.s.weak, n.s.weakInc = n, n.inc
	}
}

func (n *simNode) hang() {
	n.s.logf("%s hangs", n.name)
	n.hung = true
}

func (n *simNode) wake() {
	if !n.alive || !n.hung {
		return
	}
	n.s.logf("%s wakes", n.name)
	n.hung = false
	// In any order: messages of several connections are read by several goroutines.
	for _, fn := range n.asleep {
		n.s.after(n.s.between(0, ms), func() { n.whenAwake(n.inc, fn) })
	}
	n.asleep = nil
}

// follow applies what has been decided, some time later and in order.
func (n *simNode) follow() {
	inc := n.inc
	d := n.s.between(ms, 5*ms)
	if n.s.trouble && n.s.chance(0.2) {
		d = n.s.between(5*ms, 800*ms)
	}
	n.s.after(d, func() { n.catchUp(inc) })
}

func (n *simNode) catchUp(inc uint64) {
	if !n.alive || n.inc != inc {
		return
	}
	if n.apart || n.hung {
		n.s.after(50*ms, func() { n.catchUp(inc) })
		return
	}
	// One command at a time, so that views are skipped only now and then.
	upTo := len(n.s.commands)
	if n.applied < upTo && n.s.chance(0.5) {
		upTo = n.applied + 1
		n.s.after(n.s.between(0, 5*ms), func() { n.catchUp(inc) })
	}
	for ; n.applied < upTo; n.applied++ {
		n.machine.Apply(n.s.commands[n.applied])
	}
	v := n.machine.View()
	if m := v.Node(n.id); m == nil || m.Incarnation != n.inc || len(v.Policies[0].Partitions) == 0 {
		return
	}
	defer n.performGate()
	if v.Node(n.id).State == state.NodeUp {
		for _, p := range n.parts {
			p.Current()
			n.perform(p)
		}
	}
	for i, p := range n.parts {
		q := v.Policies[0].Partitions[i]
		if q.Undecided() && n.s.broken != takeUndecided {
			continue
		}
		w := viewOf(v, i)
		w.Restarted = q.Restarted
		if n.s.broken == trustMarks {
			w.Restarted = 0
		}
		if n.s.broken == trustFlushes {
			q.Restarted = 0
		}
		p.SetView(n.s.now, w)
		n.perform(p)
		n.gate.SetView(n.s.now, object.Group{Policy: 1, Partition: object.Partition(i)}, gateway.View{Epoch: w.Epoch, ISR: w.ISR, Learners: w.Learners, Restarted: q.Restarted})
	}
}

func viewOf(v *state.View, i int) replica.View {
	part := &v.Policies[0].Partitions[i]
	peers := func(ids []state.NodeID) (list []replica.Peer) {
		for _, id := range ids {
			list = append(list, replica.Peer{Node: id, Incarnation: v.Node(id).Incarnation})
		}
		return list
	}
	return replica.View{Epoch: part.Epoch, ISR: peers(part.ISR), Learners: peers(part.Learners), Former: peers(part.Former), MinInSync: v.Policies[0].MinInSync, Lost: part.Lost, Whole: wholeIn(v, part)}
}

// wholeIn reports whether all who shall hold a partition, and nobody else, hold it.
func wholeIn(v *state.View, p *state.Partition) bool {
	if p.Undecided() || len(p.ISR) != len(p.Targets) {
		return false
	}
	for _, id := range p.Targets {
		if !slices.Contains(p.ISR, id) || v.Node(id).State != state.NodeUp {
			return false
		}
	}
	return true
}

// simDisk holds blocks: those of the store, and those that a power cut leaves.
type simDisk struct {
	objects  map[object.ID]*simObject
	durable  map[object.ID]*simObject
	marks    [simPartitions]replica.Mark
	dirty    map[object.ID]bool // changed since the marks were made durable
	slow     bool
	capacity int // blocks
	begun    int // operations of a process that has ended do nothing
}

type simObject struct {
	version object.Version
	blocks  [simBlocks]uint64
}

func newSimDisk() *simDisk {
	return &simDisk{capacity: 1 << 30, objects: map[object.ID]*simObject{}, durable: map[object.ID]*simObject{}, dirty: map[object.ID]bool{}}
}

func clone(m map[object.ID]*simObject) map[object.ID]*simObject {
	out := make(map[object.ID]*simObject, len(m))
	for id, o := range m {
		c := *o
		out[id] = &c
	}
	return out
}

// used counts the blocks that are no holes.
func (d *simDisk) used() (count int) {
	for _, o := range d.objects {
		for _, v := range o.blocks {
			if v != 0 {
				count++
			}
		}
	}
	return count
}

func (d *simDisk) sync() { d.durable = clone(d.objects) }

func (d *simDisk) mark(i int, m replica.Mark) {
	d.marks[i] = m
	for id := range d.dirty {
		if o := d.objects[id]; partitionOf(id) == i && (o == nil || !m.Less(o.version)) {
			delete(d.dirty, id)
		}
	}
}

func (d *simDisk) report(i int) replica.Report {
	r := replica.Report{Mark: d.marks[i]}
	for _, id := range slices.Sorted(maps.Keys(d.dirty)) {
		if partitionOf(id) == i {
			r.Recent = append(r.Recent, id)
		}
	}
	for id := range d.objects {
		r.Holds = r.Holds || partitionOf(id) == i
	}
	return r
}

// crash ends what is under way. Without power, each block that was not made durable may
// be old or new.
func (d *simDisk) crash(s *sim, power bool) {
	d.begun++
	if !power {
		return
	}
	for _, id := range slices.Sorted(maps.Keys(d.objects)) {
		old := d.durable[id]
		o := d.objects[id]
		if old == nil {
			old = &simObject{}
			if s.chance(0.5) {
				delete(d.objects, id)
				continue
			}
		}
		for b := range o.blocks {
			if s.chance(0.5) {
				o.blocks[b] = old.blocks[b]
			}
		}
	}
	for _, id := range slices.Sorted(maps.Keys(d.durable)) {
		if d.objects[id] == nil && s.chance(0.5) {
			c := *d.durable[id]
			d.objects[id] = &c // its deletion was not durable
		}
	}
	d.sync()
}

func (n *simNode) put(id object.ID, v object.Version, first int, values []uint64) {
	n.s.logf("%s: stored %s %v %d: %v", n.name, id, v, first, values)
	n.disk.write(id, v, first, values)
}

func (d *simDisk) write(id object.ID, v object.Version, first int, values []uint64) {
	o := d.objects[id]
	if o == nil {
		o = new(simObject)
		d.objects[id] = o
	}
	d.dirty[id] = true
	o.version = v
	copy(o.blocks[first:], values)
}

// duration is how long an operation of the disk takes.
func (d *simDisk) duration(s *sim) replica.Time {
	if d.slow && s.chance(0.3) {
		return s.between(100*ms, 1500*ms)
	}
	return s.between(ms/50, 3*ms)
}

// do carries out an operation at some time, and tells some time after that.
func (n *simNode) do(op func(), done func()) {
	d, run, inc := n.disk, n.disk.begun, n.inc
	n.s.after(d.duration(n.s), func() {
		if d.begun != run {
			return
		}
		op()
		n.s.after(d.duration(n.s)/4, func() { n.whenAwake(inc, done) })
	})
}

func partitionOf(id object.ID) int { return int(id.Index()) % simPartitions }
