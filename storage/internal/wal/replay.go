package wal

import (
	"fmt"
	"slices"
	"strings"

	"github.com/zeebo/xxh3"

	"sheepdog/storage/object"
)

func sumBytes(b []byte) uint64 { return xxh3.Hash(b) }

// Open opens the log of a disk, or prepares a new one. Replay and Start follow.
func Open(o Options) (*Log, error) {
	l := &Log{Options: o}
	l.live.Store(new([]*segment))
	if err := o.FS.MkdirAll(o.Dir); err != nil {
		return nil, fmt.Errorf("make log directory: %w", err)
	}
	var err error
	if l.head, l.fresh, err = openHead(o.FS, o.Dir); err != nil {
		return nil, err
	}
	if err := l.openSegments(); err != nil {
		l.closeAll()
		return nil, err
	}
	return l, nil
}

func (l *Log) closeAll() {
	_ = l.head.file.Close()
	for _, s := range l.all() {
		_ = s.file.Close()
	}
}

// openSegments sorts the existing files into live and free ones.
func (l *Log) openSegments() error {
	names, err := l.FS.ReadDir(l.Dir)
	if err != nil {
		return fmt.Errorf("list log: %w", err)
	}
	var live []*segment
	for _, name := range names {
		var slot int
		if n, err := fmt.Sscanf(name, "segment-%d", &slot); n != 1 || err != nil || !strings.HasPrefix(name, "segment-") {
			continue
		}
		f, err := l.FS.OpenFile(l.Dir+"/"+name, 0)
		if err != nil {
			return fmt.Errorf("open log segment: %w", err)
		}
		s := &segment{slot: slot, file: f}
		l.free = append(l.free, s)
		if s.length, err = f.Size(); err != nil {
			return fmt.Errorf("read log segment %s: %w", name, err)
		}
		if err := s.readHeader(); err != nil {
			return fmt.Errorf("read log segment %s: %w", name, err)
		}
		if s.sequence == 0 && s.length >= segmentStart { // made void perhaps, but its sync has failed: then the disk has the old header
			l.lost = append(l.lost, s)
		}
	}
	if l.fresh {
		return l.refuseOrphans()
	}
	l.free = slices.DeleteFunc(l.free, func(s *segment) bool {
		if s.sequence < l.head.first {
			s.sequence = 0
			return false
		}
		live = append(live, s)
		return true
	})
	slices.SortFunc(live, func(a, b *segment) int { return int(a.sequence) - int(b.sequence) })
	l.live.Store(&live)
	return nil
}

// refuseOrphans keeps a log whose head is lost from being taken for a new one: a
// head is durable before the first record is.
func (l *Log) refuseOrphans() error {
	var buf []byte
	for _, s := range l.free {
		if s.sequence == 0 {
			continue
		}
		var err error
		if buf, err = s.load(buf, MaxSegmentBytes); err != nil {
			return fmt.Errorf("read log segment: %w", err)
		}
		if _, _, ok := frameAt(buf, segmentStart, s.sequence, s.boot); ok {
			return fmt.Errorf("%w: %s/%s is lost but there are segments with records", ErrDamaged, l.Dir, headName)
		}
		l.lost = append(l.lost, s)
	}
	return nil
}

// Replay calls fn for every record, in order. Records behind the last intact one
// were never durable and are dropped; if one that was durable cannot be read, it fails
// with ErrDamaged. A payload that was durable is not verified here: its reader does,
// and so a rotten block harms itself only.
func (l *Log) Replay(fn func(*Record, Pos) error) error {
	live := *l.live.Load()
	if len(live) > 0 && live[0].sequence != l.head.first {
		return fmt.Errorf("%w: segment %d is missing", ErrDamaged, l.head.first)
	}
	if !l.fresh && len(live) == 0 {
		return fmt.Errorf("%w: segment %d is missing", ErrDamaged, l.head.first)
	}
	var buf []byte
	durable := uint64(0)
	for _, s := range live {
		err := s.whole()
		if err != nil {
			return err
		}
		if buf, err = s.load(buf, MaxSegmentBytes); err != nil {
			return fmt.Errorf("read log: %w", err)
		}
		durable = max(durable, s.synced, scanSynced(buf, s.sequence, s.boot))
	}
	r := replayer{fn: fn, durable: durable}
	kept := 0
	for i, s := range live {
		if i == 0 {
			r.last = s.prevLSN
		} else if s.sequence != live[i-1].sequence+1 || s.prevLSN != r.last {
			break
		}
		var err error
		if buf, err = s.load(buf, MaxSegmentBytes); err != nil {
			return fmt.Errorf("read log: %w", err)
		}
		r.limit = ^uint64(0)
		if i+1 < len(live) && live[i+1].boot != s.boot {
			// An earlier replay ended here. What lies behind was cut off for good, and its
			// numbers were given to other records.
			r.limit = live[i+1].prevLSN
		}
		if s.tail, s.end, err = r.segment(buf, s.sequence, s.boot); err != nil {
			return err
		}
		r.end = s.end
		kept++
	}
	if r.last < durable {
		return fmt.Errorf("%w: record %d cannot be read but was durable (up to %d)", ErrDamaged, r.last+1, durable)
	}
	l.keep(live, kept, r)
	return nil
}

func (l *Log) keep(live []*segment, kept int, r replayer) {
	for _, s := range live[kept:] {
		l.free = append(l.free, s)
		l.lost = append(l.lost, s)
	}
	live = live[:kept:kept]
	l.live.Store(&live)
	l.nextLSN = r.last + 1
	l.off = r.end
}

