package vdi_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"slices"
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
//
// Each kind of actor has a file: clients of the volume v and who changes it as a whole (story_volume_test.go),
// machines that keep their state beside it (story_machine_test.go), clones of it (story_clones_test.go), volumes of
// one name that come and go (story_lives_test.go), and who cuts the power of what keeps the objects (story_power_test.go).

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
	Counts  map[string]int // what happened, how often
	Seed    uint64         // that failed
	Failure string
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
	o := told{Counts: map[string]int{}}
	for i := range uint64(c.Count) {
		if s := tell(t, c.First+i*c.Step, o.Counts); s != "" {
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

// atLeast is how often something is to happen in 20 stories.
var atLeast = map[string]int{
	"operations": 2000, "snapshots": 20, "rollbacks": 5, "resizes": 10, "clones": 5, "lives": 10, "states of machines": 5,
	"times other copies": 5, "gateways killed": 1, "power cuts": 5,
}

// Gateways whose messages and catalogs come at any time, that stop, are killed and start anew,
// while clients of all of them use the same blocks, snapshots come and go, and volumes are resized, rolled back, deleted and
// made anew: every block is linearizable. Each seed is another story, and nearly the same one every time.
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
	all := map[string]int{}
	for _, o := range outcomes {
		for what, n := range o.Counts {
			all[what] += n
		}
		if o.Failure != "" {
			t.Errorf("seed %d: %s\n(go test ./vdi -run Simulation -vdi.seed %d)", o.Seed, o.Failure, o.Seed)
		}
	}
	var list []string
	for _, what := range slices.Sorted(maps.Keys(all)) {
		list = append(list, fmt.Sprintf("%d %s", all[what], what))
	}
	t.Log(strings.Join(list, ", "))
	for what, least := range atLeast {
		if n := all["stories"]; n >= 20 && !t.Failed() && all[what] < least*n/20 {
			t.Errorf("too little happened: %d %s", all[what], what)
		}
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
	calm    bool          // only the first gateway's clients write
	wait    time.Duration // of a client between operations, at most
	rest    time.Duration // between snapshots, at most
	used    []int         // the registers that clients of v use
	cloned  []*cloned
	v       saga
	lives   map[uint64]*saga // of volumes w, by family
	cuts    []*cut           // of the power

	mu       sync.Mutex
	counts   map[string]int
	clock    int64
	next     uint32
	gateways []*vditest.Gateway
	ends     []context.CancelFunc // of what they do in the background
	failure  string
}

func tell(t *testing.T, seed uint64, counts map[string]int) (failure string) {
	synctest.Test(t, func(t *testing.T) {
		s := &tale{seed: seed, stop: make(chan struct{}), counts: counts, lives: map[uint64]*saga{}}
		s.happened("stories")
		s.run(t)
		failure = s.failure
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

func (s *tale) happened(what string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.counts[what]++
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
	s.used = rng.Perm(registers)[:1+rng.IntN(3)*rng.IntN(3)]
	c.Config = func(cfg *vdi.Config) { cfg.ResendWithin = time.Minute } // that old writes fail has a test of its own
	for _, n := range gatewayNames {
		s.begin(n)
	}
	o := vdi.CreateOptions{Name: "v", Size: storySize, ObjectSizeShift: storyShift(rng)}
	if _, err := s.gateways[0].Create(ctx, o); err != nil {
		s.fail("create: %v", err)
	}
	for i := range s.gateways {
		s.serve(i, rng.Uint64())
	}
	actors := []func(*rand.Rand){s.stops, s.kill, s.alters}
	if s.powerless() {
		actors = append(actors, s.cutPower)
	}
	for _, fn := range []func(*rand.Rand){s.snapshots, s.resizes, s.machines, s.clones, s.live} {
		if rng.IntN(3) > 0 {
			actors = append(actors, fn)
		}
	}
	var work sync.WaitGroup
	for _, fn := range actors {
		own := rand.New(rand.NewPCG(rng.Uint64(), 1))
		work.Go(func() { fn(own) })
	}
	time.Sleep(storyTime)
	close(s.stop)
	work.Wait()
	for _, end := range s.ends {
		end()
	}
	s.clients.Wait()
	s.finish(rng)
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

// some is one of the gateways, which may know nothing of the last changes.
func (s *tale) some(rng *rand.Rand) *vditest.Gateway { return s.gateway(rng.IntN(len(gatewayNames))) }

// knowing is one of the gateways, when it knows all that there was.
func (s *tale) knowing(rng *rand.Rand) *vditest.Gateway {
	g := s.some(rng)
	g.CatchUp()
	return g
}

// writer is a gateway that others than clients of v write through.
func (s *tale) writer(rng *rand.Rand) *vditest.Gateway {
	if s.calm {
		return s.gateway(0)
	}
	return s.some(rng)
}

func (s *tale) over() bool {
	select {
	case <-s.stop:
		return true
	default:
		return false
	}
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

// stops stops gateways, for longer than their lease or shorter.
func (s *tale) stops(rng *rand.Rand) {
	for s.nap(rng, 40*time.Millisecond) {
		g := s.some(rng)
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
		s.happened("gateways killed")
		s.nap(rng, 10*time.Millisecond)
		s.begin(g.Name)
		if !s.over() {
			s.serve(i, rng.Uint64())
		}
	}
}

// alters changes how many copies a volume has, which is refused if others write it.
func (s *tale) alters(rng *rand.Rand) {
	for s.nap(rng, 60*time.Millisecond) {
		name := []string{"v", "v", "w"}[rng.IntN(3)]
		g := s.writer(rng)
		_, err := g.AlterCopies(ctx, name, 1+rng.IntN(vditest.MaxCopies), nil, nil)
		switch {
		case err == nil:
			s.happened("times other copies")
		case name == "w" && errors.Is(err, vdi.ErrNotFound):
		case !g.Killed() && !lost(err) && !errors.Is(err, vdi.ErrBusy) && !errors.Is(err, vdi.ErrStale) && !errors.Is(err, vdi.ErrUnavailable):
			s.fail("other copies of %s through %s: %v", name, g.Name, err)
		}
	}
}

// finish looks at what has become of it.
func (s *tale) finish(rng *rand.Rand) {
	if s.failure != "" {
		return
	}
	time.Sleep(time.Second) // until what killed gateways have sent has arrived
	s.finishVolume(rng)
	s.finishClones()
	s.finishLives()
	if s.powerless() {
		s.finishPower(rng)
	}
	for _, g := range s.gateways { // each gives up what it had reserved when its background ended
		if err := g.Collect(ctx); err != nil && !lost(err) {
			s.fail("collect through %s: %v", g.Name, err)
		}
	}
	g := s.gateways[0]
	g.CatchUp()
	if err := errors.Join(g.Collect(ctx), g.Sweep(ctx), g.Collect(ctx)); err != nil {
		s.fail("collect: %v", err)
	}
	for p := vditest.Policy; p < vditest.Policy+vditest.MaxCopies; p++ {
		for _, id := range s.cluster.Objects.In(p) {
			if v, ok := g.Catalog.Get(id.VID()); !ok || v.Policy != p {
				s.fail("policy %d has %v, of %+v", p, id, v)
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
	s.empty(g)
}

// empty deletes everything: nothing is left of it.
func (s *tale) empty(g *vditest.Gateway) {
	for _, v := range g.Catalog.List() {
		tag := ""
		if v.Snapshot {
			tag = fmt.Sprint(v.SnapshotID)
		}
		if err := g.Delete(ctx, v.Name, tag); err != nil {
			s.fail("delete %s %s in the end: %v", v.Name, tag, err)
		}
	}
	if err := errors.Join(g.Collect(ctx), g.Sweep(ctx), g.Collect(ctx)); err != nil {
		s.fail("collect in the end: %v", err)
	}
	if ids := s.cluster.Objects.IDs(); len(ids) > 0 {
		s.fail("of nothing there are the objects %v", ids)
	}
}
