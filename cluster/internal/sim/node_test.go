package sim

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"sheepdog/cluster/internal/gates"
	"sheepdog/cluster/internal/replica"
	"sheepdog/cluster/internal/replicas"
	"sheepdog/cluster/internal/steward"
	"sheepdog/cluster/state"
	"sheepdog/storage"
	"sheepdog/storage/disk"
	"sheepdog/storage/disk/disktest"
	"sheepdog/storage/object"
	"sheepdog/vdi/catalog"
)

const (
	retryPause = 20 * ms
	smallWrite = 4096 // bytes; more go into the object's file
	ackTimeout = second
)

// node is one machine.
type node struct {
	w        *world
	id       state.NodeID
	name     string
	gateway  bool // without disks
	life     *life
	hung     bool
	apart    bool          // from the leader
	mute     bool          // it hears the leader and is not heard
	deaf     time.Duration // until when it hears of no commands
	slow     bool          // its disk
	dark     bool          // it has no power
	narrow   bool          // its disk is small
	capacity int64         // of the disk while it is small, in bytes; 0: it never is
	disk     *disktest.Disk
	crashing bool          // the disk's power is to fail
	power    bool          // and with it the machine's
	serial   int           // of lives
	died     time.Duration // when
	asleep   []func()      // what came while hung
	marks    time.Duration // between keeping them, about
	promised int           // the newest term that it has heard of
	stored   int           // how much of the log it has
}

// life is one process of a node.
type life struct {
	n         *node
	serial    int
	over      bool
	ended     chan struct{} // closed when over
	attempts  int           // to announce itself
	arrived   int           // the last of them at a leader
	leader    *life         // whom it takes for the leader; nil: nobody
	heard     time.Duration // when that was heard
	reign     *reign        // it takes itself for the leader
	steward   *steward.Steward
	inc       uint64 // 0: it has not got its incarnation yet
	machine   *state.Machine
	catalog   *catalog.Machine
	applied   int
	following bool        // it is about to apply more
	view      *state.View // that the replicas know
	seen      *state.View // that the gates do
	reps      *replicas.Replicas
	gates     *gates.Gates
	store     *storage.Store
	kept      map[object.Group]object.Version // marks
	holder    steward.Holder                  // of its lease
	fence     map[object.VID]uint64           // newest generations seen
	facts     steward.Facts
	rots      []*logRot
	proposals []state.ChangeISR // on their way to the leader
	links     map[state.NodeID]*link
	conns     map[connection]uint64 // numbers of connections to others
	newest    map[connection]uint64 // newest connections of others
	pending   map[int]func()        // ends of what is under way, for the process dies
	acked     map[*volume][]*access // and not flushed
	underway  int                   // requests of all its sessions
	last      int                   // key in pending
}

func (n *node) running() bool { return n.life != nil && !n.hung && n.life.reps != nil }

func (n *node) self() replica.Peer {
	if n.life == nil {
		return replica.Peer{Node: n.id}
	}
	return replica.Peer{Node: n.id, Incarnation: n.life.inc}
}

// whenAwake calls fn unless the process that it was meant for has ended.
func (l *life) whenAwake(fn func()) {
	switch {
	case l.over:
	case l.n.hung:
		l.n.asleep = append(l.n.asleep, fn)
	default:
		fn()
	}
}

// owe registers what is to be done if the process ends before the returned function is called.
func (l *life) owe(abort func()) (paid func()) {
	l.last++
	key := l.last
	l.pending[key] = abort
	return func() { delete(l.pending, key) }
}

