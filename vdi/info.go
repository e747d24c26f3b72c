package vdi

import (
	"time"

	"sheepdog/storage/object"
	"sheepdog/vdi/catalog"
)

// Limits of volumes.
const (
	MaxSize = catalog.MaxSize // bytes
	MaxName = catalog.MaxName // bytes of a name or tag
)

// Info describes a VDI or one of its snapshots.
type Info struct {
	Name       string          `json:"name"`
	Tag        string          `json:"tag,omitempty"`         // of a snapshot, may be empty
	SnapshotID uint32          `json:"snapshot_id,omitempty"` // 1, 2, 3…; 0: the VDI itself, not a snapshot
	Snapshot   bool            `json:"snapshot"`
	VID        object.VID      `json:"vid"`
	Parent     object.VID      `json:"parent,omitempty"` // the snapshot it began as; 0: none. May be deleted
	Size       int64           `json:"size"`             // bytes
	ObjectSize int64           `json:"object_size"`      // bytes
	Policy     object.PolicyID `json:"policy"`
	Copies     int             `json:"copies"`

	Created  time.Time  `json:"created"`            // of the VDI
	Snapped  *time.Time `json:"snapped,omitempty"`  // when the snapshot was taken
	Identity string     `json:"identity,omitempty"` // of a snapshot: the same content has the same identity, also in restored backups

	// Space of one copy, in bytes. Used is what only this VDI's or snapshot's own objects
	// take, Shared what it reads from ancestors. Exact says whether blocks were counted, or
	// objects times their size, which is the most it can be. Known is false while that
	// has not been found out yet.
	Used   int64 `json:"used"`
	Shared int64 `json:"shared"`
	Exact  bool  `json:"exact"`
	Known  bool  `json:"known"`

	Owner      string            `json:"owner,omitempty"` // node that may write
	Generation uint64            `json:"generation,omitempty"`
	Lock       *LockInfo         `json:"lock,omitempty"`
	Openers    []string          `json:"openers,omitempty"` // who has it open through this node; a few are listed
	Attributes map[string]string `json:"attributes,omitempty"`
	State      string            `json:"state"` // see the State constants
}

// States of a VDI in Info.State.
const (
	StateOK       = "ok"
	StateTrimming = "trimming" // space beyond a new, smaller size is being freed
)

// LockInfo tells who locked a VDI.
type LockInfo struct {
	Name   string    `json:"name"`
	Holder string    `json:"holder"` // as given by who locked it
	Node   string    `json:"node"`   // through which node
	Since  time.Time `json:"since"`
}

// SnapshotInfo names a snapshot that Changed and Diff can compare with.
type SnapshotInfo struct {
	Tag      string    `json:"tag"`
	ID       uint32    `json:"id"`
	Taken    time.Time `json:"taken"`
	Identity string    `json:"identity"`
}

// CreateOptions say what a new VDI is like. Zero values stand for the cluster's defaults.
type CreateOptions struct {
	Name            string
	Size            int64  // bytes, 0 is allowed
	ObjectSizeShift uint8  // object.MinSizeShift to object.MaxSizeShift
	Copies          int    // replicas of each object
	Preallocate     bool   // take the space at once: Create then takes long
	Identity        string // of the backup it is made from; for people
}

// OpenOptions say how a VDI is opened.
type OpenOptions struct {
	ReadOnly bool
	Client   string // who opens it, for people: "nbd 10.0.0.7:51234"
}

// Extent is a run of bytes of a volume with one allocation state.
type Extent struct {
	Off  int64 `json:"off"`
	Len  int64 `json:"len"`
	Hole bool  `json:"hole"` // takes no space
	Zero bool  `json:"zero"` // reads as zero. Hole implies Zero
}

// ChangedExtent is a run of bytes of a volume that changed or not.
type ChangedExtent struct {
	Off     int64 `json:"off"`
	Len     int64 `json:"len"`
	Changed bool  `json:"changed"`
}

// Usage is the space that a VDI or snapshot takes: see Info.
type Usage struct {
	Used   int64 `json:"used"`
	Shared int64 `json:"shared"`
	Exact  bool  `json:"exact"`
}

// CheckOptions says how to Check.
type CheckOptions struct {
	Repair bool // remove leftovers; lost data cannot be brought back
	// PassOver are policies that are not searched for leftovers: it is known that they are not reachable.
	PassOver []object.PolicyID
}

// CheckReport is what Check found.
type CheckReport struct {
	Name       string       `json:"name"`
	Objects    int64        `json:"objects"` // looked at
	Problems   []Problem    `json:"problems"`
	More       int64        `json:"more,omitempty"` // problems beyond those listed
	Repaired   int64        `json:"repaired"`
	Unsearched []Unsearched `json:"unsearched,omitempty"`
}

// Unsearched is a policy that was not searched in full for leftovers, for not all of it is reachable.
type Unsearched struct {
	Policy object.PolicyID `json:"policy"`
	Copies int             `json:"copies"`
	Reason string          `json:"reason"`
}

// Problem is one thing that Check found wrong.
type Problem struct {
	Tag      string    `json:"tag,omitempty"` // of the snapshot that has it; "" the VDI itself
	Snapshot uint32    `json:"snapshot_id,omitempty"`
	Kind     string    `json:"kind"`   // see the Problem constants
	Object   object.ID `json:"object"` // the object concerned
	Off      int64     `json:"off"`    // where in the volume, bytes
	Len      int64     `json:"len"`
	Text     string    `json:"text"` // for people: what, and what to do
	Repaired bool      `json:"repaired"`
}

// Kinds of problems.
const (
	ProblemMissing  = "missing"  // the map names an object that is not there
	ProblemCorrupt  = "corrupt"  // an object's checksums cannot be read
	ProblemLeftover = "leftover" // an object that no map names
	ProblemUnowned  = "unowned"  // a map entry names a volume that never was in the family
)

// Progress is told how far long work has come; done and total are in the same unit. It
// may be nil, and is called from one goroutine.
type Progress func(done, total int64)

// GCStatus tells about the collection of garbage.
type GCStatus struct {
	Pending   int       `json:"pending"` // deleted VDIs and snapshots whose space is not free yet
	Deleted   int64     `json:"deleted"` // objects removed since the start
	Sweeping  bool      `json:"sweeping"`
	LastSweep time.Time `json:"last_sweep"`
	Leftovers int64     `json:"leftovers"` // objects that sweeps found and removed
	LastError string    `json:"last_error,omitempty"`
}
