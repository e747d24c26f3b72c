package catalog

import (
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"sheepdog/storage/object"
)

// What commands are refused with; Result.Err wraps them.
var (
	ErrInvalid  = errors.New("invalid")
	ErrNotFound = errors.New("not found")
	ErrExists   = errors.New("exists")
	ErrBusy     = errors.New("busy")
	ErrLocked   = errors.New("locked")
	ErrStale    = errors.New("stale")
	ErrFull     = errors.New("full")
)

var refusals = []struct {
	name string
	kind error
}{
	{"invalid", ErrInvalid}, {"not-found", ErrNotFound}, {"exists", ErrExists}, {"busy", ErrBusy},
	{"locked", ErrLocked}, {"stale", ErrStale}, {"full", ErrFull},
}

// Command changes the state: exactly one field is set. A command that was carried out
// and comes again changes nothing, or is refused.
type Command struct {
	Create    *Create    `json:"create,omitempty"`
	Reserve   *Reserve   `json:"reserve,omitempty"`
	Snapshot  *Snapshot  `json:"snapshot,omitempty"`
	Clone     *Clone     `json:"clone,omitempty"`
	Rollback  *Rollback  `json:"rollback,omitempty"`
	Cancel    *Cancel    `json:"cancel,omitempty"`
	Delete    *Delete    `json:"delete,omitempty"`
	Resize    *Resize    `json:"resize,omitempty"`
	Trimmed   *Trimmed   `json:"trimmed,omitempty"`
	SetAttr   *SetAttr   `json:"set_attr,omitempty"`
	Describe  *Describe  `json:"describe,omitempty"`
	Acquire   *Acquire   `json:"acquire,omitempty"`
	Release   *Release   `json:"release,omitempty"`
	Lock      *SetLock   `json:"lock,omitempty"`
	Unlock    *Unlock    `json:"unlock,omitempty"`
	MapGone   *MapGone   `json:"map_gone,omitempty"`
	Collected *Collected `json:"collected,omitempty"`
	Adopt     *Adopt     `json:"adopt,omitempty"`
	Settled   *Settled   `json:"settled,omitempty"`
	Barrier   *Barrier   `json:"barrier,omitempty"`
	Hold      *SetHold   `json:"hold,omitempty"`
	Record    *SetRecord `json:"record,omitempty"`
	Move      *Move      `json:"move,omitempty"`
	Moved     *Moved     `json:"moved,omitempty"`
	Removal   *Removal   `json:"removal,omitempty"`
}

// Create makes an empty VDI: one without a map.
type Create struct {
	Name      string          `json:"name"`
	Size      int64           `json:"size"`
	SizeShift uint8           `json:"size_shift"`
	Policy    object.PolicyID `json:"policy"`
	At        time.Time       `json:"at"`
}

// Reserve takes a vid by the rule for Name, for a copy of Source's map.
type Reserve struct {
	Name   string    `json:"name"`
	Source Ref       `json:"source"`
	By     Node      `json:"by"`
	At     time.Time `json:"at"`
}

// Snapshot makes the working VDI Source a snapshot; Reserved, which must have a durable
// copy of its map, becomes the working VDI. By must own Source, under Generation unless
// that is 0, and owns the new one.
type Snapshot struct {
	Source     Ref       `json:"source"`
	Reserved   Ref       `json:"reserved"`
	Tag        string    `json:"tag"`
	Identity   string    `json:"identity"`
	By         Node      `json:"by"`
	Generation uint64    `json:"generation,omitempty"`
	At         time.Time `json:"at"`
}

// Clone makes Reserved, which must have a durable copy of the map of the snapshot Source,
// the VDI Name.
type Clone struct {
	Source   Ref       `json:"source"`
	Reserved Ref       `json:"reserved"`
	Name     string    `json:"name"`
	At       time.Time `json:"at"`
}

// Rollback makes Reserved, which must have a durable copy of the map of the snapshot
// Source, the working VDI of Source's name, and deletes the one before, Working; zero if
// there is none. By must own Working, under Generation unless that is 0.
type Rollback struct {
	Source     Ref       `json:"source"`
	Reserved   Ref       `json:"reserved"`
	Working    Ref       `json:"working"`
	By         Node      `json:"by"`
	Generation uint64    `json:"generation,omitempty"`
	At         time.Time `json:"at"`
}

// Move takes a vid by the rule for Name that stands for a copy of all objects of Source's family in another policy:
// the copy is made, and what is left of it removed, under that vid's generation. Source may be any vid of the family.
// It is refused as busy while there is such a copy under way.
type Move struct {
	Name   string          `json:"name"`
	Source Ref             `json:"source"`
	Policy object.PolicyID `json:"policy"`
	By     Node            `json:"by"`
	At     time.Time       `json:"at"`
}

// Moved has the family be what the copy Ref is: all of it in the copy's policy. Nobody who goes by what was before
// writes or reads any of it: all generations are new ones. Refused if Members is not what the family is, the copy
// aside, if it is not in the policy From, of which the copy was made, or By does not own all VDIs in it. Ref becomes a deleted one that stands for what the family left in its former policy.
type Moved struct {
	Ref     Ref             `json:"ref"`
	By      Node            `json:"by"`
	From    object.PolicyID `json:"from"`
	Members []Member        `json:"members"`
}

// Member is a vid of a family as it was when it was looked at.
type Member struct {
	Ref
	Generation uint64 `json:"generation"`
}

// Removal gives a deleted vid that stands for objects in another policy, Ref with that Generation, a new one: for who removes
// them from now on. Nobody else has that one, so what others have under way is refused once it is fenced, and Collected by them too.
type Removal struct {
	Ref        Ref    `json:"ref"`
	Generation uint64 `json:"generation"`
}

