package peer

// Local makes requests that come over no connection: for simulations, which bring calls
// from node to node by themselves.
type Local struct{ errs *errorTable }

// NewLocal returns one; errors is as in Config.Errors.
func NewLocal(errors map[uint16]error) (*Local, error) {
	t, err := newErrorTable(errors)
	return &Local{t}, err
}

// Request returns a request as if c, whose Head and Data it takes over, had come from a
// node. Its Reply calls reply, on the same goroutine, with the answer in ReplyHead and
// ReplyData, or with the error as the caller on the other node sees it.
func (l *Local) Request(from *Identity, c *Call, reply func(r *Request, err error)) *Request {
	r := &Request{Class: c.Class, Op: c.Op, From: from, Head: c.Head, Data: c.Data, want: max(c.Want, len(c.ReplyData))}
	r.ReplyHead, r.ReplyData = r.head[:0], make([]byte, r.want)
	r.local = func(r *Request, err error) {
		if err != nil {
			code, text := l.errs.encode(err)
			err = l.errs.decode("", code, []byte(text))
		}
		reply(r, err)
	}
	return r
}
