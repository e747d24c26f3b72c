package api

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// The stream of extents carries a volume's content with its holes. It can be written and
// read without seeking:
//
//	magic   "SHEEPVS1"
//	size    u64: bytes of the volume; all ones: not known before the end
//	frames  kind u8 | offset u64 | length u64
//	        'D' is followed by length bytes of data
//	        'Z' stands for length zeros
//	        'E' ends the stream: offset is the volume's size, length the number of frames before
//	        'X' ends a stream that failed: length bytes with the Error as JSON; offset is 0
//
// Integers are little-endian. Frames are in ascending order and do not overlap; what none
// names is not said.

// Limits of a stream of extents that a reader imposes before it takes memory.
const (
	MaxFrameData  = 4 << 20   // bytes of data in a frame
	MaxVolumeSize = 1 << 62   // bytes
	maxFrameError = 64 << 10  // bytes
	UnknownSize   = int64(-1) // of a stream whose writer did not know it
)

const (
	extentsMagic = "SHEEPVS1"
	frameHeader  = 17

	frameData  = 'D'
	frameZero  = 'Z'
	frameEnd   = 'E'
	frameError = 'X'
)

// ErrStream is wrapped by what an ExtentReader says of a stream that is cut off, or makes
// no sense.
var ErrStream = errors.New("not a sound stream of extents")

// ExtentWriter writes a stream of extents. It is for one goroutine.
type ExtentWriter struct {
	w      io.Writer
	size   int64
	at     int64 // end of the last frame
	frames uint64
}

// NewExtentWriter begins a stream; size is the volume's in bytes, or UnknownSize.
func NewExtentWriter(w io.Writer, size int64) (*ExtentWriter, error) {
	b := make([]byte, 0, len(extentsMagic)+8)
	b = append(b, extentsMagic...)
	b = binary.LittleEndian.AppendUint64(b, uint64(size))
	_, err := w.Write(b)
	return &ExtentWriter{w: w, size: size}, err
}

func (w *ExtentWriter) frame(kind byte, off, n int64) error {
	var b [frameHeader]byte
	b[0] = kind
	binary.LittleEndian.PutUint64(b[1:], uint64(off))
	binary.LittleEndian.PutUint64(b[9:], uint64(n))
	_, err := w.w.Write(b[:])
	return err
}

func (w *ExtentWriter) next(off, n int64) error {
	end := w.size
	if end == UnknownSize {
		end = MaxVolumeSize
	}
	if off < w.at || n < 0 || n > end-off {
		return fmt.Errorf("write extent of %d bytes at %d after %d of %d: out of order or beyond the end", n, off, w.at, w.size)
	}
	w.at = off + n
	w.frames++
	return nil
}

// Data writes the content p of the volume at off; p may be of any length.
func (w *ExtentWriter) Data(off int64, p []byte) error {
	for len(p) > 0 {
		n := min(len(p), MaxFrameData)
		if err := w.next(off, int64(n)); err != nil {
			return err
		}
		if err := w.frame(frameData, off, int64(n)); err != nil {
			return err
		}
		if _, err := w.w.Write(p[:n]); err != nil {
			return err
		}
		off, p = off+int64(n), p[n:]
	}
	return nil
}

// Zero writes that n bytes at off are zeros.
func (w *ExtentWriter) Zero(off, n int64) error {
	if n == 0 {
		return nil
	}
	if err := w.next(off, n); err != nil {
		return err
	}
	return w.frame(frameZero, off, n)
}

// Close ends the stream; size is the volume's. It does not close the writer below.
func (w *ExtentWriter) Close(size int64) error {
	if size < w.at || w.size != UnknownSize && size != w.size {
		return fmt.Errorf("end stream of extents at %d: size %d does not fit", w.at, size)
	}
	return w.frame(frameEnd, size, int64(w.frames))
}

// Fail ends the stream with an error instead.
func (w *ExtentWriter) Fail(e *Error) error {
	b, err := json.Marshal(e)
	if err == nil && len(b) > maxFrameError {
		b, err = json.Marshal(&Error{Kind: e.Kind, Message: e.Message[:min(len(e.Message), 1024)]})
	}
	if err != nil {
		return err
	}
	if err := w.frame(frameError, 0, int64(len(b))); err != nil {
		return err
	}
	_, err = w.w.Write(b)
	return err
}

// ExtentReader reads a stream of extents. It is for one goroutine.
type ExtentReader struct {
	r      *bufio.Reader
	size   int64
	at     int64
	frames uint64
	left   int64 // data of the last frame not read yet
	err    error // io.EOF after the end
}

