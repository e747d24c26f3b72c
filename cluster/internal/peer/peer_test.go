package peer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"sheepdog/storage/object"
)

// Requests of all lengths come back as they were.
func TestEcho(t *testing.T) {
	modes(t, func(t *testing.T, mode func(*Config)) {
		w := network(t)
		a, _ := w.start("a", mode), w.start("b", mode)
		lengths := []int{0, 1, 4095, 4096, inPlaceMax, inPlaceMax + 1, 64 << 10, 1 << 20, 4 << 20, MaxData}
		if raceEnabled {
			lengths = slices.Delete(lengths, 7, 9)
		}
		for _, class := range []Class{Data, Commit, Bulk} {
			for _, n := range lengths {
				for _, head := range []int{0, 40, 300, MaxHead} {
					data, h := pattern(n, byte(head)), pattern(head, 9)
					c := &Call{Class: class, Op: opEcho, Head: h, Data: data[:n/3], Tail: data[n/3:], ReplyData: make([]byte, n)}
					if a.do("b", c); c.Err != nil || !bytes.Equal(c.ReplyData, data) || !bytes.Equal(c.ReplyHead, h) {
						t.Fatalf("%s, %d + %d bytes: %v, %d + %d bytes", class, head, n, c.Err, len(c.ReplyHead), len(c.ReplyData))
					}
					c = &Call{Class: class, Op: opRead, Want: n}
					if a.do("b", c); c.Err != nil || len(c.ReplyData) != n || n > 0 && c.ReplyData[n-1] != byte(n-1) {
						t.Fatalf("%s, read of %d bytes: %v, %d bytes", class, n, c.Err, len(c.ReplyData))
					}
					c.Release()
				}
			}
		}
		eventually(t, "memory is not given back", func() bool { return a.Stats().Memory == [classes]int64{} })
	})
}

// Many calls at a time: batches, any order, each done once.
func TestPipelines(t *testing.T) {
	modes(t, func(t *testing.T, mode func(*Config)) {
		w := network(t)
		a, b := w.start("a", mode), w.start("b", mode)
		const n = 2000
		var done sync.WaitGroup
		var wrong atomic.Int64
		p := a.Peer("b")
		for i := range n {
			size := []int{0, 100, 4096, 20000, 300000}[i%5]
			if i%5 == 4 && i%50 != 4 {
				size = 5000
			}
			data := pattern(size, byte(i))
			done.Add(1)
			c := &Call{Op: []uint16{opEcho, opLater}[i&1], Head: []byte{byte(i), byte(i >> 8)}, Data: data, ReplyData: make([]byte, size)}
			c.Done = func(c *Call) {
				if c.Err != nil || !bytes.Equal(c.ReplyData, data) || !bytes.Equal(c.ReplyHead, c.Head) {
					wrong.Add(1)
				}
				done.Done()
			}
			p.Submit(c)
			if i%32 == 31 {
				p.Kick()
			}
		}
		p.Kick()
		done.Wait()
		if wrong.Load() != 0 {
			t.Errorf("%d calls came back wrong", wrong.Load())
		}
		if b.echoes.handled.Load() != n {
			t.Errorf("%d requests were handled of %d", b.echoes.handled.Load(), n)
		}
	})
}

// A handler is told when nothing of a request is used any more, also when nobody waits
// for the reply; what it keeps with a pooled request is its own.
func TestReleased(t *testing.T) {
	w := network(t)
	a, b := w.start("a", nil), w.start("b", nil)
	other := w.start("other", nil)
	for i := range 100 {
		a.do("b", &Call{Op: opSum, Head: []byte("x"), Data: make([]byte, i*1000)})
		a.do("other", &Call{Op: opSum})
	}
	for _, x := range []*node{b, other} {
		eventually(t, "not all are released", func() bool { return x.echoes.released.Load() == 100 })
	}
}

