package main

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"sheepdog/frontends/admin/api"
)

var recoveryGrid = grid[api.NodeRecovery]{
	{head: "Node", cell: func(n api.NodeRecovery) string { return n.Node }, raw: "node", value: func(n api.NodeRecovery) any { return n.Node }},
	{head: "State", cell: whyOf, raw: "state", value: func(n api.NodeRecovery) any { return n.State }},
	{raw: "why", value: func(n api.NodeRecovery) any { return n.Why }},
	{head: "Learning", right: true, cell: func(n api.NodeRecovery) string { return strconv.Itoa(n.Learning) }, raw: "learning", value: func(n api.NodeRecovery) any { return n.Learning }},
	{head: "Missing", right: true, cell: func(n api.NodeRecovery) string { return strconv.Itoa(n.Missing) }, raw: "missing", value: func(n api.NodeRecovery) any { return n.Missing }},
	{head: "Leaving", right: true, cell: func(n api.NodeRecovery) string { return strconv.Itoa(n.Leaving) }, raw: "leaving", value: func(n api.NodeRecovery) any { return n.Leaving }},
}

func whyOf(n api.NodeRecovery) string {
	if n.Why != "" {
		return n.State + ", " + n.Why
	}
	return n.State
}

func recoveryOf(enabled bool, outAfter int64) string {
	text := "enabled"
	if !enabled {
		text = `disabled: data stays where it is until "cluster recover enable"`
	}
	if outAfter < 0 {
		return text + "; nodes that are down are waited for without end"
	}
	return fmt.Sprintf("%s; nodes that are down are waited for %s", text, time.Duration(outAfter)*time.Second)
}

func (a *app) nodeRecovery() *cobra.Command {
	var wait bool
	c := &cobra.Command{
		Use: "recovery", Short: "Show how far data is where it shall be",
		Long: "Show how far data is where it shall be, and which nodes that concerns: they learn partitions,\nmiss some that they shall hold, or hold some until others do. With --wait it returns when\nall data is where it shall be; the exit status is 1 if that is waited for in vain.\n\n" + recoveryGrid.rawHelp(),
		Args: exactly(0),
		RunE: func(*cobra.Command, []string) error {
			r, err := a.api.Recovery(a.ctx)
			if err == nil && wait {
				r, err = a.awaitRecovery(r)
			}
			if err != nil {
				return err
			}
			return a.showRecovery(r)
		},
	}
	c.Flags().BoolVarP(&wait, "wait", "w", false, "wait until all data is where it shall be")
	return c
}

func (a *app) showRecovery(r api.Recovery) error {
	switch a.output {
	case formatRaw:
		return showList(a, recoveryGrid, r.Nodes)
	case formatJSON, formatYAML:
		return a.encode(r)
	}
	var f facts
	f.add("Recovery", a.ownName(recoveryOf(r.Enabled, r.OutAfter)))
	f.add("Partitions", strconv.Itoa(r.Partitions))
	f.add("Degraded", strconv.Itoa(r.Degraded))
	f.add("Unavailable", strconv.Itoa(r.Unavailable))
	f.add("Moving", strconv.Itoa(r.Moving))
	if len(r.Transfers) > 0 {
		f.add("Transferred", human(r.DoneBytes))
		f.add("Left", fmt.Sprintf("%d objects to be looked at, about %s to be transferred", r.LeftObjects, human(r.LeftBytes)))
		f.add("Speed", human(int64(r.BytesPerSecond))+"/s")
		f.add("Done in", etaOf(r.ETA))
	}
	f.add("Did not answer", strings.Join(r.Silent, ", "))
	text := f.String()
	if len(r.Nodes) > 0 {
		text += "\n" + recoveryGrid.table(r.Nodes)
	}
	if len(r.Transfers) > 0 {
		text += "\n" + transferGrid.table(r.Transfers)
	}
	for _, t := range r.Transfers {
		if t.Waits != "" {
			text += printable(fmt.Sprintf("%s waits: %s\n", t.Node, t.Waits))
		}
	}
	return a.write(text)
}

