// Package admintest has a sheep for tests of the admin API and its clients: a real API and
// real volumes, as the test gives them, on a cluster and disks that are made up.
package admintest

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"sheepdog/frontends/admin"
	"sheepdog/frontends/admin/api"
	"sheepdog/storage/object"
	"sheepdog/vdi"
)

// Then is when everything that is made up happened.
var Then = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

// Sheep is the sheep. Its fields may be changed under its lock.
type Sheep struct {
	Address string
	Level   slog.LevelVar

	sync.Mutex
	Formatted bool
	Copies    int
	Disks     []api.Disk
	Clients   []api.Session
	Stopped   bool // a shutdown was asked for
	Flock     *Flock

	name string
	stop context.CancelFunc
	done chan struct{}
}

// Start starts a sheep with volumes; change may change its configuration. It ends with the
// test.
func Start(t testing.TB, volumes admin.Volumes, change func(*admin.Config)) *Sheep {
	t.Helper()
	s := newSheep("n1")
	cfg := s.config(volumes)
	cfg.Shutdown = s.shutdown
	if change != nil {
		change(&cfg)
	}
	server, err := admin.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.Address = l.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	s.stop = cancel
	go func() {
		defer close(s.done)
		if err := server.Serve(ctx, l); err != nil {
			t.Errorf("serve: %v", err)
		}
	}()
	t.Cleanup(s.Stop)
	return s
}

func newSheep(name string) *Sheep {
	return &Sheep{Formatted: true, Copies: 1, name: name, done: make(chan struct{}), Disks: []api.Disk{{
		ID: strings.Replace(name, "n", "d", 1), Path: "/disk", State: api.DiskOK, TotalBytes: 100 << 30, UsedBytes: 25 << 30, FreeBytes: 75 << 30, Objects: 1000, LogBytes: 1 << 20, LogLimit: 512 << 20,
		Partitions: 256, Moves: api.Moves{ToGo: 12},
		Scrub: api.Scrub{Running: true, Done: 0.5}, Errors: map[string]uint64{"checksum": 0},
	}}}
}

func (s *Sheep) config(volumes admin.Volumes) admin.Config {
	return admin.Config{
		Volumes: volumes, Cluster: cluster{s}, Node: s.name, Version: "v0", Level: &s.Level, Now: func() time.Time { return Then },
		Disks:    func() []api.Disk { s.Lock(); defer s.Unlock(); return append([]api.Disk(nil), s.Disks...) },
		Sessions: []admin.SessionSource{(*sessions)(s)},
		Exports:  func() []admin.ExportPoint { return []admin.ExportPoint{admin.NBDExports("127.0.0.1:10809")} },
		Plugs:    (*plugs)(s),
	}
}

// Stop stops the sheep and waits for that.
func (s *Sheep) Stop() {
	s.stop()
	<-s.done
}

func (s *Sheep) shutdown() {
	s.Lock()
	s.Stopped = true
	s.Unlock()
	s.stop()
}

type cluster struct{ *Sheep }

// Info implements admin.Cluster.
func (c cluster) Info() api.Cluster {
	c.Lock()
	defer c.Unlock()
	if !c.Formatted {
		return api.Cluster{Status: api.StatusUnformatted, Reason: `run "dog cluster format"`, Node: c.name}
	}
	then := Then
	i := api.Cluster{
		Formatted: true, ID: "c1d2", Name: "sheepdog", Created: &then, Epoch: 3, Status: api.StatusOK, Node: c.name, Leader: c.name == "n1",
		DefaultCopies: c.Copies, ObjectSize: 4 << 20, Policies: []api.Policy{{ID: 1, Copies: c.Copies, MinInSync: 1, Partitions: 64}},
	}
	i.LeaderNode, i.NodesUp, i.Recovery, i.OutAfter = "n1", 1, !c.flock().hold, c.flock().outAfter
	if c.Flock != nil {
		i.NodesUp, i.NodesDown = 3, 1
	}
	if c.Copies > 1 {
		i.Status, i.Reason = api.StatusDegraded, "there are fewer replicas than copies asked for: add nodes with disks"
		i.Policies[0].Degraded = 64
	}
	return i
}

// Nodes implements admin.Cluster.
func (c cluster) Nodes() []api.Node {
	c.Lock()
	defer c.Unlock()
	if !c.Formatted {
		return nil
	}
	if c.Flock != nil {
		return c.Flock.members(c.name)
	}
	return []api.Node{{
		ID: 1, Name: "n1", Address: "127.0.0.1", Zone: "n1", State: "up", Since: Then, Incarnation: 2, Disks: 1, Weight: 102400, Percent: 100,
		Replicas: 64, Primaries: 64, Targets: 64, Leader: true, Self: true,
	}}
}

// Format implements admin.Cluster.
func (c cluster) Format(_ context.Context, o admin.FormatOptions) error {
	c.Lock()
	defer c.Unlock()
	if c.Formatted {
		return fmt.Errorf("format cluster: the node is in cluster c1d2: %w", vdi.ErrExists)
	}
	c.Formatted, c.Copies = true, o.Copies
	return nil
}

// Locate implements admin.Cluster.
func (c cluster) Locate(_ object.PolicyID, id object.ID) (api.Placement, error) {
	return api.Placement{Partition: int(object.PartitionOf(id, 64)), Nodes: []string{"n1"}}, nil
}

// Ready implements admin.Cluster.
func (c cluster) Ready() error {
	c.Lock()
	defer c.Unlock()
	if !c.Formatted {
		return fmt.Errorf(`the cluster is not formatted: run "dog cluster format": %w`, object.ErrUnavailable)
	}
	return nil
}

type sessions Sheep

// Sessions implements admin.SessionSource.
func (s *sessions) Sessions() []api.Session {
	s.Lock()
	defer s.Unlock()
	return append([]api.Session(nil), s.Clients...)
}
