package main

import (
	"io/fs"
	"syscall"
	"testing"
)

// A device that fails to make durable what was written to it has not got it; a pipe has nothing to make durable.
func TestTargetThatCannotSync(t *testing.T) {
	for _, c := range []struct {
		err    error
		cannot bool
	}{{syscall.EINVAL, true}, {syscall.ENOTSUP, true}, {syscall.EROFS, true}, {syscall.EIO, false}, {syscall.ENOSPC, false}, {syscall.EDQUOT, false}, {fs.ErrClosed, false}} {
		if err := (&fs.PathError{Op: "sync", Path: "/dev/x", Err: c.err}); cannotSync(err) != c.cannot {
			t.Errorf("%v: cannotSync is %v", err, !c.cannot)
		}
	}
	if cannotSync(nil) {
		t.Error("nil is an error")
	}
}
