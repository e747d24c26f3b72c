package cluster

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"sheepdog/cluster/internal/consensus"
	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// Machine is a replicated state machine beside the cluster's own: deterministic, its
// methods called by one goroutine at a time. Apply must not keep command; its result
// belongs to the cluster. Restore replaces the whole state.
type Machine interface {
	Apply(command []byte) (result []byte)
	Snapshot() ([]byte, error)
	Restore(snapshot []byte) error
}

var _ consensus.Machine = Machine(nil)

// Store keeps this node's replicas; *storage.Store is one. Its methods may be called
// from any goroutine and fail with the errors of package object.
type Store interface {
	Submit(*object.Request)
	Kick()
	Copy(ctx context.Context, dst, src object.Key, sizeShift uint8, v object.Version) error
	Delete(ctx context.Context, k object.Key) error
	Extents(ctx context.Context, k object.Key, off, n uint32) ([]object.Extent, error)
	Sums(ctx context.Context, k object.Key) ([]uint64, error)
	Stat(ctx context.Context, k object.Key) (object.Info, error)
	List(ctx context.Context, g object.Group, fn func(object.Info) error) error
	Groups(ctx context.Context) ([]object.Group, error)
	// Objects is about how many objects there are, in all groups. It takes no time.
	Objects() int64
	// Tight reports whether there is little space left for a group.
	Tight(g object.Group) bool
	// Failed reports whether the disk of a group is out of service; Abandon gives the group
	// then another place, where it has nothing, and reports whether it did.
	Failed(g object.Group) bool
	Abandon(g object.Group) bool
	// Rotten are blocks that were found corrupt; no blocks: the object cannot be read at all.
	// Heal replaces one if data is the content that was there, else it fails.
	Rotten() map[object.Key][]uint32
	Heal(ctx context.Context, k object.Key, block uint32, data []byte) error
	// KeepMarks keeps the versions up to which nothing of a group is missing, Marks
	// returns them after a restart.
	KeepMarks(map[object.Group]object.Version) error
	Marks() map[object.Group]object.Version
}

// Config says what a Node works with.
type Config struct {
	// Dir holds the node's part of the cluster's state. It must exist; the node locks it.
	Dir string
	// Name of the node, unique in the cluster. It must stay the same for Dir.
	Name string
	// Address is where other nodes and people reach the node: a host without port.
	Address string
	// Zone is the failure domain; "" stands for the node itself.
	Zone string

	// Store keeps the replicas; nil for a gateway.
	Store Store
	// Disks are the store's, empty for a gateway. Those of weight 0 get no data.
	Disks []state.Disk
	// DiskCluster is the id of the cluster that the disks say they belong to, "" if none.
	DiskCluster string
	// Adopt writes the cluster's id onto the disks, or fails if they belong to another.
	// Called at the start of a formatted node and by Format. nil: nothing to do.
	Adopt func(clusterID string) error

	// Network makes the node one of many; nil: it is alone, and listens to nobody.
	Network *Network
	// Generation returns the newest generation of a volume that this node's machines know
	// (INV-V1). nil: requests alone tell.
	Generation func(vid object.VID) uint64

	// Stop asks this process to stop in an orderly way, and returns at once; nil: it does
	// not stop by a call.
	Stop func()

	// Machines are replicated beside the cluster's own, by the name that Propose takes.
	Machines map[string]Machine

	// Delay is added to every object operation, for tests of latency. Any number of
	// operations may be waiting.
	Delay time.Duration

	Logger *slog.Logger     // default: none
	Now    func() time.Time // default: time.Now
}

// stateMachine is the name of the cluster's own machine.
const stateMachine = "state"

func (c *Config) validate() error {
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Zone == "" {
		c.Zone = c.Name
	}
	_, taken := c.Machines[stateMachine]
	switch {
	case c.Dir == "":
		return errors.New("no directory for the node's state")
	case c.Name == "":
		return errors.New("the node has no name")
	case c.Network != nil && c.Network.Listener == nil:
		return errors.New("a node of many needs a listener for the others")
	case taken:
		return errors.New(`"state" is the name of the cluster's own state machine`)
	case c.Store == nil && len(c.Disks) > 0:
		return errors.New("there are disks but no store")
	}
	return nil
}
