package gateway

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"sheepdog/cluster/internal/replica"
	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

const second = replica.Time(time.Second)

var (
	group   = object.Group{Policy: 1, Partition: 5}
	n1      = replica.Peer{Node: 1, Incarnation: 1}
	n2      = replica.Peer{Node: 2, Incarnation: 1}
	n3      = replica.Peer{Node: 3, Incarnation: 1}
	errDisk = fmt.Errorf("%w: test", object.ErrIO)
)

func newGateway() *Gateway {
	g := New(Options{Retry: 20 * time.Millisecond, Timeout: 10 * time.Second})
	g.SetView(0, group, View{Epoch: 1, ISR: []replica.Peer{n1, n2}})
	return g
}

// happened shows what the gateway wants done.
func happened(g *Gateway) string {
	var b strings.Builder
	for _, e := range g.Effects() {
		switch e.Kind {
		case Forward:
			fmt.Fprintf(&b, "forward %d to %d under %d; ", e.Request.Off, e.To.Node, e.Epoch)
		case Done:
			fmt.Fprintf(&b, "done %d %v; ", e.Request.Off, kind(e.Request.Err))
		case Sync:
			fmt.Fprintf(&b, "sync %d; ", e.To.Node)
		case Flushed:
			fmt.Fprintf(&b, "flushed %v; ", kind(e.Flush.Err))
		}
	}
	return strings.TrimSuffix(b.String(), "; ")
}

func kind(err error) string {
	for _, k := range []error{object.ErrUnavailable, object.ErrIO} {
		if errors.Is(err, k) {
			return k.Error()
		}
	}
	return fmt.Sprint(err)
}

func expect(t *testing.T, g *Gateway, want string) {
	t.Helper()
	if got := happened(g); got != want {
		t.Fatalf("got  %q\nwant %q", got, want)
	}
}

func write(off, n uint32) *Request {
	return &Request{Group: group, ID: 7, Off: off, Len: n, Volume: 3}
}

func TestChangesOfOneRangePassOneAfterTheOther(t *testing.T) {
	g := newGateway()
	a, b, c, d := write(0, 2), write(1, 2), write(5, 1), write(2, 1)
	read := &Request{Group: group, ID: 7, Off: 1, Len: 1, Read: true}
	for _, r := range []*Request{a, b, c, d, read} {
		g.Submit(0, r)
	}
	expect(t, g, "forward 0 to 1 under 1; forward 5 to 1 under 1; forward 1 to 1 under 1")
	if b.sent != 0 || read.sent == 0 {
		t.Fatal("the reader has been forwarded, the second writer not")
	}
	g.Answered(0, a, nil, nil)
	expect(t, g, "done 0 <nil>; forward 1 to 1 under 1")
	g.Answered(0, b, nil, replica.ErrRetry) // keeps its turn
	g.Tick(second)
	expect(t, g, "forward 1 to 1 under 1")
	g.Answered(second, b, nil, nil)
	expect(t, g, "done 1 <nil>; forward 2 to 1 under 1")
}

func TestRequestsFollowTheEpoch(t *testing.T) {
	g := newGateway()
	a := write(0, 1)
	g.Submit(0, a)
	expect(t, g, "forward 0 to 1 under 1")
	g.SetView(0, group, View{Epoch: 2, ISR: []replica.Peer{n2}})
	expect(t, g, "") // the first attempt may still be carried out
	g.Answered(0, a, nil, replica.ErrRetry)
	expect(t, g, "forward 0 to 2 under 2")
	g.Answered(0, a, nil, replica.ErrRetry)
	g.SetView(0, group, View{Epoch: 3, ISR: []replica.Peer{n1}})
	expect(t, g, "forward 0 to 1 under 3")
	g.Answered(11*second, a, nil, replica.ErrRetry)
	expect(t, g, "done 0 partition unavailable")
	says(t, a.Err, "node 1, its primary in epoch 3, said last: partition is served elsewhere or later")
	b := write(1, 1)
	b.Group.Partition = 9 // of which nothing is known
	g.Submit(20*second, b)
	g.Tick(29 * second)
	expect(t, g, "")
	g.Tick(30 * second)
	expect(t, g, "done 1 partition unavailable")
	says(t, b.Err, "this node does not know who holds it")
	c, d := write(2, 1), write(2, 1)
	g.Submit(40*second, c)
	g.Submit(40*second, d)
	g.Tick(50 * second)
	expect(t, g, "forward 2 to 1 under 3; done 2 partition unavailable")
	says(t, d.Err, "an earlier change of the same blocks is still under way")
	g.Answered(50*second, c, nil, nil)
	if !g.Idle() {
		t.Error("not idle")
	}
}

