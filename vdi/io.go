package vdi

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"sheepdog/storage/object"
)

// span is how a Request is carried out: in parts, one for each object it touches.
type span struct {
	core    *core
	volume  *Volume // through which a flush came
	left    int32   // parts under way; atomic
	failed  int32   // 1: Err is set; atomic
	changed int32   // 1: an entry of the map was changed; atomic
	beyond  bool    // it clears what is beyond the size
	one     part    // the part of a request in one object, which is the usual one
}

// part is what a Request means for one object. req must stay the first field: partDone
// finds the part by it.
type part struct {
	req     object.Request
	parent  *Request
	mapping *mapping
	stripe  *stripe // that is passed, nil for reads
	index   uint32
	entry   uint32 // by which it is carried out
	off     uint32 // within the object
	n       uint32
	data    []byte
	pooled  bool
	began   int64    // when a write was begun, in ns since clock
	tries   uint8    // reads begun anew
	asked   bool     // the catalog is not behind
	flushes []change // OpFlush: what it makes durable
}

var parts = sync.Pool{New: func() any { return &part{pooled: true} }}

// maxParts bounds the parts of a request that are under way at once.
const maxParts = 32

// Submit starts a request. See Request.
func (v *Volume) Submit(r *Request) {
	c := v.core
	r.Err = nil
	r.span.core, r.span.volume, r.span.failed, r.span.changed, r.span.beyond = c, v, 0, 0, false
	if err := v.admit(r); err != nil {
		r.Err = err
		r.Done(r)
		return
	}
	switch {
	case r.Op == OpFlush:
		c.flush(r)
		return
	case r.Op == OpCache:
		go c.warm(r)
		return
	case r.Len == 0 && r.Flags&FlagFUA == 0:
		r.Done(r)
		return
	case r.Len == 0:
		c.flush(r)
		return
	}
	first, last := r.Off>>c.shift, (r.Off+r.Len-1)>>c.shift
	if first == last {
		r.span.left = 1
		c.start(c.cut(&r.span.one, r, r.Off, r.Len))
		return
	}
	if last-first >= maxParts {
		go c.submitLong(r)
		return
	}
	c.submitParts(r, int32(last-first+1))
}

// Kick carries out what Submit held back. See object.Request.
func (v *Volume) Kick() { v.core.s.cfg.Objects.Kick() }

func (v *Volume) admit(r *Request) error {
	c := v.core
	if v.closed.Load() {
		return fmt.Errorf("volume %s: %w", c.title(), ErrClosed)
	}
	if r.Op == OpFlush {
		return nil
	}
	if size := c.size.Load(); r.Off < 0 || r.Len < 0 || r.Off > size || r.Len > size-r.Off {
		return fmt.Errorf("volume %s has %d bytes, the request is for %d at %d: %w", c.title(), size, r.Len, r.Off, ErrInvalid)
	}
	if (r.Op == OpRead || r.Op == OpWrite) && int64(len(r.Data)) != r.Len {
		return fmt.Errorf("request of %d bytes comes with %d: %w", r.Len, len(r.Data), ErrInvalid)
	}
	if v.readOnly && r.Op != OpRead && r.Op != OpCache {
		return fmt.Errorf("volume %s: %w", c.title(), ErrReadOnly)
	}
	return nil
}

// cut makes p the part of r at off, which is n bytes long and inside one object.
func (c *core) cut(p *part, r *Request, off, n int64) *part {
	p.parent, p.index, p.off, p.n = r, uint32(off>>c.shift), uint32(off&(c.objectSize()-1)), uint32(n)
	p.data, p.tries, p.asked = nil, 0, false
	if r.Data != nil {
		p.data = r.Data[off-r.Off:][:n]
	}
	return p
}

func (c *core) submitParts(r *Request, count int32) {
	r.span.left = count
	off, end := r.Off, r.Off+r.Len
	for range count {
		n := min(end-off, c.objectSize()-off&(c.objectSize()-1))
		c.start(c.cut(parts.Get().(*part), r, off, n))
		off += n
	}
}

// submitLong carries out a request of many objects piece by piece, and passes quickly
// over what is a hole anyway. FUA is one flush in the end.
func (c *core) submitLong(r *Request) {
	r.Err = c.inPieces(r)
	if r.Err == nil && r.Flags&FlagFUA != 0 {
		err := c.syncNow(context.Background())
		if errors.Is(err, errDisowned) { // whoever was told of it
			err = fmt.Errorf("%w: some of it", object.ErrLost)
		}
		r.Err = explain(err, "%s %d bytes at %d of %s", verbs[r.Op], r.Len, r.Off, c.title())
	}
	r.Done(r)
}

