package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"syscall"
)

// target is a file that is being written. Until commit, a file that was there is as it
// was, and a new one is not there.
type target struct {
	name   string
	w      io.Writer
	file   *os.File // nil: content must be written in order, zeros too
	temp   string   // name until commit
	sparse bool     // what is not written reads as zero
}

// openTarget makes a target: "-" is the standard output, and so is "" where that is the
// default. An existing file is only replaced with force.
func (a *app) openTarget(name string, force bool) (*target, error) {
	if name == "-" {
		if a.terminal(a.out) {
			return nil, usagef("the standard output is a terminal: name a file, or redirect it into one")
		}
		return &target{name: "standard output", w: a.out}, nil
	}
	info, err := os.Stat(name)
	switch {
	case errors.Is(err, os.ErrNotExist), err == nil && info.Mode().IsRegular() && force:
		return newFile(name)
	case err != nil:
		return nil, fmt.Errorf("look at the file: %w", err)
	case info.IsDir():
		return nil, fmt.Errorf("%s is a directory", name)
	case info.Mode().IsRegular():
		return nil, hint("name another file, or replace this one with --force", "the file %s exists", name)
	}
	f, err := os.OpenFile(name, os.O_WRONLY, 0) // a device or pipe
	if err != nil {
		return nil, fmt.Errorf("open the file: %w", err)
	}
	return &target{name: name, w: f, file: f}, nil
}

func newFile(name string) (*target, error) {
	f, err := os.CreateTemp(filepath.Dir(name), "."+filepath.Base(name)+".part-*")
	if err != nil {
		return nil, fmt.Errorf("create the file: %w", err)
	}
	return &target{name: name, w: f, file: f, temp: f.Name(), sparse: true}, nil
}

// Data writes content at an offset; content comes in order.
func (t *target) Data(off int64, p []byte) error {
	if !t.sparse {
		return t.put(p)
	}
	for len(p) > 0 {
		n := runLength(p)
		if !isZero(p[:min(len(p), holeBytes)]) {
			if _, err := t.file.WriteAt(p[:n], off); err != nil {
				return fmt.Errorf("write %s: %w", t.name, err)
			}
		}
		off, p = off+int64(n), p[n:]
	}
	return nil
}

func (t *target) put(p []byte) error {
	if _, err := t.w.Write(p); err != nil {
		return fmt.Errorf("write %s: %w", t.name, err)
	}
	return nil
}

// Zero writes n zeros.
func (t *target) Zero(_, n int64) error {
	if t.sparse {
		return nil
	}
	for n > 0 {
		k := min(n, int64(len(manyZeros)))
		if err := t.put(manyZeros[:k]); err != nil {
			return err
		}
		n -= k
	}
	return nil
}

var manyZeros [64 << 10]byte

// commit makes the file what was written, durably. size < 0: as long as what was written.
func (t *target) commit(size int64) (err error) {
	if t.file == nil {
		return nil
	}
	if t.sparse && size >= 0 {
		err = t.file.Truncate(size)
	}
	if err == nil {
		if err = t.file.Sync(); t.temp == "" && cannotSync(err) {
			err = nil
		}
	}
	if err == nil && t.temp != "" {
		err = t.file.Chmod(0o666 &^ umask())
	}
	if err = errors.Join(err, t.file.Close()); err == nil && t.temp != "" {
		err = rename(t.temp, t.name)
	}
	if err != nil {
		return fmt.Errorf("finish %s: %w", t.name, err)
	}
	t.temp = ""
	return nil
}

// cannotSync reports whether that is how pipes and some devices say that they have nothing to make durable; any other failure is
// one of the content.
func cannotSync(err error) bool {
	return errors.Is(err, syscall.EINVAL) || errors.Is(err, errors.ErrUnsupported) || errors.Is(err, syscall.EROFS)
}

// rename gives a file its name, durably.
func rename(from, to string) error {
	if runtime.GOOS == "windows" { // whose directories cannot be synced
		return os.Rename(from, to)
	}
	dir, err := os.Open(filepath.Dir(to))
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := os.Rename(from, to); err != nil {
		return err
	}
	if err := dir.Sync(); err != nil && !cannotSync(err) {
		return err
	}
	return nil
}

// discard forgets a file that was not committed.
func (t *target) discard() {
	if t.temp != "" {
		t.file.Close()
		os.Remove(t.temp)
	}
}
