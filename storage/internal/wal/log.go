// Package wal is the write-ahead log of one disk: records with checksummed payload
// blocks, gathered into frames, written with one call each and made durable for any
// number of writers with one fdatasync.
//
// It promises that replay delivers a gapless prefix of what was appended, holding at
// least everything that was synced, or fails with ErrDamaged. It knows nothing of what
// records mean, and it never starts a goroutine.
package wal

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"sheepdog/storage/disk"
	"sheepdog/storage/object"
)

// Errors of this package.
var (
	// ErrFull: no segment is free now. A checkpoint or Prepare makes room.
	ErrFull = errors.New("log is full")
	// ErrDamaged: a record that was durable can no longer be read. Replay stops rather than skip it.
	ErrDamaged = errors.New("log is damaged")
	// ErrRecycled: the position lies in a segment that was retired.
	ErrRecycled = errors.New("log segment was recycled")
	// ErrBroken: the log takes nothing more: what of it is on the disk is not known any more.
	ErrBroken = errors.New("log is broken")
	// ErrNoRoom: a new log finds no space for its least length.
	ErrNoRoom = errors.New("no space for the log")
)

const (
	posShift = 26
	// MaxSegmentBytes bounds Options.SegmentBytes.
	MaxSegmentBytes = 1 << posShift
	// MinSegmentBytes bounds Options.SegmentBytes from below: a frame takes a quarter of it.
	MinSegmentBytes = 512 << 10
	// MaxFrameBytes bounds a frame, and with it the memory of the two buffers.
	MaxFrameBytes = 1 << 20
	// MinSegments is the least number of segments a log works with: the current one,
	// one to go on, one kept for deletes and holes, one kept for the checkpoint.
	MinSegments = 4
)

// Pos is a place in the log: the segment's sequence number and an offset in it.
// Positions grow with time. The low three bits of a position are always zero.
type Pos uint64

// Segment is the sequence number of the position's segment.
func (p Pos) Segment() uint32 { return uint32(p >> posShift) }

func (p Pos) offset() int64 { return int64(p & (1<<posShift - 1)) }

func posOf(sequence uint32, off int64) Pos { return Pos(sequence)<<posShift + Pos(off) }

// Options configure a Log.
type Options struct {
	FS           disk.FS
	Dir          string
	SegmentBytes int64 // a multiple of 4096 within MinSegmentBytes and MaxSegmentBytes
	MaxSegments  int   // at least MinSegments
	// Take is asked for the bytes that a segment's file is going to take; false: they are for others. Give is told
	// when the file has them, or was given up. The two are called under locks, and must not call the log. Nil: the log
	// takes what there is.
	Take    func(n int64) bool
	Give    func(n int64)
	Rotated func() // called when a new segment was begun, under locks: it must not block nor call the log
}

// Log is the log of one disk. After Open come Replay and Start, once each; after
// that all methods may be called concurrently.
type Log struct {
	Options
	head  *head
	fresh bool
	boot  uint32
	lost  []*segment // free, and never to be taken for live again

	// wmu serialises writing of frames and rotation; it is taken before mu. syncMu
	// serialises Sync and is taken before both.
	syncMu, wmu, mu sync.Mutex
	prepareMu       sync.Mutex // one Prepare at a time; taken before mu

	cur, writing, idle *buffer // guarded by mu; writing only changes under wmu too
	seg                *segment
	off                int64 // where the frame in cur will begin
	nextLSN            uint64
	writtenLSN         uint64
	doneHead, doneTail *object.Request // written, not yet taken by Flush
	unsynced           []*segment
	free               []*segment
	odd                []*segment // free, but shorter than segments are now
	narrow             bool       // there was no space for one more when that was tried last
	err                error

	live      atomic.Pointer[[]*segment] // ascending and consecutive sequence numbers
	written   atomic.Uint64              // Pos: everything before it is in the files
	synced    atomic.Uint64              // Pos: everything before it is durable
	syncedLSN atomic.Uint64
}

// buffer gathers one frame.
type buffer struct {
	data       []byte // header space, then payloads; the records are appended when it is written
	desc       []byte
	count      int
	firstLSN   uint64
	base       Pos
	head, tail *object.Request
}

func newBuffer(limit int) *buffer {
	return &buffer{data: make([]byte, frameHeaderBytes, limit), desc: make([]byte, 0, limit/16)}
}

func (b *buffer) reset(base Pos, firstLSN uint64) {
	b.data, b.desc = b.data[:frameHeaderBytes], b.desc[:0]
	b.count, b.base, b.firstLSN = 0, base, firstLSN
	b.head, b.tail = nil, nil
}

