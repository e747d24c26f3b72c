package nbd

import (
	"context"
	"errors"

	"sheepdog/frontends/nbd/internal/wire"
	"sheepdog/vdi"
)

// results maps every kind of error of package vdi to what NBD can say: the error
// value of a failed command, and the reply to a failed option.
//
// NBD_ENOTSUP and NBD_EOVERFLOW are not in the table: the specification ("Error
// values") keeps them for NBD_CMD_FLAG_FAST_ZERO and for requests that are too long.
// A handshake knows no "input/output error": NBD_REP_ERR_UNKNOWN, "the requested
// export is not available", with the reason as text, is the nearest.
var results = []struct {
	kind   error
	errno  wire.Errno
	option uint32
}{
	{vdi.ErrNotFound, wire.NBD_EIO, wire.NBD_REP_ERR_UNKNOWN},
	{vdi.ErrExists, wire.NBD_EINVAL, wire.NBD_REP_ERR_INVALID},
	{vdi.ErrInvalid, wire.NBD_EINVAL, wire.NBD_REP_ERR_INVALID},
	{vdi.ErrNoSpace, wire.NBD_ENOSPC, wire.NBD_REP_ERR_UNKNOWN},
	{vdi.ErrCorrupt, wire.NBD_EIO, wire.NBD_REP_ERR_UNKNOWN},
	{vdi.ErrIO, wire.NBD_EIO, wire.NBD_REP_ERR_UNKNOWN},
	{vdi.ErrReadOnly, wire.NBD_EPERM, wire.NBD_REP_ERR_POLICY},
	{vdi.ErrLocked, wire.NBD_EPERM, wire.NBD_REP_ERR_POLICY},
	{vdi.ErrBusy, wire.NBD_EPERM, wire.NBD_REP_ERR_POLICY},
	{vdi.ErrStale, wire.NBD_EIO, wire.NBD_REP_ERR_UNKNOWN},
	{vdi.ErrUnavailable, wire.NBD_EIO, wire.NBD_REP_ERR_UNKNOWN},
	{vdi.ErrUnsupported, wire.NBD_EINVAL, wire.NBD_REP_ERR_POLICY},
	{vdi.ErrClosed, wire.NBD_ESHUTDOWN, wire.NBD_REP_ERR_SHUTDOWN},
	{context.Canceled, wire.NBD_ESHUTDOWN, wire.NBD_REP_ERR_SHUTDOWN},
	{context.DeadlineExceeded, wire.NBD_EIO, wire.NBD_REP_ERR_UNKNOWN},
}

// resultOf gives the error value of a command that failed with err.
func resultOf(err error) wire.Errno {
	if err == nil {
		return wire.NBD_SUCCESS
	}
	for _, r := range results {
		if errors.Is(err, r.kind) {
			return r.errno
		}
	}
	return wire.NBD_EIO
}

// optionResultOf gives the reply type of an option that failed with err.
func optionResultOf(err error) uint32 {
	for _, r := range results {
		if errors.Is(err, r.kind) {
			return r.option
		}
	}
	return wire.NBD_REP_ERR_UNKNOWN
}

// Why a session ends by our doing.
var (
	errProtocol  = errors.New("client violated the protocol")
	errLeft      = errors.New("connection closed without NBD_CMD_DISC")
	errAborted   = errors.New("client aborted the negotiation")
	errBackwards = errors.New("client does not speak fixed newstyle")
)
