package consensus

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/raft"
)

// fabric connects the nodes of a test, over TCP or in memory, and cuts them off.
type fabric struct {
	memory bool

	mu      sync.Mutex
	ports   map[string]*port
	logs    map[string]*Log
	cut     map[[2]string]bool // from, to: messages of one direction are refused
	onReply func(leader string) bool
}

func newFabric(memory bool) *fabric {
	return &fabric{memory: memory, ports: map[string]*port{}, logs: map[string]*Log{}, cut: map[[2]string]bool{}}
}

// port is a node's Transport.
type port struct {
	of       *fabric
	node     string
	listener net.Listener // with TCP
	incoming chan net.Conn
	done     chan struct{}
	once     sync.Once

	conns map[net.Conn]string // other end; guarded by of.mu
}

var errCut = errors.New("the cable is cut")

func (f *fabric) plug(t *testing.T, node string) *port {
	t.Helper()
	p := &port{of: f, node: node, incoming: make(chan net.Conn), done: make(chan struct{}), conns: map[net.Conn]string{}}
	if !f.memory {
		var err error
		if p.listener, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
			t.Fatal(err)
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ports[node] = p
	return p
}

func (p *port) Accept() (net.Conn, error) {
	if !p.of.memory {
		return p.listener.Accept()
	}
	select {
	case c := <-p.incoming:
		return c, nil
	case <-p.done:
		return nil, net.ErrClosed
	}
}

func (p *port) Dial(ctx context.Context, node string) (net.Conn, error) {
	f := p.of
	f.mu.Lock()
	to, cut := f.ports[node], f.cut[[2]string{p.node, node}] || f.cut[[2]string{node, p.node}]
	f.mu.Unlock()
	if to == nil || cut {
		return nil, errCut
	}
	var c net.Conn
	if f.memory {
		here, there := net.Pipe()
		select {
		case to.incoming <- there:
		case <-to.done:
			return nil, net.ErrClosed
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		c = here
	} else {
		var err error
		if c, err = new(net.Dialer).DialContext(ctx, "tcp", to.listener.Addr().String()); err != nil {
			return nil, err
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	p.conns[c] = node
	return c, nil
}

func (p *port) Close() error {
	p.once.Do(func() {
		close(p.done)
		if p.listener != nil {
			p.listener.Close()
		}
	})
	return nil
}

// split allows messages within the groups only.
func (f *fabric) split(groups ...[]string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	clear(f.cut)
	for i, a := range groups {
		for j, b := range groups {
			for _, x := range a {
				for _, y := range b {
					if i != j {
						f.cut[[2]string{x, y}] = true
					}
				}
			}
		}
	}
	for _, p := range f.ports {
		for c, other := range p.conns {
			if f.cut[[2]string{p.node, other}] {
				c.Close()
				delete(p.conns, c)
			}
		}
	}
}

func (f *fabric) heal() { f.split() }

// forwarder is a node's Forwarder.
type forwarder struct {
	of   *fabric
	node string
}

func (w forwarder) Forward(ctx context.Context, leader string, b []byte) ([]byte, error) {
	f := w.of
	f.mu.Lock()
	l, cut, onReply := f.logs[leader], f.cut[[2]string{w.node, leader}], f.onReply
	f.mu.Unlock()
	if l == nil || cut {
		return nil, errCut
	}
	done := make(chan []byte, 1)
	go func() { done <- l.ApplyForwarded(ctx, slices.Clone(b)) }()
	select {
	case answer := <-done:
		if onReply != nil && !onReply(leader) {
			return nil, errors.New("the answer is lost")
		}
		return answer, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// journal is a machine that keeps its commands.
type journal struct {
	mu       sync.Mutex
	commands []string
}

func (m *journal) Apply(c []byte) []byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.commands = append(m.commands, string(c))
	return fmt.Append(nil, len(m.commands))
}

func (m *journal) Snapshot() ([]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return json.Marshal(m.commands)
}

func (m *journal) Restore(b []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.commands = nil
	return json.Unmarshal(b, &m.commands)
}

func (m *journal) list() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.commands)
}

// testElection is short, and long enough for the race detector on a busy machine.
const testElection = 200 * time.Millisecond

// flock is a cluster of logs in one process, looked after as a node looks after its own.
type flock struct {
	t        *testing.T
	fabric   *fabric
	election time.Duration
	dirs     map[string]string

	mu      sync.Mutex
	nodes   map[string]*testNode
	members []Member
}

type testNode struct {
	*Log
	journal *journal
	stop    context.CancelFunc
	done    chan struct{}
}

// newFlock starts a cluster; its first node is n1.
func newFlock(t *testing.T, memory bool, n int) *flock {
	t.Helper()
	return newPatientFlock(t, memory, n, testElection)
}

// newPatientFlock has a longer election timeout, for tests of what must not wait for it.
func newPatientFlock(t *testing.T, memory bool, n int, election time.Duration) *flock {
	t.Helper()
	f := &flock{t: t, fabric: newFabric(memory), election: election, dirs: map[string]string{}, nodes: map[string]*testNode{}}
	t.Cleanup(func() {
		for _, name := range f.names() {
			f.stop(name, false)
		}
	})
	f.dirs["n1"] = t.TempDir()
	if err := Bootstrap(f.dirs["n1"], "n1", quiet); err != nil {
		t.Fatal(err)
	}
	f.start("n1")
	f.ready("n1")
	f.member(Member{Node: "n1", Zone: "n1"})
	for i := 2; i <= n; i++ {
		f.join(fmt.Sprint("n", i))
	}
	return f
}

func (f *flock) member(m Member) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.members = slices.DeleteFunc(f.members, func(o Member) bool { return o.Node == m.Node })
	f.members = append(f.members, m)
}

func (f *flock) names() (all []string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for name := range f.nodes {
		all = append(all, name)
	}
	slices.Sort(all)
	return all
}

func (f *flock) node(name string) *testNode {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.nodes[name]
}

// join brings a node without state into the cluster.
func (f *flock) join(name string) {
	f.t.Helper()
	f.dirs[name] = f.t.TempDir()
	f.eventually("admit "+name, func() error { return f.leader().Admit(f.t.Context(), name, true) })
	if err := Prepare(f.dirs[name], name, quiet); err != nil {
		f.t.Fatal(err)
	}
	f.member(Member{Node: name, Zone: name})
	f.start(name)
	f.ready(name)
}

func (f *flock) start(name string) {
	f.t.Helper()
	j := new(journal)
	logger := quiet
	if testing.Verbose() {
		logger = slog.New(slog.NewTextHandler(f.t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug})).With("on", name)
	}
	l, err := Open(Config{
		Dir: f.dirs[name], Node: name, Machines: map[string]Machine{"j": j}, OnApply: func(string) {}, Logger: logger,
		Transport: f.fabric.plug(f.t, name), Forwarder: forwarder{f.fabric, name}, Election: f.election,
	})
	if err != nil {
		f.t.Fatal(err)
	}
	f.fabric.mu.Lock()
	f.fabric.logs[name] = l
	f.fabric.mu.Unlock()
	ctx, cancel := context.WithCancel(context.Background())
	n := &testNode{Log: l, journal: j, stop: cancel, done: make(chan struct{})}
	f.mu.Lock()
	f.nodes[name] = n
	f.mu.Unlock()
	go f.look(ctx, n)
}

// look is what each node does about the voters while it leads.
func (f *flock) look(ctx context.Context, n *testNode) {
	defer close(n.done)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			f.mu.Lock()
			members := slices.Clone(f.members)
			f.mu.Unlock()
			n.Reconcile(ctx, members)
		case <-ctx.Done():
			return
		}
	}
}

