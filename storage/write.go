package storage

import (
	"errors"
	"fmt"
	"sync"

	"sheepdog/storage/disk"
	"sheepdog/storage/internal/wal"
	"sheepdog/storage/object"
)

// errShift: the caller and the object disagree about the object's size.
var errShift = fmt.Errorf("object has another size: %w", object.ErrInvalid)

// errNoGrow: the caller knows that there is no space for it.
var errNoGrow = fmt.Errorf("write needs new space: %w", object.ErrNoSpace)

// scratch is the memory that a logged write needs besides the object's. Pooled.
type scratch struct {
	rec  wal.Record
	sums []uint64
	buf  []byte
	plan plan
}

var scratches = sync.Pool{New: func() any { return new(scratch) }}

func (s *scratch) buffer(n int) []byte {
	if cap(s.buf) < n {
		s.buf = make([]byte, n)
	}
	return s.buf[:n]
}

// tryLog carries out a small write, zero or discard within Submit. It returns false,
// with nothing done, if that has to wait for the disk.
func (d *drive) tryLog(r *object.Request) bool {
	o := d.lookup(r.Key())
	if o == nil || o.waiting.Load() {
		return false
	}
	o.mu.Lock()
	if !o.ready() {
		o.mu.Unlock()
		return false
	}
	err := d.logHeld(o, r, true)
	o.mu.Unlock()
	if errors.Is(err, errSlow) || errors.Is(err, disk.ErrWouldBlock) {
		return false
	}
	d.proceed(r, err)
	return true
}

// writeLog is tryLog on a worker.
func (d *drive) writeLog(r *object.Request) {
	first, end := blockRange(r.Off, r.Len)
	o, err := d.lock(r.Key())
	if err != nil {
		d.settle(r, err)
		return
	}
	if o.exists {
		if o.shift != r.SizeShift {
			err = errShift
		} else {
			err = d.ensurePages(o, first, end)
		}
	}
	if err == nil {
		err = d.logHeld(o, r, false)
	}
	o.mu.Unlock()
	d.proceed(r, err)
}

// proceed goes on with a request after logHeld.
func (d *drive) proceed(r *object.Request, err error) {
	switch {
	case err == nil:
		d.staged.Store(true)
	case errors.Is(err, errBusy): // queued
	default:
		d.settle(r, err)
	}
}

// logHeld puts a write, zero or discard into the log. The object's lock is held for
// writing. The request completes with a coming kick. It fails with errBusy after having queued the request behind a direct write.
func (d *drive) logHeld(o *obj, r *object.Request, nowait bool) error {
	s := scratches.Get().(*scratch)
	defer scratches.Put(s)
	if o.held {
		return errHeld
	}
	if o.exists && o.shift != r.SizeShift {
		return errShift
	}
	if r.Op != object.OpWrite {
		return d.zeroHeld(o, s, r, nowait)
	}
	d.count.writes.Add(1)
	first, end := blockRange(r.Off, r.Len)
	taken, err := d.claim(o, r, first, end)
	if err != nil {
		return err
	}
	payload := r.Data
	if !aligned(r.Off, r.Len) {
		if payload, err = d.patch(o, s, r, first, end, nowait); err != nil {
			d.space.give(taken)
			return err
		}
	}
	if err := d.appendWrite(o, s, r.Version, first, payload, given(r), r); err != nil {
		d.space.give(taken)
		return err
	}
	d.space.log(taken, o.over.get(first).pos.Segment())
	return nil
}

// claim accounts for the space that writing [first, end) will take, and creates the
// object if it does not exist. It fails before anything is changed. What it returns is for claimed
// or unclaim, or the account's, when the write was done or was not.
func (d *drive) claim(o *obj, r *object.Request, first, end uint32) (taken int64, err error) {
	created := int64(0)
	if !o.exists {
		created = d.creationBytes(r.Key().Group, r.SizeShift)
		taken = created + int64(end-first)*blockSize
	} else {
		for b := first; b < end; b++ {
			sum, ok := o.sum(b)
			if !ok {
				return 0, errSlow
			}
			if sum == 0 {
				taken += blockSize
			}
		}
	}
	if taken > 0 && r.Flags&object.FlagNoGrow != 0 {
		d.space.wanted.Store(true)
		return 0, errNoGrow
	}
	if taken > 0 && !d.space.take(taken) {
		return 0, fmt.Errorf("disk %s has only its reserve left: %w", d, object.ErrNoSpace)
	}
	if !o.exists {
		if err := d.create(o, r.SizeShift, r.Version, d.nextGeneration(), 0); err != nil {
			d.space.give(taken)
			return 0, err
		}
		d.space.log(created, o.createPos.Segment())
	}
	return taken - created, nil
}

