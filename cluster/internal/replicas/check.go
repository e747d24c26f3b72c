package replicas

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"sheepdog/cluster/internal/peer"
	"sheepdog/cluster/internal/replica"
	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// Kinds of a Finding.
const (
	Differs    = "differs"    // blocks are not the primary's
	Missing    = "missing"    // the primary has the object
	Extra      = "extra"      // the primary has no such object
	Newer      = "newer"      // blocks differ, and the primary's version is the older one
	Unreadable = "unreadable" // corrupt, or the node does not say
)

// Finding is what is wrong with an object on a member.
type Finding struct {
	Object   object.ID    `json:"object"`
	Node     state.NodeID `json:"node"`
	Kind     string       `json:"kind"`
	Blocks   int          `json:"blocks,omitempty"` // that differ
	Reason   string       `json:"reason,omitempty"`
	Repaired bool         `json:"repaired,omitempty"`
}

// Checked is the outcome for one partition.
type Checked struct {
	Objects  int       `json:"objects"`
	Replicas int       `json:"replicas"` // in sync, which were compared
	Findings []Finding `json:"findings,omitempty"`
	More     int       `json:"more,omitempty"` // beyond maxFindings
}

// maxFindings bounds what is told of one partition.
const maxFindings = 1000

// Check has the primary compare all replicas of a partition by their tables of checksums,
// object by object, while clients go on. With repair it makes the others equal to itself,
// but for what it may have lost itself (Extra, Newer). It fails with replica.ErrRetry if the
// primary is another one by now.
func (r *Replicas) Check(ctx context.Context, to replica.Peer, g object.Group, epoch state.Epoch, repair bool) (*Checked, error) {
	if to == r.cfg.Self {
		return r.checkHere(ctx, g, epoch, repair)
	}
	q := question{route: route{g, epoch, to.Incarnation}}
	if repair {
		q.session = 1
	}
	c := &peer.Call{Class: peer.Bulk, Op: opCheck, Head: q.append(nil), Want: maxChecked}
	c.Deadline = time.Now().Add(checkTimeout)
	if err := r.wait(ctx, to, c); err != nil {
		return nil, unknown(err)
	}
	defer c.Release()
	k := new(Checked)
	if err := json.Unmarshal(c.ReplyData, k); err != nil {
		return nil, errMessage
	}
	return k, nil
}

const (
	maxChecked   = 1 << 20 // bytes of a Checked on its way
	checkTimeout = 10 * time.Minute
	// repairedWithin bounds how long it takes until all members are equal again.
	repairedWithin = 20 * time.Second
)

// check answers opCheck.
func (in *incoming) check() {
	k, err := in.r.checkHere(in.r.ctx, in.question.group, in.question.epoch, in.question.session == 1)
	if err == nil {
		var b []byte
		if b, err = json.Marshal(k); err == nil && len(b) > len(in.req.ReplyData) {
			err = peer.ErrTooLong
		}
		in.req.ReplyData = in.req.ReplyData[:copy(in.req.ReplyData, b)]
	}
	in.req.Reply(err)
}

// have answers opHave.
func (in *incoming) have() {
	ids, err := in.r.objects(in.question.group)
	in.req.ReplyData = in.req.ReplyData[:0]
	for _, id := range ids {
		in.req.ReplyData = le.AppendUint64(in.req.ReplyData, uint64(id))
	}
	in.req.Reply(err)
}

