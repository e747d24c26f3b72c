package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"sheepdog/cluster"
	"sheepdog/cluster/state"
	"sheepdog/conf"
	"sheepdog/frontends/admin"
	"sheepdog/frontends/iscsi"
	"sheepdog/frontends/nbd"
	"sheepdog/frontends/sheepdog"
	"sheepdog/storage"
	"sheepdog/storage/disk"
	"sheepdog/storage/object"
	"sheepdog/vdi"
	"sheepdog/vdi/catalog"
)

// drainTimeout is how long clients may take to end their sessions when the daemon stops.
const drainTimeout = 10 * time.Second

// daemon is all layers of one sheep.
type daemon struct {
	conf  *conf.Config
	opts  options
	log   *slog.Logger
	level *slog.LevelVar

	nbdListeners    []net.Listener
	nativeListeners []net.Listener
	iscsiListen     net.Listener // nil: none
	adminListen     net.Listener
	peerListen      net.Listener // nil: the node is alone

	store   *storage.Store // nil for a gateway
	disksMu sync.Mutex     // whoever tells the cluster of the disks, so that it hears last how they are
	catalog *catalog.Machine
	node    *cluster.Node
	volumes *vdi.Service
	nbd     *nbd.Server
	native  *sheepdog.Server
	iscsi   *iscsi.Server // nil: none
	admin   *admin.Server

	shutdown context.CancelFunc
	closers  []func() error // what is to be closed, in the order of its making
}

// serve runs a daemon until ctx ends and everything is closed again.
func serve(ctx context.Context, c *conf.Config, o options, log *slog.Logger, level *slog.LevelVar) (err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	d := &daemon{conf: c, opts: o, log: log, level: level, shutdown: cancel}
	defer func() {
		slices.Reverse(d.closers)
		for _, closer := range d.closers {
			err = errors.Join(err, closer())
		}
	}()
	for _, step := range []func(context.Context) error{d.listen, d.openStore, d.startNode, d.startVolumes, d.makeFrontends} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return d.run(ctx)
}

// listen takes the sockets first: if they are in use nothing else is touched, and
// clients of a restarting sheep wait a moment instead of being refused.
func (d *daemon) listen(ctx context.Context) error {
	if a := d.conf.Listen.Peer; a != "" {
		l, err := listenTCP(ctx, "listen.peer", a)
		if err != nil {
			return err
		}
		d.closeLater(l)
		d.peerListen = l
	}
	var err error
	if d.nbdListeners, err = d.listenFor(ctx, "nbd", d.conf.Listen.NBD, d.conf.NBD.Unix); err != nil {
		return err
	}
	if d.nativeListeners, err = d.listenFor(ctx, "native", d.conf.Listen.Native, d.conf.Native.Unix); err != nil {
		return err
	}
	if a := d.conf.Listen.ISCSI; a != "" {
		l, err := listenTCP(ctx, "listen.iscsi", a)
		if err != nil {
			return err
		}
		d.closeLater(l)
		d.iscsiListen = l
	}
	if a := d.conf.Listen.Admin; a != "" {
		l, err := listenTCP(ctx, "listen.admin", a)
		if err != nil {
			return err
		}
		d.closeLater(l)
		d.adminListen = l
	}
	return nil
}

// listenFor takes the sockets of a frontend: an address and a path, "" for none.
func (d *daemon) listenFor(ctx context.Context, frontend, address, path string) (list []net.Listener, err error) {
	if address != "" {
		l, err := listenTCP(ctx, "listen."+frontend, address)
		if err != nil {
			return nil, err
		}
		d.closeLater(l)
		list = append(list, l)
	}
	if path != "" {
		l, err := listenUnix(ctx, frontend+".unix", path)
		if err != nil {
			return nil, err
		}
		d.closeLater(l)
		list = append(list, l)
	}
	return list, nil
}

// closeLater closes a listener in the end, if the frontend has not done so.
func (d *daemon) closeLater(l net.Listener) {
	d.closers = append(d.closers, func() error {
		if err := l.Close(); !errors.Is(err, net.ErrClosed) {
			return err
		}
		return nil
	})
}

