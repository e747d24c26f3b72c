package vdi

import (
	"context"
	"fmt"
	"io"
	"sync/atomic"

	"sheepdog/storage/object"
)

// Volume is an open VDI or snapshot. All methods may be called from any goroutine. What
// is written through one is read through all that have the same VDI open on this node.
type Volume struct {
	core     *core
	size     int64
	vid      object.VID
	readOnly bool
	client   string
	quiet    bool // one of the core's users instead of its handles
	closed   atomic.Bool
	told     atomic.Uint64 // of how many of the core's losses
}

// Size is the volume's size in bytes when it was opened. If the VDI is shrunk later,
// requests beyond its end fail with ErrInvalid; what it grows by is seen by who opens it
// again.
func (v *Volume) Size() int64 { return v.size }

// ReadOnly reports whether writes fail with ErrReadOnly.
func (v *Volume) ReadOnly() bool { return v.readOnly }

// Name is the VDI's name.
func (v *Volume) Name() string { return v.core.name }

// Tag is that of the snapshot, its number if it has no tag, "" for the VDI itself.
func (v *Volume) Tag() string { return v.core.tag }

// VID is what the volume had when it was opened. A snapshot gives the VDI a new one.
func (v *Volume) VID() object.VID { return v.vid }

// ObjectSize is the size in bytes of the pieces the volume is cut into: requests inside
// one are the quickest.
func (v *Volume) ObjectSize() int64 { return v.core.objectSize() }

// Close gives the volume up. No request is in flight. It does not flush: what was
// answered but not flushed survives the end of the process, not of the power.
func (v *Volume) Close() error {
	if v.closed.Swap(true) {
		return nil
	}
	s := v.core.s
	if v.quiet {
		s.release(v.core)
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(v.core.handles, v)
	s.dropUnused(v.core)
	s.wake()
	return nil
}

// ReadAt reads len(p) bytes at off. Like io.ReaderAt it reads less only with an error,
// io.EOF at the end of the volume.
func (v *Volume) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	n := int64(len(p))
	if off < 0 || off > v.size {
		return 0, fmt.Errorf("read at %d of %s: %w", off, v.core.title(), ErrInvalid)
	}
	n = min(n, v.size-off)
	if err := v.do(ctx, OpRead, 0, off, n, p[:n]); err != nil {
		return 0, err
	}
	if n < int64(len(p)) {
		return int(n), io.EOF
	}
	return int(n), nil
}

// WriteAt writes p at off. All of it must be inside the volume.
func (v *Volume) WriteAt(ctx context.Context, p []byte, off int64) (int, error) {
	if err := v.do(ctx, OpWrite, 0, off, int64(len(p)), p); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Flush makes durable what was answered before.
func (v *Volume) Flush(ctx context.Context) error { return v.do(ctx, OpFlush, 0, 0, 0, nil) }

// Zero makes [off, off+n) read as zero: see OpZero.
func (v *Volume) Zero(ctx context.Context, off, n int64, f Flags) error {
	return v.do(ctx, OpZero, f, off, n, nil)
}

// Discard gives the space of [off, off+n) back: see OpDiscard.
func (v *Volume) Discard(ctx context.Context, off, n int64) error {
	return v.do(ctx, OpDiscard, 0, off, n, nil)
}

// do carries out one request. Once begun it is not given up: data belongs to it.
func (v *Volume) do(ctx context.Context, op Op, f Flags, off, n int64, data []byte) error {
	if err := ctx.Err(); err != nil {
		return explain(err, "%s at %d of %s", verbs[op], off, v.core.title())
	}
	done := make(chan struct{})
	r := Request{Op: op, Flags: f, Off: off, Len: n, Data: data, Done: func(*Request) { close(done) }}
	v.Submit(&r)
	v.Kick()
	<-done
	if op == OpFlush {
		v.Heard()
	}
	return r.Err
}
