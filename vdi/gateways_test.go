package vdi_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sheepdog/vdi"
	"sheepdog/vdi/vditest"
)

var gatewayNames = []string{"n1", "n2", "n3"}

func startGateways(t *testing.T, seed uint64) (*vditest.Cluster, []*vditest.Gateway) {
	c := vditest.NewCluster(t, seed)
	var list []*vditest.Gateway
	for _, n := range gatewayNames {
		list = append(list, c.Gateway(n))
	}
	return c, list
}

func catchUp(list []*vditest.Gateway) {
	for _, g := range list {
		g.CatchUp()
	}
}

func openAll(t *testing.T, list []*vditest.Gateway, name string) (vols []*vdi.Volume) {
	t.Helper()
	catchUp(list)
	for _, g := range list {
		vols = append(vols, open(t, g.Service, name))
	}
	return vols
}

func byteAt(t *testing.T, v *vdi.Volume, off int64) byte {
	t.Helper()
	p := make([]byte, 1)
	must[int](t)(v.ReadAt(ctx, p, off))
	return p[0]
}

// gatewayModel runs the model of TestModel through gateways at random.
type gatewayModel struct {
	*model
	cluster  *vditest.Cluster
	gateways []*vditest.Gateway
	open     []map[string]*vdi.Volume
	at       int
	writer   map[string]int // who wrote last
}

func (m *gatewayModel) use(i int) {
	m.at = i
	m.service, m.volumes = m.gateways[i].Service, m.open[i]
}

// step does one thing through one gateway, which may know nothing of the last ones unless
// those changed which volumes there are.
func (m *gatewayModel) step() {
	m.use(m.rng.IntN(len(m.gateways)))
	m.note("through %s:", m.gateways[m.at].Name)
	switch m.rng.IntN(12) {
	case 0:
		m.readSome()
		return
	case 1:
		m.stopOne()
	case 2: // a change of which volumes there are, or of their size
		at := m.at
		for _, name := range sortedKeys(m.content) {
			m.use(m.writer[name])
			m.must(m.volume(name).Flush(ctx))
			m.content[name].settled()
			m.writer[name] = at
		}
		m.closeAll()
		m.use(at)
		for range 5 {
			m.model.step()
			catchUp(m.gateways)
		}
		return
	}
	for _, name := range sortedKeys(m.content) { // what every gateway knows
		m.ops++
		h := m.content[name]
		switch k := m.rng.IntN(10); {
		case len(h) == 0:
		case k < 6:
			m.write(name, h)
			m.writer[name] = m.at
		case k < 7:
			m.must(m.volume(name).Flush(ctx)) // also of what was written through another gateway
			h.settled()
		case k < 8:
			m.snapshot(name, h)
			catchUp(m.gateways) // its tag is to be known
		case k < 9:
			m.must(m.service.Collect(ctx))
		}
	}
}

func (m *gatewayModel) closeAll() {
	for i := range m.gateways {
		m.use(i)
		for _, name := range sortedKeys(m.volumes) {
			m.closeVolume(name)
		}
	}
	catchUp(m.gateways)
}

// readSome reads through a volume that is open, or opens it.
func (m *gatewayModel) readSome() {
	for _, name := range sortedKeys(m.content) {
		h := m.content[name]
		if len(h) == 0 {
			continue
		}
		v := m.volume(name)
		off := m.rng.IntN(len(h))
		p := make([]byte, min(len(h)-off, 40)*grain)
		if _, err := v.ReadAt(ctx, p, int64(off)*grain); err != nil {
			m.fail("read %s: %v", name, err)
		}
		for i := range len(p) / grain {
			if want := h[off+i][len(h[off+i])-1]; p[i*grain] != want {
				m.fail("%s reads %s block %d as %d, want %d", m.gateways[m.at].Name, name, off+i, p[i*grain], want)
			}
		}
	}
}

// stopOne stops another gateway for a while.
func (m *gatewayModel) stopOne() {
	i := m.rng.IntN(len(m.gateways))
	if i == m.at {
		return
	}
	g := m.gateways[i]
	m.note("%s stops", g.Name)
	g.Stop()
	time.AfterFunc(time.Duration(m.rng.IntN(20))*time.Millisecond, g.Continue)
}

