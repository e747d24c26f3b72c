package main

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"sheepdog/frontends/admin/api"
)

var problemGrid = grid[api.Problem]{
	{head: "VDI", cell: func(p api.Problem) string { return p.VDI }, raw: "vdi", value: func(p api.Problem) any { return p.VDI }},
	{head: "Snapshot", cell: problemSnapshot, raw: "snapshot", value: func(p api.Problem) any { return problemSnapshot(p) }},
	{head: "Problem", cell: func(p api.Problem) string { return p.Kind }, raw: "kind", value: func(p api.Problem) any { return p.Kind }},
	{head: "Object", cell: func(p api.Problem) string { return p.Object }, raw: "object", value: func(p api.Problem) any { return p.Object }},
	{head: "Offset", right: true, cell: func(p api.Problem) string { return strconv.FormatInt(p.Off, 10) }, raw: "offset", value: func(p api.Problem) any { return p.Off }},
	{head: "Length", right: true, cell: func(p api.Problem) string { return strconv.FormatInt(p.Len, 10) }, raw: "length", value: func(p api.Problem) any { return p.Len }},
	{head: "Repaired", cell: func(p api.Problem) string { return map[bool]string{true: "yes", false: "no"}[p.Repaired] }, raw: "repaired", value: func(p api.Problem) any { return p.Repaired }},
	{raw: "node", value: func(p api.Problem) any { return p.Node }},
	{head: "What it means", cell: func(p api.Problem) string { return p.Text }},
}

func problemSnapshot(p api.Problem) string {
	if p.Tag == "" && p.SnapshotID != 0 {
		return strconv.FormatUint(uint64(p.SnapshotID), 10)
	}
	return p.Tag
}

func (a *app) vdiCheck() *cobra.Command {
	var repair bool
	c := a.onVDI("check NAME", "Check a VDI and its snapshots", `Every object is there, every block matches its checksum, and
nothing is left over. The exit status is 1 if there are problems that were not repaired,
leftovers aside: they only take space, and sweeps remove them. The same goes for what could not
be searched for them.

`+problemGrid.rawHelp(), exactly(1), func(args []string) error { return a.check(args[0], repair) })
	c.Flags().BoolVar(&repair, "repair", false, "remove leftovers of crashes; lost data cannot be brought back")
	return c
}

// check checks a VDI, or with "" everything.
func (a *app) check(name string, repair bool) error {
	p := a.progress("check", 1, false)
	r, err := a.api.Check(a.ctx, name, repair, func(now api.Progress) {
		p.total(max(now.Total, 1))
		p.set(now.Done)
	})
	p.end()
	if err != nil {
		return err
	}
	if err := a.showReport(r); err != nil {
		return err
	}
	bad := r.More
	for _, x := range r.Problems {
		if !x.Repaired && x.Kind != api.ProblemLeftover && x.Kind != api.ProblemUnsearched {
			bad++
		}
	}
	if bad == 0 {
		return nil
	}
	what := "the cluster"
	if name != "" {
		what = name
	}
	return hint(`what each problem means is in its line`, "%s has %d %s", what, bad, map[bool]string{true: "problem", false: "problems"}[bad == 1])
}

func (a *app) showReport(r *api.CheckReport) error {
	switch a.output {
	case formatJSON, formatYAML:
		return a.encode(r)
	case formatRaw:
		return showList(a, problemGrid, r.Problems)
	}
	if len(r.Problems) == 0 {
		return a.say("%d objects are as they should be", r.Objects)
	}
	if err := showList(a, problemGrid, r.Problems); err != nil {
		return err
	}
	text := fmt.Sprintf("%d objects were checked, %d problems repaired", r.Objects, r.Repaired)
	if r.More > 0 {
		text += fmt.Sprintf(", %d more problems are not listed", r.More)
	}
	return a.say("%s", text)
}

