package cluster

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"sheepdog/cluster/internal/consensus"
	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// Node is this node's part in the cluster. Its methods may be called from any goroutine.
type Node struct {
	cfg  Config
	log  *slog.Logger
	lock *os.File

	state     *state.Machine
	consensus atomic.Pointer[consensus.Log] // nil until the cluster is formatted
	opened    chan struct{}                 // closed when consensus is set

	self      atomic.Uint32 // NodeID; 0 until announced
	inc       atomic.Uint64 // incarnation
	routes    atomic.Pointer[routing]
	fence     fence
	follower  follower
	delay     *delayLine
	flock     *flock // nil: the node is alone
	answering atomic.Pointer[Answering]
	using     atomic.Pointer[func(object.VID) bool]
	knowing   atomic.Pointer[func(context.Context)]
	removed   removed
	closed    atomic.Bool
	closeOnce sync.Once

	mu sync.Mutex // one change of membership or placement by this node at a time
}

// Start brings up the node's part of the cluster. When it returns without error, a
// formatted node is a member, leads and serves; an unformatted one waits for Format.
// The caller goes on to Run, and to Close in the end; the Store stays the caller's.
func Start(ctx context.Context, cfg Config) (*Node, error) {
	if err := cfg.validate(); err != nil {
		return nil, fmt.Errorf("start node: %w: %w", object.ErrInvalid, err)
	}
	n := &Node{cfg: cfg, log: cfg.Logger, state: state.New(), opened: make(chan struct{})}
	n.removed.init()
	n.routes.Store(&routing{view: n.state.View()})
	if err := n.start(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("start node %q: %w", cfg.Name, err), n.Close())
	}
	return n, nil
}

func (n *Node) start(ctx context.Context) (err error) {
	if n.lock, err = lockDir(n.cfg.Dir); err != nil {
		return err
	}
	if err := n.refuseRemoved(); err != nil {
		return err
	}
	ctx, cancel := n.removed.until(ctx)
	defer cancel()
	if n.cfg.Network != nil {
		if err := n.startFlock(); err != nil {
			return err
		}
	}
	switch {
	case n.cfg.Delay == 0:
	case n.flock != nil:
		n.delay = newDelayLine(n.cfg.Delay, n.flock)
	case n.cfg.Store != nil:
		n.delay = newDelayLine(n.cfg.Delay, n.cfg.Store)
	}
	exists, err := consensus.Exists(n.cfg.Dir)
	if err != nil {
		return err
	}
	if !exists {
		if n.cfg.DiskCluster != "" {
			return fmt.Errorf("its disks belong to cluster %s, but the cluster's state is not in %s: restore that directory, or use empty disks: %w",
				n.cfg.DiskCluster, n.cfg.Dir, object.ErrInvalid)
		}
		return nil
	}
	if err := n.openConsensus(ctx); err != nil {
		return n.removed.cause(err)
	}
	if !n.state.View().Formatted() {
		return nil // a crash came between the two steps of Format, which will find that
	}
	return n.removed.cause(n.join(ctx))
}

// lockDir takes the node's directory for this process; a crash frees it.
func lockDir(dir string) (*os.File, error) {
	path := filepath.Join(dir, "lock")
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock state directory: %w", err)
	}
	for {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err != unix.EINTR {
			break
		}
	}
	if err == nil {
		return f, nil
	}
	f.Close()
	if errors.Is(err, syscall.EWOULDBLOCK) {
		return nil, fmt.Errorf("directory %s is in use by another sheep: stop that one, or give this one its own directory", dir)
	}
	return nil, fmt.Errorf("lock %s: %w", path, err)
}

func (n *Node) openConsensus(ctx context.Context) error {
	machines := map[string]consensus.Machine{stateMachine: n.state}
	for name, m := range n.cfg.Machines {
		machines[name] = m
	}
	c := consensus.Config{Dir: n.cfg.Dir, Node: n.cfg.Name, Machines: maps.Clone(machines), OnApply: n.applied, Logger: n.log}
	if n.flock != nil {
		c.Transport, c.Forwarder, c.Election = n.flock.net.Raft(), n.flock, n.cfg.Network.Election
	}
	l, err := consensus.Open(c)
	if err != nil {
		return err
	}
	n.consensus.Store(l)
	close(n.opened)
	if n.flock != nil {
		n.flock.tasks.Go(func() { n.flock.leader.run(n.flock.ctx, l) })
	}
	return l.Ready(ctx)
}

// applied follows the cluster's state; consensus calls it after each command.
func (n *Node) applied(machine string) {
	n.follower.applied()
	if machine != stateMachine {
		return
	}
	n.reroute()
	if n.flock != nil {
		n.flock.viewMoved()
	}
}

