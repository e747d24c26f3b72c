package integration

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"sheepdog/integration/rig"
)

// movingLimit is how long a request may take because data is moved or a node is stopped: 0.2 s on a machine that has
// nothing else to do, as make soak should have. Other work on the processors takes more than that by itself.
func movingLimit() time.Duration {
	if soaking() {
		return 200 * time.Millisecond
	}
	return 500 * time.Millisecond
}

// moved counts the replicas that are where none was before.
func moved(before, after []rig.Partition) (count int) {
	for i := range after {
		for _, n := range after[i].InSync {
			if !slices.Contains(before[i].InSync, n) {
				count++
			}
		}
	}
	return count
}

// holding counts the partitions that a node is in sync with.
func holding(list []rig.Partition, node string) (count int) {
	for _, p := range list {
		if slices.Contains(p.InSync, node) {
			count++
		}
	}
	return count
}

// A node that joins takes its share and little else moves; one that is drained gives what it holds to others
// without anybody noticing; one that is removed is told, and cannot come back. Then all stop at once, and
// are whole again.
func TestFlockGrowsShrinksAndStops(t *testing.T) {
	f := rig.NewFlock(t, 3, 3)
	h := newHerder(t, f, "v")
	h.start(f.Nodes[0])
	time.Sleep(time.Second)
	reportStall(t, h, "undisturbed", stallLimit)

	before := f.Partitions(f.Nodes[0])
	began := time.Now()
	n4 := f.Add()
	share := 3 * len(before) / 4 // of all replicas, with equal disks
	awaitShare(t, f, n4, "n4", share)
	took := time.Since(began)
	after := f.Partitions(n4)
	t.Logf("n4 holds %d partitions %v after its start; %d replicas have moved, %d is the least that is possible", holding(after, "n4"), took.Round(time.Millisecond), moved(before, after), share)
	if n := holding(after, "n4"); n > share*105/100 {
		t.Errorf("n4 holds %d of %d partitions, its share is %d", n, len(after), share)
	}
	if n := moved(before, after); n > share*110/100 {
		t.Errorf("%d replicas have moved, at least %d must", n, share)
	}
	reportStall(t, h, "a fourth node takes its share", movingLimit())

	if r := f.Nodes[0].DogRun("node", "remove", "n2"); r.Code != 1 || !strings.Contains(r.Stderr, "drain") {
		t.Errorf("removing a node that holds data: status %d, %s", r.Code, r.Stderr)
	}
	began = time.Now()
	f.Nodes[2].Dog("node", "drain", "n2", "--wait")
	t.Logf("n2 is drained after %v", time.Since(began).Round(time.Millisecond))
	reportStall(t, h, "n2 is drained", movingLimit())
	if list := f.Partitions(n4); holding(list, "n2") > 0 {
		t.Errorf("n2 is drained and holds %d partitions", holding(list, "n2"))
	}
	for _, p := range f.Partitions(n4) {
		if len(p.InSync) != 3 {
			t.Fatalf("a partition is held by %v", p.InSync)
		}
	}

	n2 := f.Nodes[1]
	n4.Dog("node", "remove", "n2")
	if code := n2.Wait(time.Minute); code != 0 {
		t.Errorf("n2 was removed and ended with status %d\n%s", code, n2.Log())
	}
	reportStall(t, h, "n2 is removed", movingLimit())
	if _, there := f.Members(n4)["n2"]; there {
		t.Error("n2 was removed and is still there")
	}
	for range 2 { // it has to ask others, and then knows
		n2.Launch()
		if code := n2.Wait(time.Minute); code != 1 || !strings.Contains(n2.Log(), "was removed from the cluster") {
			t.Errorf("n2 was removed, and started again ended with status %d\n%s", code, n2.Log())
		}
	}
	f.Drop(n2)
	f.WaitWhole(wholeLimit)
	h.end()
	for _, s := range f.Nodes {
		h.verify(s, false)
	}

	h.start(f.Nodes[0])
	time.Sleep(time.Second)
	h.mayFail.Store(true) // clients are asked to go
	f.Nodes[1].Dog("cluster", "shutdown")
	for _, s := range f.Nodes {
		if code := s.Wait(endLimit); code != 0 {
			t.Errorf("%s ended with status %d\n%s", s.Host(), code, s.Log())
		}
	}
	h.end()
	h.mayFail.Store(false)
	took = f.Back(wholeLimit, 0, 1, 2)
	t.Logf("whole %v after all nodes were stopped and started", took.Round(time.Millisecond))
	for _, s := range f.Nodes {
		h.verify(s, false) // nothing that was answered is lost, flushed or not
	}
}

