package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	"sheepdog/cluster/internal/peer"
	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// Operations of operators between nodes. Their numbers travel.
const (
	opQuestion uint16 = 80 // what only the other node knows or can do. Data: the question. Reply: the answer. Bulk
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
	c := &peer.Call{Class: peer.Bulk, Op: opQuestion, Data: question, Want: MaxAnswer, Deadline: time.Now().Add(questionTimeout)}
	if err := n.flock.await(ctx, m.Name, c); err != nil {
		return nil, fmt.Errorf("ask node %q: %w", m.Name, unanswered(err))
	}
	answer := bytes.Clone(c.ReplyData)
	c.Release()
	return answer, nil
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
	answer := (*a)(ctx, r.From.Name, bytes.Clone(r.Data))
	if len(answer) > len(r.ReplyData) {
		r.Reply(fmt.Errorf("%w: the answer has %d bytes, which are too many: ask the node itself", object.ErrInvalid, len(answer)))
		return
	}
	r.ReplyData = r.ReplyData[:copy(r.ReplyData, answer)]
	r.Reply(nil)
}
