package integration

import (
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"sheepdog/integration/rig"
)

// checkReport is what dog cluster check finds, with -o json.
type checkReport struct {
	Objects  int
	Repaired int
	Problems []struct {
		Node, Kind, Object, Text string
		Repaired                 bool
	}
}

// checkClean has a node check the cluster, of which it must find something, and nothing wrong. What writes left that
// were cut off is not wrong: sweeps remove it.
func checkClean(t *testing.T, s *rig.Sheep, when string) {
	t.Helper()
	var r checkReport
	s.DogJSON(&r, "cluster", "check")
	for _, p := range r.Problems {
		if p.Kind != "leftover" {
			t.Errorf("%s: a check finds %+v", when, p)
		}
	}
	if r.Objects == 0 {
		t.Errorf("%s: a check finds no objects", when)
	}
}

// rotObject flips a bit in an object file of a node, of one that is not among the given ones, and returns its name.
func rotObject(t *testing.T, s *rig.Sheep, not map[string]bool) string {
	t.Helper()
	found := ""
	err := filepath.WalkDir(filepath.Join(s.Disks[0], "objects"), func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || not[d.Name()] || found != "" {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		const data = 4 << 20 // of an object; what follows is its table
		for at := 0; at < min(len(b), data); at++ {
			if b[at] != 0 {
				flipBit(t, path, int64(at))
				found = d.Name()
				return nil
			}
		}
		return nil
	})
	if err != nil || found == "" {
		t.Fatalf("no object of %s to be damaged: %v", s.Host(), err)
	}
	return found
}

// Bits that flip in one replica each, on every node, are found and repaired from the others while the
// cluster runs, whether the node is a partition's primary or not.
func TestFlockRepairsRot(t *testing.T) {
	besideOthers(t)
	f := rig.NewFlockOf(t, 3, 3, rig.FlockOptions{Config: "storage:\n  checkpoint: 100ms\n"})
	h := newHerder(t, f, "v")
	h.start(f.Nodes[0])
	time.Sleep(2 * time.Second)
	h.end()
	f.Nodes[0].Dog("cluster", "check")

	damaged := map[string]bool{}
	for range 3 {
		for _, s := range f.Nodes {
			damaged[rotObject(t, s, damaged)] = true
		}
	}
	// What a check finds is replaced from other nodes even if nobody asks for it, sooner or later.
	began := time.Now()
	f.Nodes[1].DogRun("cluster", "check")
	r := f.Nodes[2].DogRun("-o", "json", "cluster", "check", "--repair")
	if r.Code != 0 {
		t.Errorf("status %d of a repair: %s%s", r.Code, r.Stdout, r.Stderr)
	}
	t.Logf("%d damaged objects are found and repaired in %v", len(damaged), time.Since(began).Round(time.Millisecond))
	logs := f.Nodes[0].Log() + f.Nodes[1].Log() + f.Nodes[2].Log()
	for object := range damaged {
		if !strings.Contains(logs, "object is corrupt") || !strings.Contains(logs, object) {
			t.Errorf("object %s was damaged and not found", object)
		}
	}
	checkClean(t, f.Nodes[0], "after the repair")
	for _, s := range f.Nodes {
		h.verify(s, false)
	}
}
