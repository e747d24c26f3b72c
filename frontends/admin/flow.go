package admin

import (
	"context"
	"fmt"
	"io"

	"sheepdog/vdi"
)

// Content moves in pieces, with many requests in flight: together these bound the memory
// of a transfer.
const (
	pieceBytes = 256 << 10
	pieces     = 16
	// kickBytes is how much may be submitted before it is kicked.
	kickBytes = 64 << 10
)

// piece is one request with its buffer. A piece that is not in flight belongs to the flow.
type piece struct {
	req  vdi.Request
	buf  []byte
	done chan struct{} // has room for one
	zero bool          // of an outflow: nothing was submitted
}

// flow keeps the requests in flight, in order. It is for one goroutine.
type flow struct {
	vol   *vdi.Volume
	free  []*piece
	queue []*piece // in flight, the oldest first
	made  int
	held  int // bytes submitted but not kicked
	err   error
}

// take returns a piece to use, and completes the oldest one in flight if need be.
func (f *flow) take(complete func(*piece)) *piece {
	if len(f.free) == 0 && f.made == pieces {
		f.await(complete)
	}
	if n := len(f.free); n > 0 {
		p := f.free[n-1]
		f.free = f.free[:n-1]
		return p
	}
	f.made++
	p := &piece{done: make(chan struct{}, 1)}
	p.req.Done = func(*vdi.Request) { p.done <- struct{}{} }
	return p
}

func (p *piece) buffer() []byte {
	if p.buf == nil {
		p.buf = make([]byte, pieceBytes)
	}
	return p.buf
}

func (f *flow) submit(p *piece, op vdi.Op, off, n int64, data []byte) {
	p.zero = false
	p.req.Op, p.req.Flags, p.req.Off, p.req.Len, p.req.Data, p.req.Err = op, 0, off, n, data, nil
	f.queue = append(f.queue, p)
	f.vol.Submit(&p.req)
	if f.held += int(min(n, pieceBytes)); f.held >= kickBytes {
		f.kick()
	}
}

func (f *flow) kick() {
	f.vol.Kick()
	f.held = 0
}

// await completes the oldest piece.
func (f *flow) await(complete func(*piece)) {
	p := f.queue[0]
	f.queue = append(f.queue[:0], f.queue[1:]...)
	if !p.zero {
		select {
		case <-p.done:
		default:
			f.kick()
			<-p.done
		}
		if f.err == nil {
			f.err = p.req.Err
		}
	}
	if complete != nil && f.err == nil {
		complete(p)
	}
	f.free = append(f.free, p)
}

// drain waits for all that is in flight: the buffers are the requests' until then.
func (f *flow) drain(complete func(*piece)) error {
	f.kick()
	for len(f.queue) > 0 {
		f.await(complete)
	}
	return f.err
}

// sink takes content in the order of offsets.
type sink interface {
	Data(off int64, p []byte) error
	Zero(off, n int64) error
}

// outflow reads extents of a volume into a sink.
type outflow struct {
	flow
	ctx context.Context
	to  sink
}

func (o *outflow) complete(p *piece) {
	if o.err = o.ctx.Err(); o.err != nil {
		return
	}
	if p.zero {
		o.err = o.to.Zero(p.req.Off, p.req.Len)
	} else {
		o.err = o.to.Data(p.req.Off, p.req.Data)
	}
}

// add reports whether more extents are welcome.
func (o *outflow) add(off, n int64, zero bool) bool {
	if zero && o.err == nil {
		p := o.take(o.complete)
		p.zero, p.req.Off, p.req.Len = true, off, n
		o.queue = append(o.queue, p)
		return o.err == nil
	}
	for n > 0 && o.err == nil {
		p := o.take(o.complete)
		k := min(n, pieceBytes)
		o.submit(p, vdi.OpRead, off, k, p.buffer()[:k])
		off, n = off+k, n-k
	}
	return o.err == nil
}

// copyOut moves [off, off+n) of a volume to a sink: what is a hole or reads as zero
// without being read.
func copyOut(ctx context.Context, vol *vdi.Volume, off, n int64, to sink) error {
	o := &outflow{flow: flow{vol: vol}, ctx: ctx, to: to}
	err := vol.Extents(ctx, off, n, func(e vdi.Extent) bool { return o.add(e.Off, e.Len, e.Zero) })
	if err := o.drain(o.complete); err != nil {
		return err
	}
	return err
}

// inflow writes to a volume. Its writes do not overlap.
type inflow struct {
	flow
	bytes, zeros int64

	next *piece // being filled
	at   int64  // where next begins
	fill int
}

// copyIn writes n bytes of r at off; n < 0: until its end. It returns how many it got, and
// with less than n io.ErrUnexpectedEOF.
func (f *inflow) copyIn(r io.Reader, off, n int64) (int64, error) {
	var got int64
	for n < 0 || got < n {
		if f.next != nil && f.at+int64(f.fill) != off+got {
			f.write()
		}
		if f.next == nil {
			f.next, f.at, f.fill = f.take(nil), off+got, 0
		}
		if f.err != nil {
			return got, f.err
		}
		p := f.next.buffer()[f.fill:]
		if n >= 0 {
			p = p[:min(int64(len(p)), n-got)]
		}
		k, err := io.ReadFull(r, p)
		f.fill += k
		got += int64(k)
		if f.fill == pieceBytes {
			f.write()
		}
		switch {
		case err == io.EOF || err == io.ErrUnexpectedEOF:
			if n < 0 {
				return got, nil
			}
			return got, io.ErrUnexpectedEOF
		case err != nil:
			return got, err
		}
	}
	return got, nil
}

// write submits the piece that was being filled.
func (f *inflow) write() {
	if f.next == nil {
		return
	}
	if f.fill > 0 && f.err == nil {
		f.submit(f.next, vdi.OpWrite, f.at, int64(f.fill), f.next.buf[:f.fill])
		f.bytes += int64(f.fill)
	} else {
		f.free = append(f.free, f.next)
	}
	f.next, f.fill = nil, 0
}

func (f *inflow) zero(off, n int64) error {
	f.write()
	p := f.take(nil)
	if f.err != nil {
		f.free = append(f.free, p)
		return f.err
	}
	f.submit(p, vdi.OpZero, off, n, nil)
	f.zeros += n
	return nil
}

// drain waits for all writes.
func (f *inflow) drain() error {
	f.write()
	return f.flow.drain(nil)
}

// finish waits for all writes and makes them durable.
func (f *inflow) finish(ctx context.Context) error {
	if err := f.drain(); err != nil {
		return err
	}
	if err := f.vol.Flush(ctx); err != nil {
		return fmt.Errorf("make durable what was written: %w", err)
	}
	return nil
}