// What is submitted before a kick is handled before a kick.
func TestBatch(t *testing.T) {
	modes(t, func(t *testing.T, mode func(*Config)) {
		w := network(t)
		a, b := w.start("a", mode), w.start("b", mode)
		a.do("b", &Call{Op: opSum})
		p := a.Peer("b")
		var best int64
		for range 20 { // on a busy machine the bytes may arrive in several parts
			b.echoes.longest.Store(0)
			var done sync.WaitGroup
			for range 32 {
				done.Add(1)
				p.Submit(&Call{Op: opSum, Data: make([]byte, 512), Done: func(*Call) { done.Done() }})
			}
			p.Kick()
			done.Wait()
			best = max(best, b.echoes.longest.Load())
		}
		if best < 32 {
			t.Errorf("at most %d of 32 requests of a batch were handled together", best)
		}
	})
}

func TestErrorsTravel(t *testing.T) {
	w := network(t)
	a, _ := w.start("a", nil), w.start("b", nil)
	fail := func(i byte) error { return a.do("b", &Call{Op: opFail, Head: []byte{i}, Want: 4096}).Err }
	if err := fail(0); err != object.ErrNotFound {
		t.Errorf("%v", err)
	}
	if err := fail(1); !errors.Is(err, object.ErrNoSpace) || !strings.Contains(err.Error(), "write of 7 bytes") || !strings.Contains(err.Error(), "node b") {
		t.Errorf("%v", err)
	}
	if err := fail(2); !errors.Is(err, object.ErrCorrupt) {
		t.Errorf("%v", err)
	}
	if err := fail(3); !errors.Is(err, errOwn) {
		t.Errorf("%v", err)
	}
	if err := fail(4); !errors.Is(err, ErrRemote) || !strings.Contains(err.Error(), "no kind at all") {
		t.Errorf("%v", err)
	}
	if err := a.do("b", &Call{Op: 999}).Err; !errors.Is(err, ErrUnsupported) {
		t.Errorf("%v", err)
	}
	// A reply longer than asked for is the handler's failure, not the connection's.
	if err := a.do("b", &Call{Op: opEcho, Data: make([]byte, 10), Want: 9}).Err; !errors.Is(err, ErrTooLong) {
		t.Errorf("%v", err)
	}
	for _, c := range []*Call{
		{Head: make([]byte, MaxHead+1)}, {Data: make([]byte, MaxData), Tail: make([]byte, 1)}, {Want: MaxData + 1}, {Want: 10, ReplyData: make([]byte, 9)},
	} {
		if a.do("b", c); !errors.Is(c.Err, ErrTooLong) {
			t.Errorf("%v", c.Err)
		}
	}
}

// Every kind comes through, wrapped and bare, and no two share a code.
func TestErrorTable(t *testing.T) {
	table, err := newErrorTable(map[uint16]error{300: errOwn})
	if err != nil {
		t.Fatal(err)
	}
	for code, kind := range table.byCode {
		got, text := table.encode(kind)
		if got != code || !errors.Is(table.decode("n", got, []byte(text)), kind) {
			t.Errorf("code %d, %v: encoded as %d %q", code, kind, got, text)
		}
		got, text = table.encode(fmt.Errorf("wrapped: %w", kind))
		if got != code || !errors.Is(table.decode("n", got, []byte(text)), kind) {
			t.Errorf("code %d, %v, wrapped: encoded as %d %q", code, kind, got, text)
		}
	}
	if _, text := table.encode(errors.New(strings.Repeat("ü", 2000))); len(text) > maxErrorText || !strings.HasSuffix(text, "ü") {
		t.Errorf("text of %d bytes", len(text))
	}
	if _, err := newErrorTable(map[uint16]error{255: errOwn}); err == nil {
		t.Error("code 255 is accepted")
	}
}

