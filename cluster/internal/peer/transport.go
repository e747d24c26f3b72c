package peer

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Transport is this node's side of all connections with other nodes. Its methods may be
// called from any goroutine.
type Transport struct {
	cfg      Config
	tls      *tls.Config // nil if insecure
	errs     *errorTable
	budgets  [classes]*budget
	requests requestPool
	quiet    quiet
	raft     *Streams

	ctx     context.Context // ends with Close
	cancel  context.CancelFunc
	running sync.WaitGroup

	identity atomic.Pointer[Identity]

	mu        sync.Mutex
	closing   bool
	peers     map[string]*Peer
	listeners map[net.Listener]struct{}
	incoming  map[net.Conn]*session // nil during the handshake and of raft
	newest    map[sender]*session   // of each node and class
	latest    map[sender]uint64     // turn of the latest that there was
	turns     uint64                // connections accepted
	halfOpen  map[string]int        // handshakes by address
	opening   int                   // handshakes
	conns     map[*conn]struct{}    // all that have heartbeats

	refused atomic.Uint64
}

// New makes a Transport. Nothing is accepted before Serve.
func New(cfg Config) (*Transport, error) {
	if err := cfg.validate(); err != nil {
		return nil, fmt.Errorf("peer: %w", err)
	}
	t := &Transport{
		cfg: cfg, quiet: quiet{log: cfg.Logger},
		peers: map[string]*Peer{}, listeners: map[net.Listener]struct{}{}, incoming: map[net.Conn]*session{}, newest: map[sender]*session{}, latest: map[sender]uint64{},
		halfOpen: map[string]int{}, conns: map[*conn]struct{}{},
	}
	var err error
	if t.errs, err = newErrorTable(cfg.Errors); err != nil {
		return nil, fmt.Errorf("peer: %w", err)
	}
	if cfg.Credentials != nil {
		if t.tls, err = cfg.Credentials.tlsConfig(cfg.Identity.Name); err != nil {
			return nil, fmt.Errorf("peer: %w", err)
		}
	}
	for class := range t.budgets {
		t.budgets[class] = newBudget(cfg.Memory)
	}
	t.identity.Store(&cfg.Identity)
	t.ctx, t.cancel = context.WithCancel(context.Background())
	t.raft = newStreams(t)
	t.running.Go(t.watch)
	return t, nil
}

// Raft returns the connections for raft.
func (t *Transport) Raft() *Streams { return t.raft }

// Identity returns who this node says it is.
func (t *Transport) Identity() Identity { return *t.identity.Load() }

