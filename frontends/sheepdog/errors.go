package sheepdog

import (
	"context"
	"errors"

	"sheepdog/frontends/internal/stream"
	"sheepdog/frontends/sheepdog/internal/wire"
	"sheepdog/vdi"
)

// results maps every kind of error of package vdi to what the protocol can say, first to an
// operation on an object, then to one on a VDI.
//
// QEMU and tgt take all but READONLY for an I/O error. vdi.ErrClosed is not answered while the server
// stops: see op.finish.
var results = []struct {
	kind        error
	object, vdi wire.Result
}{
	{vdi.ErrNotFound, wire.SD_RES_NO_OBJ, wire.SD_RES_NO_VDI},
	{vdi.ErrExists, wire.SD_RES_VDI_EXIST, wire.SD_RES_VDI_EXIST},
	{vdi.ErrInvalid, wire.SD_RES_INVALID_PARMS, wire.SD_RES_INVALID_PARMS},
	{vdi.ErrNoSpace, wire.SD_RES_NO_SPACE, wire.SD_RES_NO_SPACE},
	{vdi.ErrCorrupt, wire.SD_RES_EIO, wire.SD_RES_EIO},
	{vdi.ErrIO, wire.SD_RES_EIO, wire.SD_RES_EIO},
	{vdi.ErrReadOnly, wire.SD_RES_READONLY, wire.SD_RES_READONLY},
	{vdi.ErrLocked, wire.SD_RES_VDI_LOCKED, wire.SD_RES_VDI_LOCKED},
	{vdi.ErrBusy, wire.SD_RES_VDI_LOCKED, wire.SD_RES_VDI_LOCKED},
	{vdi.ErrStale, wire.SD_RES_EIO, wire.SD_RES_EIO},
	{vdi.ErrUnavailable, wire.SD_RES_HALT, wire.SD_RES_HALT},
	{vdi.ErrUnsupported, wire.SD_RES_INVALID_PARMS, wire.SD_RES_INVALID_PARMS},
	{vdi.ErrClosed, wire.SD_RES_SHUTDOWN, wire.SD_RES_SHUTDOWN},
	{context.Canceled, wire.SD_RES_SHUTDOWN, wire.SD_RES_SHUTDOWN},
	{context.DeadlineExceeded, wire.SD_RES_HALT, wire.SD_RES_HALT},
	{stream.ErrStopped, wire.SD_RES_SHUTDOWN, wire.SD_RES_SHUTDOWN},
}

// refusal is an error with the result that says it.
type refusal struct {
	result wire.Result
	text   string
}

func (r *refusal) Error() string { return r.text }

func refuse(result wire.Result, text string) error { return &refusal{result, text} }

// resultOf gives the result of an operation that failed with err.
func resultOf(err error, ofVDI bool) wire.Result {
	if err == nil {
		return wire.SD_RES_SUCCESS
	}
	var r *refusal
	if errors.As(err, &r) {
		return r.result
	}
	for _, r := range results {
		if errors.Is(err, r.kind) {
			if ofVDI {
				return r.vdi
			}
			return r.object
		}
	}
	return wire.SD_RES_EIO
}

// ours reports whether a failure is one that the operator should hear of.
func ours(r wire.Result) bool {
	return r == wire.SD_RES_EIO || r == wire.SD_RES_HALT || r == wire.SD_RES_NO_SPACE || r == wire.SD_RES_SHUTDOWN
}
