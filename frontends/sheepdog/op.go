package sheepdog

import (
	"errors"
	"sync"

	"sheepdog/frontends/internal/stream"
	"sheepdog/frontends/sheepdog/internal/wire"
	"sheepdog/storage/object"
	"sheepdog/vdi"
)

// op is a request in flight, from its header to its response's last byte. It is pooled,
// and carries the request to the volume, so that a request costs no allocation.
type op struct {
	stream.Queued
	req  vdi.Request
	wire wire.Request
	obj  wire.ObjectRequest // of object operations
	s    *session

	data  []byte // payload, or where what is read goes
	front []byte // a read's place in the arena: header and data

	in, out *stream.Chunk // pinned by data and front
	long    *stream.Large // else what data lies in
	cost    int64         // bytes charged to the budgets

	on    *attached  // the volume it is submitted to
	owner object.VID // where that is read instead of a deleted one: which
	tries int
	lost  bool // its response says that writes may be lost

	changes bool       // it is counted as one that may change the map
	shared  *sharedVDI // of that VDI

	head   [wire.HeaderSize]byte
	pieces [2][]byte
	reply  [][]byte
}

var ops = sync.Pool{New: func() any {
	o := new(op)
	o.req.Done, o.req.Check = o.done, o.still // once: a method value is an allocation
	return o
}}

func (s *session) newOp(r *wire.Request) *op {
	o := ops.Get().(*op)
	o.s, o.wire, o.tries, o.lost = s, *r, 0, false
	return o
}

// newLongOp makes an op with a buffer of its own for n bytes; it may wait for memory.
func (s *session) newLongOp(r *wire.Request, n int) (*op, error) {
	cost := int64(stream.LargeCost(n))
	if err := s.stream.Charge(cost); err != nil {
		return nil, err
	}
	o := s.newOp(r)
	o.cost, o.long = cost, stream.NewLarge(n)
	o.data = o.long.Bytes()[:n]
	return o, nil
}

// newReadOp makes an op with room for n bytes to be read; it may wait for memory.
func (s *session) newReadOp(r *wire.Request, n int) (*op, error) {
	if n > 0 && n <= stream.ChunkDataMax {
		if front, chunk := s.stream.Place(wire.HeaderSize + n); front != nil {
			o := s.newOp(r)
			o.front, o.data, o.out = front, front[wire.HeaderSize:], chunk
			return o, nil
		}
	}
	if n == 0 {
		return s.newOp(r), nil
	}
	return s.newLongOp(r, n)
}

// Render implements stream.Item. An op without reply is not answered.
func (o *op) Render() [][]byte { return o.reply }

// Sent implements stream.Item: the op gives back all that it holds.
func (o *op) Sent() {
	if o.lost {
		o.s.notices.Sent(o.on.vol)
	}
	o.free()
}

func (o *op) free() {
	if o.on != nil {
		o.on.refs.Add(-1)
	}
	if o.in != nil {
		o.in.Unref()
	}
	if o.out != nil {
		o.out.Unref()
	}
	if o.long != nil {
		o.long.Free()
	}
	if o.cost != 0 {
		o.s.stream.Uncharge(o.cost)
	}
	o.s, o.data, o.front, o.in, o.out, o.long, o.cost, o.on, o.owner = nil, nil, nil, nil, nil, nil, 0, nil, 0
	o.req.Data, o.req.Err, o.req.VID, o.req.Flags = nil, nil, 0, 0
	o.pieces, o.reply = [2][]byte{}, nil
	ops.Put(o)
}

// ofVDI reports whether the operation is on a VDI, not on an object.
func (o *op) ofVDI() bool { return o.wire.Op >= wire.SD_OP_NEW_VDI }

// finish makes the response, and queues it. From any goroutine.
//
// What a node that stops does not carry out is not answered: the connection ends when all else is, and the
// client sends it again to who comes next.
func (o *op) finish(err error) {
	s := o.s
	if err != nil && (errors.Is(err, vdi.ErrClosed) || errors.Is(err, stream.ErrStopped)) && s.stream.Stopping() {
		s.stream.Put(o)
		return
	}
	result := resultOf(err, o.ofVDI())
	n := 0
	head := o.head[:]
	if err != nil {
		if o.lost = o.on != nil && errors.Is(err, object.ErrLost); o.lost {
			s.notices.Said(o.on.vol)
		}
		s.failed(o, result, err)
	} else if !o.wire.HasPayload() {
		n = len(o.data)
		if o.front != nil {
			head = o.front[:wire.HeaderSize]
		}
	}
	wire.PutResponse(head, &o.wire, result, n)
	if o.on != nil {
		wire.PutCopies(head, uint8(min(max(o.on.header.Copies, 1), 255)))
	}
	switch {
	case n > 0 && o.front != nil:
		o.pieces[0] = o.front
		o.reply = o.pieces[:1]
	case n > 0:
		o.pieces = [2][]byte{head, o.data}
		o.reply = o.pieces[:2]
	default:
		o.pieces[0] = head
		o.reply = o.pieces[:1]
	}
	s.stream.Answer(o)
}

// answer makes the response of an operation that says more than success in its header.
func (o *op) answer(put func(head []byte)) {
	wire.PutResponse(o.head[:], &o.wire, wire.SD_RES_SUCCESS, 0)
	put(o.head[:])
	o.pieces[0] = o.head[:]
	o.reply = o.pieces[:1]
	o.s.stream.Put(o)
}

// still is asked when this node has become the volume's owner for the request's sake. It is Check of requests.
func (o *op) still(*vdi.Request) error { return stream.Left(o.s.ctx, "client") }

// done is the completion of req, on any goroutine.
func (o *op) done(r *vdi.Request) {
	if o.changes {
		o.changes = false
		o.ends(r.MapChanged())
	}
	if r.Err != nil && r.VID != 0 && (errors.Is(r.Err, vdi.ErrReadOnly) || errors.Is(r.Err, vdi.ErrNotFound)) {
		s := o.s
		s.detach(o.on)
		go o.moved()
		return
	}
	if r.Err == nil && o.owner != 0 {
		go o.readInstead()
		return
	}
	o.finish(r.Err)
}

// maxMoves bounds how often a read is begun anew because its volume got another vid.
const maxMoves = 8

// moved deals with a request for a vid that is no longer the one that its volume works under, or
// was deleted. What
// is read is read from what the vid is now; what is written is refused, and the
// client asks for the new vid.
func (o *op) moved() {
	vid := object.ID(o.obj.OID).VID()
	if o.tries++; o.wire.Op != wire.SD_OP_READ_OBJ || o.tries > maxMoves {
		o.finish(o.s.gone(vid))
		return
	}
	o.on.refs.Add(-1)
	o.on, o.owner = nil, 0
	if vol := o.s.read(o); vol != nil {
		vol.Kick()
	}
}

// gone is the answer to a change of what is no working VDI any more.
func (s *session) gone(vid object.VID) error {
	if _, err := s.server.cfg.Volumes.Successor(vid); err != nil {
		// Not READONLY: QEMU would ask for the new vid for ever.
		return refuse(wire.SD_RES_NO_VDI, err.Error())
	}
	return refuse(wire.SD_RES_READONLY, "VDI "+vid.String()+" is a snapshot by now")
}