func (c *core) inPieces(r *Request) error {
	var piece Request
	done := make(chan struct{}, 1)
	for off, end := r.Off, r.Off+r.Len; off < end; {
		if skip := c.holeRun(r, off, end); skip > 0 {
			if r.Op == OpRead {
				clear(r.Data[off-r.Off:][:skip])
			}
			off += skip
			continue
		}
		stop := min(end, (off>>c.shift+maxParts)<<c.shift)
		piece = Request{Op: r.Op, Flags: r.Flags &^ FlagFUA, Off: off, Len: stop - off, Check: r.Check, Done: func(*Request) { done <- struct{}{} }}
		piece.span.core = c
		if r.Data != nil {
			piece.Data = r.Data[off-r.Off:][:piece.Len]
		}
		c.submitParts(&piece, int32((stop-1)>>c.shift-off>>c.shift+1))
		c.s.cfg.Objects.Kick()
		<-done
		if piece.Err != nil {
			return piece.Err
		}
		off = stop
	}
	return nil
}

// holeRun returns how many bytes from off on, where an object begins, need nothing done
// because the map is known to have holes there. It looks no further than one page.
func (c *core) holeRun(r *Request, off, end int64) int64 {
	m := c.mapping.Load()
	discards := r.Op == OpDiscard || r.Op == OpZero && r.Flags&FlagNoHole == 0
	if r.Op != OpRead && !discards || off&(c.objectSize()-1) != 0 {
		return 0
	}
	n := c.holeRunIn(m, off, end)
	if !c.trusts(m) {
		return 0
	}
	return n
}

func (c *core) holeRunIn(m *mapping, off, end int64) int64 {
	index := uint32(off >> c.shift)
	d := m.dirs[index>>indexShift].Load()
	if d == nil {
		return 0
	}
	n := int64(pageEntries - index%pageEntries)
	if p := d.pages[index/pageEntries%pagesPerObject].Load(); p != nil {
		n = p.holes(index)
	} else if !d.absent.Load() {
		return 0
	}
	return min(end-off, n<<c.shift)
}

// holes counts the holes from an index on, up to the end of the page.
func (p *page) holes(index uint32) (n int64) {
	for i := index % pageEntries; i < pageEntries && p.entries[i].Load()&(ownerMask|pending) == 0; i++ {
		n++
	}
	return n
}

// start carries out a part, inline if that needs no waiting.
func (c *core) start(p *part) {
	if p.parent.Op == OpRead {
		c.read(p)
		return
	}
	c.write(p)
}

func (c *core) read(p *part) {
	m := c.mapping.Load()
	e, ok := m.lookup(p.index)
	if !ok || e&pending != 0 || !c.trusts(m) {
		go c.readSlowly(p)
		return
	}
	c.readBy(p, m, e)
}

// readBy reads from the object that an entry names.
func (c *core) readBy(p *part, m *mapping, e uint32) {
	if err := c.checkVID(m, p.parent.VID); err != nil {
		c.finish(p, err)
		return
	}
	owner := object.VID(e & ownerMask)
	if owner == 0 {
		clear(p.data)
		c.finish(p, nil)
		return
	}
	p.mapping, p.entry, p.stripe = m, e, nil
	p.req = object.Request{
		Op: object.OpRead, ID: object.DataID(owner, p.index), Policy: m.policy, SizeShift: c.shift,
		Off: p.off, Len: p.n, Data: p.data, Volume: m.vid(), Generation: m.under, Done: partDone,
	}
	c.s.cfg.Objects.Submit(&p.req)
}

// readSlowly reads after asking for the map entry.
func (c *core) readSlowly(p *part) {
	m, e, err := c.lookUp(context.Background(), p.index)
	if err != nil {
		c.finish(p, err)
		return
	}
	c.readBy(p, m, e)
	c.s.cfg.Objects.Kick()
}

// readStale begins a read anew that the objects refused: the VDI has another owner, and
// perhaps another vid.
func (c *core) readStale(p *part, err error) {
	c.disown(p.mapping)
	if p.tries++; p.tries < lookAttempts {
		if err = c.s.catchUp(context.Background()); err == nil {
			_, err = c.current() // it may be deleted
		}
	}
	if err != nil {
		c.finish(p, err)
		return
	}
	c.readSlowly(p)
}