var transferGrid = grid[api.Transfer]{
	{head: "From", cell: func(t api.Transfer) string { return t.Source }},
	{head: "To", cell: func(t api.Transfer) string { return t.Node }},
	{head: "Partitions", right: true, cell: func(t api.Transfer) string { return strconv.Itoa(t.Partitions) }},
	{head: "Objects left", right: true, cell: func(t api.Transfer) string { return strconv.FormatInt(t.Objects, 10) }},
	{head: "Transferred", right: true, cell: func(t api.Transfer) string { return human(t.DoneBytes) }},
	{head: "Left", right: true, cell: func(t api.Transfer) string { return human(t.LeftBytes) }},
	{head: "Speed", right: true, cell: func(t api.Transfer) string { return human(int64(t.BytesPerSecond)) + "/s" }},
	{head: "Done in", right: true, cell: func(t api.Transfer) string { return etaOf(t.ETA) }},
}

func etaOf(seconds int64) string {
	if seconds < 0 {
		return "not known"
	}
	return (time.Duration(seconds) * time.Second).String()
}

// recoveryEvery is how often it is asked how far recovery is.
const recoveryEvery = 500 * time.Millisecond

// left is what is to be done yet: replicas that shall be somewhere else than they are.
func left(r api.Recovery) (n int) {
	for _, x := range r.Nodes {
		n += x.Missing + x.Leaving
	}
	return n
}

// awaitRecovery returns when all data is where it shall be.
func (a *app) awaitRecovery(r api.Recovery) (api.Recovery, error) {
	total := left(r)
	p := a.progress("partitions", int64(total), false)
	defer p.end()
	for r.Moving > 0 {
		if done := total - left(r); done < 0 {
			total = left(r)
			p.total(int64(total))
		} else {
			p.set(int64(done))
		}
		if err := a.pause(recoveryEvery); err != nil {
			return r, err
		}
		var err error
		if r, err = a.api.Recovery(a.ctx); err != nil {
			return r, err
		}
	}
	return r, nil
}

func (a *app) pause(d time.Duration) error {
	select {
	case <-a.ctx.Done():
		return &api.Error{Kind: api.KindInterrupted, Message: "interrupted; the cluster goes on"}
	case <-time.After(d):
		return nil
	}
}

var partitionGrid = grid[api.Partition]{
	{head: "Policy", right: true, cell: func(p api.Partition) string { return strconv.Itoa(p.Policy) }, raw: "policy", value: func(p api.Partition) any { return p.Policy }},
	{head: "Partition", right: true, cell: func(p api.Partition) string { return strconv.Itoa(p.Partition) }, raw: "partition", value: func(p api.Partition) any { return p.Partition }},
	{head: "Epoch", right: true, cell: func(p api.Partition) string { return strconv.FormatUint(p.Epoch, 10) }, raw: "epoch", value: func(p api.Partition) any { return p.Epoch }},
	{head: "In sync", cell: func(p api.Partition) string { return strings.Join(p.InSync, " ") }, raw: "in_sync", value: func(p api.Partition) any { return strings.Join(p.InSync, ",") }},
	{head: "Targets", cell: func(p api.Partition) string { return strings.Join(p.Targets, " ") }, raw: "targets", value: func(p api.Partition) any { return strings.Join(p.Targets, ",") }},
	{head: "Learners", cell: func(p api.Partition) string { return strings.Join(p.Learners, " ") }, raw: "learners", value: func(p api.Partition) any { return strings.Join(p.Learners, ",") }},
}

func (a *app) clusterPartitions() *cobra.Command {
	var node string
	var moving bool
	c := &cobra.Command{
		Use: "partitions", Short: "Show who holds which partition",
		Long: "Show who holds which partition: the nodes that are in sync, the primary first, those that shall\nbe, and those that are being brought in sync.\n\n" + partitionGrid.rawHelp(), Args: exactly(0),
		RunE: func(*cobra.Command, []string) error {
			list, err := a.api.Partitions(a.ctx, node)
			if err != nil {
				return err
			}
			if moving {
				list = slices.DeleteFunc(list, func(p api.Partition) bool { return settled(p) })
			}
			return showList(a, partitionGrid, list)
		},
	}
	c.Flags().StringVarP(&node, "node", "n", "", "only what this `NODE` holds, shall hold, or learns")
	c.RegisterFlagCompletionFunc("node", a.nodeNames)
	c.Flags().BoolVarP(&moving, "moving", "m", false, "only those that are not held by those, and those alone, that shall hold them")
	return c
}

