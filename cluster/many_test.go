package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
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
}

type member struct {
	w      *world
	name   string
	dir    string
	addr   string
	port   int
	gossip int
	store  *storage.Store
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
	if m.store, err = storage.Open(storage.Config{Disks: []disk.FS{fsys}, Node: name, ScrubRate: -1, Logger: logger}); err != nil {
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
		Disks:   []state.Disk{{ID: "disk of " + name, Path: data, Weight: 100}},
		Network: &Network{Listener: l, GossipPort: m.gossip, SecretFile: filepath.Join(w.base, "secret"), Join: join, IOTimeout: 20 * time.Second},
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

func (w *world) eventually(what string, within time.Duration, ok func() bool) {
	w.t.Helper()
	for begin := time.Now(); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Since(begin) > within {
			w.t.Fatalf("%s: not within %v", what, within)
		}
	}
}

// whole waits until all partitions have as many members in sync as there are nodes.
func (w *world) whole(n int) {
	w.t.Helper()
	w.eventually(fmt.Sprintf("all partitions have %d members", n), 30*time.Second, func() bool {
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
	first := w.start(names[0])
	if err := first.Format(w.t.Context(), FormatOptions{Copies: 3, Partitions: 16}); err != nil {
		w.t.Fatal(err)
	}
	for _, name := range names[1:] {
		w.start(name)
	}
	w.whole(len(names))
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
