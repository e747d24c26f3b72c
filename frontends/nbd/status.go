package nbd

import (
	"context"
	"slices"

	"sheepdog/frontends/nbd/internal/wire"
	"sheepdog/vdi"
)

// metaContext is a metadata context that the client selected.
type metaContext struct {
	id    uint32
	name  string
	since string // qemu:dirty-bitmap: the snapshot's tag; "" for base:allocation
}

// unknown is the status that is safe to report for anything.
func (c metaContext) unknown() uint32 {
	if c.since != "" {
		return wire.NBD_STATE_DIRTY
	}
	return 0
}

// maxStatus bounds the descriptors of one context in one reply. The specification
// allows 2^20; a client asks on from where the reply ends.
const maxStatus = 4096

// statusCost is the memory that the answer for one context may take, in bytes.
const statusCost = maxStatus * 16 * 2

// takeStatus carries out NBD_CMD_BLOCK_STATUS, in the background because reading
// maps may wait.
func (s *session) takeStatus(r *wire.Request, payload []byte) error {
	ids := make([]uint32, 0, len(s.contexts))
	for _, c := range s.contexts {
		ids = append(ids, c.id)
	}
	if payload != nil {
		if bad := s.parseStatusPayload(r, payload, &ids); bad != accepted {
			return s.reply(r, bad)
		}
	}
	cost := int64(statusCost * len(ids))
	if err := s.stream.Charge(cost); err != nil {
		return err
	}
	o := s.newOp(r)
	o.cost, o.ids = cost, ids
	return s.goSlow(o, (*op).status)
}

// parseStatusPayload replaces the request's length and the contexts by what the
// client put into the payload.
func (s *session) parseStatusPayload(r *wire.Request, payload []byte, ids *[]uint32) refusal {
	length, chosen, err := wire.ParseStatusPayload(payload, make([]uint32, 0, len(s.contexts)))
	if err != nil {
		return refuse(wire.NBD_EINVAL, "%v", err)
	}
	for _, id := range chosen {
		if !slices.Contains(*ids, id) {
			return refuse(wire.NBD_EINVAL, "metadata context %d was not selected", id)
		}
	}
	if r.Offset > s.size || length > s.size-r.Offset {
		return refuse(wire.NBD_EINVAL, "block status of %d bytes at %d goes beyond the export's %d bytes", length, r.Offset, s.size)
	}
	if length == 0 || len(chosen) == 0 {
		return refuse(wire.NBD_EINVAL, "block status of nothing")
	}
	r.Length = length
	*ids = chosen
	return accepted
}

// status makes the reply: one chunk per context, all in one piece of memory.
func (o *op) status(ctx context.Context) error {
	var reply []byte
	list := make([]wire.Status, 0, 64)
	left := len(o.ids)
	for _, c := range o.s.contexts {
		if !slices.Contains(o.ids, c.id) {
			continue
		}
		runs := statusRuns{list: list[:0], limit: maxStatus, end: o.wire.Offset + o.wire.Length, at: o.wire.Offset, unknown: c.unknown()}
		if o.wire.Flags&wire.NBD_CMD_FLAG_REQ_ONE != 0 {
			runs.limit = 1
		}
		if err := o.query(ctx, c, &runs); err != nil {
			return err
		}
		runs.finish()
		list = runs.list
		var flags uint16
		if left--; left == 0 {
			flags = wire.NBD_REPLY_FLAG_DONE
		}
		reply = o.s.headers.AppendBlockStatus(reply, flags, o.wire.Cookie, o.wire.Offset, c.id, list)
	}
	o.reply = append(o.reply, reply)
	return nil
}

func (o *op) query(ctx context.Context, c metaContext, runs *statusRuns) error {
	off, n := int64(o.wire.Offset), int64(o.wire.Length)
	if c.since != "" {
		return o.s.vol.Changed(ctx, c.since, off, n, func(e vdi.ChangedExtent) bool { return runs.add(e.Off, e.Len, dirtyState(e)) })
	}
	return o.s.vol.Extents(ctx, off, n, func(e vdi.Extent) bool { return runs.add(e.Off, e.Len, allocationState(e)) })
}

// statusRuns collects descriptors: consecutive from the request's offset, never
// empty, neighbours differing.
type statusRuns struct {
	list    []wire.Status
	limit   int
	at      uint64 // end of what is described
	end     uint64 // of the request
	unknown uint32 // status of what nothing is said about
}

// add appends an extent; false if no more are wanted.
func (r *statusRuns) add(off, n int64, flags uint32) bool {
	stop := min(uint64(off)+uint64(n), r.end)
	if stop <= r.at {
		return r.at < r.end
	}
	if k := len(r.list); k > 0 && r.list[k-1].Flags == flags {
		r.list[k-1].Length += stop - r.at
	} else {
		if k == r.limit {
			return false
		}
		r.list = append(r.list, wire.Status{Length: stop - r.at, Flags: flags})
	}
	r.at = stop
	return r.at < r.end
}

// finish makes sure that there is at least one descriptor, as there must be, even
// where the volume says nothing because it shrank meanwhile.
func (r *statusRuns) finish() {
	if len(r.list) == 0 {
		r.list = append(r.list, wire.Status{Length: r.end - r.at, Flags: r.unknown})
		r.at = r.end
	}
}

func allocationState(e vdi.Extent) uint32 {
	switch {
	case e.Hole:
		return wire.NBD_STATE_HOLE | wire.NBD_STATE_ZERO
	case e.Zero:
		return wire.NBD_STATE_ZERO
	}
	return 0
}

func dirtyState(e vdi.ChangedExtent) uint32 {
	if e.Changed {
		return wire.NBD_STATE_DIRTY
	}
	return 0
}
