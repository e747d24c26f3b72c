package peer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sheepdog/storage/object"
)

const (
	testTimeout = 2 * time.Minute
	testSecret  = "a secret of the tests, not random"
	testCluster = "c1"
)

// Operations of echoes.
const (
	opEcho  uint16 = iota + 1 // reply with what came
	opSum                     // reply with a head alone
	opRead                    // fill the reply
	opFail                    // fail with failures[head[0]]
	opHold                    // reply when told
	opLater                   // reply on another goroutine
)

var errOwn = errors.New("kind of the caller")

var failures = []error{
	object.ErrNotFound,
	fmt.Errorf("write of 7 bytes: %w", object.ErrNoSpace),
	&object.CorruptError{Disk: "d"},
	fmt.Errorf("own: %w", errOwn),
	errors.New("no kind at all"),
}

// echoes is a Handler.
type echoes struct {
	mu       sync.Mutex
	held     []*Request
	handled  atomic.Int64
	kicks    atomic.Int64
	released atomic.Int64
	longest  atomic.Int64 // requests between two kicks
	since    atomic.Int64
}

func (e *echoes) Handle(r *Request) {
	e.handled.Add(1)
	if n := e.since.Add(1); n > e.longest.Load() {
		e.longest.Store(n)
	}
	switch r.Op {
	case opEcho:
		r.ReplyHead = append(r.ReplyHead, r.Head...)
		r.ReplyData = r.Data
		r.Reply(nil)
	case opSum:
		if r.State == nil {
			r.State = func(*Request) { e.released.Add(1) } // once for each pooled request
		}
		r.Released = r.State.(func(*Request))
		r.ReplyHead = append(r.ReplyHead, byte(len(r.Head)))
		r.ReplyData = nil
		r.Reply(nil)
	case opRead:
		for i := range r.ReplyData {
			r.ReplyData[i] = byte(i)
		}
		r.Reply(nil)
	case opFail:
		i := 0
		if len(r.Head) > 0 {
			i = int(r.Head[0]) % len(failures)
		}
		r.Reply(failures[i])
	case opHold:
		e.mu.Lock()
		e.held = append(e.held, r)
		e.mu.Unlock()
	case opLater:
		go func() {
			r.ReplyHead = append(r.ReplyHead, r.Head...)
			r.ReplyData = r.Data
			r.Reply(nil)
		}()
	default:
		r.Reply(ErrUnsupported)
	}
}

func (e *echoes) Kick() {
	e.kicks.Add(1)
	e.since.Store(0)
}

func (e *echoes) count() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.held)
}

// let replies to all that is held, the last first.
func (e *echoes) let() {
	e.mu.Lock()
	held := e.held
	e.held = nil
	e.mu.Unlock()
	for i := len(held) - 1; i >= 0; i-- {
		held[i].ReplyData = nil
		held[i].ReplyHead = append(held[i].ReplyHead, held[i].Head...)
		held[i].Reply(nil)
	}
}

// lines counts what is logged.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func (l *lines) count() int { return bytes.Count([]byte(l.String()), []byte("\n")) }

// net of nodes on loopback.
type nodes struct {
	t  testing.TB
	mu sync.Mutex
	at map[string]string
}

type node struct {
	*Transport
	net    *nodes
	echoes *echoes
	log    *lines
	addr   string
	events chan Event
}

func network(t testing.TB) *nodes { return &nodes{t: t, at: map[string]string{}} }

func credentials(t testing.TB, secret string) *Credentials {
	t.Helper()
	c, err := NewCredentials([]byte(secret))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func (n *nodes) resolve(name string) (string, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if a := n.at[name]; a != "" {
		return a, nil
	}
	return "", errors.New("address is not known")
}

func (n *nodes) start(name string, change func(*Config)) *node {
	n.t.Helper()
	x := &node{net: n, echoes: new(echoes), log: new(lines), events: make(chan Event, 1000)}
	cfg := Config{
		Identity: Identity{Cluster: testCluster, Name: name, Node: 1, Incarnation: 7}, Credentials: credentials(n.t, testSecret),
		Resolve: n.resolve, Handler: x.echoes, Logger: slog.New(slog.NewTextHandler(x.log, nil)),
		Errors: map[uint16]error{256: errOwn}, HandshakeTimeout: 20 * time.Second,
		Event: func(e Event) {
			select {
			case x.events <- e:
			default:
			}
		},
	}
	if change != nil {
		change(&cfg)
	}
	t, err := New(cfg)
	if err != nil {
		n.t.Fatal(err)
	}
	x.Transport = t
	x.listen("127.0.0.1:0")
	n.t.Cleanup(func() { t.Close() })
	return x
}

func (x *node) listen(addr string) (stop func()) {
	x.net.t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		x.net.t.Fatal(err)
	}
	x.addr = l.Addr().String()
	x.net.mu.Lock()
	x.net.at[x.cfg.Identity.Name] = x.addr
	x.net.mu.Unlock()
	ctx, cancel := context.WithCancel(context.Background())
	x.net.t.Cleanup(cancel)
	go x.Serve(ctx, l)
	return cancel
}

func insecure(c *Config) { c.Credentials, c.Insecure = nil, true }

// modes runs a test with and without TLS.
func modes(t *testing.T, f func(t *testing.T, change func(*Config))) {
	t.Run("tls", func(t *testing.T) { f(t, func(*Config) {}) })
	t.Run("plain", func(t *testing.T) { f(t, insecure) })
}

// do carries out a call and waits.
func (x *node) do(to string, c *Call) *Call {
	done := make(chan struct{})
	c.Done = func(*Call) { close(done) }
	p := x.Peer(to)
	p.Submit(c)
	p.Kick()
	select {
	case <-done:
	case <-time.After(testTimeout):
		panic("call is not done")
	}
	return c
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(testTimeout); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal(what)
		}
	}
}

// lateness measures how late goroutines of this process run at most, from now on: on a busy machine limits of time mean
// that much less.
func lateness(t *testing.T) (most func() time.Duration) {
	var worst atomic.Int64
	stop := make(chan struct{})
	t.Cleanup(func() { close(stop) })
	go func() {
		const nap = 5 * time.Millisecond
		for began := time.Now(); ; began = time.Now() {
			select {
			case <-stop:
				return
			case <-time.After(nap):
			}
			worst.Store(max(worst.Load(), int64(time.Since(began)-nap)))
		}
	}()
	return func() time.Duration {
		late := time.Duration(worst.Load())
		if late > 100*time.Millisecond {
			t.Logf("the machine is busy: goroutines run up to %v late", late)
		}
		return late
	}
}

func pattern(n int, seed byte) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(i*7+i>>8) + seed
	}
	return p
}