func (b *buffer) bytes() int64 { return roundUp(int64(len(b.data) + len(b.desc))) }

func (l *Log) frameLimit() int64 { return min(MaxFrameBytes, l.SegmentBytes/4) }

// MaxPayload is the most payload bytes that one record may carry.
func (l *Log) MaxPayload() int {
	return int(l.frameLimit()/2) &^ (object.BlockSize - 1)
}

// Append puts a record and its payload into the frame being gathered; the payload is
// copied. r, if not nil, is returned by the Flush that follows the frame's writing.
// The position is that of the payload. critical records (deletes, holes, marks) may
// use the segment that others may not. It fails with ErrFull, with nothing done, or
// with the error that broke the log.
func (l *Log) Append(rec *Record, payload []byte, critical bool, r *object.Request) (Pos, error) {
	need := int64(rec.size() + len(payload))
	for {
		l.mu.Lock()
		if l.err != nil {
			l.mu.Unlock()
			return 0, l.err
		}
		total := roundUp(int64(len(l.cur.data)+len(l.cur.desc)) + need)
		if total <= l.frameLimit() && l.off+total <= l.SegmentBytes {
			pos := l.put(rec, payload, r)
			l.mu.Unlock()
			return pos, nil
		}
		empty := l.cur.count == 0
		l.mu.Unlock()
		var err error
		if empty {
			err = l.rotate(critical, l.SegmentBytes-need-frameHeaderBytes-sectorBytes)
		} else {
			err = l.writeOut()
		}
		if err != nil {
			return 0, err
		}
	}
}

func (l *Log) put(rec *Record, payload []byte, r *object.Request) Pos {
	b := l.cur
	pos := b.base + Pos(len(b.data))
	b.data = append(b.data, payload...)
	b.desc = rec.append(b.desc)
	b.count++
	l.nextLSN++
	if r != nil {
		b.attach(r)
	}
	return pos
}

func (b *buffer) attach(r *object.Request) {
	r.Next = nil
	if b.tail == nil {
		b.head = r
	} else {
		b.tail.Next = r
	}
	b.tail = r
}

// Flush writes what was gathered and returns the requests whose records are now in
// the file, linked by Next. On failure their outcome is the error.
func (l *Log) Flush() (*object.Request, error) {
	err := l.writeOut()
	l.mu.Lock()
	done := l.doneHead
	l.doneHead, l.doneTail = nil, nil
	if err == nil {
		err = l.err
	}
	l.mu.Unlock()
	return done, err
}

// Pending reports whether a Flush would have something to do.
func (l *Log) Pending() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.cur != nil && (l.cur.count > 0 || l.doneHead != nil)
}

// writeOut writes the gathered frame. When it returns, every record appended before
// the call is in the file, whoever wrote it.
func (l *Log) writeOut() error {
	l.wmu.Lock()
	defer l.wmu.Unlock()
	l.mu.Lock()
	if l.err != nil || l.cur.count == 0 {
		l.deliver(l.cur) // all that was appended before them is written
		err := l.err
		l.mu.Unlock()
		return err
	}
	b := l.swap()
	seg := l.seg
	l.mu.Unlock()
	err := l.writeFrame(seg, b)
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.wrote(b, err)
}

// swap makes the gathered frame the one being written. Both locks are held.
func (l *Log) swap() *buffer {
	b := l.cur
	l.writing = b
	l.off += b.bytes()
	l.cur, l.idle = l.idle, nil
	l.cur.reset(posOf(l.seg.sequence, l.off), l.nextLSN)
	return b
}

func (l *Log) writeFrame(seg *segment, b *buffer) error {
	h := frameHeader{
		segment: seg.sequence, boot: seg.boot, count: uint32(b.count), firstLSN: b.firstLSN, synced: l.syncedLSN.Load(),
		payload: uint32(len(b.data) - frameHeaderBytes), desc: uint32(len(b.desc)), descSum: sumBytes(b.desc),
	}
	h.encode(b.data)
	// The tail of the last sector is filled up: a frame ends where no other begins.
	out := append(b.data, b.desc...)
	for len(out)%sectorBytes != 0 {
		out = append(out, 0)
	}
	_, err := seg.file.WriteAt(out, b.base.offset())
	return err
}

