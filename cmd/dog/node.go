package main

import (
	"fmt"
	"sort"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"sheepdog/frontends/admin/api"
)

var nodeGrid = grid[api.Node]{
	{head: "Id", right: true, cell: func(n api.Node) string { return strconv.Itoa(n.ID) }, raw: "id", value: func(n api.Node) any { return n.ID }},
	{head: "Name", cell: func(n api.Node) string { return n.Name }, raw: "name", value: func(n api.Node) any { return n.Name }},
	{head: "Address", cell: func(n api.Node) string { return n.Address }, raw: "address", value: func(n api.Node) any { return n.Address }},
	{head: "Zone", cell: func(n api.Node) string { return n.Zone }, raw: "zone", value: func(n api.Node) any { return n.Zone }},
	{head: "State", cell: stateOf, raw: "state", value: func(n api.Node) any { return n.State }},
	{head: "Disks", right: true, cell: func(n api.Node) string { return strconv.Itoa(n.Disks) }, raw: "disks", value: func(n api.Node) any { return n.Disks }},
	{head: "Weight", right: true, cell: func(n api.Node) string { return strconv.FormatUint(n.Weight, 10) }, raw: "weight", value: func(n api.Node) any { return n.Weight }},
	{head: "Replicas", right: true, cell: func(n api.Node) string { return strconv.Itoa(n.Replicas) }, raw: "replicas", value: func(n api.Node) any { return n.Replicas }},
	{head: "Primaries", right: true, cell: func(n api.Node) string { return strconv.Itoa(n.Primaries) }, raw: "primaries", value: func(n api.Node) any { return n.Primaries }},
	{raw: "since", value: func(n api.Node) any { return n.Since }},
	{raw: "percent", value: func(n api.Node) any { return n.Percent }},
	{raw: "drain", value: func(n api.Node) any { return n.Drain }},
	{raw: "out", value: func(n api.Node) any { return n.Out }},
	{raw: "targets", value: func(n api.Node) any { return n.Targets }},
	{raw: "learning", value: func(n api.Node) any { return n.Learning }},
	{raw: "leader", value: func(n api.Node) any { return n.Leader }},
	{raw: "votes", value: func(n api.Node) any { return n.Votes }},
}

// stateOf is a node's state for people.
func stateOf(n api.Node) string {
	state := n.State
	switch {
	case n.Drain && n.Replicas > 0:
		state += ", draining"
	case n.Drain:
		state += ", drained"
	case n.Out:
		state += ", out"
	}
	if n.Percent != 100 && !n.Gateway {
		state += fmt.Sprintf(", %d%%", n.Percent)
	}
	return state
}

var statusGrid = grid[api.NodeStatus]{
	{raw: "id", value: func(n api.NodeStatus) any { return n.ID }},
	{raw: "size", value: func(n api.NodeStatus) any { return n.TotalBytes }},
	{raw: "used", value: func(n api.NodeStatus) any { return n.UsedBytes }},
	{raw: "free", value: func(n api.NodeStatus) any { return n.FreeBytes }},
	{raw: "use_percent", value: func(n api.NodeStatus) any { return percent(n.UsedBytes, n.TotalBytes) }},
	{raw: "ready", value: func(n api.NodeStatus) any { return n.Ready }},
	{raw: "name", value: func(n api.NodeStatus) any { return n.Name }},
}

var diskGrid = grid[api.Disk]{
	{head: "Path", cell: func(d api.Disk) string { return d.Path }, raw: "path", value: func(d api.Disk) any { return d.Path }},
	{raw: "id", value: func(d api.Disk) any { return d.ID }},
	{head: "State", cell: func(d api.Disk) string { return d.State }, raw: "state", value: func(d api.Disk) any { return d.State }},
	{head: "Weight", right: true, cell: func(d api.Disk) string { return strconv.FormatUint(d.Weight, 10) }},
	{head: "Size", right: true, cell: func(d api.Disk) string { return human(d.TotalBytes) }, raw: "size", value: func(d api.Disk) any { return d.TotalBytes }},
	{head: "Used", right: true, cell: func(d api.Disk) string { return human(d.UsedBytes) }, raw: "used", value: func(d api.Disk) any { return d.UsedBytes }},
	{head: "Free", right: true, cell: func(d api.Disk) string { return human(d.FreeBytes) }, raw: "free", value: func(d api.Disk) any { return d.FreeBytes }},
	{head: "Use%", right: true, cell: func(d api.Disk) string { return strconv.Itoa(percent(d.UsedBytes, d.TotalBytes)) + "%" }, raw: "use_percent",
		value: func(d api.Disk) any { return percent(d.UsedBytes, d.TotalBytes) }},
	{head: "Objects", right: true, cell: func(d api.Disk) string { return strconv.FormatInt(d.Objects, 10) }, raw: "objects", value: func(d api.Disk) any { return d.Objects }},
	{head: "Partitions", right: true, cell: partitions},
	{head: "Log", right: true, cell: func(d api.Disk) string { return human(d.LogBytes) }, raw: "log", value: func(d api.Disk) any { return d.LogBytes }},
	{head: "Scrub", right: true, cell: scrub, raw: "scrub_done", value: func(d api.Disk) any { return fmt.Sprintf("%.4f", d.Scrub.Done) }},
	{raw: "scrub_last", value: func(d api.Disk) any { return d.Scrub.LastEnd }},
	{head: "Corrupt", right: true, cell: func(d api.Disk) string { return strconv.Itoa(len(d.Corrupt)) }, raw: "corrupt", value: func(d api.Disk) any { return len(d.Corrupt) }},
	{head: "Errors", right: true, cell: func(d api.Disk) string { return strconv.FormatUint(errorsOf(d), 10) }, raw: "errors", value: func(d api.Disk) any { return errorsOf(d) }},
	{raw: "node", value: func(d api.Disk) any { return d.Node }},
	{raw: "weight", value: func(d api.Disk) any { return d.Weight }},
	{raw: "partitions", value: func(d api.Disk) any { return d.Partitions }},
	{raw: "to_come", value: func(d api.Disk) any { return d.Moves.ToCome }},
	{raw: "to_go", value: func(d api.Disk) any { return d.Moves.ToGo }},
}

