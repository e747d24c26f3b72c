package object

import (
	"errors"
	"fmt"
)

// The closed set of what an object operation can fail with. Layers wrap them
// (errors.Is finds them); nothing is told apart by its text.
var (
	// ErrNotFound: the object does not exist. Reads of missing objects fail with it.
	ErrNotFound = errors.New("object not found")
	// ErrNoSpace: the write needs space that the disk does not have. Nothing was changed.
	ErrNoSpace = errors.New("no space left for objects")
	// ErrTorn: the disk ran out of space in the midst of a write, against what it had said.
	// Each sector of the range is old or new. It comes together with ErrNoSpace.
	ErrTorn = errors.New("write was not completed")
	// ErrCorrupt: blocks do not match their checksum (see CorruptError). No data was returned.
	ErrCorrupt = errors.New("object is corrupt")
	// ErrIO: the disk failed. The disk is out of service.
	ErrIO = errors.New("disk failed")
	// ErrLost: some of what was completed before, and not made durable, may be lost, for who kept it has started anew. It is an
	// ErrIO, of an OpSync that would have covered it, and said once.
	ErrLost = fmt.Errorf("%w, and what was not durable is lost", ErrIO)
	// ErrInvalid: the request is outside the object or not well formed.
	ErrInvalid = errors.New("invalid object request")
	// ErrStale: the request's generation or epoch is older than one already seen (fencing).
	ErrStale = errors.New("stale generation")
	// ErrUnavailable: no replica can serve the request now.
	ErrUnavailable = errors.New("partition unavailable")
	// ErrClosed: the store or node is shutting down.
	ErrClosed = errors.New("closed")
)

// CorruptError says which blocks of which object failed their checksum. It is an ErrCorrupt.
type CorruptError struct {
	Key    Key
	Blocks []uint32 // block numbers within the object, ascending; at most a few are listed
	Disk   string   // directory of the disk
}

// Error implements error.
func (e *CorruptError) Error() string {
	return "object " + e.Key.String() + " on disk " + e.Disk + ": checksum mismatch"
}

// Is makes errors.Is(err, ErrCorrupt) true.
func (e *CorruptError) Is(target error) bool { return target == ErrCorrupt }