// readMissing deals with an object that was not found. It may have gone because the
// entry was replaced meanwhile; then the new entry counts. Or because the volume was
// deleted, of which this node may know nothing yet.
func (c *core) readMissing(p *part, err error) {
	m, e, lookErr := c.lookUp(context.Background(), p.index)
	switch {
	case lookErr != nil:
		c.finish(p, lookErr)
	case (m.place() != p.mapping.place() || e&(ownerMask|unsettled) != p.entry&(ownerMask|unsettled)) && p.tries < lookAttempts:
		p.tries++
		c.readBy(p, m, e)
		c.s.cfg.Objects.Kick()
	case e&unsettled != 0: // the power failed before a flush
		clear(p.data)
		c.finish(p, nil)
	case !p.asked: // it may also have been removed, and made anew since
		p.asked = true
		if behind := c.s.catchUp(context.Background()); behind != nil {
			c.finish(p, behind)
			return
		}
		if _, gone := c.current(); gone != nil {
			c.finish(p, gone)
			return
		}
		c.readBy(p, m, e)
		c.s.cfg.Objects.Kick()
	default:
		c.finish(p, fmt.Errorf("an object that the map names is missing: run \"dog vdi check %s\": %w", c.name, err))
	}
}

// write carries out a write, zero or discard inline if the object is the volume's own,
// or if there is nothing to do.
func (c *core) write(p *part) {
	r := p.parent
	p.began = int64(time.Since(clock))
	s := c.gate.stripe(p.index)
	if !s.tryPass() {
		go c.writeSlowly(p)
		return
	}
	m := c.mapping.Load()
	e, ok := m.lookup(p.index)
	generation := m.generation.Load()
	if !ok || generation == 0 || r.VID != 0 && r.VID != m.vid() {
		s.leave()
		go c.writeSlowly(p)
		return
	}
	state := e
	if r.Flags&FlagFUA == 0 {
		state &^= unsettled | volatile
	}
	switch {
	case state == uint32(m.vid()):
	case state == 0 && (r.Op == OpDiscard || r.Op == OpZero && r.Flags&FlagNoHole == 0) && c.trusts(m):
		s.leave()
		c.finish(p, nil)
		return
	default:
		s.leave()
		go c.writeSlowly(p)
		return
	}
	p.mapping, p.entry, p.stripe = m, e, s
	c.fill(p, m, generation)
	p.req.Done = partDone
	c.s.cfg.Objects.Submit(&p.req)
}

// fill makes the object request of a part that changes the volume's own object.
func (c *core) fill(p *part, m *mapping, generation uint64) {
	r := p.parent
	p.req = object.Request{
		ID: object.DataID(m.vid(), p.index), Policy: m.policy, SizeShift: c.shift, Off: p.off, Len: p.n,
		Volume: m.vid(), Generation: generation,
	}
	switch r.Op {
	case OpWrite:
		p.req.Op, p.req.Data = object.OpWrite, p.data
	case OpZero:
		p.req.Op = object.OpZero
		if r.Flags&FlagNoHole != 0 {
			p.req.Flags |= object.FlagNoHole
		}
	case OpDiscard:
		p.req.Op = object.OpDiscard
	}
	if r.Flags&FlagFUA != 0 {
		p.req.Flags |= object.FlagFUA
	}
}

// partDone is the completion of what was submitted inline.
func partDone(req *object.Request) {
	p := (*part)(unsafe.Pointer(req)) // req is p's first field
	c := p.parent.span.core
	err := req.Err
	switch {
	case p.parent.Op == OpFlush:
		c.flushed(p, err)
		return
	case p.parent.Op == OpRead:
		if err != nil && errors.Is(err, object.ErrNotFound) {
			go c.readMissing(p, err)
			return
		}
		if err != nil && errors.Is(err, object.ErrStale) {
			go c.readStale(p, err)
			return
		}
	default:
		if err == nil && c.emptied(p) {
			c.noteEmpty(p.index)
		}
		c.touched(p.req.ID)
		p.stripe.leave()
		if err != nil && errors.Is(err, object.ErrStale) {
			c.disown(p.mapping)
			if !c.mayResend(p) {
				break
			}
			go c.writeSlowly(p)
			return
		}
	}
	c.finish(p, err)
}

