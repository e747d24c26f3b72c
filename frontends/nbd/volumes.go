package nbd

import (
	"context"

	"sheepdog/vdi"
)

// Export describes one thing that can be exported: a VDI, or with Tag one of its
// snapshots.
type Export struct {
	Name     string // of the VDI
	Tag      string // of the snapshot, "" for the VDI itself
	Size     int64  // bytes
	ReadOnly bool
}

// Volumes is what the server needs of the layer below: names, and volumes by name.
// All methods may be called from any number of goroutines and fail with a kind of
// package vdi.
type Volumes interface {
	// List returns the VDIs and their snapshots in the order in which clients shall
	// see them.
	List(ctx context.Context) ([]Export, error)
	// Open opens a VDI (tag "") or a snapshot of it; client names the peer for
	// people. vdi.ErrNotFound if there is none.
	Open(ctx context.Context, name, tag, client string) (Volume, error)
	// Snapshots returns the tags of the snapshots from which Changed of the volume
	// (name, tag) can tell the difference, oldest first.
	Snapshots(ctx context.Context, name, tag string) ([]string, error)
}

// Volume is an open VDI or snapshot; *vdi.Volume is one. Several sessions may have
// the same VDI open: a write that was answered to one is visible to all, and a flush
// by one covers what was answered to all (NBD_FLAG_CAN_MULTI_CONN rests on it).
type Volume interface {
	// Submit starts a request; Kick carries out what Submit held back. See vdi.Request.
	Submit(*vdi.Request)
	Kick()
	Size() int64 // bytes
	ReadOnly() bool
	// Extents calls fn with consecutive extents that cover [off, off+n) until fn returns false.
	Extents(ctx context.Context, off, n int64, fn func(vdi.Extent) bool) error
	// Changed calls fn with consecutive extents that cover [off, off+n) and say what
	// changed since the snapshot sinceTag, until fn returns false.
	Changed(ctx context.Context, sinceTag string, off, n int64, fn func(vdi.ChangedExtent) bool) error
	// Heard says that the client has got what flushes failed with. See vdi.Volume.
	Heard()
	// Close gives the volume up. No request is in flight.
	Close() error
}
