package replicas

import (
	"errors"
	"sync"

	"github.com/zeebo/xxh3"

	"sheepdog/cluster/internal/replica"
)

// A gateway that sends a write to its primary mostly is a member itself. It keeps the data until
// the write is answered, so that the primary only says of which write it wants the data stored,
// instead of sending it back: with three copies, a quarter less goes over the network.
//
// The data is copied when the change comes, under a lock that ends the write's request: what a
// gateway has given up does not lend its buffer to anybody.

// errNotKept: the data of a change is not here any more. It is sent again, with the data.
var errNotKept = errors.New("the data of the change is not kept here")

// kept is the writes that this node has sent to primaries.
type kept struct {
	mu       sync.Mutex
	last     uint64
	forwards map[uint64]*Forward
}

// keep begins to keep the data of a write, and returns its number, which is never 0.
func (k *kept) keep(f *Forward) uint64 {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.forwards == nil {
		k.forwards = map[uint64]*Forward{}
	}
	k.last++
	k.forwards[k.last] = f
	return k.last
}

// drop ends that. Nobody reads the data any more when it returns.
func (k *kept) drop(f *Forward, number uint64) {
	k.mu.Lock()
	delete(k.forwards, number)
	k.mu.Unlock()
	f.reading.Lock() // who copies is through
	defer f.reading.Unlock()
}

// take copies the data of a change that a primary takes from a write, and its checksums to c. The caller puts the
// buffer back; nil: the write is not here, or is another one.
func (k *kept) take(m *change, c *content) *[]byte {
	k.mu.Lock()
	f := k.forwards[m.kept]
	if f == nil || f.ID != m.id || f.Off != m.off || f.Len != m.len || f.content.sum != m.sum {
		k.mu.Unlock()
		return nil
	}
	f.reading.Lock()
	k.mu.Unlock()
	b := keptBuffers.Get().(*[]byte)
	*b = append((*b)[:0], f.Data...)
	c.sums = append(c.sums[:0], f.content.sums...)
	f.reading.Unlock()
	if len(c.sums) == 0 && xxh3.Hash(*b) != m.sum { // else who reads it finds out what happened to it here
		keptBuffers.Put(b)
		return nil
	}
	return b
}

var keptBuffers = sync.Pool{New: func() any { return new([]byte) }}

// takeData finds the data of a change: it came with it, or is kept here.
func (in *incoming) takeData() error {
	in.data = in.req.Data
	if in.change.kept == 0 {
		return nil
	}
	if in.own = in.r.kept.take(&in.change, &in.content); in.own == nil {
		return errNotKept
	}
	in.data = *in.own
	return nil
}

// leaveData gives the memory back that takeData took.
func (in *incoming) leaveData() {
	if in.own != nil {
		keptBuffers.Put(in.own)
		in.own, in.data = nil, nil
	}
}

// withData sends a change again that its receiver had not kept the data of. It reports whether it did.
func (s *send) withData() bool {
	if s.message.kept == 0 || !errors.Is(s.call.Err, errNotKept) {
		return false
	}
	s.message.kept = 0
	s.call.Head, s.call.Data = s.message.append(s.head[:0]), s.task.Data
	s.task.part.r.call(s.to, &s.call)
	return true
}

// keeps reports whether a node keeps the data of the task until it is answered.
func (t *Task) keeps(m replica.Peer) bool {
	return t.number != 0 && t.keeper == m && t.Verb == VerbWrite
}
