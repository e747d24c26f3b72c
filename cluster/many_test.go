package cluster

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"sheepdog/cluster/state"
	"sheepdog/storage"
	"sheepdog/storage/disk"
	"sheepdog/storage/object"
)

// world is a cluster of nodes in this process, with stores on real files.
type world struct {
	t     *testing.T
	base  string
	nodes map[string]*member

	ioTimeout time.Duration // of nodes that are started; default 20 s
}

type member struct {
	w      *world
	name   string
	dir    string
	addr   string
	port   int
	gossip int
	store  *storage.Store
	extra  []disk.FS // further disks
	*Node
	stop context.CancelFunc
	done chan struct{}
}

func newWorld(t *testing.T, names ...string) *world {
	w := &world{t: t, base: t.TempDir(), nodes: map[string]*member{}}
	if err := os.WriteFile(filepath.Join(w.base, "secret"), bytes.Repeat([]byte("secret of the cluster "), 3), 0o600); err != nil {
		t.Fatal(err)
	}
	for i, name := range names {
		m := &member{w: w, name: name, dir: filepath.Join(w.base, name), addr: fmt.Sprintf("127.0.0.%d", i+1)}
		m.port, m.gossip = freePort(t, m.addr), freePort(t, m.addr)
		w.nodes[name] = m
	}
	return w
}

func freePort(t *testing.T, host string) int {
	l, err := net.Listen("tcp", host+":0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

func (w *world) start(name string) *member {
	w.t.Helper()
	m := w.nodes[name]
	data := filepath.Join(m.dir, "disk")
	for _, d := range []string{m.dir, data} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			w.t.Fatal(err)
		}
	}
	fsys, err := disk.Open(data)
	if err != nil {
		w.t.Fatal(err)
	}
	logger := slog.New(slog.DiscardHandler)
	if testing.Verbose() {
		logger = slog.New(slog.NewTextHandler(os.Stderr, nil)).With("at", name)
	}
	if m.store, err = storage.Open(storage.Config{Disks: append([]disk.FS{fsys}, m.extra...), Node: name, ScrubRate: -1, Logger: logger}); err != nil {
		w.t.Fatal(err)
	}
	l, err := net.Listen("tcp", fmt.Sprintf("%s:%d", m.addr, m.port))
	if err != nil {
		w.t.Fatal(err)
	}
	var join []string
	for _, o := range w.nodes {
		if o != m {
			join = append(join, fmt.Sprintf("%s:%d", o.addr, o.gossip))
		}
	}
	cfg := Config{
		Dir: m.dir, Name: name, Address: m.addr, Store: m.store, DiskCluster: m.store.Cluster(), Logger: logger,
		Adopt:   func(id string) error { return m.store.SetIdentity(id, name) },
		Disks:   m.disks(),
		Network: &Network{Listener: l, GossipPort: m.gossip, SecretFile: filepath.Join(w.base, "secret"), Join: join, IOTimeout: cmp.Or(w.ioTimeout, time.Minute)},
	}
	if m.Node, err = Start(w.t.Context(), cfg); err != nil {
		w.t.Fatal(err)
	}
	var ctx context.Context
	ctx, m.stop = context.WithCancel(context.Background())
	m.done = make(chan struct{})
	go func(n *Node, done chan struct{}) {
		defer close(done)
		if err := n.Run(ctx); err != nil {
			w.t.Error(err)
		}
	}(m.Node, m.done)
	w.t.Cleanup(m.close)
	return m
}

func (m *member) disks() (list []state.Disk) {
	for _, d := range m.store.Status().Disks {
		list = append(list, state.Disk{ID: d.ID, Path: d.Dir, Weight: 100})
	}
	return list
}

func (m *member) close() {
	m.stop()
	<-m.done
	if m.Node == nil {
		return
	}
	if err := errors.Join(m.Node.Close(), m.store.Close()); err != nil {
		m.w.t.Error(err)
	}
	m.Node = nil
}

// eventually waits for something. The limit is for what never happens: other work may have the machine.
func (w *world) eventually(what string, ok func() bool) {
	w.t.Helper()
	const within = 3 * time.Minute
	for begin := time.Now(); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Since(begin) > within {
			w.t.Fatalf("%s: not within %v", what, within)
		}
	}
}