func says(t *testing.T, err error, want string) {
	t.Helper()
	if !strings.HasSuffix(err.Error(), want) {
		t.Errorf("%v", err)
	}
}

func TestFlush(t *testing.T) {
	holders := []replica.Peer{n1, n2}
	begin := func(t *testing.T) (*Gateway, *Flush) {
		g, f := newGateway(), &Flush{Volume: 3}
		a := write(0, 1)
		g.Submit(0, a)
		g.Answered(0, a, holders, nil)
		g.Flush(0, f)
		expect(t, g, "forward 0 to 1 under 1; done 0 <nil>; sync 1; sync 2")
		return g, f
	}
	t.Run("all holders", func(t *testing.T) {
		g, f := begin(t)
		g.Synced(0, n1, nil)
		expect(t, g, "")
		g.Synced(0, n2, nil)
		expect(t, g, "flushed <nil>")
		g.Flush(0, f) // there is nothing new
		expect(t, g, "flushed <nil>")
	})
	t.Run("a holder leaves", func(t *testing.T) {
		g, _ := begin(t)
		g.Synced(0, n1, nil)
		g.Synced(0, n2, replica.ErrRetry)
		expect(t, g, "")
		g.Tick(second)
		expect(t, g, "sync 2")
		g.SetView(second, group, View{Epoch: 2, ISR: []replica.Peer{n1}, Learners: []replica.Peer{n2}})
		expect(t, g, "flushed <nil>")
	})
	t.Run("a holder restarts as the last member", func(t *testing.T) {
		g, f := begin(t)
		n1again := replica.Peer{Node: 1, Incarnation: 2}
		g.SetView(0, group, View{Epoch: 4, ISR: []replica.Peer{n1again}, Restarted: 3})
		expect(t, g, "flushed disk failed")
		g.Flush(0, f)
		expect(t, g, "flushed <nil>")
	})
	t.Run("what else there is, is not forgotten", func(t *testing.T) {
		g := newGateway()
		other := object.Group{Policy: 1, Partition: 6}
		g.SetView(0, other, View{Epoch: 1, ISR: []replica.Peer{n3}})
		a, b := write(0, 1), write(1, 1)
		b.Group = other
		g.Submit(0, a)
		g.Submit(0, b)
		g.Answered(0, a, []replica.Peer{n1}, nil)
		g.Answered(0, b, []replica.Peer{n3}, nil)
		g.Flush(0, &Flush{Volume: 3})
		expect(t, g, "forward 0 to 1 under 1; forward 1 to 3 under 1; done 0 <nil>; done 1 <nil>; sync 1; sync 3")
		g.SetView(0, group, View{Epoch: 4, ISR: []replica.Peer{n2}, Restarted: 3})
		expect(t, g, "flushed disk failed")
		g.Flush(0, &Flush{Volume: 3})
		expect(t, g, "") // node 3 has made nothing durable yet
		g.Synced(0, n3, nil)
		expect(t, g, "sync 3")
		g.Synced(0, n3, nil)
		expect(t, g, "flushed <nil>")
	})
	t.Run("it restarts when all is durable", func(t *testing.T) {
		g, _ := begin(t)
		g.Synced(0, n1, nil)
		g.Synced(0, n2, nil)
		g.SetView(0, group, View{Epoch: 4, ISR: []replica.Peer{n1}, Restarted: 3})
		expect(t, g, "flushed <nil>")
	})
	t.Run("another flush meanwhile", func(t *testing.T) {
		g, _ := begin(t)
		g.Synced(0, n1, nil)
		g.Flush(0, &Flush{Volume: 3}) // what is not durable yet was answered before this one, too
		g.Flush(0, &Flush{Volume: 4})
		expect(t, g, "flushed <nil>")
		g.Synced(0, n2, nil)
		expect(t, g, "flushed <nil>; flushed <nil>")
	})
	t.Run("another flush of more", func(t *testing.T) {
		g, _ := begin(t)
		b := write(1, 1)
		g.Submit(0, b)
		g.Answered(0, b, []replica.Peer{n2}, nil)
		g.Flush(0, &Flush{All: true})
		g.Flush(0, &Flush{Volume: 3})
		expect(t, g, "forward 1 to 1 under 1; done 1 <nil>")
		g.Synced(0, n2, nil)
		expect(t, g, "sync 2")
		g.Synced(0, n1, nil)
		expect(t, g, "flushed <nil>")
		g.Synced(0, n2, nil)
		expect(t, g, "flushed <nil>; flushed <nil>")
	})
	t.Run("many flushes wait for the same", func(t *testing.T) {
		g, _ := begin(t)
		for range 1000 {
			g.Flush(0, &Flush{Volume: 3})
		}
		for _, f := range g.flushes {
			if len(f.left.list) != 1 {
				t.Fatalf("a flush waits for %d things", len(f.left.list))
			}
		}
	})
	t.Run("another flush fails with the first", func(t *testing.T) {
		g, _ := begin(t)
		g.Flush(0, &Flush{Volume: 3})
		g.SetView(0, group, View{Epoch: 4, ISR: []replica.Peer{n1}, Restarted: 3})
		expect(t, g, "flushed disk failed; flushed disk failed")
	})
	t.Run("a write during the sync is not covered", func(t *testing.T) {
		g, _ := begin(t)
		a, second := write(0, 1), &Flush{Volume: 3}
		g.Submit(0, a)
		g.Answered(0, a, []replica.Peer{n1, n3}, nil)
		g.Flush(0, second)
		expect(t, g, "forward 0 to 1 under 1; done 0 <nil>; sync 3")
		g.Synced(0, n1, nil)
		expect(t, g, "sync 1") // again: the one that ended began before the write was answered
		g.Synced(0, n2, nil)
		expect(t, g, "flushed <nil>")
		g.Synced(0, n3, nil)
		expect(t, g, "")
		g.Synced(0, n1, nil)
		expect(t, g, "flushed <nil>")
	})
	t.Run("nobody answers", func(t *testing.T) {
		g, f := begin(t)
		g.Synced(0, n1, nil)
		g.Tick(10 * second)
		expect(t, g, "flushed partition unavailable")
		g.Synced(10*second, n2, nil)
		g.Flush(11*second, f)
		expect(t, g, "sync 2") // what was not durable then is not forgotten
		g.Synced(11*second, n2, nil)
		expect(t, g, "flushed <nil>")
	})
	// answered has a write answered in the present epoch, by some holders.
	answered := func(g *Gateway, holders ...replica.Peer) {
		a := write(0, 1)
		g.Submit(0, a)
		g.Answered(0, a, holders, nil)
		happened(g)
	}
	held := func(g *Gateway) int { return len(g.volumes[3].list) }
	t.Run("epochs do not pile up", func(t *testing.T) {
		g := newGateway()
		answered(g, n1, n2)
		for epoch := state.Epoch(2); epoch < 100; epoch++ {
			isr := []replica.Peer{n1, n3}
			if epoch == 50 {
				isr = []replica.Peer{n1}
			}
			g.SetView(0, group, View{Epoch: epoch, ISR: isr})
			answered(g, isr...)
		}
		answered(g, n1, n3, n2) // which learns again
		if held(g) != 1 {
			t.Errorf("%d things are held", held(g))
		}
		g.Flush(0, &Flush{Volume: 3})
		expect(t, g, "sync 1; sync 3; sync 2")
		g.Synced(0, n1, nil)
		g.Synced(0, n2, nil)
		expect(t, g, "")
		g.Synced(0, n3, nil)
		expect(t, g, "flushed <nil>")
	})
	t.Run("an answer of an earlier epoch comes late", func(t *testing.T) {
		g := newGateway()
		a := write(5, 1)
		g.Submit(0, a)
		g.SetView(0, group, View{Epoch: 2, ISR: []replica.Peer{n1, n3}})
		answered(g, n3)
		g.Answered(0, a, []replica.Peer{n1, n2}, nil)
		happened(g)
		if held(g) != 1 {
			t.Errorf("%d things are held", held(g))
		}
		g.Flush(0, &Flush{Volume: 3})
		expect(t, g, "sync 3; sync 1")
	})
	t.Run("what came after a restart is not lost with what was before", func(t *testing.T) {
		g := newGateway()
		a := write(5, 1)
		g.Submit(0, a)
		answered(g, n1)
		n1again := replica.Peer{Node: 1, Incarnation: 2}
		g.SetView(0, group, View{Epoch: 3, ISR: []replica.Peer{n1again}, Restarted: 2})
		answered(g, n1again)
		g.SetView(0, group, View{Epoch: 4, ISR: []replica.Peer{n1again, n2}, Restarted: 2})
		answered(g, n1again, n2)
		g.Answered(0, a, []replica.Peer{n1}, nil) // of before, which is not known yet here
		happened(g)
		g.Flush(0, &Flush{Volume: 3})
		expect(t, g, "sync 1; sync 1; sync 2; flushed disk failed")
		g.Flush(0, &Flush{Volume: 3})
		expect(t, g, "")
		g.Synced(0, n1again, nil)
		g.Synced(0, n2, nil)
		expect(t, g, "sync 1; sync 2")
		g.Synced(0, n1again, nil)
		g.Synced(0, n2, nil)
		expect(t, g, "flushed <nil>")
	})
	t.Run("durable changes need none", func(t *testing.T) {
		g := newGateway()
		a := write(0, 1)
		a.Durable = true
		g.Submit(0, a)
		g.Answered(0, a, holders, nil)
		g.Flush(0, &Flush{Volume: 3})
		expect(t, g, "forward 0 to 1 under 1; done 0 <nil>; flushed <nil>")
	})
	// A change that is given up may have been made, and read since: a flush that ends well must not let a power cut take it back.
	t.Run("what was given up may have been made", func(t *testing.T) {
		for _, durable := range []bool{false, true} {
			g := newGateway()
			g.SetView(0, group, View{Epoch: 2, ISR: []replica.Peer{n1, n2}, Learners: []replica.Peer{n3}})
			a := write(0, 1)
			a.Durable = durable // where it was made; a new epoch may have brought it elsewhere
			g.Submit(0, a)
			g.Answered(0, a, nil, replica.ErrRetry)
			g.Tick(10 * second)
			expect(t, g, "forward 0 to 1 under 2; done 0 partition unavailable")
			g.Flush(10*second, &Flush{Volume: 3})
			expect(t, g, "sync 1; sync 2; sync 3")
			g.Synced(10*second, n1, nil)
			g.Synced(10*second, n2, nil)
			expect(t, g, "")
			g.Synced(10*second, n3, nil)
			expect(t, g, "flushed <nil>")
			g.Flush(10*second, &Flush{Volume: 3}) // once
			expect(t, g, "flushed <nil>")
		}
	})
	t.Run("what fails after an attempt without answer may have been made", func(t *testing.T) {
		g := newGateway()
		a := write(0, 1)
		g.Submit(0, a)
		g.Answered(0, a, nil, replica.ErrRetry)
		g.SetView(0, group, View{Epoch: 2, ISR: []replica.Peer{n2, n3}})
		g.Answered(0, a, nil, errDisk)
		g.Flush(0, &Flush{Volume: 3})
		expect(t, g, "forward 0 to 1 under 1; forward 0 to 2 under 2; done 0 disk failed; sync 2; sync 3")
	})
	t.Run("what was given up may be lost", func(t *testing.T) {
		g := newGateway()
		a := write(0, 1)
		g.Submit(0, a)
		g.Answered(0, a, nil, replica.ErrRetry)
		n1again := replica.Peer{Node: 1, Incarnation: 2}
		g.SetView(0, group, View{Epoch: 3, ISR: []replica.Peer{n1again}, Restarted: 2})
		g.Answered(10*second, a, nil, replica.ErrRetry)
		happened(g)
		g.Flush(10*second, &Flush{Volume: 3})
		expect(t, g, "sync 1; flushed disk failed")
	})
	// What has never left the gateway was not made: a partition of which nobody is there must not keep flushes of the others from ending.
	t.Run("what was never sent was not made", func(t *testing.T) {
		g := newGateway()
		a, b := write(0, 1), write(0, 1)
		g.Submit(0, a)
		g.Submit(0, b) // waits for a
		g.Answered(0, a, nil, fmt.Errorf("%w: %w", replica.ErrRetry, replica.ErrUnsent))
		g.Tick(10 * second)
		g.Flush(10*second, &Flush{Volume: 3})
		expect(t, g, "forward 0 to 1 under 1; done 0 partition unavailable; forward 0 to 1 under 1; flushed <nil>")
	})
	t.Run("reads are held by nobody", func(t *testing.T) {
		g := newGateway()
		a := write(0, 1)
		a.Read = true
		g.Submit(0, a)
		g.Answered(10*second, a, nil, replica.ErrRetry)
		g.Flush(10*second, &Flush{Volume: 3})
		expect(t, g, "forward 0 to 1 under 1; done 0 partition unavailable; flushed <nil>")
	})
	t.Run("failed changes are held by nobody", func(t *testing.T) {
		g := newGateway()
		a := write(0, 1)
		g.Submit(0, a)
		g.Answered(0, a, holders, errDisk)
		g.Flush(0, &Flush{Volume: 3})
		expect(t, g, "forward 0 to 1 under 1; done 0 disk failed; flushed <nil>")
	})
}
