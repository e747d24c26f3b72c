package members

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/mdns"
	"github.com/hashicorp/memberlist"
)

var fast = pace{first: 20 * time.Millisecond, alone: 100 * time.Millisecond, joined: 300 * time.Millisecond}

// loud collects what a node logs at the level of warnings and above.
type loud struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *loud) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *loud) lines(part string) (found []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for line := range strings.Lines(l.b.String()) {
		if strings.Contains(line, part) {
			found = append(found, line)
		}
	}
	return found
}

// node is a member of a test, with its own address of 127.0.0.0/8.
type node struct {
	*Members
	log *loud
	cfg Config
}

func config(i int, join ...string) Config {
	return Config{
		Name: fmt.Sprint("n", i), Address: fmt.Sprint("127.0.0.", i), Discovery: DiscoverJoin, Join: join, pace: fast,
		Info: Info{ID: fmt.Sprint(i), Zone: fmt.Sprint("z", i), Incarnation: uint64(i), Roles: []string{"storage", "gateway"}, Ports: map[string]int{"peer": 7001, "native": 7000}},
	}
}

func start(t *testing.T, c Config) *node {
	t.Helper()
	n := &node{log: new(loud), cfg: c}
	var out io.Writer = n.log
	if testing.Verbose() {
		out = io.MultiWriter(n.log, t.Output())
	}
	c.Logger = slog.New(slog.NewTextHandler(out, &slog.HandlerOptions{Level: slog.LevelWarn})).With("on", c.Name)
	m, err := Start(c)
	if err != nil {
		t.Fatal(err)
	}
	n.Members = m
	n.cfg.GossipPort = m.List()[0].GossipPort // to come back with the same one
	t.Cleanup(func() { m.Close() })
	return n
}

func eventually(t *testing.T, what string, try func() error) {
	t.Helper()
	deadline := time.Now().Add(2 * time.Minute)
	for {
		err := try()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		<-time.After(5 * time.Millisecond)
	}
}

// states is the list of a node, like "n1=alive n2=failed".
func (n *node) states() string {
	var all []string
	for _, m := range n.List() {
		all = append(all, fmt.Sprintf("%s=%s", m.Name, m.State))
	}
	return strings.Join(all, " ")
}

func (n *node) sees(t *testing.T, want string) {
	t.Helper()
	eventually(t, n.cfg.Name, func() error {
		if got := n.states(); got != want {
			return fmt.Errorf("sees %q, want %q", got, want)
		}
		return nil
	})
}

func (n *node) state(name string) State {
	for _, m := range n.List() {
		if m.Name == name {
			return m.State
		}
	}
	return ""
}

func flock(t *testing.T, count int) (all []*node) {
	t.Helper()
	for i := 1; i <= count; i++ {
		var join []string
		if i > 1 {
			join = []string{all[0].Address()}
		}
		all = append(all, start(t, config(i, join...)))
	}
	for _, n := range all {
		n.sees(t, alive(count))
	}
	return all
}

func alive(count int) string {
	var s []string
	for i := 1; i <= count; i++ {
		s = append(s, fmt.Sprintf("n%d=alive", i))
	}
	return strings.Join(s, " ")
}

func TestMembersKnowEachOther(t *testing.T) {
	all := flock(t, 5)
	for _, n := range all {
		for i, m := range n.List() {
			want := config(i + 1).Info
			if !reflect.DeepEqual(m.Info, want) || m.Address != fmt.Sprint("127.0.0.", i+1) || m.GossipPort == 0 {
				t.Errorf("%s knows of %s: %+v", n.cfg.Name, m.Name, m)
			}
		}
	}
	// What a node tells changes.
	i := all[2].Self()
	i.Incarnation, i.Cluster = 42, "c1"
	if err := all[2].Update(i); err != nil {
		t.Fatal(err)
	}
	for _, n := range all {
		eventually(t, "new incarnation", func() error {
			if m := n.List()[2]; m.Incarnation != 42 || m.Cluster != "c1" {
				return fmt.Errorf("%s knows %+v", n.cfg.Name, m)
			}
			return nil
		})
	}
	i.Zone = strings.Repeat("z", 600)
	if err := all[2].Update(i); err == nil || !strings.Contains(err.Error(), "zone") {
		t.Errorf("a zone of 600 bytes: %v", err)
	}
}

