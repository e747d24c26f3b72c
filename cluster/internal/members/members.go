package members

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"maps"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/memberlist"
	"github.com/hashicorp/serf/serf"
)

// Discovery is how a node finds others.
type Discovery string

// Ways to find others. Addresses of Config.Join and Config.Known are tried in any case but
// the last.
const (
	DiscoverMDNS Discovery = "mdns" // by multicast
	DiscoverJoin Discovery = "join" // at the addresses only
	DiscoverNone Discovery = "none" // wait for others to come
)

// Config of Members.
type Config struct {
	Name       string // of the node; unique
	Address    string // IP or name of this machine, on which it listens and where others reach it
	GossipPort int    // TCP and UDP; 0: any
	Key        []byte // 32 bytes, from the cluster's secret; nil: gossip is open to everybody
	Discovery  Discovery
	Join       []string // HOST or HOST:PORT of others; a name may stand for many addresses
	// Known returns further such addresses, as of nodes met in an earlier life. It is called
	// before each attempt. May be nil.
	Known  func() []string
	Info   Info // at the start
	Logger *slog.Logger

	pace      pace                                            // for tests
	transport func(memberlist.Transport) memberlist.Transport // for tests
}

// pace is how often a node looks around.
type pace struct{ first, alone, joined time.Duration }

var defaultPace = pace{first: 200 * time.Millisecond, alone: 5 * time.Second, joined: 30 * time.Second}

// Times of gossip. They are for a LAN, and cost little even with hundreds of nodes: each
// probes one other node per interval, so the work of a node does not grow with their number.
const (
	probeInterval  = 400 * time.Millisecond
	probeTimeout   = 250 * time.Millisecond // with room for a machine that is busy
	gossipInterval = 100 * time.Millisecond
	// A member is failed when it was suspect for suspicionMult × probeInterval, and for
	// log10 of the number of nodes as long in larger clusters, if others agree; else after
	// maxSuspicionMult of that time.
	suspicionMult    = 3
	maxSuspicionMult = 4
	pushPullInterval = 10 * time.Second
	streamTimeout    = 2 * time.Second
	broadcastTimeout = time.Second
	// leaveDelay is how long a node answers after it said good-bye, so that nobody takes
	// it for failed.
	leaveDelay        = 300 * time.Millisecond
	reconnectInterval = 2 * time.Second
	forgetFailedAfter = 72 * time.Hour
	forgetLeftAfter   = time.Hour
)

const (
	// eventBuffer is between serf, which must not wait, and the reader, which does not wait
	// for anybody.
	eventBuffer = 1024
	// suspicions that wait to be told; more are told by others, or not at all.
	suspicionBuffer = 64
	maxSuspected    = 4096
	// tellInterval is between two things that a node tells all others. When half of the
	// cluster seems to be silent, it is better not to shout.
	tellInterval = 200 * time.Millisecond
)

// State of a member, as far as this node knows.
type State string

// States of members.
const (
	Alive   State = "alive"
	Suspect State = "suspect"
	Failed  State = "failed"
	Left    State = "left"
)

// Member is a node that is or was there.
type Member struct {
	Name       string
	Address    string // IP
	GossipPort int
	Info
	State State
}

// Members is a node's part in the gossip. Its methods may be called from any goroutine.
type Members struct {
	cfg     Config
	serf    *serf.Serf
	created chan struct{} // closed when serf and address are set
	refused *refusals
	address atomic.Pointer[string] // own, HOST:PORT

	mu        sync.Mutex
	info      Info
	group     string               // cluster of those it gossips with, while it has none itself
	suspected map[string]time.Time // until when
	refuted   map[string]serf.LamportTime

	changed   chan struct{}
	events    chan serf.Event
	suspicion chan string
	ctx       context.Context // ends with Close
	cancel    context.CancelFunc
	wait      sync.WaitGroup
	announcer announcer
	closeOnce sync.Once
	closed    error
}

func (c *Config) validate() error {
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.pace == (pace{}) {
		c.pace = defaultPace
	}
	switch {
	case c.Name == "":
		return errors.New("the node has no name")
	case c.Address == "":
		return errors.New("the node has no address")
	case c.Key != nil && len(c.Key) != 32:
		return fmt.Errorf("the key has %d bytes, not 32", len(c.Key))
	case c.Discovery != DiscoverMDNS && c.Discovery != DiscoverJoin && c.Discovery != DiscoverNone:
		return fmt.Errorf("discovery is %q, must be mdns, join or none", c.Discovery)
	}
	return c.Info.validate()
}

