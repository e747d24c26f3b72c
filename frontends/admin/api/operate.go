package api

import (
	"context"
	"net/http"
	"net/url"
)

// Recovery tells how far data is where it shall be.
type Recovery struct {
	Enabled     bool           `json:"enabled"`     // data is moved when nodes come, go for long, or change weight
	OutAfter    int64          `json:"out_after"`   // seconds, as in Cluster
	Partitions  int            `json:"partitions"`  // of all policies
	Degraded    int            `json:"degraded"`    // partitions with fewer replicas in sync than copies
	Unavailable int            `json:"unavailable"` // partitions that cannot be written
	Moving      int            `json:"moving"`      // partitions that are held by others than shall hold them
	Nodes       []NodeRecovery `json:"nodes"`       // that have anything to do with it
	Transfers   []Transfer     `json:"transfers"`   // that are under way
	// Of all transfers together. LeftBytes are estimated: it is not known before which
	// objects differ. ETA is in seconds, -1 if nobody knows.
	LeftObjects    int64    `json:"left_objects"`
	LeftBytes      int64    `json:"left_bytes"`
	DoneBytes      int64    `json:"done_bytes"`
	BytesPerSecond float64  `json:"bytes_per_second"`
	ETA            int64    `json:"eta"`
	Silent         []string `json:"silent,omitempty"` // nodes that did not say what they transfer
}

// Transfer is what one node brings to another one.
type Transfer struct {
	Source         string  `json:"source"`
	Node           string  `json:"node"`
	Partitions     int     `json:"partitions"`
	Objects        int64   `json:"objects"` // to be looked at yet
	Listing        bool    `json:"listing"` // not all of them are known
	DoneObjects    int64   `json:"done_objects"`
	DoneBytes      int64   `json:"done_bytes"` // that differed
	LeftBytes      int64   `json:"left_bytes"` // estimated
	BytesPerSecond float64 `json:"bytes_per_second"`
	ETA            int64   `json:"eta"`             // seconds, -1: nobody knows
	Waits          string  `json:"waits,omitempty"` // for what, and what to do
}

// ScrubState tells how the reading of all that a node has is going, if somebody asked for it.
type ScrubState struct {
	Running bool    `json:"running"`
	Done    float64 `json:"done"`            // 0 to 1, the least of its disks
	Error   string  `json:"error,omitempty"` // of the last one
}

// NodeRecovery tells what a node has to do with recovery.
type NodeRecovery struct {
	Node     string `json:"node"`
	State    string `json:"state"`    // up, down
	Why      string `json:"why"`      // drained, out, or ""
	Learning int    `json:"learning"` // partitions that it is being brought in sync with
	Missing  int    `json:"missing"`  // partitions that it shall hold and does not, those included
	Leaving  int    `json:"leaving"`  // partitions that it holds until others do
}

// Partition tells who holds one partition of a policy. Nodes are names.
type Partition struct {
	Policy    int      `json:"policy"`
	Partition int      `json:"partition"`
	Epoch     uint64   `json:"epoch"`
	InSync    []string `json:"in_sync"` // the primary first
	Targets   []string `json:"targets"` // who shall hold it
	Learners  []string `json:"learners"`
}

// RecoverySettings is the body of PUT /recovery: what is not set stays as it is.
type RecoverySettings struct {
	Enabled  *bool  `json:"enabled,omitempty"`
	OutAfter *int64 `json:"out_after,omitempty"` // seconds; 0: the default; negative: never
}

// Names are the names of nodes.
type Names struct {
	Nodes []string `json:"nodes"`
}

// WeightRequest is the body of PUT /nodes/{node}/weight.
type WeightRequest struct {
	Percent int `json:"percent"` // of its disks' weight that counts for placement, 1 to 1000
}

// CopiesRequest is the body of PUT /cluster/copies and of PUT /vdis/{name}/copies.
type CopiesRequest struct {
	Copies int `json:"copies"` // of volumes that do not choose, from now on
}

// DiskRequest is the body of POST /node/disks.
type DiskRequest struct {
	Path  string `json:"path"`            // a directory on the node
	Empty bool   `json:"empty,omitempty"` // it is a disk of the node's that was away: what it holds is removed first
}

