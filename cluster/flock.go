package cluster

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"sheepdog/cluster/internal/consensus"
	"sheepdog/cluster/internal/durable"
	"sheepdog/cluster/internal/gates"
	"sheepdog/cluster/internal/members"
	"sheepdog/cluster/internal/peer"
	"sheepdog/cluster/internal/replica"
	"sheepdog/cluster/internal/replicas"
	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// Network is what a node needs to be one of many.
type Network struct {
	// Listener accepts the connections of other nodes. The Node closes it.
	Listener net.Listener
	// Port is where others reach Listener, at Config.Address; 0: the listener's own.
	Port int
	// GossipPort, TCP and UDP at Config.Address; 0: any.
	GossipPort int
	// SecretFile has the secret that all nodes of the cluster share. "": the network is
	// trusted and everybody on it believed.
	SecretFile string
	// Multicast looks for other nodes on the local network; Join are addresses, HOST or
	// HOST:PORT of gossip, to try.
	Multicast bool
	Join      []string

	// Election is how long a leader may be silent before there is another one, from one to
	// two times this; default 500 ms.
	Election time.Duration
	// Lease is how long a node goes on serving after it has asked the leader whether it may;
	// default 2 s. All nodes must have the same.
	Lease time.Duration
	// IOTimeout is how long requests wait for somebody who can serve them; default 60 s.
	IOTimeout time.Duration
}

func (w *Network) setDefaults() {
	orDefault(&w.Election, 500*time.Millisecond)
	orDefault(&w.Lease, 2*time.Second)
	orDefault(&w.IOTimeout, time.Minute)
	if w.Port == 0 {
		w.Port = w.Listener.Addr().(*net.TCPAddr).Port
	}
}

const (
	// retryPause is between two attempts of a request in one epoch.
	retryPause = 20 * time.Millisecond
	// watchEvery is how often the gates look for what is late.
	watchEvery = 50 * time.Millisecond
	// handshakeTimeout bounds how long requests wait for a node that has hung and that its
	// machine still connects for.
	handshakeTimeout = 1500 * time.Millisecond
)

// flock is what a node that is one of many has beside what every node has.
type flock struct {
	n       *Node
	log     *slog.Logger
	net     *peer.Transport
	members *members.Members
	start   time.Time
	leader  leader

	reps  atomic.Pointer[replicas.Replicas] // nil until the node has its incarnation
	gates *gates.Gates
	view  atomic.Pointer[state.View] // that reps and gates know
	moved chan struct{}              // the state has changed
	kicks chan struct{}
	lease lease

	proposals proposals
	marks     chan chan<- error // who wants marks kept now
	whole     whole
	questions chan struct{} // a token for each that is under way
	asked     asked         // those of other nodes

	ctx    context.Context
	cancel context.CancelFunc
	tasks  sync.WaitGroup
}

