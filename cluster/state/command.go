package state

import (
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"sheepdog/storage/object"
)

// Limits of what commands may ask for.
const (
	MaxNodes          = 4096
	MaxCopies         = 16
	MaxDisks          = 256 // of a node
	MaxPolicies       = 256
	MaxChanges        = 4096 // of a ChangeISRs
	maxNameBytes      = 255
	minPartitions     = 1
	MaxPartitions     = 1 << 16
	DefaultPartitions = 4096
)

// What commands are refused with; Result.Err wraps them.
var (
	ErrNotFormatted = errors.New("cluster is not formatted")
	ErrFormatted    = errors.New("cluster is formatted already")
	ErrInvalid      = errors.New("invalid command")
	ErrNotFound     = errors.New("no such node or policy")
	ErrStale        = errors.New("the cluster has changed meanwhile")
	ErrNeeded       = errors.New("the node is needed")
)

// refusals gives the sentinels their names in results.
var refusals = map[string]error{
	"not-formatted": ErrNotFormatted,
	"formatted":     ErrFormatted,
	"invalid":       ErrInvalid,
	"not-found":     ErrNotFound,
	"stale":         ErrStale,
	"needed":        ErrNeeded,
}

// Command changes the state: exactly one field is set.
type Command struct {
	Format      *Format      `json:"format,omitempty"`
	Announce    *Announce    `json:"announce,omitempty"`
	AnnounceAll *AnnounceAll `json:"announce_all,omitempty"`
	Confirm     *Confirm     `json:"confirm,omitempty"`
	Witness     *Witness     `json:"witness,omitempty"`
	SetNode     *SetNode     `json:"set_node,omitempty"`
	SetNodes    *SetNodes    `json:"set_nodes,omitempty"`
	SetDisks    *SetDisks    `json:"set_disks,omitempty"`
	Leave       *Leave       `json:"leave,omitempty"`
	Enroll      *Enroll      `json:"enroll,omitempty"`
	Drain       *Drain       `json:"drain,omitempty"`
	Reweight    *Reweight    `json:"reweight,omitempty"`
	SetOut      *SetOut      `json:"set_out,omitempty"`
	SetOutAfter *SetOutAfter `json:"set_out_after,omitempty"`
	Remove      *Remove      `json:"remove,omitempty"`
	Welcome     *Welcome     `json:"welcome,omitempty"`
	Force       *Force       `json:"force,omitempty"`
	AddPolicy   *AddPolicy   `json:"add_policy,omitempty"`
	SetDefault  *SetDefault  `json:"set_default,omitempty"`
	SetHold     *SetHold     `json:"set_hold,omitempty"`
	SetTargets  *SetTargets  `json:"set_targets,omitempty"`
	ChangeISR   *ChangeISR   `json:"change_isr,omitempty"`
	ChangeISRs  *ChangeISRs  `json:"change_isrs,omitempty"`
}

// Format makes the cluster. Repeated with the same ID it changes nothing.
type Format struct {
	ID              string    `json:"id"`
	Name            string    `json:"name"`
	Created         time.Time `json:"created"`
	Partitions      int       `json:"partitions"`
	ObjectSizeShift uint8     `json:"object_size_shift"`
	Copies          int       `json:"copies"` // of the default policy
}

// Announce says that a node has started: it gets a new incarnation and is down until
// SetNode says otherwise. An unknown name becomes a new node.
type Announce struct {
	Name    string    `json:"name"`
	Address string    `json:"address"`
	Zone    string    `json:"zone"`
	Disks   []Disk    `json:"disks"`
	At      time.Time `json:"at"`
	// Partial: a disk that the node had is missing. It has nothing then of partitions that
	// are not Held.
	Partial bool           `json:"partial,omitempty"`
	Held    []object.Group `json:"held,omitempty"`
	// Log is the index of the newest entry that its disk had of the log when it started; 0: it is not known.
	Log uint64 `json:"log,omitempty"`
}

// AnnounceAll says that nodes have started. Live are those that the leader has heard of
// in the present term: a partition of which one of them is a member goes on with it. What
// has members elsewhere only is undecided; see Confirm.
type AnnounceAll struct {
	Nodes []Announce `json:"nodes"`
	Live  []Life     `json:"live,omitempty"`
}

// Life is one incarnation of a node.
type Life struct {
	Node        NodeID `json:"node"`
	Incarnation uint64 `json:"incarnation"`
}

// Confirm says that nodes live, of which that was not known when others announced
// themselves. Those that are other incarnations by now are left out.
type Confirm struct {
	Live []Life `json:"live"`
}

// SetNodes says that nodes are up or down. Those that are other incarnations by now, or
// none, are left out. Of the members of a partition that go down together, the one named
// last stays the last member.
type SetNodes struct {
	Nodes []SetNode `json:"nodes"`
	// Enroll is like Enroll.Most for the nodes that come up; 0: everything at once.
	Enroll int `json:"enroll,omitempty"`
}

// SetDisks says which disks a node has from now on.
type SetDisks struct {
	Node        NodeID `json:"node"`
	Incarnation uint64 `json:"incarnation"`
	Disks       []Disk `json:"disks"`
	// Emptied are ids of disks that are taken out, on which the node has nothing any more:
	// nothing is waited for from them.
	Emptied []string `json:"emptied,omitempty"`
}

// Drain says that a node shall hold nothing, or that it shall again.
type Drain struct {
	Node  NodeID `json:"node"`
	Drain bool   `json:"drain"`
}

