package peer

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"time"

	"sheepdog/cluster/internal/peer/internal/record"
)

// Config is what a Transport needs. Zero values stand for the defaults.
type Config struct {
	// Identity is who this node is. Its name stays; see SetIdentity for the rest. Needed.
	Identity Identity
	// Credentials of the cluster. Needed, unless Insecure is set: then everything is sent
	// as it is and everybody is believed, for networks that are trusted.
	Credentials *Credentials
	Insecure    bool
	// Resolve returns where a node is, HOST:PORT. Needed to call other nodes.
	Resolve func(node string) (address string, err error)
	// Dial connects to an address. Default: net.Dialer, from any address; see DialFrom.
	Dial func(ctx context.Context, address string) (net.Conn, error)
	// Admit decides about a node of the same cluster, or one of which either side belongs
	// to no cluster yet, that connects for something; an error is the reason why it is not
	// welcome, which it is told. Default: nodes of the same cluster are welcome.
	Admit func(from Identity, kind Kind) error
	// Handler of requests. Default: there are no operations.
	Handler Handler
	// Event is told of connections made and lost, and of failed attempts. It must not
	// wait. Default: nobody is.
	Event func(Event)
	// Errors are kinds of failure, beside those of package object, that travel as codes
	// from FirstErrorCode on. All nodes must give them the same codes, for ever.
	Errors map[uint16]error
	// Logger; default: none.
	Logger *slog.Logger

	// WindowCalls and WindowBytes bound the calls under way over one connection: head,
	// data and expected reply. A single call may be larger. Default 512 and 64 MiB.
	WindowCalls int
	WindowBytes int64
	// QueueCalls and QueueBytes bound the calls that wait for a connection or for room
	// among those under way. Default 8192 and 256 MiB.
	QueueCalls int
	QueueBytes int64
	// SessionRequests bounds the requests of one connection that are carried out at a
	// time. Default 1024.
	SessionRequests int
	// Memory bounds what is held of requests of all nodes in one class, replies included,
	// in bytes; an eighth of it what is held of one connection. Default 256 MiB.
	Memory int64
	// MaxConnections bounds connections from other nodes, MaxHandshakes those that have
	// not said a valid hello yet; half of them may come from one address. Default 8192 and 256.
	MaxConnections int
	MaxHandshakes  int

	// HandshakeTimeout is for connecting, TLS and hello. Default 5 s.
	HandshakeTimeout time.Duration
	// Heartbeat is how often each side says something. Default 400 ms.
	Heartbeat time.Duration
	// Silence is how long nothing may come before a connection is given up. Default 1.5 s.
	Silence time.Duration
	// Stall is how long a message may take to come in full, and replies to be taken. Default 30 s.
	Stall time.Duration
	// Linger is how long Close still sends replies to requests under way. Default 1 s.
	Linger time.Duration
	// BulkIdle is after how long connections of class Bulk are closed that nobody uses.
	// Default 1 min.
	BulkIdle time.Duration

	keyRecords uint64 // that a key of TLS protects; tests have fewer than what is safe
}

// Event is something that happened to a connection.
type Event struct {
	Node     string
	Class    Class
	Incoming bool     // it was the other node's, and has ended: see Hears
	Up       bool     // a connection was made
	Identity Identity // if Up or Incoming: who is at the other side
	// Err is, unless Up, why there is none. If errors.Is(Err, syscall.ECONNREFUSED) the
	// node's machine is there and the node's process is not.
	Err error
}

func orDefault[T comparable](v *T, d T) {
	var zero T
	if *v == zero {
		*v = d
	}
}

// noHandler knows no operation.
type noHandler struct{}

func (noHandler) Handle(r *Request) { r.Reply(ErrUnsupported) }
func (noHandler) Kick()             {}

func (c *Config) setDefaults() {
	orDefault(&c.Logger, slog.New(slog.DiscardHandler))
	orDefault(&c.WindowCalls, 512)
	orDefault(&c.WindowBytes, 64<<20)
	orDefault(&c.QueueCalls, 8192)
	orDefault(&c.QueueBytes, 256<<20)
	orDefault(&c.SessionRequests, 1024)
	orDefault(&c.Memory, 256<<20)
	orDefault(&c.MaxConnections, 8192)
	orDefault(&c.MaxHandshakes, 256)
	orDefault(&c.HandshakeTimeout, 5*time.Second)
	orDefault(&c.Heartbeat, 400*time.Millisecond)
	orDefault(&c.Silence, 1500*time.Millisecond)
	orDefault(&c.Stall, 30*time.Second)
	orDefault(&c.Linger, time.Second)
	orDefault(&c.BulkIdle, time.Minute)
	orDefault(&c.keyRecords, record.MaxRecords)
	if c.Handler == nil {
		c.Handler = noHandler{}
	}
	if c.Event == nil {
		c.Event = func(Event) {}
	}
	if c.Resolve == nil {
		c.Resolve = func(string) (string, error) { return "", errors.New("address is not known") }
	}
	if c.Dial == nil {
		c.Dial = DialFrom(nil)
	}
}

// minMemory is what the largest request takes, eight times: see Config.Memory.
const minMemory = 8 * 3 * MaxData

func (c *Config) validate() error {
	c.setDefaults()
	if err := c.Identity.validate(); err != nil {
		return err
	}
	switch {
	case c.Credentials == nil && !c.Insecure:
		return errors.New("there is no cluster secret: give one, or allow an insecure transport")
	case c.Credentials != nil && c.Insecure:
		return errors.New("an insecure transport has no use for a cluster secret: give one or the other")
	case c.WindowCalls < 1 || c.WindowCalls > 1<<slotBits:
		return fmt.Errorf("%d calls at a time: must be 1 to %d", c.WindowCalls, 1<<slotBits)
	case c.QueueCalls < 1 || c.SessionRequests < 1 || c.MaxConnections < 1 || c.MaxHandshakes < 2:
		return errors.New("a bound of the transport is too small")
	case c.Memory < minMemory:
		return fmt.Errorf("memory of %d bytes for a class: must be at least %d", c.Memory, minMemory)
	case c.Silence < 2*c.Heartbeat:
		return fmt.Errorf("a silence of %v must be longer than two heartbeats of %v", c.Silence, c.Heartbeat)
	}
	return nil
}