// A killed member is suspect, then failed; one that says good-bye has left at once. Both come back.
func TestKillLeaveReturn(t *testing.T) {
	all := flock(t, 4)
	kill := time.Now()
	all[1].Close()
	eventually(t, "suspicion", func() error {
		for _, n := range []*node{all[0], all[2], all[3]} {
			if n.state("n2") == Alive {
				return errors.New(n.states())
			}
		}
		return nil
	})
	suspected := time.Since(kill)
	for _, n := range []*node{all[0], all[2], all[3]} {
		n.sees(t, "n1=alive n2=failed n3=alive n4=alive")
	}
	t.Logf("suspect everywhere after %v, failed after %v", suspected, time.Since(kill))
	if suspected > 10*time.Second { // a second on a machine that has time
		t.Errorf("a killed member was suspect after %v", suspected)
	}

	c := all[1].cfg
	c.Info.Incarnation = 99
	all[1] = start(t, c)
	for _, n := range all {
		n.sees(t, alive(4))
		if m := n.List()[1]; m.Incarnation != 99 {
			t.Errorf("%s knows incarnation %d", n.cfg.Name, m.Incarnation)
		}
	}

	if err := all[3].Leave(t.Context()); err != nil {
		t.Fatal(err)
	}
	all[3].Close()
	for _, n := range all[:3] {
		n.sees(t, "n1=alive n2=alive n3=alive n4=left")
	}
	all[3] = start(t, all[3].cfg)
	for _, n := range all {
		n.sees(t, alive(4))
	}
}

// Two dozen that start at once find all others, and all learn of a death.
func TestManyAtOnce(t *testing.T) {
	const count = 24
	first := start(t, config(1))
	all := []*node{first}
	for i := 2; i <= count; i++ {
		all = append(all, start(t, config(i, first.Address())))
	}
	number := func(n *node, states ...State) (k int) {
		for _, m := range n.List() {
			if slices.Contains(states, m.State) {
				k++
			}
		}
		return k
	}
	for _, n := range all {
		eventually(t, n.cfg.Name, func() error {
			if k := number(n, Alive, Suspect); k != count {
				return fmt.Errorf("%d of %d are there", k, count)
			}
			return nil
		})
	}
	all[7].Close()
	for i, n := range all {
		if i == 7 {
			continue
		}
		eventually(t, n.cfg.Name, func() error {
			if n.state("n8") != Failed || number(n, Alive, Suspect) != count-1 {
				return errors.New(n.states())
			}
			return nil
		})
	}
}

// A failed node may come back elsewhere.
func TestReturnWithAnotherAddress(t *testing.T) {
	all := flock(t, 3)
	all[2].Close()
	c := all[2].cfg
	c.Address, c.GossipPort = "127.0.0.9", 0
	all[2] = start(t, c)
	for _, n := range all {
		eventually(t, "new address", func() error {
			if l := n.List(); len(l) != 3 || l[2].Address != "127.0.0.9" || l[2].State != Alive {
				return fmt.Errorf("%s sees %+v", n.cfg.Name, l)
			}
			return nil
		})
	}
}

// Whoever was started first finds those who were started later, by the addresses it has.
func TestAnyOrder(t *testing.T) {
	port := freePort(t)
	var join []string
	for i := 1; i <= 4; i++ {
		join = append(join, fmt.Sprintf("127.0.0.%d:%d", i, port))
	}
	var all []*node
	for _, i := range []int{3, 1, 4, 2} {
		c := config(i, join...)
		c.GossipPort = port
		all = append(all, start(t, c))
	}
	for _, n := range all {
		n.sees(t, alive(4))
	}
}

func freePort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// Addresses that are known from an earlier life are as good as given ones.
func TestKnownAddresses(t *testing.T) {
	a := start(t, config(1))
	c := config(2)
	c.Known = func() []string { return []string{a.Address()} }
	b := start(t, c)
	b.sees(t, alive(2))
	a.sees(t, alive(2))
}