// wrote accounts for a frame that was written. Both locks are held.
func (l *Log) wrote(b *buffer, err error) error {
	l.writing, l.idle = nil, b
	l.deliver(b)
	if err != nil {
		l.fail(fmt.Errorf("write log: %w", err))
		return l.err
	}
	l.written.Store(uint64(l.cur.base))
	l.writtenLSN = b.firstLSN + uint64(b.count) - 1
	if n := len(l.unsynced); n == 0 || l.unsynced[n-1] != l.seg {
		l.unsynced = append(l.unsynced, l.seg)
	}
	return nil
}

// fail breaks the log for good and hands the gathered requests to the next Flush. mu is held.
func (l *Log) fail(err error) {
	if err == nil {
		return
	}
	if l.err == nil {
		l.err = fmt.Errorf("%w: %w", ErrBroken, err)
	}
	l.deliver(l.cur)
}

// broke is fail for who does not hold mu. It returns what breaks the log.
func (l *Log) broke(err error) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.fail(err)
	return l.err
}

// deliver hands the requests of a frame to the next Flush. mu is held.
func (l *Log) deliver(b *buffer) {
	if b.head == nil {
		return
	}
	if l.doneTail == nil {
		l.doneHead = b.head
	} else {
		l.doneTail.Next = b.head
	}
	l.doneTail = b.tail
	b.head, b.tail = nil, nil
}

// Attach has r returned by the Flush that follows the writing of everything appended
// so far.
func (l *Log) Attach(r *object.Request) {
	l.mu.Lock()
	l.cur.attach(r)
	l.mu.Unlock()
}

// Rotate begins a new segment, so that all older ones can be retired together, and
// returns its sequence number. Where no segment is ready but there may be more, it
// makes one. Where there may not be more, nothing is begun and the current segment's
// number is returned: all older ones can be retired at least.
func (l *Log) Rotate() (uint32, error) {
	for l.lacking() {
		made, err := l.Prepare()
		if err != nil {
			return 0, err
		}
		if !made {
			break
		}
	}
	l.wmu.Lock()
	defer l.wmu.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.nextSegment(1); err != nil && !errors.Is(err, ErrFull) {
		return 0, err
	}
	return l.seg.sequence, nil
}

func (l *Log) lacking() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err == nil && len(l.free) == 0 && l.segments() < l.MaxSegments
}

// rotate goes on in a new segment unless somebody else did meanwhile: if the current
// offset is within limit there is room again.
func (l *Log) rotate(critical bool, limit int64) error {
	l.wmu.Lock()
	defer l.wmu.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err != nil {
		return l.err
	}
	if l.off <= limit {
		return nil
	}
	if critical {
		return l.nextSegment(2)
	}
	return l.nextSegment(3)
}

// nextSegment writes out the gathered frame and begins a new segment, if at least
// need segments are free or could be made. Holding mu over the writes keeps appends
// out; it happens once per segment. Both locks are held.
func (l *Log) nextSegment(need int) error {
	if l.err != nil {
		return l.err
	}
	if len(l.free) == 0 || l.spare() < l.least(need) {
		return ErrFull
	}
	if l.cur.count > 0 {
		seg := l.seg
		b := l.swap()
		if err := l.wrote(b, l.writeFrame(seg, b)); err != nil {
			return err
		}
	}
	l.deliver(l.cur)
	next := l.free[0]
	if err := l.begin(next); err != nil {
		l.fail(fmt.Errorf("write log: %w", err))
		return l.err
	}
	l.free = l.free[1:]
	if l.Rotated != nil {
		l.Rotated()
	}
	return nil
}

// begin makes a free segment the current one.
func (l *Log) begin(next *segment) error {
	last := uint32(0)
	old := *l.live.Load()
	if len(old) > 0 {
		last = old[len(old)-1].sequence
	} else {
		last = l.head.first - 1
	}
	next.shown.Store(last + 1)
	next.sequence, next.boot, next.prevLSN, next.synced, next.size = last+1, l.boot, l.nextLSN-1, l.syncedLSN.Load(), l.SegmentBytes
	if err := next.writeHeader(); err != nil {
		next.sequence = 0
		return err
	}
	live := append(append(make([]*segment, 0, len(old)+1), old...), next)
	l.live.Store(&live)
	l.seg, l.off = next, segmentStart
	l.unsynced = append(l.unsynced, next)
	l.cur.reset(posOf(next.sequence, l.off), l.nextLSN)
	l.written.Store(uint64(l.cur.base))
	return nil
}