// join makes this process the current incarnation of its node and takes up its part.
func (n *Node) join(ctx context.Context) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	id := n.state.View().Cluster.ID
	if n.cfg.DiskCluster != "" && n.cfg.DiskCluster != id {
		return fmt.Errorf("its disks belong to cluster %s, the node to cluster %s: check node.disks: %w", n.cfg.DiskCluster, id, object.ErrInvalid)
	}
	if n.cfg.Adopt != nil {
		if err := n.cfg.Adopt(id); err != nil {
			return err
		}
	}
	if n.flock != nil {
		if err := n.keepCluster(id); err != nil {
			return err
		}
	}
	a := state.Announce{Name: n.cfg.Name, Address: n.address(), Zone: n.cfg.Zone, Disks: n.cfg.Disks, At: n.now()}
	if n.flock != nil {
		if err := n.held(ctx, &a); err != nil {
			return err
		}
		a.Log = n.consensus.Load().Began()
	}
	life, err := n.begin(ctx, a)
	if err != nil {
		return err
	}
	n.log.Info("node is up", "node", n.cfg.Name, "cluster", id, "incarnation", life.Incarnation, "epoch", n.state.View().Epoch)
	return nil
}

// held says what this node has if one of the disks is missing that it had: it would
// take what is lost for never written otherwise. Others go on with what they have, too; what
// nobody else has waits for the disk, see GiveUp.
func (n *Node) held(ctx context.Context, a *state.Announce) error {
	m := n.state.View().NodeByName(n.cfg.Name)
	if m == nil || !m.Lacks(n.cfg.Disks) {
		return nil
	}
	a.Partial = true
	if n.cfg.Store == nil {
		return nil
	}
	groups, err := n.cfg.Store.Groups(ctx)
	if err != nil {
		return fmt.Errorf("list what is on the disks: %w", err)
	}
	for g := range n.cfg.Store.Marks() { // of those, nothing may have been written
		if !slices.Contains(groups, g) {
			groups = append(groups, g)
		}
	}
	slices.SortFunc(groups, func(a, b object.Group) int {
		return cmp.Or(cmp.Compare(a.Policy, b.Policy), cmp.Compare(a.Partition, b.Partition))
	})
	a.Held = groups
	n.log.Warn("a disk is missing that this node had: what other nodes have of it is brought here anew; what nobody else has cannot be used until the disk is back, or given up with \"dog node give-up\"",
		"disks", len(n.cfg.Disks), "had", len(m.Disks))
	return nil
}

// begin makes this process an incarnation of its node, and has it be up.
func (n *Node) begin(ctx context.Context, a state.Announce) (life state.Life, err error) {
	if n.flock != nil {
		if life, err = n.flock.announce(ctx, a); err != nil {
			return life, fmt.Errorf("announce node: %w", err)
		}
		n.self.Store(uint32(life.Node))
		n.inc.Store(life.Incarnation)
		if err := errors.Join(n.keepNumber(life.Node), n.consensus.Load().Noted()); err != nil {
			return life, err
		}
		if err := n.flock.enlist(ctx, life.Node, life.Incarnation); err != nil {
			return life, err
		}
		return life, n.flock.awaitUp(ctx, life)
	}
	res, err := n.command(ctx, state.Command{Announce: &a})
	if err != nil {
		return life, fmt.Errorf("announce node: %w", err)
	}
	life = state.Life{Node: res.Node, Incarnation: res.Incarnation}
	n.self.Store(uint32(life.Node))
	n.inc.Store(life.Incarnation)
	up := state.SetNode{Node: life.Node, Incarnation: life.Incarnation, State: state.NodeUp, At: n.now()}
	if _, err := n.command(ctx, state.Command{SetNode: &up}); err != nil {
		return life, fmt.Errorf("bring node up: %w", err)
	}
	return life, n.place(ctx)
}

// FormatOptions say what a new cluster is like. Zero values stand for the defaults.
type FormatOptions struct {
	Name            string // for people; default "sheepdog"
	Copies          int    // of the default policy; default 3
	ObjectSizeShift uint8  // of volumes that do not choose; default object.DefaultSizeShift
	Partitions      int    // of each policy, a power of two; default state.DefaultPartitions
}

