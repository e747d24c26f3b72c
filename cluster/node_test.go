package cluster

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// journal is a machine that remembers its commands and answers with their number.
type journal struct {
	mu   sync.Mutex
	list []string
}

func (j *journal) Apply(c []byte) []byte {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.list = append(j.list, string(c))
	return []byte(strings.Join(j.list, ","))
}

func (j *journal) Snapshot() ([]byte, error) { return []byte(strings.Join(j.list, ",")), nil }

func (j *journal) Restore(b []byte) error {
	j.list = strings.Split(string(b), ",")
	return nil
}

type harness struct {
	t     *testing.T
	cfg   Config
	store *memStore
	node  *Node
}

func newHarness(t *testing.T) *harness {
	store := newMemStore()
	h := &harness{t: t, store: store, cfg: Config{
		Dir: t.TempDir(), Name: "n1", Address: "127.0.0.1", Store: store,
		Disks: []state.Disk{{ID: "d1", Path: "/d1", Weight: 100}},
	}}
	return h
}

func (h *harness) start() *Node {
	h.t.Helper()
	h.cfg.Machines = map[string]Machine{"journal": new(journal)}
	begin := time.Now()
	n, err := Start(h.t.Context(), h.cfg)
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Logf("started in %v", time.Since(begin))
	h.node = n
	h.t.Cleanup(func() { n.Close() })
	return n
}

func (h *harness) formatted() *Node {
	h.t.Helper()
	n := h.start()
	if err := n.Format(h.t.Context(), FormatOptions{Copies: 1, Partitions: 64}); err != nil {
		h.t.Fatal(err)
	}
	return n
}

func (h *harness) restart() *Node {
	h.t.Helper()
	if err := h.node.Close(); err != nil {
		h.t.Fatal(err)
	}
	return h.start()
}

// do carries out a request and returns its error.
func do(n *Node, r *object.Request) error {
	done := make(chan struct{})
	r.Done = func(*object.Request) { close(done) }
	n.Submit(r)
	n.Kick()
	<-done
	return r.Err
}

func write(n *Node, id object.ID, gen uint64, data string) (object.Version, error) {
	r := &object.Request{Op: object.OpWrite, SizeShift: 20, ID: id, Policy: n.DefaultPolicy(), Len: uint32(len(data)), Data: []byte(data), Volume: id.VID(), Generation: gen}
	err := do(n, r)
	return r.Version, err
}

func TestUnformatted(t *testing.T) {
	h := newHarness(t)
	n := h.start()
	id := object.DataID(1, 0)
	if _, err := write(n, id, 1, "x"); !errors.Is(err, object.ErrUnavailable) || !strings.Contains(err.Error(), "dog cluster format") {
		t.Errorf("write: %v", err)
	}
	if err := do(n, &object.Request{Op: object.OpSync}); !errors.Is(err, object.ErrUnavailable) {
		t.Errorf("sync: %v", err)
	}
	if _, err := n.Stat(t.Context(), 1, id); !errors.Is(err, object.ErrUnavailable) {
		t.Errorf("stat: %v", err)
	}
	if _, err := n.Propose(t.Context(), "journal", []byte("a")); !errors.Is(err, object.ErrUnavailable) {
		t.Errorf("propose: %v", err)
	}
	if _, err := n.PolicyOf(t.Context(), 2); !errors.Is(err, object.ErrUnavailable) {
		t.Errorf("policy: %v", err)
	}
	if err := n.Ready(); err == nil {
		t.Error("an unformatted node is ready")
	}
	if i := n.Info(); i.Formatted || i.Status != StatusUnformatted {
		t.Errorf("info: %+v", i)
	}
	h.restart()
}

func TestFormatAndRestart(t *testing.T) {
	h := newHarness(t)
	var adopted []string
	h.cfg.Adopt = func(id string) error { adopted = append(adopted, id); return nil }
	n := h.formatted()
	if err := n.Format(t.Context(), FormatOptions{}); !errors.Is(err, state.ErrFormatted) {
		t.Errorf("second format: %v", err)
	}
	id := object.DataID(5, 3)
	v1, err := write(n, id, 1, "hello")
	if err != nil {
		t.Fatal(err)
	}
	v2, err := write(n, id, 1, "again")
	if err != nil || !v1.Less(v2) {
		t.Errorf("versions %v, %v: %v", v1, v2, err)
	}
	if b, err := n.Propose(t.Context(), "journal", []byte("a")); err != nil || string(b) != "a" {
		t.Errorf("propose: %q, %v", b, err)
	}
	cluster := n.ClusterID()
	for range 3 {
		h.cfg.DiskCluster = cluster
		n = h.restart()
		if n.ClusterID() != cluster || n.Ready() != nil {
			t.Fatalf("after restart: cluster %q, %v", n.ClusterID(), n.Ready())
		}
		v, err := write(n, id, 1, "later")
		if err != nil || !v2.Less(v) {
			t.Fatalf("version %v after a restart, before it %v: %v", v, v2, err)
		}
		v2 = v
	}
	if n.Incarnation() != 4 {
		t.Errorf("incarnation %d after three restarts", n.Incarnation())
	}
	if b, err := n.Propose(t.Context(), "journal", []byte("b")); err != nil || string(b) != "a,b" {
		t.Errorf("propose after restart: %q, %v", b, err)
	}
	if len(adopted) != 4 || adopted[0] != cluster || adopted[3] != cluster {
		t.Errorf("adopted %q, cluster %q", adopted, cluster)
	}
}