// crash kills all gateways, perhaps with the power, and starts new ones.
func (m *gatewayModel) crash() {
	for _, g := range m.gateways {
		g.Kill()
	}
	keep := []float64{0, 0.5, 1}[m.rng.IntN(3)]
	m.note("crash, keeping %.1f", keep)
	m.cluster.Crash(keep)
	for i, n := range gatewayNames {
		m.gateways[i] = m.cluster.Gateway(n)
		m.open[i] = map[string]*vdi.Volume{}
	}
	if keep == 1 {
		for _, h := range m.content {
			h.settled()
		}
	}
	for _, name := range sortedKeys(m.content) {
		m.writer[name] = m.rng.IntN(len(m.gateways))
		m.use(m.writer[name])
		m.verify(name, "", m.content[name])
	}
}

// restart has what keeps the objects lose its power, while all gateways go on. One through which a client has written tells it when it
// flushes; where none does, nothing is lost.
func (m *gatewayModel) restart() {
	keep := []float64{0, 0.5}[m.rng.IntN(2)]
	m.note("the objects restart, keeping %.1f", keep)
	m.cluster.Objects.Restart(m.rng, keep)
	for _, name := range sortedKeys(m.content) {
		lost := false
		for _, i := range m.rng.Perm(len(m.gateways)) {
			m.use(i)
			err := m.volume(name).Flush(ctx)
			if err != nil && !errors.Is(err, vdi.ErrIO) {
				m.fail("flush %s: %v", name, err)
			}
			lost = lost || err != nil
		}
		if m.note("%s has lost something: %v", name, lost); !lost {
			m.content[name].settled()
		}
		m.verify(name, "", m.content[name])
	}
}

func runGatewayModel(t *testing.T, seed uint64, steps int) {
	c, list := startGateways(t, seed)
	m := &gatewayModel{
		model:   &model{t: t, rng: rand.New(rand.NewPCG(seed, 3)), content: map[string]history{}, snaps: map[string]map[string]history{}},
		cluster: c, gateways: list, open: []map[string]*vdi.Volume{{}, {}, {}}, writer: map[string]int{},
	}
	for i := range steps {
		m.step()
		if i%10 == 9 {
			catchUp(m.gateways)
			m.use(m.rng.IntN(len(list)))
			m.verifyAll()
		}
		if i%15 == 14 {
			m.crash()
		}
		if i%12 == 5 {
			catchUp(m.gateways)
			m.restart()
		}
	}
	m.closeAll()
	m.use(0)
	for _, name := range sortedKeys(m.content) {
		r, err := m.service.Check(ctx, name, vdi.CheckOptions{Repair: true}, nil)
		m.must(err)
		for _, p := range r.Problems {
			if p.Kind != vdi.ProblemLeftover {
				m.fail("check %s: %+v", name, p)
			}
		}
	}
	w := &vditest.World{Objects: c.Objects, Catalog: m.gateways[0].Catalog}
	emptyOut(t, w, m.service, fmt.Sprint("seed ", seed))
}

// A family of VDIs, snapshots and clones, used through three gateways with catalogs that
// lag, and that stop for a while, and crash, holds what was written.
func TestGatewayModel(t *testing.T) {
	for seed := range uint64(8 / slow) {
		t.Run(fmt.Sprint("seed", seed), func(t *testing.T) {
			t.Parallel()
			runGatewayModel(t, seed, 60)
		})
	}
}

const (
	registers    = 6
	registerStep = 700 << 10 // in several objects of 1 MiB
)

// register is where one register is; all have a sector.
func register(n int) int64 { return int64(n)*registerStep + 4096 }

// chaos is several clients at every gateway, on a volume of a few registers, which are
// objects that come and go, while gateways stop and snapshots are taken.
type chaos struct {
	t        *testing.T
	list     []*vditest.Gateway
	clock    atomic.Int64 // counts what happens
	next     atomic.Uint32
	mu       sync.Mutex
	ops      [registers][]operation
	longest  time.Duration // of an operation
	perNode  [3]atomic.Int64
	snapshot atomic.Int64
}

// now is later than all that was before, and before all that comes.
func (c *chaos) now() int64 { return c.clock.Add(1) }

