package rig

import (
	"fmt"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// nets counts the networks of this test process.
var nets atomic.Int32

// Net is a network of its own: a namespace for each node, joined by a bridge in another one.
// Nothing of it can be reached from outside, and nothing of it is left when the test ends.
type Net struct {
	t     testing.TB
	name  string
	nodes int
}

// NewNet makes a network without nodes. It takes root, iproute2 and nftables.
func NewNet(t testing.TB) *Net {
	t.Helper()
	n := &Net{t: t, name: fmt.Sprintf("sheep%dx%d", os.Getpid(), nets.Add(1))}
	n.ip("netns", "add", n.name)
	t.Cleanup(func() { n.ip("netns", "del", n.name) })
	n.ip("-n", n.name, "link", "add", "br0", "type", "bridge")
	n.ip("-n", n.name, "link", "set", "br0", "up")
	return n
}

func (n *Net) ip(args ...string) {
	n.t.Helper()
	if r := Run(n.t, 10*time.Second, "", "ip", args...); r.Code != 0 {
		n.t.Fatalf("%s: exit status %d: %s", r.Command, r.Code, r.Stderr)
	}
}

// add makes the namespace of the next node and returns its address.
func (n *Net) add() (namespace, address string) {
	n.t.Helper()
	n.nodes++
	namespace, address = n.namespace(n.nodes), n.address(n.nodes)
	port := fmt.Sprintf("p%d", n.nodes)
	n.ip("netns", "add", namespace)
	n.t.Cleanup(func() { n.ip("netns", "del", namespace) })
	n.ip("-n", n.name, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", namespace)
	n.ip("-n", n.name, "link", "set", port, "master", "br0", "up")
	n.ip("-n", namespace, "addr", "add", address+"/24", "dev", "eth0")
	n.ip("-n", namespace, "link", "set", "lo", "up")
	n.ip("-n", namespace, "link", "set", "eth0", "up")
	return namespace, address
}

func (n *Net) namespace(number int) string { return fmt.Sprintf("%sn%d", n.name, number) }
func (n *Net) address(number int) string   { return fmt.Sprintf("10.77.0.%d", number) }

// inside calls a function whose sockets are made in a network namespace.
func inside(namespace string, f func()) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread() // a thread that ended would take with it what it has started: see Pdeathsig
	outside, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return err
	}
	defer outside.Close()
	ns, err := os.Open("/run/netns/" + namespace)
	if err != nil {
		return err
	}
	defer ns.Close()
	if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
		return err
	}
	f()
	if err := unix.Setns(int(outside.Fd()), unix.CLONE_NEWNET); err != nil {
		panic(err) // what comes next on this thread would be in the wrong network
	}
	return nil
}

// filter gives a node rules for what it receives and sends, in place of those it had.
func (n *Net) filter(number int, in, out []string) {
	n.t.Helper()
	rules := "table inet cut\ndelete table inet cut\n"
	if len(in)+len(out) > 0 {
		rules += fmt.Sprintf("table inet cut {\nchain in { type filter hook input priority 0;\n%s\n}\nchain out { type filter hook output priority 0;\n%s\n}\n}\n",
			strings.Join(in, "\n"), strings.Join(out, "\n"))
	}
	r := Run(n.t, 10*time.Second, rules, "ip", "netns", "exec", n.namespace(number), "nft", "-f", "-")
	if r.Code != 0 {
		n.t.Fatalf("rules of node %d: %s", number, r.Stderr)
	}
}

// Split cuts the network into parts, which hear nothing of each other. Nodes are indices in
// Flock.Nodes; those in no part are a part together.
func (n *Net) Split(parts ...[]int) {
	n.t.Helper()
	part := make([]int, n.nodes)
	for k, nodes := range parts {
		for _, i := range nodes {
			part[i] = k + 1
		}
	}
	for i := range part {
		var in []string
		for k := range part {
			if part[i] != part[k] {
				in = append(in, fmt.Sprintf("ip saddr %s drop", n.address(k+1)))
			}
		}
		n.filter(i+1, in, nil)
	}
}

// CutLink has two nodes hear nothing of each other.
func (n *Net) CutLink(a, b int) {
	n.t.Helper()
	n.filter(a+1, []string{fmt.Sprintf("ip saddr %s drop", n.address(b+1))}, nil)
	n.filter(b+1, []string{fmt.Sprintf("ip saddr %s drop", n.address(a+1))}, nil)
}

// CutPort drops what comes to a node's peer port from others; with both also what leaves that port.
func (n *Net) CutPort(node int, both bool) {
	n.t.Helper()
	var out []string
	if both {
		out = append(out, "ip daddr 10.77.0.0/24 tcp sport 7001 drop")
	}
	n.filter(node+1, []string{"ip saddr 10.77.0.0/24 tcp dport 7001 drop"}, out)
}

// Deafen drops all that comes to a node from the others; it is still heard.
func (n *Net) Deafen(node int) {
	n.t.Helper()
	n.filter(node+1, []string{"ip saddr 10.77.0.0/24 drop"}, nil)
}

// Heal ends all cuts.
func (n *Net) Heal() {
	n.t.Helper()
	for i := range n.nodes {
		n.filter(i+1, nil, nil)
	}
}