// scanSynced finds the greatest LSN that any frame of the segment knew to be
// durable. It goes on behind frames that are torn or rotten, sector by sector.
func scanSynced(seg []byte, sequence, boot uint32) (synced uint64) {
	for off := int64(segmentStart); off < int64(len(seg)); {
		h, _, ok := frameAt(seg, off, sequence, boot)
		if !ok {
			off += sectorBytes
			continue
		}
		synced = max(synced, h.synced)
		off += roundUp(h.bytes())
	}
	return synced
}

type replayer struct {
	fn      func(*Record, Pos) error
	durable uint64
	limit   uint64 // last LSN that may be in the segment
	last    uint64 // last LSN delivered
	end     int64  // where the last segment's intact frames end
	rec     Record
}

// segment delivers the records of one segment and returns where its frames end, and where those begin that nothing claims to be durable.
func (r *replayer) segment(seg []byte, sequence, boot uint32) (tail, off int64, err error) {
	tail, off = segmentStart, segmentStart
	for {
		h, desc, ok := frameAt(seg, off, sequence, boot)
		if !ok || h.firstLSN != r.last+1 || h.lastLSN() > r.limit {
			return tail, off, nil
		}
		payload := seg[off+frameHeaderBytes:][:h.payload]
		if !r.check(h, desc, payload) {
			return tail, off, nil
		}
		if err := r.deliver(h, desc, posOf(sequence, off+frameHeaderBytes)); err != nil {
			return tail, off, err
		}
		r.last = h.lastLSN()
		off += roundUp(h.bytes())
		if r.last <= r.durable {
			tail = off
		}
	}
}

// check tells whether a frame is whole: its records are well formed, account for
// all of its bytes and, unless it is known to have been durable, match the payload.
func (r *replayer) check(h frameHeader, desc, payload []byte) bool {
	verify := h.lastLSN() > r.durable
	for range h.count {
		var ok bool
		if desc, ok = r.rec.decode(desc); !ok || r.rec.payload() > len(payload) {
			return false
		}
		n := r.rec.payload()
		if verify {
			for i, sum := range r.rec.Sums {
				if object.Sum(payload[i*object.BlockSize:][:object.BlockSize]) != sum {
					return false
				}
			}
		}
		payload = payload[n:]
	}
	return len(desc) == 0 && len(payload) == 0
}

func (r *replayer) deliver(h frameHeader, desc []byte, pos Pos) error {
	for range h.count {
		desc, _ = r.rec.decode(desc)
		if err := r.fn(&r.rec, pos); err != nil {
			return err
		}
		pos += Pos(r.rec.payload())
	}
	return nil
}

// Start makes what was replayed durable and begins a segment of its own for this
// opening. After a killed process the replayed records may be in the page cache
// only: they must not be lost to a power cut once later records depend on them. A sync alone
// would not do where one has failed before: the system takes what that one has lost for written.
// So what no later record knew to be durable is written anew.
func (l *Log) Start() error {
	// So may the head: segments that it declares retired are about to be used again, and
	// an older head that came back would look for them.
	if err := l.head.again(); err != nil {
		return err
	}
	var buf []byte
	for _, s := range *l.live.Load() {
		var err error
		if buf, err = s.again(buf); err != nil {
			return fmt.Errorf("write log again: %w", err)
		}
	}
	for _, s := range l.lost {
		if err := s.void(); err != nil {
			return fmt.Errorf("void log segment: %w", err)
		}
	}
	l.boot = l.head.boot + 1
	if l.nextLSN == 0 {
		l.nextLSN = 1
	}
	l.syncedLSN.Store(l.nextLSN - 1)
	l.writtenLSN = l.nextLSN - 1
	l.chooseSize()
	limit := int(l.frameLimit()) + sectorBytes
	l.cur, l.idle = newBuffer(limit), newBuffer(limit)
	first := l.head.first
	if l.fresh {
		first = 1
	}
	if err := l.startSegment(first); err != nil {
		return err
	}
	l.synced.Store(l.written.Load())
	if err := l.FS.SyncDir(l.Dir); err != nil {
		return fmt.Errorf("sync log directory: %w", err)
	}
	return l.head.save(first, l.boot)
}

// continueSegment goes on behind the last intact frame: the way out when the disk is
// full and no segment is free. What lies there is zeroed first, lest a lost frame
// should fit behind a new one.
func (l *Log) continueSegment() error {
	live := *l.live.Load()
	l.seg = live[len(live)-1]
	end := min(l.seg.length, l.SegmentBytes) // not past the end: that would take space
	zeros := make([]byte, 64<<10)
	for off := l.off; off < end; off += int64(len(zeros)) {
		if _, err := l.seg.file.WriteAt(zeros[:min(int64(len(zeros)), end-off)], off); err != nil {
			return fmt.Errorf("clear log segment: %w", err)
		}
	}
	if err := l.seg.file.Sync(); err != nil {
		return fmt.Errorf("sync log: %w", err)
	}
	if end < l.SegmentBytes || l.off > l.SegmentBytes { // of another size: nothing is added to it
		l.off = l.SegmentBytes
	}
	l.cur.reset(posOf(l.seg.sequence, l.off), l.nextLSN)
	l.written.Store(uint64(l.cur.base))
	return nil
}
