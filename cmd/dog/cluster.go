package main

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"sheepdog/frontends/admin/api"
)

var clusterGrid = grid[api.Cluster]{
	{raw: "status", value: func(c api.Cluster) any { return c.Status }},
	{raw: "id", value: func(c api.Cluster) any { return c.ID }},
	{raw: "name", value: func(c api.Cluster) any { return c.Name }},
	{raw: "created", value: func(c api.Cluster) any { return c.Created }},
	{raw: "epoch", value: func(c api.Cluster) any { return c.Epoch }},
	{raw: "copies", value: func(c api.Cluster) any { return c.DefaultCopies }},
	{raw: "object_size", value: func(c api.Cluster) any { return c.ObjectSize }},
	{raw: "node", value: func(c api.Cluster) any { return c.Node }},
	{raw: "leader", value: func(c api.Cluster) any { return c.Leader }},
	{raw: "leader_node", value: func(c api.Cluster) any { return c.LeaderNode }},
	{raw: "nodes_up", value: func(c api.Cluster) any { return c.NodesUp }},
	{raw: "nodes_down", value: func(c api.Cluster) any { return c.NodesDown }},
	{raw: "recovery", value: func(c api.Cluster) any { return c.Recovery }},
	{raw: "out_after", value: func(c api.Cluster) any { return c.OutAfter }},
}

func (a *app) clusterCommands() *cobra.Command {
	return a.group("cluster", "Format, show, check, manage and stop a cluster", a.clusterFormat(), a.clusterInfo(), a.clusterCheck(),
		a.clusterPartitions(), a.clusterRecover(), a.clusterAlterCopy(), a.clusterShutdown())
}

func (a *app) clusterFormat() *cobra.Command {
	q := api.FormatRequest{}
	var size sizeFlag
	c := &cobra.Command{
		Use:   "format",
		Short: "Make a new cluster with this sheep as its first member",
		Long:  "Make a new cluster with this sheep as its first member. It is refused if the sheep is in one: no data is ever lost by it.\n\n" + clusterGrid.rawHelp(),
		Args:  exactly(0),
		RunE: func(*cobra.Command, []string) error {
			if q.Copies < 1 {
				return usagef("%d copies make no sense", q.Copies)
			}
			q.ObjectSize = size.n
			v, err := a.api.Format(a.ctx, q)
			if err != nil {
				return err
			}
			return done(a, clusterGrid, v, "cluster %s is formatted: %s, id %s", v.Name, copies(v.DefaultCopies), v.ID)
		},
	}
	c.Flags().IntVarP(&q.Copies, "copies", "c", 3, "`N`umber of copies of volumes that do not choose")
	c.Flags().Var(&size, "object-size", "size of objects of volumes that do not choose, a power of two from 1M to 2G (default 4M)")
	c.Flags().StringVar(&q.Name, "name", "", "name of the cluster, for people (default sheepdog)")
	return c
}

func copies(n int) string {
	if n == 1 {
		return "1 copy"
	}
	return strconv.Itoa(n) + " copies"
}

func (a *app) clusterInfo() *cobra.Command {
	return &cobra.Command{
		Use: "info", Short: "Show what the cluster is like, and how it is", Long: "Show what the cluster is like, and how it is.\n\n" + clusterGrid.rawHelp(),
		Args: exactly(0),
		RunE: func(*cobra.Command, []string) error {
			v, err := a.api.Cluster(a.ctx)
			if err != nil {
				return err
			}
			return showOne(a, clusterGrid, v, a.clusterFacts(v))
		},
	}
}

func (a *app) clusterFacts(v api.Cluster) facts {
	var f facts
	f.add("Status", v.Status)
	f.add("Reason", a.ownName(v.Reason))
	f.add("Node asked", v.Node)
	if !v.Formatted {
		return f
	}
	f.add("Cluster", v.Name)
	f.add("Id", v.ID)
	if v.Created != nil {
		f.add("Created", a.when(*v.Created))
	}
	f.add("Epoch", strconv.FormatUint(v.Epoch, 10))
	f.add("Nodes", upAndDown(v))
	f.add("Leader", leaderOf(v))
	f.add("Recovery", recoveryOf(v.Recovery, v.OutAfter))
	f.add("Default", fmt.Sprintf("%s, objects of %s", copies(v.DefaultCopies), human(v.ObjectSize)))
	for _, p := range v.Policies {
		f.add("Policy "+strconv.Itoa(p.ID), fmt.Sprintf("%s, %d partitions: %d degraded, %d unavailable, %d recovering", copies(p.Copies), p.Partitions, p.Degraded, p.Unavailable, p.Recovering))
	}
	return f
}