func (d *daemon) openStore(context.Context) error {
	if d.opts.standalone {
		if err := os.MkdirAll(d.opts.data, 0o755); err != nil {
			return fmt.Errorf("make --data directory: %w", err)
		}
	}
	var disks []disk.FS
	for _, path := range d.conf.Node.Disks {
		fsys, err := disk.Open(path)
		if errors.Is(err, os.ErrNotExist) && d.peerListen != nil && len(d.conf.Node.Disks) > 1 {
			d.log.Error("a disk is missing and is left out: other nodes go on with what they have of it; mount it and restart sheep, or take it out of node.disks", "disk", path)
			continue
		}
		if errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("%w: mount or make the directory, or change node.disks", err)
		}
		if err != nil {
			return err
		}
		disks = append(disks, fsys)
	}
	if len(disks) == 0 && len(d.conf.Node.Disks) > 0 {
		return fmt.Errorf("none of the disks of node.disks is there: mount them: %w", os.ErrNotExist)
	}
	if len(disks) == 0 {
		return nil
	}
	s := d.conf.Storage
	store, err := storage.Open(storage.Config{
		Disks: disks, Node: d.conf.Node.Name, Logger: d.log,
		LogLimit: s.LogLimit, SmallWrite: int(s.SmallWrite), Reserve: reserveOf(s), OpenObjects: s.OpenObjects, Workers: s.Workers,
		Checkpoint: s.Checkpoint, ScrubRate: noneIfZero(s.ScrubRate), ScrubEvery: s.ScrubEvery,
	})
	if err != nil {
		return err
	}
	d.store = store
	d.closers = append(d.closers, store.Close)
	return nil
}

// reserveOf puts the setting as storage.Config has it: 0 is its default, negative is none.
func reserveOf(s conf.Storage) int64 {
	if s.Reserve == conf.ReserveAuto {
		return 0
	}
	return noneIfZero(s.Reserve)
}

func noneIfZero(n int64) int64 {
	if n == 0 {
		return -1
	}
	return n
}

func (d *daemon) startNode(ctx context.Context) error {
	dir := d.conf.Node.StateDir
	if err := os.MkdirAll(filepath.Clean(dir), 0o700); err != nil {
		return fmt.Errorf("make node.state_dir: %w", err)
	}
	d.catalog = catalog.New()
	c := cluster.Config{
		Dir: dir, Name: d.conf.Node.Name, Address: d.conf.Node.Address, Zone: d.conf.Node.Zone,
		Machines:   map[string]cluster.Machine{vdi.Machine: d.catalog},
		Generation: d.catalog.Generation,
		Stop:       d.shutdown, Delay: d.conf.Debug.StoreDelay, Logger: d.log,
	}
	if d.peerListen != nil {
		c.Network = d.network()
	}
	if d.store != nil {
		c.Store, c.Disks, c.DiskCluster = d.store, d.weights(), d.store.Cluster()
		c.Adopt = func(id string) error { return d.store.SetIdentity(id, d.conf.Node.Name) }
	}
	node, err := cluster.Start(ctx, c)
	if err != nil {
		return err
	}
	d.node = node
	d.closers = append(d.closers, node.Close)
	if d.opts.standalone && !node.Formatted() {
		if err := node.Format(ctx, cluster.FormatOptions{Name: "standalone", Copies: 1}); err != nil {
			return err
		}
		d.log.Info("formatted a cluster of one with one copy of everything")
	}
	return nil
}

// network is what makes the node one of many.
func (d *daemon) network() *cluster.Network {
	c := d.conf.Cluster
	w := &cluster.Network{
		Listener: d.peerListen, GossipPort: portOf(d.conf.Listen.Gossip), SecretFile: c.SecretFile,
		Multicast: c.Discovery == "mdns", IOTimeout: c.IOTimeout,
	}
	if c.Discovery != "none" {
		w.Join = c.Join
	}
	return w
}

// portOf is the port of an address that conf has checked, if it is a number; else any.
func portOf(address string) int {
	_, p, err := net.SplitHostPort(address)
	if err != nil {
		return 0
	}
	n, err := net.LookupPort("tcp", p)
	if err != nil {
		return 0
	}
	return n
}

