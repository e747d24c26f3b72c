package nbd

import (
	"bytes"
	"context"
	"errors"
	"io"
	"sync"

	"sheepdog/frontends/internal/stream"
	"sheepdog/frontends/nbd/internal/wire"
	"sheepdog/storage/object"
	"sheepdog/vdi"
)

// op is a request in flight, from its header to its reply's last byte. It is pooled,
// and carries the request to the volume, so that a request costs no allocation.
type op struct {
	stream.Queued
	req  vdi.Request
	wire wire.Request
	s    *session

	data  []byte // payload of a write, or where a read's data goes
	front []byte // a read's place in the arena: head and data

	in, out *stream.Chunk // pinned by data and front
	long    *stream.Large // else what data lies in
	cost    int64         // bytes charged to the budgets

	reply [][]byte // what is sent
	parts [4][]byte
	head  [wire.MaxReadHeadSize + 32]byte
	ids   []uint32 // contexts that a block status is asked for; nil: all
}

var ops = sync.Pool{New: func() any {
	o := new(op)
	o.req.Done, o.req.Check = o.done, o.still // once: a method value is an allocation
	return o
}}

func (s *session) newOp(r *wire.Request) *op {
	o := ops.Get().(*op)
	o.s, o.wire = s, *r
	o.reply = o.parts[:0]
	return o
}

// newLongOp makes an op whose data lies in a buffer of its own; it may wait for memory.
func (s *session) newLongOp(r *wire.Request) (*op, error) {
	n := int(r.Length)
	cost := int64(stream.LargeCost(n))
	if err := s.stream.Charge(cost); err != nil {
		return nil, err
	}
	o := s.newOp(r)
	o.cost = cost
	o.long = stream.NewLarge(n)
	o.data = o.long.Bytes()[:n]
	return o, nil
}

// Render implements stream.Item.
func (o *op) Render() [][]byte { return o.reply }

// Sent implements stream.Item.
func (o *op) Sent() {
	if o.wire.Type == wire.NBD_CMD_FLUSH && errors.Is(o.req.Err, object.ErrLost) {
		o.s.notices.Sent(o.s.vol)
	}
	o.free()
}

// free gives back all that the op holds. Its owner is who sent the reply, or who
// made it if it was never submitted.
func (o *op) free() {
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
	o.s, o.data, o.front, o.in, o.out, o.long, o.cost, o.ids = nil, nil, nil, nil, nil, nil, 0, nil
	o.req.Data, o.req.Err = nil, nil
	clear(o.reply)
	o.reply = nil
	clear(o.parts[:])
	ops.Put(o)
}

// take carries out a request whose payload, if any, is in the receive buffer.
func (s *session) take(r *wire.Request, payload []byte) error {
	if payload == nil { // else it was checked
		if bad := s.check(r); bad != accepted {
			return s.reply(r, bad)
		}
	}
	switch r.Type {
	case wire.NBD_CMD_DISC:
		return io.EOF
	case wire.NBD_CMD_READ:
		return s.takeRead(r)
	case wire.NBD_CMD_BLOCK_STATUS:
		return s.takeStatus(r, payload)
	case wire.NBD_CMD_WRITE:
		o := s.newOp(r)
		o.data = payload
		if len(payload) > 0 {
			o.in = s.stream.Pin()
		}
		return s.submit(o)
	case wire.NBD_CMD_TRIM, wire.NBD_CMD_WRITE_ZEROES:
		if r.Length > maxZero {
			return s.goSlow(s.newOp(r), (*op).zeroPieces)
		}
	case wire.NBD_CMD_CACHE:
		// A hint: no more is cached at once than a client could read at once.
		r.Length = min(r.Length, MaxPayload)
	}
	return s.submit(s.newOp(r))
}

func (s *session) takeRead(r *wire.Request) error {
	head := s.headers.ReadHeadSize()
	n := int(r.Length)
	if n <= stream.ChunkDataMax {
		if front, in := s.stream.Place(head + n); front != nil {
			o := s.newOp(r)
			o.front, o.data = front, front[head:]
			o.out = in
			return s.submit(o)
		}
	}
	o, err := s.newLongOp(r)
	if err != nil {
		return err
	}
	return s.submit(o)
}