// Cancel gives up a reserved vid.
type Cancel struct {
	Ref Ref `json:"ref"`
}

// Delete deletes a VDI or a snapshot. Working says that a VDI is meant: if it has become a snapshot, that is not deleted instead of it.
type Delete struct {
	Ref     Ref       `json:"ref"`
	Working bool      `json:"working,omitempty"`
	At      time.Time `json:"at"`
}

// Resize changes a VDI's size, if Generation, unless it is 0, is still the newest. Growing
// is refused as busy while Trim is set.
type Resize struct {
	Ref        Ref    `json:"ref"`
	Size       int64  `json:"size"`
	Generation uint64 `json:"generation,omitempty"`
}

// Trimmed says that there is no data beyond the size, if that still is Size, and
// Generation, unless it is 0, still the newest.
type Trimmed struct {
	Ref        Ref    `json:"ref"`
	Size       int64  `json:"size"`
	Generation uint64 `json:"generation,omitempty"`
}

// SetAttr sets an attribute; a nil Value removes it.
type SetAttr struct {
	Ref   Ref     `json:"ref"`
	Key   string  `json:"key"`
	Value *string `json:"value"`
}

// Describe says of a working VDI what shall be known of its next snapshot, instead of what
// was said before: see VDI.
type Describe struct {
	Ref         Ref    `json:"ref"`
	Tag         string `json:"tag,omitempty"`
	VMStateSize int64  `json:"vm_state_size,omitempty"` // bytes
	VMClock     uint64 `json:"vm_clock,omitempty"`      // ns
}

// Acquire makes By the owner of a VDI, if nobody became it since generation Since. For
// Hold, MaxHold at most, others are then refused as busy; who owns it already changes that
// alone. Clocks that differ make a hold longer or shorter, nothing else.
type Acquire struct {
	Ref   Ref           `json:"ref"`
	By    Node          `json:"by"`
	Since uint64        `json:"since"`
	At    time.Time     `json:"at,omitzero"`
	Hold  time.Duration `json:"hold,omitempty"` // ns
}

// Settled says that all previous owners know that they are not, if Generation is still
// the newest.
type Settled struct {
	Ref        Ref    `json:"ref"`
	Generation uint64 `json:"generation"`
}

// SetHold stores a text with a VDI or snapshot, "" for none, if Revision is still that of
// the one before.
type SetHold struct {
	Ref      Ref    `json:"ref"`
	Revision uint64 `json:"revision"`
	Text     string `json:"text"`
}

// SetRecord stores a text under a key of its own, beside all VDIs, if Revision is still that
// of the one before, 0 for none; "" removes it.
type SetRecord struct {
	Key      string `json:"key"`
	Revision uint64 `json:"revision"`
	Text     string `json:"text"`
}

// Barrier changes nothing. Who proposed it has applied all that came before it.
type Barrier struct{}

// Release gives up ownership, if Generation is still the newest.
type Release struct {
	Ref        Ref    `json:"ref"`
	Generation uint64 `json:"generation"`
}

// SetLock locks a VDI.
type SetLock struct {
	Ref    Ref       `json:"ref"`
	Holder string    `json:"holder"`
	Node   string    `json:"node"`
	At     time.Time `json:"at"`
}

// Unlock removes Holder's lock, or anybody's if Holder is "".
type Unlock struct {
	Ref    Ref    `json:"ref"`
	Holder string `json:"holder"`
}

// MapGone says that the maps of deleted vids are removed.
type MapGone struct {
	Refs []Ref `json:"refs"`
}

// Collected says that deleted vids have no objects any more. They may be used again when Keep others, or a quarter of that of
// the same name, were given up after them: freed, with no VDI behind them. See KeepVIDs; commands of older versions
// have 0, so that an old log makes what it made. One that stands for objects in another policy is given up if its generation still is
// Generation, that of its Removal: nobody removes any of them any more then, where the family may come to be again.
type Collected struct {
	Refs       []Ref  `json:"refs"`
	Keep       int    `json:"keep,omitempty"`
	Generation uint64 `json:"generation,omitempty"`
}

// Adopt makes a vid that nobody knows, but which has objects, a deleted one.
type Adopt struct {
	VID    object.VID      `json:"vid"`
	Policy object.PolicyID `json:"policy"`
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
	Refusal string `json:"refusal,omitempty"` // kind, see refusals
	Reason  string `json:"reason,omitempty"`
	VDI     *VDI   `json:"vdi,omitempty"` // what the command made or changed
}

// DecodeResult reads what Machine.Apply returned; the command's refusal is the error.
func DecodeResult(b []byte) (Result, error) {
	var r Result
	if err := json.Unmarshal(b, &r); err != nil {
		return r, fmt.Errorf("decode result of a catalog command: %w", err)
	}
	return r, r.Err()
}

// Err is nil if the command was carried out. It says the reason; the kind is wrapped.
func (r *Result) Err() error {
	if r.Refusal == "" {
		return nil
	}
	for _, x := range refusals {
		if x.name == r.Refusal {
			return &refusal{x.kind, r.Reason}
		}
	}
	return &refusal{ErrInvalid, r.Refusal + ": " + r.Reason}
}

// refusal is a kind with a reason that does not repeat the kind.
type refusal struct {
	kind   error
	reason string
}

func (r *refusal) Error() string { return r.reason }
func (r *refusal) Unwrap() error { return r.kind }

func refuse(kind error, format string, args ...any) error {
	return &refusal{kind, fmt.Sprintf(format, args...)}
}

func refusalOf(err error) Result {
	for _, x := range refusals {
		if errors.Is(err, x.kind) {
			return Result{Refusal: x.name, Reason: err.Error()}
		}
	}
	return Result{Refusal: "invalid", Reason: err.Error()}
}