// partitions of a disk, and those that are still to be moved to or from it.
func partitions(d api.Disk) string {
	text := strconv.Itoa(d.Partitions)
	if d.Moves.ToCome > 0 {
		text += fmt.Sprintf(", %d to come", d.Moves.ToCome)
	}
	if d.Moves.ToGo > 0 {
		text += fmt.Sprintf(", %d to go", d.Moves.ToGo)
	}
	return text
}

// nodeColumn is shown where things of several nodes are.
func nodeColumn[T any](of func(T) string) column[T] {
	return column[T]{head: "Node", cell: of}
}

func percent(part, whole int64) int {
	if whole <= 0 {
		return 0
	}
	return int(float64(part)/float64(whole)*100 + 0.5)
}

func scrub(d api.Disk) string {
	switch {
	case d.Scrub.Running:
		return fmt.Sprintf("%.0f%%", d.Scrub.Done*100)
	case d.Scrub.LastEnd != nil:
		return "done"
	}
	return "-"
}

func errorsOf(d api.Disk) (n uint64) {
	for _, x := range d.Errors {
		n += x
	}
	return n
}

func (a *app) nodeCommands() *cobra.Command {
	md := a.group("md", "The disks of nodes", a.diskInfo(), a.diskPlug(), a.diskUnplug())
	log := a.group("log", "The log of a node", a.logLevel())
	return a.group("node", "Show and manage nodes and disks", a.nodeList(), a.nodeInfo(), a.nodeRecovery(),
		a.nodeDrain(), a.nodeUndrain(), a.nodeWeight(), a.nodeRemove(), a.nodeGiveUp(), a.nodeShutdown(), md, log)
}

// nodeFlag is for commands about one node, which need not be the one that is asked.
func (a *app) nodeFlag(c *cobra.Command, node *string) {
	c.Flags().StringVarP(node, "node", "n", "", "name or number of the `NODE` that is meant; default: the one that is asked")
	c.RegisterFlagCompletionFunc("node", a.nodeNames)
}

func (a *app) nodeList() *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: "List the members of the cluster", Long: "List the members of the cluster.\n\n" + nodeGrid.rawHelp(), Args: exactly(0),
		RunE: func(*cobra.Command, []string) error {
			list, err := a.api.Nodes(a.ctx)
			if err != nil {
				return err
			}
			return showList(a, nodeGrid, list)
		},
	}
}

func (a *app) nodeInfo() *cobra.Command {
	var node string
	c := &cobra.Command{
		Use: "info", Short: "Show how a node is doing", Long: "Show how a node is doing.\n\n" + statusGrid.rawHelp(), Args: exactly(0),
		RunE: func(*cobra.Command, []string) error {
			n, err := a.api.Node(a.ctx, node)
			if err != nil {
				return err
			}
			return showOne(a, statusGrid, n, a.nodeFacts(n))
		},
	}
	a.nodeFlag(c, &node)
	return c
}

