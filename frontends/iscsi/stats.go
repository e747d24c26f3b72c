package iscsi

import (
	"sync/atomic"
	"time"

	"sheepdog/frontends/internal/listen"
	"sheepdog/frontends/iscsi/internal/scsi"
)

// counters is what one session, or all that have ended, did.
type counters struct {
	reads, writes, flushes, others, managed, texts atomic.Uint64
	readBytes, writtenBytes                        atomic.Uint64
	errors, rejects                                atomic.Uint64
}

func (c *counters) begun(p *scsi.Plan) {
	switch p.Kind {
	case scsi.Read:
		c.reads.Add(1)
		c.readBytes.Add(uint64(p.Len))
	case scsi.Write:
		c.writes.Add(1)
		c.writtenBytes.Add(uint64(p.Len))
	case scsi.Flush:
		c.flushes.Add(1)
	default:
		c.others.Add(1)
	}
}

// add adds what o counted to c.
func (c *counters) add(o *counters) {
	for _, p := range []struct{ to, from *atomic.Uint64 }{
		{&c.reads, &o.reads}, {&c.writes, &o.writes}, {&c.flushes, &o.flushes}, {&c.others, &o.others}, {&c.managed, &o.managed},
		{&c.texts, &o.texts}, {&c.readBytes, &o.readBytes}, {&c.writtenBytes, &o.writtenBytes}, {&c.errors, &o.errors}, {&c.rejects, &o.rejects},
	} {
		p.to.Add(p.from.Load())
	}
}

// Requests counts what initiators asked for.
type Requests struct {
	Read, Write, Flush, Other uint64 // SCSI commands
	Management, Text          uint64
}

func (c *counters) requests() Requests {
	return Requests{
		Read: c.reads.Load(), Write: c.writes.Load(), Flush: c.flushes.Load(), Other: c.others.Load(),
		Management: c.managed.Load(), Text: c.texts.Load(),
	}
}

// Counters is a snapshot of what the server did since it was made. All but Sessions,
// InFlight and the last of listen's only grow.
type Counters struct {
	listen.Counters // of connections

	Requests     Requests
	Errors       uint64 // commands with another status than GOOD
	Rejects      uint64 // PDUs that were not understood or not allowed
	ReadBytes    uint64 // asked for by reads
	WrittenBytes uint64 // asked for by writes

	Failed    uint64 // connections that ended in the login
	BadLogins uint64 // of them, refused for want of a right name or secret

	Sessions int   // now
	InFlight int64 // answers that are not sent, and commands, now
}

// SessionInfo is what is known of one initiator.
type SessionInfo struct {
	ID        uint64
	Peer      string // address
	Listener  string // address it came in by
	Initiator string // iSCSI name
	Target    string // iSCSI name; "" in a discovery session
	Place     string // by what rules it was let in: name of a VDI, also for its snapshots, or of a group
	ReadOnly  bool
	User      string // that it proved to be
	ISID      string
	TSIH      uint16
	Digests   string // header, data, both or none
	Started   time.Time

	Requests     Requests
	Errors       uint64
	ReadBytes    uint64
	WrittenBytes uint64
	InFlight     int64
	BufferBytes  int64
}

func (s *session) snapshot() SessionInfo {
	i := s.info
	i.Requests, i.Errors = s.stats.requests(), s.stats.errors.Load()
	i.ReadBytes, i.WrittenBytes = s.stats.readBytes.Load(), s.stats.writtenBytes.Load()
	i.InFlight, i.BufferBytes = s.inFlight(), s.stream.Held()
	return i
}

func (s *session) inFlight() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return int64(len(s.tasks)) + s.stream.InFlight()
}