// start begins a new process of a node, which announces itself to the leader.
func (n *node) start() {
	w := n.w
	n.serial++
	l := &life{
		n: n, serial: n.serial, ended: make(chan struct{}), machine: state.New(), catalog: catalog.New(), view: &state.View{}, seen: &state.View{},
		steward: steward.New(steward.Options{}), heard: w.now(), fence: map[object.VID]uint64{}, links: map[state.NodeID]*link{}, conns: map[connection]uint64{}, newest: map[connection]uint64{}, pending: map[int]func(){}, acked: map[*volume][]*access{},
	}
	n.life, n.hung, n.dark, n.asleep = l, false, false, nil
	if !n.gateway {
		keepFree := int64(-1)
		if w.faults[faultSpace] > 0 {
			keepFree = reserve
		}
		s, err := storage.Open(storage.Config{
			Disks: []disk.FS{n.disk}, Node: n.name, Cluster: "sim", LogLimit: logSize, Reserve: keepFree, SmallWrite: smallWrite, OpenObjects: 16, Checkpoint: w.checkpoint, ScrubRate: -1,
		})
		if err != nil {
			w.fail("%s: open store: %v", n.name, err)
			return
		}
		l.store = s
		l.kept = s.Marks()
	}
	w.logf("%s starts", n.name)
	l.follow()
	l.elect()
	l.announce()
	l.scrub()
}

// enlist is the beginning of a process that has got its incarnation.
func (l *life) enlist(inc uint64) {
	n, w := l.n, l.n.w
	l.inc = inc
	r, err := replicas.New(context.Background(), replicas.Config{
		Self: n.self(), Store: &slowStore{l}, Peer: l.peer, Propose: l.propose, Fence: l.fenced, Marks: l.kept, KeepMarks: l.keepMarksNow, Logger: slog.New(warnings{w}),
		AckTimeout: ackTimeout, LearnerTimeout: second / 2, Resend: retryPause, Patience: w.patience,
	})
	if err != nil {
		w.fail("%s: %v", n.name, err)
		return
	}
	l.reps = r
	l.gates = gates.New(gates.Config{
		Replicas: func() *replicas.Replicas { return l.reps }, View: func() *state.View { return l.seen }, Fence: l.fenced,
		Now: func() replica.Time { return replica.Time(w.now()) }, KickSoon: func() { w.note(l.kick) },
		Retry: retryPause, Timeout: time.Hour,
	})
	w.logf("%s is incarnation %d", n.name, inc)
	l.reps.SetState(l.view)
	l.follow()
	w.after(w.between(0, 50*ms), l.tick)
	w.after(0, l.renew)
	if l.store != nil {
		w.after(w.between(0, l.n.marks), l.keepMarks)
	}
}

func (l *life) kick() { l.whenAwake(l.reps.Kick) }

// fenced refuses what is of an older generation than the newest known here.
func (l *life) fenced(vid object.VID, generation uint64) error {
	if vid == 0 || l.n.w.broken == skipGeneration {
		return nil
	}
	v, _ := l.catalog.Get(vid)
	l.fence[vid] = max(l.fence[vid], v.Generation, generation)
	if generation < l.fence[vid] {
		return object.ErrStale
	}
	return nil
}

func (l *life) tick() {
	if l.over {
		return
	}
	if !l.n.hung {
		l.reps.Tick()
		l.gates.Tick()
		l.kick()
	}
	l.n.w.after(l.n.w.between(45*ms, 55*ms), l.tick)
}

// keepMarks makes the marks durable, with all that they cover.
func (l *life) keepMarks() {
	if l.over {
		return
	}
	w := l.n.w
	again := func() { w.after(w.between(l.n.marks/2, l.n.marks), l.keepMarks) }
	if l.n.hung {
		again()
		return
	}
	marks := l.reps.Marks()
	(&slowStore{l}).Submit(&object.Request{Op: object.OpSync, Done: func(r *object.Request) {
		if r.Err == nil && !l.over {
			switch err := l.store.KeepMarks(marks); {
			case err == nil || l.n.disk.Crashed():
			case l.n.narrow && errors.Is(err, object.ErrNoSpace):
				w.happened("no space for marks") // what was kept before still is
			default:
				w.fail("%s: keep marks: %v", l.n.name, err)
			}
		}
		again()
	}})
}