func (c *chaos) client(node int, seed uint64, stop chan struct{}) {
	rng := rand.New(rand.NewPCG(seed, uint64(node)))
	v, err := c.list[node].Open(ctx, "v", "", vdi.OpenOptions{Client: "chaos"})
	if err != nil {
		c.t.Error(err)
		return
	}
	defer v.Close()
	p := make([]byte, 512)
	for {
		select {
		case <-stop:
			return
		default:
		}
		began := time.Now()
		n, o := rng.IntN(registers), operation{begin: c.now()}
		if rng.IntN(2) == 0 {
			o.deed = writes
			o.value = c.next.Add(1)
			binary.LittleEndian.PutUint32(p, o.value)
			_, err = v.WriteAt(ctx, p, register(n))
		} else if _, err = v.ReadAt(ctx, p, register(n)); err == nil {
			o.value = binary.LittleEndian.Uint32(p)
		}
		o.end = c.now()
		if err != nil {
			c.t.Errorf("through %s: %v", c.list[node].Name, err)
			return
		}
		if rng.IntN(50) == 0 {
			if err := v.Flush(ctx); err != nil {
				c.t.Errorf("flush through %s: %v", c.list[node].Name, err)
			}
		}
		c.perNode[node].Add(1)
		c.mu.Lock()
		c.ops[n] = append(c.ops[n], o)
		c.longest = max(c.longest, time.Since(began))
		c.mu.Unlock()
	}
}

// snapshots takes snapshots through all gateways. What a snapshot has was there at one
// moment between its begin and its end: so to say all registers were read then.
func (c *chaos) snapshots(rng *rand.Rand, stop chan struct{}) {
	for k := 0; ; k++ {
		select {
		case <-stop:
			return
		case <-time.After(time.Duration(rng.IntN(30)) * time.Millisecond):
		}
		g, tag := c.list[rng.IntN(len(c.list))], fmt.Sprint("s", k)
		begin := c.now()
		if _, err := g.Snapshot(ctx, "v", tag); err != nil {
			c.t.Errorf("snapshot through %s: %v", g.Name, err)
			return
		}
		end := c.now()
		c.snapshot.Add(1)
		var first [registers]uint32
		for round := range 2 {
			h := c.list[rng.IntN(len(c.list))]
			h.CatchUp()
			for n := range registers {
				value, err := registerOf(h.Service, "v", tag, n)
				if err != nil {
					c.t.Errorf("read snapshot through %s: %v", h.Name, err)
					return
				}
				if round == 1 && value != first[n] {
					c.t.Errorf("snapshot %s changes register %d from %d to %d", tag, n, first[n], value)
				}
				first[n] = value
			}
		}
		c.mu.Lock()
		for n := range registers {
			c.ops[n] = append(c.ops[n], operation{deed: looks, value: first[n], begin: begin, end: end})
		}
		c.mu.Unlock()
		if k%3 == 2 {
			if err := errors.Join(g.Delete(ctx, "v", fmt.Sprint("s", k-1)), g.Collect(ctx)); err != nil && !errors.Is(err, vdi.ErrStale) {
				c.t.Errorf("delete through %s: %v", g.Name, err)
			}
		}
	}
}

func registerOf(s *vdi.Service, name, tag string, n int) (uint32, error) {
	v, err := s.Open(ctx, name, tag, vdi.OpenOptions{ReadOnly: true})
	if err != nil {
		return 0, err
	}
	defer v.Close()
	p := make([]byte, 4)
	_, err = v.ReadAt(ctx, p, register(n))
	return binary.LittleEndian.Uint32(p), err
}

// stops stops gateways for longer than their lease, and sometimes shorter.
func (c *chaos) stops(rng *rand.Rand, stop chan struct{}) {
	for {
		g := c.list[rng.IntN(len(c.list))]
		select {
		case <-stop:
			return
		case <-time.After(time.Duration(rng.IntN(40)) * time.Millisecond):
		}
		g.Stop()
		time.Sleep(time.Duration(rng.IntN(20)) * time.Millisecond)
		g.Continue()
	}
}