func (a *app) nodeFacts(n api.NodeStatus) facts {
	var f facts
	f.add("Node", n.Name)
	f.add("Version", n.Version)
	f.add("Started", a.when(n.Started))
	f.add("Ready", map[bool]string{true: "yes", false: "no: " + a.ownName(n.Reason)}[n.Ready])
	f.add("Space", fmt.Sprintf("%s used, %s free of %s (%d%%) on %s", human(n.UsedBytes), human(n.FreeBytes), human(n.TotalBytes), percent(n.UsedBytes, n.TotalBytes), disks(len(n.Disks))))
	for _, d := range n.Disks {
		if d.State != api.DiskOK {
			f.add("Disk "+d.Path, strings.TrimSuffix(d.State+": "+d.Reason, ": "))
		}
	}
	f.add("Sessions", strconv.Itoa(n.Sessions))
	f.add("Deletions", fmt.Sprintf("%d to be freed, %d objects removed since the start", n.GC.Pending, n.GC.Deleted))
	f.add("Collector", n.GC.LastError)
	f.add("Log level", n.LogLevel)
	return f
}

func disks(n int) string {
	if n == 1 {
		return "1 disk"
	}
	return strconv.Itoa(n) + " disks"
}

func (a *app) diskInfo() *cobra.Command {
	var node string
	var all bool
	c := &cobra.Command{
		Use: "info", Short: "Show the disks of a node, or of all",
		Long: "Show the disks of a node, or of all, and which objects on them are known to be corrupt. Weight\nis a disk's share of the data, in MiB unless somebody chose otherwise. Partitions go to a disk that was added\nuntil it has its share, and from one that is taken out, in the background.\n\n" + diskGrid.rawHelp(), Args: exactly(0),
		RunE: func(*cobra.Command, []string) error {
			if all && node != "" {
				return usagef("--all and --node exclude each other")
			}
			list, g, err := a.disks(node, all)
			if err != nil {
				return err
			}
			if err := showList(a, g, list); err != nil || a.output != formatTable {
				return err
			}
			return a.write(diskTroubles(list))
		},
	}
	a.nodeFlag(c, &node)
	c.Flags().BoolVarP(&all, "all", "A", false, "the disks of all nodes")
	return c
}

func (a *app) disks(node string, all bool) ([]api.Disk, grid[api.Disk], error) {
	if !all {
		list, err := a.api.Disks(a.ctx, node)
		return list, diskGrid, err
	}
	list, err := a.api.AllDisks(a.ctx)
	return list, append(grid[api.Disk]{nodeColumn(func(d api.Disk) string { return d.Node })}, diskGrid...), err
}

// diskTroubles says what a table has no room for.
func diskTroubles(list []api.Disk) string {
	var b strings.Builder
	for _, d := range list {
		if d.State != api.DiskOK && d.Reason != "" {
			fmt.Fprintf(&b, "%s is %s: %s\n", printable(d.Path), d.State, printable(d.Reason))
		}
		if d.Moves.Waiting != "" {
			fmt.Fprintf(&b, "%s: partitions wait to be moved: %s\n", printable(d.Path), printable(d.Moves.Waiting))
		}
		for _, o := range d.Corrupt {
			fmt.Fprintf(&b, "%s: object %s is corrupt in blocks %s\n", printable(d.Path), o.Object, numbers(o.Blocks))
		}
		kinds := make([]string, 0, len(d.Errors))
		for k, n := range d.Errors {
			if n > 0 {
				kinds = append(kinds, fmt.Sprintf("%d × %s", n, k))
			}
		}
		if sort.Strings(kinds); len(kinds) > 0 {
			fmt.Fprintf(&b, "%s: errors since the start: %s\n", printable(d.Path), printable(strings.Join(kinds, ", ")))
		}
	}
	return b.String()
}

func numbers(list []uint32) string {
	text := make([]string, len(list))
	for i, n := range list {
		text[i] = strconv.FormatUint(uint64(n), 10)
	}
	return strings.Join(text, ", ")
}

var levelGrid = grid[api.LogLevel]{{raw: "level", value: func(l api.LogLevel) any { return l.Level }}}

func (a *app) logLevel() *cobra.Command {
	levels := []string{"debug", "info", "warn", "error"}
	var node string
	c := &cobra.Command{
		Use: "level [LEVEL]", Short: "Show or set the level of the log",
		Long: "Show the level of the log, or set it until the sheep ends. Levels are debug, info, warn and error.\n\n" + levelGrid.rawHelp(),
		Args: between(0, 1), ValidArgs: levels,
		RunE: func(_ *cobra.Command, args []string) error {
			level, err := a.setLevel(node, levels, args)
			if err != nil {
				return err
			}
			return done(a, levelGrid, level, "%s", level.Level)
		},
	}
	a.nodeFlag(c, &node)
	return c
}

func (a *app) setLevel(node string, levels, args []string) (api.LogLevel, error) {
	if len(args) == 0 {
		return a.api.LogLevel(a.ctx, node)
	}
	for _, l := range levels {
		if args[0] == l {
			return a.api.SetLogLevel(a.ctx, node, l)
		}
	}
	return api.LogLevel{}, usagef("there is no log level %q: %s are known", args[0], strings.Join(levels, ", "))
}
