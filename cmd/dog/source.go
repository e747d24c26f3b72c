package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"

	"sheepdog/frontends/admin/api"
)

// pieceBytes is what is read at a time.
const pieceBytes = 1 << 20

// holeBytes is the grain at which zeros become holes: that of the store.
const holeBytes = 4096

var zeroBlock [holeBytes]byte

func isZero(p []byte) bool {
	for len(p) > 0 {
		n := min(len(p), holeBytes)
		if !bytes.Equal(p[:n], zeroBlock[:n]) {
			return false
		}
		p = p[n:]
	}
	return true
}

// source is an image that is to be imported.
type source struct {
	name string
	r    io.Reader
	file *os.File // nil: it cannot be sought in
	size int64    // api.UnknownSize if it is not known
}

// openSource opens an image: "-" or "" is the standard input.
func (a *app) openSource(name string) (*source, error) {
	if name == "" || name == "-" {
		s := &source{name: "standard input", r: a.in, size: api.UnknownSize}
		if f, ok := a.in.(*os.File); ok {
			if a.terminal(f) {
				return nil, usagef("the standard input is a terminal: name a file, or redirect one into it")
			}
			if at, err := f.Seek(0, io.SeekCurrent); err == nil && at == 0 {
				return s, s.measure(f)
			}
		}
		return s, nil
	}
	f, err := os.Open(name)
	if err != nil {
		return nil, fmt.Errorf("open the image: %w", err)
	}
	s := &source{name: name, r: f, size: api.UnknownSize}
	if err := s.measure(f); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return s, nil
}

// measure finds out how large a file or block device is; of others that is not known.
func (s *source) measure(f *os.File) error {
	info, err := f.Stat()
	if err != nil {
		return fmt.Errorf("look at the image: %w", err)
	}
	switch mode := info.Mode(); {
	case mode.IsDir():
		return fmt.Errorf("the image %s is a directory", s.name)
	case mode.IsRegular():
		s.file, s.size = f, info.Size()
	case mode&os.ModeDevice != 0 && mode&os.ModeCharDevice == 0:
		end, err := f.Seek(0, io.SeekEnd)
		if err == nil {
			_, err = f.Seek(0, io.SeekStart)
		}
		if err != nil {
			return fmt.Errorf("find the size of %s: %w", s.name, err)
		}
		s.file, s.size = f, end
	}
	return nil
}

func (s *source) close() error {
	if f, ok := s.r.(*os.File); ok && f != os.Stdin {
		return f.Close()
	}
	return nil
}

// send writes the image as a stream of extents.
func (s *source) send(w io.Writer, p *progress) error {
	out, err := api.NewExtentWriter(w, s.size)
	if err != nil {
		return err
	}
	x := &extents{out: out, buf: make([]byte, pieceBytes), p: p}
	if s.file == nil {
		return x.pipe(s)
	}
	for off := int64(0); off < s.size; {
		data, hole, err := dataFrom(s.file, off, s.size)
		if err != nil {
			return fmt.Errorf("look for holes in %s: %w", s.name, err)
		}
		if err := x.zero(off, data-off); err != nil {
			return err
		}
		if err := x.data(s, data, hole); err != nil {
			return err
		}
		off = hole
	}
	if err := x.flush(); err != nil {
		return err
	}
	return out.Close(s.size)
}

// extents makes frames of an image; neighbouring zeros become one.
type extents struct {
	out       *api.ExtentWriter
	buf       []byte
	p         *progress
	zeroAt    int64
	zeroBytes int64
}

func (x *extents) zero(off, n int64) error {
	if x.zeroBytes > 0 && x.zeroAt+x.zeroBytes != off {
		if err := x.flush(); err != nil {
			return err
		}
	}
	if x.zeroBytes == 0 {
		x.zeroAt = off
	}
	x.zeroBytes += n
	x.p.set(off + n)
	return nil
}

func (x *extents) flush() error {
	n := x.zeroBytes
	x.zeroBytes = 0
	return x.out.Zero(x.zeroAt, n)
}

// data sends [off, end) of a file.
func (x *extents) data(s *source, off, end int64) error {
	for off < end {
		p := x.buf[:min(int64(len(x.buf)), end-off)]
		n, err := s.file.ReadAt(p, off)
		if n < len(p) {
			if err == io.EOF {
				err = errors.New("it became shorter")
			}
			return fmt.Errorf("read %s at %d: %w", s.name, off, err)
		}
		if err := x.content(off, p); err != nil {
			return err
		}
		off += int64(n)
	}
	return nil
}

// pipe sends what cannot be sought in.
func (x *extents) pipe(s *source) error {
	var off int64
	for {
		n, err := io.ReadFull(s.r, x.buf)
		if failed := x.content(off, x.buf[:n]); failed != nil {
			return failed
		}
		off += int64(n)
		switch {
		case err == io.EOF || err == io.ErrUnexpectedEOF:
			if err := x.flush(); err != nil {
				return err
			}
			return x.out.Close(off)
		case err != nil:
			return fmt.Errorf("read %s: %w", s.name, err)
		}
	}
}

// content sends p, its zero blocks as zeros.
func (x *extents) content(off int64, p []byte) error {
	for len(p) > 0 {
		n := runLength(p)
		if isZero(p[:min(len(p), holeBytes)]) {
			if err := x.zero(off, int64(n)); err != nil {
				return err
			}
		} else {
			if err := x.flush(); err != nil {
				return err
			}
			if err := x.out.Data(off, p[:n]); err != nil {
				return err
			}
			x.p.set(off + int64(n))
		}
		off, p = off+int64(n), p[n:]
	}
	return nil
}

// runLength is how many bytes, by whole blocks, are all zeros or all not.
func runLength(p []byte) int {
	n := min(len(p), holeBytes)
	first := isZero(p[:n])
	for n < len(p) {
		k := min(len(p)-n, holeBytes)
		if isZero(p[n:n+k]) != first {
			break
		}
		n += k
	}
	return n
}