func upAndDown(v api.Cluster) string {
	if v.NodesDown == 0 {
		return fmt.Sprintf("%d, all up", v.NodesUp)
	}
	return fmt.Sprintf("%d up, %d down", v.NodesUp, v.NodesDown)
}

func leaderOf(v api.Cluster) string {
	switch {
	case v.Leader:
		return v.LeaderNode + ", the node asked"
	case v.LeaderNode == "":
		return "none is known"
	}
	return v.LeaderNode
}

func (a *app) clusterCheck() *cobra.Command {
	var repair bool
	c := &cobra.Command{
		Use: "check", Short: "Check all VDIs, disks and replicas",
		Long: "Check all VDIs and the disks of all nodes, that all replicas are equal, and that what is on\nthe disks is what was written: all of it is read. The exit status is 1 if there are problems that were not repaired,\nleftovers aside: they only take space, and sweeps remove them. The same goes for what could not be searched for them.\n\n" + problemGrid.rawHelp(),
		Args: exactly(0),
		RunE: func(*cobra.Command, []string) error { return a.check("", repair) },
	}
	c.Flags().BoolVar(&repair, "repair", false, "make replicas equal, take what is corrupt from others, and remove leftovers of crashes")
	return c
}

// stopTimeout is how long shutdown waits for the sheep to end.
const stopTimeout = 60 * time.Second

func (a *app) clusterShutdown() *cobra.Command {
	var force bool
	c := &cobra.Command{
		Use: "shutdown", Short: "Stop all nodes in an orderly way",
		Long: "Stop all nodes in an orderly way: what is under way is finished, what was answered is made\ndurable, and nobody takes over from anybody, so that the cluster comes back whole when enough\nof its nodes are started again. Nothing is stopped if one of the nodes that are up cannot be\ntold. Returns when the sheep that is asked has stopped answering.\n\nColumns with -r: node.",
		Args: exactly(0),
		RunE: func(*cobra.Command, []string) error {
			v, err := a.api.Shutdown(a.ctx, force)
			if err != nil {
				return err
			}
			if err := a.awaitEnd(); err != nil {
				return err
			}
			return a.stopped(v)
		},
	}
	c.Flags().BoolVar(&force, "force", false, "stop the others if some cannot be told")
	return c
}

// stopped tells which nodes have been stopped.
func (a *app) stopped(v api.Names) error {
	switch a.output {
	case formatTable:
		if len(v.Nodes) == 1 {
			return a.say("node %s has stopped", v.Nodes[0])
		}
		return a.say("%d nodes stop: %s", len(v.Nodes), strings.Join(v.Nodes, ", "))
	case formatRaw:
		return a.rawNames(v)
	}
	return a.encode(v)
}

func (a *app) rawNames(v api.Names) error {
	var b strings.Builder
	for _, n := range v.Nodes {
		b.WriteString(rawText(n) + "\n")
	}
	return a.write(b.String())
}

// awaitEnd returns when nobody answers any more.
func (a *app) awaitEnd() error {
	deadline := time.NewTimer(stopTimeout)
	defer deadline.Stop()
	for {
		if _, err := a.api.Version(a.ctx); api.KindOf(err) == api.KindUnreachable {
			return nil
		}
		select {
		case <-a.ctx.Done():
			return &api.Error{Kind: api.KindInterrupted, Message: "interrupted; the sheep goes on stopping"}
		case <-deadline.C:
			return hint("its log says what it waits for", "the sheep at %s still answers %v after it was told to stop", a.api.Address(), stopTimeout)
		case <-time.After(100 * time.Millisecond):
		}
	}
}