// awaitMember waits until a node is as it shall be.
func awaitMember(t *testing.T, f *rig.Flock, asked *rig.Sheep, name string, is func(rig.Member) bool) {
	t.Helper()
	for deadline := time.Now().Add(wholeLimit); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		if m, ok := f.Members(asked)[name]; ok && is(m) {
			return
		}
	}
	t.Fatalf("%s has not become what it shall be: %+v", name, f.Members(asked)[name])
}

// awaitShare waits until a node holds its share, and all is whole: partitions move some at a time, and in
// between there may be a moment in which all that have been told to are where they shall be.
func awaitShare(t *testing.T, f *rig.Flock, asked *rig.Sheep, name string, share int) {
	t.Helper()
	awaitMember(t, f, asked, name, func(m rig.Member) bool { return m.Replicas >= share*95/100 })
	f.WaitWhole(wholeLimit)
}

// awaitShares waits until nodes hold their shares, so many percent more or less, and nothing is on its way between them.
func awaitShares(t *testing.T, f *rig.Flock, asked *rig.Sheep, shares map[string]int, percent int) {
	t.Helper()
	for deadline := time.Now().Add(wholeLimit); ; time.Sleep(50 * time.Millisecond) {
		f.WaitWhole(wholeLimit)
		list, wrong := f.Partitions(asked), ""
		all, held := 0, 0
		for _, p := range list {
			all += len(p.Targets)
		}
		for name, share := range shares {
			n := holding(list, name)
			if held += n; n < share*(100-percent)/100 || n > share*(100+percent)/100 {
				wrong += fmt.Sprintf("%s holds %d, its share is %d; ", name, n, share)
			}
		}
		if wrong == "" && held == all {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("as %s knows it, of %d replicas there are %d; %s", asked.Host(), all, held, wrong)
		}
	}
}

// endLimit bounds how long a daemon may take to stop.
const endLimit = time.Minute

// diskRow is what is said of a disk.
type diskRow struct {
	Node, Path, State string
	Objects           int
	Partitions        int
	Moves             struct {
		ToCome int `json:"to_come"`
		ToGo   int `json:"to_go"`
	}
}

// awaitEven waits until each of a node's disks, which are of one size, has its share of the node's partitions.
func awaitEven(t *testing.T, asked *rig.Sheep, node string) (disks []diskRow) {
	t.Helper()
	for deadline := time.Now().Add(wholeLimit); ; time.Sleep(50 * time.Millisecond) {
		asked.DogJSON(&disks, "node", "md", "info", "--node", node)
		all, least, moving := 0, 1<<30, 0
		for _, d := range disks {
			all, least, moving = all+d.Partitions, min(least, d.Partitions), moving+d.Moves.ToCome+d.Moves.ToGo
		}
		if moving == 0 && least >= all*4/5/len(disks) {
			return disks
		}
		if time.Now().After(deadline) {
			t.Fatalf("the disks of %s are %+v", node, disks)
		}
	}
}