// inspect has fn see the partition between two events, and waits for that.
func (p *part) inspect(ctx context.Context, fn func(now replica.Time, q *replica.Partition)) error {
	done := make(chan struct{})
	p.post(event{kind: evAnswered, answer: func(now replica.Time, q *replica.Partition) {
		fn(now, q)
		close(done)
	}})
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// leads returns the members if this node is the primary in an epoch, or in any for 0, and
// has settled.
func (p *part) leads(ctx context.Context, epoch state.Epoch) (members []replica.Peer, at state.Epoch, err error) {
	serving := false
	if err := p.inspect(ctx, func(_ replica.Time, q *replica.Partition) {
		serving, members, at = q.Serving(), q.Members(), q.Epoch()
	}); err != nil {
		return nil, 0, err
	}
	if !serving || epoch != 0 && epoch != at {
		return nil, at, replica.ErrRetry
	}
	return members, at, nil
}

func (r *Replicas) checkHere(ctx context.Context, g object.Group, epoch state.Epoch, repair bool) (*Checked, error) {
	p := r.part(g)
	if p == nil {
		return nil, replica.ErrRetry
	}
	members, _, err := p.leads(ctx, epoch)
	if err != nil {
		return nil, err
	}
	ids, err := r.everything(ctx, g, epoch, members)
	if err != nil {
		return nil, err
	}
	k := &Checked{Objects: len(ids), Replicas: len(members)}
	var doubtful []object.ID
	for _, id := range ids {
		found, err := p.compare(ctx, epoch, members, id)
		if err != nil {
			return nil, err
		}
		for _, f := range found {
			// What the primary cannot read itself nobody can take from it.
			mine := f.Kind == Unreadable && f.Node == r.cfg.Self.Node
			if repair && f.Kind != Extra && f.Kind != Newer && !mine && !slices.Contains(doubtful, id) {
				doubtful = append(doubtful, id)
			}
			if len(k.Findings) < maxFindings {
				k.Findings = append(k.Findings, f)
			} else {
				k.More++
			}
		}
	}
	if len(doubtful) > 0 {
		return k, p.makeEqual(ctx, epoch, doubtful, k)
	}
	return k, nil
}

// everything lists the objects that any member has.
func (r *Replicas) everything(ctx context.Context, g object.Group, epoch state.Epoch, members []replica.Peer) ([]object.ID, error) {
	ids, err := r.objects(g)
	if err != nil {
		return nil, err
	}
	for _, m := range members[1:] {
		q := question{route: route{g, epoch, m.Incarnation}}
		c := &peer.Call{Class: peer.Bulk, Op: opHave, Head: q.append(nil), Want: peer.MaxData, Deadline: time.Now().Add(checkTimeout)}
		if err := r.wait(ctx, m, c); err != nil {
			return nil, unknown(err)
		}
		d := decoder{b: c.ReplyData}
		for len(d.b) > 0 {
			ids = append(ids, object.ID(d.u64()))
		}
		c.Release()
		if d.err != nil {
			return nil, d.err
		}
	}
	slices.Sort(ids)
	return slices.Compact(ids), nil
}

// compare compares an object on all members, when no change of it is under way.
func (p *part) compare(ctx context.Context, epoch state.Epoch, members []replica.Peer, id object.ID) ([]Finding, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	done := make(chan struct{})
	t := &Task{Group: p.group, Epoch: epoch, Verb: VerbCompare, ID: id, members: members, Done: func(*Task) { close(done) }}
	p.r.Submit(t)
	p.r.kickSoon()
	<-done
	return t.findings, t.Err
}

// compare is what VerbCompare does. The primary holds the object: all members have made
// the same changes of it.
func (t *Task) compare(key object.Key) (found []Finding, err error) {
	r := t.part.r
	mine, own, failure := r.look(r.ctx, key)
	if r.distrust(key, own); slices.Contains(own, rottenSum) {
		failure = errTable
	}
	for _, m := range t.members[1:] {
		src := source{r: r, from: m, route: route{t.Group, t.epoch, m.Incarnation}, id: key.ID}
		info, sums, err := src.sums(r.ctx, own)
		f := Finding{Object: key.ID, Node: m.Node}
		switch {
		case errors.Is(unknown(err), replica.ErrRetry):
			return nil, replica.ErrRetry
		case isNotFound(failure) && isNotFound(err):
			continue
		case failure != nil && !isNotFound(failure):
			f.Node, f.Kind, f.Reason = t.members[0].Node, Unreadable, failure.Error()
			return append(found, f), nil
		case isNotFound(err):
			f.Kind = Missing
		case err != nil:
			f.Kind, f.Reason = Unreadable, err.Error()
		case isNotFound(failure):
			f.Kind = Extra
		default:
			if f.Blocks = different(own, sums); f.Blocks == 0 {
				continue
			}
			if f.Kind = Differs; mine.Version.Less(info.Version) {
				f.Kind = Newer
			}
		}
		found = append(found, f)
	}
	return found, nil
}

// errTable: what was in blocks, or what their checksums were, is lost here.
var errTable = fmt.Errorf("some blocks or their checksums: %w", object.ErrCorrupt)

func different(a, b []uint64) (count int) {
	for i := range max(len(a), len(b)) {
		if i >= len(a) || i >= len(b) || a[i] != b[i] {
			count++
		}
	}
	return count
}

// makeEqual has the members made equal to the primary by a new epoch, and notes of which
// findings nothing is left.
func (p *part) makeEqual(ctx context.Context, epoch state.Epoch, ids []object.ID, k *Checked) error {
	ctx, cancel := context.WithTimeout(ctx, repairedWithin)
	defer cancel()
	begun := false
	if err := p.inspect(ctx, func(now replica.Time, q *replica.Partition) { begun = q.Doubt(now, epoch, ids) }); err != nil {
		return err
	}
	if !begun {
		return replica.ErrRetry
	}
	for {
		members, at, err := p.leads(ctx, 0)
		if err == nil && at > epoch {
			return p.confirm(ctx, at, members, ids, k)
		}
		if err != nil && !errors.Is(err, replica.ErrRetry) {
			return nil // the findings stay unrepaired
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(tickEvery):
		}
	}
}

func (p *part) confirm(ctx context.Context, epoch state.Epoch, members []replica.Peer, ids []object.ID, k *Checked) error {
	for _, id := range ids {
		left, err := p.compare(ctx, epoch, members, id)
		if err != nil {
			return nil
		}
		for i := range k.Findings {
			f := &k.Findings[i]
			if f.Object == id && !slices.ContainsFunc(left, func(l Finding) bool { return l.Node == f.Node }) {
				f.Repaired = true
			}
		}
	}
	return nil
}
