package vdi_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"sheepdog/vdi"
	"sheepdog/vdi/vditest"
)

// The model of a VDI's content is a byte for each block of 512, which every write fills
// with one value. After a power cut a block may be any of what it was since the last flush.
const grain = 512

type history [][]byte // per block: values it may have; the last one is the newest

func newHistory(blocks int) history {
	h := make(history, blocks)
	for i := range h {
		h[i] = []byte{0}
	}
	return h
}

func (h history) clone() history {
	c := make(history, len(h))
	for i := range h {
		c[i] = append([]byte(nil), h[i]...)
	}
	return c
}

// settled forgets all but the newest.
func (h history) settled() history {
	for i := range h {
		h[i] = h[i][len(h[i])-1:]
	}
	return h
}

type model struct {
	t       *testing.T
	rng     *rand.Rand
	world   *vditest.World
	service *vdi.Service
	volumes map[string]*vdi.Volume
	content map[string]history            // by name
	snaps   map[string]map[string]history // by name, by tag
	ops     int
	log     []string
}

func (m *model) note(format string, args ...any) {
	m.log = append(m.log, fmt.Sprintf(format, args...))
}

func (m *model) fail(format string, args ...any) {
	m.t.Helper()
	for _, l := range m.log[max(0, len(m.log)-60):] {
		m.t.Log(l)
	}
	m.t.Fatalf(format, args...)
}

var ctx = context.Background()

func (m *model) must(err error) {
	m.t.Helper()
	if err != nil {
		m.fail("%v", err)
	}
}

func (m *model) name() string {
	names := []string{"a", "b", "c"}
	return names[m.rng.IntN(len(names))]
}

func (m *model) volume(name string) *vdi.Volume {
	if v := m.volumes[name]; v != nil {
		return v
	}
	v, err := m.service.Open(ctx, name, "", vdi.OpenOptions{Client: "model"})
	m.must(err)
	m.volumes[name] = v
	return v
}

func (m *model) closeVolume(name string) {
	if v := m.volumes[name]; v != nil {
		m.must(v.Close())
		delete(m.volumes, name)
	}
}

func (m *model) verify(name, tag string, want history) {
	m.t.Helper()
	v, err := m.service.Open(ctx, name, tag, vdi.OpenOptions{ReadOnly: true, Client: "verify"})
	m.must(err)
	defer v.Close()
	if v.Size() != int64(len(want)*grain) {
		m.fail("%s@%s has %d bytes, want %d", name, tag, v.Size(), len(want)*grain)
	}
	p := make([]byte, v.Size())
	if _, err := v.ReadAt(ctx, p, 0); err != nil {
		m.fail("read %s@%s: %v", name, tag, err)
	}
	for i := range want {
		b := p[i*grain:][:grain]
		ok := false
		for _, w := range want[i] {
			ok = ok || b[0] == w
		}
		if !ok || !bytes.Equal(b, bytes.Repeat(b[:1], grain)) {
			m.fail("%s@%s block %d is %d…, want one of %v", name, tag, i, b[0], want[i])
		}
		want[i] = []byte{b[0]} // from now on it is that
	}
}

func (m *model) verifyAll() {
	m.t.Helper()
	for name, h := range m.content {
		newest := h.clone().settled()
		m.verify(name, "", newest)
	}
	for name, tags := range m.snaps {
		for tag, h := range tags {
			m.verify(name, tag, h)
		}
	}
}

const maxBlocks = 3 * (1 << 20) / grain // three objects and a bit

func (m *model) step() {
	name := m.name()
	h, exists := m.content[name]
	m.ops++
	switch k := m.rng.IntN(100); {
	case !exists && k < 40:
		blocks := m.rng.IntN(maxBlocks)
		m.note("create %s %d", name, blocks)
		_, err := m.service.Create(ctx, vdi.CreateOptions{Name: name, Size: int64(blocks) * grain, ObjectSizeShift: 20})
		m.must(err)
		m.content[name] = newHistory(blocks)
	case !exists && k < 70:
		m.clone(name)
	case !exists:
	case k < 60 && len(h) > 0:
		m.write(name, h)
	case k < 68:
		m.note("flush %s", name)
		m.must(m.volume(name).Flush(ctx))
		h.settled()
	case k < 76:
		m.snapshot(name, h)
	case k < 80:
		m.rollback(name)
	case k < 84:
		m.resize(name, h)
	case k < 87:
		m.note("delete %s", name)
		m.closeVolume(name)
		m.must(m.service.Delete(ctx, name, ""))
		delete(m.content, name)
	case k < 92:
		m.deleteSnapshot(name)
	case k < 94:
		m.closeVolume(name)
	case k < 97:
		m.alter(name)
	default:
		m.must(m.service.Collect(ctx))
	}
}

