package consensus

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/zeebo/xxh3"
)

// mark is a file that says how far the log was written. raft-wal takes damage in its
// last segment for the end that a crash leaves and forgets what lies behind: commands
// that were answered would be undone, and what they made be swept away. The mark is
// written after the entries are durable and need not be durable itself: it may lag, and
// is never ahead.
type mark struct{ file *os.File }

const (
	markName  = "last"
	markMagic = 0x314b52414d474f4c // "LOGMARK1"
	markBytes = 24
)

// openMark opens the file, made if missing, and returns what it says; 0 is nothing.
func openMark(path string) (m *mark, last uint64, err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, 0, err
	}
	var b [markBytes]byte
	if _, err := f.ReadAt(b[:], 0); err != nil && !errors.Is(err, io.EOF) {
		return nil, 0, errors.Join(err, f.Close())
	}
	le := binary.LittleEndian
	if le.Uint64(b[:]) == markMagic && le.Uint64(b[8:]) == xxh3.Hash(b[16:]) {
		last = le.Uint64(b[16:])
	}
	m = &mark{f}
	// It takes its space now: later there may be none.
	if err := m.set(last, false); err != nil {
		return nil, 0, errors.Join(err, f.Close())
	}
	return m, last, nil
}

// set writes the mark; durable says whether a crash must not bring an older one back.
func (m *mark) set(last uint64, durable bool) error {
	le := binary.LittleEndian
	var b [markBytes]byte
	le.PutUint64(b[:], markMagic)
	le.PutUint64(b[16:], last)
	le.PutUint64(b[8:], xxh3.Hash(b[16:]))
	_, err := m.file.WriteAt(b[:], 0)
	if err == nil && durable {
		err = m.file.Sync()
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", m.file.Name(), err)
	}
	return nil
}

// close leaves a durable mark, unless last is 0.
func (m *mark) close(last uint64) error {
	var err error
	if last > 0 {
		err = m.set(last, true)
	}
	return errors.Join(err, m.file.Close())
}

// checkMark compares the log with its mark before anything is appended to it.
func (g *guard) checkMark(last uint64) error {
	end, err := g.LogStore.LastIndex()
	if err != nil {
		return err
	}
	if end < last {
		return fmt.Errorf("the log is damaged: it can be read up to entry %d, but had %d", end, last)
	}
	return nil
}

// DeleteRange implements raft.LogStore. The mark goes back before the entries do.
func (g *guard) DeleteRange(low, high uint64) error {
	first, err := g.LogStore.FirstIndex()
	if err != nil {
		return err
	}
	last, err := g.LogStore.LastIndex()
	if err != nil {
		return err
	}
	if high >= last {
		left := uint64(0)
		if low > first {
			left = low - 1
		}
		if err := g.mark.set(left, true); err != nil {
			return err
		}
	}
	return g.LogStore.DeleteRange(low, high)
}
