package consensus

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/hashicorp/raft"
	wal "github.com/hashicorp/raft-wal"

	"sheepdog/cluster/internal/durable"
	"sheepdog/storage/object"
)

const (
	raftDir    = "raft"
	newRaftDir = "raft.new"
	logDir     = "log"
	stableName = "stable"
	// segmentBytes is what the log takes ahead: entries are small and few.
	segmentBytes = 4 << 20
	// keepSnapshots: the newest, and the one before for people with a damaged disk.
	keepSnapshots = 2
	nodeKey       = "sheepdog-node"
)

const (
	// aloneElection is the election timeout of a node without a transport: nobody else can
	// be leader, so it need not wait for one.
	aloneElection = 20 * time.Millisecond
	// defaultElection suits a LAN.
	defaultElection = time.Second
	enqueueTimeout  = 5 * time.Second
	// proposeTimeout is for callers that set no deadline.
	proposeTimeout    = 15 * time.Second
	snapshotInterval  = 30 * time.Second
	snapshotThreshold = 4096
	trailingLogs      = 4096
	// maxReplay is how many entries a start applies without having a snapshot made, so that the next one need not do it again:
	// raft looks whether one is due only after snapshotInterval, which a node that fails again and again may never reach.
	maxReplay = 1024
)

// Config of a Log.
type Config struct {
	Dir      string // of the node's state; exists, and belongs to this process alone
	Node     string // name; the raft belongs to it
	Machines map[string]Machine
	// OnApply is called after a machine changed, before Propose returns, by the
	// goroutine that applies commands. It must not block.
	OnApply func(machine string)
	Logger  *slog.Logger

	// Transport and Forwarder reach the other nodes; nil: there are none. The Log closes
	// the Transport.
	Transport Transport
	Forwarder Forwarder
	// Election is how long followers wait for a sign of the leader before they choose
	// another one: from one to two times this. Default 1 s, without a Transport 20 ms. All
	// nodes must have the same. Half of it is the leader's lease, see Log.LeaderLease.
	Election time.Duration
	// DownAfter is the silence after which the leader gives a voter's place to another
	// node. Default 3 × Election.
	DownAfter time.Duration
}

// leaderLease is how long a leader goes on that has lost its quorum.
func (c *Config) leaderLease() time.Duration {
	if c.Transport == nil {
		return c.Election
	}
	return c.Election / 2
}

func (c *Config) setDefaults() {
	if c.Election == 0 && c.Transport == nil {
		c.Election = aloneElection
	}
	if c.Election == 0 {
		c.Election = defaultElection
	}
	if c.DownAfter == 0 {
		c.DownAfter = 3 * c.Election
	}
}

func (c *Config) validate() error {
	switch {
	case c.Transport != nil && c.Forwarder == nil:
		return errors.New("with a transport there must be a forwarder")
	case c.Transport != nil && c.Election < 20*time.Millisecond:
		return fmt.Errorf("election timeout %v is shorter than 20ms", c.Election)
	}
	return nil
}

// Log is a running node of the raft. Its methods may be called from any goroutine.
type Log struct {
	cfg   Config
	raft  *raft.Raft
	host  *host
	guard *guard
	wal   *wal.WAL
	began *began
	trans raft.WithClose
	net   *network // nil without a transport

	behind uint64 // entries that the newest snapshot did not cover at the start

	mu      sync.Mutex
	leading bool
	reign   Reign         // the last one
	leader  string        // "" = not known
	changed chan struct{} // closed when leading or leader changes

	notify  chan bool
	leaders chan raft.Observation
	nudges  chan struct{}
	failed  chan struct{} // closed once failure is set
	err     error         // why the log failed
	stop    chan struct{}
	wait    sync.WaitGroup
	closed  sync.Once
}

// Exists reports whether Bootstrap has been done in the directory.
func Exists(dir string) (bool, error) {
	_, err := os.Stat(filepath.Join(dir, raftDir))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look for consensus state: %w", err)
	}
	return true, nil
}

// Bootstrap makes the log of a new cluster whose one voter is node. A crash leaves all
// of it or nothing.
func Bootstrap(dir, node string, log *slog.Logger) error {
	servers := raft.Configuration{Servers: []raft.Server{{ID: raft.ServerID(node), Address: raft.ServerAddress(node)}}}
	return create(dir, node, log, &servers)
}

// Prepare makes an empty log for a node that a cluster has admitted, see Admit: it will
// get everything from the leader. A crash leaves all of it or nothing.
func Prepare(dir, node string, log *slog.Logger) error { return create(dir, node, log, nil) }