func (m *model) write(name string, h history) {
	off := m.rng.IntN(len(h))
	n := 1 + m.rng.IntN(min(len(h)-off, 1<<uint(m.rng.IntN(13))))
	if m.rng.IntN(4) == 0 { // whole objects
		per := (1 << 20) / grain
		off = off / per * per
		n = min(len(h)-off, per*(1+m.rng.IntN(2)))
	}
	fua := vdi.Flags(0)
	if m.rng.IntN(4) == 0 {
		fua = vdi.FlagFUA
	}
	value := byte(1 + m.rng.IntN(250))
	done := make(chan error, 1)
	r := vdi.Request{Flags: fua, Off: int64(off) * grain, Len: int64(n) * grain, Done: func(r *vdi.Request) { done <- r.Err }}
	switch m.rng.IntN(5) {
	case 0:
		r.Op, value = vdi.OpDiscard, 0
	case 1:
		r.Op, value = vdi.OpZero, 0
		if m.rng.IntN(2) == 0 {
			r.Flags |= vdi.FlagNoHole
		}
	default:
		r.Op, r.Data = vdi.OpWrite, bytes.Repeat([]byte{value}, n*grain)
	}
	m.note("op %d flags %d %s at %d blocks %d value %d", r.Op, r.Flags, name, off, n, value)
	v := m.volume(name)
	v.Submit(&r)
	v.Kick()
	m.must(<-done)
	for i := off; i < off+n; i++ {
		if fua != 0 {
			h[i] = []byte{value}
		} else {
			h[i] = append(h[i], value)
		}
	}
}

func (m *model) snapshot(name string, h history) {
	if len(m.snaps[name]) >= 4 {
		return
	}
	tag := fmt.Sprintf("t%d", m.ops)
	m.note("snapshot %s %s", name, tag)
	_, err := m.service.Snapshot(ctx, name, tag)
	m.must(err)
	h.settled() // a snapshot is durable
	if m.snaps[name] == nil {
		m.snaps[name] = map[string]history{}
	}
	m.snaps[name][tag] = h.clone()
}

// pick returns some snapshot.
func (m *model) pick(name string) (string, history) {
	for _, tag := range sortedKeys(m.snaps[name]) {
		if m.rng.IntN(2) == 0 {
			return tag, m.snaps[name][tag]
		}
	}
	return "", nil
}

func (m *model) clone(name string) {
	src := m.name()
	tag, h := m.pick(src)
	if tag == "" {
		return
	}
	m.note("clone %s@%s to %s", src, tag, name)
	_, err := m.service.Clone(ctx, src, tag, name)
	m.must(err)
	m.content[name] = h.clone()
}

func (m *model) rollback(name string) {
	tag, h := m.pick(name)
	if tag == "" {
		return
	}
	m.note("rollback %s@%s", name, tag)
	_, err := m.service.Rollback(ctx, name, tag)
	m.must(err)
	m.content[name] = h.clone()
	m.closeVolume(name)
}

func (m *model) resize(name string, h history) {
	blocks := m.rng.IntN(maxBlocks)
	m.note("resize %s from %d to %d", name, len(h), blocks)
	_, err := m.service.Resize(ctx, name, int64(blocks)*grain)
	m.must(err)
	next := newHistory(blocks)
	copy(next, h)
	m.content[name] = next
	m.closeVolume(name)
}

// alter gives a VDI and its family another number of copies. All of it is durable then.
func (m *model) alter(name string) {
	copies := 1 + m.rng.IntN(vditest.MaxCopies)
	m.note("alter %s to %d copies", name, copies)
	family, err := m.service.Family(ctx, name)
	m.must(err)
	a, err := m.service.AlterCopies(ctx, name, copies, nil, nil)
	m.must(err)
	if len(a.Volumes) != len(family) {
		m.fail("alter %s: %d VDIs and snapshots are concerned, there were %d", name, len(a.Volumes), len(family))
	}
	for _, i := range a.Volumes {
		if i.Copies != copies {
			m.fail("%s@%s has %d copies, want %d", i.Name, i.Tag, i.Copies, copies)
		}
		if h := m.content[i.Name]; !i.Snapshot && a.From != a.To {
			h.settled()
		}
	}
}

