package consensus

import (
	"context"
	"errors"
	"net"
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

// Transport carries raft's connections between nodes. Nodes are known by their names:
// where a node is, and whether it is who it says, is the transport's business. So a node
// that changes its address stays the same member of the raft. Its methods may be called
// from any goroutine.
type Transport interface {
	// Accept waits for the next connection from another node and fails after Close.
	Accept() (net.Conn, error)
	// Dial connects to the named node.
	Dial(ctx context.Context, node string) (net.Conn, error)
	// Close ends Accept. Connections are closed by those who have them.
	Close() error
}

// Bounds of the network.
const (
	// idleConns to each node are kept: one for heartbeats, one for entries, one between.
	idleConns = 3
	// rpcTimeout ends a message to a node that hangs. Snapshots get more by their size.
	rpcTimeout = 5 * time.Second
)

// network is raft's transport over a Transport. It remembers when the others answered.
type network struct {
	*raft.NetworkTransport
	streams *streams

	mu       sync.Mutex
	contacts map[raft.ServerID]contact
}

// contact is the latest answer of a server to the leader.
type contact struct {
	term    uint64
	sent    time.Time // when the question left: what the answer says holds at least from then
	lastLog uint64    // index of the server's last entry
}

func newNetwork(node string, t Transport, log *logger) *network {
	s := &streams{transport: t, node: node, conns: map[*conn]bool{}}
	return &network{
		NetworkTransport: raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{
			Stream: s, MaxPool: idleConns, Timeout: rpcTimeout, Logger: log, MsgpackUseNewTimeFormat: true,
		}),
		streams:  s,
		contacts: map[raft.ServerID]contact{},
	}
}

// AppendEntries implements raft.Transport. All heartbeats come this way.
func (n *network) AppendEntries(id raft.ServerID, target raft.ServerAddress, args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) error {
	sent := time.Now()
	if err := n.NetworkTransport.AppendEntries(id, target, args, resp); err != nil {
		return err
	}
	if resp.Term == args.Term { // the server takes this node for the leader of the term
		n.mu.Lock()
		defer n.mu.Unlock()
		if c := n.contacts[id]; c.term < args.Term || c.sent.Before(sent) {
			n.contacts[id] = contact{args.Term, sent, resp.LastLog}
		}
	}
	return nil
}

// contact returns the latest answer of a server in a term.
func (n *network) contact(id raft.ServerID, term uint64) (contact, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	c, ok := n.contacts[id]
	return c, ok && c.term == term
}

// Close implements raft.WithClose.
func (n *network) Close() error {
	err := n.NetworkTransport.Close()
	n.CloseStreams()
	n.streams.closeConns()
	return err
}

// streams makes a Transport a raft.StreamLayer, and ends with all its connections.
type streams struct {
	transport Transport
	node      string

	mu     sync.Mutex
	conns  map[*conn]bool
	closed bool
}

// address is a node's name in the place of a network address.
type address string

func (address) Network() string  { return "sheepdog" }
func (a address) String() string { return string(a) }

func (s *streams) Addr() net.Addr { return address(s.node) }
func (s *streams) Close() error   { return s.transport.Close() }

func (s *streams) Accept() (net.Conn, error) {
	c, err := s.transport.Accept()
	if err != nil {
		return nil, err
	}
	return s.keep(c)
}

func (s *streams) Dial(to raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	c, err := s.transport.Dial(ctx, string(to))
	if err != nil {
		return nil, err
	}
	return s.keep(c)
}

func (s *streams) keep(c net.Conn) (net.Conn, error) {
	k := &conn{Conn: c, of: s}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, errors.Join(net.ErrClosed, c.Close())
	}
	s.conns[k] = true
	return k, nil
}

func (s *streams) closeConns() {
	s.mu.Lock()
	s.closed = true
	var all []*conn
	for c := range s.conns {
		all = append(all, c)
	}
	s.mu.Unlock()
	for _, c := range all {
		c.Close()
	}
}

// conn is forgotten when closed.
type conn struct {
	net.Conn
	of *streams
}

func (c *conn) Close() error {
	c.of.mu.Lock()
	delete(c.of.conns, c)
	c.of.mu.Unlock()
	return c.Conn.Close()
}