// refusedOnce waits until a node has refused somebody for a reason, and checks that it
// says so once.
func refusedOnce(t *testing.T, n *node, parts ...string) {
	t.Helper()
	find := func() []string {
		lines := n.log.lines("refuse peer")
		for _, p := range parts {
			lines = slices.DeleteFunc(lines, func(l string) bool { return !strings.Contains(l, p) })
		}
		return lines
	}
	eventually(t, n.cfg.Name+" refuses", func() error {
		if len(find()) == 0 {
			return fmt.Errorf("nothing with %q in %q", parts, n.log.lines(""))
		}
		return nil
	})
	<-time.After(5 * fast.alone) // attempts go on
	if lines := find(); len(lines) != 1 {
		t.Errorf("%s says %d times: %q", n.cfg.Name, len(lines), lines)
	}
}

func TestSecrets(t *testing.T) {
	key := func(b byte) []byte { return bytes.Repeat([]byte{b}, 32) }
	for _, c := range []struct {
		name          string
		here, there   []byte
		says, theySay string
	}{
		{"other", key(1), key(2), "another secret", "another secret"},
		{"none here", nil, key(2), "it has a secret, this node has none", "it has no secret"},
		{"none there", key(1), nil, "it has no secret", "it has a secret, this node has none"},
	} {
		t.Run(c.name, func(t *testing.T) {
			there := config(1)
			there.Key = c.there
			a := start(t, there)
			same := config(3, a.Address())
			same.Key = c.there
			start(t, same)
			here := config(2, a.Address())
			here.Key = c.here
			b := start(t, here)
			refusedOnce(t, b, c.says, a.Address())
			refusedOnce(t, a, c.theySay, "127.0.0.2")
			a.sees(t, "n1=alive n3=alive")
			b.sees(t, "n2=alive")
		})
	}
}

// Clusters do not merge, neither directly nor through a node that is in none.
func TestClusters(t *testing.T) {
	in := func(cluster string, i int, join ...string) Config {
		c := config(i, join...)
		c.Info.Cluster = cluster
		return c
	}
	a := start(t, in("red", 1))
	b := start(t, in("blue", 2))
	c := start(t, in("red", 3, a.Address(), b.Address()))
	refusedOnce(t, c, "blue", "red", "n2")
	refusedOnce(t, b, "blue", "red", "n3")
	d := start(t, in("", 4, a.Address()))
	d.sees(t, "n1=alive n3=alive n4=alive")
	var joined atomic.Bool
	through := in("", 5, d.Address())
	through.Known = func() []string {
		if joined.Load() {
			return []string{b.Address()}
		}
		return nil
	}
	e := start(t, through)
	e.sees(t, "n1=alive n3=alive n4=alive n5=alive")
	joined.Store(true)
	refusedOnce(t, e, "blue", "n2")
	e.sees(t, "n1=alive n3=alive n4=alive n5=alive")
	refusedOnce(t, b, "red", "n1")
	b.sees(t, "n2=alive")

	// A node that is put into another cluster later is a stranger from then on.
	i := d.Self()
	i.Cluster = "green"
	if err := d.Update(i); err != nil {
		t.Fatal(err)
	}
	for _, n := range []*node{a, c} {
		n.sees(t, "n1=alive n3=alive n5=alive")
	}
	refusedOnce(t, a, "green", "n4")
	d.sees(t, "n4=alive n5=alive")
}

func TestNameConflict(t *testing.T) {
	all := flock(t, 2)
	c := config(2, all[0].Address())
	c.Address = "127.0.0.7"
	other := start(t, c)
	refusedOnce(t, other, "the name belongs to", "127.0.0.2")
	refusedOnce(t, all[0], "the name belongs to", "127.0.0.7")
	for _, n := range all {
		n.sees(t, alive(2))
		if l := n.List(); l[1].Address != "127.0.0.2" {
			t.Errorf("%s knows n2 at %s", n.cfg.Name, l[1].Address)
		}
	}
	other.sees(t, "n2=alive")
	// When the first one is gone the name is free.
	all[1].Close()
	other.sees(t, alive(2))
	all[0].sees(t, alive(2))
}

// cable is a transport that can be cut.
type cable struct {
	memberlist.Transport
	cut func(to string) bool
}

func (c cable) WriteTo(b []byte, addr string) (time.Time, error) {
	if c.cut(addr) {
		return time.Now(), nil
	}
	return c.Transport.WriteTo(b, addr)
}

func (c cable) DialTimeout(addr string, timeout time.Duration) (net.Conn, error) {
	if c.cut(addr) {
		return nil, errors.New("the cable is cut")
	}
	return c.Transport.DialTimeout(addr, timeout)
}