// startFlock listens and looks for others.
func (n *Node) startFlock() error {
	w := n.cfg.Network
	w.setDefaults()
	f := &flock{n: n, log: n.log, start: time.Now(), moved: make(chan struct{}, 1), kicks: make(chan struct{}, 1), marks: make(chan chan<- error), questions: make(chan struct{}, questionsAtATime)}
	f.ctx, f.cancel = context.WithCancel(context.Background())
	f.lease.again = make(chan struct{}, 1)
	f.view.Store(&state.View{})
	f.leader.init(f)
	f.proposals.init(f)
	f.gates = gates.New(gates.Config{
		Replicas: f.replicas, View: f.view.Load, Fence: n.fenced, Now: f.now, KickSoon: f.kickSoon, Retry: retryPause, Timeout: w.IOTimeout,
	})
	c := peer.Config{
		Identity: peer.Identity{Cluster: n.clusterFile(), Name: n.cfg.Name}, Resolve: f.resolve, Admit: f.admit, Handler: f,
		Event: f.leader.connection, Errors: replicas.Errors, Logger: n.log,
		HandshakeTimeout: handshakeTimeout, Dial: peer.DialFrom(f.source()),
	}
	var key []byte
	if w.SecretFile == "" {
		c.Insecure = true
	} else {
		cred, err := peer.LoadCredentials(w.SecretFile, n.log)
		if err != nil {
			return err
		}
		c.Credentials, key = cred, cred.GossipKey()
	}
	var err error
	if f.net, err = peer.New(c); err != nil {
		return err
	}
	n.flock = f
	f.tasks.Go(func() {
		if err := f.net.Serve(f.ctx, w.Listener); err != nil {
			f.log.Error("connections of other nodes are not accepted any more", "err", err)
		}
	})
	m := members.Config{
		Name: n.cfg.Name, Address: n.cfg.Address, GossipPort: w.GossipPort, Key: key, Discovery: members.DiscoverJoin, Join: w.Join,
		Known: f.known, Info: f.info(c.Identity.Cluster), Logger: n.log,
	}
	if w.Multicast {
		m.Discovery = members.DiscoverMDNS
	}
	if f.members, err = members.Start(m); err != nil {
		return err
	}
	f.tasks.Go(f.follow)
	f.tasks.Go(f.watch)
	f.tasks.Go(func() { f.proposals.run(f.ctx) })
	f.tasks.Go(f.watchRemoval)
	f.tasks.Go(f.keepLease)
	return nil
}

// source is the address from which this node connects to others: the one that they know it
// by, if it listens there.
func (f *flock) source() net.IP {
	listen, _ := f.n.cfg.Network.Listener.Addr().(*net.TCPAddr)
	own := net.ParseIP(f.n.cfg.Address)
	if listen != nil && !listen.IP.IsUnspecified() {
		own = listen.IP
	}
	return own
}

func (f *flock) info(cluster string) members.Info {
	i := members.Info{Zone: f.n.cfg.Zone, Cluster: cluster, Ports: map[string]int{peerService: f.n.cfg.Network.Port}}
	if f.n.cfg.Store == nil {
		i.Roles = append(i.Roles, "gateway")
	} else {
		i.Roles = append(i.Roles, "storage")
	}
	return i
}

// peerService is the name of the peer port in gossip.
const peerService = "peer"

// address is where others reach this node, as the state has it.
func (n *Node) address() string {
	if n.flock == nil {
		return n.cfg.Address
	}
	return net.JoinHostPort(n.cfg.Address, fmt.Sprint(n.cfg.Network.Port))
}

// resolve finds a node for the transport.
func (f *flock) resolve(node string) (string, error) {
	if f.members != nil {
		for _, m := range f.members.List() {
			if p := m.Ports[peerService]; m.Name == node && p != 0 && m.State != members.Left {
				return net.JoinHostPort(m.Address, fmt.Sprint(p)), nil
			}
		}
	}
	if m := f.n.state.View().NodeByName(node); m != nil {
		return m.Address, nil
	}
	return "", fmt.Errorf("node %q: %w", node, errUnknownNode)
}

var errUnknownNode = errors.New("no such node is known")

// known are the hosts of the cluster's nodes, for gossip to try.
func (f *flock) known() (list []string) {
	for _, m := range f.n.state.View().Nodes {
		if host, _, err := net.SplitHostPort(m.Address); err == nil && m.Name != f.n.cfg.Name {
			list = append(list, net.JoinHostPort(host, fmt.Sprint(f.n.cfg.Network.GossipPort)))
		}
	}
	return list
}

// admit lets nodes in that belong to no cluster yet, to ask for admission; see opJoin.
func (f *flock) admit(from peer.Identity, kind peer.Kind) error {
	if from.Cluster == f.net.Identity().Cluster || kind == peer.KindData || kind == peer.KindRaft {
		return nil
	}
	return errors.New("one of the two nodes does not belong to the cluster yet")
}

// The cluster's id is kept in a file: the log has it too, but may need other nodes to say
// what of it holds, and those ask first.
const clusterName = "cluster"

func (n *Node) clusterFile() string {
	b, err := os.ReadFile(filepath.Join(n.cfg.Dir, clusterName))
	if err != nil {
		return ""
	}
	return string(b)
}

