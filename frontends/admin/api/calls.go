package api

import (
	"context"
	"net/http"
	"net/url"
)

// get, post, put and remove are for calls whose path needs no names.
func get[T any](ctx context.Context, c *Client, path string, query url.Values) (v T, err error) {
	return v, c.call(ctx, http.MethodGet, path, query, nil, &v)
}

func values(pairs ...string) url.Values {
	v := url.Values{}
	for i := 0; i < len(pairs); i += 2 {
		if pairs[i+1] != "" {
			v.Set(pairs[i], pairs[i+1])
		}
	}
	return v
}

// onVDI calls a path below a VDI.
func onVDI[T any](ctx context.Context, c *Client, method, name string, below []string, query url.Values, body any) (v T, err error) {
	path, err := vdiPath(name, below...)
	if err != nil {
		return v, err
	}
	return v, c.call(ctx, method, path, query, body, &v)
}

// doVDI is onVDI without an answer.
func (c *Client) doVDI(ctx context.Context, method, name string, below []string, query url.Values, body any) error {
	path, err := vdiPath(name, below...)
	if err != nil {
		return err
	}
	return c.call(ctx, method, path, query, body, nil)
}

// Version tells the versions of the daemon and of its API.
func (c *Client) Version(ctx context.Context) (ServerVersion, error) {
	return get[ServerVersion](ctx, c, "/version", nil)
}

// Cluster describes the cluster.
func (c *Client) Cluster(ctx context.Context) (Cluster, error) {
	return get[Cluster](ctx, c, "/cluster", nil)
}

// Format makes a new cluster with the node as its first member.
func (c *Client) Format(ctx context.Context, q FormatRequest) (v Cluster, err error) {
	return v, c.call(ctx, http.MethodPost, "/cluster/format", nil, q, &v)
}

// Shutdown stops the daemons of all nodes; they are on their way when this returns. With
// force also if some cannot be told.
func (c *Client) Shutdown(ctx context.Context, force bool) (v Names, err error) {
	return v, c.call(ctx, http.MethodPost, "/cluster/shutdown", whether("force", force), nil, &v)
}

// Nodes lists the members of the cluster.
func (c *Client) Nodes(ctx context.Context) ([]Node, error) {
	return get[[]Node](ctx, c, "/nodes", nil)
}

// In the calls below, node is whom they are about: "" is the node that is asked, which asks
// any other one.

// Node tells how a node is doing.
func (c *Client) Node(ctx context.Context, node string) (NodeStatus, error) {
	return get[NodeStatus](ctx, c, "/node", values("node", node))
}

// Disks tells how a node's disks are doing.
func (c *Client) Disks(ctx context.Context, node string) ([]Disk, error) {
	return get[[]Disk](ctx, c, "/node/disks", values("node", node))
}

// AllDisks tells how the disks of all nodes are doing.
func (c *Client) AllDisks(ctx context.Context) ([]Disk, error) {
	return get[[]Disk](ctx, c, "/disks", nil)
}

// LogLevel tells the least level that is logged.
func (c *Client) LogLevel(ctx context.Context, node string) (LogLevel, error) {
	return get[LogLevel](ctx, c, "/log", values("node", node))
}

// SetLogLevel sets the least level that is logged, until the daemon ends.
func (c *Client) SetLogLevel(ctx context.Context, node, level string) (v LogLevel, err error) {
	return v, c.call(ctx, http.MethodPut, "/log", values("node", node), LogLevel{Level: level}, &v)
}

// Sessions lists the clients of a node's frontends.
func (c *Client) Sessions(ctx context.Context, node string) ([]Session, error) {
	return get[[]Session](ctx, c, "/sessions", values("node", node))
}

// AllSessions lists the clients of the frontends of all nodes.
func (c *Client) AllSessions(ctx context.Context) ([]Session, error) {
	return get[[]Session](ctx, c, "/sessions", values("all", "true"))
}