func create(dir, node string, log *slog.Logger, servers *raft.Configuration) (err error) {
	defer wrap(&err, "make consensus state in "+dir)
	temp := filepath.Join(dir, newRaftDir)
	if err := os.RemoveAll(temp); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(temp, logDir), 0o700); err != nil {
		return err
	}
	if err := createIn(temp, node, log, servers); err != nil {
		return errors.Join(err, os.RemoveAll(temp))
	}
	for _, d := range []string{filepath.Join(temp, logDir), temp} {
		if err := durable.SyncDir(d); err != nil {
			return err
		}
	}
	return durable.Rename(temp, filepath.Join(dir, raftDir))
}

func createIn(dir, node string, log *slog.Logger, servers *raft.Configuration) (err error) {
	s, err := createStable(filepath.Join(dir, stableName), map[string][]byte{nodeKey: []byte(node)})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	w, err := openWAL(dir, s, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	snaps, err := openSnapshots(dir, log)
	if err != nil || servers == nil {
		return err
	}
	_, trans := raft.NewInmemTransport(raft.ServerAddress(node))
	defer trans.Close()
	cfg := Config{Node: node, Logger: log}
	cfg.setDefaults()
	return raft.BootstrapCluster(raftConfig(&cfg, nil), w, s, snaps, trans, *servers)
}

// Open starts the log of a directory made by Bootstrap or Prepare. The machines must be
// new: what they had is restored in the background; see Ready. If Open fails, the
// Transport is the caller's to close.
func Open(cfg Config) (l *Log, err error) {
	defer wrap(&err, "open consensus state in "+cfg.Dir)
	cfg.setDefaults()
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	dir := filepath.Join(cfg.Dir, raftDir)
	s, err := openStable(filepath.Join(dir, stableName))
	if err != nil {
		return nil, err
	}
	if name, _ := s.Get([]byte(nodeKey)); string(name) != cfg.Node {
		return nil, errors.Join(fmt.Errorf("it belongs to node %q, not to %q: check node.name", name, cfg.Node), s.Close())
	}
	// raft-wal takes a last segment that is not there for one that a crash kept it from
	// making. Without any segment there has been no such crash.
	if files, err := filepath.Glob(filepath.Join(dir, logDir, "*.wal")); err != nil || len(files) == 0 {
		return nil, errors.Join(fmt.Errorf("the log's segments are missing: restore %s from a backup", dir), err, s.Close())
	}
	w, err := openWAL(dir, s, cfg.Logger)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%w: restore %s from a backup", err, dir), s.Close())
	}
	m, last, err := openMark(filepath.Join(dir, markName))
	if err != nil {
		return nil, errors.Join(err, w.Close(), s.Close())
	}
	g := newGuard(w, s, m)
	if err := g.checkMark(last); err != nil {
		return nil, errors.Join(fmt.Errorf("%w: restore %s from a backup", err, dir), m.close(0), w.Close(), s.Close())
	}
	b, err := openBegan(dir, w, cfg.Logger)
	if err != nil {
		return nil, errors.Join(err, m.close(0), w.Close(), s.Close())
	}
	l = &Log{
		cfg: cfg, guard: g, wal: w, began: b,
		host:    newHost(cfg.Machines, cfg.OnApply),
		changed: make(chan struct{}), notify: make(chan bool, 1), leaders: make(chan raft.Observation, 1), nudges: make(chan struct{}, 1),
		failed: make(chan struct{}), stop: make(chan struct{}),
	}
	if err := l.start(dir); err != nil {
		return nil, errors.Join(err, b.close(), m.close(0), w.Close(), s.Close())
	}
	l.wait.Add(2)
	go l.watch()
	go l.runNudges()
	if l.behind > maxReplay {
		last := l.raft.LastIndex()
		l.wait.Go(func() { l.shorten(last) })
	}
	return l, nil
}

// shorten has a snapshot made once the entries that were there at the start are applied.
func (l *Log) shorten(last uint64) {
	if l.AwaitApplied(context.Background(), last) == nil {
		_ = l.Snapshot() // raft tells of its failure, and tries again when one is due
	}
}

