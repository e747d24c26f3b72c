package replicas

import (
	"cmp"
	"context"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"sheepdog/cluster/internal/peer"
	"sheepdog/cluster/internal/replica"
	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// Store keeps this node's replicas: see cluster.Store.
type Store interface {
	Submit(*object.Request)
	Kick()
	Delete(ctx context.Context, k object.Key) error
	Sums(ctx context.Context, k object.Key) ([]uint64, error)
	Stat(ctx context.Context, k object.Key) (object.Info, error)
	List(ctx context.Context, g object.Group, fn func(object.Info) error) error
	Groups(ctx context.Context) ([]object.Group, error)
	// Tight reports whether there is little space left for a group. It takes no time.
	Tight(g object.Group) bool
	// Failed reports whether the disk of a group is out of service; Abandon gives the group
	// then another place, where it has nothing, and reports whether it did.
	Failed(g object.Group) bool
	Abandon(g object.Group) bool
	// Rotten are blocks that were found corrupt; no blocks: the object cannot be read at all.
	// Heal replaces one if data is the content that was there, else it fails.
	Rotten() map[object.Key][]uint32
	Heal(ctx context.Context, k object.Key, block uint32, data []byte) error
}

// Peer is the connections to another node; *peer.Peer is one.
type Peer interface {
	Submit(*peer.Call)
	Kick()
}

// Config is what Replicas work with. All is needed but Marks, Logger and the bounds.
type Config struct {
	Self  replica.Peer
	Store Store
	// Peer returns the connections to another node; nil if there is no such node.
	Peer func(state.NodeID) Peer
	// Propose begins to propose a change and does not wait. It may be forgotten: it is
	// proposed again.
	Propose func(state.ChangeISR)
	// Fence refuses requests of generations older than the newest that this node has seen
	// of their volume (INV-V1). It takes no time.
	Fence func(vid object.VID, generation uint64) error
	// Marks has what Replicas.Marks once returned and everything was durable that it says;
	// partitions that are not in it begin with nothing known.
	Marks map[object.Group]replica.Mark

	// KeepMarks keeps what Marks returns now, as described there, and waits for that. nil:
	// nothing is kept.
	KeepMarks func(ctx context.Context) error

	AckTimeout     time.Duration // see replica.Options; default 3 s
	LearnerTimeout time.Duration // default 1 s
	Resend         time.Duration // default 50 ms
	Patience       time.Duration // default twice AckTimeout
	Repairs        int           // objects that are brought to learners at a time; default 8

	Logger *slog.Logger
}

func (c *Config) setDefaults() {
	orDefault(&c.AckTimeout, 3*time.Second)
	orDefault(&c.LearnerTimeout, time.Second)
	orDefault(&c.Resend, 50*time.Millisecond)
	orDefault(&c.Patience, 2*c.AckTimeout)
	orDefault(&c.Repairs, 8)
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
}

func orDefault[T comparable](v *T, d T) {
	var zero T
	if *v == zero {
		*v = d
	}
}

// Replicas is this node's part in all partitions. Its methods may be called from any
// goroutine.
type Replicas struct {
	cfg   Config
	opt   replica.Options
	start time.Time

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	works  works         // goroutines that carry out effects which have to wait
	lease  atomic.Int64  // replica.Time
	lapses atomic.Uint64 // how often a lease began after the one before had ended
	closed atomic.Bool

	mu     sync.RWMutex
	parts  map[object.Group]*part
	list   []*part // of parts, in the order in which they were made
	view   *state.View
	stored map[object.Group]bool // the store had objects of it at the start

	views    atomic.Int64  // that partitions have still to be told
	told     atomic.Uint64 // epoch of the last state that all partitions were to be told
	followed atomic.Uint64 // and of one that they were
	caughtUp caughtUp

	current atomic.Bool // the state that is known has this life of the node, and it is up
	spaces  spaces
	healer  healer

	recovery recovery
	pace     pace
	clients  atomic.Uint64 // requests of clients that this node had a part in
	waiting  atomic.Int64  // those under way here as the primary
	paced    atomic.Bool   // something is to be brought to learners
	taking   atomic.Int32  // repairs of this node as a learner
	damaged  sync.Map      // object.Key of what was removed because it was rotten, and is not replaced yet
	purging  chan struct{} // has room for those that may purge

	out      outbox
	flights  flights
	kept     kept
	marks    outMarks
	wanted   atomic.Int64 // objects that wait to be brought to learners
	repairs  atomic.Int64 // of learners, under way
	settling atomic.Int64 // learners that make durable what they were brought
	wake     chan struct{}
	kicks    chan struct{}
	Count    Counters
}

// Counters count what was done since the start.
type Counters struct {
	Repaired      atomic.Uint64 // objects that were compared with the primary's
	RepairedBytes atomic.Uint64 // that were not equal, and taken
	MovedBytes    atomic.Uint64 // content and checksums that this node took from others, or sent for it
	Fetched       atomic.Uint64 // rotten objects that were healed
	Purged        atomic.Uint64 // objects that were removed because other nodes hold them
}

// New returns the replicas of a node that has just got its incarnation. Run must be
// called.
func New(ctx context.Context, cfg Config) (*Replicas, error) {
	cfg.setDefaults()
	r := &Replicas{
		cfg: cfg, start: time.Now(), parts: map[object.Group]*part{}, view: &state.View{}, stored: map[object.Group]bool{},
		wake: make(chan struct{}, 1), kicks: make(chan struct{}, 1), purging: make(chan struct{}, purgesAtATime),
	}
	r.opt = replica.Options{
		Self: cfg.Self, AckTimeout: cfg.AckTimeout, LearnerTimeout: cfg.LearnerTimeout, Resend: cfg.Resend, Patience: cfg.Patience,
	}
	r.pace.phase = time.Duration(r.start.UnixNano()) % pacePeriod
	r.ctx, r.cancel = context.WithCancel(context.Background())
	r.works.ended.L = &r.works.mu
	groups, err := cfg.Store.Groups(ctx)
	for _, g := range groups {
		r.stored[g] = true
	}
	return r, err
}

// now is the time on the replicas' clock.
func (r *Replicas) now() replica.Time { return replica.Time(time.Since(r.start)) }

// SetLease says until when this node may answer (INV-R5). It is called by one goroutine at a time.
func (r *Replicas) SetLease(until time.Time) {
	if !r.Leased() {
		r.lapses.Add(1) // before: who sees the new lease shall see that there was a gap
	}
	r.lease.Store(int64(until.Sub(r.start)))
}

// SetState follows the replicated state. It is called by one goroutine at a time.
func (r *Replicas) SetState(v *state.View) {
	r.views.Add(1)
	defer r.viewTaken()
	defer r.told.Store(uint64(v.Epoch)) // before it is counted as done
	r.mu.Lock()
	old := r.view
	r.view = v
	r.mu.Unlock()
	if n := v.Node(r.cfg.Self.Node); !r.current.Load() && n != nil && n.Incarnation == r.cfg.Self.Incarnation && n.State == state.NodeUp {
		defer r.nowCurrent()
	}
	for _, p := range v.Policies {
		was := old.Policy(p.ID)
		if was == p {
			continue
		}
		for i := range p.Partitions {
			q := &p.Partitions[i]
			if q.Undecided() {
				continue
			}
			if was != nil && len(was.Partitions) > i && was.Partitions[i].Epoch == q.Epoch && was.MinInSync == p.MinInSync {
				continue
			}
			r.setPartition(v, p, i)
		}
	}
}

// Followed is the epoch of a state that all partitions have taken note of: nothing is answered any
// more by what was before it.
func (r *Replicas) Followed() state.Epoch {
	told := r.told.Load()
	if r.views.Load() == 0 {
		r.followed.Store(told)
	}
	return state.Epoch(r.followed.Load())
}

// AwaitFollowed waits until Followed is an epoch, or a later one. It fails with the error of ctx.
func (r *Replicas) AwaitFollowed(ctx context.Context, epoch state.Epoch) error {
	for {
		caught := r.caughtUp.next()
		if r.Followed() >= epoch {
			return nil
		}
		select {
		case <-caught:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// viewTaken is called when a partition has taken note of a state, and when all were told.
func (r *Replicas) viewTaken() {
	if r.views.Add(-1) == 0 {
		r.caughtUp.tell()
	}
}

// caughtUp tells when no partition has still to take note of a state.
type caughtUp struct {
	mu   sync.Mutex
	wait chan struct{} // closed then; nil: nobody waits
}

func (c *caughtUp) next() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.wait == nil {
		c.wait = make(chan struct{})
	}
	return c.wait
}

func (c *caughtUp) tell() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.wait != nil {
		close(c.wait)
		c.wait = nil
	}
}

// setPartition tells a partition what has become of it, if it concerns this node.
func (r *Replicas) setPartition(v *state.View, policy *state.Policy, i int) {
	g := object.Group{Policy: policy.ID, Partition: object.Partition(i)}
	view := ViewOf(v, policy, i)
	r.mu.RLock()
	p := r.parts[g]
	r.mu.RUnlock()
	if p == nil && !concerns(view, r.cfg.Self) {
		return // what is in the store of it is dealt with by nowCurrent
	}
	if p == nil {
		if p = r.part(g); p == nil { // closed
			return
		}
	}
	r.views.Add(1)
	p.post(event{kind: evView, view: &view})
}

// ViewOf is what the state says about a partition.
func ViewOf(v *state.View, policy *state.Policy, i int) replica.View {
	q := &policy.Partitions[i]
	return replica.View{
		Epoch: q.Epoch, ISR: peersOf(v, q.ISR), Learners: peersOf(v, q.Learners), Former: peersOf(v, q.Former), MinInSync: policy.MinInSync,
		Restarted: q.Restarted, Whole: whole(v, q), Lost: q.Lost,
	}
}

// whole reports whether those who shall hold a partition, and nobody else, are in sync,
// and are up.
func whole(v *state.View, q *state.Partition) bool {
	if q.Undecided() || len(q.ISR) != len(q.Targets) {
		return false
	}
	for _, id := range q.Targets {
		if n := v.Node(id); n == nil || n.State != state.NodeUp || !slices.Contains(q.ISR, id) {
			return false
		}
	}
	return true
}

// nowCurrent has partitions that are held elsewhere by now removed from the store.
func (r *Replicas) nowCurrent() {
	r.current.Store(true)
	for _, g := range slices.SortedFunc(maps.Keys(r.stored), compareGroups) {
		r.part(g) // so that it is looked at
	}
	for _, p := range r.all() {
		p.post(event{kind: evCurrent})
	}
}

func compareGroups(a, b object.Group) int {
	return cmp.Or(cmp.Compare(a.Policy, b.Policy), cmp.Compare(a.Partition, b.Partition))
}

func peersOf(v *state.View, ids []state.NodeID) []replica.Peer {
	if len(ids) == 0 {
		return nil
	}
	list := make([]replica.Peer, len(ids))
	for i, id := range ids {
		list[i].Node = id
		if n := v.Node(id); n != nil {
			list[i].Incarnation = n.Incarnation
		}
	}
	return list
}

func concerns(v replica.View, self replica.Peer) bool {
	for _, list := range [][]replica.Peer{v.ISR, v.Learners, v.Former} {
		for _, m := range list {
			if m == self {
				return true
			}
		}
	}
	return false
}

// part returns the partition's, made when first used; it then learns what the state says
// of it. It is nil if there is no such partition, or if none begins any more.
func (r *Replicas) part(g object.Group) *part {
	r.mu.RLock()
	p := r.parts[g]
	r.mu.RUnlock()
	if p != nil {
		return p
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if p = r.parts[g]; p != nil {
		return p
	}
	policy := r.view.Policy(g.Policy)
	if policy == nil || r.closed.Load() || int(g.Partition) >= len(policy.Partitions) {
		return nil
	}
	p = newPart(r, g)
	r.parts[g] = p
	r.list = append(r.list, p)
	if !policy.Partitions[g.Partition].Undecided() {
		view := ViewOf(r.view, policy, int(g.Partition))
		p.first = &view
	}
	return p
}

// all returns the partitions that there are.
func (r *Replicas) all() []*part {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.list[:len(r.list):len(r.list)]
}

// tickEvery is how exact time-outs are.
const tickEvery = 50 * time.Millisecond

// Run lets time pass, until ctx ends.
func (r *Replicas) Run(ctx context.Context) {
	t := time.NewTicker(tickEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-r.kicks:
			r.Kick()
		case <-r.wake:
			r.grant()
		case <-t.C:
			r.Tick()
		}
	}
}

// Tick is what Run does about every 50 ms. Who drives the replicas without Run, as a
// simulation does, calls it, and Pump after everything that he does.
func (r *Replicas) Tick() {
	for _, p := range r.all() {
		if !p.idle.Load() {
			p.post(event{kind: evTick})
		}
	}
	r.marks.send(r)
	r.spaces.tick(r)
	r.healer.tick(r)
	r.pass()
	r.grant()
	r.Kick()
}

// Pump does what Run would do now, and reports whether there was anything. See Tick.
func (r *Replicas) Pump() bool {
	if len(r.kicks)+len(r.wake) == 0 { // much cheaper than a select, and nobody else receives
		return false
	}
	select {
	case <-r.kicks:
		r.Kick()
	case <-r.wake:
		r.grant()
	}
	return true
}

// Kick carries out what was held back for company: others have their part to do while this node does its own.
func (r *Replicas) Kick() {
	r.out.kick()
	r.cfg.Store.Kick()
	r.out.kick() // what came of that
}

// kickSoon is Kick for who may not call it now.
func (r *Replicas) kickSoon() { signal(r.kicks) }

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Close ends what is under way and waits for what this node does for it. Requests submitted from now on fail with
// object.ErrClosed; those that wait, for others or for a new epoch, are refused, for nobody tells the partitions any more
// what becomes of that.
func (r *Replicas) Close() {
	r.closed.Store(true)
	r.cancel()
	for _, p := range r.all() {
		p.post(event{kind: evClose})
	}
	r.Kick()
	r.works.Wait()
}

// works counts goroutines. Unlike a sync.WaitGroup it may be waited for while others begin.
type works struct {
	mu    sync.Mutex
	n     int
	ended sync.Cond // some have
}

func (w *works) Go(f func()) {
	w.mu.Lock()
	w.n++
	w.mu.Unlock()
	go func() {
		defer w.end()
		f()
	}()
}

func (w *works) end() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.n--; w.n == 0 {
		w.ended.Broadcast()
	}
}

// Wait waits for a moment in which there are none.
func (w *works) Wait() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.n > 0 {
		w.ended.Wait()
	}
}

