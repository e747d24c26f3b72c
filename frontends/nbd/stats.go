package nbd

import (
	"sync/atomic"
	"time"

	"sheepdog/frontends/internal/listen"
	"sheepdog/frontends/nbd/internal/wire"
)

// counters is what one session, or all that have ended, did.
type counters struct {
	requests  [len(commands) + 1]atomic.Uint64 // by command; the last: unknown ones
	readBytes atomic.Uint64
	sentBytes atomic.Uint64
	errors    atomic.Uint64
}

func (c *counters) submitted(r *wire.Request) {
	t := int(r.Type)
	if t >= len(commands) {
		t = len(commands)
	}
	c.requests[t].Add(1)
	switch r.Type {
	case wire.NBD_CMD_READ:
		c.readBytes.Add(r.Length)
	case wire.NBD_CMD_WRITE:
		c.sentBytes.Add(r.Length)
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

// Requests counts requests by command.
type Requests struct {
	Read, Write, Flush, Trim, Cache, WriteZeroes, BlockStatus, Unknown uint64
}

func (c *counters) byCommand() Requests {
	n := func(t uint16) uint64 { return c.requests[t].Load() }
	return Requests{
		Read: n(wire.NBD_CMD_READ), Write: n(wire.NBD_CMD_WRITE), Flush: n(wire.NBD_CMD_FLUSH), Trim: n(wire.NBD_CMD_TRIM),
		Cache: n(wire.NBD_CMD_CACHE), WriteZeroes: n(wire.NBD_CMD_WRITE_ZEROES), BlockStatus: n(wire.NBD_CMD_BLOCK_STATUS),
		Unknown: n(uint16(len(commands))),
	}
}

// Counters is a snapshot of what the server did since it was made. All but Sessions,
// InFlight and the last of listen's only grow.
type Counters struct {
	listen.Counters // of connections

	Requests     Requests // received, refused ones included
	Errors       uint64   // requests answered with an error
	ReadBytes    uint64   // asked for by read requests
	WrittenBytes uint64   // asked for by write requests

	Failed uint64 // connections that ended in the handshake by an error

	Sessions int   // now, in the transmission phase
	InFlight int64 // requests now
}

// SessionInfo is what is known of one client in the transmission phase.
type SessionInfo struct {
	ID          uint64
	Peer        string // address, or "unix"
	Listener    string // address it came in by
	Export      string
	Size        int64 // bytes
	ReadOnly    bool
	TLS         bool
	Certificate string   // subject of the client's certificate, if it showed one
	Headers     string   // simple, structured or extended
	Contexts    []string // selected metadata contexts
	Started     time.Time

	Requests     Requests
	Errors       uint64
	ReadBytes    uint64
	WrittenBytes uint64
	InFlight     int64 // requests received and not yet answered
	BufferBytes  int64
}

func (s *session) snapshot() SessionInfo {
	i := s.info
	i.Requests = s.stats.byCommand()
	i.Errors, i.ReadBytes, i.WrittenBytes = s.stats.errors.Load(), s.stats.readBytes.Load(), s.stats.sentBytes.Load()
	i.InFlight, i.BufferBytes = s.stream.InFlight(), s.stream.Held()
	return i
}