// end stops a process: what was under way fails, and nothing of it reaches anybody.
func (n *node) end() {
	l, w := n.life, n.w
	n.life, n.hung, n.asleep, n.died = nil, false, nil, w.now()
	if l.reign != nil {
		l.stepDown("its process ends")
	}
	l.over = true
	close(l.ended)
	for len(l.pending) > 0 {
		keys := make([]int, 0, len(l.pending))
		for k := range l.pending {
			keys = append(keys, k)
		}
		slices.Sort(keys)
		for _, k := range keys {
			if abort := l.pending[k]; abort != nil {
				delete(l.pending, k)
				abort()
			}
		}
	}
	if l.reps != nil {
		go l.reps.Close()
	}
	if l.store != nil {
		go l.store.Close()
	}
}

// kill ends the process; what it wrote is there, unless the power goes with it.
func (n *node) kill(power bool) {
	if n.life == nil {
		return
	}
	w := n.w
	w.logf("%s is killed, power cut: %v", n.name, power)
	w.happened(fmt.Sprintf("killed, power cut %v", power))
	n.crashing, n.dark = false, power
	if n.disk != nil {
		if power {
			n.disk = n.disk.Reopen(w.rng.Uint64())
		} else {
			n.disk = n.disk.Restart()
		}
	}
	if power {
		w.weak, w.weakInc = n, n.life.inc
	}
	n.end()
}

// doom kills the process at one of its next operations on the disk.
func (n *node) doom(power bool) {
	if n.life == nil || n.disk == nil {
		return
	}
	n.crashing, n.power = true, power
	n.disk.CrashAt(int64(1 + n.w.rng.IntN(12)))
}

// strike kills the nodes whose disks have lost their power.
func (w *world) strike() {
	for _, n := range w.nodes {
		if n.crashing && n.life != nil && n.disk.Crashed() {
			w.happened("killed within an operation of the disk")
			n.kill(n.power)
		}
	}
}

func (n *node) hang() {
	if n.life == nil || n.hung {
		return
	}
	n.w.logf("%s hangs", n.name)
	n.w.happened("hung")
	n.hung = true
}

func (n *node) wake() {
	if n.life == nil || !n.hung {
		return
	}
	n.w.logf("%s wakes", n.name)
	n.hung = false
	// In any order: messages of several connections are read by several goroutines.
	l := n.life
	for _, fn := range n.asleep {
		n.w.after(n.w.between(0, ms), func() { l.whenAwake(fn) })
	}
	n.asleep = nil
}

func (n *node) revive() {
	if n.life == nil && !n.w.ended {
		n.start()
	}
}

// follow applies what has come of the log, some time later and in order.
func (l *life) follow() {
	w := l.n.w
	if l.over || l.following || l.applied >= l.n.stored {
		return
	}

	l.following = true
	d := w.between(ms, 5*ms)
	if w.trouble && w.chance(w.behind) {
		d = w.between(5*ms, w.lag)
	}
	w.after(max(d, l.n.deaf-w.now()), func() {
		l.following = false
		if l.over {
			return
		}
		if l.n.hung {
			w.after(10*ms, l.follow)
			return
		}
		// One command at a time, so that views are skipped only now and then.
		upTo := l.n.stored
		if l.applied < upTo && w.chance(0.5) {
			upTo = l.applied + 1
		}
		l.apply(upTo)
		l.follow()
	})
}

// apply applies the log up to an entry.
func (l *life) apply(upTo int) {
	w := l.n.w
	if l.applied >= upTo {
		return
	}
	for ; l.applied < upTo; l.applied++ {
		if c := w.log[l.applied]; c[0] == machineCatalog {
			l.catalog.Apply([]byte(c[1]))
		} else if !w.shared {
			l.machine.Apply([]byte(c[1]))
		}
	}
	l.view = l.known()
	l.seen = l.view
	if w.broken != trustFlushes {
		l.view = w.distort(l.view)
	}
	if w.broken != trustMarks {
		l.seen = w.distort(l.seen)
	}
	if l.reps == nil {
		return
	}
	l.reps.SetState(l.view)
	l.gates.Moved()
	l.reps.Kick()
}

// known is the state that this node knows.
func (l *life) known() *state.View {
	if l.n.w.shared && l.applied > 0 {
		i := l.applied - 1
		for l.n.w.views[i] == nil { // forgotten: it has started since
			i++
		}
		return l.n.w.views[i]
	}
	return l.machine.View()
}