// Exports lists VDIs and snapshots with the URIs for clients.
func (c *Client) Exports(ctx context.Context) ([]Export, error) {
	return get[[]Export](ctx, c, "/exports", nil)
}

// VDIs lists all VDIs and snapshots, or with name those of one VDI.
func (c *Client) VDIs(ctx context.Context, name string) ([]VDI, error) {
	return get[[]VDI](ctx, c, "/vdis", values("name", name))
}

// VDI describes a VDI, or with snapshot (a tag or number) one of its snapshots.
func (c *Client) VDI(ctx context.Context, name, snapshot string) (VDI, error) {
	return onVDI[VDI](ctx, c, http.MethodGet, name, nil, values("snapshot", snapshot), nil)
}

// Create makes a VDI.
func (c *Client) Create(ctx context.Context, q CreateRequest) (v VDI, err error) {
	return v, c.call(ctx, http.MethodPost, "/vdis", nil, q, &v)
}

// Delete deletes a VDI, or with snapshot one of its snapshots.
func (c *Client) Delete(ctx context.Context, name, snapshot string) error {
	return c.doVDI(ctx, http.MethodDelete, name, nil, values("snapshot", snapshot), nil)
}

// Resize changes the size of a VDI.
func (c *Client) Resize(ctx context.Context, name string, size int64) (VDI, error) {
	return onVDI[VDI](ctx, c, http.MethodPut, name, []string{"size"}, nil, ResizeRequest{Size: size})
}

// Snapshot takes a snapshot.
func (c *Client) Snapshot(ctx context.Context, name, tag string) (VDI, error) {
	return onVDI[VDI](ctx, c, http.MethodPost, name, []string{"snapshots"}, nil, SnapshotRequest{Tag: tag})
}

// Clone makes a VDI of a snapshot.
func (c *Client) Clone(ctx context.Context, name, snapshot, clone string) (VDI, error) {
	return onVDI[VDI](ctx, c, http.MethodPost, name, []string{"clone"}, nil, CloneRequest{Snapshot: snapshot, Name: clone})
}

// Rollback makes a VDI what it was in a snapshot.
func (c *Client) Rollback(ctx context.Context, name, snapshot string) (VDI, error) {
	return onVDI[VDI](ctx, c, http.MethodPost, name, []string{"rollback"}, nil, RollbackRequest{Snapshot: snapshot})
}

// Attributes lists the attributes of a VDI.
func (c *Client) Attributes(ctx context.Context, name string) (map[string]string, error) {
	return onVDI[map[string]string](ctx, c, http.MethodGet, name, []string{"attributes"}, nil, nil)
}

// Attribute tells one attribute.
func (c *Client) Attribute(ctx context.Context, name, key string) (Attribute, error) {
	return onVDI[Attribute](ctx, c, http.MethodGet, name, []string{"attributes", key}, nil, nil)
}

// SetAttribute sets an attribute.
func (c *Client) SetAttribute(ctx context.Context, name, key, value string) error {
	return c.doVDI(ctx, http.MethodPut, name, []string{"attributes", key}, nil, Attribute{Value: value})
}

// RemoveAttribute removes an attribute.
func (c *Client) RemoveAttribute(ctx context.Context, name, key string) error {
	return c.doVDI(ctx, http.MethodDelete, name, []string{"attributes", key}, nil, nil)
}

// Locks lists the locked VDIs.
func (c *Client) Locks(ctx context.Context) ([]Lock, error) {
	return get[[]Lock](ctx, c, "/locks", nil)
}

// Lock locks a VDI.
func (c *Client) Lock(ctx context.Context, name, holder string) error {
	return c.doVDI(ctx, http.MethodPut, name, []string{"lock"}, nil, LockRequest{Holder: holder})
}

// Unlock removes the lock of a VDI, whoever has it, or with holder only that one's.
func (c *Client) Unlock(ctx context.Context, name, holder string) error {
	return c.doVDI(ctx, http.MethodDelete, name, []string{"lock"}, values("holder", holder), nil)
}