var objectGrid = grid[api.Object]{
	{head: "Index", right: true, cell: func(o api.Object) string { return strconv.FormatUint(uint64(o.Index), 10) }, raw: "index", value: func(o api.Object) any { return o.Index }},
	{head: "Offset", right: true, cell: func(o api.Object) string { return strconv.FormatInt(o.Off, 10) }, raw: "offset", value: func(o api.Object) any { return o.Off }},
	{head: "Object", cell: func(o api.Object) string { return o.Object }, raw: "object", value: func(o api.Object) any { return o.Object }},
	{head: "Owner", cell: func(o api.Object) string { return o.Owner }, raw: "owner", value: func(o api.Object) any { return o.Owner }},
	{head: "Allocated", right: true, cell: allocated, raw: "allocated", value: func(o api.Object) any { return o.Allocated }},
	{raw: "missing", value: func(o api.Object) any { return o.Missing }},
}

func allocated(o api.Object) string {
	if o.Missing {
		return "missing"
	}
	return human(o.Allocated)
}

var trackGrid = grid[api.Object]{
	objectGrid[0],
	objectGrid[2],
	{head: "Partition", right: true, cell: func(o api.Object) string { return strconv.Itoa(o.Partition) }, raw: "partition", value: func(o api.Object) any { return o.Partition }},
	{head: "Primary", cell: func(o api.Object) string { return o.Primary }, raw: "primary", value: func(o api.Object) any { return o.Primary }},
	{head: "Nodes", cell: func(o api.Object) string { return strings.Join(o.Nodes, ",") }, raw: "nodes", value: func(o api.Object) any { return strings.Join(o.Nodes, ",") }},
}

func (a *app) vdiObject() *cobra.Command {
	return a.objectList("object", "List the objects of a volume", `Owner is the VDI id under which an object is stored:
another's means that it is shared with a snapshot.`, objectGrid)
}

func (a *app) vdiTrack() *cobra.Command {
	return a.objectList("track", "Show where the objects of a volume live", "Nodes are those that have an object in sync.", trackGrid)
}

func (a *app) objectList(name, short, long string, g grid[api.Object]) *cobra.Command {
	var snapshot string
	var c *cobra.Command
	c = a.onVDI(name+" NAME [OFF [LEN]]", short, long+" With OFF\nand LEN, only objects that hold bytes of that range. Holes have no objects.\n\n"+g.rawHelp(),
		between(1, 3), func(args []string) error {
			if err := emptySnapshot(c, snapshot); err != nil {
				return err
			}
			off, length, err := byteRange(args[1:])
			if err != nil {
				return err
			}
			s := newStream(a, g)
			return s.end(a.api.Objects(a.ctx, args[0], snapshot, off, length, s.add))
		})
	a.snapshotFlag(c, &snapshot, "`TAG` or number of a snapshot")
	return c
}

// attribute is one of a VDI's.
type attribute struct {
	Key   string `json:"key"`
	Value string `json:"value"`
}

var attributeGrid = grid[attribute]{
	{head: "Key", cell: func(x attribute) string { return x.Key }, raw: "key", value: func(x attribute) any { return x.Key }},
	{head: "Value", cell: func(x attribute) string { return x.Value }, raw: "value", value: func(x attribute) any { return x.Value }},
}

// maxAttribute bounds what is read from the standard input for one attribute.
const maxAttribute = 1 << 20

func (a *app) vdiSetattr() *cobra.Command {
	var remove bool
	c := a.onVDI("setattr NAME KEY [VALUE]", "Set or remove an attribute of a VDI", "Without VALUE it is read from the standard input.", between(2, 3), func(args []string) error {
		if remove {
			if len(args) == 3 {
				return usagef("an attribute that is removed has no value")
			}
			if err := a.api.RemoveAttribute(a.ctx, args[0], args[1]); err != nil {
				return err
			}
			return a.say("attribute %s of %s is removed", args[1], args[0])
		}
		value, err := a.attributeValue(args)
		if err != nil {
			return err
		}
		if err := a.api.SetAttribute(a.ctx, args[0], args[1], value); err != nil {
			return err
		}
		return a.say("attribute %s of %s is set", args[1], args[0])
	})
	c.Flags().BoolVarP(&remove, "delete", "d", false, "remove the attribute")
	return c
}

