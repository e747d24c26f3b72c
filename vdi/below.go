package vdi

import (
	"context"

	"sheepdog/storage/object"
)

// Objects is what volumes need of the objects below; *cluster.Node is one. All methods
// may be called from any goroutine and fail with the errors of package object. The
// caller of Submit sets all of the Request but Partition and Version.
type Objects interface {
	Submit(*object.Request)
	Kick()
	// Copy makes an object of another where the data is. See object.CopyRequest.
	Copy(ctx context.Context, c object.CopyRequest) error
	// Delete removes an object; a missing one is no error. See object.DeleteRequest.
	Delete(ctx context.Context, d object.DeleteRequest) error
	Extents(ctx context.Context, policy object.PolicyID, id object.ID, off, n uint32) ([]object.Extent, error)
	// Sums returns the checksum of each block; 0 stands for a hole.
	Sums(ctx context.Context, policy object.PolicyID, id object.ID) ([]uint64, error)
	Stat(ctx context.Context, policy object.PolicyID, id object.ID) (object.Info, error)
	// List calls fn for every object of a policy, in no order.
	List(ctx context.Context, policy object.PolicyID, fn func(object.Info) error) error
}

// Log puts commands into the cluster's order; *cluster.Node is one. Propose returns what
// the machine of that name answered, after the command was applied on this node. A
// command whose Propose failed may still be applied.
type Log interface {
	Propose(ctx context.Context, machine string, command []byte) ([]byte, error)
}

// Machine is the name under which the catalog is proposed to.
const Machine = "catalog"