func TestFormatRefusesNonsense(t *testing.T) {
	h := newHarness(t)
	n := h.start()
	for _, o := range []FormatOptions{{Copies: -1}, {Copies: 99}, {ObjectSizeShift: 5}, {Partitions: 3}} {
		if err := n.Format(t.Context(), o); !errors.Is(err, state.ErrInvalid) {
			t.Errorf("%+v: %v", o, err)
		}
	}
	if names, _ := os.ReadDir(h.cfg.Dir); len(names) != 1 {
		t.Errorf("a refused format left %v", names)
	}
}

func TestMoreCopiesThanNodes(t *testing.T) {
	h := newHarness(t)
	n := h.start()
	if err := n.Format(t.Context(), FormatOptions{Copies: 3}); err != nil {
		t.Fatal(err)
	}
	if _, err := write(n, object.DataID(1, 1), 1, "x"); err != nil {
		t.Errorf("write: %v", err)
	}
	i := n.Info()
	if i.Status != StatusDegraded || i.Policies[0].Degraded != state.DefaultPartitions || i.Policies[0].Unavailable != 0 || i.DefaultCopies != 3 {
		t.Errorf("info: %+v", i)
	}
}

func TestPolicies(t *testing.T) {
	h := newHarness(t)
	n := h.formatted()
	p, err := n.PolicyOf(t.Context(), 2)
	if err != nil || p == n.DefaultPolicy() || n.Copies(p) != 2 {
		t.Fatalf("policy %d: %v", p, err)
	}
	if q, err := n.PolicyOf(t.Context(), 2); q != p || err != nil {
		t.Errorf("second time: policy %d: %v", q, err)
	}
	if q, err := n.PolicyOf(t.Context(), 1); q != n.DefaultPolicy() || err != nil {
		t.Errorf("policy of one copy: %d, %v", q, err)
	}
	if _, err := n.PolicyOf(t.Context(), 0); !errors.Is(err, object.ErrInvalid) {
		t.Errorf("no copies: %v", err)
	}
	r := &object.Request{Op: object.OpWrite, SizeShift: 20, ID: object.DataID(2, 2), Policy: p, Len: 1, Data: []byte("x")}
	if err := do(n, r); err != nil {
		t.Errorf("write under the new policy: %v", err)
	}
	r = &object.Request{Op: object.OpRead, SizeShift: 20, ID: object.DataID(2, 2), Policy: 77, Len: 1, Data: []byte("x")}
	if err := do(n, r); !errors.Is(err, object.ErrInvalid) {
		t.Errorf("read under no policy: %v", err)
	}
}

