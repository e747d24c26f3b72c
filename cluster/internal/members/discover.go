package members

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log"
	"math/rand/v2"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/mdns"
	"github.com/hashicorp/serf/serf"
)

const (
	mdnsService = "_sheepdog._tcp"
	// lookupTime is how long answers to a question by multicast are waited for.
	lookupTime = 500 * time.Millisecond
	// maxFound bounds what strangers can make this node try.
	maxFound    = 64
	resolveTime = 2 * time.Second
	secretField = "secret="
)

// fingerprint tells nodes of another secret from those of this one, and no more.
func fingerprint(key []byte) string {
	if key == nil {
		return "none"
	}
	sum := sha256.Sum256(append([]byte("sheepdog multicast\x00"), key...))
	return hex.EncodeToString(sum[:8])
}

// announcer answers questions by multicast.
type announcer struct {
	server *mdns.Server
	iface  *net.Interface
	v6     bool
}

func (a announcer) close() {
	if a.server != nil {
		a.server.Shutdown() // it closes sockets, and always returns nil
	}
}

// announce makes this node known by multicast, if it can.
func (m *Members) announce(ip net.IP, port int) announcer {
	if m.cfg.Discovery != DiscoverMDNS {
		return announcer{}
	}
	iface, err := multicastInterface(ip)
	if err != nil {
		m.cfg.Logger.Info("nodes are not looked for by multicast: use cluster.join", "address", ip.String(), "reason", err)
		return announcer{}
	}
	zone, err := mdns.NewMDNSService(instance(m.cfg.Name), mdnsService, "", instance(m.cfg.Name)+".local.", port, []net.IP{ip},
		[]string{secretField + fingerprint(m.cfg.Key)})
	var server *mdns.Server
	if err == nil {
		server, err = mdns.NewServer(&mdns.Config{Zone: zone, Iface: iface, Logger: log.New(listener{m}, "", 0)})
	}
	if err != nil {
		m.cfg.Logger.Warn("nodes cannot be looked for by multicast: use cluster.join", "address", ip.String(), "error", err)
		return announcer{}
	}
	return announcer{server, iface, ip.To4() == nil}
}

// instance is a node's name as one label of DNS. Two names that become the same are no harm:
// answers are told apart by their addresses.
func instance(name string) string {
	b := []byte(name[:min(len(name), 63)])
	for i, c := range b {
		if c <= ' ' || c == '.' || c == '\\' || c >= 0x7f {
			b[i] = '-'
		}
	}
	return string(b)
}

func multicastInterface(ip net.IP) (*net.Interface, error) {
	if ip.IsLoopback() {
		return nil, errors.New("loopback carries no multicast")
	}
	all, err := net.Interfaces()
	if err != nil {
		return nil, err
	}
	for _, i := range all {
		addrs, err := i.Addrs()
		if err != nil {
			continue
		}
		for _, a := range addrs {
			if n, ok := a.(*net.IPNet); ok && n.IP.Equal(ip) {
				if i.Flags&net.FlagMulticast == 0 {
					return nil, fmt.Errorf("network interface %s carries no multicast", i.Name)
				}
				return &i, nil
			}
		}
	}
	return nil, errors.New("no network interface has the address")
}

// lookup asks by multicast for others, and returns their addresses.
func (m *Members) lookup(ctx context.Context) []string {
	a := m.announcer
	if a.server == nil {
		return nil
	}
	entries := make(chan *mdns.ServiceEntry, maxFound) // mdns drops what does not fit
	err := mdns.QueryContext(ctx, &mdns.QueryParam{
		Service: mdnsService, Timeout: lookupTime, Interface: a.iface, Entries: entries,
		DisableIPv4: a.v6, DisableIPv6: !a.v6, WantUnicastResponse: true, Logger: log.New(listener{m}, "", 0),
	})
	if err != nil {
		m.cfg.Logger.Debug("question by multicast failed", "error", err)
	}
	var found []string
	for {
		select {
		case e := <-entries:
			if address, ok := m.accept(e); ok {
				found = append(found, address)
			}
		default:
			return found
		}
	}
}