// A connection that is lost fails what is under way, once each, and is made again.
func TestConnectionLost(t *testing.T) {
	modes(t, func(t *testing.T, mode func(*Config)) {
		w := network(t)
		a, b := w.start("a", mode), w.start("b", mode)
		p := a.Peer("b")
		var done atomic.Int64
		fates := make(chan *Call, 1000)
		for i := range 600 { // more than the window
			p.Submit(&Call{Op: opHold, Data: make([]byte, i*10), Done: func(c *Call) { done.Add(1); fates <- c }})
		}
		p.Kick()
		eventually(t, "requests do not arrive", func() bool { return b.echoes.count() == 512 })
		a.Peer("b").lanes[Data].drop(errors.New("cut"))
		sent := 0
		for range 600 {
			c := <-fates
			if !errors.Is(c.Err, ErrDisconnected) {
				t.Fatalf("%v", c.Err)
			}
			if c.Sent() {
				sent++
			}
		}
		if sent != 512 {
			t.Errorf("%d calls say that they were sent", sent)
		}
		b.echoes.let() // to nobody
		eventually(t, "memory is not given back", func() bool { return b.Stats().Memory == [classes]int64{} })
		if c := a.do("b", &Call{Op: opEcho, Head: []byte("again")}); c.Err != nil {
			t.Errorf("%v", c.Err)
		}
		if done.Load() != 600 {
			t.Errorf("%d calls are done", done.Load())
		}
	})
}

// A node that is not there: calls fail at once, with the reason; when it is back they work.
func TestNodeAwayAndBack(t *testing.T) {
	w := network(t)
	a := w.start("a", nil)
	if err := a.do("b", &Call{}).Err; !errors.Is(err, ErrDisconnected) || !strings.Contains(err.Error(), "not known") {
		t.Errorf("%v", err)
	}
	b := w.start("b", nil)
	back := func() {
		t.Helper()
		eventually(t, "b does not come back", func() bool { return a.do("b", &Call{Op: opEcho}).Err == nil })
	}
	back()
	b.Close()
	var refused bool
	eventually(t, "b is not missed", func() bool {
		err := a.do("b", &Call{Op: opEcho}).Err
		refused = errors.Is(err, syscall.ECONNREFUSED)
		return refused
	})
	start, late := time.Now(), lateness(t)
	for range 100 {
		a.do("b", &Call{Op: opEcho})
	}
	if d := time.Since(start); d > 2*time.Second+100*late() { // each once
		t.Errorf("100 calls to a node that is away took %v", d)
	}
	w.start("b", func(c *Config) { c.Identity.Incarnation = 8 })
	back()
	if id, ok := a.Peer("b").Identity(Data); !ok || id.Incarnation != 8 {
		t.Errorf("%v %v", id, ok)
	}
	ups := 0
	for len(a.events) > 0 {
		if e := <-a.events; e.Up {
			ups++
		}
	}
	if ups != 2 {
		t.Errorf("%d connections were made", ups)
	}
}

func TestDeadlines(t *testing.T) {
	w := network(t)
	a, b := w.start("a", nil), w.start("b", nil)
	start := time.Now()
	c := a.do("b", &Call{Op: opHold, Deadline: time.Now().Add(50 * time.Millisecond), Want: 100})
	if !errors.Is(c.Err, ErrTimeout) || !c.Sent() || time.Since(start) > testTimeout/2 {
		t.Errorf("%v after %v", c.Err, time.Since(start))
	}
	b.echoes.let() // the late reply is dropped and the connection stays
	if c := a.do("b", &Call{Op: opEcho}); c.Err != nil {
		t.Error(c.Err)
	}
	if s := a.Stats().Peers[0]; s.Calls[Data] != 0 || s.Bytes[Data] != 0 {
		t.Errorf("left behind: %+v", s)
	}
}

