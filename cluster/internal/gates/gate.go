package gates

import (
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"sheepdog/cluster/internal/gateway"
	"sheepdog/cluster/internal/mailbox"
	"sheepdog/cluster/internal/replica"
	"sheepdog/cluster/internal/replicas"
	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// gate brings requests of some volumes to their primaries.
type gate struct {
	cfg *Config
	box mailbox.Mailbox[gateEvent]

	// Of the goroutine that handles events.
	g      *gateway.Gateway
	known  map[object.Group]state.Epoch // views that g has; 0: none yet
	order  []object.Group               // of known
	doubt  map[object.Group]state.Epoch // in which a change has failed: replicas may differ until the next
	unsent bool

	idle atomic.Bool
	used atomic.Int64 // replica.Time of the last request
}

type gateKind uint8

const (
	gateSubmit gateKind = iota
	gateRead            // this node's own replica has been read
	gateAnswered
	gateFlush
	gateSynced
	gateViews
	gateTick
)

type gateEvent struct {
	kind  gateKind
	batch bool // who posts it kicks afterwards, which is of use only if it is handled before
	job   *job
	flush *flushing
	peer  replica.Peer
	err   error
}

// job is one request on its way.
type job struct {
	req  gateway.Request
	fwd  replicas.Forward
	gate *gate

	local object.Request // a read of the own replica, in
	here  state.Epoch    // this epoch

	obj  *object.Request // whose it is, or
	done func(*job)      // who waits for it
}

var jobs = sync.Pool{New: func() any { return new(job) }}

// flushing is one flush.
type flushing struct {
	gateway.Flush
	done func(error)
}

func newGate(cfg *Config) *gate {
	return &gate{
		cfg: cfg, known: map[object.Group]state.Epoch{}, doubt: map[object.Group]state.Epoch{},
		g: gateway.New(gateway.Options{Retry: cfg.Retry, Timeout: cfg.Timeout}),
	}
}

func (g *gate) post(e gateEvent) { g.box.Post(e, g.handle) }

func (g *gate) handle(e gateEvent, late bool) {
	now := g.cfg.Now()
	switch e.kind {
	case gateSubmit:
		g.used.Store(int64(now))
		g.know(now, e.job.req.Group, true)
		if !g.readHere(e.job) {
			g.g.Submit(now, &e.job.req)
		}
	case gateRead:
		if !g.hasRead(e.job) {
			g.g.Submit(now, &e.job.req)
		}
	case gateAnswered:
		t := &e.job.fwd.Task
		g.g.Answered(now, &e.job.req, t.Holders, t.Err)
	case gateFlush:
		g.g.Flush(now, &e.flush.Flush)
	case gateSynced:
		g.g.Synced(now, e.peer, e.err)
	case gateViews:
		for _, group := range g.order {
			g.know(now, group, false)
		}
	case gateTick:
		g.g.Tick(now)
	}
	for _, e := range g.g.Effects() {
		g.effect(&e)
	}
	g.idle.Store(g.g.Idle())
	if g.unsent && (late || !e.batch) {
		g.cfg.KickSoon()
	}
	g.unsent = false
}

// know tells the gateway what has become of a partition. With add the partition is one
// that is asked for from now on, also if it is not decided yet who holds it.
func (g *gate) know(now replica.Time, group object.Group, add bool) {
	was, ok := g.known[group]
	if !ok {
		if !add {
			return
		}
		g.known[group] = 0
		g.order = append(g.order, group)
	}
	v := g.cfg.View()
	p := v.Policy(group.Policy)
	if p == nil || int(group.Partition) >= len(p.Partitions) {
		return
	}
	part := &p.Partitions[group.Partition]
	if part.Undecided() || was == part.Epoch {
		return
	}
	g.known[group] = part.Epoch
	w := replicas.ViewOf(v, p, int(group.Partition))
	g.g.SetView(now, group, gateway.View{Epoch: w.Epoch, ISR: w.ISR, Learners: w.Learners, Restarted: part.Restarted})
}

func (g *gate) effect(e *gateway.Effect) {
	switch e.Kind {
	case gateway.Forward:
		g.unsent = true
		j := e.Request.Owner.(*job)
		j.fwd.Deadline = time.Now().Add(g.cfg.Timeout)
		g.cfg.Replicas().Forward(e.To, e.Epoch, &j.fwd, jobAnswered)
	case gateway.Done:
		j := e.Request.Owner.(*job)
		if !j.req.Read && j.req.Err != nil {
			g.doubt[j.req.Group] = g.known[j.req.Group]
		}
		j.done(j)
	case gateway.Sync:
		g.unsent = true
		to := e.To
		g.cfg.Replicas().Sync(to, func(err error) { g.post(gateEvent{kind: gateSynced, peer: to, err: err}) })
	case gateway.Flushed:
		f := e.Flush.Owner.(*flushing)
		f.done(f.Err)
	}
}

// readHere reads this node's own replica for the volume's owner, which knows its changes
// under way; nobody else has any. It reports whether it does.
func (g *gate) readHere(j *job) bool {
	t := &j.fwd.Task
	r := g.cfg.Replicas()
	if t.Verb != replicas.VerbRead || t.Generation == 0 || g.cfg.Fence(t.Volume, t.Generation) != nil ||
		g.doubt[t.Group] == g.known[t.Group] || !r.Readable(t.Group, g.known[t.Group]) || g.g.Changing(t.Group, t.ID, j.req.Off, j.req.Len) {
		return false
	}
	j.here = g.known[t.Group]
	j.local = object.Request{
		Op: object.OpRead, SizeShift: t.SizeShift, ID: t.ID, Policy: t.Group.Policy, Partition: t.Group.Partition,
		Off: t.Off, Len: t.Len, Data: t.Data, Owner: j, Done: readDone,
	}
	r.Read(&j.local)
	g.unsent = true
	return true
}

func readDone(r *object.Request) {
	j := r.Owner.(*job)
	j.gate.post(gateEvent{kind: gateRead, job: j})
}

// hasRead answers a read of the own replica if that still counts; else the primary is asked. It does not if a change of
// the range has begun meanwhile: this node may have made it, and others not, and a failure may undo it.
func (g *gate) hasRead(j *job) bool {
	t, err := &j.fwd.Task, j.local.Err
	if err != nil && !errors.Is(err, object.ErrNotFound) || !g.cfg.Replicas().Readable(t.Group, j.here) || g.cfg.Fence(t.Volume, t.Generation) != nil ||
		g.doubt[t.Group] == j.here || g.g.Changing(t.Group, t.ID, j.req.Off, j.req.Len) {
		return false
	}
	j.req.Err = err
	j.done(j)
	return true
}

// jobAnswered says that an attempt has ended. A job's task is the first of its forward.
func jobAnswered(t *replicas.Task) {
	j := t.Owner.(*job)
	j.gate.post(gateEvent{kind: gateAnswered, batch: true, job: j})
}

// begin starts a job whose task is filled in.
func (g *gate) begin(j *job) {
	t := &j.fwd.Task
	t.Owner = j
	j.gate = g
	changes := t.Verb.Changes()
	j.req = gateway.Request{
		Group: t.Group, ID: t.ID, Off: t.Off &^ (object.BlockSize - 1), Read: !changes, Whole: t.Verb >= replicas.VerbDelete,
		Durable: changes && t.Flags&object.FlagFUA != 0, Volume: t.Volume, Owner: j,
	}
	end := (uint64(t.Off) + uint64(t.Len) + object.BlockSize - 1) &^ (object.BlockSize - 1)
	j.req.Len = uint32(end - uint64(j.req.Off))
	g.post(gateEvent{kind: gateSubmit, batch: true, job: j})
}

var verbOf = [...]replicas.Verb{
	object.OpRead: replicas.VerbRead, object.OpWrite: replicas.VerbWrite, object.OpZero: replicas.VerbZero, object.OpDiscard: replicas.VerbDiscard,
}

// submit starts a client's request. Its partition is known.
func (g *gate) submit(r *object.Request) {
	if r.Len > replicas.MaxPiece {
		g.split(r)
		return
	}
	j := jobs.Get().(*job)
	j.obj, j.done = r, jobDone
	t := &j.fwd.Task
	t.Group, t.Verb, t.Flags, t.SizeShift = object.Group{Policy: r.Policy, Partition: r.Partition}, verbOf[r.Op], r.Flags, r.SizeShift
	t.ID, t.Off, t.Len, t.Data, t.Volume, t.Generation = r.ID, r.Off, r.Len, r.Data, r.Volume, r.Generation
	g.begin(j)
}

func jobDone(j *job) {
	r, err := j.obj, j.req.Err
	j.obj, j.done, j.fwd.Data = nil, nil, nil
	jobs.Put(j)
	r.Complete(err)
}

// split makes pieces of a request that is too long for a message.
func (g *gate) split(r *object.Request) {
	var (
		mu   sync.Mutex
		left = 1
		err  error
	)
	done := func(e error) {
		mu.Lock()
		if err == nil {
			err = e
		}
		left--
		last := left == 0
		mu.Unlock()
		if last {
			r.Complete(err)
		}
	}
	for off := uint32(0); off < r.Len; off += replicas.MaxPiece {
		piece := *r
		piece.Off, piece.Len, piece.Next = r.Off+off, min(r.Len-off, replicas.MaxPiece), nil
		if r.Data != nil {
			piece.Data = r.Data[off:][:piece.Len]
		}
		piece.Done = func(p *object.Request) { done(p.Err) }
		mu.Lock()
		left++
		mu.Unlock()
		g.submit(&piece)
	}
	done(nil)
}
