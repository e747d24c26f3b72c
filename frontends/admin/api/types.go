package api

import "time"

// ServerVersion is the answer to GET /version.
type ServerVersion struct {
	Version string `json:"version"` // of the daemon
	API     int    `json:"api"`
	Go      string `json:"go"` // version of the Go runtime
}

// Cluster describes the cluster as the node knows it.
type Cluster struct {
	Formatted     bool       `json:"formatted"`
	ID            string     `json:"id,omitempty"`
	Name          string     `json:"name,omitempty"`
	Created       *time.Time `json:"created,omitempty"`
	Epoch         uint64     `json:"epoch"`            // version of the cluster map
	Status        string     `json:"status"`           // ok, degraded, unavailable, unformatted
	Reason        string     `json:"reason,omitempty"` // why it is not ok, and what to do
	Node          string     `json:"node"`             // the node that was asked
	Leader        bool       `json:"leader"`           // whether that node leads
	LeaderNode    string     `json:"leader_node,omitempty"`
	NodesUp       int        `json:"nodes_up"`
	NodesDown     int        `json:"nodes_down"`
	Recovery      bool       `json:"recovery"`  // data is moved when nodes come, go for long, or change weight
	OutAfter      int64      `json:"out_after"` // seconds until the data of a node that is down is brought elsewhere; -1: never
	DefaultCopies int        `json:"default_copies,omitempty"`
	ObjectSize    int64      `json:"object_size,omitempty"` // default, bytes
	Policies      []Policy   `json:"policies"`
}

// States of a cluster in Cluster.Status.
const (
	StatusOK          = "ok"
	StatusDegraded    = "degraded"
	StatusUnavailable = "unavailable"
	StatusUnformatted = "unformatted"
)

// Policy counts the partitions of one kind of redundancy.
type Policy struct {
	ID          int `json:"id"`
	Copies      int `json:"copies"`
	MinInSync   int `json:"min_in_sync"` // replicas that hold a write before it is answered
	Partitions  int `json:"partitions"`
	Degraded    int `json:"degraded"`    // partitions with fewer replicas in sync than Copies
	Unavailable int `json:"unavailable"` // partitions that cannot be written
	Recovering  int `json:"recovering"`  // partitions with replicas that catch up
}

// FormatRequest says what a new cluster is like. Zero values stand for the defaults.
type FormatRequest struct {
	Name       string `json:"name,omitempty"`        // for people; default "sheepdog"
	Copies     int    `json:"copies,omitempty"`      // of volumes that do not choose; default 3
	ObjectSize int64  `json:"object_size,omitempty"` // bytes, a power of two from 1 MiB to 2 GiB; default 4 MiB
}

// Node describes a member of the cluster.
type Node struct {
	ID          int       `json:"id"`
	Name        string    `json:"name"`
	Address     string    `json:"address"`
	Zone        string    `json:"zone"`
	State       string    `json:"state"` // up, down
	Since       time.Time `json:"since"` // of the state
	Incarnation uint64    `json:"incarnation"`
	Disks       int       `json:"disks"`
	Weight      uint64    `json:"weight"`   // share of the data
	Percent     int       `json:"percent"`  // of Weight that counts
	Drain       bool      `json:"drain"`    // it shall hold nothing, by somebody's wish
	Out         bool      `json:"out"`      // it shall hold nothing, for it has been down for long
	Replicas    int       `json:"replicas"` // partitions it holds in sync
	Primaries   int       `json:"primaries"`
	Targets     int       `json:"targets"`  // partitions it shall hold
	Learning    int       `json:"learning"` // of those, that it is being brought in sync with
	Leader      bool      `json:"leader"`
	Votes       bool      `json:"votes"`   // one of those that decide: most of them must be up
	Gateway     bool      `json:"gateway"` // holds no data
	Self        bool      `json:"self"`    // the node that was asked
}

// States of a node in Node.State.
const (
	NodeUp   = "up"
	NodeDown = "down"
)