// Reweight says how much of a node's weight counts for placement, 1 to 1000 percent.
type Reweight struct {
	Node    NodeID `json:"node"`
	Percent int    `json:"percent"`
}

// SetOut says that nodes have been down for so long that others shall hold what they
// held. Those that are up or other incarnations by now are left out.
type SetOut struct {
	Nodes []Life `json:"nodes"`
}

// SetOutAfter sets how long a node may be down; 0 stands for DefaultOutAfter, a negative
// number for ever.
type SetOutAfter struct {
	Seconds int64 `json:"seconds"`
}

// Remove forgets a node that is down, or that has no disks. It is refused with ErrNeeded
// while the node alone holds partitions, unless Force is the node's name: then they are
// lost as with Force. Its number is never given again: see View.Removed.
type Remove struct {
	Node  NodeID `json:"node"`
	Force string `json:"force,omitempty"`
}

// Welcome says that a new node may take the name of one that was removed.
type Welcome struct {
	Name string `json:"name"`
}

// Force gives the partitions that only Node has, which is down, to others, although what
// was acknowledged may be lost: to To or, if that is 0, to whoever is likely to have the
// most of it. Name must be the node's: nobody does this by mistake.
type Force struct {
	Node NodeID `json:"node"`
	Name string `json:"name"`
	To   NodeID `json:"to,omitempty"`
	// Absent: only what was on disks that are missing is given up; Node may be up, and begins
	// anew with nothing where nobody else shall hold the partition. Of a node that is Older it is
	// what its copy lacks.
	Absent bool `json:"absent,omitempty"`
}

// SetNode says that a node is up or down, if it still is the given incarnation.
type SetNode struct {
	Node        NodeID    `json:"node"`
	Incarnation uint64    `json:"incarnation"`
	State       NodeState `json:"state"`
	At          time.Time `json:"at"`
	Log         uint64    `json:"log,omitempty"` // how much of the log it has, as in Witness; 0: nothing is said
}

// AddPolicy makes the policy that keeps Copies copies, or finds it.
type AddPolicy struct {
	Copies int `json:"copies"`
}

// SetDefault makes the policy that keeps Copies copies, which must be there, that of volumes
// that do not choose.
type SetDefault struct {
	Copies int `json:"copies"`
}

// SetHold says that partitions stay where they shall be although nodes join, go for long or
// change their weight, or that they do not.
type SetHold struct {
	Hold bool `json:"hold"`
}

// SetTargets says who shall hold the partitions of a policy: element i is for
// partition i, nil leaves it as it is. It is refused as stale if the map has changed
// since the epoch that the placement was computed from.
type SetTargets struct {
	Policy  object.PolicyID `json:"policy"`
	Since   Epoch           `json:"since"`
	Targets [][]NodeID      `json:"targets"`
}

// ChangeISR puts a learner in sync or takes a member out, if the partition still has
// the given epoch. The primary proposes it. To remove a learner gives a new epoch and
// nothing else: a proposal to add it, if not decided yet, is then void. Renew does so
// without a learner: members are made equal anew.
type ChangeISR struct {
	Policy    object.PolicyID  `json:"policy"`
	Partition object.Partition `json:"partition"`
	Epoch     Epoch            `json:"epoch"`
	Add       NodeID           `json:"add,omitempty"`
	Remove    NodeID           `json:"remove,omitempty"`
	Renew     bool             `json:"renew,omitempty"`
}

// ChangeISRs makes changes of many partitions in one epoch, each as ChangeISR would. Those
// that are not possible any more are left out, and so is all but the first of a partition.
// It is refused, as the first of them is, if none is possible.
type ChangeISRs struct {
	Changes []ChangeISR `json:"changes"`
}

// Encode gives the command's bytes for Machine.Apply.
func (c *Command) Encode() []byte {
	b, err := json.Marshal(c)
	if err != nil {
		panic(fmt.Sprintf("encode command: %v", err)) // only for years beyond 9999
	}
	return b
}

// Result is the answer to a command.
type Result struct {
	Refusal     string          `json:"refusal,omitempty"` // kind, see refusals
	Reason      string          `json:"reason,omitempty"`
	Epoch       Epoch           `json:"epoch"`
	Node        NodeID          `json:"node,omitempty"`        // Announce
	Incarnation uint64          `json:"incarnation,omitempty"` // Announce
	Policy      object.PolicyID `json:"policy,omitempty"`      // Format, AddPolicy
	Nodes       []Life          `json:"nodes,omitempty"`       // AnnounceAll, in its order; 0: refused
	Last        *object.Group   `json:"last,omitempty"`        // Leave: one of those that the node left
	// Partitions is how many were given away (Force), were changed (ChangeISRs), the node left (Leave), or
	// have got learners (Enroll).
	Partitions int `json:"partitions,omitempty"`
}

// DecodeResult reads what Machine.Apply returned; the command's refusal is the error.
func DecodeResult(b []byte) (Result, error) {
	var r Result
	if err := json.Unmarshal(b, &r); err != nil {
		return r, fmt.Errorf("decode result of a cluster command: %w", err)
	}
	return r, r.Err()
}

// Err is nil if the command was carried out.
func (r *Result) Err() error {
	if r.Refusal == "" {
		return nil
	}
	if kind, ok := refusals[r.Refusal]; ok {
		return fmt.Errorf("%w: %s", kind, r.Reason)
	}
	return fmt.Errorf("%s: %s", r.Refusal, r.Reason)
}