// stop ends a node, cleanly or as if its process died.
func (f *flock) stop(name string, cleanly bool) {
	n := f.node(name)
	n.stop()
	<-n.done
	if !cleanly { // nothing of it is heard any more
		f.fabric.mu.Lock()
		delete(f.fabric.logs, name)
		f.fabric.mu.Unlock()
	}
	if err := n.close(cleanly); err != nil {
		f.t.Errorf("close %s: %v", name, err)
	}
	f.fabric.mu.Lock()
	delete(f.fabric.logs, name)
	f.fabric.mu.Unlock()
	f.mu.Lock()
	delete(f.nodes, name)
	f.mu.Unlock()
}

func (f *flock) ready(name string) {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(f.t.Context(), 2*time.Minute)
	defer cancel()
	if err := f.node(name).Ready(ctx); err != nil {
		f.t.Fatalf("%s is not ready: %v", name, err)
	}
}

// eventually repeats until there is no error.
func (f *flock) eventually(what string, try func() error) {
	f.t.Helper()
	deadline := time.Now().Add(2 * time.Minute)
	for {
		err := try()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			f.t.Fatalf("%s: %v", what, err)
		}
		<-time.After(5 * time.Millisecond)
	}
}

// leader waits for a node that leads.
func (f *flock) leader(among ...string) *testNode {
	f.t.Helper()
	var leader *testNode
	f.eventually("wait for a leader", func() error {
		if len(among) == 0 {
			among = f.names()
		}
		for _, name := range among {
			if n := f.node(name); n != nil && n.Leading() {
				leader = n
				return nil
			}
		}
		return errors.New("none leads")
	})
	return leader
}

