package sim

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"sheepdog/cluster/internal/replicas"
	"sheepdog/cluster/state"
	"sheepdog/storage/object"
	"sheepdog/vdi/catalog"
)

const (
	sector     = object.SectorSize
	sizeShift  = object.MinSizeShift
	policy     = object.PolicyID(1)
	maxSectors = 20 // of a request: some fit into the log, some go to the file directly
	scratch    = 100
)

// volume is written by one owner at a time, and read by all.
type volume struct {
	w       *world
	index   int
	ref     catalog.Ref
	current *session
	pending []*access // writes whose outcome is not known
	settled uint64    // newest generation whose owner has begun, and
	at      time.Duration
	stop    bool
}

// session is a volume's owner on one node, from take-over until it finds out that it is
// the owner no more, or that its node has died.
type session struct {
	v          *volume
	l          *life
	generation uint64
	begun      bool // it owns the volume, and those before it know
	over       bool
	underway   int
}

// access is one request of a client.
type access struct {
	object.Request
	s       *session
	op      int
	first   int // sector
	n       int
	scratch bool
	whole   bool // the object is deleted
	values  []uint64
	at      time.Duration
	ended   bool
}

// populate makes the volumes.
func (w *world) populate() {
	for i := range w.setup.volumes {
		r, err := w.decideCatalog(catalog.Command{Create: &catalog.Create{
			Name: fmt.Sprint("vm", i+1), Size: int64(w.objects) << sizeShift, SizeShift: sizeShift, Policy: policy,
		}})
		if err != nil {
			w.fail("create volume: %v", err)
			return
		}
		v := &volume{w: w, index: i, ref: r.VDI.Ref}
		w.volumes = append(w.volumes, v)
		v.take()
		w.after(w.between(w.contend/4, w.contend), v.contend)
	}
}

// contend has another node want the volume, now and again.
func (v *volume) contend() {
	if v.w.trouble && !v.stop {
		v.take()
		v.w.after(v.w.between(v.w.setup.contend/10, v.w.setup.contend), v.contend)
	}
}

// take has some node become the owner.
func (v *volume) take() {
	w := v.w
	var able []*node
	for _, n := range w.nodes {
		if n.life != nil && n.life.reps != nil {
			able = append(able, n)
		}
	}
	if v.stop {
		return
	}
	if len(able) == 0 {
		w.after(100*ms, v.take)
		return
	}
	s := &session{v: v, l: able[w.rng.IntN(len(able))].life}
	v.current = s
	w.logf("%s wants volume %d", s.l.n.name, v.index)
	s.acquire()
	s.beat()
}

// gone reports whether the session has ended. If nobody else has come, somebody shall.
func (s *session) gone() bool {
	if !s.over && !s.l.over {
		return false
	}
	if s.v.current == s {
		s.v.take()
	}
	return true
}

// acquire proposes that this node be the owner, until it is decided here.
func (s *session) acquire() {
	w := s.v.w
	if s.gone() || s.begun || s.v.current != s {
		return
	}
	if got, _ := s.l.catalog.Get(s.v.ref.VID); got.Owner != nil && got.Owner.Incarnation == s.l.inc && got.Owner.Name == s.l.n.name {
		s.generation = got.Generation
		w.logf("%s: volume %d under generation %d", s.l.n.name, s.v.index, s.generation)
		s.settle()
		return
	}
	if !s.l.n.hung {
		got, _ := s.l.catalog.Get(s.v.ref.VID)
		c := catalog.Command{Acquire: &catalog.Acquire{
			Ref: s.v.ref, By: catalog.Node{Name: s.l.n.name, Incarnation: s.l.inc}, Since: got.Generation, At: time.Now(),
		}}
		s.l.tell(func(g *reign) {
			if s.v.current == s {
				g.propose(machineCatalog, c.Encode(), func([]byte, error) {})
			}
		})
	}
	w.after(w.between(20*ms, 100*ms), s.acquire)
}

// settle has every node that is up know, and finish what it does for others before the
// first request of the new owner, as Node.Settled does.
func (s *session) settle() {
	left := map[state.NodeID]bool{s.l.n.id: true}
	for _, m := range s.l.view.Nodes {
		if m.State == state.NodeUp {
			left[m.ID] = true
		}
	}
	done := func(id state.NodeID) {
		if delete(left, id); len(left) == 0 && !s.begun && !s.gone() {
			s.begin()
		}
	}
	for _, n := range s.v.w.nodes {
		if left[n.id] {
			s.fence(n, s.l.view.Node(n.id), func() { done(n.id) })
		}
	}
}

