package vdi_test

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"sheepdog/vdi"
	"sheepdog/vdi/vditest"
)

// Stories are gateways in a bubble of testing/synctest: time stands still while anything runs, so
// that how long messages take, and in which order they come, is up to the seed alone, and hours of
// waiting take no time. What runs is the service as it is in production, for each gateway one, with all
// that it does in the background. A process that runs stories uses one processor: its goroutines
// take turns in the same order every time.

var (
	storySeed  = flag.Uint64("vdi.seed", 0, "run the story of this seed alone")
	storySeeds = flag.Int("vdi.n", 40, "how many stories to run")
	storyChild = flag.String("vdi.child", "", "what a process that runs stories shall do; set by the test itself")
)

// chapter is what a process shall tell: the stories First, First+Step and so on.
type chapter struct {
	First, Step uint64
	Count       int
}

// told is what has come of it.
type told struct {
	Stories, Operations, Snapshots, Clones, Altered, Kills int
	Seed                                                   uint64 // that failed
	Failure                                                string
}

const toldMark = "told: "

// TestStories is the process that runs stories.
func TestStories(t *testing.T) {
	if *storyChild == "" {
		t.Skip("TestSimulation runs it")
	}
	var c chapter
	if err := json.Unmarshal([]byte(*storyChild), &c); err != nil {
		t.Fatal(err)
	}
	var o told
	for i := range uint64(c.Count) {
		if s := tell(t, c.First+i*c.Step, &o); s != "" {
			o.Seed, o.Failure = c.First+i*c.Step, s
			break
		}
	}
	b, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Printf("%s%s\n", toldMark, b)
}

func (c chapter) perform(t *testing.T) (o told) {
	t.Helper()
	arg, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestStories$", "-test.timeout=1h", "-vdi.child="+string(arg))
	cmd.Env = append(os.Environ(), "GOMAXPROCS=1", "GOGC=400", "GOMEMLIMIT=1GiB")
	out, err := cmd.CombinedOutput()
	lines := bufio.NewScanner(strings.NewReader(string(out)))
	lines.Buffer(nil, len(out)+1)
	for lines.Scan() {
		if b, ok := strings.CutPrefix(lines.Text(), toldMark); ok {
			if err := json.Unmarshal([]byte(b), &o); err != nil {
				t.Error(err)
			}
			return o
		}
	}
	t.Errorf("the process that runs stories %d, %d... ended without an outcome: %v\n%s", c.First, c.First+c.Step, err, out)
	return o
}

// Gateways whose messages and catalogs come at any time, that stop, are killed and start anew,
// while clients of all of them use the same blocks and snapshots come and go: every block is
// linearizable. Each seed is another story, and the same one every time.
func TestSimulation(t *testing.T) {
	if *storySeed != 0 {
		if o := (chapter{First: *storySeed, Count: 1}).perform(t); o.Failure != "" {
			t.Fatal(o.Failure)
		}
		return
	}
	processes := min(runtime.NumCPU(), *storySeeds)
	outcomes := make([]told, processes)
	var wg sync.WaitGroup
	for i := range processes {
		wg.Go(func() {
			outcomes[i] = chapter{uint64(i + 1), uint64(processes), (*storySeeds - i + processes - 1) / processes}.perform(t)
		})
	}
	wg.Wait()
	var all told
	for _, o := range outcomes {
		all.Stories += o.Stories
		all.Operations += o.Operations
		all.Snapshots += o.Snapshots
		all.Clones += o.Clones
		all.Altered += o.Altered
		all.Kills += o.Kills
		if o.Failure != "" {
			t.Errorf("seed %d: %s\n(go test ./vdi -run Simulation -vdi.seed %d)", o.Seed, o.Failure, o.Seed)
		}
	}
	t.Logf("%d stories, %d operations, %d snapshots, %d clones, %d times other copies, %d gateways killed", all.Stories, all.Operations, all.Snapshots, all.Clones, all.Altered, all.Kills)
	if !t.Failed() && *storySeeds >= 20 && (all.Operations < 100*all.Stories || all.Snapshots < all.Stories || all.Clones < all.Stories/4 || all.Altered < all.Stories/4 || all.Kills == 0) {
		t.Error("too little happened")
	}
}

