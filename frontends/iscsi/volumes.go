package iscsi

import (
	"context"

	"sheepdog/frontends/iscsi/internal/scsi"
	"sheepdog/vdi"
)

// Disk describes one thing that can be a target: a VDI, or with Tag one of its snapshots.
type Disk struct {
	Name     string // of the VDI
	Tag      string // of the snapshot, "" for the VDI itself
	Size     int64  // bytes
	ReadOnly bool
	Replaced uint64 // changes when the content is replaced as a whole, by that of a snapshot
	// ID is the same through every gateway and as long as the disk exists, and no other's.
	ID [8]byte
}

// Path is a gateway that a disk can be reached through.
type Path struct {
	Group uint16 // of the gateway, from 1 on
	Owner bool   // it owns the disk: it is the quickest
	Down  bool   // it cannot be reached now
}

// Volumes is what the server needs of the layer below: names, volumes by name, and what
// all gateways know of a disk. All methods may be called from any number of goroutines and
// fail with a kind of package vdi.
type Volumes interface {
	// List returns the VDIs and their snapshots.
	List(ctx context.Context) ([]Disk, error)
	// Find describes one; it looks at what this node knows, and does not wait.
	Find(name, tag string) (Disk, error)
	// Open opens one; client names the initiator for people.
	Open(ctx context.Context, name, tag, client string) (Volume, error)
	// Changes grows whenever what Find, Paths or Reservations tell may have changed.
	Changes() uint64
	// Group is this gateway's number among all gateways, 0 while it is in no cluster.
	Group() uint16
	// Paths lists the gateways by number.
	Paths(name, tag string) []Path
	// Lapses is even while nobody may take this gateway for gone. If it is the same at two
	// moments, nobody has in between. It does not wait.
	Lapses() uint64
	// Reservations returns the text that SetReservations stored, "" if none, and its
	// revision, as far as this node knows.
	Reservations(name, tag string) (text string, revision uint64, err error)
	// SetReservations stores a text if the revision is still the newest, and returns the new
	// one; vdi.ErrStale if it is not. With fence, when it returns, all gateways go by it, and what any of
	// them had under way by an older one has landed, or never will.
	SetReservations(ctx context.Context, name, tag string, revision uint64, text string, fence bool) (uint64, error)
	// Known returns when every gateway goes by what this one knows, and its Settle has returned, or is
	// down and serves nobody.
	Known(ctx context.Context) error
	// Life counts the starts of this gateway. Lives reports whether a gateway may still have
	// sessions that it had in a life.
	Life() uint64
	Lives(node string, life uint64) bool
	// Own makes this gateway the disk's owner.
	Own(ctx context.Context, name string) error
}

// Volume is an open VDI or snapshot; *vdi.Volume is one. Several sessions may have the same
// VDI open: a write that was answered to one is visible to all, and a flush by one covers
// what was answered to all.
type Volume interface {
	// Submit starts a request; Kick carries out what Submit held back. See vdi.Request.
	Submit(*vdi.Request)
	Kick()
	Size() int64 // bytes
	ReadOnly() bool
	// Extents calls fn with consecutive extents that cover [off, off+n) until fn returns false.
	Extents(ctx context.Context, off, n int64, fn func(vdi.Extent) bool) error
	// Update has fn change p, which is n bytes read at off, and writes p back if fn returns
	// nil; nobody else writes there in between, through whatever gateway. It fails with fn's error.
	Update(ctx context.Context, off, n int64, f vdi.Flags, fn func(p []byte) error) error
	// Heard says that the initiator has got what flushes failed with. See vdi.Volume.
	Heard()
	// Close gives the volume up. No request is in flight.
	Close() error
}

// groupsOf makes SCSI's target port groups of paths.
func groupsOf(paths []Path) []scsi.Group {
	list := make([]scsi.Group, len(paths))
	for i, p := range paths {
		list[i] = scsi.Group{ID: p.Group, State: scsi.ActiveNonOptimized}
		switch {
		case p.Down:
			list[i].State = scsi.Unavailable
		case p.Owner:
			list[i].State = scsi.ActiveOptimized
		}
	}
	return list
}
