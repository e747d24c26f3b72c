package vdi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"sheepdog/storage/object"
	"sheepdog/vdi/catalog"
)

// Config says what a Service works with. Objects, Log, Catalog, Node, DefaultPolicy and
// PolicyOf must be set.
type Config struct {
	Objects Objects
	Log     Log
	Catalog *catalog.Machine // as registered with Log under the name Machine

	// Node is this node's name, Incarnation counts its starts: together they name an
	// owner. Incarnation is asked whenever ownership is taken, and may be 0 before the
	// cluster is formatted.
	Node        string
	Incarnation func() uint64

	DefaultPolicy    func() object.PolicyID // 0: the cluster is not formatted
	DefaultSizeShift func() uint8           // of objects; default object.DefaultSizeShift
	// PolicyOf finds or makes the policy that keeps that many copies.
	PolicyOf func(ctx context.Context, copies int) (object.PolicyID, error)
	CopiesOf func(object.PolicyID) int // for Info; default 1
	// Policies lists all there are, for sweeps; default those that volumes have, and DefaultPolicy.
	Policies func() []object.PolicyID
	// Room fails with ErrNoSpace if there is certainly no room for so many bytes more of one copy in a policy, and
	// says what there is. nil: who writes them finds out.
	Room func(ctx context.Context, policy object.PolicyID, bytes int64) error

	// Settled returns when previous, which has lost ownership of a VDI to this node, certainly
	// answers nothing any more out of what it knew as the owner: it has applied the command
	// that gave the VDI this generation, or its lease is over (see Leased). Called before
	// anything is answered out of the new ownership; never for a former start of this node.
	// nil: there is nothing to wait for.
	Settled func(ctx context.Context, previous catalog.Node, volume object.VID, generation uint64) error
	// Up reports whether that start of a node may still be running; what it was at is given up else. nil: it may.
	Up func(catalog.Node) bool
	// Known returns when every node that serves clients has applied what this node has, or serves
	// nobody any more. nil: this node is the only one.
	Known func(ctx context.Context) error
	// Lost counts something that grows whenever what was written in a policy, and is not durable, may be lost. It must be up to date
	// when a sync with object.FlagAll has completed. nil: this process does not outlive that.
	Lost func(policy object.PolicyID) uint64
	// Leased reports whether nobody has yet waited in vain for this node to learn something:
	// without a lease the node answers nothing out of its memory alone, but asks the objects.
	// It is called for each read that memory can answer: it must be quick. nil: always.
	Leased func() bool
	// Leading reports whether this node does what one node does for all: collecting garbage
	// and sweeping. Several may believe it for a while. nil: it does.
	Leading func() bool

	// ResendWithin is how old a write may be that is sent again because another node took the
	// VDI in between; an older one fails with ErrStale. Default 2 s.
	ResendWithin time.Duration
	// OwnWithin bounds how long a write tries to have ownership while others want it too.
	// Default 30 s.
	OwnWithin time.Duration

	// SweepEvery is how often the objects are searched for leftovers, beside once at the
	// start; default 24 h.
	SweepEvery time.Duration
	// GCRate bounds the objects that garbage collection removes in a second; default 2000.
	GCRate int
	// KeepVIDs is how many vids are not used again although nobody uses them, a quarter of them of one name, for
	// clients that have not heard of it. Default catalog.KeepVIDs, negative: none.
	KeepVIDs int

	Logger *slog.Logger     // default: none
	Now    func() time.Time // default: time.Now
}

func (c *Config) validate() error {
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Incarnation == nil {
		c.Incarnation = func() uint64 { return 1 }
	}
	if c.DefaultSizeShift == nil {
		c.DefaultSizeShift = func() uint8 { return object.DefaultSizeShift }
	}
	if c.CopiesOf == nil {
		c.CopiesOf = func(object.PolicyID) int { return 1 }
	}
	if c.ResendWithin <= 0 {
		c.ResendWithin = 2 * time.Second
	}
	if c.OwnWithin <= 0 {
		c.OwnWithin = 30 * time.Second
	}
	if c.SweepEvery <= 0 {
		c.SweepEvery = 24 * time.Hour
	}
	if c.GCRate <= 0 {
		c.GCRate = 2000
	}
	if c.KeepVIDs == 0 {
		c.KeepVIDs = catalog.KeepVIDs
	}
	if c.Objects == nil || c.Log == nil || c.Catalog == nil || c.Node == "" || c.DefaultPolicy == nil || c.PolicyOf == nil {
		return fmt.Errorf("configure volumes: %w", errors.New("Objects, Log, Catalog, Node, DefaultPolicy and PolicyOf are needed"))
	}
	return nil
}
