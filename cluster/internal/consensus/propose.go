package consensus

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"syscall"
	"time"

	"github.com/hashicorp/raft"

	"sheepdog/storage/object"
)

// Forwarder takes proposals to the leader.
type Forwarder interface {
	// Forward hands an entry to Log.ApplyForwarded of the named node and returns its
	// answer. It may fail with the entry handed over. It keeps no entry.
	Forward(ctx context.Context, leader string, entry []byte) (answer []byte, err error)
}

// Pauses between attempts while the leader stays the same and does not take a command.
const (
	firstPause = 5 * time.Millisecond
	maxPause   = 250 * time.Millisecond
)

// errStopped ends what waits when the log stops; kindOf gives it its reason.
var errStopped = errors.New("the log has stopped")

// Propose appends a command for a machine and returns the machine's result after it
// was applied here. It fails with object.ErrNoSpace or ErrIO if the log cannot be
// written, with object.ErrUnavailable if there was no leader in time, with
// object.ErrClosed while closing; then the command may still be applied later, once.
func (l *Log) Propose(ctx context.Context, machine string, command []byte) ([]byte, error) {
	if machine == noMachine {
		return nil, fmt.Errorf("propose: no state machine is named: %w", object.ErrInvalid)
	}
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, proposeTimeout)
		defer cancel()
	}
	result, err := l.propose(ctx, machine, command)
	if err != nil {
		return nil, fmt.Errorf("propose to %s: %w", machine, err)
	}
	return result, nil
}

// propose repeats a command until it knows that it was applied, or why it is not.
func (l *Log) propose(ctx context.Context, machine string, command []byte) ([]byte, error) {
	e := entry{since: l.host.progress.index(), machine: machine, command: command}
	var b []byte
	var last error
	pause := firstPause
	fresh, renewed := true, false // nobody has the entry yet; it is the second one
	for {
		if b == nil {
			rand.Read(e.id[:]) // never fails
			var err error
			if b, err = e.encode(); err != nil {
				return nil, fmt.Errorf("%w: %w", object.ErrInvalid, err)
			}
		}
		leader, changed, err := l.awaitLeader(ctx)
		if err != nil {
			return nil, l.kindOf(errors.Join(err, last))
		}
		a := l.attempt(ctx, leader, changed, b)
		switch a.kind {
		case answerDone:
			if err := l.host.progress.await(ctx, a.index, l.failed, l.stop); err != nil {
				return nil, l.kindOf(err)
			}
			return a.body, nil
		case answerForgotten:
			// The answer is certain if nobody else has this entry: it was not applied. This
			// node was only too far behind to say so, and now knows better.
			if !fresh || renewed {
				return nil, fmt.Errorf("%w: %w", object.ErrUnavailable, errForgotten)
			}
			e.since, renewed, b = a.index, true, nil
			continue
		case answerRetry:
			last = a.err
		default:
			return nil, a.failure()
		}
		fresh = false
		pause = l.pause(ctx, changed, pause)
	}
}

// pause waits for another leader, but not for long, and returns the next pause.
func (l *Log) pause(ctx context.Context, changed <-chan struct{}, d time.Duration) time.Duration {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-changed:
		return firstPause
	case <-t.C:
	case <-ctx.Done():
	case <-l.failed:
	case <-l.stop:
	}
	return min(2*d, maxPause)
}

func (l *Log) attempt(ctx context.Context, leader string, changed <-chan struct{}, b []byte) answerOf {
	if leader == l.cfg.Node {
		return l.applyHere(ctx, b)
	}
	// A leader that hangs holds an attempt until there is another one.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		select {
		case <-changed:
			cancel()
		case <-ctx.Done():
		}
	}()
	reply, err := l.cfg.Forwarder.Forward(ctx, leader, b)
	if err != nil {
		return answerOf{kind: answerRetry, err: fmt.Errorf("forward to node %q: %w", leader, err)}
	}
	return decodeAnswer(reply)
}

// ApplyForwarded takes an entry that another node's Propose gave to its Forwarder. The
// answer is for that one, whatever it says; there is always one.
func (l *Log) ApplyForwarded(ctx context.Context, b []byte) []byte {
	if _, err := decodeEntry(b); err != nil {
		a := answerOf{kind: answerRefused, body: []byte(err.Error())}
		return a.encode()
	}
	if !l.Leading() {
		a := answerOf{kind: answerRetry, body: []byte(ErrNotLeader.Error())}
		return a.encode()
	}
	a := l.applyHere(ctx, b)
	return a.encode()
}

// applyHere has raft append an entry, and waits until it was applied.
func (l *Log) applyHere(ctx context.Context, b []byte) answerOf {
	f := l.raft.Apply(b, enqueueTimeout)
	response, err := l.await(ctx, func() error { return f.Error() }, f.Response)
	if err != nil {
		return l.answerTo(err)
	}
	l.nudge()
	o := response.(outcome)
	switch {
	case errors.Is(o.err, errForgotten):
		return answerOf{kind: answerForgotten, index: o.index}
	case o.err != nil:
		return answerOf{kind: answerRefused, index: o.index, body: []byte(o.err.Error())}
	}
	return answerOf{kind: answerDone, index: o.index, body: o.result}
}

