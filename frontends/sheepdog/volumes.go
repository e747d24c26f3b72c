package sheepdog

import (
	"context"

	"sheepdog/storage/object"
	"sheepdog/vdi"
)

// Volumes is what the server needs of the layer below: *vdi.Service has all of it but
// what is adapted in cmd/sheep. All methods may be called from any number of goroutines and fail
// with a kind of package vdi.
type Volumes interface {
	// FindHeader, HeaderOf, FamilyOf, Successor: see vdi.Service. They answer at once.
	FindHeader(name, tag string, id uint32) (vdi.Header, error)
	HeaderOf(vid object.VID) (vdi.Header, error)
	FamilyOf(vid object.VID) (uint64, error)
	Successor(vid object.VID) (vdi.Header, error)
	Bitmap(b []byte)
	InUse(vid object.VID) bool
	// OpenVID opens a VDI or snapshot; see vdi.Service. It answers at once.
	OpenVID(vid object.VID, client string, quiet bool) (Volume, error)
	// Defaults are the copies and the object size of new VDIs; ErrUnavailable before the
	// cluster is formatted.
	Defaults() (copies int, sizeShift uint8, err error)

	// Opened is how often a working VDI is open through this node, by whatever protocol; it answers at once.
	Opened(vid object.VID) int
	// UsedElsewhere reports whether a client may have a VDI open through another node, or be about to come back to this one or
	// another: where that is not known in time it may.
	UsedElsewhere(ctx context.Context, vid object.VID) bool
	ReadMap(ctx context.Context, vid object.VID, first uint32, p []byte) error
	Holder(ctx context.Context, vid object.VID, index uint32) (object.VID, error)
	ReadVMState(ctx context.Context, at vdi.VMState, p []byte) error
	WriteVMState(ctx context.Context, at vdi.VMState, p []byte, afresh bool, f vdi.Flags) error
	Describe(ctx context.Context, vid object.VID, tag string, vmStateSize int64, vmClock uint64) error

	Create(ctx context.Context, o vdi.CreateOptions) (vdi.Info, error)
	Snapshot(ctx context.Context, name, tag string) (vdi.Info, error)
	Clone(ctx context.Context, src, tag, dst string) (vdi.Info, error)
	Rollback(ctx context.Context, name, tag string) (vdi.Info, error)
	Delete(ctx context.Context, name, tag string) error
	Resize(ctx context.Context, name string, size int64) (vdi.Info, error)
}

// Volume is an open VDI or snapshot; *vdi.Volume is one.
type Volume interface {
	// Submit starts a request; Kick carries out what Submit held back. See vdi.Request.
	Submit(*vdi.Request)
	Kick()
	// Entry tells which vid owns an object. See vdi.Volume.
	Entry(ctx context.Context, vid object.VID, index uint32) (object.VID, error)
	// MapVersion tells whether the map has changed. See vdi.Volume.
	MapVersion(ctx context.Context) (vdi.MapVersion, error)
	// Refresh returns the size in bytes as it is now.
	Refresh() int64
	// Heard says that the client has got what flushes failed with. See vdi.Volume.
	Heard()
	// Close gives the volume up. No request is in flight.
	Close() error
}