// accept looks at an answer from anybody on the network.
func (m *Members) accept(e *mdns.ServiceEntry) (address string, ok bool) {
	if !strings.Contains(e.Name, "."+mdnsService+".") || e.Port <= 0 || e.Port >= 1<<16 {
		return "", false
	}
	ip := e.AddrV4
	if ip == nil && e.AddrV6IPAddr != nil {
		ip = e.AddrV6IPAddr.IP
	}
	if ip == nil {
		return "", false
	}
	address = net.JoinHostPort(ip.String(), strconv.Itoa(e.Port))
	if !slices.Contains(e.InfoFields, secretField+fingerprint(m.cfg.Key)) {
		m.refused.warn(address, "it has another secret, or one of the two has none", hintSecret)
		return "", false
	}
	return address, true
}

// lookAround tries to find others until Close: soon and often while there is nobody,
// seldom later.
func (m *Members) lookAround() {
	pause, alone := m.cfg.pace.first, true
	told := false
	for {
		tried := m.joinOthers()
		if now := m.alone(); now != alone {
			alone, pause, told = now, m.cfg.pace.first, false
			if alone {
				m.setGroup("") // free to go with others
			}
		}
		if alone && tried > 0 && !told {
			told = true
			m.cfg.Logger.Info("no other node has answered, going on to try", "addresses", tried)
		}
		// No two nodes that were started together shall go on together.
		t := time.NewTimer(pause/2 + rand.N(pause))
		select {
		case <-t.C:
		case <-m.ctx.Done():
			t.Stop()
			return
		}
		most := m.cfg.pace.joined
		if alone {
			most = m.cfg.pace.alone
		}
		pause = min(2*pause, most)
	}
}

// joinOthers tries all addresses that are not members' and returns how many it tried.
func (m *Members) joinOthers() (tried int) {
	for _, address := range append(m.addresses(), m.lookup(m.ctx)...) {
		if m.ctx.Err() != nil {
			return tried
		}
		if address == m.Address() || m.hasMember(address) {
			continue
		}
		tried++
		if _, err := m.serf.Join([]string{address}, true); err != nil {
			m.refusedSecret(address, err.Error())
			m.cfg.Logger.Debug("node does not answer", "peer", address, "error", err)
		}
	}
	return tried
}

// addresses are those of Join and Known, as IP:PORT, each once.
func (m *Members) addresses() (all []string) {
	list := slices.Clone(m.cfg.Join)
	if m.cfg.Known != nil {
		list = append(list, m.cfg.Known()...)
	}
	_, ownPort, _ := net.SplitHostPort(m.Address())
	seen := map[string]bool{}
	for _, a := range list {
		host, port, err := net.SplitHostPort(a)
		if err != nil {
			host, port = strings.Trim(a, "[]"), ownPort
		}
		ctx, cancel := context.WithTimeout(m.ctx, resolveTime)
		ips, err := net.DefaultResolver.LookupIPAddr(ctx, host)
		cancel()
		if err != nil {
			m.cfg.Logger.Debug("address of a node is not known", "peer", a, "error", err)
		}
		for _, ip := range ips {
			address := net.JoinHostPort(ip.String(), port)
			if !seen[address] {
				seen[address] = true
				all = append(all, address)
			}
		}
	}
	rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	return all
}

func (m *Members) hasMember(address string) bool {
	return slices.ContainsFunc(m.serf.Members(), func(s serf.Member) bool {
		return s.Status == serf.StatusAlive && hostPort(s.Addr, s.Port) == address
	})
}

// alone reports whether no other member is alive.
func (m *Members) alone() bool {
	return !slices.ContainsFunc(m.serf.Members(), func(s serf.Member) bool {
		return s.Status == serf.StatusAlive && s.Name != m.cfg.Name
	})
}
