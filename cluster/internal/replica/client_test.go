package replica_test

import (
	"errors"
	"fmt"
	"slices"

	"sheepdog/cluster/internal/gateway"
	"sheepdog/cluster/internal/replica"
	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

const (
	simClients = 4
	simDepth   = 3 // requests of one client at a time
)

// simClient writes a volume of its own, and reads all. It works through the gateway of
// one node; when that has gone it takes another one, under a new generation.
type simClient struct {
	s        *sim
	id       int
	node     *simNode
	inc      uint64
	underway int
	ops      int
	stop     bool
	acked    []*access // through this gateway, and not flushed
}

// simFlush is a flush of all that a client has written through one gateway.
type simFlush struct {
	gateway.Flush
	client *simClient
	covers []*access
}

// access is one request of a client.
type access struct {
	gateway.Request
	client     *simClient
	generation uint64
	op         int
	first, n   int
	scratch    bool
	values     []uint64
	got        []uint64
	at         replica.Time
}

// move takes the gateway of a node that runs.
func (c *simClient) move() {
	s := c.s
	c.node = s.nodes[s.rng.IntN(len(s.nodes))]
	c.inc = c.node.inc
	c.acked = nil
	s.generations[c.id]++
	s.decide(state.Command{AddPolicy: &state.AddPolicy{Copies: s.oracle.View().Policies[0].Copies}}) // changes nothing but the order
	s.logf("client %d takes %s, generation %d", c.id, c.node.name, s.generations[c.id])
}

// beat begins requests.
func (c *simClient) beat() {
	s := c.s
	if c.node == nil || !c.node.alive || c.node.inc != c.inc || s.trouble && s.chance(0.0005) {
		c.underway = 0 // nobody will answer those any more
		c.move()
	}
	for !c.stop && c.underway < simDepth && !c.node.hung && s.chance(0.5) {
		c.begin()
	}
	if !c.node.hung && s.chance(0.02) {
		f := &simFlush{client: c, covers: c.acked}
		f.Volume, c.acked = object.VID(c.id+1), nil
		c.node.flushes[&f.Flush] = f
		c.node.gate.Flush(s.now, &f.Flush)
		c.node.performGate()
	}
	s.after(s.between(0, 8*ms), c.beat)
}

func (c *simClient) begin() {
	s := c.s
	c.ops++
	c.underway++
	a := &access{client: c, op: c.ops, generation: s.generations[c.id], at: s.now}
	a.Volume = object.VID(c.id + 1)
	owner := c.id
	a.Read = s.chance(0.4)
	if a.Read {
		owner = s.rng.IntN(simClients)
	}
	a.ID = object.DataID(object.VID(owner+1), uint32(s.rng.IntN(simPartitions*simObjects)))
	if !a.Read && s.chance(0.05) { // objects that come and go, which nobody reads
		a.ID, a.scratch = object.DataID(100, uint32(c.id*simPartitions+s.rng.IntN(simPartitions))), true
		a.Whole = s.chance(0.5)
	}
	a.first = s.rng.IntN(simBlocks)
	a.n = 1 + s.rng.IntN(min(3, simBlocks-a.first))
	if a.Whole {
		a.first, a.n = 0, simBlocks
	}
	a.Off, a.Len = uint32(a.first), uint32(a.n)
	a.Group = object.Group{Policy: 1, Partition: object.Partition(partitionOf(a.ID))}
	for range a.n {
		s.value++
		a.values = append(a.values, s.value)
	}
	if !a.Read {
		s.history.begin(a)
	}
	c.node.accesses[&a.Request] = a
	c.node.gate.Submit(s.now, &a.Request)
	c.node.performGate()
}

// done is the answer to a client.
func (a *access) done() {
	s, c := a.client.s, a.client
	c.underway--
	s.logf("client %d: %v: %v", c.id, a, a.Err)
	switch {
	case errors.Is(a.Err, object.ErrStale): // another gateway has taken the volume
	case errors.Is(a.Err, object.ErrNoSpace) && s.full:
		s.refused++
	case a.Err != nil:
		s.fail("client %d: %v", c.id, a.Err)
	case a.Read && a.at < s.eras[a.Group.Partition]:
	case a.Read:
		s.history.read(s, a, a.got)
	case a.at < s.eras[a.Group.Partition]: // answered before, or after: who knows
	default:
		s.history.end(s.now, a)
		c.acked = append(c.acked, a)
	}
}

func (a *access) String() string {
	switch {
	case a.Read:
		return fmt.Sprintf("read %d from %s %d: %v", a.op, a.ID, a.first, a.got)
	case a.Whole:
		return fmt.Sprintf("delete %d of %s", a.op, a.ID)
	}
	return fmt.Sprintf("write %d to %s %d: %v", a.op, a.ID, a.first, a.values)
}

// performGate carries out what the gateway of a node wants.
func (n *simNode) performGate() {
	for {
		effects := slices.Clone(n.gate.Effects())
		if len(effects) == 0 {
			return
		}
		for _, e := range effects {
			switch e.Kind {
			case gateway.Forward:
				n.forward(e)
			case gateway.Done:
				a := n.accesses[e.Request]
				delete(n.accesses, e.Request)
				if a.client.node == n && a.client.inc == n.inc {
					a.done()
				}
			case gateway.Sync:
				n.syncFor(e.To)
			case gateway.Flushed:
				f := n.flushes[e.Flush]
				delete(n.flushes, e.Flush)
				n.s.logf("client %d: flush of %d: %v", f.client.id, len(f.covers), f.Err)
				if f.Err == nil {
					n.s.history.flushed(n.s, f.covers)
				}
			}
		}
	}
}

// syncFor has a node make durable what it has, for the gateway here.
func (n *simNode) syncFor(m replica.Peer) {
	s, to, gate := n.s, n.s.node(m), n.gate
	call(s, n, to, func(reply func(struct{}, error)) {
		if to.self() != m {
			reply(struct{}{}, replica.ErrRetry)
			return
		}
		to.do(to.disk.sync, func() { reply(struct{}{}, nil) })
	}, func(_ struct{}, err error) {
		gate.Synced(s.now, m, err)
		n.performGate()
	})
}

// answer is what a primary says to a gateway.
type answer struct {
	got     []uint64
	holders []replica.Peer
}

// forward brings a request to a primary. If no answer comes in time the connection is
// given up, and what comes late on it is not taken any more.
func (n *simNode) forward(e gateway.Effect) {
	s, gate, a := n.s, n.gate, n.accesses[e.Request]
	to, i, from, conn := s.node(e.To), int(a.Group.Partition), n.self(), n.conns[e.To]
	arrived := false
	call(s, n, to, func(reply func(answer, error)) {
		if arrived || to.self() != e.To || conn < to.sessions[from] {
			return
		}
		arrived = true
		to.sessions[from] = conn
		to.serve(i, e.Epoch, a, reply)
	}, func(r answer, err error) {
		if errors.Is(err, errLost) {
			if n.conns[e.To] == conn {
				n.conns[e.To]++
			}
			err = replica.ErrRetry
		}
		a.got = r.got
		gate.Answered(s.now, e.Request, r.holders, err)
		n.performGate()
	})
}

// serve is the primary's side: requests of former owners are refused.
func (n *simNode) serve(i int, epoch state.Epoch, a *access, reply func(answer, error)) {
	s := n.s
	known := s.generationsAt[max(n.applied-1, 0)][a.client.id]
	if n.newest[a.client.id] = max(n.newest[a.client.id], known, a.generation); !a.Read && a.generation < n.newest[a.client.id] && s.broken != skipGeneration {
		reply(answer{}, object.ErrStale)
		return
	}
	s.logf("%s: client %d, epoch %d: %s", n.name, a.client.id, epoch, a)
	p := n.parts[i]
	r := &request{change: change{first: a.first, values: slices.Clone(a.values)}}
	r.Op = replica.Op{ID: a.ID, Off: a.Off, Len: a.Len, Read: a.Read, Whole: a.Whole, Grows: !a.Read && !a.Whole}
	if a.Whole {
		r.change.values = nil
	}
	r.done = func(got []uint64, err error) { reply(answer{got, slices.Clone(p.Holders())}, err) }
	s.requests[&r.Op] = r
	p.Submit(s.now, epoch, &r.Op)
	n.perform(p)
}

// history has for each block what was written and read.
type history map[blockID]map[uint64]*cluster

type blockID struct {
	id    object.ID
	block int
}

const never = replica.Time(1) << 62

// cluster is one value of a block, which is written once: by whom, and who has read it.
type cluster struct {
	from    replica.Time // the write began
	first   replica.Time // earliest end and
	last    replica.Time // latest beginning of all that had the value
	seen    bool         // it was acknowledged or read
	flushed bool         // with a flush that has ended
}

func (h history) of(b blockID) map[uint64]*cluster {
	if h[b] == nil {
		h[b] = map[uint64]*cluster{0: {from: -1, first: -1, last: -1, seen: true}}
	}
	return h[b]
}

func (a *access) blocks(fn func(b blockID, k int)) {
	if a.scratch {
		return
	}
	for k := range a.n {
		fn(blockID{a.ID, a.first + k}, k)
	}
}

func (h history) begin(a *access) {
	a.blocks(func(b blockID, k int) {
		h.of(b)[a.values[k]] = &cluster{from: a.at, first: never, last: a.at}
	})
}

func (h history) end(now replica.Time, a *access) {
	a.blocks(func(b blockID, k int) {
		c := h.of(b)[a.values[k]]
		c.seen, c.first = true, min(c.first, now)
	})
}

// flushed notes what a flush has covered. If the partition was begun again after the
// write was answered, it cannot have begun with anything older.
func (h history) flushed(s *sim, covers []*access) {
	for _, a := range covers {
		era := s.eras[a.Group.Partition]
		a.blocks(func(b blockID, k int) {
			if a.at >= era {
				h.of(b)[a.values[k]].flushed = true
				return
			}
			old := s.previous[b]
			w := old[a.values[k]]
			if w == nil {
				return // long ago
			}
			for v, c := range old {
				now := h.of(b)[v]
				if c.first >= w.from || now == nil || now.from >= 0 {
					continue
				}
				if now.seen {
					s.fail("block %v was read as %d, which is older than %d, whose flush succeeds", b, v, a.values[k])
				}
				delete(h.of(b), v)
			}
		})
	}
}

// restart begins a new history of a partition whose members have all lost their memory.
// Each block has one of the values that it may have had: none that was overwritten before
// something newer was flushed.
func (h history) restart(partition int, now replica.Time) error {
	if err := h.check(); err != nil {
		return err
	}
	for b, old := range h {
		if partitionOf(b.id) != partition {
			continue
		}
		next := map[uint64]*cluster{}
		for v, c := range old {
			lost := false
			for _, w := range old {
				lost = lost || w.flushed && c.first < w.from
			}
			switch {
			case lost:
			case c.first == never: // it may come, or come again
				next[v] = &cluster{from: c.from, first: never, last: c.from}
			default:
				next[v] = &cluster{from: -1, first: -1, last: -1}
			}
		}
		h[b] = next
	}
	return nil
}

func (h history) read(s *sim, a *access, got []uint64) {
	a.blocks(func(b blockID, k int) {
		c := h.of(b)[got[k]]
		if c == nil {
			s.fail("block %v has %d, which nobody wrote there, or was overwritten before a flush", b, got[k])
			return
		}
		if s.now < c.from {
			s.fail("block %v was read as %d before that was written", b, got[k])
		}
		c.seen, c.first, c.last = true, min(c.first, s.now), max(c.last, a.at)
	})
}

// check says whether the history is linearizable. Every value is written once, so a
// register is iff no two zones of values contradict each other (Gibbons and Korach,
// "Testing shared memories", 1997): a forward zone, from the first end to the last
// beginning of what has the value, excludes every other one, and no backward zone lies
// within it.
func (h history) check() error {
	for b, values := range h {
		type zone struct {
			value   uint64
			a, b    replica.Time
			forward bool
		}
		var zones []zone
		for v, c := range values {
			switch {
			case !c.seen:
			case c.first < c.last:
				zones = append(zones, zone{v, c.first, c.last, true})
			default:
				zones = append(zones, zone{v, c.last, c.first, false})
			}
		}
		for i := range zones {
			for _, y := range zones[i+1:] {
				x := zones[i]
				if !x.forward {
					x, y = y, x
				}
				if x.forward && (y.forward && x.a < y.b && y.a < x.b || !y.forward && x.a < y.a && y.b < x.b) {
					return fmt.Errorf("block %v: values %d (%v) and %d (%v) cannot be put in order", b, x.value, x, y.value, y)
				}
			}
		}
	}
	return nil
}
