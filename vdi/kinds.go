package vdi

import (
	"context"
	"errors"
	"fmt"

	"sheepdog/storage/object"
	"sheepdog/vdi/catalog"
)

// kinds tells which kind of this package stands for an error of the layers below. The
// first that fits counts.
var kinds = []struct{ below, kind error }{
	{object.ErrNoSpace, ErrNoSpace},
	{object.ErrCorrupt, ErrCorrupt},
	{object.ErrIO, ErrIO},
	{object.ErrInvalid, ErrInvalid},
	{object.ErrStale, ErrStale},
	{object.ErrUnavailable, ErrUnavailable},
	{object.ErrClosed, ErrClosed},
	{object.ErrNotFound, ErrCorrupt}, // who expects it to be missing has looked before
	{catalog.ErrNotFound, ErrNotFound},
	{catalog.ErrExists, ErrExists},
	{catalog.ErrInvalid, ErrInvalid},
	{catalog.ErrBusy, ErrBusy},
	{catalog.ErrLocked, ErrLocked},
	{catalog.ErrStale, ErrStale},
	{catalog.ErrFull, ErrNoSpace},
	{context.Canceled, ErrUnavailable},
	{context.DeadlineExceeded, ErrUnavailable},
}

var ownKinds = []error{
	ErrNotFound, ErrExists, ErrInvalid, ErrNoSpace, ErrCorrupt, ErrIO, ErrReadOnly, ErrLocked, ErrBusy, ErrStale,
	ErrUnavailable, ErrUnsupported, ErrClosed,
}

// kindError gives an error from below its kind here, without a word more.
type kindError struct {
	kind, err error
}

func (e *kindError) Error() string   { return e.err.Error() }
func (e *kindError) Unwrap() []error { return []error{e.kind, e.err} }

// explain adds what was done to an error, and makes it one of this package's kinds.
func explain(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	err = fmt.Errorf(format+": %w", append(args, err)...)
	for _, k := range ownKinds {
		if errors.Is(err, k) {
			return err
		}
	}
	for _, k := range kinds {
		if errors.Is(err, k.below) {
			return &kindError{k.kind, err}
		}
	}
	return &kindError{ErrIO, err}
}
