package api

import "errors"

// Kind says what kind of failure an Error is.
type Kind string

// Kinds of errors. The first thirteen are those of operations on volumes.
const (
	KindNotFound    Kind = "not_found"
	KindExists      Kind = "exists"
	KindInvalid     Kind = "invalid"
	KindNoSpace     Kind = "no_space"
	KindCorrupt     Kind = "corrupt"
	KindIO          Kind = "io"
	KindReadOnly    Kind = "read_only"
	KindLocked      Kind = "locked"
	KindBusy        Kind = "busy"
	KindStale       Kind = "stale"
	KindUnavailable Kind = "unavailable"
	KindUnsupported Kind = "unsupported"
	KindClosed      Kind = "closed"

	KindUnauthorized Kind = "unauthorized" // no token, or the wrong one
	KindForbidden    Kind = "forbidden"    // a call that a foreign web page may have made
	KindNoRoute      Kind = "no_route"     // the API has no such call
	KindMethod       Kind = "method"       // the call is there, by another method
	KindOverloaded   Kind = "overloaded"   // too many transfers at once
	KindInternal     Kind = "internal"     // a fault of the server's

	KindUnreachable Kind = "unreachable" // made by the client: there was no answer
	KindBroken      Kind = "broken"      // made by the client: the connection broke, or the answer made no sense
	KindInterrupted Kind = "interrupted" // made by the client: its caller gave up
)

// Error is how a call fails. Message says what failed and why, Hint what to do next; both
// are for people, Kind is for programs.
type Error struct {
	Kind    Kind   `json:"kind"`
	Message string `json:"message"`
	Hint    string `json:"hint,omitempty"`
}

// Error implements error.
func (e *Error) Error() string { return e.Message }

// KindOf tells the kind of an error that a Client returned; "" if it has none.
func KindOf(err error) Kind {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Kind
	}
	return ""
}