// settled reports whether a partition is where it shall be.
func settled(p api.Partition) bool {
	if len(p.InSync) != len(p.Targets) {
		return false
	}
	for _, n := range p.Targets {
		if !slices.Contains(p.InSync, n) {
			return false
		}
	}
	return true
}

var namesGrid = grid[string]{{raw: "node", value: func(s string) any { return s }}}

func (a *app) clusterRecover() *cobra.Command {
	set := func(use, short, long string, enabled bool) *cobra.Command {
		return &cobra.Command{
			Use: use, Short: short, Long: long + "\n\n" + recoveryGrid.rawHelp(), Args: exactly(0),
			RunE: func(*cobra.Command, []string) error {
				r, err := a.api.SetRecovery(a.ctx, api.RecoverySettings{Enabled: &enabled})
				if err != nil {
					return err
				}
				return a.recoverySet(r)
			},
		}
	}
	enable := set("enable", "Let data be moved", "Let data be moved when nodes join, are down for long, are drained, or change their weight.\nThat is how it is unless somebody has disabled it.", true)
	disable := set("disable", "Have data stay where it is", "Have data stay where it is whatever becomes of nodes, for instance while several are being\nserviced. Nodes that come back still catch up with what they hold.", false)
	force := &cobra.Command{
		Use: "force", Short: "Bring the data of nodes that are down elsewhere now",
		Long: "Bring the data of nodes that are down elsewhere now, instead of waiting for them. A node that\ncomes back holds data again.\n\n" + namesGrid.rawHelp(), Args: exactly(0),
		RunE: func(*cobra.Command, []string) error {
			v, err := a.api.ForceRecovery(a.ctx)
			switch {
			case err != nil:
				return err
			case a.output == formatRaw:
				return a.rawNames(v)
			case a.output != formatTable:
				return a.encode(v)
			case len(v.Nodes) == 0:
				return a.say("no node is down that holds data: there is nothing to do")
			}
			return a.say("what %s held is brought to others", strings.Join(v.Nodes, ", "))
		},
	}
	return a.group("recover", "Say when data is moved", enable, disable, force, a.recoverAfter())
}

func (a *app) recoverAfter() *cobra.Command {
	return &cobra.Command{
		Use: "after TIME", Short: "Set how long nodes that are down are waited for",
		Long: "Set how long nodes that are down are waited for before their data is brought elsewhere: a time\nlike 90s, 20m or 8h, \"default\" (10m), or \"never\".\n\n" + recoveryGrid.rawHelp(), Args: exactly(1),
		ValidArgs: []string{"default", "never"},
		RunE: func(_ *cobra.Command, args []string) error {
			seconds, err := parseAfter(args[0])
			if err != nil {
				return err
			}
			r, err := a.api.SetRecovery(a.ctx, api.RecoverySettings{OutAfter: &seconds})
			if err != nil {
				return err
			}
			return a.recoverySet(r)
		},
	}
}

// parseAfter gives seconds as the API has them.
func parseAfter(text string) (int64, error) {
	switch text {
	case "default":
		return 0, nil
	case "never":
		return -1, nil
	}
	d, err := time.ParseDuration(text)
	if err != nil || d < time.Second {
		return 0, usagef("%q is not a time of at least a second, like 90s, 20m or 8h", text)
	}
	return int64(d / time.Second), nil
}

func (a *app) recoverySet(r api.Recovery) error {
	if a.output != formatTable {
		return a.showRecovery(r)
	}
	return a.say("recovery is %s", a.ownName(recoveryOf(r.Enabled, r.OutAfter)))
}

func (a *app) clusterAlterCopy() *cobra.Command {
	var copiesWanted int
	c := &cobra.Command{
		Use: "alter-copy -c COPIES", Short: "Set how many copies new VDIs keep",
		Long: "Set how many copies VDIs keep that are made from now on and do not choose. VDIs that are there\nkeep what they have.\n\n" + clusterGrid.rawHelp(), Args: exactly(0),
		RunE: func(*cobra.Command, []string) error {
			if copiesWanted < 1 {
				return usagef("say how many copies with -c")
			}
			v, err := a.api.SetCopies(a.ctx, copiesWanted)
			if err != nil {
				return err
			}
			return done(a, clusterGrid, v, "new VDIs keep %s", copies(v.DefaultCopies))
		},
	}
	c.Flags().IntVarP(&copiesWanted, "copies", "c", 0, "`N`umber of copies")
	return c
}