func (a *app) attributeValue(args []string) (string, error) {
	if len(args) == 3 {
		return args[2], nil
	}
	b, err := io.ReadAll(io.LimitReader(a.in, maxAttribute+1))
	switch {
	case err != nil:
		return "", fmt.Errorf("read the value from the standard input: %w", err)
	case len(b) > maxAttribute:
		return "", fmt.Errorf("the value has more than %d bytes", maxAttribute)
	}
	return string(b), nil
}

func (a *app) vdiGetattr() *cobra.Command {
	return a.onVDI("getattr NAME [KEY]", "Show attributes of a VDI", "With KEY only its value is shown, as it is.\n\n"+attributeGrid.rawHelp(), between(1, 2), func(args []string) error {
		if len(args) == 2 {
			return a.oneAttribute(args[0], args[1])
		}
		all, err := a.api.Attributes(a.ctx, args[0])
		if err != nil {
			return err
		}
		if a.output == formatJSON || a.output == formatYAML {
			return a.encode(all)
		}
		list := make([]attribute, 0, len(all))
		for _, k := range slices.Sorted(maps.Keys(all)) {
			list = append(list, attribute{k, all[k]})
		}
		return showList(a, attributeGrid, list)
	})
}

func (a *app) oneAttribute(name, key string) error {
	v, err := a.api.Attribute(a.ctx, name, key)
	if err != nil {
		return err
	}
	if a.output == formatJSON || a.output == formatYAML {
		return a.encode(attribute{key, v.Value})
	}
	if !a.terminal(a.out) {
		return a.write(v.Value + "\n")
	}
	return a.write(printable(v.Value) + "\n")
}

var lockGrid = grid[api.Lock]{
	{head: "VDI", cell: func(l api.Lock) string { return l.Name }, raw: "vdi", value: func(l api.Lock) any { return l.Name }},
	{head: "Holder", cell: func(l api.Lock) string { return l.Holder }, raw: "holder", value: func(l api.Lock) any { return l.Holder }},
	{head: "Node", cell: func(l api.Lock) string { return l.Node }, raw: "node", value: func(l api.Lock) any { return l.Node }},
	{raw: "since", value: func(l api.Lock) any { return l.Since }},
}

func (a *app) lockCommands() *cobra.Command {
	list := &cobra.Command{
		Use: "list", Short: "List the locked VDIs", Long: "List the locked VDIs.\n\n" + lockGrid.rawHelp(), Args: exactly(0),
		RunE: func(*cobra.Command, []string) error {
			all, err := a.api.Locks(a.ctx)
			if err != nil {
				return err
			}
			g := lockGrid
			if a.output == formatTable {
				g = append(g[:len(g):len(g)], column[api.Lock]{head: "Since", cell: func(l api.Lock) string { return a.when(l.Since) }})
			}
			return showList(a, g, all)
		},
	}
	set := a.onVDI("set NAME HOLDER", "Lock a VDI", "No other gateway takes it over, and nobody deletes, shrinks or rolls it back, until\nit is unlocked. HOLDER says who wants it so.", exactly(2), func(args []string) error {
		if err := a.api.Lock(a.ctx, args[0], args[1]); err != nil {
			return err
		}
		return a.say("%s is locked by %s", args[0], args[1])
	})
	var holder string
	unlock := a.onVDI("unlock NAME", "Unlock a VDI", "", exactly(1), func(args []string) error {
		if err := a.api.Unlock(a.ctx, args[0], holder); err != nil {
			return err
		}
		return a.say("%s is unlocked", args[0])
	})
	unlock.Flags().StringVar(&holder, "holder", "", "only if `HOLDER` has the lock")
	return a.group("lock", "Lock and unlock VDIs", list, set, unlock)
}
