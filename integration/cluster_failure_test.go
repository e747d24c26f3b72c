package integration

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"sheepdog/integration/client"
	"sheepdog/integration/rig"
)

// wholeLimit bounds how long a small cluster may take to be whole after everything is back. It is for what never happens:
// where other work has the machine, starts and elections take many times as long as they should.
const wholeLimit = rig.WholeLimit

// stallLimit bounds how long a request may take because of one failure.
const stallLimit = 5 * time.Second

// patience is what a limit is multiplied by where other work shares the processors: make
// soak measures, the short run finds what never ends.
func patience() time.Duration {
	if soaking() {
		return 1
	}
	return 4
}

func reportStall(t *testing.T, h *herder, what string, limit time.Duration) {
	t.Helper()
	stall, strain := h.stall(), h.strain.longest()
	t.Logf("%s: longest stall %v, the machine's own %v", what, stall.Round(time.Millisecond), strain.Round(time.Millisecond))
	if limit *= patience(); stall > limit && !soaking() {
		limit += strainSteps * strain
		t.Logf("%s: the machine is busy with other things, so that %v are allowed", what, limit)
	}
	if stall > limit {
		t.Errorf("%s: a request took %v, at most %v is allowed", what, stall, limit)
	}
}

// Nodes that die, hang or are stopped are not noticed by clients of others, but for a moment.
func TestFlockSurvivesNodes(t *testing.T) {
	besideOthers(t)
	f := rig.NewFlock(t, 3, 3)
	h, l := newHerder(t, f, "v"), newFio(t, f, "fio")
	h.start(f.Nodes[0])
	l.start(f.Nodes[0])
	time.Sleep(time.Second)
	reportStall(t, h, "undisturbed", stallLimit)
	for _, i := range []int{1, 2} {
		f.Nodes[i].Kill()
		time.Sleep(3 * time.Second)
		took := f.Back(wholeLimit, i)
		reportStall(t, h, fmt.Sprintf("kill -9 of n%d, whole %v after its start", i+1, took.Round(time.Millisecond)), stallLimit)
	}
	hangs := []time.Duration{time.Second, 5 * time.Second}
	if soaking() {
		hangs = append(hangs, 15*time.Second)
	}
	for _, hang := range hangs {
		f.Nodes[2].Freeze()
		time.Sleep(hang)
		f.Nodes[2].Thaw()
		time.Sleep(time.Second)
		f.WaitWhole(wholeLimit)
		reportStall(t, h, fmt.Sprintf("n3 hung for %v", hang), stallLimit)
	}
	h.end()
	l.end()
	for _, s := range f.Nodes {
		h.verify(s, false)
		l.verify(s)
	}
	f.Nodes[0].Dog("cluster", "check")
	t.Logf("%d requests", h.ops.Load())
}

// The leader and the node that is primary of most may die like any other.
func TestFlockSurvivesLeader(t *testing.T) {
	besideOthers(t)
	f := rig.NewFlock(t, 3, 3)
	h := newHerder(t, f, "v")
	for _, who := range []struct {
		what string
		of   func() int
	}{{"leader", f.Leader}, {"busiest primary", f.Busiest}} {
		i := who.of()
		h.start(f.Nodes[(i+1)%3])
		time.Sleep(time.Second)
		h.stall()
		f.Nodes[i].Kill()
		time.Sleep(3 * time.Second)
		f.Back(wholeLimit, i)
		reportStall(t, h, "kill -9 of the "+who.what, stallLimit)
		h.end()
	}
	for _, s := range f.Nodes {
		h.verify(s, false)
	}
}

// All nodes die at once: what was flushed is there afterwards, and each node shows the same.
func TestFlockSurvivesDeathOfAll(t *testing.T) {
	besideOthers(t)
	f := rig.NewFlock(t, 3, 3)
	h := newHerder(t, f, "v")
	for round := range max(1, crashRounds(0)) {
		h.mayFail.Store(false)
		h.start(f.Nodes[round%3])
		time.Sleep(2 * time.Second)
		h.mayFail.Store(true)
		for _, s := range f.Nodes {
			s.Kill()
		}
		h.end()
		took := f.Back(wholeLimit, 0, 1, 2)
		t.Logf("round %d: whole after %v", round, took.Round(time.Millisecond))
		h.verify(f.Nodes[(round+1)%3], true)
		for _, s := range f.Nodes {
			h.verify(s, false)
		}
		checkClean(t, f.Nodes[round%3], fmt.Sprint("round ", round))
	}
}