func (n *Node) keepCluster(id string) error {
	if n.clusterFile() == id {
		return nil
	}
	if err := durable.WriteFile(filepath.Join(n.cfg.Dir, clusterName), id); err != nil {
		return fmt.Errorf("keep the cluster's id: %w", err)
	}
	return nil
}

// replicas are those of this life of the node; nil before it has its incarnation.
func (f *flock) replicas() *replicas.Replicas { return f.reps.Load() }

// enlist makes this node a member under its new incarnation.
func (f *flock) enlist(ctx context.Context, id state.NodeID, incarnation uint64) error {
	self := replica.Peer{Node: id, Incarnation: incarnation}
	c := replicas.Config{Self: self, Peer: f.peer, Propose: f.proposals.add, Fence: f.n.fenced, Logger: f.log}
	if f.n.cfg.Store != nil {
		c.Store, c.Marks, c.KeepMarks = f.n.cfg.Store, f.n.cfg.Store.Marks(), f.keepMarksNow
	} else {
		c.Store = noStore{}
	}
	r, err := replicas.New(ctx, c)
	if err != nil {
		return err
	}
	cluster := f.n.state.View().Cluster.ID
	if err := f.net.SetIdentity(peer.Identity{Cluster: cluster, Name: f.n.cfg.Name, Node: id, Incarnation: incarnation}); err != nil {
		return err
	}
	info := f.info(cluster)
	info.ID, info.Incarnation = fmt.Sprint(id), incarnation
	if err := f.members.Update(info); err != nil {
		f.log.Warn("gossip does not tell everything about this node", "err", err)
	}
	f.reps.Store(r)
	f.tasks.Go(func() { r.Run(f.ctx) })
	if f.n.cfg.Store != nil {
		f.tasks.Go(func() { f.keepMarks(r) })
	}
	signal(f.lease.again)
	f.viewMoved()
	return nil
}

// keepMarks notes from time to time, when it is asked to, and in the end, up to where the
// store is complete, so that after a restart only what came later is looked at.
func (f *flock) keepMarks(r *replicas.Replicas) {
	t := time.NewTicker(marksEvery)
	defer t.Stop()
	kept := map[object.Group]replica.Mark{}
	for ended := false; !ended; {
		var asked []chan<- error
		select {
		case <-t.C:
		case one := <-f.marks:
			asked = append(asked, one)
		case <-f.ctx.Done():
			ended = true
		}
		for more := true; more; {
			select {
			case one := <-f.marks:
				asked = append(asked, one)
			default:
				more = false
			}
		}
		marks := r.Marks()
		var err error
		if !maps.Equal(marks, kept) || len(asked) > 0 {
			err = f.keep(marks)
		}
		if err != nil {
			f.log.Warn("it is not kept up to where this node's data is complete: after a restart more is compared", "err", err)
		} else {
			kept = marks
		}
		for _, one := range asked {
			one <- err
		}
	}
}

// keep keeps marks when all that they cover is durable.
func (f *flock) keep(marks map[object.Group]replica.Mark) error {
	done := make(chan error, 1)
	f.n.cfg.Store.Submit(&object.Request{Op: object.OpSync, Flags: object.FlagWorking, Done: func(w *object.Request) { done <- w.Err }})
	f.n.cfg.Store.Kick()
	if err := <-done; err != nil {
		return err
	}
	return f.n.cfg.Store.KeepMarks(marks)
}

// keepMarksNow has the marks kept, and waits for it.
func (f *flock) keepMarksNow(ctx context.Context) error {
	done := make(chan error, 1)
	select {
	case f.marks <- done:
	case <-ctx.Done():
		return ctx.Err()
	case <-f.ctx.Done():
		return object.ErrClosed
	}
	select {
	case err := <-done:
		return err
	case <-f.ctx.Done():
		return object.ErrClosed
	}
}

// marksEvery bounds what has to be looked at after a crash.
const marksEvery = 10 * time.Second