func TestFencing(t *testing.T) {
	n := newHarness(t).formatted()
	id := object.DataID(9, 0)
	for _, step := range []struct {
		gen   uint64
		stale bool
	}{{3, false}, {3, false}, {2, true}, {4, false}, {3, true}, {4, false}} {
		if _, err := write(n, id, step.gen, "x"); errors.Is(err, object.ErrStale) != step.stale {
			t.Errorf("generation %d: %v", step.gen, err)
		}
	}
	n.SetGeneration(9, 7)
	n.SetGeneration(9, 5)
	if _, err := write(n, id, 6, "x"); !errors.Is(err, object.ErrStale) {
		t.Errorf("generation 6 after news of 7: %v", err)
	}
	c := object.CopyRequest{Dst: object.DataID(9, 1), Src: id, DstPolicy: n.DefaultPolicy(), SrcPolicy: n.DefaultPolicy(), SizeShift: 20, Volume: 9, Generation: 6}
	if err := n.Copy(t.Context(), c); !errors.Is(err, object.ErrStale) {
		t.Errorf("copy under generation 6: %v", err)
	}
	c.Generation = 7
	if err := n.Copy(t.Context(), c); err != nil {
		t.Errorf("copy under generation 7: %v", err)
	}
	if err := do(n, &object.Request{Op: object.OpRead, SizeShift: 20, ID: id, Policy: n.DefaultPolicy(), Len: 1, Data: make([]byte, 1), Volume: 9, Generation: 1}); !errors.Is(err, object.ErrStale) {
		t.Errorf("read under an old generation: %v", err)
	}
	if err := do(n, &object.Request{Op: object.OpRead, SizeShift: 20, ID: id, Policy: n.DefaultPolicy(), Len: 1, Data: make([]byte, 1), Volume: 9}); err != nil {
		t.Errorf("read of who does not own: %v", err)
	}
	if err := n.Delete(t.Context(), object.DeleteRequest{Policy: n.DefaultPolicy(), ID: id, Volume: 9, Generation: 6}); !errors.Is(err, object.ErrStale) {
		t.Errorf("removal under generation 6: %v", err)
	}
	if err := do(n, &object.Request{Op: object.OpSync, Flags: object.FlagAll, Policy: n.DefaultPolicy(), Volume: 9, Generation: 8}); err != nil {
		t.Errorf("fence: %v", err)
	}
	if _, err := write(n, id, 7, "x"); !errors.Is(err, object.ErrStale) {
		t.Errorf("generation 7 behind a fence: %v", err)
	}
	if _, err := write(n, object.DataID(object.MaxVID, 0), 1, "x"); err != nil {
		t.Errorf("highest volume: %v", err)
	}
}

func TestObjects(t *testing.T) {
	n := newHarness(t).formatted()
	ctx, policy := t.Context(), n.DefaultPolicy()
	for i := range uint32(20) {
		if _, err := write(n, object.DataID(3, i), 1, "data"); err != nil {
			t.Fatal(err)
		}
	}
	count := 0
	if err := n.List(ctx, policy, func(object.Info) error { count++; return nil }); err != nil || count != 20 {
		t.Errorf("listed %d of 20: %v", count, err)
	}
	id := object.DataID(3, 7)
	info, err := n.Stat(ctx, policy, id)
	if err != nil || info.Key.ID != id || info.Key.Group.Partition != object.PartitionOf(id, 64) {
		t.Errorf("stat: %+v, %v", info, err)
	}
	if e, err := n.Extents(ctx, policy, id, 0, 4096); err != nil || len(e) != 1 {
		t.Errorf("extents: %v, %v", e, err)
	}
	if s, err := n.Sums(ctx, policy, id); err != nil || len(s) != 1 {
		t.Errorf("sums: %v, %v", s, err)
	}
	if err := n.Delete(ctx, object.DeleteRequest{Policy: policy, ID: id}); err != nil {
		t.Error(err)
	}
	if _, err := n.Stat(ctx, policy, id); !errors.Is(err, object.ErrNotFound) {
		t.Errorf("stat of a deleted object: %v", err)
	}
	if l, err := n.Locate(policy, id); err != nil || len(l.InSync) != 1 || l.InSync[0] != "n1" {
		t.Errorf("locate: %+v, %v", l, err)
	}
	if l := n.Partitions(policy); len(l) != 64 || n.Partitions(99) == nil {
		t.Errorf("%d partitions", len(l))
	}
	if l := n.NodeList(); len(l) != 1 || l[0].Primaries != 64 || !l[0].Self || l[0].State != state.NodeUp {
		t.Errorf("nodes: %+v", l)
	}
	if l := n.DiskList(); len(l) != 1 || l[0].Path != "/d1" {
		t.Errorf("disks: %+v", l)
	}
}

func TestClosed(t *testing.T) {
	n := newHarness(t).formatted()
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	if err := n.Close(); err != nil {
		t.Errorf("second close: %v", err)
	}
	if _, err := write(n, 1, 1, "x"); !errors.Is(err, object.ErrClosed) {
		t.Errorf("write: %v", err)
	}
	if _, err := n.Propose(t.Context(), "journal", nil); !errors.Is(err, object.ErrClosed) {
		t.Errorf("propose: %v", err)
	}
	if err := n.Format(t.Context(), FormatOptions{}); err == nil {
		t.Error("format of a closed node succeeded")
	}
}