// claimed keeps a claim for the records that were made since.
func (d *drive) claimed(taken int64) {
	if taken > 0 {
		d.space.log(taken, d.log.Segment())
	}
}

// unclaim gives back a claim of which not all, or nothing, came about. The object's lock is held.
func (d *drive) unclaim(o *obj, taken int64, first, end uint32) {
	left := int64(0)
	for b := first; b < end && left < taken; b++ {
		if sum, ok := o.sum(b); ok && sum == 0 {
			left += blockSize
		}
	}
	d.space.give(left)
	d.claimed(taken - left)
}

// creationBytes is what a new object takes beside its content.
func (d *drive) creationBytes(g object.Group, shift uint8) int64 {
	n := overheadBytes(shift)
	d.groupMu.Lock()
	defer d.groupMu.Unlock()
	if !d.groups[g] {
		n += blockSize
	}
	return n
}

// create records that the object exists from now on. Its lock is held.
func (d *drive) create(o *obj, shift uint8, v object.Version, generation uint64, flags uint8) error {
	rec := wal.Record{Type: wal.Create, Flags: flags, SizeShift: shift, Key: o.key, Version: v, Generation: generation}
	d.noteLogged(o)
	pos, err := d.log.Append(&rec, nil, false, nil)
	if err != nil {
		return err
	}
	d.staged.Store(true)
	o.exists, o.shift, o.generation, o.version, o.filed = true, shift, generation, v, object.Version{}
	o.createPos, o.complete, o.fresh, o.hasFile = pos, flags&wal.FlagComplete != 0, true, false
	o.pages = make([]*sumPage, pagesOf(shift))
	o.changed()
	d.count.objects.Add(1)
	return nil
}

// patch returns the content of [first, end) as it will be after the write: edge
// blocks are completed with what they hold now.
func (d *drive) patch(o *obj, s *scratch, r *object.Request, first, end uint32, nowait bool) ([]byte, error) {
	buf := s.buffer(int(end-first) * blockSize)
	head, tail := r.Off%blockSize != 0, (r.Off+r.Len)%blockSize != 0
	if head || tail && end-first == 1 {
		if err := d.fetchBlock(o, s, r, first, buf[:blockSize], nowait); err != nil {
			return nil, err
		}
	}
	if tail && end-first > 1 {
		if err := d.fetchBlock(o, s, r, end-1, buf[len(buf)-blockSize:], nowait); err != nil {
			return nil, err
		}
	}
	at := int(r.Off - first*blockSize)
	if r.Op == object.OpWrite {
		copy(buf[at:], r.Data)
	} else {
		clear(buf[at:][:r.Len])
	}
	return buf, nil
}

// fetchBlock reads one block under the object's lock. A request whose block is being
// written directly is queued.
func (d *drive) fetchBlock(o *obj, s *scratch, r *object.Request, b uint32, dst []byte, nowait bool) error {
	err := s.plan.make(o, b, b+1)
	if errors.Is(err, errBusy) {
		o.waiters.push(r)
		return err
	}
	if err != nil {
		return err
	}
	if !nowait {
		o.waiting.Store(true)
		defer o.waiting.Store(false)
	}
	return s.plan.execute(d, o, o.file, b, dst, nowait)
}

// given are the checksums of a write's blocks that came with it; nil: none did.
func given(r *object.Request) []uint64 {
	if aligned(r.Off, r.Len) && uint64(len(r.Sums))*blockSize == uint64(r.Len) {
		return r.Sums
	}
	return nil
}

// appendWrite logs whole blocks from first on and makes them pending. sums are their checksums, if somebody has made them.
func (d *drive) appendWrite(o *obj, s *scratch, v object.Version, first uint32, payload []byte, sums []uint64, r *object.Request) error {
	n := uint32(len(payload) / blockSize)
	if sums == nil {
		s.sums = object.AppendSums(s.sums[:0], payload)
	} else {
		s.sums = append(s.sums[:0], sums...) // the request may be completed, and they be another's, once it is in the log
	}
	s.rec = wal.Record{
		Type: wal.Write, SizeShift: o.shift, Key: o.key, Version: v, Generation: o.generation,
		Block: first, Count: n, Sums: s.sums,
	}
	d.noteLogged(o)
	pos, err := d.log.Append(&s.rec, payload, false, r)
	if err != nil {
		return err
	}
	for i, sum := range s.sums {
		o.over.set(first+uint32(i), entry{pos: pos + wal.Pos(i)*blockSize, sum: sum}, o.blocks())
	}
	o.raise(v)
	o.changed()
	d.healed(o, first, first+n)
	return nil
}