// weights are the disks' sizes in MiB.
func (d *daemon) weights() []state.Disk {
	var list []state.Disk
	for _, s := range d.store.Status().Disks {
		list = append(list, weigh(s))
	}
	return list
}

// weigh says how much of the data is for a disk.
func weigh(s storage.DiskStatus) state.Disk {
	w := max(1, s.TotalBytes>>20)
	if s.State == storage.StateFailed || s.Retired {
		w = 0 // it is still the node's, and gets nothing
	}
	return state.Disk{ID: s.ID, Path: s.Dir, Weight: w}
}

// up reports whether that start of a node is up, as far as this node knows.
func (d *daemon) up(n catalog.Node) bool {
	return slices.ContainsFunc(d.node.View().Nodes, func(m *state.Node) bool {
		return m.Name == n.Name && m.Incarnation == n.Incarnation && m.State == state.NodeUp
	})
}

func (d *daemon) policies() (list []object.PolicyID) {
	for _, p := range d.node.View().Policies {
		list = append(list, p.ID)
	}
	return list
}

// room looks at the disks of all nodes, how their space is shared out aside. If one of them is not known, so is the rest.
func (d *daemon) room(ctx context.Context, policy object.PolicyID, bytes int64) error {
	if d.admin == nil {
		return nil
	}
	holders := int64(0)
	for _, m := range d.node.View().Nodes {
		if m.State == state.NodeUp && m.Weight() > 0 {
			holders++
		}
	}
	needed := bytes * min(int64(d.node.Copies(policy)), holders)
	if free, known := d.admin.Free(ctx); known && needed > free {
		return fmt.Errorf("%d copies need %d bytes until those of before are removed, and %d bytes are free: add disks, or delete something: %w",
			d.node.Copies(policy), needed, free, object.ErrNoSpace)
	}
	return nil
}

func (d *daemon) startVolumes(context.Context) error {
	s, err := vdi.NewService(vdi.Config{
		Objects: d.node, Log: d.node, Catalog: d.catalog, Node: d.conf.Node.Name, Incarnation: d.node.Incarnation,
		DefaultPolicy: d.node.DefaultPolicy, DefaultSizeShift: d.node.DefaultSizeShift, PolicyOf: d.node.PolicyOf, CopiesOf: d.node.Copies,
		Settled: func(ctx context.Context, _ catalog.Node, vid object.VID, generation uint64) error {
			return d.node.Settled(ctx, vid, generation)
		},
		Known: d.node.Known, Lost: d.node.Lost, Leased: d.node.Leased, Leading: d.node.Leading, Logger: d.log,
		Up: d.up, Policies: d.policies, Room: d.room,
	})
	if err != nil {
		return err
	}
	d.volumes = s
	d.closers = append(d.closers, s.Close)
	return nil
}

func (d *daemon) makeFrontends(context.Context) error {
	if err := d.makeNBD(); err != nil {
		return err
	}
	if err := d.makeNative(); err != nil {
		return err
	}
	if err := d.makeISCSI(); err != nil {
		return err
	}
	return d.makeAdmin()
}

func (d *daemon) makeNBD() (err error) {
	c := d.conf.NBD
	n := nbd.Config{
		Volumes: &exports{d.volumes, d.catalog}, Logger: d.log, TLSRequired: c.TLS.Enabled() && !c.TLSOptional,
	}
	n.MaxConnections, n.MemoryLimit, n.SessionMemory = c.MaxConnections, c.Memory, c.SessionMemory
	if n.TLS, err = serverTLS("nbd.tls", c.TLS); err != nil {
		return err
	}
	if n.Allow, err = prefixes("nbd.allow", c.Allow); err != nil {
		return err
	}
	d.nbd, err = nbd.New(n)
	return err
}

func (d *daemon) makeNative() (err error) {
	c := d.conf.Native
	n := sheepdog.Config{Volumes: &nativeVolumes{d.volumes, d.node}, Logger: d.log}
	n.MaxConnections, n.MemoryLimit, n.SessionMemory = c.MaxConnections, c.Memory, c.SessionMemory
	if n.Allow, err = prefixes("native.allow", c.Allow); err != nil {
		return err
	}
	if d.native, err = sheepdog.New(n); err == nil {
		d.node.Using(func(vid object.VID) bool { return d.volumes.Opened(vid) > 0 || d.native.HasOpen(vid) })
	}
	return err
}

