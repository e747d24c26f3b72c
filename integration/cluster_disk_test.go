package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"sheepdog/integration/rig"
)

// One of a node's two disks fails under load: clients do not notice, what it held is made anew, and the
// node counts for what it still has.
func TestFlockLosesDisk(t *testing.T) {
	if !soaking() {
		t.Skip("takes a loop device: make soak")
	}
	dir, bad := t.TempDir(), rig.Ext4(t, "400M")
	f := rig.NewFlockOf(t, 3, 2, rig.FlockOptions{Disks: func(number int) []string {
		d := filepath.Join(dir, fmt.Sprint(number))
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
		if number == 2 {
			return []string{d, bad}
		}
		return []string{d}
	}})
	weight := func() uint64 {
		var nodes []struct {
			Name   string
			Weight uint64
		}
		f.Nodes[0].DogJSON(&nodes, "node", "list")
		for _, n := range nodes {
			if n.Name == "n2" {
				return n.Weight
			}
		}
		return 0
	}
	both := weight()
	h := newHerder(t, f, "v")
	h.start(f.Nodes[0])
	time.Sleep(time.Second)
	h.stall()
	shutDown(t, bad)
	spread(t, f.Nodes[0], 64)
	for deadline := time.Now().Add(wholeLimit); weight() >= both; time.Sleep(100 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("n2 counts for %d with one of its two disks, and for %d with both", weight(), both)
		}
	}
	took := f.WaitWhole(wholeLimit)
	reportStall(t, h, "a disk fails, whole "+took.Round(time.Millisecond).String()+" later", stallLimit)
	h.end()
	for _, s := range f.Nodes {
		h.verify(s, false)
	}
	if r := f.Nodes[0].DogRun("cluster", "check"); r.Code != 1 || !strings.Contains(r.Stdout, bad) {
		t.Errorf("a disk has failed, and the check says, with status %d: %s", r.Code, r.Stdout)
	}
	f.Nodes[0].Dog("node", "md", "unplug", bad, "--node", "n2")
	f.Nodes[0].Dog("cluster", "check")
}

// shutDown makes a file system fail all that is done with it, as a disk that is gone does.
func shutDown(t *testing.T, dir string) {
	t.Helper()
	const ext4Shutdown, noLogFlush = 0x8004587d, 2
	d, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	how := uint32(noLogFlush)
	if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, d.Fd(), ext4Shutdown, uintptr(unsafe.Pointer(&how))); errno != 0 {
		t.Fatalf("shut down the file system of %s: %v", dir, errno)
	}
}