// SetIdentity changes who this node says it is, all but its name. Connections that carry
// requests are made again, so that all others learn of it; calls under way fail with
// ErrDisconnected.
func (t *Transport) SetIdentity(id Identity) error {
	if id.Name != t.cfg.Identity.Name {
		return fmt.Errorf("peer: node %s cannot become node %s", t.cfg.Identity.Name, id.Name)
	}
	if err := id.validate(); err != nil {
		return fmt.Errorf("peer: %w", err)
	}
	if *t.identity.Swap(&id) == id {
		return nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, s := range t.incoming {
		if s != nil {
			s.shut()
		}
	}
	for _, p := range t.peers {
		for i := range p.lanes {
			p.lanes[i].drop(errIdentity)
		}
	}
	return nil
}

var errIdentity = errors.New("this node's identity has changed")

// Peer returns the named node; it need not exist.
func (t *Transport) Peer(name string) *Peer {
	t.mu.Lock()
	defer t.mu.Unlock()
	p := t.peers[name]
	if p == nil {
		p = newPeer(t, name)
		if t.closing {
			p.shut()
			return p
		}
		t.peers[name] = p
	}
	return p
}

// Forget fails all calls to a node, closes the connections to it and forgets it.
func (t *Transport) Forget(name string) {
	t.mu.Lock()
	p := t.peers[name]
	delete(t.peers, name)
	t.mu.Unlock()
	if p != nil {
		p.shut()
	}
}

// Serve accepts connections from l until ctx ends or Close is called, and then closes l
// and returns nil. Connections outlive it until Close.
func (t *Transport) Serve(ctx context.Context, l net.Listener) error {
	t.mu.Lock()
	if t.closing {
		t.mu.Unlock()
		l.Close()
		return nil
	}
	t.listeners[l] = struct{}{}
	t.mu.Unlock()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer func() {
		stop()
		l.Close()
		t.mu.Lock()
		delete(t.listeners, l)
		t.mu.Unlock()
	}()
	for {
		nc, err := l.Accept()
		switch {
		case err == nil:
			t.accept(nc)
		case ctx.Err() != nil || t.ctx.Err() != nil:
			return nil
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("peer: accept: %w", err)
		default:
			// Out of file descriptors, most likely: others may be closed soon.
			t.quiet.warn("", "accept failed", "err", err)
			select {
			case <-time.After(100 * time.Millisecond):
			case <-ctx.Done():
			case <-t.ctx.Done():
			}
		}
	}
}

// accept lets a connection in as far as the handshake, or closes it.
func (t *Transport) accept(nc net.Conn) {
	host := hostOf(nc.RemoteAddr())
	t.mu.Lock()
	full := len(t.incoming) >= t.cfg.MaxConnections || t.opening >= t.cfg.MaxHandshakes || t.halfOpen[host] >= t.cfg.MaxHandshakes/2
	if t.closing || full {
		t.mu.Unlock()
		nc.Close()
		if full {
			t.refused.Add(1)
			t.quiet.warn(host, "connection refused: too many connections", "peer", host)
		}
		return
	}
	t.incoming[nc] = nil
	t.turns++
	turn := t.turns
	t.opening++
	t.halfOpen[host]++
	t.running.Add(1)
	t.mu.Unlock()
	go func() {
		defer t.running.Done()
		self := t.Identity()
		s, h, seed, err := t.answer(nc, self)
		t.opened(host)
		if err == nil && h.kind == KindRaft {
			err = t.raft.deliver(nc, s, h.from)
			if err == nil {
				return // it is raft's now, which closes it
			}
		} else if err == nil {
			t.serve(nc, s, &h, seed, self, turn)
		}
		if err != nil {
			t.strange(host, nc, &h, err)
		}
		t.dropped(nc)
	}()
}

// opened counts the end of a handshake.
func (t *Transport) opened(host string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.opening--
	if t.halfOpen[host]--; t.halfOpen[host] == 0 {
		delete(t.halfOpen, host)
	}
}

// dropped closes and forgets a connection from another node.
func (t *Transport) dropped(nc net.Conn) {
	nc.Close()
	t.mu.Lock()
	delete(t.incoming, nc)
	t.mu.Unlock()
}

// strange logs why a connection was not let in.
func (t *Transport) strange(host string, nc net.Conn, h *hello, err error) {
	t.refused.Add(1)
	var no *RefusedError
	switch {
	case t.ctx.Err() != nil:
	case errors.As(err, &no):
		t.quiet.warn(host+" "+h.from.Name, "node refused: "+no.Reason, "peer", nc.RemoteAddr().String(), "node", h.from.Name, "reason", no.Text)
	default:
		t.quiet.warn(host, "connection refused: not a node of this cluster", "peer", nc.RemoteAddr().String(), "reason", err.Error())
	}
}

// answer carries out the accepting side of the handshake, as who this node is.
func (t *Transport) answer(nc net.Conn, self Identity) (s stream, h hello, seed uint64, err error) {
	defer t.until(t.ctx, nc)()
	s, certified, err := t.secure(nc, false)
	if err != nil {
		return s, h, 0, err
	}
	h, seed, err = receive(s, self, certified, t.admit)
	return s, h, seed, err
}

// secure carries out the handshake of TLS, if there is TLS. certified is the name of the
// other side then.
func (t *Transport) secure(nc net.Conn, dialed bool) (s stream, certified string, err error) {
	s = stream{Conn: nc, raw: nc}
	if t.tls == nil {
		return s, "", nil
	}
	l, state, err := handshake(nc, t.tls, dialed, t.cfg.keyRecords)
	if err != nil {
		return s, "", err
	}
	s.tls, s.Conn = l, &tlsConn{Conn: nc, link: l}
	certified, err = certifiedName(state)
	return s, certified, err
}

// until bounds the time of a handshake; to be called at its end is what it returns.
func (t *Transport) until(ctx context.Context, nc net.Conn) func() {
	nc.SetDeadline(time.Now().Add(t.cfg.HandshakeTimeout))
	stop := context.AfterFunc(ctx, func() { nc.SetDeadline(time.Unix(1, 0)) })
	return func() {
		if stop() {
			nc.SetDeadline(time.Time{})
		}
	}
}

// admit applies Config.Admit.
func (t *Transport) admit(h *hello) *RefusedError {
	if t.cfg.Admit == nil {
		if self := t.Identity(); h.from.Cluster != self.Cluster {
			lone := self.Name
			if h.from.Cluster == "" {
				lone = h.from.Name
			}
			return &RefusedError{Text: fmt.Sprintf("node %q belongs to no cluster yet", lone)}
		}
		return nil
	}
	if err := t.cfg.Admit(h.from, h.kind); err != nil {
		return &RefusedError{Text: err.Error()}
	}
	return nil
}

// serve serves a node's requests until it disconnects. The node was told that this one is self; turn says
// when it has come.
func (t *Transport) serve(nc net.Conn, st stream, h *hello, seed uint64, self Identity, turn uint64) {
	class, _ := h.kind.class()
	c := newConn(st, class, h.from, seed, t.budgets[class])
	s := newSession(c, t)
	t.mu.Lock()
	t.incoming[nc] = s
	if t.closing || t.Identity() != self { // SetIdentity may have come before there was a session
		s.shut()
	}
	t.mu.Unlock()
	defer t.succeed(sender{h.from.Name, class}, s, turn)()
	t.keep(c)
	log := t.cfg.Logger.With("node", h.from.Name, "peer", nc.RemoteAddr().String(), "class", class.String())
	log.Debug("node connected", "incarnation", h.from.Incarnation)
	err := s.run()
	t.forget(c)
	if errors.Is(err, errProtocol) {
		t.quiet.warn(hostOf(nc.RemoteAddr())+" "+h.from.Name, "connection closed: "+errProtocol.Error(), "peer", nc.RemoteAddr().String(), "node", h.from.Name, "reason", err.Error())
		return
	}
	t.gaveUp(h.from.Name, c)
	log.Debug("node disconnected", "reason", err)
}

// gaveUp logs that this side has ended a connection because of what the other side did, or did
// not. The other side finds it lost and cannot know why.
func (t *Transport) gaveUp(node string, c *conn) {
	for _, why := range [...]error{errSilent, errStalled, errProtocol} {
		if errors.Is(c.err, why) {
			t.quiet.warn(node, "connection given up: "+why.Error(), "node", node, "class", c.class.String(), "peer", c.raw.RemoteAddr().String(), "reason", c.err.Error())
		}
	}
}

// sender is who sends requests of a class.
type sender struct {
	name  string
	class Class
}

// succeed has a session take the place of the one that its node had for its class: when
// it returns, no request of that one reaches the handler any more. So requests that are
// sent again are not overtaken by what was sent before. A session whose handshake took longer than that
// of one that came after it has failed already, and takes no request. What it returns is to be called when the session has ended.
func (t *Transport) succeed(who sender, s *session, turn uint64) (end func()) {
	t.mu.Lock()
	if turn < t.latest[who] {
		t.mu.Unlock()
		s.c.fail(errSucceeded)
		return func() {}
	}
	old := t.newest[who]
	t.newest[who], t.latest[who] = s, turn
	t.mu.Unlock()
	if old != nil {
		old.c.fail(errSucceeded)
		<-old.deaf
	}
	return func() {
		t.mu.Lock()
		last := t.newest[who] == s
		if last {
			delete(t.newest, who)
		}
		t.mu.Unlock()
		if last {
			t.event(Event{Node: who.name, Class: who.class, Incoming: true, Identity: s.c.remote, Err: s.c.err})
		}
	}
}

// Hears reports whether there is a connection of a class that a node has made to this one.
// When a node's process ends, its connections do.
func (t *Transport) Hears(node string, class Class) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.newest[sender{node, class}] != nil
}