// Start listens, and looks for others in the background. The caller goes on to Leave, if
// the node stops for good reason, and to Close.
func Start(cfg Config) (_ *Members, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("start gossip of node %q on %s: %w", cfg.Name, net.JoinHostPort(cfg.Address, fmt.Sprint(cfg.GossipPort)), err)
		}
	}()
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	ip, err := net.ResolveIPAddr("ip", cfg.Address)
	if err != nil {
		return nil, err
	}
	m := &Members{
		cfg: cfg, refused: newRefusals(cfg.Logger), info: cfg.Info.clone(), suspected: map[string]time.Time{}, refuted: map[string]serf.LamportTime{},
		created: make(chan struct{}), changed: make(chan struct{}, 1), events: make(chan serf.Event, eventBuffer), suspicion: make(chan string, suspicionBuffer),
	}
	m.ctx, m.cancel = context.WithCancel(context.Background())
	c, err := m.serfConfig(ip.IP)
	if err != nil {
		return nil, err
	}
	if m.serf, err = serf.Create(c); err != nil {
		m.cancel()
		return nil, errors.Join(err, c.MemberlistConfig.Transport.Shutdown())
	}
	own := m.serf.LocalMember()
	address := hostPort(own.Addr, own.Port)
	m.address.Store(&address)
	close(m.created)
	m.wait.Go(m.follow)
	m.wait.Go(m.tell)
	if cfg.Discovery != DiscoverNone {
		m.announcer = m.announce(ip.IP, int(own.Port))
		m.wait.Go(m.lookAround)
	}
	return m, nil
}

func (m *Members) serfConfig(ip net.IP) (*serf.Config, error) {
	logger := log.New(listener{m}, "", 0)
	c := serf.DefaultConfig()
	c.NodeName, c.Tags, c.EventCh, c.Logger, c.LogOutput = m.cfg.Name, m.info.tags(), m.events, logger, nil
	c.BroadcastTimeout, c.LeavePropagateDelay = broadcastTimeout, leaveDelay
	c.ReconnectInterval, c.ReconnectTimeout, c.TombstoneTimeout = reconnectInterval, forgetFailedAfter, forgetLeftAfter
	// The doorman keeps out who takes the name of another node; serf would end one of them.
	c.EnableNameConflictResolution = false
	c.DisableCoordinates = true
	c.MsgpackUseNewTimeFormat = true

	l := memberlist.DefaultLANConfig()
	c.MemberlistConfig = l
	l.BindAddr, l.BindPort, l.AdvertiseAddr, l.AdvertisePort = ip.String(), m.cfg.GossipPort, ip.String(), m.cfg.GossipPort
	l.SecretKey = m.cfg.Key
	l.Logger, l.LogOutput = logger, nil
	l.Merge, l.Alive = doorman{m}, doorman{m}
	l.ProbeInterval, l.ProbeTimeout, l.GossipInterval = probeInterval, probeTimeout, gossipInterval
	l.SuspicionMult, l.SuspicionMaxTimeoutMult = suspicionMult, maxSuspicionMult
	l.PushPullInterval, l.TCPTimeout = pushPullInterval, streamTimeout
	l.EnableCompression = false // messages are small, and it takes an eighth of the time
	l.MsgpackUseNewTimeFormat = true
	// A node may come back with another address as soon as it has failed with the old one.
	l.DeadNodeReclaimTime = time.Millisecond
	t, err := listen(ip, m.cfg.GossipPort, memberlist.NetTransportConfig{Logger: logger})
	if err != nil {
		return nil, err
	}
	if m.cfg.GossipPort == 0 {
		l.BindPort, l.AdvertisePort = t.GetAutoBindPort(), t.GetAutoBindPort()
	}
	l.Transport = t
	if m.cfg.transport != nil {
		l.Transport = m.cfg.transport(t)
	}
	return c, nil
}

// Address is where this node gossips, HOST:PORT, for the Join of others.
func (m *Members) Address() string { return *m.address.Load() }

// Self returns what this node tells about itself.
func (m *Members) Self() Info {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.info.clone()
}

// cluster returns the cluster that this node belongs to, or else that of the nodes with
// which it gossips, or "".
func (m *Members) cluster() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return cmp.Or(m.info.Cluster, m.group)
}

// setGroup notes the cluster of the nodes with which this one gossips.
func (m *Members) setGroup(cluster string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.group = cluster
}

// List returns all members of the cluster that are known, by name, this node among them. Nodes
// of other clusters are never there, nodes without a cluster are.
func (m *Members) List() []Member {
	cluster := m.cluster()
	var list []Member
	now := time.Now()
	for _, s := range m.serf.Members() {
		member := Member{Name: s.Name, Address: s.Addr.String(), GossipPort: int(s.Port), Info: infoOf(s.Tags), State: m.stateOf(s, now)}
		foreign := cluster != "" && member.Cluster != "" && member.Cluster != cluster
		if foreign || m.refused.strange(s.Name) {
			continue
		}
		list = append(list, member)
	}
	slices.SortFunc(list, func(a, b Member) int { return cmp.Compare(a.Name, b.Name) })
	return list
}

func (m *Members) stateOf(s serf.Member, now time.Time) State {
	switch s.Status {
	case serf.StatusAlive:
		m.mu.Lock()
		defer m.mu.Unlock()
		if now.Before(m.suspected[s.Name]) {
			return Suspect
		}
		return Alive
	case serf.StatusLeaving, serf.StatusLeft:
		return Left
	}
	return Failed
}

// Changed receives a value after List has changed; values that nobody took become one.
func (m *Members) Changed() <-chan struct{} { return m.changed }

func (m *Members) signal() {
	select {
	case m.changed <- struct{}{}:
	default:
	}
}