// Both sides of a cut take the others for failed, and all come together again.
func TestPartition(t *testing.T) {
	var mu sync.Mutex
	side := map[string]int{}
	isolated := false
	var all []*node
	for i := 1; i <= 4; i++ {
		var join []string
		if i > 1 {
			join = []string{all[0].Address()}
		}
		c := config(i, join...)
		own := c.Address
		side[own] = (i - 1) / 2
		c.transport = func(t memberlist.Transport) memberlist.Transport {
			return cable{t, func(to string) bool {
				host, _, _ := net.SplitHostPort(to)
				mu.Lock()
				defer mu.Unlock()
				return isolated && side[host] != side[own]
			}}
		}
		all = append(all, start(t, c))
	}
	for _, n := range all {
		n.sees(t, alive(4))
	}
	set := func(v bool) {
		mu.Lock()
		defer mu.Unlock()
		isolated = v
	}
	set(true)
	for _, n := range all[:2] {
		n.sees(t, "n1=alive n2=alive n3=failed n4=failed")
	}
	for _, n := range all[2:] {
		n.sees(t, "n1=failed n2=failed n3=alive n4=alive")
	}
	set(false)
	for _, n := range all {
		n.sees(t, alive(4))
	}
}

// A suspicion without ground is heard of everywhere and ends: the suspect answers.
func TestRefute(t *testing.T) {
	all := flock(t, 3)
	eventually(t, "suspicion", func() error {
		all[0].suspects("n3") // until the other one has been looked at in the right moment
		if got := all[1].state("n3"); got != Suspect {
			return fmt.Errorf("it is %s", got)
		}
		return nil
	})
	start := time.Now()
	for _, n := range all {
		n.sees(t, alive(3))
	}
	if took := time.Since(start); took > maxSuspicionMult*suspicionMult*probeInterval/2 {
		t.Errorf("it took %v to end, as if nobody had answered", took)
	}
}

// Nobody reads Changed, or List, and gossip goes on.
func TestChangedNeverBlocks(t *testing.T) {
	all := flock(t, 3)
	for i := range 2 * eventBuffer {
		all[1].signal()
		if i%400 == 0 {
			info := all[1].Self()
			info.Incarnation++
			if err := all[1].Update(info); err != nil {
				t.Fatal(err)
			}
		}
	}
	want := all[1].Self().Incarnation
	eventually(t, "news", func() error {
		if got := all[2].List()[1].Incarnation; got != want {
			return fmt.Errorf("incarnation %d, want %d", got, want)
		}
		return nil
	})
	select {
	case <-all[1].Changed():
	default:
		t.Error("there was no sign of a change")
	}
	select {
	case <-all[1].Changed():
		t.Error("signs of a change pile up")
	default:
	}
}

// Nodes find each other by multicast, on a real network interface; those of another
// secret are not tried.
func TestMulticast(t *testing.T) {
	ip := multicastAddress(t)
	var all []*node
	for i := 1; i <= 4; i++ {
		c := config(i)
		c.Address, c.Discovery, c.Key = ip.String(), DiscoverMDNS, bytes.Repeat([]byte{1}, 32)
		if i == 4 {
			c.Key = bytes.Repeat([]byte{2}, 32)
		}
		all = append(all, start(t, c))
	}
	for _, n := range all[:3] {
		n.sees(t, alive(3))
	}
	refusedOnce(t, all[3], "another secret", all[0].Address())
	all[3].sees(t, "n4=alive")
}

func multicastAddress(t *testing.T) net.IP {
	t.Helper()
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok && n.IP.To4() != nil {
			if _, err := multicastInterface(n.IP); err == nil {
				return n.IP
			}
		}
	}
	t.Skip("no network interface carries multicast")
	return nil
}

// On loopback there is no multicast: the node says so once and goes on with addresses.
func TestMulticastOnLoopback(t *testing.T) {
	a := start(t, config(1))
	c := config(2, a.Address())
	c.Discovery = DiscoverMDNS
	b := start(t, c)
	b.sees(t, alive(2))
}