// whole waits until all partitions have as many members in sync as there are nodes.
func (w *world) whole(n int) {
	w.t.Helper()
	w.eventually(fmt.Sprintf("all partitions have %d members", n), func() bool {
		for _, m := range w.nodes {
			if m.Node == nil {
				continue
			}
			v := m.View()
			if len(v.Policies) == 0 {
				return false
			}
			for _, p := range v.Policies {
				if len(p.Partitions) == 0 {
					return false
				}
				for _, q := range p.Partitions {
					if len(q.ISR) != n {
						return false
					}
				}
			}
		}
		return true
	})
}

func (w *world) form(names ...string) {
	w.t.Helper()
	w.formOf(3, names...)
}

func (w *world) formOf(copies int, names ...string) {
	w.t.Helper()
	first := w.start(names[0])
	if err := first.Format(w.t.Context(), FormatOptions{Copies: copies, Partitions: 16}); err != nil {
		w.t.Fatal(err)
	}
	for _, name := range names[1:] {
		w.start(name)
	}
	w.eventually("every node has a part", func() bool { // fewer of them may have all copies, until the last is placed too
		v := first.View()
		return !slices.ContainsFunc(names, func(name string) bool {
			n := v.NodeByName(name)
			return n == nil || Held(v, n.ID) == 0
		})
	})
	w.whole(min(copies, len(names)))
}

// pattern is what test writes: one byte repeated.
func pattern(b byte) []byte { return bytes.Repeat([]byte{b}, 4096) }

func put(n *Node, id object.ID, off uint32, data []byte) error {
	return do(n, &object.Request{
		Op: object.OpWrite, SizeShift: 22, ID: id, Policy: n.DefaultPolicy(), Off: off, Len: uint32(len(data)), Data: data,
		Volume: id.VID(), Generation: 1,
	})
}

func get(n *Node, id object.ID, off, length uint32) ([]byte, error) {
	b := make([]byte, length)
	err := do(n, &object.Request{Op: object.OpRead, SizeShift: 22, ID: id, Policy: n.DefaultPolicy(), Off: off, Len: length, Data: b})
	return b, err
}

func TestThreeNodes(t *testing.T) {
	w := newWorld(t, "n1", "n2", "n3")
	w.form("n1", "n2", "n3")
	rnd := rand.New(rand.NewPCG(1, 1))
	model := map[object.ID]byte{}
	nodes := []*member{w.nodes["n1"], w.nodes["n2"], w.nodes["n3"]}
	for i := range 200 {
		id := object.DataID(object.VID(1+i%5), uint32(rnd.IntN(40)))
		b := byte(rnd.IntN(256))
		if err := put(nodes[i%3].Node, id, 8192, pattern(b)); err != nil {
			t.Fatal(err)
		}
		model[id] = b
	}
	for _, m := range nodes {
		for id, b := range model {
			got, err := get(m.Node, id, 8192, 4096)
			if err != nil || !bytes.Equal(got, pattern(b)) {
				t.Fatalf("%s: object %s has %x, want %x: %v", m.name, id, got[:4], b, err)
			}
		}
		if err := do(m.Node, &object.Request{Op: object.OpSync}); err != nil {
			t.Fatal(err)
		}
	}
	// One leaves; the others go on, and it catches up.
	for _, name := range []string{"n3", "n1", "n2"} {
		w.nodes[name].close()
		other := w.nodes[map[string]string{"n1": "n2", "n2": "n3", "n3": "n1"}[name]]
		for i := range 60 {
			id := object.DataID(object.VID(1+i%5), uint32(rnd.IntN(40)))
			b := byte(rnd.IntN(256))
			if err := put(other.Node, id, 8192, pattern(b)); err != nil {
				t.Fatal(err)
			}
			model[id] = b
		}
		w.start(name)
		w.whole(3)
	}
	for id, b := range model {
		for _, m := range nodes {
			got, err := get(m.Node, id, 8192, 4096)
			if err != nil || !bytes.Equal(got, pattern(b)) {
				t.Fatalf("%s: object %s has %x, want %x: %v", m.name, id, got[:4], b, err)
			}
		}
	}
}