// submit hands an op to the volume. It may complete, and be freed, at once.
func (s *session) submit(o *op) error {
	if err := s.admit(); err != nil {
		o.free()
		return err
	}
	s.stream.Claim()
	s.stats.submitted(&o.wire)
	c := &commands[o.wire.Type]
	o.req.Op, o.req.Flags = c.op, flagsOf(&o.wire)
	o.req.Off, o.req.Len, o.req.Data = int64(o.wire.Offset), int64(o.wire.Length), o.data
	bytes := len(o.data)
	if o.wire.Length == 0 && c.ranged {
		o.done(&o.req) // the layer below knows no empty requests
		return nil
	}
	s.vol.Submit(&o.req)
	s.stream.Submitted(bytes)
	return nil
}

// admit counts a request in, waiting while there are too many.
func (s *session) admit() error { return s.stream.Admit(s.server.cfg.SessionRequests) }

func flagsOf(r *wire.Request) (f vdi.Flags) {
	if r.Flags&wire.NBD_CMD_FLAG_FUA != 0 && commands[r.Type].writes {
		f |= vdi.FlagFUA
	}
	if r.Flags&wire.NBD_CMD_FLAG_NO_HOLE != 0 {
		f |= vdi.FlagNoHole
	}
	return f
}

// reply answers a request that is not carried out. It is counted like any other: a
// client that sends nonsense and reads no answers shall not fill our memory.
func (s *session) reply(r *wire.Request, why refusal) error {
	if err := s.admit(); err != nil {
		return err
	}
	s.stream.Claim()
	s.stats.submitted(r)
	o := s.newOp(r)
	o.fail(why.errno, why.text)
	s.stream.Put(o)
	return nil
}

// done is the completion of req, on any goroutine.
func (o *op) done(r *vdi.Request) {
	s := o.s
	if r.Err != nil {
		s.failed(o, r.Err)
	} else if o.wire.Type == wire.NBD_CMD_READ {
		o.readReply()
	} else {
		n := s.headers.DoneSize()
		s.headers.PutDone(o.head[:n], o.wire.Cookie, o.wire.Offset)
		o.reply = append(o.reply, o.head[:n])
	}
	s.stream.Answer(o)
}

// failed makes the reply to a request that failed below.
func (s *session) failed(o *op, err error) {
	if o.wire.Type == wire.NBD_CMD_FLUSH && errors.Is(err, object.ErrLost) {
		s.notices.Said(s.vol)
	}
	errno := resultOf(err)
	o.fail(errno, err.Error())
	s.server.logFailure(s, o, errno, err)
}

func (o *op) fail(errno wire.Errno, text string) {
	o.s.stats.errors.Add(1)
	o.reply = append(o.reply[:0], o.s.headers.AppendErrorReply(o.head[:0], o.wire.Cookie, o.wire.Offset, errno, text))
}

// still is asked when this node has become the volume's owner for the request's sake. It is Check of requests.
func (o *op) still(*vdi.Request) error { return stream.Left(o.s.ctx, "client") }

// zeros is what long runs of zeros are compared with.
var zeros [64 << 10]byte

func isZero(p []byte) bool {
	for len(p) > len(zeros) {
		if !bytes.Equal(p[:len(zeros)], zeros[:]) {
			return false
		}
		p = p[len(zeros):]
	}
	return bytes.Equal(p, zeros[:len(p)])
}

// readReply makes the reply to a read. Zeros are sent as holes to who can read them:
// comparing is many times quicker than sending, and ends at the first byte otherwise.
func (o *op) readReply() {
	h := o.s.headers
	if h == wire.Simple {
		o.dataReply()
		return
	}
	n := len(o.data)
	switch {
	case n == 0: // a content chunk must describe at least one byte
		k := h.ChunkSize()
		h.PutChunk(o.head[:k], wire.NBD_REPLY_FLAG_DONE, wire.NBD_REPLY_TYPE_NONE, o.wire.Cookie, o.wire.Offset, 0)
		o.reply = append(o.reply, o.head[:k])
	case isZero(o.data):
		k := h.HoleSize()
		h.PutHole(o.head[:k], wire.NBD_REPLY_FLAG_DONE, o.wire.Cookie, o.wire.Offset, o.wire.Offset, uint32(n))
		o.reply = append(o.reply, o.head[:k])
	case n > stream.ChunkDataMax && o.wire.Flags&wire.NBD_CMD_FLAG_DF == 0:
		o.mixedReply()
	default:
		o.dataReply()
	}
}