func TestStartRefuses(t *testing.T) {
	h := newHarness(t)
	n := h.formatted()
	cluster := n.ClusterID()
	start := func(change func(*Config)) error {
		c := h.cfg
		c.Machines = map[string]Machine{"journal": new(journal)}
		change(&c)
		n, err := Start(t.Context(), c)
		if err == nil {
			n.Close()
		}
		return err
	}
	expect := func(name, text string, change func(*Config)) {
		t.Helper()
		if err := start(change); err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("%s: %v, want %q in it", name, err, text)
		}
	}
	expect("second sheep", "in use by another sheep", func(*Config) {})
	n.Close()
	expect("other name", "check node.name", func(c *Config) { c.Name = "n2" })
	expect("other cluster's disks", "check node.disks", func(c *Config) { c.DiskCluster = "other" })
	expect("refusing disks", "no way", func(c *Config) { c.Adopt = func(string) error { return errors.New("no way") } })
	expect("lost state", "restore that directory", func(c *Config) { c.Dir, c.DiskCluster = t.TempDir(), cluster })
	expect("no name", "no name", func(c *Config) { c.Name = "" })
	expect("no directory", "no such file", func(c *Config) { c.Dir = filepath.Join(c.Dir, "none") })
	expect("reserved machine", `"state"`, func(c *Config) { c.Machines = map[string]Machine{"state": new(journal)} })
	if err := start(func(*Config) {}); err != nil {
		t.Errorf("after all: %v", err)
	}
}

func TestGatewayAlone(t *testing.T) {
	h := newHarness(t)
	h.cfg.Store, h.cfg.Disks = nil, nil
	n := h.formatted()
	if _, err := write(n, 1, 1, "x"); !errors.Is(err, object.ErrUnavailable) || !strings.Contains(err.Error(), "add a node with disks") {
		t.Errorf("write: %v", err)
	}
	if i := n.Info(); i.Status != StatusUnavailable {
		t.Errorf("info: %+v", i)
	}
	n.Kick()
}

func TestRun(t *testing.T) {
	h := newHarness(t)
	n := h.start()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- n.Run(ctx) }()
	if err := n.Format(t.Context(), FormatOptions{Copies: 1}); err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestDelay(t *testing.T) {
	h := newHarness(t)
	h.cfg.Delay = 20 * time.Millisecond
	n := h.formatted()
	const requests = 500
	var wg sync.WaitGroup
	order := make([]int, 0, requests)
	wg.Add(requests)
	start := time.Now()
	for i := range requests {
		n.Submit(&object.Request{Op: object.OpWrite, SizeShift: 20, ID: 1, Policy: n.DefaultPolicy(), Len: 1, Data: []byte{1}, Done: func(*object.Request) {
			order = append(order, i) // by the one goroutine of the line
			wg.Done()
		}})
	}
	n.Kick()
	wg.Wait()
	if took := time.Since(start); took < h.cfg.Delay || took > 50*h.cfg.Delay {
		t.Errorf("%d requests took %v with a delay of %v", requests, took, h.cfg.Delay)
	}
	for i, k := range order {
		if i != k {
			t.Fatalf("request %d came in place %d", k, i)
		}
	}
	begin := time.Now()
	if _, err := n.Stat(t.Context(), n.DefaultPolicy(), 1); err != nil || time.Since(begin) < h.cfg.Delay {
		t.Errorf("stat took %v: %v", time.Since(begin), err)
	}
}

func TestSubmitAllocatesNothing(t *testing.T) {
	h := newHarness(t)
	n := h.formatted()
	n.cfg.Store = sink{h.store}
	r := &object.Request{Op: object.OpWrite, SizeShift: 22, ID: object.DataID(4, 4), Policy: n.DefaultPolicy(), Len: 4096, Data: bytes.Repeat([]byte{1}, 4096), Volume: 4, Generation: 1, Done: func(*object.Request) {}}
	if a := testing.AllocsPerRun(1000, func() { n.Submit(r); n.Kick() }); a != 0 {
		t.Errorf("%v allocations per request", a)
	}
}

// sink completes everything at once.
type sink struct{ *memStore }

func (sink) Submit(r *object.Request) { r.Complete(nil) }
func (sink) Kick()                    {}

func BenchmarkSubmit(b *testing.B) {
	store := newMemStore()
	n, err := Start(b.Context(), Config{Dir: b.TempDir(), Name: "n1", Store: sink{store}, Disks: []state.Disk{{ID: "d", Weight: 1}}})
	if err != nil {
		b.Fatal(err)
	}
	defer n.Close()
	if err := n.Format(b.Context(), FormatOptions{}); err != nil {
		b.Fatal(err)
	}
	r := &object.Request{Op: object.OpWrite, SizeShift: 22, ID: object.DataID(4, 4), Policy: n.DefaultPolicy(), Volume: 4, Generation: 1, Done: func(*object.Request) {}}
	b.ReportAllocs()
	for b.Loop() {
		r.ID++
		n.Submit(r)
	}
}
