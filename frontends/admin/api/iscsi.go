package api

import (
	"context"
	"net/http"
	"net/url"
	"strconv"
)

// Target is an iSCSI target: a VDI's or snapshot's own, or a group. It is the same on all gateways.
type Target struct {
	Name  string `json:"name"` // of the VDI, of the snapshot as VDI.TAG, or of the group
	IQN   string `json:"iqn"`  // by which initiators ask for it
	Group bool   `json:"group"`
	LUNs  []LUN  `json:"luns"`
	// Initiators are the iSCSI names, Networks the addresses, that may log in, beside what the
	// gateways' configuration says; null: all.
	Initiators *[]string   `json:"initiators"`
	Networks   *[]string   `json:"networks"`
	Chap       []ChapEntry `json:"chap"`
}

// LUN is a logical unit of a target.
type LUN struct {
	LUN      int    `json:"lun"`
	VDI      string `json:"vdi"`
	Snapshot string `json:"snapshot,omitempty"` // tag or number
	Size     int64  `json:"size"`
	Missing  bool   `json:"missing"` // there is no such VDI or snapshot now: initiators do not see it
}

// ChapEntry names the credentials by which an initiator and the target prove who they are: files in
// the directory iscsi.secrets of each gateway.
type ChapEntry struct {
	Initiator  string `json:"initiator,omitempty"` // without it: all that have no entry of their own
	Credential string `json:"credential"`
	Mutual     string `json:"mutual,omitempty"` // of the target
}

// GroupRequest is the body of POST /iscsi/targets.
type GroupRequest struct {
	Name string       `json:"name"`
	LUNs []LUNRequest `json:"luns,omitempty"`
}

// LUNRequest is the body of POST /iscsi/targets/{name}/luns.
type LUNRequest struct {
	VDI      string `json:"vdi"`
	Snapshot string `json:"snapshot,omitempty"` // tag or number
	LUN      *int   `json:"lun,omitempty"`      // without it, the lowest that is free
}

// AccessRequest is the body of PUT /iscsi/targets/{name}/access: entries are iSCSI names,
// addresses and networks. AllowAll and DenyAll come first.
type AccessRequest struct {
	Allow    []string `json:"allow,omitempty"`
	Deny     []string `json:"deny,omitempty"`
	AllowAll bool     `json:"allow_all,omitempty"`
	DenyAll  bool     `json:"deny_all,omitempty"`
}

// LogoutRequest is the body of POST /iscsi/logout.
type LogoutRequest struct {
	Target    string `json:"target"`              // its name
	Initiator string `json:"initiator,omitempty"` // without it, all
	// Forbidden: only sessions that could not begin any more, by who may log in now.
	Forbidden bool `json:"forbidden,omitempty"`
}

// LoggedOut tells how many sessions are being ended.
type LoggedOut struct {
	Sessions int `json:"sessions"`
}

// Known tells how far a node knows what was changed.
type Known struct {
	Version uint64 `json:"version"`
}

// Targets lists all iSCSI targets.
func (c *Client) Targets(ctx context.Context) ([]Target, error) {
	return get[[]Target](ctx, c, "/iscsi/targets", nil)
}

func onTarget[T any](ctx context.Context, c *Client, method, name, below string, query url.Values, body any) (v T, err error) {
	if name == "" || name == "." || name == ".." {
		return v, &Error{Kind: KindInvalid, Message: "a target's name is missing"}
	}
	return v, c.call(ctx, method, "/iscsi/targets/"+url.PathEscape(name)+below, query, body, &v)
}

// Target describes one.
func (c *Client) Target(ctx context.Context, name string) (Target, error) {
	return onTarget[Target](ctx, c, http.MethodGet, name, "", nil, nil)
}

// CreateGroup makes a target of several VDIs.
func (c *Client) CreateGroup(ctx context.Context, q GroupRequest) (v Target, err error) {
	return v, c.call(ctx, http.MethodPost, "/iscsi/targets", nil, q, &v)
}

// DeleteGroup removes such a target; the VDIs stay.
func (c *Client) DeleteGroup(ctx context.Context, name string) error {
	if name == "" || name == "." || name == ".." {
		return &Error{Kind: KindInvalid, Message: "a target's name is missing"}
	}
	return c.call(ctx, http.MethodDelete, "/iscsi/targets/"+url.PathEscape(name), nil, nil, nil)
}

// AddLUN makes a VDI or snapshot a unit of a group.
func (c *Client) AddLUN(ctx context.Context, name string, q LUNRequest) (Target, error) {
	return onTarget[Target](ctx, c, http.MethodPost, name, "/luns", nil, q)
}

// RemoveLUN takes a unit out of a group.
func (c *Client) RemoveLUN(ctx context.Context, name string, lun int) (Target, error) {
	return onTarget[Target](ctx, c, http.MethodDelete, name, "/luns/"+strconv.Itoa(lun), nil, nil)
}

// SetAccess changes who may log in to a target. It counts for logins from now on.
func (c *Client) SetAccess(ctx context.Context, name string, q AccessRequest) (Target, error) {
	return onTarget[Target](ctx, c, http.MethodPut, name, "/access", nil, q)
}

// SetChap says by which credentials initiators log in to a target.
func (c *Client) SetChap(ctx context.Context, name string, q ChapEntry) (Target, error) {
	return onTarget[Target](ctx, c, http.MethodPut, name, "/chap", nil, q)
}

// RemoveChap undoes SetChap for an initiator, or with "" for all that have no entry of their own.
func (c *Client) RemoveChap(ctx context.Context, name, initiator string) (Target, error) {
	return onTarget[Target](ctx, c, http.MethodDelete, name, "/chap", values("initiator", initiator), nil)
}

// Logout ends sessions of all gateways.
func (c *Client) Logout(ctx context.Context, q LogoutRequest) (v LoggedOut, err error) {
	return v, c.call(ctx, http.MethodPost, "/iscsi/logout", values("all", "true"), q, &v)
}