var errSucceeded = errors.New("the node has connected anew")

// dial connects to a node and carries out the handshake.
func (t *Transport) dial(ctx context.Context, node string, kind Kind) (s stream, remote Identity, seed uint64, err error) {
	ctx, cancel := context.WithTimeout(ctx, t.cfg.HandshakeTimeout)
	defer cancel()
	address, err := t.cfg.Resolve(node)
	if err != nil {
		return s, remote, 0, err
	}
	nc, err := t.cfg.Dial(ctx, address)
	if err != nil {
		return s, remote, 0, err
	}
	stop := t.until(ctx, nc)
	s, remote, seed, err = t.introduce(nc, node, kind)
	stop()
	if err == nil {
		return s, remote, seed, nil
	}
	nc.Close()
	if ctx.Err() == nil || errors.As(err, new(*RefusedError)) {
		t.quiet.warn(node+" "+address, "node does not let this one connect", "node", node, "address", address, "reason", err.Error())
	}
	return s, remote, 0, err
}

// introduce carries out the connecting side of the handshake.
func (t *Transport) introduce(nc net.Conn, node string, kind Kind) (s stream, remote Identity, seed uint64, err error) {
	s, certified, err := t.secure(nc, true)
	if err != nil {
		return s, remote, 0, err
	}
	if s.tls != nil && certified != node {
		return s, remote, 0, &RefusedError{Node: node, Reason: otherNode.String(), Text: fmt.Sprintf("node %q answers at its address", certified)}
	}
	remote, seed, err = greet(s, t.Identity(), kind, node)
	if err != nil {
		err = handshakeReason(err) // a server says what it thinks of a certificate only now
	}
	return s, remote, seed, err
}

