package nbd

import (
	"fmt"

	"sheepdog/frontends/nbd/internal/wire"
	"sheepdog/vdi"
)

// command says what a request type is and what it may ask for.
type command struct {
	name   string
	op     vdi.Op
	flags  uint16     // valid ones beside NBD_CMD_FLAG_FUA, which is valid for all
	writes bool       // NBD_EPERM on read-only exports
	ranged bool       // offset and length lie within the export
	beyond wire.Errno // the answer when they do not ("Error values")
}

var commands = [...]command{
	wire.NBD_CMD_READ:         {name: "read", op: vdi.OpRead, flags: wire.NBD_CMD_FLAG_DF, ranged: true, beyond: wire.NBD_EINVAL},
	wire.NBD_CMD_WRITE:        {name: "write", op: vdi.OpWrite, flags: wire.NBD_CMD_FLAG_PAYLOAD_LEN, writes: true, ranged: true, beyond: wire.NBD_ENOSPC},
	wire.NBD_CMD_DISC:         {name: "disconnect"},
	wire.NBD_CMD_FLUSH:        {name: "flush", op: vdi.OpFlush},
	wire.NBD_CMD_TRIM:         {name: "trim", op: vdi.OpDiscard, writes: true, ranged: true, beyond: wire.NBD_EINVAL},
	wire.NBD_CMD_CACHE:        {name: "cache", op: vdi.OpCache, ranged: true, beyond: wire.NBD_EINVAL},
	wire.NBD_CMD_WRITE_ZEROES: {name: "write_zeroes", op: vdi.OpZero, flags: wire.NBD_CMD_FLAG_NO_HOLE | wire.NBD_CMD_FLAG_FAST_ZERO, writes: true, ranged: true, beyond: wire.NBD_ENOSPC},
	wire.NBD_CMD_BLOCK_STATUS: {name: "block_status", flags: wire.NBD_CMD_FLAG_REQ_ONE | wire.NBD_CMD_FLAG_PAYLOAD_LEN, ranged: true, beyond: wire.NBD_EINVAL},
}

// refusal is an answer to a request that is not carried out.
type refusal struct {
	errno wire.Errno
	text  string
}

var accepted = refusal{}

func refuse(errno wire.Errno, format string, args ...any) refusal {
	return refusal{errno, fmt.Sprintf(format, args...)}
}

// check decides whether a request may be carried out. It must not depend on
// anything that is not yet received: the payload, if any, is dealt with either way.
func (s *session) check(r *wire.Request) refusal {
	if int(r.Type) >= len(commands) {
		return refuse(wire.NBD_EINVAL, "unknown command %d", r.Type)
	}
	c := &commands[r.Type]
	if bad := s.checkFlags(c, r); bad != accepted {
		return bad
	}
	if c.writes && s.readOnly {
		return refuse(wire.NBD_EPERM, "export is read-only")
	}
	if c.ranged && (r.Offset > s.size || r.Length > s.size-r.Offset) && !s.statusPayload(r) {
		return refuse(c.beyond, "%s of %d bytes at %d goes beyond the export's %d bytes", c.name, r.Length, r.Offset, s.size)
	}
	switch r.Type {
	case wire.NBD_CMD_READ:
		return s.checkRead(r)
	case wire.NBD_CMD_FLUSH:
		// "length and offset are reserved, and MUST be set to all-zero".
		if r.Offset != 0 || r.Length != 0 {
			return refuse(wire.NBD_EINVAL, "flush with an offset or a length")
		}
	case wire.NBD_CMD_WRITE_ZEROES:
		// Holes are made by changing metadata alone; keeping the range allocated may
		// mean to write it, which is no faster than NBD_CMD_WRITE.
		const slow = wire.NBD_CMD_FLAG_FAST_ZERO | wire.NBD_CMD_FLAG_NO_HOLE
		if r.Flags&slow == slow {
			return refuse(wire.NBD_ENOTSUP, "zeroing without a hole is not faster than writing")
		}
	case wire.NBD_CMD_BLOCK_STATUS:
		return s.checkStatus(r)
	}
	return accepted
}

func (s *session) checkFlags(c *command, r *wire.Request) refusal {
	if unknown := r.Flags &^ (c.flags | wire.NBD_CMD_FLAG_FUA); unknown != 0 {
		return refuse(wire.NBD_EINVAL, "flags %#x are not valid for %s", unknown, c.name)
	}
	payload := r.Flags&wire.NBD_CMD_FLAG_PAYLOAD_LEN != 0
	switch {
	case payload && s.headers != wire.Extended:
		return refuse(wire.NBD_EINVAL, "flag for extended headers, which were not negotiated")
	case !payload && s.headers == wire.Extended && r.Type == wire.NBD_CMD_WRITE:
		return refuse(wire.NBD_EINVAL, "write without a payload")
	case r.Flags&wire.NBD_CMD_FLAG_DF != 0 && s.headers == wire.Simple:
		return refuse(wire.NBD_EINVAL, "flag for structured replies, which were not negotiated")
	}
	return accepted
}

func (s *session) checkRead(r *wire.Request) refusal {
	if r.Length <= MaxPayload {
		return accepted
	}
	// NBD_EOVERFLOW is for clients that know NBD_CMD_FLAG_DF ("Error values").
	errno := wire.NBD_EOVERFLOW
	if s.headers == wire.Simple {
		errno = wire.NBD_EINVAL
	}
	return refuse(errno, "read of %d bytes is longer than the maximum of %d", r.Length, MaxPayload)
}

func (s *session) checkStatus(r *wire.Request) refusal {
	if len(s.contexts) == 0 {
		return refuse(wire.NBD_EINVAL, "no metadata context was selected")
	}
	if r.Length == 0 {
		return refuse(wire.NBD_EINVAL, "block status of no bytes")
	}
	return accepted
}

// statusPayload reports whether a request's length is that of a block status
// payload: the length of its effect is in there.
func (s *session) statusPayload(r *wire.Request) bool {
	return r.Type == wire.NBD_CMD_BLOCK_STATUS && r.Flags&wire.NBD_CMD_FLAG_PAYLOAD_LEN != 0
}