// Recovery tells how far data is where it shall be.
func (c *Client) Recovery(ctx context.Context) (Recovery, error) {
	return get[Recovery](ctx, c, "/recovery", nil)
}

// Partitions lists the partitions of all policies, or with node those that it holds, shall
// hold or learns.
func (c *Client) Partitions(ctx context.Context, node string) ([]Partition, error) {
	return get[[]Partition](ctx, c, "/partitions", values("node", node))
}

// SetRecovery changes when data is moved.
func (c *Client) SetRecovery(ctx context.Context, q RecoverySettings) (v Recovery, err error) {
	return v, c.call(ctx, http.MethodPut, "/recovery", nil, q, &v)
}

// ForceRecovery has the data of nodes that are down brought elsewhere now, and names them.
func (c *Client) ForceRecovery(ctx context.Context) (v Names, err error) {
	return v, c.call(ctx, http.MethodPost, "/recovery/force", nil, nil, &v)
}

// onNode calls a path below a node's.
func onNode[T any](ctx context.Context, c *Client, method, node, below string, query url.Values, body any) (v T, err error) {
	if node == "" || node == "." || node == ".." {
		return v, &Error{Kind: KindInvalid, Message: "a node's name is missing"}
	}
	return v, c.call(ctx, method, "/nodes/"+url.PathEscape(node)+below, query, body, &v)
}

// Drain brings a node's data to others. With force also if fewer nodes than copies are left.
func (c *Client) Drain(ctx context.Context, node string, force bool) (Node, error) {
	return onNode[Node](ctx, c, http.MethodPut, node, "/drain", whether("force", force), nil)
}

// Undrain lets a node hold data again.
func (c *Client) Undrain(ctx context.Context, node string) (Node, error) {
	return onNode[Node](ctx, c, http.MethodDelete, node, "/drain", nil, nil)
}

// SetWeight sets how much of the weight of a node's disks counts.
func (c *Client) SetWeight(ctx context.Context, node string, percent int) (Node, error) {
	return onNode[Node](ctx, c, http.MethodPut, node, "/weight", nil, WeightRequest{Percent: percent})
}

// RemoveNode makes a node one that is gone for good. With force, which must be its name, also
// if only it has some of the data, which is lost then.
func (c *Client) RemoveNode(ctx context.Context, node, force string) (Names, error) {
	return onNode[Names](ctx, c, http.MethodDelete, node, "", values("force", force), nil)
}

// Lost is what was given up.
type Lost struct {
	Node       string `json:"node"`
	Partitions int    `json:"partitions"`
}

// GiveUpDisks declares lost what only a node had on disks that it lacks. force is its name.
func (c *Client) GiveUpDisks(ctx context.Context, node, force string) (Lost, error) {
	return onNode[Lost](ctx, c, http.MethodPost, node, "/lost", values("force", force), nil)
}

// SetCopies makes volumes that do not choose keep so many copies.
func (c *Client) SetCopies(ctx context.Context, copies int) (v Cluster, err error) {
	return v, c.call(ctx, http.MethodPut, "/cluster/copies", nil, CopiesRequest{Copies: copies}, &v)
}

// ShutdownNode stops the daemon of a node, or with "" of the one that is asked. Another one
// has stopped when this returns.
func (c *Client) ShutdownNode(ctx context.Context, node string) (v Names, err error) {
	return v, c.call(ctx, http.MethodPost, "/node/shutdown", values("node", node), nil, &v)
}

// Plug adds a disk to a node while it runs.
func (c *Client) Plug(ctx context.Context, node string, q DiskRequest) (v Disk, err error) {
	return v, c.call(ctx, http.MethodPost, "/node/disks", values("node", node), q, &v)
}

// Unplug takes a disk, by its path or id, out of a node while it runs.
func (c *Client) Unplug(ctx context.Context, node, disk string) (v Disk, err error) {
	return v, c.call(ctx, http.MethodDelete, "/node/disks", values("node", node, "disk", disk), nil, &v)
}

func whether(key string, b bool) url.Values {
	if b {
		return values(key, "true")
	}
	return nil
}