// storyTime is for how long clients and faults go on.
const storyTime = 300 * time.Millisecond

// tale is one story.
type tale struct {
	seed    uint64
	cluster *vditest.Cluster
	stop    chan struct{}
	clients sync.WaitGroup
	kills   int
	shots   int
	altered int
	calm    bool          // only the first gateway's clients write
	wait    time.Duration // of a client between operations, at most
	rest    time.Duration // between snapshots, at most
	used    int           // registers
	cloned  []*cloned

	mu       sync.Mutex
	clock    int64
	next     uint32
	gateways []*vditest.Gateway
	ends     []context.CancelFunc // of what they do in the background
	ops      [registers][]operation
	count    int
	failure  string
}

func tell(t *testing.T, seed uint64, o *told) (failure string) {
	synctest.Test(t, func(t *testing.T) {
		s := &tale{seed: seed, stop: make(chan struct{})}
		s.run(t)
		failure = s.failure
		o.Stories++
		o.Operations += s.count
		o.Snapshots += s.shots
		o.Clones += len(s.cloned)
		o.Altered += s.altered
		o.Kills += s.kills
	})
	return failure
}

// fail notes the first failure.
func (s *tale) fail(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failure == "" {
		s.failure = fmt.Sprintf(format, args...)
	}
}

func (s *tale) run(t *testing.T) {
	rng := rand.New(rand.NewPCG(s.seed, 9))
	pick := func(list ...time.Duration) time.Duration { return list[rng.IntN(len(list))] }
	t.Cleanup(func() { time.Sleep(time.Minute) }) // what is under way ends after the cluster
	c := vditest.NewCluster(t, s.seed)
	c.Delay = pick(50*time.Microsecond, 200*time.Microsecond, time.Millisecond)
	c.Lag = pick(100*time.Microsecond, time.Millisecond, 5*time.Millisecond)
	c.Lease = pick(2*time.Millisecond, 5*time.Millisecond)
	c.Rough, c.SlowMaps = rng.IntN(2) == 0, rng.IntN(2) == 0
	s.cluster, s.wait, s.rest = c, pick(0, 0, 2*time.Millisecond), pick(5*time.Millisecond, 15*time.Millisecond, 40*time.Millisecond)
	s.calm = rng.IntN(2) == 0
	s.used = 1 + rng.IntN(registers/2)*rng.IntN(3)
	c.Config = func(cfg *vdi.Config) { cfg.ResendWithin = time.Minute } // that old writes fail has a test of its own
	for _, n := range gatewayNames {
		s.begin(n)
	}
	g := s.gateways[0]
	if _, err := g.Create(ctx, vdi.CreateOptions{Name: "v", Size: registers * registerStep, ObjectSizeShift: 20}); err != nil {
		s.fail("create: %v", err)
	}
	var work sync.WaitGroup
	for i := range s.gateways {
		s.serve(i, rng.Uint64())
	}
	for _, fn := range []func(*rand.Rand){s.snapshots, s.stops, s.kill, s.alters, s.clones} {
		own := rand.New(rand.NewPCG(rng.Uint64(), 1))
		work.Go(func() { fn(own) })
	}
	time.Sleep(storyTime)
	close(s.stop)
	work.Wait()
	s.clients.Wait()
	s.finish()
}

// begin starts the gateway of a name.
func (s *tale) begin(name string) {
	g := s.cluster.Gateway(name)
	ctx, cancel := context.WithCancel(ctx)
	s.clients.Go(func() { g.Run(ctx) })
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.gateways {
		if s.gateways[i].Name == name {
			s.gateways[i], s.ends[i] = g, cancel
			return
		}
	}
	s.gateways, s.ends = append(s.gateways, g), append(s.ends, cancel)
}

