package vdi

import "sheepdog/storage/object"

// Op says what a Request does.
type Op uint8

// Operations of a Request.
const (
	OpRead    Op = iota // fill Data from [Off, Off+Len)
	OpWrite             // store Data at [Off, Off+Len)
	OpZero              // make [Off, Off+Len) read as zero; whole blocks become holes unless FlagNoHole
	OpDiscard           // [Off, Off+Len) is no longer needed: reads as zero, space is given back
	OpFlush             // all writes completed before the submission are durable when it completes
	OpCache             // bring [Off, Off+Len) into memory; a hint, never fails for lack of it
)

// Flags modify a Request.
type Flags uint8

// Flags of a Request.
const (
	FlagFUA    Flags = 1 << iota // complete only when durable
	FlagNoHole                   // OpZero: the range stays allocated
)

// Request is one asynchronous operation on a Volume, in bytes, of any alignment,
// inside [0, Size()). The submitter owns it and Data again when Done is called:
// exactly once, possibly within Submit, possibly on another goroutine that holds no
// lock. Done must not block. Between Submit and Done nobody else may touch either;
// afterwards the Request may be used again (it is built for pooling).
type Request struct {
	Op    Op
	Flags Flags
	Off   int64
	Len   int64  // bytes
	Data  []byte // OpRead, OpWrite: Len bytes
	// VID, unless 0, is the vid that the request is meant for. If the volume has another one
	// by the time it is carried out, because a snapshot was taken or it was rolled back, it
	// is refused with ErrReadOnly: a change gets into a snapshot, or is not made. Not for
	// requests of more than 32 objects.
	VID  object.VID
	Done func(*Request)
	Err  error // result, valid in Done; one of this package's kinds, or Check's
	// Check, if set, is asked before a write, zero or discard is carried out, or tried
	// again, for which this node had to become the VDI's owner: this node has then applied
	// what others did before. An error fails the request.
	Check func(*Request) error

	span span // how it is carried out
}
