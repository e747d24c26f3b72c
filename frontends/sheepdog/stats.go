package sheepdog

import (
	"cmp"
	"iter"
	"slices"
	"sync/atomic"
	"time"

	"sheepdog/frontends/internal/listen"
	"sheepdog/frontends/sheepdog/internal/wire"
)

// counters is what one session, or all that have ended, did.
type counters struct {
	requests  [lastOp + 1]atomic.Uint64 // by operation
	readBytes atomic.Uint64
	sentBytes atomic.Uint64
	errors    atomic.Uint64
}

func (c *counters) submitted(r *wire.Request) {
	c.requests[min(r.Op, lastOp)].Add(1)
	switch {
	case r.HasPayload():
		c.sentBytes.Add(uint64(r.DataLength))
	case r.Op == wire.SD_OP_READ_OBJ:
		c.readBytes.Add(uint64(r.DataLength))
	}
}

// add adds what o counted to c.
func (c *counters) add(o *counters) {
	for i := range c.requests {
		c.requests[i].Add(o.requests[i].Load())
	}
	c.readBytes.Add(o.readBytes.Load())
	c.sentBytes.Add(o.sentBytes.Load())
	c.errors.Add(o.errors.Load())
}

// byOperation gives the counts of all operations by name.
func (c *counters) byOperation() map[string]uint64 {
	m := map[string]uint64{}
	for i := range operations {
		if name := operations[i].name; name != "" {
			m[name] = c.requests[i].Load()
		}
	}
	return m
}

// Counters is a snapshot of what the server did since it was made. All but InFlight and the
// last of listen's only grow.
type Counters struct {
	listen.Counters // of connections

	Requests     map[string]uint64 // received, refused ones included, by operation
	Errors       uint64            // requests answered with an error
	ReadBytes    uint64            // asked for by reads
	WrittenBytes uint64            // of payloads

	InFlight int64 // requests now
}

// SessionInfo is what is known of one connection that uses a volume.
type SessionInfo struct {
	ID       uint64
	Peer     string // address, or "unix"
	Listener string // address it came in by
	Export   string // NAME, or NAME@TAG of a snapshot; "" if it has used none
	Size     int64  // bytes
	ReadOnly bool
	Started  time.Time

	Reads, Writes, Others uint64 // requests
	Errors                uint64
	ReadBytes             uint64
	WrittenBytes          uint64
	InFlight              int64 // requests received and not yet answered
	BufferBytes           int64
}

func (s *session) snapshot() SessionInfo {
	s.mu.Lock()
	i := s.info
	s.mu.Unlock()
	for n := range s.stats.requests {
		c := s.stats.requests[n].Load()
		switch wire.Op(n) {
		case wire.SD_OP_READ_OBJ:
			i.Reads += c
		case wire.SD_OP_WRITE_OBJ, wire.SD_OP_CREATE_AND_WRITE_OBJ:
			i.Writes += c
		default:
			i.Others += c
		}
	}
	i.Errors, i.ReadBytes, i.WrittenBytes = s.stats.errors.Load(), s.stats.readBytes.Load(), s.stats.sentBytes.Load()
	i.InFlight, i.BufferBytes = s.stream.InFlight(), s.stream.Held()
	return i
}

// Sessions describes the connections that use volumes, by ID.
func (s *Server) Sessions() []SessionInfo {
	var list []SessionInfo
	s.clients.Each(func(c *session) {
		if i := c.snapshot(); i.Export != "" {
			list = append(list, i)
		}
	})
	slices.SortFunc(list, func(a, b SessionInfo) int { return cmp.Compare(a.ID, b.ID) })
	return list
}

// Counters returns what the server did so far.
func (s *Server) Counters() Counters {
	var sum counters
	c := Counters{Counters: s.clients.Counters()}
	s.clients.View(func(sessions iter.Seq[*session]) {
		sum.add(&s.past)
		for n := range sessions {
			sum.add(n.stats)
			c.InFlight += n.stream.InFlight()
		}
	})
	c.Requests, c.Errors = sum.byOperation(), sum.errors.Load()
	c.ReadBytes, c.WrittenBytes = sum.readBytes.Load(), sum.sentBytes.Load()
	return c
}