// NodeStatus tells how a node is doing.
type NodeStatus struct {
	ID         int       `json:"id"` // 0 before the cluster is formatted
	Name       string    `json:"name"`
	Version    string    `json:"version"`
	Started    time.Time `json:"started"`
	Ready      bool      `json:"ready"`
	Reason     string    `json:"reason,omitempty"` // why it is not ready
	TotalBytes int64     `json:"total_bytes"`      // of all disks
	UsedBytes  int64     `json:"used_bytes"`
	FreeBytes  int64     `json:"free_bytes"`
	LogLevel   string    `json:"log_level"`
	Disks      []Disk    `json:"disks"`
	GC         GC        `json:"gc"`
	Sessions   int       `json:"sessions"`
	Transfers  int       `json:"transfers"` // of volume data over this API, now
}

// GC tells about the return of space of what was deleted.
type GC struct {
	Pending   int        `json:"pending"` // deleted VDIs and snapshots whose space is not free yet
	Deleted   int64      `json:"deleted"` // objects removed since the start
	Sweeping  bool       `json:"sweeping"`
	LastSweep *time.Time `json:"last_sweep,omitempty"`
	Leftovers int64      `json:"leftovers"` // objects that no volume named
	LastError string     `json:"last_error,omitempty"`
}

// Disk tells how one disk of a node is doing.
type Disk struct {
	Node       string `json:"node"`
	ID         string `json:"id"`
	Path       string `json:"path"`
	Weight     uint64 `json:"weight"` // share of the data that the cluster gives it
	State      string `json:"state"`  // ok, full, readonly, failed; unknown: its node did not say
	Reason     string `json:"reason,omitempty"`
	TotalBytes int64  `json:"total_bytes"`
	UsedBytes  int64  `json:"used_bytes"` // by all that is on it, also what is not ours
	FreeBytes  int64  `json:"free_bytes"`
	Objects    int64  `json:"objects"`
	LogBytes   int64  `json:"log_bytes"` // not yet merged into object files
	LogLimit   int64  `json:"log_limit"` // bytes
	Partitions int    `json:"partitions"`
	Moves      Moves  `json:"moves"`
	Scrub      Scrub  `json:"scrub"`
	// Corrupt lists objects whose content does not match its checksums; a bounded number.
	Corrupt []CorruptObject   `json:"corrupt"`
	Errors  map[string]uint64 `json:"errors"` // counted since the start, by kind
}

// States of a disk in Disk.State.
const (
	DiskOK       = "ok"
	DiskFull     = "full"
	DiskReadOnly = "readonly"
	DiskFailed   = "failed"
	DiskUnknown  = "unknown"
)

// Moves tells about the partitions that go from one disk of a node to another: to one that was added, and from one that
// is taken out.
type Moves struct {
	ToCome  int64  `json:"to_come"` // partitions that are still to be moved to the disk
	ToGo    int64  `json:"to_go"`   // and from it
	Bytes   int64  `json:"bytes"`   // copied to the disk since the start
	Waiting string `json:"waiting,omitempty"`
}

// Scrub tells about the reading of all that is stored, to find rot early.
type Scrub struct {
	Running bool       `json:"running"`
	Done    float64    `json:"done"` // 0 to 1, of the running one
	LastEnd *time.Time `json:"last_end,omitempty"`
}

// CorruptObject is an object with blocks that do not match their checksums.
type CorruptObject struct {
	Object string   `json:"object"` // id
	Blocks []uint32 `json:"blocks"` // numbers of 4 KiB blocks; a few are listed
}

// LogLevel is the least level that is logged: debug, info, warn or error.
type LogLevel struct {
	Level string `json:"level"`
}

