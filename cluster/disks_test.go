package cluster

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"slices"
	"syscall"
	"testing"

	"sheepdog/storage/disk"
	"sheepdog/storage/disk/disktest"
	"sheepdog/storage/object"
)

// memoryDisk is as large as the disk of the test's directory, so that it gets its share.
func (w *world) memoryDisk(name string) *disktest.Disk {
	w.t.Helper()
	real, err := disk.Open(w.base)
	if err != nil {
		w.t.Fatal(err)
	}
	u, err := real.Usage()
	if err != nil {
		w.t.Fatal(err)
	}
	d := disktest.New(name)
	d.SetCapacity(int64(u.Total))
	return d
}

// withMemory gives each node a second disk, in memory.
func (w *world) withMemory() map[string]*disktest.Disk {
	disks := map[string]*disktest.Disk{}
	for name, m := range w.nodes {
		disks[name] = w.memoryDisk("memory of " + name)
		m.extra = []disk.FS{disks[name]}
	}
	return disks
}

func putAll(t *testing.T, n *Node, count int, b byte) {
	t.Helper()
	for i := range count {
		if err := put(n, object.DataID(1, uint32(i)), 8192, pattern(b+byte(i))); err != nil {
			t.Fatalf("write object %d: %v", i, err)
		}
	}
	if err := do(n, &object.Request{Op: object.OpSync}); err != nil {
		t.Fatal(err)
	}
}

func getAll(t *testing.T, n *Node, count int, b byte) {
	t.Helper()
	for i := range count {
		got, err := get(n, object.DataID(1, uint32(i)), 8192, 4096)
		if err != nil || !bytes.Equal(got, pattern(b+byte(i))) {
			t.Fatalf("object %d does not have %x: %v", i, b+byte(i), err)
		}
	}
}

func (w *world) clean() {
	w.t.Helper()
	for _, m := range w.nodes {
		report, err := m.CheckReplicas(w.t.Context(), false, nil)
		if err != nil || !report.Clean() {
			w.t.Fatalf("replicas are not the same: %+v: %v", report, err)
		}
		return
	}
}

// A disk that fails at work takes its node out of what was on it, clients notice nothing, and the node's
// other disk takes the place of the failed one.
func TestDiskFails(t *testing.T) {
	w := newWorld(t, "n1", "n2", "n3")
	memory := w.withMemory()
	w.form("n1", "n2", "n3")
	putAll(t, w.nodes["n1"].Node, 60, 1)
	memory["n2"].Hook(func(disktest.Op) error { return syscall.EIO })
	putAll(t, w.nodes["n2"].Node, 60, 2)
	getAll(t, w.nodes["n2"].Node, 60, 2)
	groups := func() (failed int) {
		v := w.nodes["n1"].View()
		for i := range v.Policies[0].Partitions {
			if w.nodes["n2"].store.Failed(object.Group{Policy: v.Policies[0].ID, Partition: object.Partition(i)}) {
				failed++
			}
		}
		return failed
	}
	w.eventually("no partition of n2 is on the failed disk", func() bool { return groups() == 0 })
	w.whole(3)
	for _, m := range w.nodes {
		getAll(t, m.Node, 60, 2)
	}
	w.clean()
}

// A node that comes back without one of its disks gets what was there from the others.
func TestDiskMissing(t *testing.T) {
	w := newWorld(t, "n1", "n2", "n3")
	w.withMemory()
	w.form("n1", "n2", "n3")
	putAll(t, w.nodes["n1"].Node, 60, 1)
	w.nodes["n2"].close()
	w.nodes["n2"].extra = []disk.FS{w.memoryDisk("another one")}
	w.start("n2")
	w.whole(3)
	if absent := w.nodes["n1"].Absent(); len(absent) > 0 {
		t.Fatalf("others have everything, and %v is absent", absent)
	}
	w.clean()
	for _, m := range w.nodes {
		getAll(t, m.Node, 60, 1)
	}
}