// fence asks a node until it has done so, or is down.
func (s *session) fence(n *node, m *state.Node, done func()) {
	w := s.v.w
	if s.gone() || s.begun {
		return
	}
	if now := s.l.view.Node(n.id); n != s.l.n && (m == nil || now == nil || now.State != state.NodeUp || now.Incarnation != m.Incarnation) {
		done()
		return
	}
	finished := false
	arrive := func(from *node) {
		if l := from.life; l.reps != nil {
			l.landed(s.v.ref.VID, s.generation, func() {
				reply := func() { s.l.whenAwake(func() { finished = true; done() }) }
				if from == s.l.n {
					reply()
					return
				}
				w.send(from, s.l.n, reply, nil)
			})
		}
	}
	if !s.l.n.hung {
		if n == s.l.n {
			arrive(n)
		} else {
			w.send(s.l.n, n, func() { arrive(n) }, nil)
		}
	}
	w.after(w.between(200*ms, 500*ms), func() {
		if !finished {
			s.fence(n, m, done)
		}
	})
}

// landed is what opFence does: it waits until this node knows the generation, and does
// nothing for older ones any more.
func (l *life) landed(vid object.VID, generation uint64, then func()) {
	w := l.n.w
	if l.over {
		return
	}
	if got, _ := l.catalog.Get(vid); got.Generation < generation {
		w.after(5*ms, func() { l.whenAwake(func() { l.landed(vid, generation, then) }) })
		return
	}
	l.fence[vid] = max(l.fence[vid], generation)
	ch := l.reps.Landed(vid, generation)
	go func() {
		select {
		case <-ch:
			w.note(func() { l.whenAwake(then) })
		case <-l.ended:
		}
	}()
}

// begin is the first moment of a new owner: nothing of those before it happens from here on.
func (s *session) begin() {
	w, v := s.v.w, s.v
	s.begun = true
	w.logf("%s owns volume %d", s.l.n.name, v.index)
	w.happened("owner")
	if s.generation < v.settled {
		return // somebody else was faster, and this one will find out
	}
	v.settled, v.at = s.generation, w.now()
	for _, a := range v.pending {
		if a.Generation < v.settled {
			w.history.limit(a, v.at)
		}
	}
	v.pending = slices.DeleteFunc(v.pending, func(a *access) bool { return a.ended || a.Generation < v.settled })
}

// beat begins requests.
func (s *session) beat() {
	w := s.v.w
	if s.gone() {
		return
	}
	if s.begun && !s.v.stop && !s.l.n.hung {
		for s.underway < w.depth && w.chance(0.5) {
			s.request()
		}
		if w.chance(w.flush) {
			s.flush()
		}
	}
	w.after(w.between(0, w.setup.beat), s.beat)
}

func (s *session) flush() {
	w, covers, l := s.v.w, s.l.acked[s.v], s.l
	delete(l.acked, s.v)
	w.flushes++
	flush := w.flushes
	if w.tracing {
		var ops []int
		for _, a := range covers {
			ops = append(ops, a.op)
		}
		w.logf("%s begins flush %d of volume %d, which covers %v", l.n.name, flush, s.v.index, ops)
	}
	l.gates.Flush(s.v.ref.VID, func(err error) {
		w.note(func() {
			if l.over {
				return
			}
			w.logf("%s: flush %d of %d writes to volume %d: %v", l.n.name, flush, len(covers), s.v.index, err)
			if w.happened(fmt.Sprintf("flush, failed %v", err != nil)); err == nil {
				w.history.flushed(w, covers)
			}
		})
	})
	l.kick()
}

func (s *session) request() {
	w := s.v.w
	w.ops++
	s.underway++
	s.l.underway++
	a := &access{s: s, op: w.ops, at: w.now()}
	a.Volume, a.Policy, a.SizeShift, a.Generation = s.v.ref.VID, policy, sizeShift, s.generation
	a.Op = object.OpWrite
	if w.chance(0.4) {
		a.Op = object.OpRead
		if other := w.volumes[w.rng.IntN(len(w.volumes))]; other != s.v {
			a.Volume, a.Generation = other.ref.VID, 0
		}
	}
	a.ID = object.DataID(a.Volume, uint32(w.rng.IntN(int(w.objects))))
	if a.Op == object.OpWrite && w.chance(0.08) { // objects with holes, which nobody reads
		a.ID, a.scratch = object.DataID(a.Volume, scratch+uint32(w.rng.IntN(2))), true
		a.Op = []object.Op{object.OpWrite, object.OpZero, object.OpDiscard}[w.rng.IntN(3)]
		a.whole = a.Op == object.OpDiscard && w.chance(0.5)
	}
	if a.Op != object.OpRead && !a.whole && w.chance(0.05) {
		a.Flags = object.FlagFUA
	}
	a.Partition = object.Partition(w.partitionOf(a.ID))
	a.n = 1 + w.rng.IntN(8)
	if w.chance(0.2) {
		a.n = 1 + w.rng.IntN(maxSectors)
	}
	a.first = w.rng.IntN(w.sectors - a.n + 1)
	a.Off, a.Len = uint32(a.first)*sector, uint32(a.n)*sector
	if a.Op <= object.OpWrite {
		a.Data = make([]byte, a.Len)
	}
	if a.Op == object.OpWrite {
		w.value++
		for i := range a.n {
			a.values = append(a.values, w.value)
			fill(a.Data[i*sector:][:sector], w.value)
		}
		if w.faults[faultRot] > 0 {
			w.where[w.value] = a.ID
		}
	}
	if a.Op != object.OpRead && !a.scratch {
		w.history.begin(a)
		s.v.pending = append(s.v.pending, a)
	}
	l := s.l
	w.logf("%s begins: %v", l.n.name, a)
	a.Done = func(*object.Request) {
		w.note(func() {
			if !l.over {
				a.done()
			}
		})
	}
	if a.whole {
		t := replicas.Task{Group: object.Group{Policy: a.Policy, Partition: a.Partition}, ID: a.ID, Verb: replicas.VerbDelete, Volume: a.Volume, Generation: a.Generation}
		l.gates.Do(t, func(_ *replicas.Task, err error) { a.Complete(err) })
	} else {
		l.gates.Submit(&a.Request)
	}
	l.kick()
}

