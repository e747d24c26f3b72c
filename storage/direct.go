package storage

import (
	"errors"
	"fmt"
	"sync"

	"sheepdog/storage/internal/wal"
	"sheepdog/storage/object"
)

// direct is one write to an object's file in progress.
type direct struct {
	o          *obj
	file       *handle
	first, end uint32
	runs       []span
	sums       []uint64 // of the blocks in runs, in order
	taken      int64
	generation uint64
}

var directs = sync.Pool{New: func() any { return new(direct) }}

// errMark: the request waits until its mark is durable and is then tried again.
var errMark = errors.New("direct mark is not durable")

// tryDirect has the next kick carry out a large write. It returns false, with nothing done, if that may
// have to wait for the disk, or other such writes are under way: they are better done side by side.
func (d *drive) tryDirect(r *object.Request) bool {
	o := d.lookup(r.Key())
	if o == nil || o.waiting.Load() || d.handy.Load() != nil || !d.pool.idles() {
		return false
	}
	o.mu.RLock()
	ok := o.inMemory(blockRange(r.Off, r.Len))
	o.mu.RUnlock()
	return ok && d.handy.CompareAndSwap(nil, r)
}

// writeDirect carries out a large write. It waits for the disk, unless tryDirect says that it need not; waits
// says whether the caller may also wait for a write to be durable.
func (d *drive) writeDirect(r *object.Request, waits bool) {
	w := directs.Get().(*direct)
	defer directs.Put(w)
	err := d.beginDirect(w, r)
	switch {
	case err == nil:
	case errors.Is(err, errBusy): // queued
		return
	case errors.Is(err, errMark) && !d.stopping():
		d.kick()
		d.syncer.mark(r)
		return
	case errors.Is(err, errMark):
		d.refuse(r, d.closing())
		return
	default:
		d.settle(r, err)
		return
	}
	err = w.transfer(d, r)
	d.endDirect(w, r, err)
	// The records that belong to it (creation, marks, blocks that went to the log)
	// are in the log file before it is answered.
	d.flush()
	switch {
	case err != nil:
		r.Complete(d.explain(err))
	case d.failed() != nil:
		r.Complete(d.failed())
	case r.Flags&object.FlagFUA != 0:
		d.syncer.add(r, true)
		d.syncer.serve(waits)
	default:
		r.Complete(nil)
	}
}

// beginDirect decides which blocks go where, logs what must be logged and registers
// the write as in flight.
func (d *drive) beginDirect(w *direct, r *object.Request) error {
	o, err := d.lock(r.Key())
	if err != nil {
		return err
	}
	defer o.mu.Unlock()
	if o.held {
		return errHeld
	}
	first, end := blockRange(r.Off, r.Len)
	if o.exists {
		if o.shift != r.SizeShift {
			return errShift
		}
		if err := d.ensurePages(o, first, end); err != nil {
			return err
		}
	}
	if o.frozen || o.busy(first, end) {
		o.waiters.push(r)
		return errBusy
	}
	if d.upkeep.crowded() {
		return wal.ErrFull
	}
	created := !o.exists
	taken, err := d.claim(o, r, first, end)
	if err == nil && created {
		err = d.ensurePages(o, first, end)
	}
	if err != nil {
		return err
	}
	*w = direct{o: o, first: first, end: end, runs: w.runs[:0], sums: w.sums[:0], taken: taken, generation: o.generation}
	if err := d.layDirect(w, r); err != nil {
		d.unclaim(o, taken, first, end)
		return err
	}
	d.count.directs.Add(1)
	o.spans = append(o.spans, span{first, end})
	w.file = o.file.acquire()
	return nil
}

func (d *drive) layDirect(w *direct, r *object.Request) error {
	o := w.o
	whole, wholeEnd := (r.Off+blockSize-1)/blockSize, (r.Off+r.Len)/blockSize
	for b := whole; b < wholeEnd; b++ {
		if o.over.get(b).pending() {
			continue
		}
		if n := len(w.runs); n > 0 && w.runs[n-1].end == b {
			w.runs[n-1].end++
		} else {
			w.runs = append(w.runs, span{b, b + 1})
		}
	}
	if err := d.markRegions(w, r); err != nil {
		return err
	}
	if err := d.ensureFile(o); err != nil {
		return err
	}
	return d.logRest(w, r)
}

// markRegions sees to it that after a crash the checksums of what is going to be
// written are made anew. An object that no checkpoint has covered is examined as a
// whole anyway, as long as its Create record is the log's; all others need durable marks.
func (d *drive) markRegions(w *direct, r *object.Request) error {
	o := w.o
	barrier := d.barrier.Load()
	if o.createPos != 0 && o.createPos.Segment() >= barrier && !o.complete {
		return nil
	}
	if o.marks == nil {
		o.marks = make([]wal.Pos, regionsOf(o.shift))
	}
	durable := true
	for _, run := range w.runs {
		for region := run.first / regionBlocks; region <= (run.end-1)/regionBlocks; region++ {
			pos := o.marks[region]
			if pos == 0 || pos.Segment() < barrier {
				rec := wal.Record{Type: wal.Direct, SizeShift: o.shift, Key: o.key, Version: r.Version, Generation: o.generation, Block: region, Count: 1}
				d.noteLogged(o)
				var err error
				if pos, err = d.log.Append(&rec, nil, false, nil); err != nil {
					return err
				}
				d.staged.Store(true)
				o.marks[region] = pos
			}
			durable = durable && d.log.Durable(pos)
		}
	}
	if !durable {
		return errMark
	}
	return nil
}

