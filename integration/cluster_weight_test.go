package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"sheepdog/integration/client"
	"sheepdog/integration/rig"
)

// Nodes hold as much as their weights say, before and after those are changed, and nothing is lost by that.
func TestFlockFollowsWeights(t *testing.T) {
	besideOthers(t)
	f := rig.NewFlock(t, 3, 2)
	h := newHerder(t, f, "v")
	h.start(f.Nodes[0])
	all := 2 * len(f.Partitions(f.Nodes[0]))
	for _, percent := range []int{50, 25, 100} {
		f.Nodes[2].Dog("node", "weight", "n2", fmt.Sprint(percent))
		total := 200 + percent
		shares := map[string]int{"n1": all * 100 / total, "n2": all * percent / total, "n3": all * 100 / total}
		awaitShares(t, f, f.Nodes[1], shares, 8)
	}
	h.end()
	for _, s := range f.Nodes {
		h.verify(s, false)
	}
	f.Nodes[0].Dog("cluster", "check")
}

// A block that has rotted on the node whose client reads it, the partition's primary, is read as it was written, and is what
// it was on the disk soon after, without anybody asking for it.
func TestFlockReadRepairsRot(t *testing.T) {
	besideOthers(t)
	f := rig.NewFlockOf(t, 3, 3, rig.FlockOptions{Config: "storage:\n  checkpoint: 100ms\n"})
	const objects = 24
	f.Nodes[0].Dog("vdi", "create", "v", fmt.Sprint(objects<<22))
	f.Know("v")
	conn := f.Nodes[0].Dial("v")
	for i := range uint64(objects) {
		if err := conn.Write(rig.Random(i, blockSize), i<<22, 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := conn.Flush(); err != nil {
		t.Fatal(err)
	}
	conn.Close()
	f.Nodes[0].Dog("cluster", "check")

	var partitions []struct {
		Policy, Partition int
		InSync            []string `json:"in_sync"`
	}
	f.Nodes[0].DogJSON(&partitions, "cluster", "partitions")
	type rot struct {
		object uint64
		path   string
		was    byte
		node   *rig.Sheep
	}
	var rotten []rot
	for i := range uint64(objects) {
		want := rig.Random(i, blockSize)
		for k, s := range f.Nodes {
			path := findObject(t, s, want, func(group string) bool {
				for _, p := range partitions {
					if group == fmt.Sprintf("%02x-%04x", p.Policy, p.Partition) {
						return p.InSync[0] == fmt.Sprint("n", k+1)
					}
				}
				return false
			})
			if path != "" {
				flipBit(t, path, 100)
				rotten = append(rotten, rot{i, path, want[100], s})
			}
		}
	}
	if len(rotten) < objects/2 {
		t.Fatalf("%d objects are found on their primaries' disks", len(rotten))
	}
	readAll := func(s *rig.Sheep) {
		conn := s.Dial("v")
		defer conn.Close()
		got := make([]byte, blockSize)
		for i := range uint64(objects) {
			if err := conn.Read(got, i<<22); err != nil || string(got) != string(rig.Random(i, blockSize)) {
				t.Errorf("through %s object %d: %v, or other content", s.Host(), i, err)
			}
		}
	}
	for _, r := range rotten {
		conn := r.node.Dial("v")
		readBlock(t, conn, r.object)
		conn.Close()
	}
	for deadline := time.Now().Add(20 * time.Second * patience()); ; time.Sleep(50 * time.Millisecond) {
		left := 0
		for _, r := range rotten {
			if b, err := os.ReadFile(r.path); err != nil || b[100] != r.was {
				left++
			}
		}
		if left == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d of %d blocks that were read are still rotten on the disk", left, len(rotten))
		}
	}
	checkClean(t, f.Nodes[1], "all was read")
	for _, s := range f.Nodes {
		readAll(s)
	}
}

func readBlock(t *testing.T, conn *client.Conn, object uint64) {
	t.Helper()
	got := make([]byte, blockSize)
	if err := conn.Read(got, object<<22); err != nil || string(got) != string(rig.Random(object, blockSize)) {
		t.Errorf("object %d, which is rotten where it is read: %v, or other content", object, err)
	}
}

// findObject finds the file of an object that begins with something, in one of the groups of a node; "" if it is in none.
func findObject(t *testing.T, s *rig.Sheep, begins []byte, in func(group string) bool) string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(s.Disks[0], "objects", "*", "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range files {
		if !in(filepath.Base(filepath.Dir(path))) {
			continue
		}
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if len(b) > len(begins) && string(b[:len(begins)]) == string(begins) {
			return path
		}
	}
	return ""
}