// done is the answer to a client.
func (a *access) done() {
	s, w := a.s, a.s.v.w
	s.underway--
	s.l.underway--
	a.ended = true
	w.longest = max(w.longest, w.now()-a.at)
	p := int(a.Partition)
	if (a.Op == object.OpRead || a.whole) && errors.Is(a.Err, object.ErrNotFound) {
		clear(a.Data)
		a.Err = nil
	}
	if a.Op == object.OpRead && a.Err == nil {
		a.values = values(a.Data)
	}
	w.logf("%s: %v: %v", s.l.n.name, a, a.Err)
	switch {
	case errors.Is(a.Err, object.ErrStale): // another node owns the volume
		w.happened("former owner refused")
		s.over = true
		a.ended = false // it may have been carried out before
	case errors.Is(a.Err, object.ErrCorrupt) && w.excused(a):
		w.happened("request that failed for rot")
		a.ended = a.Op == object.OpRead // a change may have been carried out
	case a.refused():
	case a.Err != nil:
		w.fail("%v: %v", a, a.Err)
	case a.Op != object.OpRead && a.Generation < s.v.settled && a.at > s.v.at:
		w.fail("%v of a former owner was answered", a)
	case a.scratch:
	case a.at < w.eras[p]: // answered before, or after: who knows
	case a.Op == object.OpRead:
		w.history.read(w, a)
	default:
		w.history.end(w.now(), a)
		if s.l.acked[s.v] = append(s.l.acked[s.v], a); a.Flags&object.FlagFUA != 0 {
			w.history.flushed(w, []*access{a})
		}
	}
	if len(s.v.pending) > 100 {
		s.v.pending = slices.DeleteFunc(s.v.pending, func(a *access) bool { return a.ended })
	}
}

func (a *access) String() string {
	what := [...]string{object.OpRead: "read", object.OpWrite: "write", object.OpZero: "zero", object.OpDiscard: "discard"}[a.Op]
	switch {
	case a.whole:
		what = "delete"
	case a.Flags&object.FlagFUA != 0:
		what = "durable " + what
	}
	return fmt.Sprintf("%s %d of volume %d, generation %d, object %s sectors %d to %d: %s", what, a.op, a.s.v.index, a.Generation, a.ID, a.first, a.first+a.n-1, brief(a.values))
}

// fill makes a sector's content of a value. Zeros are 0.
func fill(b []byte, value uint64) {
	for i := 0; i < len(b); i += 8 {
		binary.LittleEndian.PutUint64(b[i:], word(value, i))
	}
}

func word(value uint64, i int) uint64 {
	if value == 0 {
		return 0
	}
	return (value << 16) + uint64(i)
}

func wordAt(b []byte) uint64 { return binary.LittleEndian.Uint64(b) >> 16 }

// torn is no value: a sector's content that nobody wrote.
const torn = ^uint64(0)

// values finds the values of sectors.
func values(data []byte) (list []uint64) {
	for ; len(data) > 0; data = data[sector:] {
		v := binary.LittleEndian.Uint64(data) >> 16
		for i := 0; i < sector; i += 8 {
			if binary.LittleEndian.Uint64(data[i:]) != word(v, i) {
				v = torn
				break
			}
		}
		list = append(list, v)
	}
	return list
}

func valuesIn(data []byte) string { return brief(values(data[:len(data)/sector*sector])) }

// brief says how often each value comes in a row.
func brief(values []uint64) string {
	var b []byte
	for i := 0; i < len(values); {
		n := 1
		for i+n < len(values) && values[i+n] == values[i] {
			n++
		}
		b = fmt.Appendf(b, " %d", values[i])
		if n > 1 {
			b = fmt.Appendf(b, "x%d", n)
		}
		i += n
	}
	return string(b)
}
