package wal

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync/atomic"

	"github.com/zeebo/xxh3"

	"sheepdog/storage/disk"
)

// A segment is one file of the log. Files are used again under a new sequence number
// instead of being deleted: their space is allocated and written once, so that
// fdatasync has no metadata to write.
type segment struct {
	slot     int
	file     disk.File
	sequence uint32        // 0: free, or never used
	shown    atomic.Uint32 // sequence, for readers whose segment may be taken for another one meanwhile
	boot     uint32        // the opening of the log that began it
	prevLSN  uint64        // last LSN before this segment
	synced   uint64        // what was durable when the header was written
	size     int64         // of the file, when the header was written
	length   int64         // of the file

	// What Replay has found that may not be durable is in [tail, end); the header may not be either, if that is not empty or there are
	// no records at all.
	tail, end int64
}

const (
	segmentMagic = 0x31474553474f4c53 // "SLOGSEG1"
	// segmentStart is where the first frame begins.
	segmentStart = sectorBytes
)

func segmentName(dir string, slot int) string { return fmt.Sprintf("%s/segment-%03d", dir, slot) }

func (s *segment) writeHeader() error {
	le := binary.LittleEndian
	var b [sectorBytes]byte
	le.PutUint64(b[0:], segmentMagic)
	le.PutUint32(b[16:], s.sequence)
	le.PutUint32(b[20:], s.boot)
	le.PutUint64(b[24:], s.prevLSN)
	le.PutUint64(b[32:], s.synced)
	le.PutUint64(b[40:], uint64(s.size))
	le.PutUint64(b[8:], xxh3.Hash(b[16:]))
	_, err := s.file.WriteAt(b[:], 0)
	return err
}

func (s *segment) readHeader() error {
	var b [sectorBytes]byte
	if _, err := s.file.ReadAt(b[:], 0); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	s.decodeHeader(b[:])
	return nil
}

// void makes the segment a free one, durably.
func (s *segment) void() error {
	s.sequence = 0
	if _, err := s.file.WriteAt(make([]byte, sectorBytes), 0); err != nil {
		return err
	}
	return s.file.Sync()
}

// again writes anew what of a live segment may not be durable, as it was found, and syncs the file. buf is as with load.
func (s *segment) again(buf []byte) ([]byte, error) {
	if s.tail < s.end || s.end == segmentStart {
		var err error
		if buf, err = s.load(buf, s.end); err != nil {
			return buf, err
		}
		if int64(len(buf)) < s.end {
			return buf, io.ErrUnexpectedEOF
		}
		if _, err := s.file.WriteAt(buf[s.tail:], s.tail); err != nil {
			return buf, err
		}
		if _, err := s.file.WriteAt(buf[:segmentStart], 0); err != nil {
			return buf, err
		}
	}
	return buf, s.file.Sync()
}

// decodeHeader leaves sequence 0 if b is no segment header.
func (s *segment) decodeHeader(b []byte) {
	le := binary.LittleEndian
	s.sequence = 0
	if le.Uint64(b) != segmentMagic || le.Uint64(b[8:]) != xxh3.Hash(b[16:sectorBytes]) {
		return
	}
	s.shown.Store(le.Uint32(b[16:]))
	s.sequence, s.boot, s.prevLSN, s.synced = le.Uint32(b[16:]), le.Uint32(b[20:]), le.Uint64(b[24:]), le.Uint64(b[32:])
	s.size = int64(le.Uint64(b[40:]))
}

// load reads the whole segment into buf, which it grows as needed.
func (s *segment) load(buf []byte, limit int64) ([]byte, error) {
	size, err := s.file.Size()
	if err != nil {
		return buf, err
	}
	size = min(size, limit)
	if int64(cap(buf)) < size {
		buf = make([]byte, size)
	}
	buf = buf[:size]
	n, err := s.file.ReadAt(buf, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return buf, err
	}
	return buf[:n], nil
}

// whole fails if the file of a live segment has lost its end: it had all of its size
// before the first record. Headers of earlier versions know of no size.
func (s *segment) whole() error {
	size, err := s.file.Size()
	if err != nil {
		return fmt.Errorf("read log: %w", err)
	}
	if size < s.size {
		return fmt.Errorf("%w: segment %d has %d bytes, but had %d", ErrDamaged, s.sequence, size, s.size)
	}
	return nil
}

// fill allocates and zeroes the file to size bytes and syncs it. When it fails the file is as long as before.
func (s *segment) fill(size int64) error {
	zeros := make([]byte, min(size, 1<<20))
	for off := int64(0); off < size; off += int64(len(zeros)) {
		n := min(int64(len(zeros)), size-off)
		if _, err := s.file.WriteAt(zeros[:n], off); err != nil {
			_ = s.file.Truncate(s.length) // else it takes space that it has no use of
			return err
		}
	}
	if err := s.file.Sync(); err != nil {
		return err
	}
	s.length = max(s.length, size)
	return nil
}
