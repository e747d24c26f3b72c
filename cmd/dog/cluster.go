package main

import (
	"fmt"
	"strconv"
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
}

func (a *app) clusterCommands() *cobra.Command {
	return a.group("cluster", "Format, show, check and stop a cluster", a.clusterFormat(), a.clusterInfo(), a.clusterCheck(), a.clusterShutdown())
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
	f.add("Leader", map[bool]string{true: "the node asked", false: "another node"}[v.Leader])
	f.add("Default", fmt.Sprintf("%s, objects of %s", copies(v.DefaultCopies), human(v.ObjectSize)))
	for _, p := range v.Policies {
		f.add("Policy "+strconv.Itoa(p.ID), fmt.Sprintf("%s, %d partitions: %d degraded, %d unavailable, %d recovering", copies(p.Copies), p.Partitions, p.Degraded, p.Unavailable, p.Recovering))
	}
	return f
}

func (a *app) clusterCheck() *cobra.Command {
	var repair bool
	c := &cobra.Command{
		Use: "check", Short: "Check all VDIs, and the disks of this sheep",
		Long: "Check all VDIs, and the disks of this sheep. The exit status is 1 if there are problems that were not repaired.\n\n" + problemGrid.rawHelp(),
		Args: exactly(0),
		RunE: func(*cobra.Command, []string) error { return a.check("", repair) },
	}
	c.Flags().BoolVar(&repair, "repair", false, "remove leftovers of crashes")
	return c
}

// stopTimeout is how long shutdown waits for the sheep to end.
const stopTimeout = 60 * time.Second

func (a *app) clusterShutdown() *cobra.Command {
	return &cobra.Command{
		Use: "shutdown", Short: "Stop the sheep in an orderly way",
		Long: "Stop the sheep in an orderly way: what is under way is finished, what was answered is made durable. Returns when it has stopped answering.",
		Args: exactly(0),
		RunE: func(*cobra.Command, []string) error {
			if err := a.api.Shutdown(a.ctx); err != nil {
				return err
			}
			if err := a.awaitEnd(); err != nil {
				return err
			}
			return a.say("the sheep at %s has stopped", a.api.Address())
		},
	}
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