// start runs raft. raft panics on a log with gaps, which becomes an error here.
func (l *Log) start(dir string) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("the log does not follow its snapshot or is damaged, restore %s from a backup: %v", dir, r)
		}
	}()
	snaps, err := openSnapshots(dir, l.cfg.Logger)
	if err != nil {
		return err
	}
	var trans raft.Transport
	if l.cfg.Transport == nil {
		addr, memory := raft.NewInmemTransport(raft.ServerAddress(l.cfg.Node))
		memory.Connect(addr, memory)
		trans, l.trans = memory, memory
	} else {
		l.net = newNetwork(l.cfg.Node, l.cfg.Transport, &logger{log: l.cfg.Logger, name: "raft"})
		trans, l.trans = l.net, l.net
	}
	l.raft, err = raft.NewRaft(raftConfig(&l.cfg, l.notify), l.host, l.guard, l.guard, snaps, trans)
	if err != nil {
		return errors.Join(fmt.Errorf("%w: restore %s from a backup", err, dir), l.trans.Close())
	}
	if l.net == nil && !l.alone() {
		// It would wait for others that cannot be reached.
		return errors.Join(fmt.Errorf("the log does not say that this node is its only voter: restore %s from a backup", dir),
			l.raft.Shutdown().Error(), l.trans.Close())
	}
	l.behind = l.raft.LastIndex()
	if list, err := snaps.List(); err == nil && len(list) > 0 {
		l.behind -= min(l.behind, list[0].Index)
	}
	l.guard.running.Store(true)
	l.raft.RegisterObserver(raft.NewObserver(l.leaders, false, func(o *raft.Observation) bool {
		_, ok := o.Data.(raft.LeaderObservation)
		return ok
	}))
	if l.net != nil && l.alone() {
		// The only voter need not wait for another leader. A shorter timeout, if only by this
		// much, makes raft look at once for how long it has not heard from any.
		rc := l.raft.ReloadableConfig()
		rc.HeartbeatTimeout -= time.Nanosecond
		return l.raft.ReloadConfig(rc)
	}
	return nil
}

func raftConfig(cfg *Config, notify chan<- bool) *raft.Config {
	c := raft.DefaultConfig()
	c.LocalID = raft.ServerID(cfg.Node)
	c.HeartbeatTimeout, c.ElectionTimeout, c.LeaderLeaseTimeout = cfg.Election, cfg.Election, cfg.leaderLease()
	if cfg.Transport != nil {
		// Followers learn by nudge what is committed. What raft sends beside it goes to
		// hundreds of nodes, and may be seldom.
		c.CommitTimeout = cfg.Election / 4
	}
	// A node that was removed waits for somebody to admit it again.
	c.ShutdownOnRemove = false
	c.SnapshotInterval, c.SnapshotThreshold, c.TrailingLogs = snapshotInterval, snapshotThreshold, trailingLogs
	c.NotifyCh = notify
	c.Logger = &logger{log: cfg.Logger, name: "raft"}
	c.NoLegacyTelemetry = true
	return c
}

func openWAL(dir string, s *stable, log *slog.Logger) (*wal.WAL, error) {
	return wal.Open(filepath.Join(dir, logDir), wal.WithMetaStore(segmentTable{s}), wal.WithSegmentSize(segmentBytes),
		wal.WithLogger(&logger{log: log, name: "raft-wal"}))
}

func openSnapshots(dir string, log *slog.Logger) (*raft.FileSnapshotStore, error) {
	return raft.NewFileSnapshotStoreWithLogger(dir, keepSnapshots, &logger{log: log, name: "raft"})
}

// watch follows leadership and failure until Close.
func (l *Log) watch() {
	defer l.wait.Done()
	// Raft runs for a moment before it is observed: a leader that it has heard of meanwhile
	// is not told of again as long as it leads.
	l.setLeader(false)
	for {
		select {
		case leading := <-l.notify:
			l.setLeader(leading)
		case <-l.leaders:
			l.mu.Lock()
			leading := l.leading
			l.mu.Unlock()
			l.setLeader(leading)
		case err := <-l.guard.failure:
			l.err = err
			close(l.failed)
		case <-l.stop:
			return
		}
	}
}