func (s *tale) gateway(i int) *vditest.Gateway {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.gateways[i]
}

// serve has two clients at a gateway, until it is killed.
func (s *tale) serve(i int, seed uint64) {
	g := s.gateway(i)
	for k := range uint64(2) {
		s.clients.Go(func() {
			if err := s.client(g, rand.New(rand.NewPCG(seed, k)), s.calm && i > 0); err != nil && !g.Killed() {
				s.fail("through %s: %v", g.Name, err)
			}
		})
	}
}

func (s *tale) over() bool {
	select {
	case <-s.stop:
		return true
	default:
		return false
	}
}

func (s *tale) client(g *vditest.Gateway, rng *rand.Rand, reads bool) error {
	g.CatchUp()
	v, err := g.Open(ctx, "v", "", vdi.OpenOptions{Client: "story"})
	if err != nil {
		return err
	}
	for !s.over() {
		if s.wait > 0 {
			time.Sleep(time.Duration(rng.Int64N(int64(s.wait))))
		}
		if err := s.operate(v, rng, reads); err != nil {
			return err
		}
		if rng.IntN(50) == 0 {
			if err := v.Flush(ctx); err != nil {
				return err
			}
		}
	}
	return v.Close()
}

func (s *tale) tick() (at int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.clock++
	return s.clock
}

func (s *tale) value() uint32 {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.next++
	return s.next
}

// note adds operations that began together, and end now; what failed may still be carried out.
func (s *tale) note(n int, err error, list ...operation) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.clock++
	s.count++
	for _, o := range list {
		if o.end = s.clock; err != nil {
			if !o.write {
				continue
			}
			o.end = math.MaxInt64
		}
		s.ops[n] = append(s.ops[n], o)
	}
}

func (s *tale) operate(v *vdi.Volume, rng *rand.Rand, reads bool) (err error) {
	n, begin, p := rng.IntN(s.used), s.tick(), make([]byte, 512)
	read, write := operation{begin: begin}, operation{write: true, begin: begin}
	switch k := rng.IntN(12); {
	case reads || k < 7:
		_, err = v.ReadAt(ctx, p, register(n))
		read.value = binary.LittleEndian.Uint32(p)
		s.note(n, err, read)
	case k < 11:
		write.value = s.value()
		binary.LittleEndian.PutUint32(p, write.value)
		_, err = v.WriteAt(ctx, p, register(n))
		s.note(n, err, write)
	default: // reads, and writes, with nothing in between
		write.value = s.value()
		err = v.Update(ctx, register(n), 512, 0, func(p []byte) error {
			read.value = binary.LittleEndian.Uint32(p)
			binary.LittleEndian.PutUint32(p, write.value)
			return nil
		})
		s.note(n, err, read, write)
	}
	return err
}

// nap waits, and reports whether the story goes on.
func (s *tale) nap(rng *rand.Rand, most time.Duration) bool {
	select {
	case <-s.stop:
		return false
	case <-time.After(time.Duration(rng.Int64N(int64(most)))):
		return true
	}
}

// snapshots takes snapshots. What one has was there at one moment between its begin and its
// end: so to say all registers were read then.
func (s *tale) snapshots(rng *rand.Rand) {
	for k := 0; s.nap(rng, s.rest); k++ {
		g, tag := s.gateway(rng.IntN(len(gatewayNames))), fmt.Sprint("s", k)
		g.CatchUp()
		begin := s.tick()
		_, err := g.Snapshot(ctx, "v", tag)
		end := s.tick()
		if err != nil {
			if !g.Killed() {
				s.fail("snapshot through %s: %v", g.Name, err)
				return
			}
			continue
		}
		s.shots++
		h := s.gateway(rng.IntN(len(gatewayNames)))
		h.CatchUp()
		for n := range registers {
			value, err := registerOf(h.Service, "v", tag, n)
			if err != nil {
				if !h.Killed() {
					s.fail("read snapshot through %s: %v", h.Name, err)
				}
				break
			}
			s.mu.Lock()
			s.ops[n] = append(s.ops[n], operation{value: value, begin: begin, end: end})
			s.mu.Unlock()
		}
		if k%3 == 2 {
			if err := g.Delete(ctx, "v", tag); err != nil && !g.Killed() {
				s.fail("delete snapshot through %s: %v", g.Name, err)
			}
		}
	}
}