func TestAnswersOfStrangers(t *testing.T) {
	m := &Members{cfg: config(1), refused: newRefusals(slog.New(slog.DiscardHandler))}
	secret := []string{secretField + fingerprint(nil)}
	ip := net.IPv4(10, 0, 0, 1)
	for _, c := range []struct {
		e    mdns.ServiceEntry
		want string
	}{
		{mdns.ServiceEntry{Name: "n2._sheepdog._tcp.local.", AddrV4: ip, Port: 7002, InfoFields: secret}, "10.0.0.1:7002"},
		{mdns.ServiceEntry{Name: "n2._sheepdog._tcp.local.", AddrV6IPAddr: &net.IPAddr{IP: net.ParseIP("fd00::2")}, Port: 7002, InfoFields: secret}, "[fd00::2]:7002"},
		{mdns.ServiceEntry{Name: "n2._sheepdog._tcp.local.", AddrV4: ip, Port: 7002}, ""},
		{mdns.ServiceEntry{Name: "n2._sheepdog._tcp.local.", AddrV4: ip, Port: 0, InfoFields: secret}, ""},
		{mdns.ServiceEntry{Name: "n2._sheepdog._tcp.local.", AddrV4: ip, Port: 1 << 20, InfoFields: secret}, ""},
		{mdns.ServiceEntry{Name: "n2._sheepdog._tcp.local.", Port: 7002, InfoFields: secret}, ""},
		{mdns.ServiceEntry{Name: "printer._ipp._tcp.local.", AddrV4: ip, Port: 631, InfoFields: secret}, ""},
	} {
		if got, ok := m.accept(&c.e); got != c.want || ok != (got != "") {
			t.Errorf("%+v: %q, %v; want %q", c.e, got, ok, c.want)
		}
	}
	if a, b := fingerprint(bytes.Repeat([]byte{1}, 32)), fingerprint(bytes.Repeat([]byte{2}, 32)); a == b || len(a) != 16 {
		t.Errorf("fingerprints %q and %q", a, b)
	}
	if got := instance("rack 1.node\\\x00\xff"); got != "rack-1-node---" {
		t.Errorf("name %q", got)
	}
}

func TestConfig(t *testing.T) {
	for says, change := range map[string]func(*Config){
		"name":      func(c *Config) { c.Name = "" },
		"address":   func(c *Config) { c.Address = "" },
		"32":        func(c *Config) { c.Key = []byte("short") },
		"discovery": func(c *Config) { c.Discovery = "psychic" },
		"role":      func(c *Config) { c.Info.Roles = []string{"a,b"} },
		"port":      func(c *Config) { c.Info.Ports = map[string]int{"peer": 70000} },
		"zone":      func(c *Config) { c.Info.Zone = strings.Repeat("z", 600) },
	} {
		c := config(1)
		change(&c)
		if m, err := Start(c); err == nil || !strings.Contains(err.Error(), says) {
			if m != nil {
				m.Close()
			}
			t.Errorf("%s: %v", says, err)
		}
	}
	a := start(t, config(1))
	c := a.cfg
	if m, err := Start(c); err == nil || !strings.Contains(err.Error(), "in use") {
		if m != nil {
			m.Close()
		}
		t.Errorf("the same port twice: %v", err)
	}
	if err := a.Close(); err != nil {
		t.Error(err)
	}
	if err := a.Close(); err != nil {
		t.Errorf("close again: %v", err)
	}
}

func TestInfo(t *testing.T) {
	for _, i := range []Info{{}, config(7).Info, {Cluster: "c", Ports: map[string]int{"x": 0}}} {
		if got := infoOf(i.tags()); !reflect.DeepEqual(got, i) {
			t.Errorf("%+v became %+v", i, got)
		}
		if c, err := clusterOf(encodeTags(i.tags())); c != i.Cluster || err != nil {
			t.Errorf("cluster of %+v: %q, %v", i, c, err)
		}
	}
	if i := infoOf(map[string]string{tagIncarnation: "x", tagPorts: "a=b,c,=,d=99999,e=5"}); !reflect.DeepEqual(i, Info{Ports: map[string]int{"e": 5}}) {
		t.Errorf("what cannot be read: %+v", i)
	}
}

func FuzzClusterOf(f *testing.F) {
	f.Add(encodeTags(config(1).Info.tags()))
	f.Add([]byte{serfTags, 0xdf, 0xff, 0xff, 0xff, 0xff})
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) { clusterOf(b) })
}