// peer returns the connections to a node.
func (f *flock) peer(id state.NodeID) replicas.Peer {
	if m := f.n.state.View().Node(id); m != nil && m.Name != f.n.cfg.Name {
		return f.net.Peer(m.Name)
	}
	return nil
}

// Handle implements peer.Handler.
func (f *flock) Handle(r *peer.Request) {
	reps := f.replicas()
	switch {
	case r.Op >= firstNodeOp:
		f.serve(r)
	case reps == nil || r.From.Node == 0 || r.From.Cluster != f.net.Identity().Cluster || r.From.Cluster == "":
		r.Reply(replica.ErrRetry)
	case !reps.Handle(r):
		r.Reply(peer.ErrUnsupported)
	}
}

// Kick implements peer.Handler.
func (f *flock) Kick() {
	if r := f.replicas(); r != nil {
		r.Kick()
	}
}

func (f *flock) kickSoon() { signal(f.kicks) }

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// viewMoved is called when the state has changed.
func (f *flock) viewMoved() { signal(f.moved) }

// follow tells replicas and gates what has become of the partitions.
func (f *flock) follow() {
	for {
		select {
		case <-f.ctx.Done():
			return
		case <-f.kicks:
			f.Kick()
			continue
		case <-f.moved:
		}
		v := f.n.state.View()
		f.view.Store(v)
		if r := f.replicas(); r != nil {
			r.SetState(v)
			f.gates.Moved()
			r.Kick()
		}
	}
}

// watch lets time pass.
func (f *flock) watch() {
	t := time.NewTicker(watchEvery)
	defer t.Stop()
	for {
		select {
		case <-f.ctx.Done():
			return
		case <-t.C:
		}
		f.gates.Tick()
	}
}

// now is the time on the gates' clock.
func (f *flock) now() replica.Time { return replica.Time(time.Since(f.start)) }

// close ends the node's part. The log is closed already.
func (f *flock) close(ctx context.Context) (err error) {
	if f.members != nil {
		err = errors.Join(f.members.Leave(ctx), f.members.Close())
	}
	if r := f.replicas(); r != nil {
		r.Close()
	}
	f.cancel()
	if f.net != nil {
		err = errors.Join(err, f.net.Close())
	}
	f.tasks.Wait()
	return err
}

// fenced refuses what is of an older generation than the newest seen of its volume.
func (n *Node) fenced(vid object.VID, generation uint64) error {
	if n.cfg.Generation != nil {
		n.fence.admit(vid, n.cfg.Generation(vid))
	}
	if !n.fence.admit(vid, generation) {
		return n.stale(vid, generation)
	}
	return nil
}

// noStore is the store of a gateway.
type noStore struct{}

func (noStore) Submit(r *object.Request) {
	if r.Op == object.OpSync {
		r.Complete(nil)
		return
	}
	r.Complete(errNoStore)
}

var errNoStore = fmt.Errorf("this node has no disks: %w", object.ErrUnavailable)

func (noStore) Kick()                                              { /* nothing is held back */ }
func (noStore) Delete(context.Context, object.Key) error           { return errNoStore }
func (noStore) Sums(context.Context, object.Key) ([]uint64, error) { return nil, errNoStore }
func (noStore) Stat(context.Context, object.Key) (object.Info, error) {
	return object.Info{}, errNoStore
}
func (noStore) Groups(context.Context) ([]object.Group, error)         { return nil, nil }
func (noStore) Tight(object.Group) bool                                { return false }
func (noStore) Failed(object.Group) bool                               { return false }
func (noStore) Abandon(object.Group) bool                              { return false }
func (noStore) Rotten() map[object.Key][]uint32                        { return nil }
func (noStore) Heal(context.Context, object.Key, uint32, []byte) error { return errNoStore }
func (noStore) List(context.Context, object.Group, func(object.Info) error) error {
	return errNoStore
}

var _ consensus.Forwarder = (*flock)(nil)

// gone reports that a connection failed because nobody listens there any more.
func gone(err error) bool { return errors.Is(err, syscall.ECONNREFUSED) }