// setLeader takes over who leads. That this node does is true from raft's notification on.
func (l *Log) setLeader(leading bool) {
	_, id := l.raft.LeaderWithID()
	leader := string(id)
	if leader == l.cfg.Node && !leading {
		leader = ""
	}
	if leading {
		leader = l.cfg.Node
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if leading && !l.leading {
		// Should there have been another term meanwhile, this node was not elected in that one:
		// raft waits for its notice to be taken. So it is one that nobody answers.
		l.reign = Reign{l.raft.CurrentTerm(), time.Now()}
	}
	if leading != l.leading || leader != l.leader {
		l.leading, l.leader = leading, leader
		close(l.changed)
		l.changed = make(chan struct{})
	}
}

// Failed is closed when the log cannot go on; Err then says why.
func (l *Log) Failed() <-chan struct{} { return l.failed }

// Err is valid after Failed.
func (l *Log) Err() error { return fmt.Errorf("consensus: %w", l.err) }

// Applied is the index of the newest entry that the machines of this node have applied.
func (l *Log) Applied() uint64 { return l.host.progress.index() }

// AwaitApplied waits until the machines of this node have applied the entry at an index. It fails with
// the error of ctx, or when the log ends.
func (l *Log) AwaitApplied(ctx context.Context, index uint64) error {
	return l.host.progress.await(ctx, index, l.failed, l.stop)
}

// Leading reports whether this node leads.
func (l *Log) Leading() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.leading
}

func (l *Log) leads() (bool, time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.leading, l.reign.Since
}

// Leader returns the name of the node that leads as far as this node knows, "" if it
// knows of none, and a channel that is closed when that changes.
func (l *Log) Leader() (name string, changed <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.leader, l.changed
}

// alone reports whether this node is the only voter.
func (l *Log) alone() bool {
	voters, self := 0, false
	for _, s := range l.raft.GetConfiguration().Configuration().Servers {
		if s.Suffrage == raft.Voter {
			voters++
			self = self || string(s.ID) == l.cfg.Node
		}
	}
	return voters == 1 && self
}

// Ready waits until there is a leader and the machines of this node have applied all
// that was committed before the call.
func (l *Log) Ready(ctx context.Context) error {
	if l.net != nil {
		_, err := l.propose(ctx, noMachine, nil)
		return err
	}
	for {
		if _, _, err := l.awaitLeader(ctx); err != nil {
			return err
		}
		f := l.raft.Barrier(0)
		_, err := l.await(ctx, f.Error)
		if err == nil || !retryable(err) {
			return err
		}
	}
}

// await waits for a future, or for the end of ctx, of the log or of raft's thread.
func (l *Log) await(ctx context.Context, wait func() error, response ...func() any) (any, error) {
	type end struct {
		value any
		err   error
	}
	done := make(chan end, 1)
	// The goroutine ends with the future, which raft completes at the latest when it
	// shuts down; only after a failure of the disk (see guard) it stays until exit, and if raft has taken
	// what it then did not look at any more, as it shut down.
	go func() {
		e := end{err: wait()}
		if e.err == nil && len(response) > 0 {
			e.value = response[0]()
		}
		done <- e
	}()
	select {
	case e := <-done:
		return e.value, e.err
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-l.failed:
		return nil, l.err
	case <-l.stop: // raft has shut down
	}
	select {
	case e := <-done:
		return e.value, e.err
	default:
		return nil, raft.ErrRaftShutdown
	}
}

// awaitLeader waits until a leader is known, and returns what Leader does.
func (l *Log) awaitLeader(ctx context.Context) (string, <-chan struct{}, error) {
	for {
		leader, changed := l.Leader()
		if leader != "" {
			return leader, changed, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return "", nil, fmt.Errorf("no node leads the cluster: %w", ctx.Err())
		case <-l.failed:
			return "", nil, l.err
		case <-l.stop:
			return "", nil, object.ErrClosed
		}
	}
}

// Snapshot makes a snapshot of all machines now and drops what it covers of the log.
func (l *Log) Snapshot() error {
	if err := l.raft.Snapshot().Error(); err != nil && !errors.Is(err, raft.ErrNothingNewToSnapshot) {
		return fmt.Errorf("snapshot of the cluster's state: %w", err)
	}
	return nil
}

// Close hands the lead to another node, if this one has it, stops the log and waits for
// it. Proposals that are under way fail.
func (l *Log) Close() error { return l.close(true) }

func (l *Log) close(handOver bool) (err error) {
	l.closed.Do(func() {
		if handOver && l.net != nil && l.Leading() {
			if err := l.StepDown(context.Background()); err != nil {
				l.cfg.Logger.Warn("stop without another leader: the others will choose one", "error", err)
			}
		}
		err = l.raft.Shutdown().Error()
		close(l.stop)
		l.wait.Wait()
		last, lastErr := l.wal.LastIndex()
		err = errors.Join(err, lastErr, l.guard.mark.close(last), l.began.close(), l.trans.Close(), l.wal.Close(), l.guard.stable.Close())
	})
	return err
}

func wrap(err *error, what string) {
	if *err != nil {
		*err = fmt.Errorf("%s: %w", what, *err)
	}
}
