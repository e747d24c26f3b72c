// Package backup is the format of volume backups: a stream that describes itself, checks
// itself, and can be written and read without seeking.
//
//	magic "SHEEPBK1"
//	header    length u32, JSON of Header, xxh3 of that JSON
//	records   kind u8: 'D' data, 'Z' zeros, 'E' end | offset u64 | length u64 | xxh3 of the 17 bytes
//	          'D' is followed by the data and its xxh3
//	          'E' ends the stream: offset is the number of records before, length their bytes
//
// Integers are little-endian, hashes 64 bits. Records are in the order of their offsets,
// and do not overlap. It is pure: it reads and writes what it is given.
package backup

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/zeebo/xxh3"
)

// Limits that a reader imposes before it takes memory.
const (
	MaxData   = 4 << 20  // bytes of data in a record
	maxHeader = 64 << 10 // bytes
	maxSize   = 1 << 62
)

const magic = "SHEEPBK1"

// ErrFormat is wrapped by what a Reader says of a stream that is damaged, cut off, or no
// backup.
var ErrFormat = errors.New("not a sound backup")

// Header describes the snapshot that a backup has.
type Header struct {
	Name       string    `json:"name"` // of the VDI
	Tag        string    `json:"tag"`
	Identity   string    `json:"identity"` // of the snapshot
	Size       int64     `json:"size"`     // of the VDI, bytes
	ObjectSize int64     `json:"object_size"`
	Taken      time.Time `json:"taken"`
	// Base is the identity of the snapshot that the records are the difference to; "" for
	// a full backup.
	Base    string `json:"base,omitempty"`
	BaseTag string `json:"base_tag,omitempty"`
}

// Writer writes one backup.
type Writer struct {
	w       io.Writer
	records uint64
	bytes   uint64
	at      uint64 // end of the last record
	ended   bool
}

// NewWriter writes the header to w.
func NewWriter(w io.Writer, h Header) (*Writer, error) {
	j, err := json.Marshal(h)
	if err != nil {
		return nil, fmt.Errorf("encode backup header: %w", err)
	}
	if len(j) > maxHeader {
		return nil, fmt.Errorf("backup header of %d bytes is too long", len(j))
	}
	b := append([]byte(magic), 0, 0, 0, 0)
	binary.LittleEndian.PutUint32(b[len(magic):], uint32(len(j)))
	b = binary.LittleEndian.AppendUint64(append(b, j...), xxh3.Hash(j))
	if _, err := w.Write(b); err != nil {
		return nil, fmt.Errorf("write backup: %w", err)
	}
	return &Writer{w: w}, nil
}

const (
	kindData = 'D'
	kindZero = 'Z'
	kindEnd  = 'E'
	headSize = 17
)

func head(kind byte, off, n uint64) []byte {
	b := append(make([]byte, 0, headSize+8), kind)
	b = binary.LittleEndian.AppendUint64(b, off)
	b = binary.LittleEndian.AppendUint64(b, n)
	return binary.LittleEndian.AppendUint64(b, xxh3.Hash(b))
}

// Data adds content. p is at most MaxData long, and behind all added before.
func (w *Writer) Data(off int64, p []byte) error {
	if len(p) > MaxData || len(p) == 0 {
		return fmt.Errorf("backup record of %d bytes: must be 1 to %d", len(p), MaxData)
	}
	if err := w.record(kindData, off, int64(len(p))); err != nil {
		return err
	}
	sum := binary.LittleEndian.AppendUint64(nil, xxh3.Hash(p))
	if _, err := w.w.Write(p); err != nil {
		return fmt.Errorf("write backup: %w", err)
	}
	if _, err := w.w.Write(sum); err != nil {
		return fmt.Errorf("write backup: %w", err)
	}
	return nil
}

// Zero adds a run of zeros, behind all added before.
func (w *Writer) Zero(off, n int64) error { return w.record(kindZero, off, n) }

func (w *Writer) record(kind byte, off, n int64) error {
	if w.ended || off < 0 || n <= 0 || off > maxSize-n || uint64(off) < w.at {
		return fmt.Errorf("backup record of %d bytes at %d is out of order", n, off)
	}
	w.records++
	w.bytes += uint64(n)
	w.at = uint64(off + n)
	if _, err := w.w.Write(head(kind, uint64(off), uint64(n))); err != nil {
		return fmt.Errorf("write backup: %w", err)
	}
	return nil
}

