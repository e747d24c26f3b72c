package cluster

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// A question is answered although the connection is lost meanwhile, and carried out once. Of a node that goes
// meanwhile it is said that it may have done what it was asked.
func TestQuestionSurvivesConnection(t *testing.T) {
	w := newWorld(t, "n1", "n2")
	w.formOf(2, "n1", "n2")
	n1, n2 := w.nodes["n1"], w.nodes["n2"]
	begun, ready := make(chan struct{}, 10), make(chan struct{})
	var times atomic.Int32
	n2.Answer(func(_ context.Context, from string, question []byte) []byte {
		times.Add(1)
		begun <- struct{}{}
		<-ready
		return append([]byte(from+" asks "), question...)
	})
	type outcome struct {
		answer []byte
		err    error
	}
	ask := func() <-chan outcome {
		done := make(chan outcome, 1)
		go func() {
			answer, err := n1.Ask(context.Background(), "n2", []byte("this"))
			done <- outcome{answer, err}
		}()
		select {
		case <-begun:
		case <-time.After(20 * time.Second):
			t.Fatal("the question does not arrive")
		}
		return done
	}
	lose := func() { // all of n1's connections
		id := n1.flock.net.Identity()
		other := id
		other.Incarnation++
		if err := errors.Join(n1.flock.net.SetIdentity(other), n1.flock.net.SetIdentity(id)); err != nil {
			t.Fatal(err)
		}
	}
	for lost := range 3 {
		done := ask()
		for range lost {
			lose()
		}
		select {
		case o := <-done:
			t.Fatalf("%d connections were lost: %q, %v before there is an answer", lost, o.answer, o.err)
		case <-time.After(300 * time.Millisecond):
		}
		ready <- struct{}{}
		if o := <-done; string(o.answer) != "n1 asks this" || o.err != nil {
			t.Errorf("%d connections were lost: %q, %v", lost, o.answer, o.err)
		}
		if n := times.Swap(0); n != 1 {
			t.Errorf("%d connections were lost: carried out %d times", lost, n)
		}
	}
	done, ended := ask(), make(chan struct{})
	go func() {
		defer close(ended)
		n2.close()
	}()
	if o := <-done; !errors.Is(o.err, ErrSilent) || !strings.Contains(o.err.Error(), "ask again") {
		t.Errorf("the node has gone: %q, %v", o.answer, o.err)
	}
	close(ready)
	<-ended
}

// What is kept of answers is bounded.
func TestAsked(t *testing.T) {
	var a asked
	times := 0
	ask := func(id uint64, size int) int {
		return len(a.once(askedKey{"n1", id}, func() []byte { times++; return make([]byte, size) }))
	}
	for range 2 {
		if n := ask(1, 10); n != 10 || times != 1 {
			t.Errorf("an answer of %d bytes, made %d times", n, times)
		}
	}
	for range 2 {
		ask(2, answerKept+1)
	}
	if times != 3 {
		t.Errorf("a long answer is kept")
	}
	for id := range uint64(10 * answersKept) {
		ask(3+id, 1)
	}
	if n := len(a.list); n > answersKept+1 {
		t.Errorf("%d answers are kept", n)
	}
}
