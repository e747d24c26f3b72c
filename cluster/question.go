package cluster

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"sheepdog/cluster/internal/peer"
	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// Operations of operators between nodes. Their numbers travel.
const (
	opQuestion uint16 = 80 // what only the other node knows or can do. Head: nothing, or askedHead. Data: the question. Reply: the answer. Bulk
	opStop     uint16 = 81 // stop the daemon. Head: how, see stopWay. Bulk
	opDrained  uint16 = 82 // have your clients gone, and are you ready to stop with everybody? Bulk
	opRemoved  uint16 = 83 // is the node with this number removed? Head: uint16. Reply: one byte, 1 if so. Data, or in no cluster
)

const (
	// MaxQuestion bounds questions, MaxAnswer answers, in bytes.
	MaxQuestion = 2 << 20
	MaxAnswer   = 2 << 20
	// questionsAtATime bounds the questions of this node that are under way: what is kept
	// of each at the other node is kept from recovery.
	questionsAtATime = 4
	questionTimeout  = time.Minute
)

// Answering gives answers to questions of other nodes' operators. It may take a while.
type Answering func(ctx context.Context, from string, question []byte) (answer []byte)

// Answer says who answers questions from now on.
func (n *Node) Answer(a Answering) { n.answering.Store(&a) }

// Ask asks another node something, of which this package knows nothing; see Answer. It
// fails with ErrSilent if the node is down or does not answer, and with ErrInvalid if
// the question or its answer is too long.
func (n *Node) Ask(ctx context.Context, name string, question []byte) ([]byte, error) {
	m, err := n.NodeNamed(name)
	switch {
	case err != nil:
		return nil, err
	case n.flock == nil:
		return nil, errAlone
	case len(question) > MaxQuestion:
		return nil, fmt.Errorf("%w: a question of %d bytes: at most %d", object.ErrInvalid, len(question), MaxQuestion)
	case m.State != state.NodeUp:
		return nil, fmt.Errorf("ask node %q: %w: it is down since %s", m.Name, ErrSilent, m.Since.Format(time.DateTime))
	}
	select {
	case n.flock.questions <- struct{}{}:
		defer func() { <-n.flock.questions }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	answer, err := n.flock.inquire(ctx, m, question)
	if err != nil {
		return nil, fmt.Errorf("ask node %q: %w", m.Name, unanswered(err))
	}
	return answer, nil
}

const (
	// askAgainFor is how long a question is asked again whose connection was lost: the
	// node may be connected anew as long as it is not taken for down.
	askAgainFor   = 5 * time.Second
	askAgainPause = 100 * time.Millisecond
)

// inquire asks a question, and again if the connection is lost while it is under way. The node
// carries it out once: it knows the question by its id, and what it was in the life in which
// it was asked first.
func (f *flock) inquire(ctx context.Context, m *state.Node, question []byte) ([]byte, error) {
	deadline := time.Now().Add(questionTimeout)
	head := askedHead{id: rand.Uint64()}
	var lost error
	var until time.Time // for how long it is asked again
	for {
		c := &peer.Call{Class: peer.Bulk, Op: opQuestion, Head: head.append(nil), Data: question, Want: MaxAnswer, Deadline: deadline}
		err := f.await(ctx, m.Name, c)
		switch {
		case err == nil:
			answer := bytes.Clone(c.ReplyData)
			c.Release()
			return answer, nil
		case ctx.Err() != nil || errors.As(err, new(*peer.RemoteError)) || !errors.Is(err, peer.ErrDisconnected):
			return nil, err
		case lost == nil && !c.Sent():
			return nil, err // it has not got it
		case lost == nil:
			lost, until = err, time.Now().Add(askAgainFor)
			head.life = m.Incarnation
			f.log.Warn("the connection to a node was lost while it was asked something: asking again", "node", m.Name, "reason", err)
		}
		now := f.n.state.View().Node(m.ID)
		if gone(err) || time.Now().After(until) || now == nil || now.State != state.NodeUp || now.Incarnation != m.Incarnation {
			return nil, fmt.Errorf("%w; it may have done what it was asked: see how it is, and ask again", lost)
		}
		select {
		case <-time.After(askAgainPause):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// unanswered makes of the transport's failures what callers know.
func unanswered(err error) error {
	for _, e := range []error{peer.ErrDisconnected, peer.ErrTimeout, peer.ErrBusy} {
		if errors.Is(err, e) {
			return fmt.Errorf("%w: %w", ErrSilent, err)
		}
	}
	if errors.Is(err, peer.ErrUnsupported) {
		return fmt.Errorf("%w: it runs another version, which does not know this", ErrSilent)
	}
	return err
}

// await makes a call and waits for its end, or gives up.
func (f *flock) await(ctx context.Context, node string, c *peer.Call) error {
	done := make(chan error, 1)
	c.Done = func(c *peer.Call) { done <- c.Err }
	p := f.net.Peer(node)
	p.Submit(c)
	p.Kick()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err() // the call ends by itself, and its buffer goes to the collector
	}
}

// operate carries out the operations above; false: it is none of them.
func (f *flock) operate(r *peer.Request, member bool) bool {
	switch {
	case r.Op == opQuestion && member:
		f.tasks.Go(func() { f.answer(r) })
	case r.Op == opStop && member && len(r.Head) == 1:
		way := stopWay(r.Head[0])
		r.ReplyData = nil
		r.Reply(f.stopHere(way, r.From.Name))
	case r.Op == opDrained && member:
		r.ReplyData = nil
		r.ReplyHead = append(r.ReplyHead, flag(f.whole.drained.Load()))
		r.Reply(nil)
	case r.Op == opUsed && member && len(r.Head) == 4:
		r.ReplyData = nil
		r.ReplyHead = append(r.ReplyHead, flag(f.isUsed(object.VID(binary.LittleEndian.Uint32(r.Head)))))
		r.Reply(nil)
	case r.Op == opRemoved && len(r.Head) == 2:
		r.ReplyData = nil
		r.ReplyHead = append(r.ReplyHead, flag(f.n.state.View().Removed(state.NodeID(r.Head[0])|state.NodeID(r.Head[1])<<8)))
		r.Reply(nil)
	default:
		return false
	}
	return true
}

func flag(b bool) byte {
	if b {
		return 1
	}
	return 0
}

// answer answers a question.
func (f *flock) answer(r *peer.Request) {
	a := f.n.answering.Load()
	if a == nil {
		r.Reply(fmt.Errorf("%w: the node is only starting, or stopping", object.ErrUnavailable))
		return
	}
	ctx, cancel := context.WithTimeout(f.ctx, questionTimeout)
	defer cancel()
	from, question := r.From.Name, bytes.Clone(r.Data)
	head, ok := decodeAskedHead(r.Head)
	if head.life != 0 && head.life != f.n.inc.Load() {
		r.Reply(fmt.Errorf("%w: it has started anew since it was asked: see how it is, and ask again", object.ErrUnavailable))
		return
	}
	do := func() []byte { return (*a)(ctx, from, question) }
	var answer []byte
	if ok {
		answer = f.asked.once(askedKey{from, head.id}, do)
	} else {
		answer = do()
	}
	if len(answer) > len(r.ReplyData) {
		r.Reply(fmt.Errorf("%w: the answer has %d bytes, which are too many: ask the node itself", object.ErrInvalid, len(answer)))
		return
	}
	r.ReplyData = r.ReplyData[:copy(r.ReplyData, answer)]
	r.Reply(nil)
}

// askedHead is the head of a question. Nodes of earlier versions send none.
type askedHead struct {
	id   uint64 // the same when it is asked again
	life uint64 // the incarnation that was asked before; 0: none was
}

// append appends id and life, uint64 little-endian each.
func (h askedHead) append(b []byte) []byte {
	return binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint64(b, h.id), h.life)
}

func decodeAskedHead(b []byte) (h askedHead, ok bool) {
	if len(b) != 16 {
		return h, false
	}
	return askedHead{binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint64(b[8:])}, true
}

// asked has the questions of other nodes that are being answered, and those that were of late:
// one that is asked again, since its connection was lost, gets the answer of the first time.
type asked struct {
	mu   sync.Mutex
	list map[askedKey]*answered
}

type askedKey struct {
	from string
	id   uint64
}

type answered struct {
	done   chan struct{} // closed when the rest is valid
	answer []byte
	at     time.Time
}

const (
	// answersKept and answerKept bound what is kept of answers given, in number and bytes.
	// Those of what changes anything are short; a longer one is made anew.
	answersKept = 256
	answerKept  = 16 << 10
)

// once answers a question, or waits for and returns the answer that it gets already.
func (a *asked) once(key askedKey, do func() []byte) []byte {
	a.mu.Lock()
	q := a.list[key]
	if q != nil {
		a.mu.Unlock()
		<-q.done
		return q.answer
	}
	if a.list == nil {
		a.list = map[askedKey]*answered{}
	}
	a.forget()
	q = &answered{done: make(chan struct{})}
	a.list[key] = q
	a.mu.Unlock()

	answer := do()

	a.mu.Lock()
	defer a.mu.Unlock()
	q.answer, q.at = answer, time.Now()
	if len(answer) > answerKept {
		delete(a.list, key)
	}
	close(q.done)
	return answer
}

// forget drops answers that nobody asks for any more, and some if there are too many.
func (a *asked) forget() {
	given := 0
	for key, q := range a.list {
		if q.at.IsZero() {
			continue // being answered
		}
		if given++; given > answersKept || time.Since(q.at) > 2*askAgainFor {
			delete(a.list, key)
		}
	}
}