// What only a missing disk has waits for it, however often the node starts, until it is back or given up.
func TestDiskOfLastMember(t *testing.T) {
	w := newWorld(t, "n1", "n2")
	memory := w.withMemory()
	w.formOf(1, "n1", "n2")
	w.eventually("n2 has its share", func() bool {
		n2 := 0
		for _, p := range w.nodes["n1"].View().Policies[0].Partitions {
			if !slices.Equal(p.ISR, p.Targets) {
				return false
			}
			if w.nodes["n1"].View().Node(p.ISR[0]).Name == "n2" {
				n2++
			}
		}
		return n2 > 4
	})
	putAll(t, w.nodes["n1"].Node, 40, 1)
	readable := func() (count int) {
		v := w.nodes["n1"].View()
		p := v.Policies[0]
		for i := range 40 {
			id := object.DataID(1, uint32(i))
			if p.Partitions[object.PartitionOf(id, len(p.Partitions))].Absent {
				continue
			}
			got, err := get(w.nodes["n1"].Node, id, 8192, 4096)
			if err != nil || !bytes.Equal(got, pattern(1+byte(i))) {
				t.Fatalf("object %d, which is not on the missing disk: %v", i, err)
			}
			count++
		}
		return count
	}
	again := func(extra ...disk.FS) {
		t.Helper()
		w.nodes["n2"].close()
		w.nodes["n2"].extra = extra
		w.start("n2")
		w.eventually("n2 is up", func() bool { return w.nodes["n1"].View().NodeByName("n2").State == "up" })
	}
	for range 2 { // the second time it does not remember the disk
		again()
		if absent := w.nodes["n1"].Absent(); absent["n2"] == 0 || len(absent) != 1 {
			t.Fatalf("n2 lacks a disk, and %v is absent", absent)
		}
	}
	some := readable()
	again(memory["n2"])
	if absent := w.nodes["n1"].Absent(); len(absent) > 0 || readable() != 40 {
		t.Fatalf("the disk is back, and %v is absent", absent)
	}
	again()
	lost, err := w.nodes["n1"].GiveUp(t.Context(), "n2")
	if err != nil || lost == 0 {
		t.Fatalf("%d partitions were given up: %v", lost, err)
	}
	if absent := w.nodes["n1"].Absent(); len(absent) > 0 {
		t.Fatalf("what was absent is given up, and %v is absent", absent)
	}
	left := 0
	for i := range 40 {
		switch _, err := get(w.nodes["n1"].Node, object.DataID(1, uint32(i)), 8192, 4096); {
		case err == nil:
			left++
		case !errors.Is(err, object.ErrNotFound):
			t.Fatalf("read of an object that may be lost: %v", err)
		}
	}
	if left != some {
		t.Errorf("%d objects were on other disks, %d are left", some, left)
	}
	putAll(t, w.nodes["n2"].Node, 40, 9)
	getAll(t, w.nodes["n1"].Node, 40, 9)
}

// Rot that a scrub finds, on whichever replica, is replaced by what another one has: content,
// and tables of checksums after those that were in memory are gone.
func TestRotIsHealed(t *testing.T) {
	t.Run("content", func(t *testing.T) { rotIsHealed(t, 8192, false) })
	t.Run("table", func(t *testing.T) { rotIsHealed(t, 1<<22+4096, true) })
}

func rotIsHealed(t *testing.T, off int64, restart bool) {
	w := newWorld(t, "n1", "n2", "n3")
	memory := w.withMemory()
	w.form("n1", "n2", "n3")
	putAll(t, w.nodes["n1"].Node, 60, 1)
	names := slices.Sorted(maps.Keys(w.nodes))
	groups := map[object.ID]object.Group{}
	for i := range 60 {
		id := object.DataID(1, uint32(i))
		p, err := w.nodes["n1"].Locate(w.nodes["n1"].DefaultPolicy(), id)
		if err != nil {
			t.Fatal(err)
		}
		groups[id] = object.Group{Policy: p.Policy, Partition: p.Partition}
	}
	for _, name := range names {
		if err := w.nodes[name].store.Checkpoint(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	for k, name := range names {
		if restart {
			w.nodes[name].close()
		}
		rotten := 0
		for i := k; i < 60; i += 3 { // one replica of each object
			id := object.DataID(1, uint32(i))
			if memory[name].Flip(fmt.Sprintf("objects/%s/%s", groups[id], id), off+int64(i), 0x10) == nil {
				rotten++
			}
		}
		if rotten == 0 {
			t.Fatalf("nothing to rot on %s", name)
		}
		if restart {
			w.start(name)
			w.whole(3)
		}
		// What has started anew may have been compared, and made equal, already.
		if err := w.nodes[name].store.Scrub(t.Context()); !errors.Is(err, object.ErrCorrupt) && !restart {
			t.Fatalf("%s: %d objects are rotten, and the scrub says %v", name, rotten, err)
		}
	}
	for _, name := range names {
		m := w.nodes[name]
		w.eventually(m.name+" is healed", func() bool { return len(m.store.Rotten()) == 0 && m.store.Scrub(t.Context()) == nil })
		getAll(t, m.Node, 60, 1)
	}
	w.clean()
}
