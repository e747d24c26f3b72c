package replicas

import (
	"sync"
	"time"

	"github.com/zeebo/xxh3"

	"sheepdog/cluster/internal/peer"
	"sheepdog/cluster/internal/replica"
	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// Forward is a Task on its way to its primary. Its owner may use it again after Done.
type Forward struct {
	Task
	// Deadline is when the attempt fails with replica.ErrRetry at the latest, if it is another node's to carry it out; zero:
	// never. It may be carried out then all the same, but not after anything that this node sends later.
	Deadline time.Time

	call    peer.Call
	head    [maxHead]byte
	list    []replica.Peer
	from    *Replicas
	reading sync.Mutex // held by who copies Data: see kept
}

// Forward brings a task to the primary to, this node or another one, under t.Epoch, and
// calls Done with the outcome. It may be held back until Kick. Failures after which
// another try, here or elsewhere, may do it are replica.ErrRetry, and replica.ErrUnsent too if this one has not left the node.
func (r *Replicas) Forward(to replica.Peer, epoch state.Epoch, f *Forward, done func(*Task)) {
	f.Epoch, f.Done = epoch, done
	if to == r.cfg.Self {
		r.Submit(&f.Task)
		return
	}
	t := &f.Task
	m := act{route{t.Group, epoch, to.Incarnation}, action{t.Verb, t.Flags, t.SizeShift, t.ID, t.Off, t.Len, 0}, t.Volume, t.Generation, 0}
	c := &f.call
	c.Class, c.Op, c.Data, c.Want, c.ReplyData, c.ReplyHead = peer.Data, opAct, nil, 0, nil, c.ReplyHead[:0]
	switch t.Verb {
	case VerbRead:
		c.ReplyData, c.Want = t.Data, len(t.Data)
	case VerbWrite:
		t.content.of(t.Off, t.Data)
		f.from, t.number = r, r.kept.keep(f)
		m.sum, m.keeps = t.content.sum, t.number
		c.Data = t.Data
	case VerbStat, VerbSums, VerbList:
		c.Want = peer.MaxData
	}
	c.Head, c.Deadline = m.append(f.head[:0]), f.Deadline
	c.State, c.Done = f, forwarded
	r.call(to, c)
}

// forwarded takes the answer of another node.
func forwarded(c *peer.Call) {
	f := c.State.(*Forward)
	t := &f.Task
	if t.number != 0 {
		f.from.kept.drop(f, t.number)
		t.number = 0
	}
	t.content.made = false
	t.Holders = nil
	switch t.Err = unknown(c.Err); {
	case t.Err == nil:
		t.Err = f.answer()
	case !c.Sent():
		t.Err = unsent{t.Err}
	}
	c.Release()
	t.Done(t)
}

// unsent is a failure before anything was sent: see replica.ErrUnsent.
type unsent struct{ error }

func (u unsent) Unwrap() []error { return []error{u.error, replica.ErrUnsent} }

func (f *Forward) answer() error {
	t, c := &f.Task, &f.call
	d := decoder{b: c.ReplyData}
	switch t.Verb {
	case VerbRead:
		head := decoder{b: c.ReplyHead}
		if sum := head.u64(); head.end() != nil || len(c.ReplyData) != len(t.Data) || xxh3.Hash(t.Data) != sum {
			return errDamaged
		}
		return nil
	case VerbStat:
		t.Info = d.info(t.Group)
	case VerbSums:
		t.Sums = decodeSums(c.ReplyData)
		return nil
	case VerbList:
		t.Infos = t.Infos[:0]
		for len(d.b) > 0 {
			t.Infos = append(t.Infos, d.info(t.Group))
		}
	default:
		var err error
		f.list, err = decodePeers(f.list[:0], c.ReplyHead)
		t.Holders = f.list
		return err
	}
	return d.end()
}

// MaxPiece is the most that a task reads or writes, in bytes.
const MaxPiece = 4 << 20

// MaxList is the most objects that VerbList returns at once.
const MaxList = 100_000

// Readable reports whether this node has, and may answer now, what every member of a
// partition has in an epoch, but for changes under way.
func (r *Replicas) Readable(g object.Group, epoch state.Epoch) bool {
	r.mu.RLock()
	p := r.parts[g]
	r.mu.RUnlock()
	return p != nil && p.readable.Load() == uint64(epoch) && int64(r.now()) < r.lease.Load()
}

// Leased reports whether this node may answer (INV-R5).
func (r *Replicas) Leased() bool { return int64(r.now()) < r.lease.Load() }

// Lapses is even while this node has a lease. It is the same as before if the node had one all the time.
func (r *Replicas) Lapses() uint64 {
	leased := r.Leased() // first: see SetLease
	n := 2 * r.lapses.Load()
	if !leased {
		n++
	}
	return n
}

// Read submits a read to this node's own store.
func (r *Replicas) Read(q *object.Request) {
	r.clients.Add(1)
	r.cfg.Store.Submit(q)
}