func (o *op) dataReply() {
	h := o.s.headers
	k := h.ReadHeadSize()
	if o.front != nil {
		h.PutReadHead(o.front, wire.NBD_REPLY_FLAG_DONE, o.wire.Cookie, o.wire.Offset, o.wire.Offset, len(o.data))
		o.reply = append(o.reply, o.front)
		return
	}
	h.PutReadHead(o.head[:k], wire.NBD_REPLY_FLAG_DONE, o.wire.Cookie, o.wire.Offset, o.wire.Offset, len(o.data))
	o.reply = append(o.reply, o.head[:k], o.data)
}

// holeGrain is the unit in which a long read is searched for holes, in bytes.
const holeGrain = 64 << 10

// mixedReply sends a long read as runs of data and holes.
func (o *op) mixedReply() {
	h := o.s.headers
	var heads []byte                    // one piece, so that a fragmented reply costs few allocations
	grains := len(o.data)/holeGrain + 2 // an unaligned read begins and ends within one
	for from := 0; from < len(o.data); {
		hole, to := o.run(from)
		last := to == len(o.data)
		if from == 0 && last {
			o.dataReply()
			return
		}
		if heads == nil {
			heads = make([]byte, 0, grains*(h.HoleSize()+8))
		}
		var flags uint16
		if last {
			flags = wire.NBD_REPLY_FLAG_DONE
		}
		at := o.wire.Offset + uint64(from)
		k := h.ReadHeadSize()
		if hole {
			k = h.HoleSize()
		}
		head := heads[len(heads) : len(heads)+k]
		heads = heads[:len(heads)+k]
		if hole {
			h.PutHole(head, flags, o.wire.Cookie, o.wire.Offset, at, uint32(to-from))
			o.reply = append(o.reply, head)
		} else {
			h.PutReadHead(head, flags, o.wire.Cookie, o.wire.Offset, at, to-from)
			o.reply = append(o.reply, head, o.data[from:to])
		}
		from = to
	}
}

// run returns where the run of zero or other grains that begins at from ends. Grains
// are aligned in the export, not in the request.
func (o *op) run(from int) (hole bool, to int) {
	next := func(at int) int {
		return min(len(o.data), at+holeGrain-int((o.wire.Offset+uint64(at))%holeGrain))
	}
	to = next(from)
	hole = isZero(o.data[from:to])
	for to < len(o.data) {
		end := next(to)
		if isZero(o.data[to:end]) != hole {
			break
		}
		to = end
	}
	return hole, to
}

// maxZero is the longest trim or write-zeroes that is one request to the volume, in
// bytes. Longer ones, which extended headers allow, go in pieces, so that the end of
// the session ends them.
const maxZero = 1 << 30

// goSlow runs a command that has to wait on a goroutine of its own.
func (s *session) goSlow(o *op, run func(*op, context.Context) error) error {
	if err := s.admit(); err != nil {
		o.free()
		return err
	}
	s.stats.submitted(&o.wire)
	s.stream.FinishBatch()
	select {
	case s.slow <- struct{}{}:
	case <-s.stream.Stopped():
		o.reply = nil
		s.stream.Put(o) // it was counted in
		return stream.ErrStopped
	}
	go func() {
		if err := run(o, s.ctx); err != nil {
			s.failed(o, err)
		}
		<-s.slow
		s.stream.Put(o)
	}()
	return nil
}

// zeroPieces carries out a long trim or write-zeroes.
func (o *op) zeroPieces(ctx context.Context) error {
	completed := make(chan error, 1)
	piece := vdi.Request{Op: commands[o.wire.Type].op, Flags: flagsOf(&o.wire), Check: o.req.Check, Done: func(r *vdi.Request) { completed <- r.Err }}
	end := int64(o.wire.Offset + o.wire.Length)
	for off := int64(o.wire.Offset); off < end; off += piece.Len {
		if err := ctx.Err(); err != nil {
			return err
		}
		piece.Off, piece.Len = off, min(maxZero, end-off)
		o.s.vol.Submit(&piece)
		o.s.vol.Kick()
		if err := <-completed; err != nil {
			return err
		}
	}
	n := o.s.headers.DoneSize()
	o.s.headers.PutDone(o.head[:n], o.wire.Cookie, o.wire.Offset)
	o.reply = append(o.reply, o.head[:n])
	return nil
}
