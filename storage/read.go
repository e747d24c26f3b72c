package storage

import (
	"errors"
	"io"
	"sync"

	"sheepdog/storage/disk"
	"sheepdog/storage/internal/wal"
	"sheepdog/storage/object"
)

// source says where the content of a run of blocks comes from.
type source uint8

const (
	fromNowhere source = iota // zeros: holes, and blocks known to be zero
	fromLog
	fromFile
)

// run is a range of blocks that one call can read.
type run struct {
	source source
	count  uint32
	pos    wal.Pos // fromLog
}

// plan is how a range of an object is read. Plans are pooled.
type plan struct {
	runs   []run
	sums   []uint64
	bounce []byte
}

// chunkBlocks bounds what an unaligned read or a synchronous helper moves at once.
const chunkBlocks = 64

var plans = sync.Pool{New: func() any { return new(plan) }}

func (p *plan) buffer(blocks uint32) []byte {
	if n := int(blocks) * blockSize; cap(p.bounce) < n {
		p.bounce = make([]byte, n)
	}
	return p.bounce[:int(blocks)*blockSize]
}

// make plans the reading of [first, end). The object's lock is held, for reading at
// least. It fails with errSlow if something has to be loaded first, and with errBusy if
// a direct write is in flight there.
func (p *plan) make(o *obj, first, end uint32) error {
	p.runs, p.sums = p.runs[:0], p.sums[:0]
	if len(o.spans) > 0 && o.busy(first, end) {
		return errBusy
	}
	for b := first; b < end; b++ {
		next := run{count: 1}
		e := o.over.get(b)
		sum := e.sum
		switch {
		case !e.pending():
			var ok bool
			if sum, ok = o.fileSum(b); !ok {
				return errSlow
			}
			if sum != 0 {
				if o.file == nil {
					return errSlow
				}
				next.source = fromFile
			}
		case !e.hole() && !e.zero():
			next.source, next.pos = fromLog, e.pos
		}
		p.sums = append(p.sums, sum)
		p.add(next)
	}
	return nil
}

func (p *plan) add(next run) {
	if n := len(p.runs); n > 0 {
		last := &p.runs[n-1]
		if last.source == next.source && (next.source != fromLog || last.pos+wal.Pos(last.count)*blockSize == next.pos) {
			last.count++
			return
		}
	}
	p.runs = append(p.runs, next)
}

// execute reads what was planned into dst and verifies every block. f may be nil if
// no run needs it. Blocks that do not verify make a CorruptError, without data.
func (p *plan) execute(d *drive, o *obj, f *handle, first uint32, dst []byte, nowait bool) error {
	var bad *object.CorruptError
	i := 0
	for _, run := range p.runs {
		part := dst[i*blockSize:][:int(run.count)*blockSize]
		if run.source == fromNowhere {
			clear(part)
			i += int(run.count)
			continue
		}
		for at := run; len(part) > 0; {
			// Verified in pieces, while they are in the processor's cache.
			piece := part[:min(len(part), verifyBytes)]
			if err := p.fetch(d, f, at, first+uint32(i), piece, nowait); err != nil {
				return err
			}
			at.pos += wal.Pos(len(piece))
			part = part[len(piece):]
			for ; len(piece) > 0; piece = piece[blockSize:] {
				if object.Sum(piece[:blockSize]) != p.sums[i] {
					bad = addBad(bad, o.key, d, first+uint32(i))
				}
				i++
			}
		}
	}
	if bad != nil {
		return bad
	}
	return nil
}

func (p *plan) fetch(d *drive, f *handle, run run, b uint32, part []byte, nowait bool) error {
	if run.source == fromLog {
		return d.log.ReadAt(part, run.pos, nowait)
	}
	n, err := f.ReadNowait(part, int64(b)*blockSize)
	if !nowait && (n < len(part) || err != nil) {
		return readFull(f, part, int64(b)*blockSize)
	}
	if n < len(part) && (err == nil || errors.Is(err, io.EOF)) {
		return disk.ErrWouldBlock // cached in part, or cut off: the slow way finds out
	}
	return err
}

// verifyBytes is how much is moved between two looks at checksums.
const verifyBytes = 128 << 10

// maxBadBlocks bounds the list in a CorruptError.
const maxBadBlocks = 16

func addBad(bad *object.CorruptError, k object.Key, d *drive, b uint32) *object.CorruptError {
	if bad == nil {
		bad = &object.CorruptError{Key: k, Disk: d.String()}
	}
	if len(bad.Blocks) < maxBadBlocks {
		bad.Blocks = append(bad.Blocks, b)
	}
	return bad
}