// emptied reports whether the part leaves nothing in its object.
func (c *core) emptied(p *part) bool {
	r := p.parent
	return int64(p.n) == c.objectSize() && (r.Op == OpDiscard || r.Op == OpZero && r.Flags&FlagNoHole == 0)
}

var verbs = [...]string{OpRead: "read", OpWrite: "write", OpZero: "zero", OpDiscard: "discard", OpFlush: "flush", OpCache: "cache"}

// finish ends a part, and its request with the last one.
func (c *core) finish(p *part, err error) {
	r := p.parent
	if err != nil && atomic.CompareAndSwapInt32(&r.span.failed, 0, 1) {
		r.Err = explain(err, "%s %d bytes at %d of %s", verbs[r.Op], p.n, int64(p.index)<<c.shift+int64(p.off), c.title())
	}
	p.mapping, p.stripe, p.data, p.flushes, p.req.Data, p.req.Next = nil, nil, nil, nil, nil, nil
	if p.pooled {
		p.parent = nil
		parts.Put(p)
	}
	if atomic.AddInt32(&r.span.left, -1) == 0 {
		r.Done(r)
	}
}

// flush makes durable what was completed before. The owner needs nothing but a sync: entries
// that it makes durable are settled later.
func (c *core) flush(r *Request) {
	m, list := c.takeVolatile()
	r.span.left = 1
	p := &r.span.one
	p.parent, p.mapping, p.flushes, p.index, p.off, p.n = r, m, list, 0, 0, 0
	p.req = object.Request{Op: object.OpSync, Policy: m.policy, Volume: m.vid(), Done: partDone}
	if r.Op != OpFlush {
		p.req.Done = func(q *object.Request) { c.flushed(p, q.Err) }
	}
	if !c.trusts(m) {
		go c.flushAll(p)
		return
	}
	c.s.cfg.Objects.Submit(&p.req)
}

// flushAll is flush where another node may own the VDI, and may have ended with what the client wrote through it and
// now flushes here. When this node took a VDI over, that was made durable.
func (c *core) flushAll(p *part) {
	ctx := context.Background()
	err := c.sync(ctx, p.mapping) // says what is lost
	c.bookFlush(p.mapping, p.flushes, err)
	if err == nil {
		err = c.s.catchUp(ctx) // what was written may be in a policy that is news here
	}
	if v, gone := c.current(); err == nil && gone == nil {
		err = c.s.syncAll(ctx, v.Policy)
	}
	c.tellFlush(p, err)
}

func (c *core) flushed(p *part, err error) {
	c.noteSync(p.mapping, err)
	c.bookFlush(p.mapping, p.flushes, err)
	c.tellFlush(p, err)
}

// tellFlush ends a flush, which fails also for what somebody else has found to be lost.
func (c *core) tellFlush(p *part, err error) {
	if lost := p.parent.span.volume.owed(); lost != nil && !errors.Is(err, object.ErrLost) {
		err = lost
	}
	c.finish(p, err)
}

// takeVolatile takes the changes that a flush is to make durable, for bookFlush.
func (c *core) takeVolatile() (*mapping, []change) {
	c.mu.Lock()
	defer c.mu.Unlock()
	list := c.book.volatile
	c.book.volatile = nil
	return c.mapping.Load(), list
}

// bookFlush says what became of a flush that covered the listed changes of a mapping. If another node has had the
// volume meanwhile, they are nothing that the book knows.
func (c *core) bookFlush(m *mapping, list []change, err error) {
	if len(list) == 0 {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.mapping.Load().table != m.table {
		return
	}
	if err != nil {
		c.book.volatile = append(c.book.volatile, list...)
		return
	}
	c.book.flushed = append(c.book.flushed, list...)
	c.s.wake()
}

// warmPiece is how much OpCache reads at a time.
const warmPiece = 256 << 10

// warm reads what shall be in memory and forgets it.
func (c *core) warm(r *Request) {
	buf := make([]byte, min(r.Len, warmPiece))
	for off, end := r.Off, r.Off+r.Len; off < end; {
		n := min(end-off, warmPiece)
		v := Volume{core: c}
		if err := v.do(context.Background(), OpRead, 0, off, n, buf[:n]); err != nil {
			break // it is a hint
		}
		off += n
	}
	r.Done(r)
}
