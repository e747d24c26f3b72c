package admin

import (
	"errors"
	"fmt"
	"net/http"

	"sheepdog/frontends/admin/api"
	"sheepdog/storage/object"
	"sheepdog/vdi"
)

// refusal is an error of this package's own.
type refusal struct {
	kind    api.Kind
	message string
	hint    string
}

func (r *refusal) Error() string { return r.message }

func refuse(kind api.Kind, format string, args ...any) *refusal {
	return &refusal{kind: kind, message: fmt.Sprintf(format, args...)}
}

func (r *refusal) withHint(hint string) *refusal { r.hint = hint; return r }

// hinted gives errors of one kind a hint that fits the call better.
func hinted(err error, kind api.Kind, hint string) error {
	if err == nil {
		return nil
	}
	if e := errorOf(err); e.Kind == kind {
		return refuse(kind, "%s", e.Message).withHint(hint)
	}
	return err
}

// kinds gives errors from below their kind; the first that fits counts. Those of volumes
// come first: what they wrap is detail.
var kinds = []struct {
	err  error
	kind api.Kind
}{
	{vdi.ErrNotFound, api.KindNotFound},
	{vdi.ErrExists, api.KindExists},
	{vdi.ErrInvalid, api.KindInvalid},
	{vdi.ErrNoSpace, api.KindNoSpace},
	{vdi.ErrCorrupt, api.KindCorrupt},
	{vdi.ErrIO, api.KindIO},
	{vdi.ErrReadOnly, api.KindReadOnly},
	{vdi.ErrLocked, api.KindLocked},
	{vdi.ErrBusy, api.KindBusy},
	{vdi.ErrStale, api.KindStale},
	{vdi.ErrUnavailable, api.KindUnavailable},
	{vdi.ErrUnsupported, api.KindUnsupported},
	{vdi.ErrClosed, api.KindClosed},

	{object.ErrNotFound, api.KindNotFound},
	{object.ErrInvalid, api.KindInvalid},
	{object.ErrNoSpace, api.KindNoSpace},
	{object.ErrCorrupt, api.KindCorrupt},
	{object.ErrIO, api.KindIO},
	{object.ErrStale, api.KindStale},
	{object.ErrUnavailable, api.KindUnavailable},
	{object.ErrClosed, api.KindClosed},

	{api.ErrStream, api.KindInvalid},
}

// kindInfo is what all errors of one kind have in common.
type kindInfo struct {
	status int
	hint   string // what to do next, unless the error knows better
}

// kindTable has every kind that the server answers with.
var kindTable = map[api.Kind]kindInfo{
	api.KindNotFound:     {http.StatusNotFound, `"dog vdi list" shows what there is`},
	api.KindExists:       {http.StatusConflict, ""},
	api.KindInvalid:      {http.StatusBadRequest, ""},
	api.KindNoSpace:      {http.StatusInsufficientStorage, `delete snapshots or VDIs that are not needed; "dog node md info" shows the disks`},
	api.KindCorrupt:      {http.StatusInternalServerError, `"dog vdi check" tells what is affected; restore that from a backup, or write over it`},
	api.KindIO:           {http.StatusInternalServerError, `"dog node md info" shows which disk failed, the daemon's log why`},
	api.KindReadOnly:     {http.StatusForbidden, `snapshots cannot be written: "dog vdi clone" makes a VDI of one that can`},
	api.KindLocked:       {http.StatusLocked, `"dog vdi lock list" shows who has the lock, "dog vdi lock unlock" removes it`},
	api.KindBusy:         {http.StatusConflict, `disconnect its clients first: "dog session list" shows them`},
	api.KindStale:        {http.StatusConflict, "another gateway has taken the VDI over; try again"},
	api.KindUnavailable:  {http.StatusServiceUnavailable, `"dog cluster info" tells what is missing`},
	api.KindUnsupported:  {http.StatusNotImplemented, ""},
	api.KindClosed:       {http.StatusServiceUnavailable, "the node is stopping: try again when it is back"},
	api.KindUnauthorized: {http.StatusUnauthorized, "give the token with --token FILE or in DOG_TOKEN"},
	api.KindForbidden:    {http.StatusForbidden, ""},
	api.KindNoRoute:      {http.StatusNotFound, api.Prefix + "/openapi.json lists what there is"},
	api.KindMethod:       {http.StatusMethodNotAllowed, api.Prefix + "/openapi.json lists what there is"},
	api.KindOverloaded:   {http.StatusServiceUnavailable, "wait for other transfers to end"},
	api.KindInternal:     {http.StatusInternalServerError, "the daemon's log says more"},
}

// errorOf makes of any error what clients are told.
func errorOf(err error) *api.Error {
	if r, ok := errors.AsType[*refusal](err); ok {
		hint := r.hint
		if hint == "" {
			hint = kindTable[r.kind].hint
		}
		return &api.Error{Kind: r.kind, Message: err.Error(), Hint: hint}
	}
	if e, ok := errors.AsType[*api.Error](err); ok {
		return e
	}
	for _, k := range kinds {
		if errors.Is(err, k.err) {
			return &api.Error{Kind: k.kind, Message: err.Error(), Hint: kindTable[k.kind].hint}
		}
	}
	return &api.Error{Kind: api.KindInternal, Message: err.Error(), Hint: kindTable[api.KindInternal].hint}
}

func statusOf(k api.Kind) int {
	if i, ok := kindTable[k]; ok {
		return i.status
	}
	return http.StatusInternalServerError
}
