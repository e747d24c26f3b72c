package sim

import (
	"bufio"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

var (
	simSeed  = flag.Uint64("sim.seed", 0, "run this seed alone, and tell what happens")
	simSeeds = flag.Int("sim.n", 20, "how many seeds to run; from 500 on also what takes long")
	simChild = flag.String("sim.child", "", "what a process that runs seeds shall do, in JSON; set by the test itself")
)

// task is what a process shall run: seeds First, First+Step and so on.
type task struct {
	First  uint64
	Step   uint64
	Count  int
	About  string
	Broken mutation
	Trace  bool
}

// outcome is what a process says at its end.
type outcome struct {
	Stories  int
	Requests int
	Seen     map[string]int
	Took     time.Duration // of all stories
	Seed     uint64        // that failed
	Failure  string
	Trace    []string
}

const outcomeMark = "sim outcome: "

// TestStories is the process that runs seeds. With one processor its goroutines take turns
// in the same order every time, so that a seed is always the same story.
func TestStories(t *testing.T) {
	if *simChild == "" {
		t.Skip("TestSimulation runs it")
	}
	var k task
	if err := json.Unmarshal([]byte(*simChild), &k); err != nil {
		t.Fatal(err)
	}
	o := outcome{Seen: map[string]int{}}
	for i := range uint64(k.Count) {
		seed := k.First + i*k.Step
		s, about := setupOf(seed, k.About)
		w := story(t, s, k.Broken, k.Trace)
		w.happened("stories about " + about)
		o.Stories++
		o.Requests += w.ops
		o.Took += w.took
		for what, n := range w.seen {
			o.Seen[what] += n
		}
		o.Trace = w.trace
		if w.failure != nil {
			o.Seed, o.Failure = seed, w.failure.Error()
			break
		}
	}
	b, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Printf("%s%s\n", outcomeMark, b)
}

// perform runs a task in a process of its own.
func (k task) perform(t *testing.T) (o outcome) {
	t.Helper()
	arg, err := json.Marshal(k)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestStories$", "-test.timeout=1h", "-sim.child="+string(arg))
	cmd.Env = append(os.Environ(), "GOMAXPROCS=1", "GOGC=400", "GOMEMLIMIT=1GiB")
	out, err := cmd.CombinedOutput()
	lines := bufio.NewScanner(strings.NewReader(string(out)))
	lines.Buffer(nil, len(out)+1)
	for lines.Scan() {
		if b, ok := strings.CutPrefix(lines.Text(), outcomeMark); ok {
			if err := json.Unmarshal([]byte(b), &o); err != nil {
				t.Error(err)
			}
			return o
		}
	}
	t.Errorf("the process that runs seeds %d, %d... ended without an outcome: %v\n%s", k.First, k.First+k.Step, err, out)
	return o
}

func TestSimulation(t *testing.T) {
	if *simSeed != 0 {
		o := task{First: *simSeed, Count: 1, Trace: true}.perform(t)
		t.Log(strings.Join(o.Trace, "\n"))
		if o.Failure != "" {
			t.Fatal(o.Failure)
		}
		return
	}
	processes := min(runtime.NumCPU(), *simSeeds)
	outcomes := make([]outcome, processes)
	var wg sync.WaitGroup
	began := time.Now()
	for i := range processes {
		wg.Go(func() {
			count := (*simSeeds - i + processes - 1) / processes
			outcomes[i] = task{First: uint64(i + 1), Step: uint64(processes), Count: count}.perform(t)
		})
	}
	wg.Wait()
	all := outcome{Seen: map[string]int{}}
	for _, o := range outcomes {
		all.Stories += o.Stories
		all.Requests += o.Requests
		all.Took += o.Took
		for what, n := range o.Seen {
			all.Seen[what] += n
		}
		if o.Failure != "" {
			report(t, o)
		}
	}
	t.Logf("%d stories, %d requests, in %v on %d processors, %v each", all.Stories, all.Requests,
		time.Since(began).Round(time.Millisecond), processes, (all.Took / time.Duration(max(all.Stories, 1))).Round(time.Millisecond))
	for _, what := range slices.Sorted(maps.Keys(all.Seen)) {
		t.Logf("%8d %s", all.Seen[what], what)
	}
}

// lastWords is how much is shown of what led to a failure.
const lastWords = 60

// report tells the story of a failure again.
func report(t *testing.T, o outcome) {
	again := task{First: o.Seed, Count: 1, Trace: true}.perform(t)
	from := max(0, len(again.Trace)-lastWords)
	t.Errorf("seed %d: %s\nall of it: make sim SEED=%d; its end:\n%s", o.Seed, o.Failure, o.Seed, strings.Join(again.Trace[from:], "\n"))
	if again.Failure != o.Failure {
		t.Errorf("seed %d ended differently when it was told again: %q", o.Seed, again.Failure)
	}
}

// A seed is always the same story. Where it is not, a third telling decides: while the operating
// system has taken the processor away in the midst of an event, the runtime finds that its goroutine has
// run for long and lets another one go first. The race detector has goroutines run in any order.
func TestStoryIsTheSame(t *testing.T) {
	if raceDetector {
		t.Skip("goroutines run in random order under the race detector")
	}
	for seed := range uint64(4) {
		k := task{First: seed + 1, Count: 1, Trace: true}
		a, b := k.perform(t).Trace, k.perform(t).Trace
		if len(a) < 50 {
			t.Fatalf("seed %d: a story of %d lines", seed+1, len(a))
		}
		if slices.Equal(a, b) {
			continue
		}
		t.Logf("seed %d: %s", seed+1, difference(a, b))
		if c := k.perform(t).Trace; !slices.Equal(a, c) && !slices.Equal(b, c) {
			t.Errorf("seed %d: told three times, no two are the same: %s", seed+1, difference(a, c))
		}
	}
}

// difference shows where one story becomes another.
func difference(a, b []string) string {
	n := min(len(a), len(b))
	for i := range n {
		if a[i] != b[i] {
			return fmt.Sprintf("line %d: %s\nand then: %s", i, a[i], b[i])
		}
	}
	return fmt.Sprintf("%d lines, and then %d", len(a), len(b))
}

// The simulation must find each of these mistakes, in stories of a kind that is about it.
func TestSimulationNotices(t *testing.T) {
	for _, m := range mutations {
		t.Run(strings.ReplaceAll(string(m.mutation), " ", "-"), func(t *testing.T) {
			if (m.within > 40 || raceDetector) && *simSeeds < 500 {
				t.Skip("it takes some seeds: make sim does it")
			}
			t.Parallel()
			o := task{First: 1, Step: 1, Count: m.within, About: m.about, Broken: m.mutation}.perform(t)
			if o.Failure == "" {
				t.Errorf("%d stories about %s passed", m.within, m.about)
			}
			t.Logf("story %d about %s: %s", o.Seed, m.about, o.Failure)
		})
	}
}
