package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"sheepdog/frontends/admin/api"
)

// nodeNames completes with the names of nodes.
func (a *app) nodeNames(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 || a.prepare(cmd, nil) != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	ctx, cancel := context.WithTimeout(a.ctx, completionTimeout)
	defer cancel()
	list, err := a.api.Nodes(ctx)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp // there is nobody to tell
	}
	names := make([]string, len(list))
	for i, n := range list {
		names[i] = n.Name
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

// onNode makes a command whose first argument is a node.
func (a *app) onNode(use, short, long string, args cobra.PositionalArgs, run func(args []string) error) *cobra.Command {
	return &cobra.Command{
		Use: use, Short: short, Long: long, Args: args, ValidArgsFunction: a.nodeNames,
		RunE: func(_ *cobra.Command, args []string) error { return run(args) },
	}
}

func (a *app) nodeDrain() *cobra.Command {
	var undo, force, wait bool
	c := a.onNode("drain NODE", "Bring a node's data to others",
		"Bring a node's data to others. The node stays in sync with what it holds until others are, so\nno volume has fewer copies meanwhile. Then it can be stopped, removed, or undrained.\n\n"+nodeGrid.rawHelp(),
		exactly(1), func(args []string) error {
			if undo {
				if force || wait {
					return usagef("--undo goes with neither --force nor --wait")
				}
				return a.undrain(args[0])
			}
			n, err := a.api.Drain(a.ctx, args[0], force)
			if err == nil && wait {
				n, err = a.awaitEmpty(n)
			}
			if err != nil {
				return err
			}
			if n.Replicas == 0 {
				return done(a, nodeGrid, n, "node %s is drained: it holds nothing", n.Name)
			}
			return done(a, nodeGrid, n, `node %s is being drained and holds %d partitions yet: %s shows how far it is`, n.Name, n.Replicas, a.ownName(`"dog node recovery"`))
		})
	c.Flags().BoolVar(&undo, "undo", false, "let the node hold data again")
	c.Flags().BoolVar(&force, "force", false, "also if fewer nodes than copies are left")
	c.Flags().BoolVarP(&wait, "wait", "w", false, "wait until the node holds nothing")
	return c
}

// awaitEmpty returns when a node holds nothing.
func (a *app) awaitEmpty(n api.Node) (api.Node, error) {
	total := n.Replicas
	p := a.progress("partitions", int64(total), false)
	defer p.end()
	for n.Replicas > 0 {
		p.set(int64(max(0, total-n.Replicas)))
		if err := a.pause(recoveryEvery); err != nil {
			return n, err
		}
		list, err := a.api.Nodes(a.ctx)
		if err != nil {
			return n, err
		}
		found := false
		for _, m := range list {
			if m.ID == n.ID {
				n, found = m, true
			}
		}
		switch {
		case !found:
			return n, fmt.Errorf("node %s was removed meanwhile", n.Name)
		case !n.Drain:
			return n, fmt.Errorf("node %s is not drained any more: somebody wants it to hold data", n.Name)
		}
	}
	return n, nil
}

func (a *app) nodeUndrain() *cobra.Command {
	return a.onNode("undrain NODE", "Let a node hold data again", "Let a node hold data again that was drained, or is being drained.\n\n"+nodeGrid.rawHelp(), exactly(1),
		func(args []string) error { return a.undrain(args[0]) })
}

func (a *app) undrain(node string) error {
	n, err := a.api.Undrain(a.ctx, node)
	if err != nil {
		return err
	}
	return done(a, nodeGrid, n, "node %s holds data again", n.Name)
}

func (a *app) nodeWeight() *cobra.Command {
	return a.onNode("weight NODE PERCENT", "Set how much data a node holds",
		"Set how much data a node holds, in percent (1 to 1000) of what its disks' sizes would give it.\nTo empty a node, drain it.\n\n"+nodeGrid.rawHelp(), exactly(2), func(args []string) error {
			var percent int
			if _, err := fmt.Sscanf(args[1]+"\n", "%d\n", &percent); err != nil {
				return usagef("%q is not a number of percent", args[1])
			}
			n, err := a.api.SetWeight(a.ctx, args[0], percent)
			if err != nil {
				return err
			}
			return done(a, nodeGrid, n, "node %s holds what %d%% of its disks' sizes stands for", n.Name, n.Percent)
		})
}

func (a *app) nodeRemove() *cobra.Command {
	var force string
	c := a.onNode("remove NODE", "Make a node one that is gone for good",
		"Make a node one that is gone for good. It must be down, or drained and empty: then it is\nstopped. What is left of it can never be a member again; a new node may have its name. A node\nthat alone has some of the data is removed only with --force and its name, and that is lost.\n\nColumns with -r: node.",
		exactly(1), func(args []string) error {
			v, err := a.api.RemoveNode(a.ctx, args[0], force)
			switch {
			case err != nil:
				return err
			case a.output == formatRaw:
				return a.rawNames(v)
			case a.output != formatTable:
				return a.encode(v)
			}
			return a.say("node %s is removed", v.Nodes[0])
		})
	c.Flags().StringVar(&force, "force", "", "the node's `NAME`: what only it has is lost")
	return c
}

var lostGrid = grid[api.Lost]{
	{raw: "node", value: func(l api.Lost) any { return l.Node }},
	{raw: "partitions", value: func(l api.Lost) any { return l.Partitions }},
}

func (a *app) nodeGiveUp() *cobra.Command {
	var force string
	c := a.onNode("give-up NODE", "Declare lost what only a node's missing disks had, or its older copy lacks",
		"Declare lost what only a node had on disks that it has started without, or what is missing in an\nolder copy of the node, as from a backup. The volumes can be used again then, but what was\nwritten there is gone for good: first try to put the disks, or the newest that there is, back\nand to start the node anew. Tells how much it is; only with --force and the node's name it is done.\n\n"+lostGrid.rawHelp(),
		exactly(1), func(args []string) error {
			l, err := a.api.GiveUpDisks(a.ctx, args[0], force)
			if err != nil {
				return err
			}
			return done(a, lostGrid, l, `%d partitions of node %s are given up: %s tells which volumes have lost something`, l.Partitions, l.Node, a.ownName(`"dog vdi check"`))
		})
	c.Flags().StringVar(&force, "force", "", "the node's `NAME`: what only its missing disks had is lost")
	return c
}

func (a *app) nodeShutdown() *cobra.Command {
	c := a.onNode("shutdown [NODE]", "Stop a node in an orderly way",
		"Stop a node in an orderly way: what is under way is finished, and others take over. Without\nNODE it is the one that is asked. Returns when it has stopped.\n\nColumns with -r: node.",
		between(0, 1), func(args []string) error {
			node := ""
			if len(args) > 0 {
				node = args[0]
			}
			asked, err := a.api.Node(a.ctx, "")
			if err != nil {
				return err
			}
			v, err := a.api.ShutdownNode(a.ctx, node)
			if err != nil {
				return err
			}
			if len(v.Nodes) == 1 && v.Nodes[0] == asked.Name {
				err = a.awaitEnd()
			}
			if err != nil {
				return err
			}
			return a.stopped(v)
		})
	return c
}

func (a *app) diskPlug() *cobra.Command {
	var node string
	var empty bool
	c := &cobra.Command{
		Use: "plug DIR", Short: "Add a disk to a node while it runs",
		Long: "Add a disk, which is an empty directory on the node. The node then gets its share of the data,\nand the disk takes its share of what the node's other disks have, in the background: see \"dog node md info\".\nAdd the directory to node.disks of the node's configuration, too. With --empty the directory may be\na disk of this node that was away while others made anew what it held: that is old, and is removed first. It is\nrefused while the missing disk may hold what nobody else has.\n\n" + diskGrid.rawHelp(), Args: exactly(1),
		RunE: func(_ *cobra.Command, args []string) error {
			d, err := a.api.Plug(a.ctx, node, api.DiskRequest{Path: args[0], Empty: empty})
			if err != nil {
				return err
			}
			return done(a, diskGrid, d, "disk %s of node %s is in use: add it to node.disks of its configuration", d.Path, d.Node)
		},
	}
	a.nodeFlag(c, &node)
	c.Flags().BoolVar(&empty, "empty", false, "remove what a disk of this node holds that was away")
	return c
}

func (a *app) diskUnplug() *cobra.Command {
	var node string
	c := &cobra.Command{
		Use: "unplug DISK", Short: "Take a disk out of a node while it runs",
		Long: "Take a disk, named by its directory or its id, out of a node. What it holds goes to the node's other\ndisks. What they have no space for is made anew from other nodes; the disk stays while the node alone has some of\nthat. That takes as long as there is much on the disk: \"dog node md info\" shows how far it is, and the command may be\nrepeated until it succeeds. Remove the directory from node.disks of the node's configuration, too.\n\n" + diskGrid.rawHelp(), Args: exactly(1),
		RunE: func(_ *cobra.Command, args []string) error {
			d, err := a.api.Unplug(a.ctx, node, args[0])
			if err != nil {
				return err
			}
			return done(a, diskGrid, d, "disk %s of node %s is out: remove it from node.disks of its configuration", d.Path, d.Node)
		},
	}
	a.nodeFlag(c, &node)
	return c
}