// Bounds of what waits: ErrBusy, and all the others are served.
func TestQueueBound(t *testing.T) {
	w := network(t)
	a := w.start("a", func(c *Config) { c.WindowCalls, c.QueueCalls = 4, 10 })
	b := w.start("b", nil)
	p := a.Peer("b")
	a.do("b", &Call{Op: opSum})
	results := make(chan error, 100)
	for range 20 {
		p.Submit(&Call{Op: opHold, Done: func(c *Call) { results <- c.Err }})
	}
	p.Kick()
	for range 6 {
		if err := <-results; !errors.Is(err, ErrBusy) {
			t.Errorf("%v", err)
		}
	}
	for range 14 {
		eventually(t, "requests do not arrive", func() bool { return b.echoes.count() > 0 })
		b.echoes.let()
		select {
		case err := <-results:
			if err != nil {
				t.Error(err)
			}
		default:
		}
		if b.echoes.handled.Load() == 15 && b.echoes.count() == 0 {
			break
		}
	}
	b.echoes.let()
}

// The receiver's memory is bounded whatever is sent to it, and classes do not starve each other.
func TestMemoryBound(t *testing.T) {
	modes(t, func(t *testing.T, mode func(*Config)) {
		w := network(t)
		b := w.start("b", func(c *Config) { mode(c); c.Memory = minMemory })
		var all sync.WaitGroup
		for i := range 6 {
			a := w.start(fmt.Sprintf("a%d", i), mode)
			p := a.Peer("b")
			for range 8 {
				all.Add(1)
				p.Submit(&Call{Class: Bulk, Op: opHold, Data: make([]byte, 4<<20), Want: 1 << 20, Done: func(c *Call) {
					if c.Err != nil {
						t.Error(c.Err)
					}
					all.Done()
				}})
			}
			p.Kick()
		}
		eventually(t, "nothing arrives", func() bool { return b.echoes.count() >= 6 })
		time.Sleep(200 * time.Millisecond)
		if n := b.Stats().Memory[Bulk]; n > minMemory {
			t.Errorf("%d bytes are held", n)
		}
		a := w.start("c", mode)
		if c := a.do("b", &Call{Op: opEcho, Data: make([]byte, 1<<20), Want: 1 << 20}); c.Err != nil {
			t.Error(c.Err)
		}
		served := make(chan struct{})
		go func() { all.Wait(); close(served) }()
		eventually(t, "not all are served", func() bool {
			b.echoes.let()
			select {
			case <-served:
				return true
			default:
				return false
			}
		})
		eventually(t, "memory is not given back", func() bool { return b.Stats().Memory == [classes]int64{} })
	})
}

func TestSetIdentity(t *testing.T) {
	w := network(t)
	b := w.start("b", nil)
	a := w.start("a", func(c *Config) { c.Identity.Cluster = "" })
	err := a.do("b", &Call{Op: opEcho}).Err
	var no *RefusedError
	if !errors.As(err, &no) || !no.Remote || !strings.Contains(no.Text, `"a" belongs to no cluster`) {
		t.Errorf("%v", err)
	}
	id := a.Identity()
	id.Cluster, id.Incarnation = testCluster, 1
	if err := a.SetIdentity(id); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a is not let in", func() bool { return a.do("b", &Call{Op: opEcho}).Err == nil })
	b.do("a", &Call{Op: opEcho})
	id.Incarnation = 2
	if err := a.SetIdentity(id); err != nil {
		t.Fatal(err)
	}
	eventually(t, "b does not learn of it", func() bool {
		b.do("a", &Call{Op: opEcho})
		got, ok := b.Peer("a").Identity(Data)
		return ok && got == id
	})
	id.Name = "z"
	if a.SetIdentity(id) == nil {
		t.Error("a node may change its name")
	}
}

