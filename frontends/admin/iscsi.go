package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"

	"sheepdog/frontends/admin/api"
	"sheepdog/vdi"
)

// Targets are the iSCSI targets of the cluster. Errors may be *api.Error, with what to do.
type Targets interface {
	// List lists all, by name.
	List() []api.Target
	CreateGroup(ctx context.Context, q api.GroupRequest) (api.Target, error)
	DeleteGroup(ctx context.Context, name string) error
	AddLUN(ctx context.Context, name string, q api.LUNRequest) (api.Target, error)
	RemoveLUN(ctx context.Context, name string, lun int) (api.Target, error)
	SetAccess(ctx context.Context, name string, q api.AccessRequest) (api.Target, error)
	SetChap(ctx context.Context, name string, q api.ChapEntry) (api.Target, error)
	RemoveChap(ctx context.Context, name, initiator string) (api.Target, error)
	// Version is how far this node knows what was changed; Await returns when it knows so far.
	Version() uint64
	Await(ctx context.Context, version uint64) error
	// Logout has sessions of this node end, and returns how many.
	Logout(q api.LogoutRequest) int
}

const (
	targetPath = api.Prefix + "/iscsi/targets/{name}"
	logoutPath = api.Prefix + "/iscsi/logout"
	knownPath  = api.Prefix + "/iscsi/known"
)

// iscsiRoutes are about iSCSI: any node knows, and can do, the same.
var iscsiRoutes = []route{
	{method: "GET", path: api.Prefix + "/iscsi/targets", summary: "All iSCSI targets", answer: []api.Target{}, answers: (*call).targets},
	{method: "POST", path: api.Prefix + "/iscsi/targets", summary: "Make a target of several VDIs",
		body: api.GroupRequest{}, status: http.StatusCreated, answer: api.Target{}, answers: (*call).createGroup},
	{method: "GET", path: targetPath, summary: "One iSCSI target", answer: api.Target{}, answers: (*call).target},
	{method: "DELETE", path: targetPath, summary: "Remove a target of several VDIs; those stay", answers: (*call).deleteGroup},
	{method: "POST", path: targetPath + "/luns", summary: "Make a VDI or snapshot a unit of a group",
		body: api.LUNRequest{}, status: http.StatusCreated, answer: api.Target{}, answers: (*call).addLUN},
	{method: "DELETE", path: targetPath + "/luns/{lun}", summary: "Take a unit out of a group; the others keep their numbers", answer: api.Target{}, answers: (*call).removeLUN},
	{method: "PUT", path: targetPath + "/access", summary: "Change who may log in to a target, from now on", body: api.AccessRequest{}, answer: api.Target{}, answers: (*call).setAccess},
	{method: "PUT", path: targetPath + "/chap", summary: "Set by which credentials initiators log in to a target", body: api.ChapEntry{}, answer: api.Target{}, answers: (*call).setChap},
	{method: "DELETE", path: targetPath + "/chap", summary: "Undo that", answer: api.Target{}, answers: (*call).removeChap,
		query: []param{{"initiator", "string", "whose entry; without it, that for all without one of their own"}}},
}

// logoutRoute is one of nodeRoutes: each node has its own sessions.
var logoutRoute = route{method: "POST", path: logoutPath, perNode: true, summary: "End iSCSI sessions of a node",
	body: api.LogoutRequest{}, answer: api.LoggedOut{}, answers: (*call).logout,
	query: []param{{"all", "boolean", "whether to end those of all nodes"}}}

// knownRoute is how a node is asked whether it knows of a change: it counts on all gateways when it is answered.
var knownRoute = route{method: "GET", path: knownPath, perNode: true, summary: "Wait until a node knows what was changed of iSCSI targets",
	answer: api.Known{}, answers: (*call).known, query: []param{{"version", "integer", "of the change; default: all that it knows"}}}

var errNoTargets = fmt.Errorf("this daemon has no iSCSI: %w", vdi.ErrUnsupported)

const targetHint = `"dog iscsi target list" shows the targets there are`

// withTargets has fn answer, if there are targets.
func (c *call) withTargets(fn func(Targets) (any, error)) (any, error) {
	if c.s.cfg.Targets == nil {
		return nil, errNoTargets
	}
	v, err := fn(c.s.cfg.Targets)
	if err != nil {
		return nil, hinted(err, api.KindNotFound, targetHint)
	}
	return v, nil
}

// change reads the body and has fn do what it asks for.
func change[Q any](c *call, fn func(Targets, Q) (api.Target, error)) (any, error) {
	var q Q
	if err := c.body(&q); err != nil {
		return nil, err
	}
	return c.altering(func(t Targets) (any, error) { return fn(t, q) })
}