// Update changes what this node tells about itself.
func (m *Members) Update(i Info) error {
	if err := i.validate(); err != nil {
		return fmt.Errorf("tell others about node %q: %w", m.cfg.Name, err)
	}
	i = i.clone()
	m.mu.Lock()
	m.info = i
	m.mu.Unlock()
	defer m.signal()
	// It goes to the others with the next messages. serf fails if they take long, which
	// says nothing: who is not reached now gets it with everything else.
	if err := m.serf.SetTags(i.tags()); err != nil {
		m.cfg.Logger.Debug("others may not know yet what the node tells", "error", err)
	}
	return nil
}

// Leave says good-bye, so that this node is known to have left and not to have failed. It
// returns early with the error of ctx.
func (m *Members) Leave(ctx context.Context) error {
	done := make(chan error, 1)
	go func() { done <- m.serf.Leave() }() // it has time limits of its own
	select {
	case err := <-done:
		if err != nil {
			return fmt.Errorf("leave the gossip: %w", err)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("leave the gossip: %w", ctx.Err())
	}
}

// Close stops all that Start began. Without a Leave before, the others will find out.
func (m *Members) Close() error {
	m.closeOnce.Do(func() {
		m.cancel()
		m.announcer.close()
		m.closed = m.serf.Shutdown()
		m.wait.Wait()
	})
	return m.closed
}

// Names of the events by which members tell each other of suspicions.
const (
	eventSuspect = "suspect"
	eventRefute  = "refute"
)

// follow reads what serf has to say.
func (m *Members) follow() {
	for {
		select {
		case e := <-m.events:
			m.heed(e)
		case <-m.ctx.Done():
			m.drain()
			return
		}
	}
}

// drain keeps serf from waiting while it shuts down.
func (m *Members) drain() {
	for {
		select {
		case <-m.events:
		case <-m.serf.ShutdownCh():
			return
		}
	}
}

func (m *Members) heed(e serf.Event) {
	switch e := e.(type) {
	case serf.MemberEvent:
		m.mu.Lock()
		for _, s := range e.Members {
			delete(m.suspected, s.Name)
		}
		m.mu.Unlock()
		m.signal()
	case serf.UserEvent:
		name := string(e.Payload)
		switch {
		case e.Name == eventSuspect && name == m.cfg.Name:
			m.later(eventRefute)
		case e.Name == eventSuspect && !m.answered(name, e.LTime):
			m.suspect(name)
		case e.Name == eventRefute:
			m.refute(name, e.LTime)
		}
	}
}

// answered reports whether a suspicion is older than the suspect's answer: events may come
// in any order.
func (m *Members) answered(name string, at serf.LamportTime) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return at < m.refuted[name]
}

// refute ends a suspicion.
func (m *Members) refute(name string, at serf.LamportTime) {
	m.mu.Lock()
	if _, known := m.refuted[name]; !known && len(m.refuted) >= maxSuspected {
		clear(m.refuted)
	}
	m.refuted[name] = max(m.refuted[name], at)
	delete(m.suspected, name)
	m.mu.Unlock()
	m.signal()
}

// suspect notes that a member may have failed, and reports whether that is news. If it
// has not, the note loses its force when memberlist must have come to a conclusion. It
// asks serf nothing: serf may be waiting for the one who handles its events.
func (m *Members) suspect(name string) (news bool) {
	const most = maxSuspicionMult * suspicionMult * probeInterval
	now := time.Now()
	m.mu.Lock()
	maps.DeleteFunc(m.suspected, func(_ string, until time.Time) bool { return !now.Before(until) })
	_, known := m.suspected[name]
	if news = !known && len(m.suspected) < maxSuspected; news || known {
		m.suspected[name] = now.Add(most)
	}
	m.mu.Unlock()
	if news {
		m.signal()
		time.AfterFunc(most, m.signal) // its state changes then, if nothing else does
	}
	return news
}

// suspects is told by memberlist that this node found a member silent.
func (m *Members) suspects(name string) { m.later(eventSuspect + name) }

// later has something told, if there is room: memberlist cannot wait, and whoever handles
// events must not make new ones.
func (m *Members) later(what string) {
	select {
	case m.suspicion <- what:
	default:
	}
}

// tell passes suspicions on, and refutes those about this node. A node that is slow itself,
// as memberlist scores it, takes others for silent: it keeps that to itself.
func (m *Members) tell() {
	pause := time.NewTicker(tellInterval)
	defer pause.Stop()
	for {
		var err error
		select {
		case what := <-m.suspicion:
			if what == eventRefute {
				err = m.serf.UserEvent(eventRefute, []byte(m.cfg.Name), false)
			} else if name := what[len(eventSuspect):]; m.suspect(name) && m.serf.Memberlist().GetHealthScore() == 0 {
				err = m.serf.UserEvent(eventSuspect, []byte(name), false)
			}
		case <-m.ctx.Done():
			return
		}
		if err != nil {
			m.cfg.Logger.Debug("suspicion was not told", "error", err)
		}
		select {
		case <-pause.C:
		case <-m.ctx.Done():
			return
		}
	}
}