// An identity that changes while a connection is being made is the one that counts, whichever side changes:
// a node that goes by an earlier one is not listened to.
func TestSetIdentityDuringHandshake(t *testing.T) {
	modes(t, func(t *testing.T, mode func(*Config)) {
		w := network(t)
		for _, dialer := range []bool{true, false} {
			changes := make(chan *node, 1)
			var once sync.Once
			a := w.start("a", mode)
			b := w.start("b", func(c *Config) {
				mode(c)
				c.Admit = func(Identity, Kind) error { // between the two hellos
					once.Do(func() {
						n := <-changes
						id := n.Identity()
						id.Incarnation++
						if err := n.SetIdentity(id); err != nil {
							t.Error(err)
						}
					})
					return nil
				}
			})
			if changes <- b; dialer {
				<-changes
				changes <- a
			}
			eventually(t, "the two do not come to know each other", func() bool {
				if a.do("b", &Call{Op: opEcho, Head: []byte{1}}).Err != nil {
					return false
				}
				a.Peer("b").Submit(&Call{Op: opHold, Done: func(*Call) {}})
				a.Peer("b").Kick()
				eventually(t, "a request gets lost", func() bool { return b.echoes.count() > 0 })
				b.echoes.mu.Lock()
				from := *b.echoes.held[0].From
				b.echoes.mu.Unlock()
				b.echoes.let()
				to, ok := a.Peer("b").Identity(Data)
				return ok && from == a.Identity() && to == b.Identity()
			})
		}
	})
}

// Close answers what is under way.
func TestCloseAnswers(t *testing.T) {
	modes(t, func(t *testing.T, mode func(*Config)) {
		w := network(t)
		a, b := w.start("a", mode), w.start("b", mode)
		result := make(chan error, 1)
		p := a.Peer("b")
		p.Submit(&Call{Op: opHold, Done: func(c *Call) { result <- c.Err }})
		p.Kick()
		eventually(t, "request does not arrive", func() bool { return b.echoes.count() == 1 })
		closed := make(chan struct{})
		go func() { b.Close(); close(closed) }()
		time.Sleep(20 * time.Millisecond)
		b.echoes.let()
		if err := <-result; err != nil {
			t.Error(err)
		}
		<-closed
		a.Close()
		if err := a.do("b", &Call{}).Err; !errors.Is(err, ErrClosed) {
			t.Errorf("%v", err)
		}
	})
}

// Raft's streams carry bytes both ways, by names, and end.
func TestStreams(t *testing.T) {
	modes(t, func(t *testing.T, mode func(*Config)) {
		w := network(t)
		a, b := w.start("a", mode), w.start("b", mode)
		out, err := a.Raft().Dial(context.Background(), "b")
		if err != nil {
			t.Fatal(err)
		}
		in, err := b.Raft().Accept()
		if err != nil {
			t.Fatal(err)
		}
		if in.RemoteAddr().String() != "a" || out.RemoteAddr().String() != "b" || a.Raft().Addr().String() != "a" {
			t.Errorf("%s, %s", in.RemoteAddr(), out.RemoteAddr())
		}
		data := pattern(1<<20, 3)
		go out.Write(data)
		got := make([]byte, len(data))
		for n := 0; n < len(got); {
			k, err := in.Read(got[n:])
			if err != nil {
				t.Fatal(err)
			}
			n += k
		}
		if !bytes.Equal(got, data) {
			t.Error("other bytes")
		}
		in.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
		if _, err := in.Read(got); err == nil || !strings.Contains(err.Error(), "timeout") {
			t.Errorf("%v", err)
		}
		in.Close()
		eventually(t, "the connection counts on", func() bool { return b.Stats().Incoming == 0 })
		out.Close()
		b.Raft().Close()
		if _, err := b.Raft().Accept(); err == nil {
			t.Error("accepted after Close")
		}
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if _, err := a.Raft().Dial(ctx, "nobody"); err == nil {
			t.Error("dialed nobody")
		}
	})
}

func TestHeartbeats(t *testing.T) {
	w := network(t)
	const silence = 200 * time.Millisecond
	quick := func(c *Config) { c.Heartbeat = 20 * time.Millisecond; c.Silence = silence }
	a, _ := w.start("a", quick), w.start("b", quick)
	a.do("b", &Call{Op: opEcho})
	eventually(t, "no round trip", func() bool { return a.Peer("b").RTT() > 0 })
	late := lateness(t)
	time.Sleep(500 * time.Millisecond)
	for len(a.events) > 0 {
		if e := <-a.events; !e.Up && late() < silence/4 { // else it was silent
			t.Errorf("lost: %v", e.Err)
		}
	}
}

