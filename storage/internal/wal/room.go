package wal

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"syscall"

	"sheepdog/storage/disk"
	"sheepdog/storage/object"
)

// The log grows as far as MaxSegments and the disk let it. Where it may not grow it goes
// on with the segments that it has: checkpoints come sooner.

// noSpace reports whether an error says that there is no space, on the disk or for the log.
func noSpace(err error) bool {
	return errors.Is(err, ErrNoRoom) || errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

// segments is how many segments there are. mu is held.
func (l *Log) segments() int { return len(*l.live.Load()) + len(l.free) }

// most is how many segments there can be. mu is held.
func (l *Log) most() int {
	if l.narrow {
		return l.segments()
	}
	return max(l.MaxSegments, l.segments())
}

// spare is how many segments are free, or can be made. mu is held.
func (l *Log) spare() int { return l.most() - len(*l.live.Load()) }

// least is how many of the spare segments there must be for a next one to be begun where n of
// MinSegments have to be. A log that has less of them has to do without some of what they are for. mu is held.
func (l *Log) least(n int) int { return max(1, min(n, l.most()-1)) }

// Room is how many more segments ordinary records may fill.
func (l *Log) Room() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.spare() - l.least(3) + 1
}

// NeedSegment reports whether a call of Prepare would help, if there is space.
func (l *Log) NeedSegment() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err == nil && len(l.free) < 3 && l.segments() < l.MaxSegments
}

// Prepare makes one more segment, allocated and zeroed, and reports whether it has. When there is no
// space for it, the log goes on with those it has until another Prepare finds some.
func (l *Log) Prepare() (made bool, err error) {
	l.prepareMu.Lock()
	defer l.prepareMu.Unlock()
	l.mu.Lock()
	enough := l.segments() >= l.MaxSegments
	slot := l.unusedSlot()
	var s *segment
	if len(l.odd) > 0 {
		s = l.odd[0]
	}
	l.mu.Unlock()
	if enough {
		return false, nil
	}
	if s != nil {
		err = l.complete(s)
	} else {
		s, err = l.makeSegment(slot, false)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.narrow = noSpace(err)
	if l.narrow {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("prepare log segment: %w", err)
	}
	l.odd = slices.DeleteFunc(l.odd, func(o *segment) bool { return o == s })
	l.free = append(l.free, s)
	return true, nil
}

// all are the segments that there are. mu is held, or nobody else has the log.
func (l *Log) all() []*segment { return slices.Concat(*l.live.Load(), l.free, l.odd) }

// unusedSlot is the lowest number that no segment's file has. mu is held, or nobody else has the log.
func (l *Log) unusedSlot() int {
	used := make(map[int]bool)
	for _, s := range l.all() {
		used[s.slot] = true
	}
	slot := 0
	for used[slot] {
		slot++
	}
	return slot
}

// take asks for space, unless whatever there is may be taken.
func (l *Log) take(n int64, all bool) bool { return all || l.Take == nil || l.Take(n) }

func (l *Log) give(n int64, all bool) {
	if !all && l.Give != nil {
		l.Give(n)
	}
}

// makeSegment makes the file of one more segment. With all it may take whatever there is.
func (l *Log) makeSegment(slot int, all bool) (*segment, error) {
	if !l.take(l.SegmentBytes, all) {
		return nil, ErrNoRoom
	}
	defer l.give(l.SegmentBytes, all)
	f, err := l.FS.OpenFile(segmentName(l.Dir, slot), disk.Create)
	if err != nil {
		return nil, err
	}
	s := &segment{slot: slot, file: f}
	if err := s.fill(l.SegmentBytes); err != nil {
		f.Close()
		if noSpace(err) {
			_ = l.FS.Remove(segmentName(l.Dir, slot)) // a leftover would only be filled again at the next opening
		}
		return nil, err
	}
	if err := l.FS.SyncDir(l.Dir); err != nil {
		f.Close()
		return nil, err
	}
	return s, nil
}

// complete makes a free segment as long as segments are.
func (l *Log) complete(s *segment) error {
	n := l.SegmentBytes - s.length
	if !l.take(n, false) {
		return ErrNoRoom
	}
	defer l.give(n, false)
	return s.fill(l.SegmentBytes)
}

// chooseSize keeps to the size that segments have, if there is no space for longer ones.
func (l *Log) chooseSize() {
	live := *l.live.Load()
	if len(live) == 0 {
		return
	}
	last := live[len(live)-1]
	if last.size < MinSegmentBytes || last.size%object.BlockSize != 0 || last.size >= l.SegmentBytes || last.length < last.size {
		return
	}
	if n := MinSegments * l.SegmentBytes; l.take(n, false) {
		l.give(n, false)
		return
	}
	l.MaxSegments = max(int(int64(l.MaxSegments)*l.SegmentBytes/last.size), MinSegments)
	l.SegmentBytes = last.size
}

// fitFree makes the files of free segments as long as segments are. It removes those for which there
// is no space, and those that are too many: their limits were others at another time, or a crash has left them short.
func (l *Log) fitFree() error {
	files := l.free
	l.free = nil
	slices.SortStableFunc(files, func(a, b *segment) int { return cmp.Compare(b.length, a.length) }) // what gives space first
	for i, s := range files {
		var err error
		surplus := len(l.free) >= 2 && l.segments() >= l.MaxSegments
		switch {
		case surplus:
		case s.length < l.SegmentBytes:
			err = l.complete(s)
		case s.length > l.SegmentBytes:
			if err = s.file.Truncate(l.SegmentBytes); err == nil {
				s.length = l.SegmentBytes
			}
		}
		if err != nil && !noSpace(err) {
			l.free = append(l.free, files[i:]...)
			return fmt.Errorf("check log segment: %w", err)
		}
		if !surplus && err == nil {
			l.free = append(l.free, s)
			continue
		}
		_ = s.file.Close()
		if err := l.FS.Remove(segmentName(l.Dir, s.slot)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			l.free = append(l.free, files[i+1:]...)
			return fmt.Errorf("remove log segment: %w", err)
		}
	}
	return nil
}

// startSegment begins the segment of this opening. A new log has all of MinSegments before anything else can take their
// space.
func (l *Log) startSegment(first uint32) error {
	if err := l.fitFree(); err != nil {
		return err
	}
	least := 2 // one to begin, and one for the checkpoint that follows a crash
	if l.fresh {
		least = MinSegments
	}
	for len(l.free) < least {
		all := !l.fresh && l.segments() < 2 // with one alone no checkpoint could free anything
		s, err := l.makeSegment(l.unusedSlot(), all)
		if noSpace(err) && !l.fresh {
			l.narrow = true
			return l.continueSegment()
		}
		if noSpace(err) {
			return fmt.Errorf("%w: it needs %d bytes, in %s: %w", ErrNoRoom, MinSegments*l.SegmentBytes, l.Dir, err)
		}
		if err != nil {
			return fmt.Errorf("make log segment: %w", err)
		}
		l.free = append(l.free, s)
	}
	l.head.first = first
	if err := l.begin(l.free[0]); err != nil {
		return fmt.Errorf("begin log segment: %w", err)
	}
	l.free = l.free[1:]
	if err := l.seg.file.Sync(); err != nil {
		return fmt.Errorf("sync log: %w", err)
	}
	l.unsynced = nil
	return nil
}
