package storage

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"slices"

	"github.com/zeebo/xxh3"

	"sheepdog/storage/disk"
	"sheepdog/storage/object"
)

// The file with marks, little-endian: magic "SHPM", format 1, number of entries, all
// uint32; entries of policy (1 byte), partition (2), epoch (8), sequence number (8),
// ascending; the xxh3 of all that (8).
const (
	marksName   = "marks"
	marksMagic  = 0x4d504853
	marksFormat = 1
	marksHead   = 12
	markSize    = 1 + 2 + 8 + 8
	maxMarks    = 1 << 24 // as many groups as there can be
)

// KeepMarks makes durable, for each group, what the layer above
// says of it: the version up to which nothing is missing. That must be durable already.
// Marks of a group are kept on its disk, so that they are lost with it. The first call after
// a group was abandoned keeps none of that: it may be of what was on the disk before. Calls follow each other, with marks taken after the one before
// has ended.
func (s *Store) KeepMarks(marks map[object.Group]object.Version) error {
	s.marksMu.Lock()
	defer s.marksMu.Unlock()
	defer clear(s.abandoned)
	var errs []error
	for _, d := range s.routes.drives() {
		if d.failed() != nil {
			continue
		}
		own := make(map[object.Group]object.Version)
		for g, v := range marks {
			if s.routes.find(g) == d && !s.abandoned[g] {
				own[g] = v
			}
		}
		if err := writeWhole(d.fs, marksName, encodeMarks(own)); err != nil {
			errs = append(errs, d.explain(fmt.Errorf("keep marks: %w", err)))
		}
	}
	return errors.Join(errs...)
}

// Marks returns what KeepMarks kept last. What cannot be read is left out, and what a disk says of
// groups that have left it for another one.
func (s *Store) Marks() map[object.Group]object.Version {
	all := make(map[object.Group]object.Version)
	for _, d := range s.routes.drives() {
		marks, err := readMarks(d.fs)
		if err != nil {
			d.logger.Warn("marks are lost: partitions will be compared with other nodes object by object", "disk", d.String(), "error", err)
		}
		for g, v := range marks {
			if at := s.routes.at(g); at == nil || at == d {
				all[g] = v
			}
		}
	}
	return all
}

// withMarks calls fn, which has groups live on another disk, and has their marks there too then. Meanwhile they are on neither:
// a disk that has a mark of a group must not be without the group, whatever happens to the other one.
func (s *Store) withMarks(from, to *drive, groups []object.Group, fn func() error) error {
	s.marksMu.Lock()
	defer s.marksMu.Unlock()
	old, err := readMarks(from.fs)
	if err != nil {
		return fn() // they are lost
	}
	taken := make(map[object.Group]object.Version)
	for _, g := range groups {
		if v, ok := old[g]; ok {
			taken[g] = v
			delete(old, g)
		}
	}
	if len(taken) == 0 {
		return fn()
	}
	if err := writeWhole(from.fs, marksName, encodeMarks(old)); err != nil {
		return from.explain(err)
	}
	err = fn()
	// Where the groups live now is settled: what becomes of their marks is no reason to undo that.
	for _, d := range []*drive{from, to} {
		if lost := s.giveMarks(d, taken); lost != nil {
			d.logger.Warn("marks of partitions that went to another disk are lost: after a restart they are compared with other nodes object by object", "disk", d.String(), "error", lost)
		}
	}
	return err
}

// giveMarks adds marks to those of a disk, of groups that live there.
func (s *Store) giveMarks(d *drive, more map[object.Group]object.Version) error {
	marks, err := readMarks(d.fs)
	if err != nil || marks == nil {
		marks = make(map[object.Group]object.Version)
	}
	n := len(marks)
	for g, v := range more {
		if s.routes.at(g) == d {
			marks[g] = v
		}
	}
	if len(marks) == n {
		return nil
	}
	return d.explain(writeWhole(d.fs, marksName, encodeMarks(marks)))
}

func encodeMarks(marks map[object.Group]object.Version) []byte {
	le := binary.LittleEndian
	b := make([]byte, 0, marksHead+len(marks)*markSize+8)
	b = le.AppendUint32(b, marksMagic)
	b = le.AppendUint32(b, marksFormat)
	b = le.AppendUint32(b, uint32(len(marks)))
	groups := slices.SortedFunc(maps.Keys(marks), func(a, b object.Group) int {
		return compareKeys(object.Key{Group: a}, object.Key{Group: b})
	})
	for _, g := range groups {
		b = append(b, byte(g.Policy))
		b = le.AppendUint16(b, uint16(g.Partition))
		b = le.AppendUint64(b, marks[g].Epoch)
		b = le.AppendUint64(b, marks[g].Seq)
	}
	return le.AppendUint64(b, xxh3.Hash(b))
}

func readMarks(fsys disk.FS) (map[object.Group]object.Version, error) {
	f, err := fsys.OpenFile(marksName, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.NewSectionReader(f, 0, marksHead+maxMarks*markSize+8))
	if err != nil {
		return nil, err
	}
	return decodeMarks(b)
}

var errMarks = errors.New("file of marks is damaged")

func decodeMarks(b []byte) (map[object.Group]object.Version, error) {
	le := binary.LittleEndian
	if len(b) < marksHead+8 || le.Uint32(b) != marksMagic || xxh3.Hash(b[:len(b)-8]) != le.Uint64(b[len(b)-8:]) {
		return nil, errMarks
	}
	if f := le.Uint32(b[4:]); f != marksFormat {
		return nil, fmt.Errorf("file of marks has format %d, which this version does not know", f)
	}
	n := int(le.Uint32(b[8:]))
	b = b[marksHead : len(b)-8]
	if len(b) != n*markSize {
		return nil, errMarks
	}
	marks := make(map[object.Group]object.Version, n)
	for ; len(b) > 0; b = b[markSize:] {
		g := object.Group{Policy: object.PolicyID(b[0]), Partition: object.Partition(le.Uint16(b[1:]))}
		marks[g] = object.Version{Epoch: le.Uint64(b[3:]), Seq: le.Uint64(b[11:])}
	}
	return marks, nil
}
