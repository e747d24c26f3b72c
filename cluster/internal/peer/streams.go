package peer

import (
	"context"
	"errors"
	"net"
	"sync"
	"time"
)

// Streams are connections of kind raft: plain streams of bytes between named nodes. It
// has what the consensus needs of its transport. Its methods may be called from any
// goroutine.
type Streams struct {
	t        *Transport
	incoming chan net.Conn
	closed   chan struct{}
	once     sync.Once
}

// maxUnaccepted bounds the connections that wait for Accept.
const maxUnaccepted = 64

func newStreams(t *Transport) *Streams {
	return &Streams{t: t, incoming: make(chan net.Conn, maxUnaccepted), closed: make(chan struct{})}
}

var errUnaccepted = errors.New("nobody accepts the connection")

// Accept waits for the next connection from another node. It fails with net.ErrClosed
// after Close.
func (s *Streams) Accept() (net.Conn, error) {
	select {
	case <-s.closed:
		return nil, net.ErrClosed
	default:
	}
	select {
	case c := <-s.incoming:
		return c, nil
	case <-s.closed:
		return nil, net.ErrClosed
	}
}

// Dial connects to the named node. The caller closes the connection.
func (s *Streams) Dial(ctx context.Context, node string) (net.Conn, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(s.t.ctx, cancel)()
	st, remote, _, err := s.t.dial(ctx, node, KindRaft)
	if err != nil {
		return nil, err
	}
	return &streamConn{stream: st, remote: remote, done: func() {}}, nil
}

// Addr returns this node's name in the place of a network address.
func (s *Streams) Addr() net.Addr { return NodeAddr(s.t.cfg.Identity.Name) }

// Close ends Accept; connections stay with those who have them.
func (s *Streams) Close() error {
	s.once.Do(func() { close(s.closed) })
	for {
		select {
		case c := <-s.incoming:
			c.Close()
		default:
			return nil
		}
	}
}

// deliver hands a connection to Accept. The connection counts until it is closed.
func (s *Streams) deliver(nc net.Conn, st stream, from Identity) error {
	c := &streamConn{stream: st, remote: from, done: func() { s.t.dropped(nc) }}
	select {
	case <-s.closed:
		return net.ErrClosed
	default:
	}
	select {
	case s.incoming <- c:
	default:
		return errUnaccepted
	}
	select {
	case <-s.closed: // perhaps after Close has looked
		s.Close()
	default:
	}
	return nil
}

// NodeAddr is a node's name as a network address.
type NodeAddr string

// Network implements net.Addr.
func (NodeAddr) Network() string { return "sheepdog" }

// String implements net.Addr.
func (a NodeAddr) String() string { return string(a) }

// streamConn is a connection of kind raft.
type streamConn struct {
	stream
	remote Identity
	once   sync.Once
	done   func()
}

// RemoteAddr returns the other node's name.
func (c *streamConn) RemoteAddr() net.Addr { return NodeAddr(c.remote.Name) }

// Remote returns who the other node said it is.
func (c *streamConn) Remote() Identity { return c.remote }

// SetDeadline and the like need nothing of TLS.
func (c *streamConn) SetDeadline(t time.Time) error { return c.raw.SetDeadline(t) }

// Close closes the connection. What TLS would still say is of no use to raft, and could wait.
func (c *streamConn) Close() error {
	err := c.raw.Close()
	c.once.Do(c.done)
	return err
}