func (m *model) deleteSnapshot(name string) {
	tag, _ := m.pick(name)
	if tag == "" {
		return
	}
	m.note("delete %s@%s", name, tag)
	m.must(m.service.Delete(ctx, name, tag))
	delete(m.snaps[name], tag)
}

// crash restarts the sheep: with the power gone, or only the process.
func (m *model) crash() {
	keep := []float64{0, 0.5, 1}[m.rng.IntN(3)]
	m.note("crash, keeping %.1f", keep)
	m.world.Crash(m.rng, keep)
	m.volumes = map[string]*vdi.Volume{}
	m.service = m.world.Service()
	if keep == 1 {
		for _, h := range m.content {
			for i := range h {
				h[i] = h[i][len(h[i])-1:]
			}
		}
	}
	for _, name := range sortedKeys(m.content) {
		m.verify(name, "", m.content[name])
	}
	m.verifyAll()
}

// restart has what keeps the objects lose its power, while the volumes are open. Who flushes is told of what may be lost; who is
// told nothing has lost nothing.
func (m *model) restart() {
	keep := []float64{0, 0.5}[m.rng.IntN(2)]
	m.note("the objects restart, keeping %.1f", keep)
	m.world.Objects.Restart(m.rng, keep)
	if m.rng.IntN(2) == 0 { // the background finds out first
		if err := m.service.Collect(ctx); err != nil && !errors.Is(err, vdi.ErrIO) {
			m.fail("collect: %v", err)
		}
	}
	for _, name := range sortedKeys(m.content) {
		switch err := m.volume(name).Flush(ctx); {
		case err == nil:
			m.content[name].settled()
		case !errors.Is(err, vdi.ErrIO):
			m.fail("flush %s: %v", name, err)
		default:
			m.note("%s has lost something", name)
			m.must(m.volume(name).Flush(ctx))
		}
		m.verify(name, "", m.content[name])
	}
	m.verifyAll()
}

func sortedKeys[V any](in map[string]V) []string {
	var keys []string
	for k := range in {
		keys = append(keys, k)
	}
	for i := range keys {
		for j := i + 1; j < len(keys); j++ {
			if keys[j] < keys[i] {
				keys[i], keys[j] = keys[j], keys[i]
			}
		}
	}
	return keys
}

func runModel(t *testing.T, seed uint64, steps int) {
	w := vditest.NewWorld(t)
	m := &model{
		t: t, rng: rand.New(rand.NewPCG(seed, 1)), world: w, service: w.Service(), volumes: map[string]*vdi.Volume{},
		content: map[string]history{}, snaps: map[string]map[string]history{},
	}
	w.Objects.Async = seed%2 == 1
	for i := range steps {
		m.step()
		if i%25 == 24 {
			m.verifyAll()
		}
		if i%40 == 39 {
			m.crash()
		}
		if i%30 == 14 {
			m.restart()
		}
	}
	m.verifyAll()
	for name := range m.content {
		r, err := m.service.Check(ctx, name, vdi.CheckOptions{Repair: true}, nil)
		m.must(err)
		for _, p := range r.Problems {
			if p.Kind != vdi.ProblemLeftover {
				m.fail("check %s: %+v", name, p)
			}
		}
	}
	for _, name := range []string{"a", "b", "c"} {
		m.closeVolume(name)
		if _, ok := m.content[name]; ok {
			m.must(m.service.Delete(ctx, name, ""))
		}
		for tag := range m.snaps[name] {
			m.must(m.service.Delete(ctx, name, tag))
		}
	}
	m.must(m.service.Collect(ctx))
	m.must(m.service.Sweep(ctx))
	m.must(m.service.Collect(ctx))
	if vids := w.Objects.Unflushed(); len(vids) > 0 {
		m.fail("everything is deleted, but who holds changes of %v is to be remembered", vids)
	}
	if ids := w.Objects.IDs(); len(ids) > 0 {
		m.fail("everything is deleted, but there are objects %v", ids)
	}
}

// A family of VDIs, snapshots and clones holds what was written, through crashes too,
// and leaves nothing when it is deleted.
func TestModel(t *testing.T) {
	for seed := range uint64(12 / slow) {
		t.Run(fmt.Sprint("seed", seed), func(t *testing.T) {
			t.Parallel()
			runModel(t, seed, 300-50*(slow-1))
		})
	}
}

