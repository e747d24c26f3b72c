package peer

import (
	"context"
	"errors"
	"fmt"
	"unicode/utf8"

	"sheepdog/storage/object"
)

// What a Call can fail with beside what its Handler fails with. errors.Is finds them.
var (
	// ErrDisconnected: the connection is not there, or was lost. Whether the request was
	// carried out is not known, unless Call.Sent is false.
	ErrDisconnected = errors.New("not connected")
	// ErrBusy: more calls wait for the connection than may.
	ErrBusy = errors.New("too many calls wait for the node")
	// ErrTimeout: the call's deadline has passed. Whether the request was or will be
	// carried out is not known, unless Call.Sent is false.
	ErrTimeout = errors.New("no answer in time")
	// ErrUnsupported: the other node knows no such operation.
	ErrUnsupported = errors.New("operation is not supported by the node")
	// ErrRemote: the other node failed for a reason that has no code.
	ErrRemote = errors.New("failed on the node")
	// ErrTooLong: the call's head, data or reply is beyond MaxHead or MaxData, or the
	// reply is longer than the call has room for.
	ErrTooLong = errors.New("message is too long")
	// ErrClosed: the Transport or the Peer was closed.
	ErrClosed = errors.New("transport is closed")
)

// FirstErrorCode is the first code of Config.Errors.
const FirstErrorCode = 256

// kinds are the failures that travel as codes. Codes are never given to another kind.
var kinds = map[uint16]error{
	1: object.ErrNotFound,
	2: object.ErrNoSpace,
	3: object.ErrCorrupt,
	4: object.ErrIO,
	5: object.ErrInvalid,
	6: object.ErrStale,
	7: object.ErrUnavailable,
	8: object.ErrClosed,

	64: context.Canceled,
	65: context.DeadlineExceeded,
	66: ErrUnsupported,
	67: ErrBusy,
	68: ErrTooLong,
	69: ErrDisconnected,
	70: ErrTimeout,

	codeUnknown: ErrRemote,
}

const codeUnknown = 255

// maxErrorText bounds the text that travels with a code, in bytes.
const maxErrorText = 1024

// errorTable is kinds with Config.Errors.
type errorTable struct {
	byCode  map[uint16]error
	ordered []uint16 // codes in the order in which errors are matched
}

func newErrorTable(own map[uint16]error) (*errorTable, error) {
	t := &errorTable{byCode: map[uint16]error{}}
	add := func(code uint16, kind error) {
		t.byCode[code] = kind
		t.ordered = append(t.ordered, code)
	}
	for code := range uint16(codeUnknown) {
		if kind, ok := kinds[code]; ok {
			add(code, kind)
		}
	}
	for code, kind := range own {
		if code < FirstErrorCode || kind == nil {
			return nil, fmt.Errorf("error %q cannot have code %d", kind, code)
		}
	}
	for code := 1<<16 - 1; code >= FirstErrorCode; code-- {
		if kind, ok := own[uint16(code)]; ok {
			add(uint16(code), kind)
		}
	}
	t.byCode[codeUnknown] = ErrRemote
	return t, nil
}

// encode turns an error into what travels. A kind by itself needs no text.
func (t *errorTable) encode(err error) (code uint16, text string) {
	if err == nil {
		return 0, ""
	}
	code = codeUnknown
	for _, c := range t.ordered {
		if kind := t.byCode[c]; err == kind {
			return c, ""
		} else if code == codeUnknown && errors.Is(err, kind) {
			code = c
		}
	}
	text = err.Error()
	if len(text) > maxErrorText {
		cut := maxErrorText
		for cut > 0 && !utf8.RuneStart(text[cut]) {
			cut--
		}
		text = text[:cut]
	}
	return code, text
}

// decode turns it back. node is where the failure came from.
func (t *errorTable) decode(node string, code uint16, text []byte) error {
	kind, ok := t.byCode[code]
	if !ok {
		kind = ErrRemote // of a later version
	}
	if len(text) == 0 && kind != ErrRemote {
		return kind
	}
	return &RemoteError{Node: node, Code: code, Kind: kind, Text: string(text[:min(len(text), maxErrorText)])}
}

// RemoteError is a failure on another node.
type RemoteError struct {
	Node string // where it failed
	Code uint16
	Kind error  // what errors.Is finds: of package object, of this package, or of Config.Errors
	Text string // the other node's words
}

// Error implements error.
func (e *RemoteError) Error() string {
	if e.Text == "" {
		return fmt.Sprintf("node %s: %v", e.Node, e.Kind)
	}
	return fmt.Sprintf("node %s: %q", e.Node, e.Text)
}

// Unwrap returns Kind.
func (e *RemoteError) Unwrap() error { return e.Kind }