// Format makes a new cluster with this node as its first member. It fails with
// state.ErrFormatted if the node is in one; after any other failure it may be repeated. It
// waits for some seconds until the nodes that it knows vote, too: before that all is lost with this one.
func (n *Node) Format(ctx context.Context, o FormatOptions) error {
	strangers := n.flock.strangers()
	if err := n.format(ctx, o); err != nil {
		return fmt.Errorf("format cluster: %w", err)
	}
	if err := n.join(ctx); err != nil || n.flock == nil {
		return err
	}
	n.flock.awaitVoters(ctx, strangers)
	if len(n.cfg.Disks) == 0 {
		return nil
	}
	return n.placed(ctx, n.DefaultPolicy())
}

func (n *Node) format(ctx context.Context, o FormatOptions) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	orDefault(&o.Name, "sheepdog")
	orDefault(&o.Copies, 3)
	orDefault(&o.ObjectSizeShift, object.DefaultSizeShift)
	orDefault(&o.Partitions, state.DefaultPartitions)
	c := state.Format{ID: newClusterID(), Name: o.Name, Created: n.now(), Copies: o.Copies, ObjectSizeShift: o.ObjectSizeShift, Partitions: o.Partitions}
	cmd := state.Command{Format: &c}
	// Refuse what the machine would refuse before anything is made.
	if v := n.state.View(); !v.Formatted() {
		if _, err := state.DecodeResult(state.New().Apply(cmd.Encode())); err != nil {
			return err
		}
	}
	switch {
	case n.closed.Load():
		return object.ErrClosed
	case n.consensus.Load() == nil:
		if err := n.bootstrap(ctx); err != nil {
			return err
		}
	}
	_, err := n.command(ctx, cmd)
	return err
}

// bootstrap makes and opens the log, or opens what an attempt before has left.
func (n *Node) bootstrap(ctx context.Context) error {
	exists, err := consensus.Exists(n.cfg.Dir)
	if err == nil && !exists {
		err = consensus.Bootstrap(n.cfg.Dir, n.cfg.Name, n.log)
	}
	if err != nil {
		return err
	}
	return n.openConsensus(ctx)
}

func newClusterID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

func orDefault[T comparable](v *T, d T) {
	var zero T
	if *v == zero {
		*v = d
	}
}

// Run waits until ctx ends, then returns nil, or until the node cannot go on, which is
// the error.
func (n *Node) Run(ctx context.Context) error {
	if n.flock != nil && n.consensus.Load() == nil {
		if err := n.flock.seek(ctx); err != nil {
			return err
		}
	}
	select {
	case <-ctx.Done():
		return nil
	case <-n.opened:
	}
	l := n.consensus.Load()
	select {
	case <-ctx.Done():
		return nil
	case <-n.removed.told:
		return n.removed.err()
	case <-l.Failed():
		return l.Err()
	}
}

// Close ends the node's part. Requests submitted from now on fail with object.ErrClosed;
// those under way are the store's to complete.
func (n *Node) Close() (err error) {
	n.closeOnce.Do(func() {
		if n.flock != nil {
			n.flock.leave() // before requests are refused: they may go to others
		}
		n.closed.Store(true)
		if n.delay != nil {
			n.delay.close()
		}
		if l := n.consensus.Load(); l != nil {
			err = l.Close()
		}
		if n.flock != nil {
			err = errors.Join(err, n.flock.close(context.Background()))
		}
		if n.lock != nil {
			err = errors.Join(err, n.lock.Close())
		}
	})
	return err
}

// errUnformatted is what everything is answered with before Format.
var errUnformatted = fmt.Errorf(`%w: cluster is not formatted: run "dog cluster format"`, object.ErrUnavailable)

// Propose appends a command for a machine of Config.Machines to the cluster's log and
// returns the machine's result after it was applied on this node. A failure does not
// mean that the command is not applied later. It fails with ErrUnavailable, ErrNoSpace,
// ErrIO or ErrClosed of package object, or with the error of ctx. Without a deadline it
// waits for a leader as long as requests wait for a primary, Network.IOTimeout: the first
// write through a gateway is such a command before it is a request.
func (n *Node) Propose(ctx context.Context, machine string, command []byte) ([]byte, error) {
	if _, ok := ctx.Deadline(); !ok && n.flock != nil {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, n.cfg.Network.IOTimeout)
		defer cancel()
	}
	return n.propose(ctx, machine, command)
}

func (n *Node) propose(ctx context.Context, machine string, command []byte) ([]byte, error) {
	if n.closed.Load() {
		return nil, object.ErrClosed
	}
	l := n.consensus.Load()
	if l == nil {
		return nil, errUnformatted
	}
	return l.Propose(ctx, machine, command)
}

func (n *Node) command(ctx context.Context, c state.Command) (state.Result, error) {
	b, err := n.propose(ctx, stateMachine, c.Encode())
	if err != nil {
		return state.Result{}, err
	}
	return state.DecodeResult(b)
}
