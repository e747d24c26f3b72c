package replica

import (
	"time"

	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// Time is a point on the caller's monotonic clock, which may begin anywhere.
type Time time.Duration

// Peer names one life of a node: what an earlier incarnation had in memory is lost.
type Peer struct {
	Node        state.NodeID
	Incarnation uint64
}

// View is what the replicated state says about the partition.
type View struct {
	Epoch     state.Epoch
	ISR       []Peer // in sync, the primary first
	Learners  []Peer // up, and to be brought in sync
	Former    []Peer // may still take themselves for the primary
	MinInSync int    // changes wait while there are fewer in sync (INV-R4)
	// Whole: all who shall hold the partition are up and in sync. What others have of it is
	// not needed any more.
	Whole bool
	// Lost is when somebody gave up what the last member had: older replicas may be all that
	// is left of it.
	Lost state.Epoch
	// Restarted is when the partition was begun again with what one of its members had left
	// after all had lost their memory. Marks of earlier epochs mean nothing since.
	Restarted state.Epoch
}

// Options of a Partition. All are needed.
type Options struct {
	Self Peer
	// AckTimeout is how long a member may take for a change before its exclusion is
	// proposed.
	AckTimeout time.Duration
	// LearnerTimeout is the same for a learner, which is dropped; and the pause before it
	// is tried again.
	LearnerTimeout time.Duration
	// Resend is the pause before something is sent again after it was refused or the
	// connection was lost, and before a proposal is repeated.
	Resend time.Duration
	// Patience is how long an op waits for its turn, the lease or members before it is refused with ErrRetry: for how long
	// it is asked again is for who wants it to decide.
	Patience time.Duration
}

// Op is a read or a change of a range of one object. The caller owns it but for the
// time between Submit and the effect Answer; one Op may be used again afterwards.
type Op struct {
	ID object.ID
	// Off and Len are the range rounded to whole blocks: a change of a part of a block
	// reads and writes all of it.
	Off  uint32
	Len  uint32
	Read bool
	// Grows: the change may need new space in the stores.
	Grows bool
	// Whole ops concern all of the object, as creation by copying and deletion do.
	Whole bool

	// Err is the outcome: valid in Answer. See ErrRetry.
	Err error
	// Open, with ErrRetry: what becomes of the change is decided by the next epoch.
	Open bool

	Owner any // the caller's

	state    opState
	careful  bool // it goes to the others only when this node has had the space for it
	version  object.Version
	need     slots    // whose success is missing; of a repair, the learner
	sending  slots    // Sends under way
	lost     slots    // to be sent again
	short    slots    // did not have the space
	fetched  slots    // asked for sound content in vain, or with success
	refs     int      // effects under way that use the op
	began    Time     // when it was submitted
	sent     Time     // when it got its version
	learner  *learner // not nil: it keeps others off an object that is repaired there
	link              // in Partition.sequenced or Partition.held
	list     *opList  // which of them; nil: none
	object   *objectQueue
	previous *Op // neighbours in the object's queue
	next     *Op
}

type opState uint8

const (
	opWaiting opState = iota // for its turn on the object
	opHeld                   // for the partition to serve, for enough members, or for refs
	opRunning                // being applied and sent, or being read
	opReady                  // carried out; for the lease
	opDone                   // answered as soon as no effect uses it
)

// slots is a set of indices of Partition.peers.
type slots uint32

func (s slots) has(i int) bool { return s&(1<<i) != 0 }

// EffectKind says what the caller shall do.
type EffectKind uint8

// Effects. Those marked with an event are answered by exactly one call of that event,
// also when they fail.
const (
	// Apply carries out Op in this node's store, a change with Version: Applied. If it is
	// Careful, a change that needs new space fails with object.ErrNoSpace. With a
	// Token in place of Op it is the change that Receive was given: Stored.
	Apply EffectKind = iota
	// Send brings Op, Version and Mark to To, whose Partition gets Receive: Acked.
	Send
	// Abandon says that nobody waits for the Send of Op to To any more: Acked may come as
	// soon as nothing uses Op's data, and shall. No event of its own.
	Abandon
	// Answer hands Op back to whoever submitted it. No event.
	Answer
	// Reply answers Receive, Survey or Ask of another node: Token is what they were given.
	// No event.
	Reply
	// Commit tells To the Mark, whose Partition gets Committed. No event.
	Commit
	// Survey asks To for the objects that it has changed and not seen committed: Surveyed.
	Survey
	// Ask asks the learner To where it stands, and for all of its objects: Asked.
	Ask
	// List lists this node's objects of the partition, and which of them have a version
	// after Mark, for the learner To: Listed.
	List
	// Repair makes To's object ID equal to this node's, or missing if it is missing here:
	// Repaired. What is rotten there is not equal.
	Repair
	// Fetch takes sound content from To for the rotten blocks of this node's object ID that
	// are in Op's range: Fetched.
	Fetch
	// SyncPeer makes all that To has durable: Synced.
	SyncPeer
	// Expel proposes that To be no member any more. No event but the View that follows.
	Expel
	// Admit proposes that the learner To be a member. No event but the View that follows.
	Admit
	// Renew proposes a new epoch in which nothing else changes. No event but the View that
	// follows.
	Renew
	// Yield gives up what this node has of object ID where the member To has holes, and all
	// of it if To has no such object: Yielded.
	Yield
	// Purge removes all that this node's store has of the partition: Purged. It may end with
	// ErrRetry as soon as Epoch has passed. In any case a mark of it that was kept is kept no
	// more before Purged: what comes later would be taken for complete if the node crashed.
	Purge
)

// Effect is something that the caller shall do. The fields that its kind does not
// mention are zero.
type Effect struct {
	Kind    EffectKind
	Epoch   state.Epoch // of the view that it belongs to; travels with what is sent
	Session uint32      // of the learner that it concerns, 0: a member; travels too
	To      Peer
	Op      *Op
	Version object.Version
	Mark    Mark
	ID      object.ID
	Token   any
	Report  Report // of Reply to Survey and Ask
	Err     error  // of Reply
	Careful bool   // of Apply
}

// Mark is a version up to which everything is there.
type Mark = object.Version

// Report is what a member or learner says of itself.
type Report struct {
	// Mark: everything up to it is in the store. Zero: nothing is known.
	Mark Mark
	// Recent are the objects that were changed beyond it, or may have been before a crash;
	// the caller adds those with rotten blocks.
	Recent []object.ID
	// Holds: there is something of the partition in the store. Of this node's own only.
	Holds bool
}

// Refusals. The caller brings them to the other side unchanged.
var (
	// ErrRetry: this node cannot do it now, another one or a later time can. Nothing was
	// acknowledged; the change may have been applied or not.
	ErrRetry = errorText("partition is served elsewhere or later")
	// ErrUnsent, beside ErrRetry: the request has not left this node, and will not. Nothing was applied.
	ErrUnsent = errorText("request was not sent")
	// ErrEpoch: the message is of another epoch than the one known here (INV-R2), or this
	// node is not done with earlier ones.
	ErrEpoch = errorText("message of another epoch")
	// ErrBusy: the learner has enough to do. Nothing was changed; the repair is asked for
	// again.
	ErrBusy = errorText("learner has enough to do")
)

type errorText string

func (e errorText) Error() string { return string(e) }
