package integration

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"sheepdog/integration/client"
	"sheepdog/integration/rig"
)

// gatewayLast gives each node a disk, but the last of n, which is a gateway.
func gatewayLast(t *testing.T, n int) rig.FlockOptions {
	t.Helper()
	dir := t.TempDir()
	return rig.FlockOptions{Disks: func(number int) []string {
		if number == n {
			return nil
		}
		d := filepath.Join(dir, fmt.Sprint(number))
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
		return []string{d}
	}}
}

// A node without disks serves clients as any other does, whoever is killed; others take snapshots of what it owns, and have
// all in them that was answered before, and nothing that was begun after. When it is killed itself, others take over.
func TestFlockGatewayWithoutDisks(t *testing.T) {
	besideOthers(t)
	f := rig.NewFlockOf(t, 4, 3, gatewayLast(t, 4))
	gate := f.Nodes[3]
	for _, p := range f.Partitions(gate) {
		for _, n := range p.InSync {
			if n == "n4" {
				t.Fatalf("a node without disks is in sync: %+v", p)
			}
		}
	}
	h := newHerder(t, f, "v")
	h.start(gate)
	snapshotsOfOthers(t, f, gate)
	h.stall()
	f.Nodes[1].Kill()
	time.Sleep(3 * time.Second)
	took := f.Back(wholeLimit, 1)
	reportStall(t, h, "kill -9 of n2, with clients of a gateway; whole "+took.Round(time.Millisecond).String()+" later", stallLimit)
	h.mayFail.Store(true)
	gate.Kill()
	h.end()
	h.verify(f.Nodes[0], false)
	h.mayFail.Store(false)
	h.start(f.Nodes[0])
	f.Back(wholeLimit, 3)
	h.end()
	for _, s := range f.Nodes {
		h.verify(s, false)
	}
	gate.Dog("cluster", "check")
}

// snapshotsOfOthers has a counter written to two places through one gateway, while other nodes take snapshots of it.
func snapshotsOfOthers(t *testing.T, f *rig.Flock, owner *rig.Sheep) {
	t.Helper()
	f.Nodes[0].Dog("vdi", "create", "counter", "64M")
	f.Know("counter")
	conn := owner.Dial("counter")
	defer conn.Close()
	var begun, answered atomic.Uint64
	stop, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for k := uint64(1); ; k++ {
			select {
			case <-stop:
				return
			default:
			}
			var b [512]byte
			binary.BigEndian.PutUint64(b[:], k)
			begun.Store(k)
			if err := conn.Write(b[:], k%16<<22, 0); err != nil {
				t.Errorf("write %d: %v", k, err)
				return
			}
			answered.Store(k)
		}
	}()
	for round := range 4 {
		time.Sleep(200 * time.Millisecond)
		tag, by := fmt.Sprint("s", round), f.Nodes[round%len(f.Nodes)]
		before := answered.Load()
		by.Dog("vdi", "snapshot", "counter", "-s", tag)
		after := begun.Load()
		f.Know("counter")
		var first []byte
		for _, s := range f.Nodes {
			found, err := newest(s, "counter@"+tag)
			if err != nil {
				t.Fatalf("snapshot %s through %s: %v", tag, s.Host(), err)
			}
			if first == nil {
				first = found
				last := binary.BigEndian.Uint64(found)
				t.Logf("a snapshot by %s: write %d is the last in it; %d was answered before, %d begun when it was there", by.Host(), last, before, after)
				if last < before || last > after {
					t.Errorf("snapshot %s has write %d, but not before %d or after %d", tag, last, before, after)
				}
			} else if !bytes.Equal(first, found) {
				t.Errorf("snapshot %s through %s is another one", tag, s.Host())
			}
		}
	}
	close(stop)
	<-ended
}

// newest reads the counters of a volume, the newest one first.
func newest(s *rig.Sheep, volume string) (all []byte, err error) {
	conn := s.Dial(volume)
	defer conn.Close()
	all = make([]byte, 8)
	var b [512]byte
	for i := range uint64(16) {
		if err := conn.Read(b[:], i<<22); err != nil {
			return nil, err
		}
		if all = append(all, b[:8]...); bytes.Compare(b[:8], all[:8]) > 0 {
			copy(all, b[:8])
		}
	}
	return all, nil
}