// Marks returns for each partition the version up to which everything is in this node's
// store; nothing for one in which an object is being made anew because it was rotten. It is to be kept when everything has been made durable after the call.
func (r *Replicas) Marks() map[object.Group]replica.Mark {
	marks := maps.Clone(r.cfg.Marks) // of those that were not looked at since
	if marks == nil {
		marks = map[object.Group]replica.Mark{}
	}
	for _, p := range r.all() {
		switch m := p.mark.Load(); {
		case m == nil:
		case *m == (replica.Mark{}):
			delete(marks, p.group)
		default:
			marks[p.group] = *m
		}
	}
	r.damaged.Range(func(key, _ any) bool {
		delete(marks, key.(object.Key).Group)
		return true
	})
	return marks
}

// Progress tells how far the partitions of which this node is the primary are.
type Progress struct {
	Partitions int // of which this node is the primary
	Serving    int
	Wanted     int // objects that wait to be brought to learners
	Repairs    int // under way
}

// Progress returns it.
func (r *Replicas) Progress() (s Progress) {
	for _, p := range r.all() {
		if p.primary.Load() {
			s.Partitions++
			if p.serving.Load() {
				s.Serving++
			}
			s.Wanted += int(p.wanted.Load())
		}
	}
	s.Repairs = int(r.repairs.Load())
	return s
}

// outbox knows which nodes have calls that were not kicked.
type outbox struct {
	mu    sync.Mutex
	peers []Peer
}

func (o *outbox) note(p Peer) {
	o.mu.Lock()
	for _, q := range o.peers {
		if q == p {
			o.mu.Unlock()
			return
		}
	}
	o.peers = append(o.peers, p)
	o.mu.Unlock()
}

func (o *outbox) kick() {
	var few [8]Peer
	for {
		o.mu.Lock()
		n := copy(few[:], o.peers)
		o.peers = o.peers[:copy(o.peers, o.peers[n:])]
		o.mu.Unlock()
		for _, p := range few[:n] {
			p.Kick()
		}
		if n < len(few) {
			return
		}
	}
}

// call sends a call to a node, or fails it.
func (r *Replicas) call(to replica.Peer, c *peer.Call) {
	p := r.cfg.Peer(to.Node)
	if p == nil {
		c.Err = peer.ErrDisconnected
		c.Done(c)
		return
	}
	p.Submit(c)
	r.out.note(p)
}