// blockRange is the range of blocks that holds [off, off+n).
func blockRange(off, n uint32) (first, end uint32) {
	return off / blockSize, uint32((uint64(off) + uint64(n) + blockSize - 1) / blockSize)
}

func aligned(off, n uint32) bool { return (off|n)%blockSize == 0 }

// tryRead serves a read from memory. It returns false, with nothing done, if that
// is not possible. The object's read lock is held throughout: no content can change
// under it but that of direct writes in flight, which the plan excludes, so what does
// not verify is rotten.
func (d *drive) tryRead(r *object.Request) bool {
	o := d.lookup(r.Key())
	if o == nil || o.waiting.Load() {
		return false
	}
	p := plans.Get().(*plan)
	o.mu.RLock()
	err := errSlow
	if o.ready() {
		if !o.used.Load() {
			o.used.Store(true)
		}
		err = d.readHeld(o, p, r, true)
	}
	o.mu.RUnlock()
	plans.Put(p)
	if errors.Is(err, errSlow) || errors.Is(err, errBusy) || errors.Is(err, disk.ErrWouldBlock) {
		return false
	}
	if err == nil {
		d.count.reads.Add(1)
	}
	r.Complete(d.explain(err))
	return true
}

// readHeld reads a request's range with the object's lock held.
func (d *drive) readHeld(o *obj, p *plan, r *object.Request, nowait bool) error {
	if !o.exists {
		return object.ErrNotFound
	}
	if o.shift != r.SizeShift {
		return errShift
	}
	first, end := blockRange(r.Off, r.Len)
	if aligned(r.Off, r.Len) {
		if err := p.make(o, first, end); err != nil {
			return err
		}
		return p.execute(d, o, o.file, first, r.Data, nowait)
	}
	return eachChunk(first, end, func(f, e uint32) error {
		if err := p.make(o, f, e); err != nil {
			return err
		}
		buf := p.buffer(e - f)
		if err := p.execute(d, o, o.file, f, buf, nowait); err != nil {
			return err
		}
		copyOverlap(r.Data, int64(r.Off), buf, int64(f)*blockSize)
		return nil
	})
}

func eachChunk(first, end uint32, fn func(first, end uint32) error) error {
	for ; first < end; first += chunkBlocks {
		if err := fn(first, min(end, first+chunkBlocks)); err != nil {
			return err
		}
	}
	return nil
}

// copyOverlap copies what src, which begins at srcOff, has of dst's range.
func copyOverlap(dst []byte, dstOff int64, src []byte, srcOff int64) {
	if srcOff < dstOff {
		src = src[min(dstOff-srcOff, int64(len(src))):]
		srcOff = dstOff
	}
	if skip := srcOff - dstOff; skip < int64(len(dst)) {
		copy(dst[skip:], src)
	}
}

// read serves a read on a worker.
func (d *drive) read(r *object.Request) {
	err := d.readSlow(r)
	if errors.Is(err, errBusy) {
		return // a waiter now
	}
	if err == nil {
		d.count.reads.Add(1)
	}
	if errors.Is(err, errAway) {
		d.pass(r)
		return
	}
	r.Complete(d.explain(err))
}

// readSlow waits for the disk without holding the object's lock, so that nobody else
// waits with it. What it planned may be overtaken meanwhile: then the content does not
// verify, or the segment is gone, and it begins again; the last time it holds the lock.
func (d *drive) readSlow(r *object.Request) error {
	const tries = 3
	p := plans.Get().(*plan)
	defer plans.Put(p)
	first, end := blockRange(r.Off, r.Len)
	for try := 1; ; try++ {
		o, err := d.lock(r.Key())
		if err != nil {
			return err
		}
		if err := d.checkRead(o, r, first, end); err != nil {
			o.mu.Unlock()
			return err
		}
		if try == tries || !aligned(r.Off, r.Len) {
			err := d.readHeld(o, p, r, false)
			o.mu.Unlock()
			return err
		}
		err = p.make(o, first, end)
		var h *handle
		if o.file != nil {
			h = o.file.acquire()
		}
		o.mu.Unlock()
		if err == nil {
			err = p.execute(d, o, h, first, r.Data, false)
		}
		if h != nil {
			h.release()
		}
		if err == nil || !errors.Is(err, object.ErrCorrupt) && !errors.Is(err, wal.ErrRecycled) {
			return err
		}
	}
}

// checkRead makes an object ready for planning; a request that overlaps a direct
// write in flight is queued behind it.
func (d *drive) checkRead(o *obj, r *object.Request, first, end uint32) error {
	switch {
	case !o.exists:
		return object.ErrNotFound
	case o.shift != r.SizeShift:
		return errShift
	case o.busy(first, end):
		o.waiters.push(r)
		return errBusy
	}
	return d.ensurePages(o, first, end)
}