// Close ends the stream: without it a reader takes the backup for cut off. It does not
// close the underlying writer.
func (w *Writer) Close() error {
	w.ended = true
	if _, err := w.w.Write(head(kindEnd, w.records, w.bytes)); err != nil {
		return fmt.Errorf("write backup: %w", err)
	}
	return nil
}

// Record is a piece of a backup.
type Record struct {
	Off  int64
	Len  int64
	Data []byte // nil: zeros. Valid until the next call of Next
}

// Reader reads one backup.
type Reader struct {
	r       io.Reader
	header  Header
	buf     []byte
	records uint64
	bytes   uint64
	at      uint64
}

// NewReader reads the header.
func NewReader(r io.Reader) (*Reader, error) {
	var b [len(magic) + 4]byte
	if err := readFull(r, b[:]); err != nil {
		return nil, err
	}
	n := binary.LittleEndian.Uint32(b[len(magic):])
	if string(b[:len(magic)]) != magic || n > maxHeader {
		return nil, fmt.Errorf("%w: it does not begin like one", ErrFormat)
	}
	j := make([]byte, n+8)
	if err := readFull(r, j); err != nil {
		return nil, err
	}
	d := &Reader{r: r}
	if xxh3.Hash(j[:n]) != binary.LittleEndian.Uint64(j[n:]) {
		return nil, fmt.Errorf("%w: its header is damaged", ErrFormat)
	}
	if err := json.Unmarshal(j[:n], &d.header); err != nil {
		return nil, fmt.Errorf("%w: header: %v", ErrFormat, err)
	}
	if d.header.Size < 0 || d.header.Size > maxSize {
		return nil, fmt.Errorf("%w: size of %d bytes", ErrFormat, d.header.Size)
	}
	return d, nil
}

// Header describes the backup.
func (r *Reader) Header() Header { return r.header }

func readFull(r io.Reader, p []byte) error {
	_, err := io.ReadFull(r, p)
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return fmt.Errorf("%w: it is cut off", ErrFormat)
	}
	if err != nil {
		return fmt.Errorf("read backup: %w", err)
	}
	return nil
}

// Next returns the next record, or io.EOF after the last one of a complete backup.
// Damage is an ErrFormat; records before it were sound.
func (r *Reader) Next() (Record, error) {
	var b [headSize + 8]byte
	if err := readFull(r.r, b[:]); err != nil {
		return Record{}, err
	}
	if xxh3.Hash(b[:headSize]) != binary.LittleEndian.Uint64(b[headSize:]) {
		return Record{}, fmt.Errorf("%w: record %d is damaged", ErrFormat, r.records)
	}
	kind, off, n := b[0], binary.LittleEndian.Uint64(b[1:]), binary.LittleEndian.Uint64(b[9:])
	if kind == kindEnd {
		if off != r.records || n != r.bytes {
			return Record{}, fmt.Errorf("%w: it has %d records, and should have %d", ErrFormat, r.records, off)
		}
		return Record{}, io.EOF
	}
	size := uint64(r.header.Size)
	if off < r.at || off > size || n == 0 || n > size-off || kind == kindData && n > MaxData {
		return Record{}, fmt.Errorf("%w: record %d is for %d bytes at %d, which cannot be", ErrFormat, r.records, n, off)
	}
	rec := Record{Off: int64(off), Len: int64(n)}
	switch kind {
	case kindZero:
	case kindData:
		data, err := r.data(int(n), rec.Off)
		if err != nil {
			return Record{}, err
		}
		rec.Data = data
	default:
		return Record{}, fmt.Errorf("%w: record %d has an unknown kind", ErrFormat, r.records)
	}
	r.records++
	r.bytes += n
	r.at = off + n
	return rec, nil
}

func (r *Reader) data(n int, off int64) ([]byte, error) {
	if cap(r.buf) < n+8 {
		r.buf = make([]byte, n+8)
	}
	b := r.buf[:n+8]
	if err := readFull(r.r, b); err != nil {
		return nil, err
	}
	if xxh3.Hash(b[:n]) != binary.LittleEndian.Uint64(b[n:]) {
		return nil, fmt.Errorf("%w: its data at %d is damaged", ErrFormat, off)
	}
	return b[:n:n], nil
}