// Sync makes every record appended before the call durable. Requests whose frames it
// wrote wait for the next Flush.
func (l *Log) Sync() error {
	l.syncMu.Lock()
	defer l.syncMu.Unlock()
	if err := l.writeOut(); err != nil {
		return err
	}
	l.mu.Lock()
	dirty := append([]*segment(nil), l.unsynced...)
	target, lsn := l.written.Load(), l.writtenLSN
	l.mu.Unlock()
	for _, s := range dirty {
		// The current segment leaves the list only if nothing was written meanwhile: forget
		// it first, and a write during the fdatasync puts it back.
		l.mu.Lock()
		l.unsynced = remove(l.unsynced, s)
		l.mu.Unlock()
		if err := s.file.Sync(); err != nil {
			return l.broke(fmt.Errorf("sync log: %w", err))
		}
	}
	l.synced.Store(target)
	l.syncedLSN.Store(lsn)
	return nil
}

func remove(list []*segment, s *segment) []*segment {
	for i, x := range list {
		if x == s {
			return append(list[:i:i], list[i+1:]...)
		}
	}
	return list
}

// StartWriteback asks for full segments to be written, so that the Sync to come has
// less to wait for.
func (l *Log) StartWriteback() error {
	l.mu.Lock()
	full := l.unsynced[:max(0, len(l.unsynced)-1)]
	full = append([]*segment(nil), full...)
	l.mu.Unlock()
	for _, s := range full {
		if err := s.file.StartWriteback(0, l.SegmentBytes); err != nil {
			return fmt.Errorf("write back log: %w", err)
		}
	}
	return nil
}

// Durable reports whether the record at pos is durable.
func (l *Log) Durable(pos Pos) bool { return uint64(pos) < l.synced.Load() }

// Clean reports whether everything appended is durable.
func (l *Log) Clean() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.nextLSN-1 == l.syncedLSN.Load()
}

// Retire durably declares all segments before first unneeded. Their content stays
// readable until Recycle.
func (l *Log) Retire(first uint32) error {
	if err := l.head.save(first, l.head.boot); err != nil {
		return l.broke(err)
	}
	return nil
}

// Recycle frees the segments before first, which was retired.
func (l *Log) Recycle(first uint32) {
	l.mu.Lock()
	defer l.mu.Unlock()
	old := *l.live.Load()
	n := 0
	for n < len(old) && old[n].sequence < first {
		if s := old[n]; s.length < l.SegmentBytes {
			l.odd = append(l.odd, s)
		} else {
			l.free = append(l.free, s)
		}
		n++
	}
	live := append([]*segment(nil), old[n:]...)
	l.live.Store(&live)
}

// Bytes is the length of the log that a restart would replay; limit is what it may grow to
// as far as there is space.
func (l *Log) Bytes() (used, limit int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := int64(len(*l.live.Load()))
	if n > 0 {
		used = (n-1)*l.SegmentBytes + l.off
	}
	return used, int64(l.most()) * l.SegmentBytes
}

// Segment is the sequence number of the last segment that may have something of what was appended before the call.
func (l *Log) Segment() uint32 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.seg.sequence
}

// Boot counts the openings of this log; it is unique to this one.
func (l *Log) Boot() uint32 { return l.boot }

// ReadAt reads len(p) payload bytes at pos. nowait asks for disk.ErrWouldBlock rather
// than waiting for the disk. The caller must hold off Recycle of the segment, or verify
// what it gets.
func (l *Log) ReadAt(p []byte, pos Pos, nowait bool) error {
	if uint64(pos) >= l.written.Load() && l.readGathered(p, pos) {
		return nil
	}
	live := *l.live.Load()
	i := int(pos.Segment()) - int(live[0].shown.Load())
	if i < 0 || i >= len(live) {
		return ErrRecycled
	}
	var n int
	var err error
	if nowait {
		n, err = live[i].file.ReadNowait(p, pos.offset())
		if n < len(p) && err == nil {
			err = disk.ErrWouldBlock
		}
	} else {
		n, err = live[i].file.ReadAt(p, pos.offset())
	}
	if n == len(p) {
		return nil
	}
	return err
}

// readGathered serves payload that is still in memory. It returns false if the
// payload reached the file meanwhile.
func (l *Log) readGathered(p []byte, pos Pos) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, b := range [...]*buffer{l.cur, l.writing} {
		if b != nil && pos >= b.base && pos+Pos(len(p)) <= b.base+Pos(len(b.data)) {
			copy(p, b.data[pos-b.base:])
			return true
		}
	}
	return false
}

// Close closes the files. Nothing may use the log any more.
func (l *Log) Close() error {
	var err error
	for _, s := range l.all() {
		err = errors.Join(err, s.file.Close())
	}
	return errors.Join(err, l.head.file.Close())
}