// Submitters on all sides of a volume, with snapshots and collection going on: each
// finds what it wrote, and each snapshot is one of the states in between.
func TestConcurrent(t *testing.T) {
	w := vditest.NewWorld(t)
	w.Objects.Async = true
	s := w.Start()
	if _, err := s.Create(ctx, vdi.CreateOptions{Name: "v", Size: 8 << 20, ObjectSizeShift: 20}); err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for k := range 8 {
		wg.Go(func() { submitter(t, s, k, stop, 0) })
	}
	deadline := time.Now().Add(3 * time.Second)
	for n := 0; time.Now().Before(deadline); n++ {
		tag := fmt.Sprint("s", n)
		if _, err := s.Snapshot(ctx, "v", tag); err != nil {
			t.Error(err)
		}
		if n >= 2 {
			if err := s.Delete(ctx, "v", fmt.Sprint("s", n-2)); err != nil {
				t.Error(err)
			}
		}
	}
	close(stop)
	wg.Wait()
}

// submitter writes its own stripe of the volume and reads it back, with waits in between.
func submitter(t *testing.T, s *vdi.Service, k int, stop chan struct{}, wait time.Duration) {
	v, err := s.Open(ctx, "v", "", vdi.OpenOptions{Client: fmt.Sprint("submitter ", k)})
	if err != nil {
		t.Error(err)
		return
	}
	defer v.Close()
	rng := rand.New(rand.NewPCG(uint64(k), 2))
	want := map[int64]byte{}
	p, q := make([]byte, 3000), make([]byte, 3000)
	for n := 0; ; n++ {
		select {
		case <-stop:
			return
		default:
		}
		if wait > 0 {
			time.Sleep(wait)
		}
		off := int64(rng.IntN(300))*24000 + int64(k)*3000
		switch rng.IntN(10) {
		case 0:
			err = v.Flush(ctx)
		case 1:
			err = v.Discard(ctx, off, 3000)
			want[off] = 0
		default:
			want[off] = byte(n)
			for i := range p {
				p[i] = byte(n)
			}
			_, err = v.WriteAt(ctx, p, off)
		}
		if err != nil {
			t.Error(err)
			return
		}
		for off, b := range want {
			if _, err := v.ReadAt(ctx, q, off); err != nil {
				t.Error(err)
				return
			}
			if q[0] != b || q[2999] != b {
				t.Errorf("submitter %d reads %d at %d, wrote %d", k, q[0], off, b)
				return
			}
			break
		}
	}
}

// Errors are of the kinds that frontends know.
func TestKinds(t *testing.T) {
	s := vditest.New(t)
	create := func(name string) error {
		_, err := s.Create(ctx, vdi.CreateOptions{Name: name, Size: 1 << 20})
		return err
	}
	snapshot := func(name, tag string) error {
		_, err := s.Snapshot(ctx, name, tag)
		return err
	}
	if err := errors.Join(create("vm"), create("free"), create("locked"), snapshot("vm", "one")); err != nil {
		t.Fatal(err)
	}
	v, err := s.Open(ctx, "vm", "one", vdi.OpenOptions{Client: "somebody"})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Lock(ctx, "locked", "me"); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		what string
		err  error
		kind error
	}{
		{"create twice", create("vm"), vdi.ErrExists},
		{"create a/b", create("a/b"), vdi.ErrInvalid},
		{"snapshot of nothing", snapshot("no", "x"), vdi.ErrNotFound},
		{"tag twice", snapshot("vm", "one"), vdi.ErrExists},
		{"tag is another's number", snapshot("vm", "7"), vdi.ErrInvalid},
		{"write a snapshot", v.Zero(ctx, 0, 1, 0), vdi.ErrReadOnly},
		{"beyond the end", v.Discard(ctx, 1<<20, 1), vdi.ErrInvalid},
		{"delete an open one", s.Delete(ctx, "vm", "one"), vdi.ErrBusy},
		{"delete a locked one", s.Delete(ctx, "locked", ""), vdi.ErrLocked},
		{"attribute", s.DelAttr(ctx, "vm", "x"), vdi.ErrNotFound},
		{"closed", func() error { v.Close(); return v.Flush(ctx) }(), vdi.ErrClosed},
	} {
		if !errors.Is(c.err, c.kind) {
			t.Errorf("%s: %v, want a %v", c.what, c.err, c.kind)
		}
	}
}
