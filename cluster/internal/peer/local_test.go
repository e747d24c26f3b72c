package peer

import (
	"errors"
	"testing"

	"sheepdog/storage/object"
)

func TestLocalRequest(t *testing.T) {
	l, err := NewLocal(map[uint16]error{FirstErrorCode: errOwn})
	if err != nil {
		t.Fatal(err)
	}
	var got error
	var head, data []byte
	ask := func(c *Call, handle func(*Request)) {
		got, head, data = nil, nil, nil
		handle(l.Request(&Identity{Name: "n1"}, c, func(r *Request, err error) { got, head, data = err, r.ReplyHead, r.ReplyData }))
	}
	ask(&Call{Class: Bulk, Op: 7, Head: []byte("h"), Data: []byte("d"), Want: 4}, func(r *Request) {
		if r.Class != Bulk || r.Op != 7 || string(r.Head) != "h" || string(r.Data) != "d" || len(r.ReplyData) != 4 || r.From.Name != "n1" {
			t.Errorf("%+v", r)
		}
		r.ReplyHead = append(r.ReplyHead, "ok"...)
		r.ReplyData = r.ReplyData[:copy(r.ReplyData, "abc")]
		r.Reply(nil)
	})
	if got != nil || string(head) != "ok" || string(data) != "abc" {
		t.Errorf("%q %q %v", head, data, got)
	}
	ask(&Call{}, func(r *Request) { r.ReplyData = []byte("too long"); r.Reply(nil) })
	if !errors.Is(got, ErrTooLong) {
		t.Error(got)
	}
	for _, kind := range []error{object.ErrNotFound, errOwn, ErrBusy} {
		ask(&Call{}, func(r *Request) { r.Reply(errors.Join(errors.New("why"), kind)) })
		var remote *RemoteError
		if !errors.Is(got, kind) || !errors.As(got, &remote) {
			t.Errorf("%v arrives as %v", kind, got)
		}
	}
	if _, err := NewLocal(map[uint16]error{7: errOwn}); err == nil {
		t.Error("a code of this package was given away")
	}
}