// cloned is a clone that one client alone uses, one operation at a time: what is in it is known.
type cloned struct {
	name   string
	values [registers]uint32
	unsure bool // a gateway was killed that had something in hand
}

// clones makes clones, and uses them.
func (s *tale) clones(rng *rand.Rand) {
	for k := 0; s.nap(rng, 2*s.rest); k++ {
		c := &cloned{name: fmt.Sprint("c", k)}
		g := s.writer(rng)
		if err := s.clone(g, c, rng.IntN(2) == 0); err != nil {
			if !g.Killed() {
				s.fail("clone %s through %s: %v", c.name, g.Name, err)
				return
			}
			continue
		}
		s.cloned = append(s.cloned, c)
		for range rng.IntN(8) {
			if c.unsure || !s.nap(rng, s.rest) {
				break
			}
			if g, err := s.useClone(c, rng); err != nil && !g.Killed() {
				s.fail("clone %s through %s: %v", c.name, g.Name, err)
				return
			}
		}
		if g := s.gateway(rng.IntN(len(gatewayNames))); rng.IntN(3) > 0 {
			g.CatchUp()
			if err := g.Delete(ctx, c.name, ""); err != nil && !g.Killed() {
				s.fail("delete clone %s through %s: %v", c.name, g.Name, err)
			}
			c.unsure = true
		}
	}
}

// writer is a gateway that clones are changed through.
func (s *tale) writer(rng *rand.Rand) *vditest.Gateway {
	if s.calm {
		return s.gateway(0)
	}
	return s.gateway(rng.IntN(len(gatewayNames)))
}

func (s *tale) clone(g *vditest.Gateway, c *cloned, alone bool) (err error) {
	g.CatchUp()
	if _, err = g.Snapshot(ctx, "v", c.name); err != nil {
		return err
	}
	if _, err = g.Clone(ctx, "v", c.name, c.name); err != nil {
		return err
	}
	for n := range registers {
		if c.values[n], err = registerOf(g.Service, "v", c.name, n); err != nil {
			return err
		}
	}
	if alone {
		err = g.Delete(ctx, "v", c.name)
	}
	return err
}

// useClone changes a clone through one gateway, and reads it through another.
func (s *tale) useClone(c *cloned, rng *rand.Rand) (*vditest.Gateway, error) {
	g := s.writer(rng)
	g.CatchUp()
	c.unsure = true
	for range 1 + rng.IntN(3) {
		if err := s.changeClone(g, c, rng); err != nil {
			return g, err
		}
	}
	c.unsure = false
	h := s.gateway(rng.IntN(len(gatewayNames)))
	h.CatchUp()
	return h, c.verify(h)
}

// changeClone writes into a clone, or takes a snapshot, writes, and rolls it back: then it is what it was.
func (s *tale) changeClone(g *vditest.Gateway, c *cloned, rng *rand.Rand) error {
	n, value, p := rng.IntN(registers), s.value(), make([]byte, 512)
	binary.LittleEndian.PutUint32(p, value)
	tag := fmt.Sprint("t", value)
	back := rng.IntN(3) == 0
	if back {
		if _, err := g.Snapshot(ctx, c.name, tag); err != nil {
			return err
		}
	}
	v, err := g.Open(ctx, c.name, "", vdi.OpenOptions{Client: "story"})
	if err != nil {
		return err
	}
	_, err = v.WriteAt(ctx, p, register(n))
	if err := errors.Join(err, v.Close()); err != nil {
		return err
	}
	if !back {
		c.values[n] = value
		return nil
	}
	if _, err := g.Rollback(ctx, c.name, tag); err != nil {
		return err
	}
	return g.Delete(ctx, c.name, tag)
}