// logRest puts partial edge blocks and pending blocks into the log.
func (d *drive) logRest(w *direct, r *object.Request) error {
	s := scratches.Get().(*scratch)
	defer scratches.Put(s)
	b := w.first
	for i := 0; i <= len(w.runs); i++ {
		stop, next := w.end, w.end
		if i < len(w.runs) {
			stop, next = w.runs[i].first, w.runs[i].end
		}
		for b < stop {
			n := min(stop-b, maxSmallWrite/blockSize)
			if err := d.logPart(w.o, s, r, b, b+n); err != nil {
				return err
			}
			b += n
		}
		b = next
	}
	return nil
}

// logPart logs the part of a large write that lies in [first, end).
func (d *drive) logPart(o *obj, s *scratch, r *object.Request, first, end uint32) error {
	from := max(int64(r.Off), int64(first)*blockSize)
	to := min(int64(r.Off)+int64(r.Len), int64(end)*blockSize)
	part := object.Request{Op: object.OpWrite, Off: uint32(from), Len: uint32(to - from), Data: r.Data[from-int64(r.Off):][:to-from]}
	payload, sums := part.Data, given(r)
	if sums != nil {
		sums = sums[first-r.Off/blockSize:][:end-first]
	}
	if !aligned(part.Off, part.Len) {
		var err error
		if payload, err = d.patch(o, s, &part, first, end, false); err != nil {
			return err
		}
	}
	if err := d.appendWrite(o, s, r.Version, first, payload, sums, nil); err != nil {
		return err
	}
	d.staged.Store(true)
	return nil
}

// transfer computes the checksums, if they did not come with the request, and writes the runs, holding no lock.
func (w *direct) transfer(d *drive, r *object.Request) error {
	sums := given(r)
	for _, run := range w.runs {
		data := r.Data[int64(run.first)*blockSize-int64(r.Off):][:int64(run.end-run.first)*blockSize]
		for at := int64(run.first) * blockSize; len(data) > 0; {
			piece := data[:min(len(data), verifyBytes)]
			if sums != nil {
				w.sums = append(w.sums, sums[(at-int64(r.Off))/blockSize:][:len(piece)/blockSize]...)
			} else {
				w.sums = object.AppendSums(w.sums, piece)
			}
			if _, err := w.file.WriteAt(piece, at); err != nil {
				if noSpace(err) {
					return fmt.Errorf("write object %s on disk %s: %w: %w", w.o.key, d, object.ErrNoSpace, object.ErrTorn)
				}
				return fmt.Errorf("write object %s: %w", w.o.key, err)
			}
			at += int64(len(piece))
			data = data[len(piece):]
		}
	}
	return nil
}

// endDirect makes the new content known and lets those go on who waited for it.
// After a failed transfer the content is a mixture; the checksums follow it.
func (d *drive) endDirect(w *direct, r *object.Request, failure error) {
	o := w.o
	o.mu.Lock()
	if failure == nil {
		i, placed := 0, int64(0)
		for _, run := range w.runs {
			for b := run.first; b < run.end; b++ {
				if was, _ := o.fileSum(b); was == 0 {
					placed += blockSize
				}
				o.setFileSum(b, w.sums[i])
				i++
			}
			d.healed(o, run.first, run.end)
		}
		o.raise(r.Version)
		d.space.placed(placed)
		d.claimed(w.taken - placed)
	} else {
		d.resum(o, w)
		d.unclaim(o, w.taken, w.first, w.end)
	}
	if len(w.runs) > 0 {
		d.noteLogged(o)
		d.noteDirty(o)
		o.changed()
	}
	for i, s := range o.spans {
		if s == (span{w.first, w.end}) {
			o.spans = append(o.spans[:i], o.spans[i+1:]...)
			break
		}
	}
	waiters := o.waiters
	if o.frozen {
		if len(o.spans) == 0 {
			close(o.drained)
			o.drained = nil
		}
	}
	o.waiters = requests{}
	o.mu.Unlock()
	w.file.release()
	w.file, w.o = nil, nil
	d.pool.submitAll(waiters)
}

// resum makes the checksums of a failed write's range from what the file holds now.
func (d *drive) resum(o *obj, w *direct) {
	buf := make([]byte, chunkBlocks*blockSize)
	for _, run := range w.runs {
		if err := d.rehash(o, run.first, run.end, buf, false); err != nil {
			d.explain(err)
			return
		}
	}
}