// VDI describes a VDI or one of its snapshots.
type VDI struct {
	Name       string     `json:"name"`
	Snapshot   bool       `json:"snapshot"`              // it is a snapshot
	Tag        string     `json:"tag,omitempty"`         // of a snapshot, may be empty
	SnapshotID uint32     `json:"snapshot_id,omitempty"` // of a snapshot, from 1
	VID        string     `json:"vid"`
	Parent     string     `json:"parent,omitempty"` // vid of the snapshot it began as; that may be deleted
	Size       int64      `json:"size"`
	ObjectSize int64      `json:"object_size"`
	Policy     int        `json:"policy"`
	Copies     int        `json:"copies"`
	Created    time.Time  `json:"created"`
	Snapped    *time.Time `json:"snapped,omitempty"`  // when the snapshot was taken
	Identity   string     `json:"identity,omitempty"` // of a snapshot's content, the same after restoring a backup
	State      string     `json:"state"`              // ok; trimming: space beyond a new, smaller size is being freed

	// Space of one copy. Used is what only this VDI's own objects take, Shared what it
	// reads from ancestors. If not Exact, objects were counted at their full size, which
	// is the most it can be. If not Known it has not been found out yet.
	Used   int64 `json:"used"`
	Shared int64 `json:"shared"`
	Exact  bool  `json:"exact"`
	Known  bool  `json:"known"`

	Owner      string            `json:"owner,omitempty"` // node that may write
	Generation uint64            `json:"generation,omitempty"`
	Lock       *Lock             `json:"lock,omitempty"`
	Openers    []string          `json:"openers,omitempty"` // who has it open through this node; a few are listed
	Attributes map[string]string `json:"attributes,omitempty"`
}

// CreateRequest says what a new VDI is like. Zero values stand for the cluster's defaults.
type CreateRequest struct {
	Name        string `json:"name"`
	Size        int64  `json:"size"`
	ObjectSize  int64  `json:"object_size,omitempty"` // bytes, a power of two from 1 MiB to 2 GiB
	Copies      int    `json:"copies,omitempty"`
	Preallocate bool   `json:"preallocate,omitempty"` // take the space at once
}

// ResizeRequest is the body of PUT /vdis/{name}/size.
type ResizeRequest struct {
	Size int64 `json:"size"`
}

// SnapshotRequest is the body of POST /vdis/{name}/snapshots. Without a tag the snapshot
// is called by its number.
type SnapshotRequest struct {
	Tag string `json:"tag,omitempty"`
}

// CloneRequest is the body of POST /vdis/{name}/clone.
type CloneRequest struct {
	Snapshot string `json:"snapshot"` // tag or number
	Name     string `json:"name"`     // of the new VDI
}

// RollbackRequest is the body of POST /vdis/{name}/rollback.
type RollbackRequest struct {
	Snapshot string `json:"snapshot"` // tag or number
}

// Written is the answer to uploads of content.
type Written struct {
	Bytes int64 `json:"bytes"` // of content that was written
	Zeros int64 `json:"zeros"` // bytes that were made zeros
	VDI   *VDI  `json:"vdi,omitempty"`
}

// Extent is one line of the answer to GET /vdis/{name}/diff: a run of bytes that differs.
// A line with Error set ends an answer that failed.
type Extent struct {
	Off   int64  `json:"off"`
	Len   int64  `json:"len"`
	Zero  bool   `json:"zero"` // reads as zero now
	Error *Error `json:"error,omitempty"`
}

// Object is one line of the answer to GET /vdis/{name}/objects. A line with Error set
// ends an answer that failed.
type Object struct {
	Index     uint32   `json:"index"` // in the volume
	Off       int64    `json:"off"`   // index times object size
	Object    string   `json:"object"`
	Owner     string   `json:"owner"`     // vid: another's means that it is shared with an ancestor
	Allocated int64    `json:"allocated"` // bytes of one copy
	Missing   bool     `json:"missing,omitempty"`
	Partition int      `json:"partition"`
	Primary   string   `json:"primary"`
	Nodes     []string `json:"nodes"` // that have it in sync, the primary first
	Error     *Error   `json:"error,omitempty"`
}

// Placement tells where the objects of a partition are.
type Placement struct {
	Partition int
	Nodes     []string // in sync, the primary first
}

// Event is one line of the answer to long work. Exactly one field is set; the last event
// has Report, Altered or Error.
type Event struct {
	Altering *Altered     `json:"altering,omitempty"` // what is begun
	Progress *Progress    `json:"progress,omitempty"`
	Report   *CheckReport `json:"report,omitempty"`
	Altered  *Altered     `json:"altered,omitempty"` // what has come of it
	Error    *Error       `json:"error,omitempty"`
}

