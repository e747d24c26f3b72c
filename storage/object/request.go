package object

// Op says what a Request does.
type Op uint8

// Operations of a Request.
const (
	OpRead    Op = iota // fill Data from [Off, Off+Len); never-written blocks read as zero; ErrNotFound if there is no object
	OpWrite             // store Data at [Off, Off+Len), creating the object if need be
	OpZero              // make [Off, Off+Len) read as zero; whole blocks become holes unless FlagNoHole. A missing object is left missing without FlagNoHole
	OpDiscard           // as OpZero without FlagNoHole
	OpSync              // everything completed before the submission is durable when it completes
)

// Flags modify a Request.
type Flags uint8

// Flags of a Request.
const (
	FlagFUA    Flags = 1 << iota // completes only when durable
	FlagNoHole                   // OpZero: keep the range allocated (a later write there needs no new space)
	// FlagAll makes OpSync cover what was completed for Volume through any node, on every
	// replica of every partition of Policy; for Volume 0, what was completed for any volume.
	// With a Generation it also is a fence: once it has completed, no primary carries out
	// anything for Volume of an older generation, and nothing of the kind is under way.
	FlagAll
	// FlagNoGrow: OpWrite, OpZero fail with ErrNoSpace if they need new space, also if there is some.
	FlagNoGrow
	// FlagWorking: OpSync leaves out disks that are out of service already.
	FlagWorking
	// FlagTouch: OpDiscard gives an object that exists Version, also if there was nothing to discard.
	FlagTouch
)

// Request is one asynchronous operation on one object. It goes down the layers
// (volume, gateway, primary, store) as one allocation, each layer filling in its fields.
//
// The submitter owns the Request and Data again when Done is called, exactly once,
// possibly within Submit, possibly on a goroutine of a lower layer that holds no
// lock. Done must not block and must not submit synchronously waiting work.
// Between Submit and Done nobody else may touch either.
//
// A write may be held back until the next Kick of the layer it was submitted to:
// the submitter submits all that it has at hand and then kicks once, so that many
// writes share one system call.
type Request struct {
	Op    Op
	Flags Flags
	// SizeShift is the object's size as a power of two; it must be the same in all
	// requests for one object.
	SizeShift uint8
	ID        ID
	Policy    PolicyID
	Off, Len  uint32 // bytes; Off+Len <= 1<<SizeShift. Any alignment.
	Data      []byte // OpRead, OpWrite: Len bytes

	// Sums are the checksums (Sum) of the blocks of Data, if Off and Len are of whole blocks and somebody has
	// made them already, as those who verify what they receive do: what is damaged from there on is found by
	// whoever reads it. nil: the store makes them. They belong to the store as Data does.
	Sums []uint64 // OpWrite

	// Volume and Generation fence requests: a primary that has seen a newer generation
	// of Volume refuses this one with ErrStale (INV-V1), and has then changed nothing.
	// Volume 0 is never fenced. A read of generation 0 is not fenced either.
	//
	// OpSync covers what was completed for Volume through this node: writes, copies, removals. For
	// Volume 0 it covers everything completed through this node. Without FlagAll it is not fenced.
	Volume     VID
	Generation uint64

	// Filled in by the cluster layer.
	Partition Partition
	Version   Version

	Owner any // the submitter's

	Err  error // result, valid in Done
	Done func(*Request)

	Next *Request // for the layer that holds the request: intrusive queue link
}

// Key names the request's object. Partition must be set.
func (r *Request) Key() Key {
	return Key{Group{r.Policy, r.Partition}, r.ID}
}

// Complete sets the result and calls Done.
func (r *Request) Complete(err error) {
	r.Err = err
	r.Done(r)
}

// Extent is a run of bytes of an object with one allocation state.
type Extent struct {
	Off, Len uint32
	Hole     bool // never written or discarded: reads as zero and takes no space
}

// Info describes one stored object.
type Info struct {
	Key       Key
	SizeShift uint8
	Version   Version
	Allocated uint64 // bytes in blocks that were written
	Uncertain bool   // it was being written directly at a crash: its version may be older than its content
}
