package rig

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// WholeLimit bounds how long a cluster may take until all is where it shall be.
const WholeLimit = 3 * time.Minute

// networks counts the loopback networks that this test process has looked for.
var networks atomic.Int32

// guardHost is the host of a loopback network at which its user listens as long as it is in use, so that
// neither another test nor another test process takes it, whether its daemons run or are down.
const guardHost = 254

// freeNetwork finds a number N so that 127.0.N.0/24 is nobody else's until the test ends. Where to begin
// follows from the process id, since several test processes may run at once. Daemons have addresses of
// their own, with the usual ports: a port that the kernel gives to whoever asks could be
// another one's while a daemon is down.
func freeNetwork(t testing.TB) int {
	t.Helper()
	for range 200 {
		n := 20 + (os.Getpid()*7+int(networks.Add(1)))%200
		guard, err := net.Listen("tcp", fmt.Sprintf("127.0.%d.%d:7001", n, guardHost))
		if err != nil {
			continue
		}
		if l, err := net.Listen("tcp", fmt.Sprintf("127.0.%d.1:7001", n)); err == nil { // no daemon of others
			l.Close()
			t.Cleanup(func() { guard.Close() })
			return n
		}
		guard.Close()
	}
	t.Fatal("no loopback network is free")
	return 0
}

// FreeAddress finds an address for a daemon that is nobody else's until the test ends.
func FreeAddress(t testing.TB) string {
	t.Helper()
	return fmt.Sprintf("127.0.%d.1", freeNetwork(t))
}

// Flock is a cluster of several daemons, each on a loopback address of its own with the usual ports.
type Flock struct {
	Nodes []*Sheep

	t       testing.TB
	dir     string
	network int
	opts    FlockOptions
}

// FlockOptions of a cluster under test. The zero value is one disk for each node in a directory of the
// test's own.
type FlockOptions struct {
	Disks  func(number int) []string // existing directories of a node, which are numbered from 1; none: a gateway
	Config string                    // further configuration, YAML lines at top level (not node or cluster)
	Net    *Net                      // the nodes' network; nil: loopback
	// IOTimeout is how long requests wait for what is not reachable; 0: as long as they do anywhere.
	IOTimeout time.Duration
}

// Member is a node as the cluster shows it.
type Member struct {
	Name        string
	State       string
	Incarnation uint64
	Primaries   int
	Replicas    int
	Votes       bool
}

// info is the state of the cluster as a node shows it.
type info struct {
	Leader   bool
	Policies []struct{ Partitions, Degraded, Unavailable, Recovering int }
}

// NewFlock starts n daemons, formats them with so many copies and waits until all replicas are there.
func NewFlock(t testing.TB, n, copies int) *Flock {
	t.Helper()
	return NewFlockOf(t, n, copies, FlockOptions{})
}