func (d *daemon) makeAdmin() (err error) {
	c := d.conf.Admin
	a := admin.Config{
		Volumes: d.volumes, Cluster: membership{d.node}, Disks: d.disks, Node: d.conf.Node.Name, Version: version,
		Sessions: []admin.SessionSource{nbdSessions{d.nbd}, nativeSessions{d.native}, iscsiSessions{d.iscsi}}, Exports: d.exports, Metrics: d.metrics,
		Plugs: plugs{d}, Scrub: d.scrub, Level: d.level, Shutdown: d.shutdown, Insecure: d.conf.Insecure, Logger: d.log,
	}
	a.Targets = &targetOps{targets: d.targets(), server: d.iscsi, prefix: d.conf.ISCSI.Prefix, find: d.catalog}
	if a.TLS, err = serverTLS("admin.tls", c.TLS); err != nil {
		return err
	}
	if a.Token, err = readToken(c.TokenFile); err != nil {
		return err
	}
	if d.admin, err = admin.New(a); err != nil {
		return err
	}
	d.closers = append(d.closers, d.admin.Close)
	d.node.Answer(d.admin.Answer) // also for other nodes' operators
	return nil
}

// run serves until ctx ends or something fails, and returns when no client is left.
func (d *daemon) run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return d.node.Run(ctx) })
	for _, l := range d.nbdListeners {
		g.Go(func() error { return d.nbd.Serve(ctx, l) })
	}
	for _, l := range d.nativeListeners {
		g.Go(func() error { return d.native.Serve(ctx, l) })
	}
	if d.iscsi != nil {
		g.Go(func() error { return d.iscsi.Serve(ctx, d.iscsiListen) })
	}
	g.Go(func() error { d.publishPortal(ctx); return nil })
	if d.store != nil {
		g.Go(func() error { d.watchDisks(ctx); return nil })
	}
	if d.adminListen != nil {
		g.Go(func() error { return d.admin.Serve(ctx, d.adminListen) })
	}
	g.Go(func() error {
		<-ctx.Done()
		d.notify("STOPPING=1")
		d.drain()
		return nil
	})
	// The volumes' own work goes on until the last client has left.
	background, stop := context.WithCancel(context.WithoutCancel(ctx))
	done := make(chan error, 1)
	go func() { done <- d.volumes.Run(background) }()

	d.announce()
	err := g.Wait()
	stop()
	return errors.Join(err, <-done)
}

// drain lets clients finish; the admin frontend does so by itself.
func (d *daemon) drain() {
	ctx, cancel := context.WithTimeout(context.Background(), drainTimeout)
	defer cancel()
	var wg sync.WaitGroup
	frontends := map[string]func(context.Context) error{"nbd": d.nbd.Shutdown, "native": d.native.Shutdown}
	if d.iscsi != nil {
		frontends["iscsi"] = d.iscsi.Shutdown
	}
	for frontend, shutdown := range frontends {
		wg.Go(func() {
			if err := shutdown(ctx); err != nil {
				d.log.Warn("clients did not finish in time and were cut off", "frontend", frontend, "timeout", drainTimeout)
			}
		})
	}
	wg.Wait()
}

// announce says that the daemon is there, to people and to systemd.
func (d *daemon) announce() {
	args := []any{"version", version, "node", d.conf.Node.Name, "disks", len(d.conf.Node.Disks)}
	for _, l := range d.nbdListeners {
		args = append(args, "nbd", l.Addr().String())
	}
	for _, l := range d.nativeListeners {
		args = append(args, "native", l.Addr().String())
	}
	if d.iscsiListen != nil {
		args = append(args, "iscsi", d.iscsiListen.Addr().String())
	}
	if d.adminListen != nil {
		args = append(args, "admin", d.adminListen.Addr().String())
	}
	d.log.Info("sheep is running", args...)
	if err := d.node.Ready(); err != nil {
		d.log.Warn("not serving volumes yet", "reason", err)
	}
	d.notify("READY=1")
}