// NewExtentReader reads the beginning of a stream.
func NewExtentReader(r io.Reader) (*ExtentReader, error) {
	e := &ExtentReader{r: bufio.NewReaderSize(r, 64<<10)}
	var b [len(extentsMagic) + 8]byte
	if err := e.full(b[:]); err != nil {
		return nil, err
	}
	if string(b[:len(extentsMagic)]) != extentsMagic {
		return nil, fmt.Errorf("it begins with %q: %w", b[:len(extentsMagic)], ErrStream)
	}
	e.size = int64(binary.LittleEndian.Uint64(b[len(extentsMagic):]))
	if e.size != UnknownSize && (e.size < 0 || e.size > MaxVolumeSize) {
		return nil, fmt.Errorf("it is of a volume of %d bytes: %w", uint64(e.size), ErrStream)
	}
	return e, nil
}

// Size is the volume's in bytes, or UnknownSize; after the end it is known.
func (e *ExtentReader) Size() int64 { return e.size }

func (e *ExtentReader) full(p []byte) error {
	_, err := io.ReadFull(e.r, p)
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return fmt.Errorf("it was cut off at offset %d: %w", e.at, ErrStream)
	}
	return err
}

// Next returns the next extent. Its content, unless it is zero, is what Read then yields;
// what is not read of it is skipped. It fails with io.EOF at the end, with an *Error if
// the writer failed, else with ErrStream or an error of the reader below.
func (e *ExtentReader) Next() (x Extent, err error) {
	if e.err != nil {
		return Extent{}, e.err
	}
	x, err = e.next()
	e.err = err
	return x, err
}

func (e *ExtentReader) next() (Extent, error) {
	if e.left > 0 {
		if _, err := io.CopyN(io.Discard, e, e.left); err != nil {
			return Extent{}, err
		}
	}
	var b [frameHeader]byte
	if err := e.full(b[:]); err != nil {
		return Extent{}, err
	}
	off, n := int64(binary.LittleEndian.Uint64(b[1:])), int64(binary.LittleEndian.Uint64(b[9:]))
	switch b[0] {
	case frameData, frameZero:
		return e.extent(b[0], off, n)
	case frameEnd:
		return Extent{}, e.end(off, uint64(n))
	case frameError:
		return Extent{}, e.failure(n)
	}
	return Extent{}, fmt.Errorf("there is a frame of kind %#x after offset %d: %w", b[0], e.at, ErrStream)
}

func (e *ExtentReader) extent(kind byte, off, n int64) (Extent, error) {
	end := e.size
	if end == UnknownSize {
		end = MaxVolumeSize
	}
	switch {
	case off < e.at || n <= 0 || off > end || n > end-off:
		return Extent{}, fmt.Errorf("there is an extent of %d bytes at %d after offset %d of %d: %w", n, off, e.at, e.size, ErrStream)
	case kind == frameData && n > MaxFrameData:
		return Extent{}, fmt.Errorf("there is a frame with %d bytes of data: %w", n, ErrStream)
	}
	e.at = off + n
	e.frames++
	if kind == frameData {
		e.left = n
	}
	return Extent{Off: off, Len: n, Zero: kind == frameZero}, nil
}

func (e *ExtentReader) end(size int64, frames uint64) error {
	if size < e.at || size > MaxVolumeSize || e.size != UnknownSize && size != e.size || frames != e.frames {
		return fmt.Errorf("its end does not fit its content: %w", ErrStream)
	}
	e.size = size
	return io.EOF
}

func (e *ExtentReader) failure(n int64) error {
	if n <= 0 || n > maxFrameError {
		return fmt.Errorf("there is an error of %d bytes: %w", n, ErrStream)
	}
	b := make([]byte, n)
	if err := e.full(b); err != nil {
		return err
	}
	failed := new(Error)
	if err := json.Unmarshal(b, failed); err != nil || failed.Kind == "" {
		return fmt.Errorf("there is an error that makes no sense: %w", ErrStream)
	}
	return failed
}

// Read reads content of the extent that Next returned last; io.EOF at the extent's end.
func (e *ExtentReader) Read(p []byte) (int, error) {
	if e.left == 0 {
		return 0, io.EOF
	}
	n, err := e.r.Read(p[:min(int64(len(p)), e.left)])
	e.left -= int64(n)
	switch {
	case err == io.EOF && e.left > 0:
		err = fmt.Errorf("it was cut off before offset %d: %w", e.at, ErrStream)
	case err == io.EOF:
		err = nil
	}
	return n, err
}