// A request that takes longer than a node may be silent holds what it came in, and neither the connection nor
// what comes behind it, as long as there is memory. If there is none those behind it wait, and that is not
// the other side's silence.
func TestLongRequest(t *testing.T) {
	for _, scarce := range []bool{false, true} {
		t.Run(fmt.Sprint("scarce=", scarce), func(t *testing.T) {
			modes(t, func(t *testing.T, mode func(*Config)) {
				t.Parallel()
				w := network(t)
				change := func(c *Config) { mode(c); c.Heartbeat = 20 * time.Millisecond; c.Silence = 600 * time.Millisecond }
				a, b := w.start("a", change), w.start("b", change)
				t.Cleanup(b.echoes.let) // else nothing ends
				if scarce {
					for b.budgets[Bulk].tryChunk() {
					}
				}
				call := func(op uint16, n int) <-chan error {
					done := make(chan error, 1)
					p := a.Peer("b")
					p.Submit(&Call{Class: Bulk, Op: op, Data: make([]byte, n), Want: n, Done: func(c *Call) { done <- c.Err }})
					p.Kick()
					return done
				}
				long := call(opHold, 10)
				eventually(t, "the long request does not arrive", func() bool { return b.echoes.count() == 1 })
				if !scarce { // what comes next does not fit beside it
					for range 2 * smallChunk / inPlaceMax {
						if err := <-call(opEcho, inPlaceMax); err != nil {
							t.Fatal(err)
						}
					}
				}
				time.Sleep(50 * time.Millisecond) // the receiver gives back what it does not need
				var behind []<-chan error
				for range 2 * smallChunk / inPlaceMax {
					behind = append(behind, call(opEcho, inPlaceMax))
				}
				if scarce {
					time.Sleep(3 * a.cfg.Silence)
				}
				for _, done := range behind {
					if scarce {
						b.echoes.let()
					}
					select {
					case err := <-done:
						if err != nil {
							t.Errorf("behind a long request: %v", err)
						}
					case <-time.After(testTimeout):
						t.Fatal("what comes behind a long request is not answered before that is")
					}
				}
				if !scarce {
					time.Sleep(3 * a.cfg.Silence)
				}
				b.echoes.let()
				if err := <-long; err != nil {
					t.Errorf("a request that takes long: %v", err)
				}
				if s := a.log.String() + b.log.String(); s != "" {
					t.Errorf("logged: %s", s)
				}
			})
		})
	}
}

// A connection that is given up is told of by who gives it up, once.
func TestSilenceIsTold(t *testing.T) {
	w := network(t)
	b := w.start("b", func(c *Config) { c.Heartbeat = 20 * time.Millisecond; c.Silence = 200 * time.Millisecond })
	a := w.start("a", func(c *Config) { c.Heartbeat = time.Hour; c.Silence = 3 * time.Hour })
	// It is asked nothing and says nothing but what it is asked: its answers to heartbeats are held up.
	if c := a.do("b", &Call{Op: opEcho}); c.Err != nil {
		t.Fatal(c.Err)
	}
	l := &a.Peer("b").lanes[Data]
	l.mu.Lock()
	c := l.conn
	l.mu.Unlock()
	c.pong.busy.Store(true)
	eventually(t, "a silent node is kept", func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		return !b.Hears("a", Data) || l.count == 0
	})
	c.pong.busy.Store(false)
	eventually(t, "it is not told", func() bool { return b.log.count() > 0 })
	if s := b.log.String(); b.log.count() != 1 || !strings.Contains(s, errSilent.Error()) || !strings.Contains(s, "node=a") || !strings.Contains(s, "class=data") {
		t.Errorf("logged: %s", s)
	}
}
