package peer

import "sync"

// Handler carries out the requests of other nodes. Its methods are called from many
// goroutines.
type Handler interface {
	// Handle begins a request. It must not wait: who calls it receives from the node.
	// Request.Reply may be called within Handle, or later by any goroutine.
	Handle(*Request)
	// Kick is called after each batch of calls of Handle, and of Call.Done: what they
	// held back for company goes out now.
	Kick()
}

// Request is a request of another node, from Handle to Reply. Requests are pooled:
// nothing of one may be used after Reply.
type Request struct {
	Class Class
	Op    uint16
	From  *Identity // who the node said it is when it connected; not to be changed
	// Head and Data are what the Call carried, Call.Tail behind Call.Data. They may be
	// changed.
	Head, Data []byte

	// ReplyHead is appended to, to at most MaxHead bytes; there is room for the first 256.
	ReplyHead []byte
	// ReplyData has, when Handle is called, the length that the Call has room for. The
	// handler cuts it to what it has filled, or sets it to other memory, no longer than
	// that, which it leaves alone until Released.
	ReplyData []byte
	// Released, if set by the handler, is called when nothing of the request is used any
	// more, Head, Data and ReplyData included. It may not wait.
	Released func(*Request)

	// State is the handler's own. It stays when the Request is used again, so that a
	// handler can keep its memory for a request there.
	State any

	frame frame
	s     *session
	local func(*Request, error) // not nil: made by Local
	id    uint64
	want  int
	in    *chunk  // Head and Data lie in it
	long  *buffer // else Data does
	reply *buffer // ReplyData did
	cost  int64   // bytes charged
	head  [256]byte
	store []byte // Head of a request with long data, text of a failure
}

// requestPool is of one transport, because of Request.State.
type requestPool struct{ sync.Pool }

func (p *requestPool) get() *Request {
	if r, ok := p.Get().(*Request); ok {
		return r
	}
	r := new(Request)
	r.frame.owner = r
	return r
}

// Reply answers the request, once: with ReplyHead and ReplyData, or with an error, which
// carries neither. Errors that wrap those of package object, of this package or of
// Config.Errors arrive as such.
func (r *Request) Reply(err error) {
	h := header{typ: frameReply, id: r.id}
	if err == nil && (len(r.ReplyHead) > MaxHead || len(r.ReplyData) > r.want) {
		err = ErrTooLong
	}
	if r.local != nil {
		r.local(r, err)
		return
	}
	r.frame.head, r.frame.data = r.ReplyHead, r.ReplyData
	if err != nil {
		code, text := r.s.errs.encode(err)
		r.store = append(r.store[:0], text...)
		h.op, r.frame.head, r.frame.data = code, r.store, nil
	}
	h.head, h.data = uint16(len(r.frame.head)), uint32(len(r.frame.data))
	h.encode(&r.frame.header, r.s.c.seed)
	out := &r.s.c.out
	if r.s.inflight.Load() > 1 {
		out.putWake(&r.frame)
		return
	}
	// Nothing else is under way that could be sent with it, and to wake the sender would take longer than to send.
	out.put(&r.frame)
	out.flush()
}

// sent implements sendable: the end of the request.
func (r *Request) sent() *Call {
	if r.Released != nil {
		r.Released(r)
	}
	s := r.s
	if r.in != nil {
		r.in.unref()
	}
	if r.long != nil {
		r.long.free()
	}
	if r.reply != nil {
		r.reply.free()
	}
	cost := r.cost
	*r = Request{State: r.State, store: r.store[:0], frame: frame{owner: r}}
	s.requests.Put(r)
	s.finished(cost)
	return nil
}