func (n *testNode) name() string { return n.cfg.Node }

// voters waits until the leader has the given voters and no change left.
func (f *flock) voters(want ...string) {
	f.t.Helper()
	f.eventually("voters", func() error {
		var got []string
		for _, s := range f.leader().Servers() {
			if s.Voter {
				got = append(got, s.Node)
			}
		}
		if !slices.Equal(got, want) {
			return fmt.Errorf("voters are %v, want %v", got, want)
		}
		return nil
	})
}

func (f *flock) countVoters(want int) {
	f.t.Helper()
	f.eventually("voters", func() error {
		got := 0
		for _, s := range f.leader().Servers() {
			if s.Voter {
				got++
			}
		}
		if got != want {
			return fmt.Errorf("there are %d voters, want %d", got, want)
		}
		return nil
	})
}

// same waits until all nodes have the same journal and returns it.
func (f *flock) same() (commands []string) {
	f.t.Helper()
	f.eventually("same journals", func() error {
		for i, name := range f.names() {
			got := f.node(name).journal.list()
			if i == 0 {
				commands = got
			} else if !slices.Equal(got, commands) {
				return fmt.Errorf("%s has %d commands, %s has %d", f.names()[0], len(commands), name, len(got))
			}
		}
		return nil
	})
	return commands
}

// once checks that each command is there once.
func (f *flock) once(commands []string, want []string) {
	f.t.Helper()
	count := map[string]int{}
	for _, c := range commands {
		count[c]++
		if count[c] == 2 {
			f.t.Errorf("command %q was applied twice", c)
		}
	}
	for _, c := range want {
		if count[c] == 0 {
			f.t.Errorf("command %q was answered and is lost", c)
		}
	}
}

// writers propose through all given nodes until stopped, and say what was answered.
type writers struct {
	f        *flock
	cancel   context.CancelFunc
	wait     sync.WaitGroup
	mu       sync.Mutex
	answered []string
	longest  time.Duration
}

func (f *flock) write(nodes ...string) *writers {
	ctx, cancel := context.WithCancel(f.t.Context())
	w := &writers{f: f, cancel: cancel}
	for _, name := range nodes {
		w.wait.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				n := f.node(name)
				if n == nil {
					return
				}
				c, start := fmt.Sprintf("%s/%d", name, i), time.Now()
				_, err := n.Propose(context.Background(), "j", []byte(c))
				if err != nil {
					if f.node(name) == n {
						f.t.Errorf("propose through %s: %v", name, err)
					}
					return
				}
				if !slices.Contains(n.journal.list(), c) {
					f.t.Errorf("%s answered %q before it was applied there", name, c)
				}
				w.mu.Lock()
				w.answered = append(w.answered, c)
				w.longest = max(w.longest, time.Since(start))
				w.mu.Unlock()
			}
		})
	}
	return w
}

// count waits until the writers have got n more answers.
func (w *writers) more(n int) {
	w.f.t.Helper()
	w.mu.Lock()
	from := len(w.answered)
	w.mu.Unlock()
	w.f.eventually("more answers", func() error {
		w.mu.Lock()
		defer w.mu.Unlock()
		if got := len(w.answered) - from; got < n {
			return fmt.Errorf("%d more answers, want %d", got, n)
		}
		return nil
	})
}

func (w *writers) stop() []string {
	w.cancel()
	w.wait.Wait()
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.answered)
}

func raftID(name string) raft.ServerID           { return raft.ServerID(name) }
func raftAddress(name string) raft.ServerAddress { return raft.ServerAddress(name) }
