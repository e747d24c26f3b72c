package catalog

import (
	"time"

	"sheepdog/storage/object"
)

// Limits of what the catalog takes.
const (
	MaxName       = 255      // bytes of a VDI's name or a snapshot's tag
	MaxSize       = 64 << 40 // bytes of a VDI
	MaxIndex      = 1 << 26  // objects of a VDI: MaxSize in the smallest objects
	MaxAttributes = 64 << 10 // bytes of all attributes of a VDI, keys included
	MaxHoldText   = 64 << 10 // bytes of a Hold
	maxText       = 1024     // bytes of a node's name, a holder, an identity
	// MaxVMState is the largest state of a machine, in bytes.
	MaxVMState = 16 << 40
	// MaxHold is how long an owner may keep others away by Acquire.Hold. What a clock that is
	// wrong makes longer does not count.
	MaxHold = 30 * time.Second
)

// State tells what a vid is used for.
type State string

// States of a vid.
const (
	Live     State = "live"     // a VDI or a snapshot
	Reserved State = "reserved" // its map is being made; not a volume yet
	Deleted  State = "deleted"  // no volume any more, but there may be objects
)

// Ref names one use of a vid: vids are used again, serials are not.
type Ref struct {
	VID    object.VID `json:"vid"`
	Serial uint64     `json:"serial"`
}

// Node is one start of a node.
type Node struct {
	Name        string `json:"name"`
	Incarnation uint64 `json:"incarnation"`
}

// Lock keeps a VDI from changing hands and from being deleted.
type Lock struct {
	Holder string    `json:"holder"`
	Node   string    `json:"node"`
	Since  time.Time `json:"since"`
}

// Hold is a text by which somebody keeps others away from a VDI, by rules of its own.
type Hold struct {
	Revision uint64 `json:"revision"`
	Text     string `json:"text,omitempty"`
}

// VDI is what is known of a vid. Values are copies; what they point to never changes.
type VDI struct {
	Ref
	State  State  `json:"state"`
	Family uint64 `json:"family"` // the same for all that may share objects
	Name   string `json:"name,omitempty"`

	Snapshot   bool   `json:"snapshot,omitempty"`
	Tag        string `json:"tag,omitempty"`
	SnapshotID uint32 `json:"snapshot_id,omitempty"` // of a working VDI: the one its next snapshot gets
	Identity   string `json:"identity,omitempty"`    // of a snapshot's content

	Size      int64           `json:"size"`
	SizeShift uint8           `json:"size_shift"`
	Policy    object.PolicyID `json:"policy"`
	// Moves counts how often the family got another policy: what was found out about objects holds while it does.
	Moves   uint64     `json:"moves,omitempty"`
	Parent  object.VID `json:"parent,omitempty"`
	Created time.Time  `json:"created"`
	Snapped time.Time  `json:"snapped,omitzero"`

	// What a native client wrote into the header of a working VDI stays with the snapshot that
	// it becomes: the size of the machine's state in bytes, and the machine's clock in ns.
	// NextTag is for that snapshot, unless it is given another one.
	VMStateSize int64  `json:"vm_state_size,omitempty"`
	VMClock     uint64 `json:"vm_clock,omitempty"`
	NextTag     string `json:"next_tag,omitempty"`

	// Trim is 0, or the size before the VDI was shrunk while there may be data beyond Size.
	Trim int64 `json:"trim,omitempty"`

	Owner *Node `json:"owner,omitempty"`
	// Generation grows whenever somebody else may use the vid, or for something else: what
	// comes under an older one is refused.
	Generation uint64 `json:"generation,omitempty"`
	// Previous are owners before that may not know yet that they are not.
	Previous []Node `json:"previous,omitempty"`
	// HeldUntil is before when others do not become the owner, by their clock.
	HeldUntil  time.Time         `json:"held_until,omitzero"`
	Lock       *Lock             `json:"lock,omitempty"`
	Attributes map[string]string `json:"attributes,omitempty"`
	Hold       *Hold             `json:"hold,omitempty"`
	// Replaced is how often the content of a working VDI was replaced by a snapshot's.
	Replaced uint64 `json:"replaced,omitempty"`

	// MapGone says of a deleted vid that its map is removed: it waits only for others to
	// stop using its objects.
	MapGone bool `json:"map_gone,omitempty"`
	// Move says of a reserved or deleted vid that it stands for objects of its family in Policy, which is
	// another one than the family's: a copy being made, or what is left of one. None of them are its own.
	Move bool `json:"move,omitempty"`
	// Source is what a reserved vid's map is made from, By who makes it.
	Source object.VID `json:"source,omitempty"`
	By     *Node      `json:"by,omitempty"`
}

// Origin is what a VDI, its snapshots and what comes in its place by a rollback have in common, and no other VDI has: not
// one of the same name that is made when this one was deleted, nor a clone.
type Origin struct {
	Name    string
	Family  uint64
	Created int64 // Unix time in ns
}

// Origin is that of a VDI or snapshot, also of a deleted one.
func (v *VDI) Origin() Origin { return Origin{v.Name, v.Family, v.Created.UnixNano()} }

// Objects is the number of objects that make up the VDI's size.
func (v *VDI) Objects() int64 { return (v.Size + 1<<v.SizeShift - 1) >> v.SizeShift }

// VMStateObjects is the number of objects that the machine's state takes.
func (v *VDI) VMStateObjects() int64 { return (v.VMStateSize + 1<<v.SizeShift - 1) >> v.SizeShift }

// MaxObjects is how many objects there may be: more than make up the size while there
// may be data beyond it.
func (v *VDI) MaxObjects() int64 { return (max(v.Size, v.Trim) + 1<<v.SizeShift - 1) >> v.SizeShift }

// Reserved returns the text and the revision of the VDI's Hold; 0 if there never was one.
func (v *VDI) Reserved() (text string, revision uint64) {
	if v.Hold == nil {
		return "", 0
	}
	return v.Hold.Text, v.Hold.Revision
}

// HeldAt reports whether at that time, by the clock of who asks, the owner keeps others away.
func (v *VDI) HeldAt(t time.Time) bool {
	return v.Owner != nil && t.Before(v.HeldUntil) && v.HeldUntil.Sub(t) <= MaxHold
}