// altering is withTargets for what changes something: other gateways know it when it is answered.
func (c *call) altering(fn func(Targets) (any, error)) (any, error) {
	v, err := c.withTargets(fn)
	if err != nil {
		return nil, err
	}
	query := url.Values{"version": {strconv.FormatUint(c.s.cfg.Targets.Version(), 10)}}.Encode()
	_, failed := askAll[api.Known](c.r.Context(), c.s, question{Method: http.MethodGet, Path: knownPath, Query: query})
	again := "it need not be done again" // that would say that it is there, or not there
	if c.r.Method == http.MethodPut {
		again = "repeat the call to ask again"
	}
	for node, err := range failed {
		return nil, refuse(api.KindUnavailable, "it is changed, but node %q has not confirmed that it knows: %v", node, err).withHint("sessions may still begin there by the old rules until it does; " + again)
	}
	return v, nil
}

// known answers when this node knows a change.
func (c *call) known() (any, error) {
	version, err := c.number("version", 0)
	if err != nil {
		return nil, err
	}
	if c.s.cfg.Targets == nil { // it has no sessions that this could matter to
		return api.Known{}, nil
	}
	if err := c.s.cfg.Targets.Await(c.r.Context(), uint64(version)); err != nil {
		return nil, err
	}
	return api.Known{Version: c.s.cfg.Targets.Version()}, nil
}

func (c *call) targets() (any, error) {
	return c.s.targets(), nil
}

func (s *Server) targets() []api.Target {
	if s.cfg.Targets == nil {
		return []api.Target{}
	}
	return orEmpty(s.cfg.Targets.List())
}

func (c *call) target() (any, error) {
	for _, x := range c.s.targets() {
		if x.Name == c.name() {
			return x, nil
		}
	}
	return nil, refuse(api.KindNotFound, "there is no target %.300q", c.name()).withHint(targetHint)
}

func (c *call) createGroup() (any, error) {
	return change(c, func(t Targets, q api.GroupRequest) (api.Target, error) { return t.CreateGroup(c.r.Context(), q) })
}

func (c *call) deleteGroup() (any, error) {
	return c.altering(func(t Targets) (any, error) { return nil, t.DeleteGroup(c.r.Context(), c.name()) })
}

func (c *call) addLUN() (any, error) {
	return change(c, func(t Targets, q api.LUNRequest) (api.Target, error) { return t.AddLUN(c.r.Context(), c.name(), q) })
}

func (c *call) removeLUN() (any, error) {
	n, err := strconv.Atoi(c.r.PathValue("lun"))
	if err != nil {
		return nil, refuse(api.KindInvalid, "%.60q is no number of a unit", c.r.PathValue("lun"))
	}
	return c.altering(func(t Targets) (any, error) { return t.RemoveLUN(c.r.Context(), c.name(), n) })
}

func (c *call) setAccess() (any, error) {
	return change(c, func(t Targets, q api.AccessRequest) (api.Target, error) {
		return t.SetAccess(c.r.Context(), c.name(), q)
	})
}

func (c *call) setChap() (any, error) {
	return change(c, func(t Targets, q api.ChapEntry) (api.Target, error) { return t.SetChap(c.r.Context(), c.name(), q) })
}

func (c *call) removeChap() (any, error) {
	return c.altering(func(t Targets) (any, error) {
		return t.RemoveChap(c.r.Context(), c.name(), c.query("initiator"))
	})
}

// logout ends sessions here, or everywhere. A node without iSCSI has none.
func (c *call) logout() (any, error) {
	var q api.LogoutRequest
	if err := c.body(&q); err != nil {
		return nil, err
	}
	if q.Target == "" {
		return nil, refuse(api.KindInvalid, "no target is named")
	}
	all, err := c.flag("all")
	if err != nil {
		return nil, err
	}
	var sum api.LoggedOut
	if c.s.cfg.Targets != nil {
		sum.Sessions = c.s.cfg.Targets.Logout(q)
	}
	if !all {
		return sum, nil
	}
	body, err := json.Marshal(q)
	if err != nil {
		return nil, fmt.Errorf("encode a question: %w", err)
	}
	answers, failed := askAll[api.LoggedOut](c.r.Context(), c.s, question{Method: http.MethodPost, Path: logoutPath, Body: body})
	for _, a := range answers {
		sum.Sessions += a.Sessions
	}
	var errs []error
	for _, err := range failed {
		errs = append(errs, err)
	}
	return sum, errors.Join(errs...)
}