func (c *cloned) verify(g *vditest.Gateway) error {
	for n, want := range c.values {
		got, err := registerOf(g.Service, c.name, "", n)
		if err != nil {
			return err
		}
		if got != want {
			return fmt.Errorf("register %d is %d, want %d", n, got, want)
		}
	}
	return nil
}

// alters changes how many copies the VDI has, which is refused if others write it.
func (s *tale) alters(rng *rand.Rand) {
	for s.nap(rng, 60*time.Millisecond) {
		g := s.gateway(0)
		if !s.calm {
			g = s.gateway(rng.IntN(len(gatewayNames)))
		}
		_, err := g.AlterCopies(ctx, "v", 1+rng.IntN(vditest.MaxCopies), nil, nil)
		switch {
		case err == nil:
			s.altered++
		case !g.Killed() && !errors.Is(err, vdi.ErrBusy) && !errors.Is(err, vdi.ErrStale) && !errors.Is(err, vdi.ErrUnavailable):
			s.fail("through %s: %v", g.Name, err)
		}
	}
}

// stops stops gateways, for longer than their lease or shorter.
func (s *tale) stops(rng *rand.Rand) {
	for s.nap(rng, 40*time.Millisecond) {
		g := s.gateway(rng.IntN(len(gatewayNames)))
		g.Stop()
		time.Sleep(time.Duration(rng.IntN(15)) * time.Millisecond)
		g.Continue()
	}
}

// kill kills gateways, and starts them anew.
func (s *tale) kill(rng *rand.Rand) {
	for s.nap(rng, 200*time.Millisecond) {
		i := rng.IntN(len(gatewayNames))
		s.mu.Lock()
		g, end := s.gateways[i], s.ends[i]
		s.mu.Unlock()
		g.Kill()
		end()
		s.kills++
		s.nap(rng, 10*time.Millisecond)
		s.begin(g.Name)
		if !s.over() {
			s.serve(i, rng.Uint64())
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, end := range s.ends {
		end()
	}
}

// finish looks at what has become of it.
func (s *tale) finish() {
	for i := range s.gateways {
		g := s.gateways[i]
		g.CatchUp()
		for n := range registers {
			o := operation{begin: s.tick()}
			value, err := registerOf(g.Service, "v", "", n)
			if err != nil {
				s.fail("read through %s in the end: %v", g.Name, err)
				return
			}
			o.value = value
			s.note(n, nil, o)
		}
	}
	for _, c := range s.cloned {
		g := s.gateways[len(c.name)%len(s.gateways)]
		if c.unsure {
			continue
		}
		if err := c.verify(g); err != nil {
			s.fail("clone %s through %s in the end: %v", c.name, g.Name, err)
		}
	}
	for n, ops := range s.ops {
		if why := linearizable(ops); why != "" {
			s.fail("register %d: %s", n, why)
		}
	}
	g := s.gateways[0]
	if err := errors.Join(g.Collect(ctx), g.Sweep(ctx), g.Collect(ctx)); err != nil {
		s.fail("collect: %v", err)
	}
	if v, err := g.Catalog.Find("v", ""); err != nil {
		s.fail("%v", err)
	} else {
		for p := vditest.Policy; p < vditest.Policy+vditest.MaxCopies; p++ {
			if ids := s.cluster.Objects.In(p); p != v.Policy && len(ids) > 0 {
				s.fail("policy %d, which is not the VDI's, has %v", p, ids)
			}
		}
	}
	for _, v := range g.Catalog.List() {
		if v.Snapshot {
			continue
		}
		r, err := g.Check(ctx, v.Name, vdi.CheckOptions{}, nil)
		for _, p := range r.Problems {
			if p.Kind != vdi.ProblemLeftover {
				err = errors.Join(err, fmt.Errorf("%+v", p))
			}
		}
		if err != nil {
			s.fail("check %s: %v", v.Name, err)
		}
	}
}
