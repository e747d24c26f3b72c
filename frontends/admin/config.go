package admin

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"time"

	"sheepdog/frontends/admin/api"
	"sheepdog/storage/object"
	"sheepdog/vdi"
)

// Volumes is what the API needs of the volumes; *vdi.Service is one. Everything fails
// with the kinds of package vdi.
type Volumes interface {
	List(ctx context.Context) ([]vdi.Info, error)
	Info(ctx context.Context, name, tag string) (vdi.Info, error)
	Create(ctx context.Context, o vdi.CreateOptions) (vdi.Info, error)
	Delete(ctx context.Context, name, tag string) error
	Resize(ctx context.Context, name string, size int64) (vdi.Info, error)
	Snapshot(ctx context.Context, name, tag string) (vdi.Info, error)
	Clone(ctx context.Context, src, tag, dst string) (vdi.Info, error)
	Rollback(ctx context.Context, name, tag string) (vdi.Info, error)
	// Writer tells which other node alters the copies of a VDI better; "": this one does.
	Writer(ctx context.Context, name string) (node string, err error)
	AlterCopies(ctx context.Context, name string, copies int, begun func(vdi.Altered) error, p vdi.Progress) (vdi.Altered, error)

	Open(ctx context.Context, name, tag string, o vdi.OpenOptions) (*vdi.Volume, error)
	Diff(ctx context.Context, name, fromTag, toTag string, fn func(vdi.Extent) bool) error
	Check(ctx context.Context, name string, o vdi.CheckOptions, p vdi.Progress) (vdi.CheckReport, error)
	Backup(ctx context.Context, name, fromTag, tag string, w io.Writer, p vdi.Progress) error
	Restore(ctx context.Context, name string, r io.Reader, p vdi.Progress) (vdi.Info, error)
	// Objects calls fn for each object of a volume that is no hole, by index.
	Objects(ctx context.Context, name, tag string, fn func(vdi.ObjectInfo) bool) error

	SetAttr(ctx context.Context, name, key, value string) error
	GetAttr(ctx context.Context, name, key string) (string, error)
	DelAttr(ctx context.Context, name, key string) error
	ListAttr(ctx context.Context, name string) (map[string]string, error)

	Lock(ctx context.Context, name, holder string) error
	Unlock(ctx context.Context, name, holder string) error
	Locks(ctx context.Context) ([]vdi.LockInfo, error)

	GC() vdi.GCStatus
}

var _ Volumes = (*vdi.Service)(nil)

// Cluster is what the API needs of the node's part in the cluster. Errors are kinds of
// package vdi, or errors of package object.
type Cluster interface {
	Info() api.Cluster
	Nodes() []api.Node
	// Format makes a new cluster with this node as its first member; vdi.ErrExists if it
	// is in one.
	Format(ctx context.Context, o FormatOptions) error
	// Locate tells where an object lives.
	Locate(policy object.PolicyID, id object.ID) (api.Placement, error)
	// Ready is nil if the node serves volumes, else it says what is missing.
	Ready() error

	Operations
}

// Operations are what operators ask of the cluster, for any of its nodes by name or number.
// Errors may be *api.Error, with what to do.
type Operations interface {
	// Partitions lists those of all policies.
	Partitions() []api.Partition
	// Recovery tells how far data is where it shall be, without Transfers and what follows
	// from them.
	Recovery() api.Recovery
	// Transfers tells what this node brings to others.
	Transfers() []api.Transfer
	// CheckReplicas compares all replicas, and with repair makes them equal.
	CheckReplicas(ctx context.Context, repair bool, progress func(done, total int64)) (api.CheckReport, error)
	SetRecovery(ctx context.Context, q api.RecoverySettings) error
	ForceRecovery(ctx context.Context) (nodes []string, err error)
	Drain(ctx context.Context, node string, drain, force bool) error
	Remove(ctx context.Context, node, force string) error
	// Absent counts the partitions that are only on disks that a node lacks; GiveUp declares
	// them lost, and returns how many they were.
	Absent(node string) int
	GiveUp(ctx context.Context, node string) (partitions int, err error)
	SetWeight(ctx context.Context, node string, percent int) error
	SetCopies(ctx context.Context, copies int) error
	// Disks lists the disks of all nodes as the cluster knows them: what only a node knows
	// of its disks is not there.
	Disks() []api.Disk
	// StopNode stops another node's daemon, and returns when it is down.
	StopNode(ctx context.Context, node string) error
	// StopAll tells all other nodes to stop, and returns the names of all.
	StopAll(ctx context.Context, force bool) ([]string, error)
	// Ask has another node's Server answer a question: see Server.Answer.
	Ask(ctx context.Context, node string, question []byte) (answer []byte, err error)
}

