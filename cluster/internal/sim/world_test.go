// Package sim simulates a whole cluster from a seed: the production code of storage (on
// disks in memory), replicas, gates, state, steward and the volumes' catalog, with a
// simulated network, a simulated order of commands, and virtual time.
//
// # One thing at a time
//
// A simulation lives in a bubble of testing/synctest: time stands still while anything
// runs. What shall happen is an event of the world's queue, with its time; the world lets
// one event after the other happen, and after each waits until every goroutine that it
// has woken is blocked again. What production code does meanwhile (a message, an operation
// of its store) is only noted, and becomes events, whose delays the seed decides. So a
// node's code is interrupted wherever it waits for the disk or for another node, and
// nowhere else. Within an operation of the store the disk takes no time; that the store
// may be interrupted there too is what its own tests are about, but for power cuts, which
// strike at any operation of the disk here as well.
//
// Most of the code has no goroutines of its own. For what is left, a process that runs
// seeds uses one processor, so that goroutines take turns in the same order every time;
// several processes share the work.
//
// # What is not real
//
// The order of commands is a small model of raft's, with terms, votes and quorums: package
// consensus and raft are tested by themselves.
// Connections are simulated by what package peer promises, and worse: messages of members
// to each other also come twice and in any order.
package sim

import (
	"container/heap"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing/synctest"
	"time"

	"sheepdog/cluster/internal/peer"
	"sheepdog/cluster/internal/replicas"
	"sheepdog/cluster/state"
	"sheepdog/storage/object"
	"sheepdog/vdi/catalog"
)

const (
	ms     = time.Millisecond
	second = time.Second
	up     = state.NodeUp
)

type nodeID = state.NodeID

// world is one simulation.
type world struct {
	setup
	rng    *rand.Rand
	begin  time.Time
	events eventHeap
	count  int
	broken mutation
	local  *peer.Local

	questions uint64 // of leaders, for their own leases

	mu    sync.Mutex
	noted []func() // by production code, on any goroutine

	nodes   []*node
	log     [][2]string   // machine and command
	views   []*state.View // after each of them
	oracle  *state.Machine
	catalog *catalog.Machine
	term    int                               // of the newest leader
	cut     map[[2]state.NodeID]time.Duration // since when
	weak    *node                             // the last one that lost its power
	weakInc uint64
	taints  []*taint
	tainted []time.Duration      // until when, by partitions
	where   map[uint64]object.ID // of values, in stories about rot
	called  func(*flight) bool   // if not nil: deals with a call that is about to arrive
	trouble bool                 // faults are injected
	eras    []time.Duration
	ended   bool
	took    time.Duration

	volumes  []*volume
	value    uint64
	history  history
	previous history // before partitions were begun again
	ops      int
	longest  time.Duration // of a request
	costs    leading
	flushes  int
	seen     map[string]int // what has happened, and how often

	tracing bool
	trace   []string
	failure error
}

type event struct {
	at  time.Duration
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
	old[len(old)-1] = event{}
	*h = old[:len(old)-1]
	return e
}

func newWorld(s setup, m mutation) *world {
	w := &world{
		setup: s, rng: rand.New(rand.NewPCG(s.seed, 1)), begin: time.Now(), broken: m, oracle: state.New(), catalog: catalog.New(),
		cut: map[[2]state.NodeID]time.Duration{}, eras: make([]time.Duration, s.partitions), tainted: make([]time.Duration, s.partitions), where: map[uint64]object.ID{}, history: history{}, previous: history{}, seen: map[string]int{},
	}
	var err error
	if w.local, err = peer.NewLocal(replicas.Errors); err != nil {
		w.fail("%v", err)
	}
	return w
}

// now is the time since the beginning.
func (w *world) now() time.Duration { return time.Since(w.begin) }

// after lets something happen later. Only what happens in the world may call it.
func (w *world) after(d time.Duration, fn func()) {
	w.count++
	heap.Push(&w.events, event{w.now() + d, w.count, fn})
}

// note lets something happen as soon as all production code waits: it may be called by
// that, on any goroutine.
func (w *world) note(fn func()) {
	w.mu.Lock()
	w.noted = append(w.noted, fn)
	w.mu.Unlock()
}

// settle lets production code run until it waits for the world.
func (w *world) settle() {
	for w.failure == nil || w.ended {
		synctest.Wait()
		w.strike()
		w.mu.Lock()
		batch := w.noted
		w.noted = nil
		w.mu.Unlock()
		for _, fn := range batch {
			fn()
		}
		if len(batch) == 0 && !w.pump() {
			return
		}
	}
}

// pump has the replicas do what they have put off.
func (w *world) pump() (any bool) {
	for _, n := range w.nodes {
		if n.running() {
			any = n.life.reps.Pump() || any
		}
	}
	return any
}

// run lets events happen until something is true, for which it looks now and then, or
// until a time has passed.
func (w *world) run(until func() bool, limit time.Duration) bool {
	end, look := w.now()+limit, time.Duration(0)
	for w.failure == nil {
		if now := w.now(); until != nil && now >= look {
			if look = now + 20*ms; until() {
				return true
			}
		}
		if len(w.events) == 0 || w.events[0].at > end {
			time.Sleep(end - w.now())
			w.settle()
			return until == nil || until()
		}
		e := heap.Pop(&w.events).(event)
		if d := e.at - w.now(); d > 0 {
			time.Sleep(d)
			w.settle() // timers of production code
		}
		e.fn()
		w.settle()
	}
	return false
}

func (w *world) between(a, b time.Duration) time.Duration {
	return a + time.Duration(w.rng.Int64N(int64(b-a)+1))
}

func (w *world) chance(p float64) bool { return w.rng.Float64() < p }

// happened counts what has happened, so that a test can say that all of it has.
func (w *world) happened(what string) { w.seen[what]++ }

func (w *world) logf(format string, args ...any) {
	if w.tracing {
		w.trace = append(w.trace, fmt.Sprintf("%10.4f ", w.now().Seconds())+fmt.Sprintf(format, args...))
	}
}

// fail ends the simulation.
func (w *world) fail(format string, args ...any) {
	if w.failure == nil {
		w.failure = fmt.Errorf(format, args...)
		w.logf("FAILURE: %v", w.failure)
	}
}
