package storage

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"sheepdog/storage/object"
)

// scrubber reads everything that is stored and verifies it, in the background at a
// limited rate, or at once when asked.
type scrubber struct {
	mu    sync.Mutex // one pass at a time
	done  atomic.Int64
	total atomic.Int64 // groups of the pass going on; 0: none is
	bytes atomic.Int64
	end   atomic.Int64 // unix nanoseconds of the last complete pass; 0: none since the start
}

// scrubStart is how long after its opening a disk waits with its first scrub.
const scrubStart = 10 * time.Minute

// Scrub reads and verifies every object on every disk, the disks at the same time. What
// it finds corrupt is reported like what readers find (log, Status), and makes it return
// ErrCorrupt when it is through.
func (s *Store) Scrub(ctx context.Context) error {
	if s.closed.Load() {
		return object.ErrClosed
	}
	var wg sync.WaitGroup
	drives := s.routes.drives()
	errs := make([]error, len(drives))
	for i, d := range drives {
		wg.Go(func() {
			if err := d.scrub(ctx, 0); !d.parted.Load() { // what it had is on others
				errs[i] = err
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// scrubLoop is the goroutine of the background scrub.
func (d *drive) scrubLoop() {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		<-d.stop
		cancel()
	}()
	wait := min(scrubStart, d.cfg.ScrubEvery)
	for {
		select {
		case <-d.stop:
			return
		case <-time.After(wait):
		}
		start := time.Now()
		if err := d.scrub(ctx, d.cfg.ScrubRate); err != nil && !errors.Is(err, object.ErrCorrupt) && ctx.Err() == nil {
			d.logger.Warn("scrub stopped", "disk", d.String(), "error", err)
		}
		wait = max(0, d.cfg.ScrubEvery-time.Since(start))
	}
}

// scrub makes one pass at rate bytes per second; 0 is as fast as it goes.
func (d *drive) scrub(ctx context.Context, rate int64) error {
	if err := d.failed(); err != nil {
		return err
	}
	d.scrubber.mu.Lock()
	defer d.scrubber.mu.Unlock()
	groups := d.allGroups()
	d.scrubber.done.Store(0)
	d.scrubber.total.Store(int64(len(groups)))
	defer d.scrubber.total.Store(0)
	p := scrubPass{d: d, ctx: ctx, rate: rate, start: time.Now(), buf: make([]byte, copyChunk/4)}
	for _, g := range groups {
		ids, err := d.ids(g)
		if err != nil {
			return err
		}
		for _, id := range ids {
			if err := p.object(object.Key{Group: g, ID: id}); err != nil {
				return err
			}
		}
		d.scrubber.done.Add(1)
	}
	d.scrubber.end.Store(d.now())
	if p.bad > 0 {
		return fmt.Errorf("scrub disk %s: %d objects: %w", d, p.bad, object.ErrCorrupt)
	}
	return nil
}

func (d *drive) allGroups() []object.Group {
	seen := make(map[object.Group]bool)
	var list []object.Group
	add := func(g object.Group) {
		if !seen[g] {
			seen[g] = true
			list = append(list, g)
		}
	}
	for _, k := range d.loggedKeys() { // first, as in ids
		add(k.Group)
	}
	d.groupMu.Lock()
	for g := range d.groups {
		add(g)
	}
	d.groupMu.Unlock()
	return list
}

type scrubPass struct {
	d     *drive
	ctx   context.Context
	rate  int64
	start time.Time
	bytes int64
	bad   int
	buf   []byte
}

// object verifies one object. Only what stops the whole pass is an error.
func (p *scrubPass) object(k object.Key) error {
	var sums []uint64
	err := p.d.eachSum(p.ctx, k, 0, 0, func(_ uint32, sum uint64) { sums = append(sums, sum) })
	bad := false
	shift := uint8(object.MinSizeShift)
	for blocksOf(shift) < uint32(len(sums)) {
		shift++
	}
	for b := uint32(0); err == nil && b < uint32(len(sums)); {
		n := uint32(0)
		for b+n < uint32(len(sums)) && sums[b+n] != 0 && int(n) < len(p.buf)/blockSize {
			n++
		}
		if n == 0 {
			b++
			continue
		}
		if err = p.pace(int64(n) * blockSize); err != nil {
			return err
		}
		err = p.d.readBlocks(k, shift, b, p.buf[:n*blockSize])
		if errors.Is(err, object.ErrCorrupt) {
			bad, err = true, nil // reported by the reader; the rest may be fine
		}
		b += n
	}
	if err == nil {
		err = p.d.verifyTable(p.ctx, k)
	}
	switch {
	case errors.Is(err, object.ErrCorrupt):
		bad = true
	case errors.Is(err, object.ErrNotFound), errors.Is(err, object.ErrInvalid), errors.Is(err, errAway): // deleted or made anew meanwhile, or moved
	case err != nil:
		return err
	}
	if bad {
		p.bad++
	}
	return nil
}

// verifyTable looks at an object's header and table as they are on disk. Readers see them as they
// were when they came into memory: what rots after that is found here, while what is sound is still
// there to be written in its place, by the next checkpoint. What was rotten when it came into memory
// is not written: nobody may take it for sound.
func (d *drive) verifyTable(ctx context.Context, k object.Key) error {
	b := make([]byte, blockSize)
	var onDisk sumPage
	for p := -1; ; p++ { // -1 is the header
		if err := ctx.Err(); err != nil {
			return err
		}
		o, err := d.existing(k)
		if err != nil {
			return err
		}
		if !o.hasFile || o.merging || o.held || p >= len(o.pages) { // a merge writes both anew
			o.mu.Unlock()
			return nil
		}
		err = d.verifyPage(o, p, b, &onDisk)
		o.mu.Unlock()
		if err != nil {
			return d.explain(err)
		}
	}
}

// verifyPage is verifyTable for one page, or the header. The object's lock is held.
func (d *drive) verifyPage(o *obj, p int, b []byte, onDisk *sumPage) error {
	at := max(0, p)
	first := uint32(at * sumsPerPage)
	if err := d.ensurePages(o, first, first+1); err != nil {
		return err
	}
	page, off := o.pages[at], tableOffset(o.shift)+int64(p)*blockSize
	if page.dirty || slices.Contains(page.sums[:], badSum) {
		return nil
	}
	o.waiting.Store(true)
	defer o.waiting.Store(false)
	if err := readFull(o.file, b, off); err != nil {
		return fmt.Errorf("read checksums of object %s: %w", o.key, err)
	}
	var h header
	if p < 0 && h.decode(b, o.key) && h.shift == o.shift && h.generation == o.generation || p >= 0 && onDisk.decode(b, p, o.generation) {
		return nil
	}
	d.noteLogged(o)
	o.pageDirty(page)
	d.rot.note()
	d.logger.Warn("checksum table of object has rotted on disk; what it was is still known and is written in its place",
		"object", o.key.String(), "disk", d.String(), "page", p)
	return nil
}

// pace keeps to the rate.
func (p *scrubPass) pace(n int64) error {
	p.bytes += n
	p.d.scrubber.bytes.Add(n)
	if p.rate > 0 {
		ahead := time.Duration(float64(p.bytes)/float64(p.rate)*float64(time.Second)) - time.Since(p.start)
		if ahead > 0 {
			t := time.NewTimer(ahead)
			defer t.Stop()
			select {
			case <-t.C:
			case <-p.ctx.Done():
			}
		}
	}
	return p.ctx.Err()
}