// event tells of a connection.
func (t *Transport) event(e Event) { t.cfg.Event(e) }

// keep gives a connection heartbeats; false if it is too late.
func (t *Transport) keep(c *conn) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.conns[c] = struct{}{}
	return !t.closing
}

func (t *Transport) forget(c *conn) {
	t.mu.Lock()
	delete(t.conns, c)
	t.mu.Unlock()
}

// Close fails all calls, answers the requests under way as far as that is done within
// Config.Linger, closes all connections and waits until the handlers have given
// everything back.
func (t *Transport) Close() error {
	t.mu.Lock()
	t.closing = true
	for l := range t.listeners {
		l.Close()
	}
	for _, s := range t.incoming {
		if s != nil {
			s.shut()
		}
	}
	peers := t.peers
	t.peers = map[string]*Peer{}
	t.mu.Unlock()
	t.cancel()
	for _, p := range peers {
		p.shut()
	}
	t.raft.Close()
	t.running.Wait()
	return nil
}

// Stats is a look at a Transport.
type Stats struct {
	Incoming   int            // connections from other nodes, handshakes included
	Handshakes int            // of which are not through
	Refused    uint64         // connections refused so far
	Memory     [classes]int64 // held for requests, by class, in bytes
	Peers      []PeerStats    // by name
}

// PeerStats is a look at a Peer.
type PeerStats struct {
	Node      string
	RTT       time.Duration
	Connected [classes]bool
	Calls     [classes]int   // under way or waiting
	Bytes     [classes]int64 // of those: head, data, room for replies
}

// Stats returns what the Transport does now.
func (t *Transport) Stats() Stats {
	s := Stats{Refused: t.refused.Load()}
	for i, b := range t.budgets {
		s.Memory[i] = b.inUse()
	}
	t.mu.Lock()
	s.Incoming, s.Handshakes = len(t.incoming), t.opening
	peers := make([]*Peer, 0, len(t.peers))
	for _, p := range t.peers {
		peers = append(peers, p)
	}
	t.mu.Unlock()
	for _, p := range peers {
		ps := PeerStats{Node: p.name, RTT: p.RTT()}
		for i := range p.lanes {
			l := &p.lanes[i]
			l.mu.Lock()
			ps.Connected[i] = l.conn != nil
			ps.Calls[i] = l.waiting.n + len(l.slots) - len(l.free)
			ps.Bytes[i] = l.waiting.bytes + l.bytes
			l.mu.Unlock()
		}
		s.Peers = append(s.Peers, ps)
	}
	slices.SortFunc(s.Peers, func(a, b PeerStats) int {
		if a.Node < b.Node {
			return -1
		}
		return 1
	})
	return s
}