// Replicas that differ are found, and made equal to their primary.
func TestCheckReplicas(t *testing.T) {
	w := newWorld(t, "n1", "n2", "n3")
	w.form("n1", "n2", "n3")
	n := w.nodes["n1"].Node
	for i := range 20 {
		if err := put(n, object.DataID(1, uint32(i)), 8192, pattern(byte(i+1))); err != nil {
			t.Fatal(err)
		}
	}
	calls := 0
	report, err := n.CheckReplicas(t.Context(), false, func(p CheckProgress) { calls++ })
	if err != nil || !report.Clean() || report.Objects != 20 || report.Partitions != 16 || calls != 16 {
		t.Fatalf("nothing is wrong, and the check says %+v after %d calls: %v", report, calls, err)
	}
	// Another content, a missing and an extra object on members behind the cluster's back.
	damage := func(i int, do func(m *member, k object.Key)) {
		id := object.DataID(1, uint32(i))
		p, err := n.Locate(n.DefaultPolicy(), id)
		if err != nil {
			t.Fatal(err)
		}
		do(w.nodes[p.InSync[1]], object.Key{Group: object.Group{Policy: p.Policy, Partition: p.Partition}, ID: id})
	}
	write := func(m *member, k object.Key, b byte) {
		done := make(chan error, 1)
		info, err := m.store.Stat(t.Context(), k)
		if err != nil && !errors.Is(err, object.ErrNotFound) {
			t.Fatal(err)
		}
		m.store.Submit(&object.Request{
			Op: object.OpWrite, SizeShift: 22, ID: k.ID, Policy: k.Group.Policy, Partition: k.Group.Partition, Off: 8192, Len: 4096,
			Data: pattern(b), Version: info.Version, Done: func(r *object.Request) { done <- r.Err },
		})
		m.store.Kick()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
	damage(3, func(m *member, k object.Key) { write(m, k, 99) })
	damage(4, func(m *member, k object.Key) {
		if err := m.store.Delete(t.Context(), k); err != nil {
			t.Fatal(err)
		}
	})
	damage(100, func(m *member, k object.Key) { write(m, k, 98) })
	report, err = w.nodes["n2"].CheckReplicas(t.Context(), false, nil)
	kinds := map[string]int{}
	for _, f := range report.Findings {
		kinds[f.Kind]++
	}
	if err != nil || report.Clean() || kinds["differs"] != 1 || kinds["missing"] != 1 || kinds["extra"] != 1 || len(report.Findings) != 3 {
		t.Fatalf("three replicas are wrong, and the check says %+v: %v", report, err)
	}
	report, err = w.nodes["n3"].CheckReplicas(t.Context(), true, nil)
	repaired := 0
	for _, f := range report.Findings {
		if f.Repaired {
			repaired++
		}
	}
	if err != nil || repaired != 2 {
		t.Fatalf("two can be repaired, and the check says %+v: %v", report, err)
	}
	report, err = n.CheckReplicas(t.Context(), false, nil)
	if err != nil || len(report.Findings) != 1 || report.Findings[0].Kind != "extra" {
		t.Fatalf("one object is extra, and the check says %+v: %v", report, err)
	}
}

// A node that was away is brought about what was written meanwhile.
func TestReturnMovesWhatChanged(t *testing.T) {
	w := newWorld(t, "n1", "n2", "n3")
	w.form("n1", "n2", "n3")
	big := bytes.Repeat([]byte{5}, 1<<20)
	n := w.nodes["n1"].Node
	for i := range 24 {
		for off := uint32(0); off < 4<<20; off += 1 << 20 {
			if err := put(n, object.DataID(1, uint32(i)), off, big); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := do(n, &object.Request{Op: object.OpSync}); err != nil {
		t.Fatal(err)
	}
	w.nodes["n3"].close()
	rnd := rand.New(rand.NewPCG(9, 9))
	const writes = 300
	for range writes {
		id, block := object.DataID(1, uint32(rnd.IntN(24))), uint32(rnd.IntN(1024))
		if err := put(n, id, block*4096, pattern(byte(rnd.IntN(256)))); err != nil {
			t.Fatal(err)
		}
	}
	m := w.start("n3")
	w.whole(3)
	moved := m.flock.replicas().Count.MovedBytes.Load()
	t.Logf("%d bytes were written, %d moved", writes*4096, moved)
	if moved > 2*writes*4096 {
		t.Errorf("%d bytes were written while the node was away, and %d were moved", writes*4096, moved)
	}
	if s := n.Recovery(); len(s) != 0 {
		t.Errorf("everything is whole, and recovery says %+v", s)
	}
}

// A node that ended after it had noted which cluster lets it in, and before it had a log, is let in
// when it starts again.
func TestJoinAfterCrash(t *testing.T) {
	w := newWorld(t, "n1", "n2")
	first := w.start("n1")
	if err := first.Format(t.Context(), FormatOptions{Copies: 1, Partitions: 16}); err != nil {
		t.Fatal(err)
	}
	dir := w.nodes["n2"].dir
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, clusterName), []byte(first.View().Cluster.ID), 0o600); err != nil {
		t.Fatal(err)
	}
	w.start("n2")
	w.eventually("n2 is up", func() bool {
		n := first.View().NodeByName("n2")
		return n != nil && n.State == state.NodeUp
	})
}

// Without a leader a command for the catalog, as the first write through a gateway is one, waits as
// long as a request does, and no other time.
func TestProposeWaitsAsRequestsDo(t *testing.T) {
	w := newWorld(t, "n1", "n2")
	w.ioTimeout = time.Second
	w.form("n1", "n2") // one of the two votes
	voter, other := "n1", "n2"
	if !w.nodes[voter].consensus.Load().Leading() {
		voter, other = other, voter
	}
	w.nodes[voter].close()
	n, began := w.nodes[other].Node, time.Now()
	_, err := n.Propose(t.Context(), stateMachine, (&state.Command{SetOutAfter: &state.SetOutAfter{Seconds: 60}}).Encode())
	if took := time.Since(began); !errors.Is(err, object.ErrUnavailable) || took < w.ioTimeout || took > 8*w.ioTimeout {
		t.Errorf("without a leader a command ends after %v, want %v: %v", took, w.ioTimeout, err)
	}
}

// A flush that covers what others have written does not say that it is durable while the
// only node that has it is down, nor when that came back and may have lost it.
func TestFlushOfWhatOnlyOneHas(t *testing.T) {
	w := newWorld(t, "n1", "n2")
	first := w.start("n1")
	if err := first.Format(t.Context(), FormatOptions{Copies: 1, Partitions: 16}); err != nil {
		t.Fatal(err)
	}
	w.start("n2")
	var theirs object.ID // an object of n2
	w.eventually("n2 has partitions", func() bool {
		v := first.View()
		for i := range uint32(100) {
			id := object.DataID(1, i)
			p := v.Policies[0].Partitions[object.PartitionOf(id, 16)]
			if m := v.NodeByName("n2"); m != nil && len(p.ISR) == 1 && p.Primary() == m.ID {
				theirs = id
				return true
			}
		}
		return false
	})
	if err := put(first.Node, theirs, 0, pattern(7)); err != nil {
		t.Fatal(err)
	}
	all := func() error {
		return do(first.Node, &object.Request{Op: object.OpSync, Policy: first.DefaultPolicy(), Flags: object.FlagAll, Volume: 1, Generation: 1})
	}
	if err := all(); err != nil {
		t.Fatalf("everybody is well: %v", err)
	}
	w.nodes["n2"].close()
	result := make(chan error, 1)
	go func() { result <- all() }()
	select {
	case err := <-result:
		t.Fatalf("n2 is down: %v", err)
	case <-time.After(500 * time.Millisecond):
	}
	w.start("n2")
	if err := <-result; !errors.Is(err, object.ErrIO) {
		t.Errorf("n2 has restarted: %v", err)
	}
	if err := all(); err != nil {
		t.Errorf("that is known by now: %v", err)
	}
}

// What is asked of a node that is left alone fails in time, also where it is the primary itself: it has no lease any more,
// or too few others, and nobody says when that ends.
func TestRequestsEndWithoutOthers(t *testing.T) {
	w := newWorld(t, "n1", "n2", "n3")
	w.ioTimeout = 2 * time.Second
	w.form("n1", "n2", "n3")
	n1 := w.nodes["n1"].Node
	putAll(t, n1, 8, 1)
	w.nodes["n2"].close()
	w.nodes["n3"].close()
	const count = 8
	done := make(chan error, 2*count)
	for i := range uint32(count) {
		go func() { done <- put(n1, object.DataID(1, i), 8192, pattern(9)) }()
		go func() { done <- put(n1, object.DataID(1, i), 8192, pattern(9)) }()
	}
	for range 2 * count {
		select {
		case err := <-done:
			if !errors.Is(err, object.ErrUnavailable) {
				t.Errorf("a write ends with %v", err)
			}
		case <-time.After(3 * time.Minute):
			t.Fatal("a write does not end")
		}
	}
}