// Clients at three gateways read and write the same blocks while gateways stop, and
// snapshots are taken and deleted through all of them: every block is linearizable,
// snapshots included, nobody fails, and every gateway gets on.
func TestGatewayChaos(t *testing.T) {
	for seed := range uint64(3) {
		t.Run(fmt.Sprint("seed", seed), func(t *testing.T) {
			t.Parallel()
			cluster, list := startGateways(t, seed)
			create(t, list[0].Service, "v", registers*registerStep).Close()
			catchUp(list)
			c := &chaos{t: t, list: list}
			stop := make(chan struct{})
			var wg sync.WaitGroup
			for node := range list {
				for k := range uint64(2) {
					wg.Go(func() { c.client(node, seed*10+k, stop) })
				}
			}
			wg.Go(func() { c.snapshots(rand.New(rand.NewPCG(seed, 100)), stop) })
			wg.Go(func() { c.stops(rand.New(rand.NewPCG(seed, 200)), stop) })
			enough := func() bool {
				ok := c.snapshot.Load() >= 5
				for i := range c.perNode {
					ok = ok && c.perNode[i].Load() >= 50
				}
				return ok
			}
			for began := time.Now(); time.Since(began) < 2500*time.Millisecond || !enough() && time.Since(began) < time.Minute; {
				time.Sleep(10 * time.Millisecond)
			}
			close(stop)
			wg.Wait()
			for n, ops := range c.ops {
				if why := linearizable(ops); why != "" {
					t.Errorf("register %d: %s", n, why)
				}
			}
			for i := range c.perNode {
				if n := c.perNode[i].Load(); n < 50 {
					t.Errorf("gateway %s got through %d operations only", list[i].Name, n)
				}
			}
			if c.snapshot.Load() < 5 {
				t.Errorf("%d snapshots only", c.snapshot.Load())
			}
			t.Logf("operations %d %d %d, %d snapshots, longest %v", c.perNode[0].Load(), c.perNode[1].Load(), c.perNode[2].Load(), c.snapshot.Load(), c.longest)
			catchUp(list)
			emptyOut(t, &vditest.World{Objects: cluster.Objects, Catalog: list[1].Catalog}, list[1].Service, "in the end")
		})
	}
}

// What a gateway answered and did not flush is seen by the next owner, and durable once
// that has taken the VDI over: through the end of the first, and of the power.
func TestGatewayKilled(t *testing.T) {
	for seed := range uint64(10) {
		c, list := startGateways(t, seed)
		create(t, list[0].Service, "v", 4<<20).Close()
		vols := openAll(t, list, "v")
		for i := range int64(4) {
			write(t, vols[0], i<<20, 5000, byte(i+1))
		}
		list[0].Kill()
		if b := byteAt(t, vols[1], 1<<20); b != 2 {
			t.Errorf("another gateway reads %d", b)
		}
		if seed%2 == 0 {
			write(t, vols[1], 3<<20, 1, 9)
		} else {
			must[vdi.Info](t)(list[1].Snapshot(ctx, "v", "s"))
		}
		list[1].Kill()
		list[2].Kill()
		c.Crash(0)
		again := c.Gateway("n2")
		v := open(t, again.Service, "v")
		for i := range int64(4) {
			if b := byteAt(t, v, i<<20+4999); b != byte(i+1) {
				t.Errorf("seed %d: object %d has %d after the power was cut", seed, i, b)
			}
		}
	}
}

// A gateway that was stopped with writes in flight, for longer than they may be sent
// again, does not get them in after what another one wrote; and reads nothing old.
func TestGatewayStopped(t *testing.T) {
	for seed := range uint64(10) {
		c := vditest.NewCluster(t, seed)
		c.Config = func(cfg *vdi.Config) { cfg.ResendWithin = 10 * time.Millisecond }
		a, b := c.Gateway("a"), c.Gateway("b")
		create(t, a.Service, "v", 64<<20).Close()
		vols := openAll(t, []*vditest.Gateway{a, b}, "v")
		write(t, vols[0], 0, 512, 1)
		byteAt(t, vols[0], 60<<20) // its part of the map is known to be a hole
		var wg sync.WaitGroup
		var failed atomic.Int32
		for i := range int64(30) {
			wg.Go(func() {
				if _, err := vols[0].WriteAt(ctx, bytes.Repeat([]byte{1}, 512), i<<20); err != nil {
					if !errors.Is(err, vdi.ErrStale) {
						t.Error(err)
					}
					failed.Add(1)
				}
			})
		}
		time.Sleep(time.Duration(seed) * 30 * time.Microsecond)
		a.Stop()
		for i := range int64(30) {
			write(t, vols[1], i<<20, 512, 2)
		}
		write(t, vols[1], 60<<20, 512, 2)
		read := make(chan byte, 1)
		go func() {
			p := make([]byte, 1)
			if _, err := vols[0].ReadAt(ctx, p, 60<<20); err != nil {
				t.Error(err)
			}
			read <- p[0]
		}()
		time.Sleep(20 * time.Millisecond)
		a.Continue()
		wg.Wait()
		if got := <-read; got != 2 {
			t.Errorf("seed %d: the gateway that was stopped reads %d from a map of old", seed, got)
		}
		for _, v := range vols {
			for i := range int64(30) {
				if got := byteAt(t, v, i<<20); got != 2 {
					t.Errorf("seed %d: a write of before came over a later one: object %d has %d", seed, i, got)
				}
			}
		}
		write(t, vols[0], 0, 512, 3)
		if got := byteAt(t, vols[1], 0); got != 3 {
			t.Errorf("after the first took it back, the second reads %d", got)
		}
		t.Logf("seed %d: %d of 30 failed", seed, failed.Load())
	}
}