// Volumes of 1 to 6 copies side by side on three nodes: each has as many replicas as there can be, and as its
// redundancy says those go on that can when a node dies, and the others wait for it. No data is lost of any.
func TestFlockPolicies(t *testing.T) {
	besideOthers(t)
	f := rig.NewFlock(t, 3, 2)
	const pieces = 16 // of 1 MiB each
	name := func(copies int) string { return fmt.Sprint("copies-", copies) }
	for copies := 1; copies <= 6; copies++ {
		f.Nodes[copies%3].Dog("vdi", "create", name(copies), fmt.Sprint(pieces<<20), "-c", fmt.Sprint(copies))
		f.Know(name(copies))
		conn := f.Nodes[0].Dial(name(copies))
		for i := range pieces {
			if err := conn.Write(piece(i+copies), uint64(i)<<20, 0); err != nil {
				t.Fatalf("write to %s: %v", name(copies), err)
			}
		}
		if err := conn.Flush(); err != nil {
			t.Fatal(err)
		}
		conn.Close()
		var v struct{ Copies int }
		if f.Nodes[0].DogJSON(&v, "vdi", "info", name(copies)); v.Copies != copies {
			t.Errorf("%s has %d copies", name(copies), v.Copies)
		}
	}
	if r := f.Nodes[0].DogRun("vdi", "create", "none", "16M", "-c", "0"); r.Code == 0 {
		t.Error("a volume of no copies is made")
	}
	eventually(t, wholeLimit, "each volume has as many replicas as there can be", func() error {
		var c struct {
			Policies []struct{ Copies, Partitions, Degraded int }
		}
		f.Nodes[0].DogJSON(&c, "cluster", "info")
		if len(c.Policies) != 6 {
			return fmt.Errorf("policies %+v", c.Policies)
		}
		for _, p := range c.Policies {
			if want := max(0, min(1, p.Copies-3)) * p.Partitions; p.Degraded != want {
				return fmt.Errorf("of %d partitions with %d copies on three nodes %d have less replicas than that, want %d", p.Partitions, p.Copies, p.Degraded, want)
			}
		}
		return nil
	})
	f.Nodes[2].Kill()
	awaitMember(t, f, f.Nodes[0], "n3", func(m rig.Member) bool { return m.State == "down" })
	for copies := 2; copies <= 6; copies++ {
		conn := f.Nodes[0].Dial(name(copies))
		buf := make([]byte, 1<<20)
		for i := range pieces {
			if err := conn.Read(buf, uint64(i)<<20); err != nil || !bytes.Equal(buf, piece(i+copies)) {
				t.Fatalf("piece %d of %s with one node less: %v, or other content", i, name(copies), err)
			}
			if err := conn.Write(piece(i+10*copies), uint64(i)<<20, 0); err != nil {
				t.Fatalf("write to %s with one node less: %v", name(copies), err)
			}
		}
		conn.Close()
	}
	lonely := f.Nodes[0].Dial(name(1)) // some of it is on n3 alone: the request waits
	defer lonely.Close()
	buf := make([]byte, pieces<<20)
	waits := make(chan error, 1)
	go func() { waits <- lonely.Read(buf, 0) }()
	f.Nodes[2].Launch()
	if err := <-waits; err != nil {
		t.Fatalf("what only a node has that was away: %v", err)
	}
	for i := range pieces {
		if !bytes.Equal(buf[i<<20:(i+1)<<20], piece(i+1)) {
			t.Errorf("piece %d of %s has other content", i, name(1))
		}
	}
	awaitMember(t, f, f.Nodes[0], "n3", func(m rig.Member) bool { return m.State == "up" && m.Incarnation == 2 })
	for _, s := range f.Nodes {
		for copies := 2; copies <= 6; copies++ {
			conn := s.Dial(name(copies))
			for i := range pieces {
				if err := conn.Read(buf[:1<<20], uint64(i)<<20); err != nil || !bytes.Equal(buf[:1<<20], piece(i+10*copies)) {
					t.Fatalf("piece %d of %s through %s: %v, or other content", i, name(copies), s.Host(), err)
				}
			}
			conn.Close()
		}
	}
	f.Nodes[1].Dog("node", "recovery", "--wait")
	f.Nodes[1].Dog("cluster", "check")
}

// A volume that is locked stays with the gateway that owns it: others read it, and do not take it over until it is unlocked.
func TestFlockLocks(t *testing.T) {
	besideOthers(t)
	f := rig.NewFlock(t, 3, 3)
	f.Nodes[0].Dog("vdi", "create", "v", "16M")
	f.Know("v")
	a, b := f.Nodes[0].Dial("v"), f.Nodes[1].Dial("v")
	defer a.Close()
	write := func(c *client.Conn, k byte) error {
		return c.Write(bytes.Repeat([]byte{k}, blockSize), 0, 0)
	}
	holds := func(k byte) {
		t.Helper()
		buf := make([]byte, blockSize)
		for i, s := range f.Nodes {
			conn := s.Dial("v")
			if err := conn.Read(buf, 0); err != nil || buf[0] != k {
				t.Errorf("through n%d it is %d, want %d: %v", i+1, buf[0], k, err)
			}
			conn.Close()
		}
	}
	if err := write(a, 1); err != nil {
		t.Fatal(err)
	}
	f.Nodes[2].Dog("vdi", "lock", "set", "v", "operator")
	rig.Contains(t, f.Nodes[1].Dog("vdi", "lock", "list"), "operator")
	if err := write(b, 2); err == nil {
		t.Error("another gateway takes over a volume that is locked")
	}
	if err := write(a, 3); err != nil {
		t.Errorf("the owner of a locked volume: %v", err)
	}
	holds(3)
	b.Close() // else it is in use there
	if r := f.Nodes[1].DogRun("vdi", "delete", "v"); r.Code != 1 || !strings.Contains(r.Stderr, "operator") {
		t.Errorf("a locked volume is deleted: status %d, %s", r.Code, r.Stderr)
	}
	if r := f.Nodes[1].DogRun("vdi", "lock", "unlock", "v", "--holder", "somebody"); r.Code != 1 {
		t.Errorf("somebody else unlocks it: status %d", r.Code)
	}
	f.Nodes[1].Dog("vdi", "lock", "unlock", "v", "--holder", "operator")
	b = f.Nodes[1].Dial("v")
	defer b.Close()
	if err := write(b, 4); err != nil {
		t.Errorf("after it was unlocked: %v", err)
	}
	holds(4)
}