// NewFlockOf is NewFlock with options.
func NewFlockOf(t testing.TB, n, copies int, o FlockOptions) *Flock {
	t.Helper()
	f := &Flock{t: t, dir: t.TempDir(), opts: o}
	if err := os.WriteFile(filepath.Join(f.dir, "secret"), []byte(Secret+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if o.Net == nil {
		f.network = freeNetwork(t)
	}
	for i := range n {
		f.Nodes = append(f.Nodes, f.node(f.network, i+1))
	}
	for _, s := range f.Nodes {
		s.Launch()
	}
	for _, s := range f.Nodes {
		if err := s.waitReady(); err != nil {
			t.Fatalf("sheep did not become ready: %v\n%s", err, s.Log())
		}
	}
	f.Nodes[0].Dog("cluster", "format", "-c", strconv.Itoa(copies))
	f.WaitWhole(WholeLimit)
	return f
}

// Add starts one more node and waits until it answers; WaitWhole waits until it holds its share.
func (f *Flock) Add() *Sheep {
	f.t.Helper()
	s := f.node(f.network, len(f.Nodes)+1)
	f.Nodes = append(f.Nodes, s)
	s.Start()
	return s
}

// Stranger prepares a daemon in the flock's network that does not belong to it: it has another number than
// any node, and the given secret. It is not started.
func (f *Flock) Stranger(number int, secret string) *Sheep {
	f.t.Helper()
	s := f.node(f.network, number)
	path := filepath.Join(f.dir, fmt.Sprintf("secret-%d", number))
	if err := os.WriteFile(path, []byte(secret+"\n"), 0o600); err != nil {
		f.t.Fatal(err)
	}
	b, err := os.ReadFile(s.config)
	if err == nil {
		err = os.WriteFile(s.config, []byte(strings.Replace(string(b), filepath.Join(f.dir, "secret"), path, 1)), 0o644)
	}
	if err != nil {
		f.t.Fatal(err)
	}
	return s
}

// Secret is that of a flock.
const Secret = "the secret of the flock under test"

// Drop takes a node out of those that are waited for; it was removed.
func (f *Flock) Drop(s *Sheep) {
	f.Nodes = slices.DeleteFunc(f.Nodes, func(o *Sheep) bool { return o == s })
}

// PlugDisk adds an empty disk to a daemon of a cluster while it runs, and to its configuration.
func (s *Sheep) PlugDisk() string {
	s.t.Helper()
	dir := fmt.Sprintf("%s-%d", s.Disks[0], len(s.Disks)+1)
	if err := os.Mkdir(dir, 0o755); err != nil {
		s.t.Fatal(err)
	}
	s.Dog("node", "md", "plug", dir)
	s.setDisks(append(slices.Clone(s.Disks), dir))
	return dir
}

// AddDisk puts a disk into the configuration of a daemon, for its next start.
func (s *Sheep) AddDisk(dir string) { s.setDisks(append(slices.Clone(s.Disks), dir)) }

// DropDisk takes a disk out of the configuration of a daemon, for its next start.
func (s *Sheep) DropDisk(dir string) {
	s.setDisks(slices.DeleteFunc(slices.Clone(s.Disks), func(d string) bool { return d == dir }))
}

// Join changes where a daemon looks for others, for its next start, and returns where it did before.
func (s *Sheep) Join(list string) (before string) {
	s.t.Helper()
	b, err := os.ReadFile(s.config)
	if err != nil {
		s.t.Fatal(err)
	}
	const key = "  join: ["
	head, rest, _ := strings.Cut(string(b), key)
	before, rest, _ = strings.Cut(rest, "]")
	if err := os.WriteFile(s.config, []byte(head+key+list+"]"+rest), 0o644); err != nil {
		s.t.Fatal(err)
	}
	return before
}

// setDisks changes the disks in the configuration.
func (s *Sheep) setDisks(disks []string) {
	s.t.Helper()
	b, err := os.ReadFile(s.config)
	if err == nil {
		old := "disks: [" + strings.Join(s.Disks, ", ") + "]"
		err = os.WriteFile(s.config, []byte(strings.Replace(string(b), old, "disks: ["+strings.Join(disks, ", ")+"]", 1)), 0o644)
	}
	if err != nil {
		s.t.Fatal(err)
	}
	s.Disks = disks
}

// Partition is who holds a partition, as the cluster shows it.
type Partition struct {
	InSync  []string `json:"in_sync"`
	Targets []string `json:"targets"`
}

// Partitions are those of all policies, as a node knows them.
func (f *Flock) Partitions(s *Sheep) (list []Partition) {
	f.t.Helper()
	s.DogJSON(&list, "cluster", "partitions")
	return list
}

func (f *Flock) node(network, number int) *Sheep {
	f.t.Helper()
	name := "n" + strconv.Itoa(number)
	s := &Sheep{
		t: f.t, NBDPort: nbdPort, AdminPort: adminPort, NativePort: nativePort, ISCSIPort: iscsiPort, address: fmt.Sprintf("127.0.%d.%d", network, number),
		Disks:  []string{filepath.Join(f.dir, name)},
		config: filepath.Join(f.dir, name+".yaml"), logPath: filepath.Join(f.dir, name+".log"),
	}
	if f.opts.Disks != nil {
		s.Disks = f.opts.Disks(number)
	} else if err := os.Mkdir(s.Disks[0], 0o755); err != nil {
		f.t.Fatal(err)
	}
	join, listen := fmt.Sprintf("127.0.%d.1, 127.0.%[1]d.2", network), ""
	if n := f.opts.Net; n != nil {
		s.within, s.address = n.add()
		s.Unix = filepath.Join(f.sockets(), name)
		join = n.address(1) + ", " + n.address(2)
		listen = fmt.Sprintf("listen:\n  admin: %q\n  nbd: %q\n  native: none\n  iscsi: none\nnbd:\n  unix: %s\n", s.Admin(), net.JoinHostPort(Address, strconv.Itoa(nbdPort)), s.Unix)
	}
	state := ""
	if len(s.Disks) == 0 { // else it is on a disk
		state = fmt.Sprintf("  state_dir: %s\n", filepath.Join(f.dir, name))
	}
	if f.opts.IOTimeout > 0 {
		listen = fmt.Sprintf("  io_timeout: %v\n", f.opts.IOTimeout) + listen // of cluster
	}
	text := fmt.Sprintf("node:\n  name: %s\n  address: %s\n  disks: [%s]\n%scluster:\n  join: [%s]\n  secret_file: %s\n%s%s",
		name, s.address, strings.Join(s.Disks, ", "), state, join, filepath.Join(f.dir, "secret"), listen, f.opts.Config)
	if err := os.WriteFile(s.config, []byte(text), 0o644); err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(s.cleanup)
	return s
}

// sockets is a directory for sockets: the path of one is at most 107 bytes long.
func (f *Flock) sockets() string {
	f.t.Helper()
	dir, err := os.MkdirTemp("", "sheep-")
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// Host is the address the daemon listens on.
func (s *Sheep) Host() string { return s.address }

// Freeze stops the daemon's process as if it hung, until Thaw.
func (s *Sheep) Freeze() { s.cmd.Process.Signal(syscall.SIGSTOP) }

// Thaw lets a daemon go on that was frozen.
func (s *Sheep) Thaw() { s.cmd.Process.Signal(syscall.SIGCONT) }

// ask asks a node's API; false if it does not answer in time.
func (f *Flock) ask(s *Sheep, v any, what string) bool {
	text, err := s.fetch("/api/v1/"+what, 2*time.Second)
	return err == nil && json.Unmarshal([]byte(text), v) == nil
}

// Members are the nodes as s knows them, by name. It is waited for: no answer is not the same as no nodes.
func (f *Flock) Members(s *Sheep) map[string]Member {
	f.t.Helper()
	for deadline := time.Now().Add(startLimit); ; time.Sleep(50 * time.Millisecond) {
		if m := f.members(s); m != nil {
			return m
		}
		if time.Now().After(deadline) {
			f.t.Fatalf("%s does not say who is there", s.address)
		}
	}
}

// members is nil if s does not answer.
func (f *Flock) members(s *Sheep) map[string]Member {
	var list []Member
	if !f.ask(s, &list, "nodes") {
		return nil
	}
	m := map[string]Member{}
	for _, x := range list {
		m[x.Name] = x
	}
	return m
}

// Leader is the index of the node that leads the log, waiting for one to do so.
func (f *Flock) Leader() int {
	f.t.Helper()
	for deadline := time.Now().Add(WholeLimit); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		for i, s := range f.Nodes {
			var c info
			if s.Running() && f.ask(s, &c, "cluster") && c.Leader {
				return i
			}
		}
	}
	f.t.Fatal("no node leads")
	return 0
}

// Busiest is the index of the node that is primary of the most partitions.
func (f *Flock) Busiest() int {
	best, most := 0, -1
	members := f.Members(f.Nodes[0])
	for i := range f.Nodes {
		if m := members["n"+strconv.Itoa(i+1)]; m.Primaries > most {
			best, most = i, m.Primaries
		}
	}
	return best
}

// whole says what is missing until every node sees all nodes up and all partitions with all members.
func (f *Flock) whole() string {
	for _, s := range f.Nodes {
		var c info
		if !f.ask(s, &c, "cluster") || len(c.Policies) == 0 {
			return s.address + " does not answer"
		}
		var r struct{ Moving int }
		if !f.ask(s, &r, "recovery") || r.Moving > 0 {
			return fmt.Sprintf("%s: %d partitions are moving", s.address, r.Moving)
		}
		for _, p := range c.Policies {
			if p.Degraded+p.Unavailable+p.Recovering > 0 {
				return fmt.Sprintf("%s: %+v", s.address, p)
			}
		}
		up, votes := 0, 0
		for _, m := range f.members(s) {
			if m.State == "up" {
				up++
			}
			if m.Votes {
				votes++
			}
		}
		if want := (min(len(f.Nodes), 5)-1)/2*2 + 1; votes < want { // the largest odd number of them, up to five
			return fmt.Sprintf("by %s %d nodes vote", s.address, votes)
		}
		if up != len(f.Nodes) {
			return fmt.Sprintf("%s sees %d nodes up", s.address, up)
		}
	}
	return ""
}

// WaitWhole waits until every node sees all nodes up, as many of them vote as shall, and all partitions with all members.
func (f *Flock) WaitWhole(limit time.Duration) time.Duration {
	f.t.Helper()
	began, last := time.Now(), ""
	for time.Since(began) < limit {
		if last = f.whole(); last == "" {
			return time.Since(began)
		}
		time.Sleep(100 * time.Millisecond)
	}
	f.t.Fatalf("not whole after %v: %s", limit, last)
	return 0
}

// Know waits until every node that runs knows a volume: another one may have made it a moment ago.
func (f *Flock) Know(volume string) {
	f.t.Helper()
	for _, s := range f.Nodes {
		for deadline := time.Now().Add(startLimit); s.Running(); time.Sleep(10 * time.Millisecond) {
			if r := s.DogRun("vdi", "info", volume); r.Code == 0 {
				break
			} else if time.Now().After(deadline) {
				f.t.Fatalf("%s does not know volume %s: %s", s.Host(), volume, r.Stderr)
			}
		}
	}
}

// Back starts nodes that were ended, and waits until the cluster has taken note and is whole.
func (f *Flock) Back(limit time.Duration, nodes ...int) time.Duration {
	f.t.Helper()
	began := time.Now()
	before := make([]int, len(nodes))
	for k, i := range nodes {
		before[k] = strings.Count(f.Nodes[i].Log(), runningMessage)
		f.Nodes[i].Launch()
	}
	for k, i := range nodes {
		if err := f.Nodes[i].waitReady(); err != nil {
			f.t.Fatalf("sheep did not come back: %v\n%s", err, f.Nodes[i].Log())
		}
		// It answers some moments before it says so.
		for deadline := time.Now().Add(startLimit); strings.Count(f.Nodes[i].Log(), runningMessage) <= before[k]; time.Sleep(5 * time.Millisecond) {
			if time.Now().After(deadline) {
				f.t.Fatalf("n%d answers without having started anew", i+1)
			}
		}
	}
	f.WaitWhole(limit)
	return time.Since(began)
}

const runningMessage = "sheep is running"
