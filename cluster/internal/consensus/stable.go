package consensus

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync"

	"github.com/hashicorp/raft-wal/types"
	"github.com/zeebo/xxh3"
)

// stable keeps a few small values in one file of two slots: raft's term and vote, and
// raft-wal's list of segments. Both slots are written each time, one after the other:
// the file never grows, a crash leaves one slot whole, and damage to one is harmless.
//
//	slot: xxh3 of what follows 8 | sequence number 8 | length 4 | JSON object of the values
type stable struct {
	mu     sync.Mutex
	file   *os.File
	seq    uint64
	values map[string][]byte
	broken error // of a write that failed: what the slot holds is unknown since then
}

const (
	stableSlot   = 256 << 10 // more than a thousand segments
	stableHeader = 8 + 8 + 4
	segmentsKey  = "segments"
)

// errNotFound has the text that raft tells a missing value by.
var errNotFound = errors.New("not found")

// createStable makes a new file with the given values; it must not exist.
func createStable(path string, values map[string][]byte) (*stable, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	s := &stable{file: f, values: values}
	// Zeros take the space of both slots, once and for all.
	if _, err = f.WriteAt(make([]byte, 2*stableSlot), 0); err == nil {
		err = s.write()
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return s, nil
}

func openStable(path string) (*stable, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s is missing: restore the directory from a backup: %w", path, err)
	}
	if err != nil {
		return nil, err
	}
	s := &stable{file: f}
	if err := s.read(); err != nil {
		return nil, errors.Join(fmt.Errorf("read %s: %w", path, err), f.Close())
	}
	return s, nil
}

func (s *stable) read() error {
	b := make([]byte, 2*stableSlot)
	if _, err := s.file.ReadAt(b, 0); err != nil && err != io.EOF { // what a short file lacks is damaged
		return err
	}
	for slot := range 2 {
		seq, values, ok := decodeSlot(b[slot*stableSlot:][:stableSlot])
		if ok && (s.values == nil || seq > s.seq) {
			s.seq, s.values = seq, values
		}
	}
	if s.values == nil {
		return errors.New("both copies of term and vote are damaged: restore the directory from a backup")
	}
	return nil
}

func decodeSlot(b []byte) (seq uint64, values map[string][]byte, ok bool) {
	n := binary.LittleEndian.Uint32(b[16:])
	if n > stableSlot-stableHeader || binary.LittleEndian.Uint64(b) != xxh3.Hash(b[8:stableHeader+n]) {
		return 0, nil, false
	}
	if json.Unmarshal(b[stableHeader:][:n], &values) != nil || values == nil {
		return 0, nil, false
	}
	return binary.LittleEndian.Uint64(b[8:]), values, true
}

// write makes the values durable, twice: an older slot that comes to light because the
// newer one is damaged would undo a vote, and let raft-wal delete segments it lacks.
func (s *stable) write() error {
	j, err := json.Marshal(s.values)
	if err != nil {
		return err
	}
	if len(j) > stableSlot-stableHeader {
		return fmt.Errorf("values take %d bytes, there are %d", len(j), stableSlot-stableHeader)
	}
	b := make([]byte, stableHeader+len(j))
	binary.LittleEndian.PutUint32(b[16:], uint32(len(j)))
	copy(b[stableHeader:], j)
	for range 2 {
		binary.LittleEndian.PutUint64(b[8:], s.seq+1)
		binary.LittleEndian.PutUint64(b, xxh3.Hash(b[8:]))
		if _, err := s.file.WriteAt(b, int64((s.seq+1)%2)*stableSlot); err != nil {
			return err
		}
		if err := s.file.Sync(); err != nil {
			return err
		}
		s.seq++
	}
	return nil
}

// Set implements raft.StableStore.
func (s *stable) Set(key, val []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.broken != nil {
		return s.broken
	}
	old, had := s.values[string(key)]
	s.values[string(key)] = append([]byte{}, val...)
	if err := s.write(); err != nil {
		if delete(s.values, string(key)); had {
			s.values[string(key)] = old
		}
		s.broken = fmt.Errorf("write %s: %w", s.file.Name(), err)
		return s.broken
	}
	return nil
}

// Get implements raft.StableStore.
func (s *stable) Get(key []byte) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	v, ok := s.values[string(key)]
	if !ok {
		return nil, errNotFound
	}
	return append([]byte{}, v...), nil
}

// SetUint64 implements raft.StableStore.
func (s *stable) SetUint64(key []byte, val uint64) error {
	return s.Set(key, binary.LittleEndian.AppendUint64(nil, val))
}

// GetUint64 implements raft.StableStore.
func (s *stable) GetUint64(key []byte) (uint64, error) {
	v, err := s.Get(key)
	if err != nil {
		return 0, err
	}
	if len(v) != 8 {
		return 0, fmt.Errorf("value of %q has %d bytes, not 8", key, len(v))
	}
	return binary.LittleEndian.Uint64(v), nil
}

// segmentTable is a stable as raft-wal's table of segments. In place of the library's
// own, a bbolt file: that one needs new space for every change, and is never closed.
type segmentTable struct{ s *stable }

var _ types.MetaStore = segmentTable{}

// Load implements types.MetaStore.
func (t segmentTable) Load(string) (state types.PersistentState, err error) {
	b, err := t.s.Get([]byte(segmentsKey))
	if errors.Is(err, errNotFound) {
		return state, nil
	}
	if err == nil {
		err = json.Unmarshal(b, &state)
	}
	return state, err
}

// CommitState implements types.MetaStore.
func (t segmentTable) CommitState(state types.PersistentState) error {
	b, err := json.Marshal(state)
	if err != nil {
		return err
	}
	return t.s.Set([]byte(segmentsKey), b)
}

// GetStable implements types.MetaStore. raft's values are kept without the help of raft-wal.
func (t segmentTable) GetStable([]byte) ([]byte, error) { return nil, errors.ErrUnsupported }

// SetStable implements types.MetaStore.
func (t segmentTable) SetStable(_, _ []byte) error { return errors.ErrUnsupported }

// Close implements types.MetaStore; the stable has its own owner.
func (t segmentTable) Close() error { return nil }

func (s *stable) Close() error { return s.file.Close() }