// Progress tells how far work has come; Done and Total have the same unit.
type Progress struct {
	Done  int64  `json:"done"`
	Total int64  `json:"total"`
	What  string `json:"what,omitempty"` // the VDI that is at work
}

// Altered tells what becomes of the copies of VDIs.
type Altered struct {
	Name   string   `json:"name"`
	From   int      `json:"from"` // copies
	To     int      `json:"to"`
	VDIs   []string `json:"vdis"`   // all that is concerned, snapshots as "NAME@TAG": what may share objects has the same copies
	Copied int64    `json:"copied"` // bytes of one copy
	Pause  float64  `json:"pause"`  // seconds for which writes waited in the end
}

// CheckReport is what a check found.
type CheckReport struct {
	VDIs     int       `json:"vdis"`    // looked at, snapshots not counted
	Objects  int64     `json:"objects"` // looked at
	Problems []Problem `json:"problems"`
	More     int64     `json:"more,omitempty"` // problems beyond those listed
	Repaired int64     `json:"repaired"`
}

// Problem is one thing that a check found wrong.
type Problem struct {
	VDI        string `json:"vdi,omitempty"`
	Tag        string `json:"tag,omitempty"`
	SnapshotID uint32 `json:"snapshot_id,omitempty"`
	Node       string `json:"node,omitempty"` // whose replica or disk it is about
	Kind       string `json:"kind"`           // missing, corrupt, leftover, unowned, unsearched, disk, replica
	Object     string `json:"object,omitempty"`
	Off        int64  `json:"off"`
	Len        int64  `json:"len"`
	Text       string `json:"text"` // what, and what to do
	Repaired   bool   `json:"repaired"`
}

// Kinds of a Problem that are told apart.
const (
	ProblemDisk     = "disk"
	ProblemReplica  = "replica"  // it is not what the primary has
	ProblemLeftover = "leftover" // an object that no map names: it takes space, and the next sweep removes it
	// ProblemUnsearched: where volumes may have been kept before was not searched for leftovers in full.
	ProblemUnsearched = "unsearched"
)

// Attribute is the value of one attribute of a VDI.
type Attribute struct {
	Value string `json:"value"`
}

// Lock tells who locked a VDI.
type Lock struct {
	Name   string    `json:"name"`
	Holder string    `json:"holder"`
	Node   string    `json:"node"`
	Since  time.Time `json:"since"`
}

// LockRequest is the body of PUT /vdis/{name}/lock.
type LockRequest struct {
	Holder string `json:"holder"`
}

// Session is one client of one frontend.
type Session struct {
	Node         string    `json:"node"`     // whose client it is
	ID           string    `json:"id"`       // unique on the node
	Protocol     string    `json:"protocol"` // nbd, …
	Peer         string    `json:"peer"`
	Listener     string    `json:"listener"`
	Export       string    `json:"export"`
	ReadOnly     bool      `json:"read_only"`
	TLS          bool      `json:"tls"`
	Identity     string    `json:"identity,omitempty"` // that the client proved
	Started      time.Time `json:"started"`
	Reads        uint64    `json:"reads"` // requests
	Writes       uint64    `json:"writes"`
	Others       uint64    `json:"others"`
	Errors       uint64    `json:"errors"`
	ReadBytes    uint64    `json:"read_bytes"`
	WrittenBytes uint64    `json:"written_bytes"`
	InFlight     int64     `json:"in_flight"`
	Detail       string    `json:"detail,omitempty"` // of the protocol, for people
}

// Export is a VDI or snapshot as one frontend offers it.
type Export struct {
	Protocol string `json:"protocol"`
	URI      string `json:"uri"` // what a client is given
	VDI      string `json:"vdi"`
	Snapshot string `json:"snapshot,omitempty"` // tag or number
	Size     int64  `json:"size"`
	ReadOnly bool   `json:"read_only"`
}