// zeroHeld carries out OpZero and OpDiscard.
func (d *drive) zeroHeld(o *obj, s *scratch, r *object.Request, nowait bool) (err error) {
	keep := r.Op == object.OpZero && r.Flags&object.FlagNoHole != 0
	if !o.exists && !keep {
		d.log.Attach(r) // behind a delete that may be in the same frame
		return nil
	}
	d.count.zeroes.Add(1)
	first, end := blockRange(r.Off, r.Len)
	z := zeroing{d: d, o: o, s: s, r: r, nowait: nowait, keep: keep, every: keep || r.Flags&object.FlagTouch != 0}
	taken := int64(0)
	if keep {
		if taken, err = d.claim(o, r, first, end); err != nil {
			return err
		}
	}
	if err := z.run(); err != nil {
		d.unclaim(o, taken, first, end)
		return err
	}
	d.claimed(taken)
	d.log.Attach(r)
	return nil
}

// zeroing is one zero or discard in progress.
type zeroing struct {
	d            *drive
	o            *obj
	s            *scratch
	r            *object.Request
	nowait, keep bool
	every        bool // what is a hole already gets a record too
}

// run logs the whole blocks first and the partial edges after them.
func (z *zeroing) run() error {
	off, end64 := uint64(z.r.Off), uint64(z.r.Off)+uint64(z.r.Len)
	first, end := uint32((off+blockSize-1)/blockSize), uint32(end64/blockSize)
	if first > end { // within one block
		return z.edge(z.r.Off, z.r.Len)
	}
	if err := z.whole(first, end); err != nil {
		return err
	}
	if head := first*blockSize - z.r.Off; head > 0 {
		if err := z.edge(z.r.Off, head); err != nil {
			return err
		}
	}
	if tail := uint32(end64 - uint64(end)*blockSize); tail > 0 {
		return z.edge(end*blockSize, tail)
	}
	return nil
}

// edge zeroes a part of one block.
func (z *zeroing) edge(off, n uint32) error {
	b := off / blockSize
	sum, ok := z.o.sum(b)
	if !ok {
		return errSlow
	}
	if sum == 0 && !z.keep && !z.o.busy(b, b+1) {
		return nil
	}
	buf := z.s.buffer(blockSize)
	if err := z.d.fetchBlock(z.o, z.s, z.r, b, buf, z.nowait); err != nil {
		return err
	}
	clear(buf[off%blockSize:][:n])
	return z.d.appendWrite(z.o, z.s, z.r.Version, b, buf, nil, nil)
}

// whole turns [first, end) into holes or zeros. What is a hole already stays one
// without a record, unless every block gets one.
func (z *zeroing) whole(first, end uint32) error {
	for b := first; b < end; {
		n, err := z.stretch(b, end)
		if err != nil {
			return err
		}
		if n == 0 {
			b++
			continue
		}
		if err := z.log(b, n); err != nil {
			return err
		}
		b += n
	}
	return nil
}

// stretch counts the blocks from b on that need a record.
func (z *zeroing) stretch(b, end uint32) (n uint32, err error) {
	if z.every {
		return end - b, nil
	}
	for ; b+n < end; n++ {
		sum, ok := z.o.sum(b + n)
		if !ok {
			return 0, errSlow
		}
		if sum == 0 && !z.o.busy(b+n, b+n+1) {
			break
		}
	}
	return n, nil
}

func (z *zeroing) log(b, n uint32) error {
	o := z.o
	z.s.rec = wal.Record{Type: wal.Hole, SizeShift: o.shift, Key: o.key, Version: z.r.Version, Generation: o.generation, Block: b, Count: n}
	e := entry{}
	if z.keep {
		z.s.rec.Type, e.sum = wal.Zero, zeroSum
	}
	z.d.noteLogged(o)
	pos, err := z.d.log.Append(&z.s.rec, nil, true, nil)
	if err != nil {
		return err
	}
	e.pos = pos
	if z.keep {
		e.pos |= zeroFlag
	} else {
		z.d.gives.Store(true)
	}
	for i := range n {
		o.over.set(b+i, e, o.blocks())
	}
	o.raise(z.r.Version)
	o.changed()
	z.d.healed(o, b, b+n)
	return nil
}