func (l *Log) answerTo(err error) answerOf {
	kind := answerRetry
	switch failure := l.kindOf(err); {
	case retryable(err):
	case !l.alone() && ctxError(err) == nil:
		// Another node may be able to write its log, and will lead.
	case errors.Is(failure, object.ErrNoSpace):
		kind, err = answerNoSpace, failure
	case errors.Is(failure, object.ErrIO):
		kind, err = answerIO, failure
	default:
		kind, err = answerFailed, failure
	}
	return answerOf{kind: kind, err: err}
}

func ctxError(err error) error {
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return nil
}

// nudge tells the others soon what is committed. raft tells them with the next entries,
// or after its CommitTimeout, which would delay each command that comes from another
// node; so there is a next entry.
func (l *Log) nudge() {
	if l.net == nil || len(l.raft.GetConfiguration().Configuration().Servers) < 2 {
		return
	}
	select {
	case l.nudges <- struct{}{}:
	default: // one is on its way and will do
	}
}

// runNudges appends the entries that nudge asks for, one at a time.
func (l *Log) runNudges() {
	defer l.wait.Done()
	for {
		select {
		case <-l.nudges:
			l.await(context.Background(), l.raft.Barrier(enqueueTimeout).Error) // without leadership, there is no need
		case <-l.failed:
			return
		case <-l.stop:
			return
		}
	}
}

// An answer to a forwarded entry: kind 1 | index 8 | result, or text of the failure.
type answerKind byte

const (
	answerDone      answerKind = iota + 1 // applied at index
	answerRefused                         // the log has it, no machine took it
	answerForgotten                       // see errForgotten
	answerRetry                           // this node could not; another one, or later
	answerNoSpace
	answerIO
	answerFailed // for good; only within this process
)

// answerOf is what became of an attempt.
type answerOf struct {
	kind  answerKind
	index uint64
	body  []byte
	err   error // within this process
}

func (a *answerOf) encode() []byte {
	kind, body := a.kind, a.body
	if a.err != nil {
		body = []byte(a.err.Error())
	}
	if kind == answerFailed {
		kind = answerRetry
	}
	return append(binary.LittleEndian.AppendUint64([]byte{byte(kind)}, a.index), body...)
}

func decodeAnswer(b []byte) answerOf {
	if len(b) < 1+8 {
		return answerOf{kind: answerRetry, err: errors.New("the leader's answer is damaged")}
	}
	a := answerOf{kind: answerKind(b[0]), index: binary.LittleEndian.Uint64(b[1:]), body: b[1+8:]}
	switch a.kind {
	case answerDone, answerRefused, answerForgotten, answerNoSpace, answerIO:
	default: // also what a newer version may say
		a.kind, a.err = answerRetry, fmt.Errorf("the leader answers: %s", a.body)
	}
	return a
}

// failure is the error of an answer that is neither done nor to be tried again.
func (a *answerOf) failure() error {
	switch {
	case a.err != nil:
		return a.err
	case a.kind == answerNoSpace:
		return fmt.Errorf("%w: the leader says: %s", object.ErrNoSpace, a.body)
	case a.kind == answerIO:
		return fmt.Errorf("%w: the leader says: %s", object.ErrIO, a.body)
	}
	return errors.New(string(a.body))
}

// retryable errors say that another leader, or this one later, may take the command.
func retryable(err error) bool {
	return errors.Is(err, raft.ErrNotLeader) || errors.Is(err, raft.ErrLeadershipLost) ||
		errors.Is(err, raft.ErrLeadershipTransferInProgress) || errors.Is(err, raft.ErrEnqueueTimeout)
}

// kindOf gives an error of raft a kind that the layers above know.
func (l *Log) kindOf(err error) error {
	if errors.Is(err, context.DeadlineExceeded) {
		if stored := l.guard.lastStoreError(); stored != nil {
			err = stored // why there is no leader
		}
	}
	if errors.Is(err, errStopped) {
		err = object.ErrClosed
		select {
		case <-l.failed:
			err = l.err
		default:
		}
	}
	switch {
	case errors.Is(err, object.ErrClosed):
		return err
	case errors.Is(err, raft.ErrRaftShutdown):
		return object.ErrClosed
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return fmt.Errorf("%w in %s: free some: %w", object.ErrNoSpace, l.cfg.Dir, err)
	case errors.Is(err, syscall.EIO):
		return fmt.Errorf("%w: %w", object.ErrIO, err)
	case errors.Is(err, context.Canceled):
		return err
	}
	return fmt.Errorf("%w: %w", object.ErrUnavailable, err)
}
