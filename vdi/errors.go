package vdi

import "errors"

// The closed set of kinds that operations on volumes fail with. Errors wrap exactly
// one of them; frontends map the kind to their protocol's code (errors.Is), and show
// the text to people: it says what failed, why, and what to do next.
var (
	ErrNotFound    = errors.New("no such VDI or snapshot")
	ErrExists      = errors.New("name is taken")
	ErrInvalid     = errors.New("invalid argument")
	ErrNoSpace     = errors.New("no space left")
	ErrCorrupt     = errors.New("data is corrupt")
	ErrIO          = errors.New("input/output error")
	ErrReadOnly    = errors.New("read-only")
	ErrLocked      = errors.New("locked")
	ErrBusy        = errors.New("in use")
	ErrStale       = errors.New("ownership was lost")
	ErrUnavailable = errors.New("not available now")
	ErrUnsupported = errors.New("not supported")
	ErrClosed      = errors.New("closed")
)