// A disk that is added to a node under load gives that node a larger share, and takes its own of what the node has on
// other disks. Then it is taken out again, and all that it had goes to the other one, without anything being missed after a restart.
func TestFlockPlugsDisk(t *testing.T) {
	f := rig.NewFlock(t, 3, 2)
	spread(t, f.Nodes[2], 128)
	h := newHerder(t, f, "v")
	h.start(f.Nodes[0])
	time.Sleep(time.Second)
	h.stall()
	before := f.Members(f.Nodes[0])["n2"].Replicas
	n2 := f.Nodes[1]
	dir := n2.PlugDisk()
	awaitMember(t, f, f.Nodes[0], "n2", func(m rig.Member) bool { return m.Replicas > before*5/4 })
	f.WaitWhole(wholeLimit)
	disks := awaitEven(t, f.Nodes[2], "n2")
	reportStall(t, h, "a disk is added to n2", movingLimit())
	if len(disks) != 2 || disks[1].Path != dir || disks[1].State != "ok" || disks[1].Objects == 0 {
		t.Errorf("the disks of n2 are %+v", disks)
	}
	if r := n2.DogRun("node", "md", "plug", dir); r.Code != 1 {
		t.Errorf("a disk is added twice: status %d", r.Code)
	}
	if r := n2.DogRun("node", "md", "unplug", n2.Disks[0]); r.Code != 1 || !strings.Contains(r.Stderr, "state_dir") {
		t.Errorf("the disk with the node's state is taken out: status %d, %s", r.Code, r.Stderr)
	}
	h.stall()
	f.Nodes[0].Dog("node", "md", "unplug", dir, "--node", "n2")
	f.WaitWhole(wholeLimit)
	reportStall(t, h, "the disk is taken out again", stallLimit)
	n2.DropDisk(dir)
	n2.Stop()
	f.Back(wholeLimit, 1)
	h.end()
	f.Nodes[0].DogJSON(&disks, "node", "md", "info", "--node", "n2")
	if len(disks) != 1 || disks[0].Objects == 0 {
		t.Errorf("after a restart the disks of n2 are %+v", disks)
	}
	// It has nothing any more.
	n2.Dog("node", "md", "plug", dir)
	n2.AddDisk(dir)
	awaitMember(t, f, f.Nodes[0], "n2", func(m rig.Member) bool { return m.Replicas > before*5/4 })
	f.WaitWhole(wholeLimit)
	awaitEven(t, f.Nodes[0], "n2")
	n2.Stop()
	n2.DropDisk(dir)
	f.Back(wholeLimit, 1)
	// It comes back with what it held, which is old now.
	if r := n2.DogRun("node", "md", "plug", dir); r.Code != 1 || !strings.Contains(r.Stderr, "--empty") {
		t.Errorf("a disk that was away is added with what it held: status %d, %s", r.Code, r.Stderr)
	}
	if r := f.Nodes[0].DogRun("node", "md", "plug", "--empty", dir); r.Code != 1 {
		t.Errorf("another node empties the disk: status %d", r.Code)
	}
	n2.Dog("node", "md", "plug", "--empty", dir)
	awaitMember(t, f, f.Nodes[0], "n2", func(m rig.Member) bool { return m.Replicas > before*5/4 })
	f.WaitWhole(wholeLimit)
	awaitEven(t, f.Nodes[0], "n2")
	for _, s := range f.Nodes {
		h.verify(s, false)
	}
	f.Nodes[0].Dog("cluster", "check")
}

// Operators who change their minds all the time, with a client at work: nothing is lost, no request fails, and in the
// end every node holds its share. make soak does it for longer.
func TestFlockBearsItsOperators(t *testing.T) {
	f := rig.NewFlock(t, 4, 3)
	h := newHerder(t, f, "v")
	h.start(f.Nodes[0])
	random := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 1))
	share := 3 * len(f.Partitions(f.Nodes[0])) / 4
	for round := range max(1, crashRounds(0)) {
		node := fmt.Sprint("n", 1+random.IntN(4))
		ask := func() *rig.Sheep { return f.Nodes[random.IntN(4)] }
		ask().Dog("node", "drain", node)
		time.Sleep(time.Duration(random.IntN(2000)) * time.Millisecond)
		ask().Dog("node", "undrain", node)
		ask().Dog("node", "weight", node, "40")
		ask().Dog("cluster", "recover", "disable")
		time.Sleep(time.Duration(random.IntN(1000)) * time.Millisecond)
		ask().Dog("node", "weight", node, "100")
		ask().Dog("cluster", "recover", "enable")
		ask().Dog("node", "drain", node, "--wait")
		if n := holding(f.Partitions(ask()), node); n > 0 {
			t.Errorf("round %d: %s is drained and holds %d partitions", round, node, n)
		}
		ask().Dog("node", "drain", node, "--undo")
		awaitShare(t, f, f.Nodes[0], node, share)
		reportStall(t, h, fmt.Sprintf("round %d with %s", round, node), movingLimit())
	}
	h.end()
	for _, s := range f.Nodes {
		awaitShares(t, f, s, map[string]int{"n1": share, "n2": share, "n3": share, "n4": share}, 5)
		h.verify(s, false)
	}
	f.Nodes[3].Dog("cluster", "check")
}

// spread makes a volume with so many objects, a block in each.
func spread(t *testing.T, s *rig.Sheep, objects int) {
	t.Helper()
	s.Dog("vdi", "create", "spread", fmt.Sprint(objects<<22))
	conn := s.Dial("spread")
	defer conn.Close()
	block := make([]byte, blockSize)
	for i := range objects {
		content(block, uint64(i), 1)
		if err := conn.Write(block, uint64(i)<<22, 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := conn.Flush(); err != nil {
		t.Fatal(err)
	}
}