// A VDI or snapshot that is deleted through another gateway is gone for who has it open,
// also if a new one has its name, and its vid.
func TestGatewayDelete(t *testing.T) {
	_, list := startGateways(t, 1)
	create(t, list[0].Service, "v", 4<<20).Close()
	vols := openAll(t, list, "v")
	vols[2].Close()
	write(t, vols[0], 0, 512, 1)
	must[vdi.Info](t)(list[1].Snapshot(ctx, "v", "s"))
	catchUp(list)
	snap := must[*vdi.Volume](t)(list[0].Open(ctx, "v", "s", vdi.OpenOptions{}))
	byteAt(t, snap, 0)
	write(t, vols[0], 1<<20, 512, 1)
	if err := errors.Join(list[2].Delete(ctx, "v", ""), list[2].Delete(ctx, "v", "s"), list[2].Collect(ctx)); err != nil {
		t.Fatal(err)
	}
	gone := func(what string, v *vdi.Volume) {
		t.Helper()
		if _, err := v.ReadAt(ctx, make([]byte, 512), 0); !errors.Is(err, vdi.ErrNotFound) {
			t.Errorf("read of a deleted %s: %v", what, err)
		}
	}
	gone("VDI", vols[0])
	gone("snapshot", snap)
	again := create(t, list[2].Service, "v", 4<<20)
	write(t, again, 0, 512, 7)
	gone("VDI", vols[0])
	gone("snapshot", snap)
	if _, err := vols[1].WriteAt(ctx, make([]byte, 512), 0); !errors.Is(err, vdi.ErrNotFound) {
		t.Errorf("write of a deleted VDI: %v", err)
	}
	catchUp(list)
	if got := byteAt(t, open(t, list[0].Service, "v"), 0); got != 7 {
		t.Errorf("the new VDI has %d", got)
	}
}

// Collectors and sweeps of all gateways at once, some of which stop in the middle and go
// on with an old catalog, remove nothing that is used.
func TestGatewayCollectors(t *testing.T) {
	for seed := range uint64(3) {
		c, list := startGateways(t, seed)
		c.Lag = 5 * time.Millisecond
		rng := rand.New(rand.NewPCG(seed, 5))
		stop := make(chan struct{})
		var wg sync.WaitGroup
		for _, g := range list {
			wg.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
					}
					for _, err := range []error{g.Collect(ctx), g.Sweep(ctx)} {
						if err != nil && !errors.Is(err, vdi.ErrStale) && !errors.Is(err, vdi.ErrUnavailable) && !errors.Is(err, vdi.ErrNotFound) {
							t.Errorf("seed %d: %v", seed, err)
						}
					}
				}
			})
		}
		for round := range 8 / int(slow) {
			g := list[rng.IntN(3)]
			catchUp(list)
			v := create(t, g.Service, "base", 3<<20)
			write(t, v, 0, 3<<20, byte(round+1))
			v.Close()
			must[vdi.Info](t)(g.Snapshot(ctx, "base", "s"))
			v = open(t, g.Service, "base")
			write(t, v, 0, 1000, 99)
			v.Close()
			must[vdi.Info](t)(g.Clone(ctx, "base", "s", "copy"))
			h := list[rng.IntN(3)]
			h.Stop()
			time.AfterFunc(time.Duration(rng.IntN(10))*time.Millisecond, h.Continue)
			if err := errors.Join(g.Delete(ctx, "base", "s"), g.Delete(ctx, "base", "")); err != nil {
				t.Error(err)
			}
			catchUp(list)
			w := open(t, list[rng.IntN(3)].Service, "copy")
			for o := range int64(3) {
				if got := byteAt(t, w, o<<20); got != byte(round+1) {
					t.Fatalf("seed %d: object %d of the clone has %d, want %d", seed, o, got, round+1)
				}
			}
			w.Close()
			if err := g.Delete(ctx, "copy", ""); err != nil {
				t.Error(err)
			}
		}
		close(stop)
		wg.Wait()
		catchUp(list)
		emptyOut(t, &vditest.World{Objects: c.Objects, Catalog: list[0].Catalog}, list[0].Service, fmt.Sprint("seed ", seed))
	}
}