// The power of all nodes is cut under load, and what no disk has written is lost: see rig.Flock.CutPower. What
// was flushed or written with FUA is there afterwards, every other block holds one of the writes since or what
// it held before, each gateway shows the same, and so do the replicas.
func TestFlockSurvivesPowerCut(t *testing.T) {
	besideOthers(t)
	var disks []*rig.PowerDisk
	f := rig.NewFlockOf(t, 3, 3, rig.FlockOptions{Disks: func(int) []string {
		disks = append(disks, rig.NewPowerDisk(t, "4G"))
		return []string{disks[len(disks)-1].Dir}
	}})
	seed := uint64(time.Now().UnixNano())
	random := rand.New(rand.NewPCG(seed, 1))
	h := newHerder(t, f, "v")
	rounds := 2
	if soaking() {
		rounds = 20
	}
	for round := 0; round < rounds || h.lost == 0 && round < 3*rounds; round++ { // it may be that all was on the disks
		h.mayFail.Store(false)
		h.lazy.Store(false)
		h.start(f.Nodes[round%3])
		time.Sleep(time.Duration(500+random.IntN(1500)) * time.Millisecond)
		// There shall be something to be lost.
		h.lazy.Store(true)
		for before := h.ops.Load(); h.ops.Load() < before+200; {
			time.Sleep(time.Millisecond)
		}
		h.mayFail.Store(true)
		f.CutPower(random, disks)
		h.end()
		before := h.lost
		took := f.Back(wholeLimit, 0, 1, 2)
		h.verify(f.Nodes[(round+1)%3], true)
		t.Logf("round %d, seed %d: whole after %v; %d blocks have lost what was written and not flushed", round, seed, took.Round(time.Millisecond), h.lost-before)
		for _, s := range f.Nodes {
			h.verify(s, false)
		}
		checkClean(t, f.Nodes[round%3], fmt.Sprint("round ", round))
	}
	if h.lost == 0 {
		t.Error("nothing was lost that was not flushed: that was no power cut")
	}
}

// All nodes are restarted in turn, with clients of a node that stays meanwhile.
func TestFlockRollingRestart(t *testing.T) {
	besideOthers(t)
	f := rig.NewFlock(t, 3, 3)
	h := newHerder(t, f, "v")
	for i := range f.Nodes {
		h.start(f.Nodes[(i+1)%3])
		time.Sleep(500 * time.Millisecond)
		h.stall()
		f.Nodes[i].Stop()
		reportStall(t, h, fmt.Sprintf("n%d stopped", i+1), movingLimit())
		f.Back(wholeLimit, i)
		reportStall(t, h, fmt.Sprintf("n%d came back", i+1), stallLimit)
		h.end()
	}
	for _, s := range f.Nodes {
		h.verify(s, false)
	}
}

// A gateway hangs for ten seconds with writes under way in it, and another one takes its volume over.
// None of the first one's writes lands after those of the second one. Then the volume goes to and fro.
func TestFlockHandOverFromHungGateway(t *testing.T) {
	besideOthers(t)
	f := rig.NewFlockOf(t, 3, 3, rig.FlockOptions{Config: "debug:\n  store_delay: 50ms\n"})
	f.Nodes[0].Dog("vdi", "create", "v", "64M")
	f.Know("v")
	const blocks = 32
	a, b := f.Nodes[0].Dial("v"), f.Nodes[1].Dial("v")
	start := func(c *client.Conn, k byte) (pending []<-chan error) {
		for i := range uint64(blocks) {
			pending = append(pending, c.Start(client.CmdWrite, 0, i*blockSize, blockSize, bytes.Repeat([]byte{k}, blockSize)))
		}
		return pending
	}
	finish := func(what string, pending []<-chan error) {
		for _, p := range pending {
			if err := <-p; err != nil {
				t.Fatalf("%s: %v", what, err)
			}
		}
	}
	holds := func(k byte) {
		t.Helper()
		buf := make([]byte, blocks*blockSize)
		for _, s := range f.Nodes {
			if err := s.Dial("v").Read(buf, 0); err != nil {
				t.Fatal(err)
			}
			for i := range blocks {
				if got := buf[i*blockSize]; got != k {
					t.Errorf("through %s block %d is %d, want %d", s.Host(), i, got, k)
				}
			}
		}
	}
	finish("the first gateway", start(a, 1))
	pending := start(a, 2)
	time.Sleep(20 * time.Millisecond) // they are in the gateway and, as that is slow, not done
	f.Nodes[0].Freeze()
	began := time.Now()
	finish("the second gateway", start(b, 3))
	t.Logf("the second gateway had written %v after the first one hung", time.Since(began).Round(time.Millisecond))
	time.Sleep(max(0, 10*time.Second-time.Since(began)))
	f.Nodes[0].Thaw()
	answered := 0
	for _, p := range pending {
		if err := <-p; err == nil {
			answered++
		}
	}
	f.WaitWhole(wholeLimit)
	t.Logf("%d of the %d writes that were under way were answered", answered, blocks)
	holds(3)
	for k, c := range []*client.Conn{a, b, a} {
		finish("to and fro", start(c, byte(4+k)))
		holds(byte(4 + k))
	}
}