// Plugs adds and removes disks of the node while it runs. Errors are as with Operations.
type Plugs interface {
	// Plug adds a directory. With empty it may be a disk of this node that was away: what it
	// holds is removed first.
	Plug(ctx context.Context, path string, empty bool) (api.Disk, error)
	Unplug(ctx context.Context, disk string) (api.Disk, error)
}

// FormatOptions say what a new cluster is like. Zero values stand for the defaults.
type FormatOptions struct {
	Name            string
	Copies          int
	ObjectSizeShift uint8
}

// SessionSource is a frontend with clients.
type SessionSource interface {
	// Sessions lists the clients now; ids are unique in the source.
	Sessions() []api.Session
}

// ExportPoint is an address at which a frontend offers every VDI under its own name.
type ExportPoint struct {
	Protocol string // as in api.Session
	// URI gives the address of a VDI, or with tag of its snapshot, at this point.
	URI func(name, tag string) string
}

// Metric is one sample for Prometheus: names and units by its conventions.
type Metric struct {
	Name    string
	Help    string
	Counter bool // else it is a gauge
	Labels  map[string]string
	Value   float64
}

// Config says what a Server serves. Volumes, Cluster and Node must be set; zero values of
// all else stand for the defaults.
type Config struct {
	Volumes Volumes
	Cluster Cluster
	Disks   func() []api.Disk // of this node; default: none
	Plugs   Plugs             // nil: disks come and go with the configuration
	Targets Targets           // nil: there is no iSCSI
	// Scrub reads all that the disks have, notes what is corrupt, and with repair brings that
	// from other nodes as far as this one is who does so. Default: nothing.
	Scrub   func(ctx context.Context, repair bool) error
	Node    string // this node's name
	Version string // of the program; default "unknown"

	Sessions []SessionSource
	Exports  func() []ExportPoint // default: none
	// Metrics are served beside the package's own; called at each scrape.
	Metrics func() []Metric

	// Level is the log's, read and set over the API; without it both are unsupported.
	Level *slog.LevelVar
	// Shutdown asks the process to stop in an orderly way, and returns at once; without
	// it a shutdown is unsupported.
	Shutdown func()

	// Token, if set, must come with every call ("Authorization: Bearer …"), but for those
	// of /healthz, /readyz and the page itself.
	Token string
	// TLS makes the server speak HTTPS. If it demands client certificates, a certificate
	// does instead of the token.
	TLS *tls.Config
	// Insecure lets the server listen beyond loopback with neither a token nor client
	// certificates.
	Insecure bool

	MaxConnections int           // default 512
	MaxTransfers   int           // of volume content at once; default 32
	StallTimeout   time.Duration // how long a client may neither take nor send anything in a transfer; default 5 min

	Logger *slog.Logger     // default: none
	Now    func() time.Time // default: time.Now
}

func orDefault[T comparable](v *T, d T) {
	var zero T
	if *v == zero {
		*v = d
	}
}

func (c *Config) validate() error {
	orDefault(&c.Logger, slog.New(slog.DiscardHandler))
	orDefault(&c.Version, "unknown")
	orDefault(&c.MaxConnections, 512)
	orDefault(&c.MaxTransfers, 32)
	orDefault(&c.StallTimeout, 5*time.Minute)
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Disks == nil {
		c.Disks = func() []api.Disk { return nil }
	}
	if c.Scrub == nil {
		c.Scrub = func(context.Context, bool) error { return nil }
	}
	if c.Exports == nil {
		c.Exports = func() []ExportPoint { return nil }
	}
	if c.Metrics == nil {
		c.Metrics = func() []Metric { return nil }
	}
	switch {
	case c.Volumes == nil || c.Cluster == nil || c.Node == "":
		return errors.New("admin: Volumes, Cluster and Node are needed")
	case c.MaxConnections < 1 || c.MaxTransfers < 1:
		return errors.New("admin: limits of connections and transfers must be at least 1")
	}
	return nil
}
