package main

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"sheepdog/frontends/admin/api"
)

// vdiGrid has the original's columns first, in its order.
var vdiGrid = grid[api.VDI]{
	{head: "", cell: kindMark, raw: "kind", value: func(v api.VDI) any { return strings.ReplaceAll(kindMark(v), " ", "=") }},
	{head: "Name", cell: func(v api.VDI) string { return v.Name }, raw: "name", value: func(v api.VDI) any { return v.Name }},
	{head: "Id", right: true, cell: func(v api.VDI) string { return strconv.FormatUint(uint64(v.SnapshotID), 10) }, raw: "snapshot_id", value: func(v api.VDI) any { return v.SnapshotID }},
	{head: "Size", right: true, cell: func(v api.VDI) string { return human(v.Size) }, raw: "size", value: func(v api.VDI) any { return v.Size }},
	{head: "Used", right: true, cell: func(v api.VDI) string { return known(v, v.Used) }, raw: "used", value: func(v api.VDI) any { return ifKnown(v, v.Used) }},
	{head: "Shared", right: true, cell: func(v api.VDI) string { return known(v, v.Shared) }, raw: "shared", value: func(v api.VDI) any { return ifKnown(v, v.Shared) }},
	{raw: "time", value: func(v api.VDI) any { return madeAt(v) }},
	{head: "VID", cell: func(v api.VDI) string { return v.VID }, raw: "vid", value: func(v api.VDI) any { return v.VID }},
	{head: "Copies", right: true, cell: func(v api.VDI) string { return strconv.Itoa(v.Copies) }, raw: "copies", value: func(v api.VDI) any { return v.Copies }},
	{head: "Tag", cell: func(v api.VDI) string { return v.Tag }, raw: "tag", value: func(v api.VDI) any { return v.Tag }},
	{raw: "object_size", value: func(v api.VDI) any { return v.ObjectSize }},
	{raw: "parent", value: func(v api.VDI) any { return v.Parent }},
	{raw: "locked_by", value: func(v api.VDI) any { return lockedBy(v) }},
}

// kindMark is s for a snapshot.
func kindMark(v api.VDI) string {
	if v.Snapshot {
		return "s"
	}
	return " "
}

func known(v api.VDI, n int64) string {
	if !v.Known {
		return "?"
	}
	return human(n)
}

func ifKnown(v api.VDI, n int64) any {
	if !v.Known {
		return ""
	}
	return n
}

func madeAt(v api.VDI) time.Time {
	if v.Snapped != nil {
		return *v.Snapped
	}
	return v.Created
}

func lockedBy(v api.VDI) string {
	if v.Lock == nil {
		return ""
	}
	return v.Lock.Holder
}

// snapshotName is how a snapshot is called: by its tag, or by its number.
func snapshotName(v api.VDI) string {
	if v.Tag != "" {
		return v.Tag
	}
	return strconv.FormatUint(uint64(v.SnapshotID), 10)
}

func (a *app) vdiCommands() *cobra.Command {
	return a.group("vdi", "Create, show, change and move volumes",
		a.vdiCreate(), a.vdiList(), a.vdiInfo(), a.vdiDelete(), a.vdiResize(),
		a.vdiAlterCopy(), a.vdiSnapshot(), a.vdiClone(), a.vdiRollback(), a.vdiTree(), a.vdiGraph(),
		a.vdiRead(), a.vdiWrite(), a.vdiImport(), a.vdiExport(),
		a.vdiCheck(), a.vdiDiff(), a.vdiBackup(), a.vdiRestore(), a.vdiObject(), a.vdiTrack(),
		a.vdiSetattr(), a.vdiGetattr(), a.lockCommands())
}

// onVDI makes a command whose first argument names a VDI.
func (a *app) onVDI(use, short, long string, args cobra.PositionalArgs, run func(args []string) error) *cobra.Command {
	text := short + "."
	if long != "" {
		text += " " + long
	}
	return &cobra.Command{
		Use: use, Short: short, Long: text, Args: args, ValidArgsFunction: a.vdiNames,
		RunE: func(_ *cobra.Command, args []string) error { return run(args) },
	}
}

// snapshotFlag adds -s.
func (a *app) snapshotFlag(c *cobra.Command, p *string, what string) {
	c.Flags().StringVarP(p, "snapshot", "s", "", what)
	c.RegisterFlagCompletionFunc("snapshot", a.snapshotNames)
}

// emptySnapshot refuses -s "": a script with an empty variable means no VDI by it.
func emptySnapshot(c *cobra.Command, snapshot string) error {
	if c.Flags().Changed("snapshot") && snapshot == "" {
		return usagef("-s has no tag")
	}
	return nil
}

// objectSize is how commands that make VDIs take the size of objects.
type objectSize struct {
	size  sizeFlag
	shift int
}

func (o *objectSize) flags(c *cobra.Command) {
	c.Flags().Var(&o.size, "object-size", "size of its objects, a power of two from 1M to 2G")
	c.Flags().IntVarP(&o.shift, "shift", "z", 0, "size of its objects as a power of two, 20 to 31: `SHIFT`")
}

func (o *objectSize) bytes() (int64, error) {
	switch {
	case o.shift != 0 && o.size.n != 0:
		return 0, usagef("--object-size and -z exclude each other")
	case o.shift != 0 && (o.shift < 20 || o.shift > 31):
		return 0, usagef("-z %d: 20 to 31 are possible", o.shift)
	case o.shift != 0:
		return 1 << o.shift, nil
	}
	return o.size.n, nil
}

func (a *app) vdiCreate() *cobra.Command {
	var q api.CreateRequest
	var object objectSize
	c := &cobra.Command{
		Use: "create NAME SIZE", Short: "Create a VDI", Long: "Create a VDI. It takes no space before it is written, unless it is preallocated.\n\n" + vdiGrid.rawHelp(),
		Args: exactly(2),
		RunE: func(c *cobra.Command, args []string) (err error) {
			q.Name = args[0]
			if q.Size, err = parseSize(args[1]); err != nil {
				return err
			}
			if q.ObjectSize, err = object.bytes(); err != nil {
				return err
			}
			if c.Flags().Changed("copies") && q.Copies < 1 {
				return usagef("%d copies make no sense", q.Copies)
			}
			v, err := a.api.Create(a.ctx, q)
			if err != nil {
				return err
			}
			return done(a, vdiGrid, v, "%s is created: %s", v.Name, human(v.Size))
		},
	}
	c.Flags().IntVarP(&q.Copies, "copies", "c", 0, "`N`umber of copies (default: the cluster's)")
	c.Flags().BoolVarP(&q.Preallocate, "prealloc", "P", false, "take the space at once, which takes time")
	object.flags(c)
	return c
}

func (a *app) vdiList() *cobra.Command {
	return a.onVDI("list [NAME]", "List VDIs and snapshots", `Marked with s are snapshots. Used is what
only they take, of one copy, Shared what they read from snapshots they come from; both
count whole objects, which is the most it can be ("vdi info" counts blocks).

`+vdiGrid.rawHelp(), between(0, 1), func(args []string) error {
		name := ""
		if len(args) > 0 {
			if name = args[0]; name == "" {
				return usagef("the name is empty")
			}
		}
		list, err := a.api.VDIs(a.ctx, name)
		if err != nil {
			return err
		}
		g := vdiGrid
		if a.output == formatTable {
			g = slices.Insert(slices.Clone(g), 6, column[api.VDI]{head: "Created", cell: func(v api.VDI) string { return a.when(madeAt(v)) }})
		}
		return showList(a, g, list)
	})
}

func (a *app) vdiInfo() *cobra.Command {
	var snapshot string
	var c *cobra.Command
	c = a.onVDI("info NAME", "Show a VDI or a snapshot", "\n\n"+vdiGrid.rawHelp(), exactly(1), func(args []string) error {
		if err := emptySnapshot(c, snapshot); err != nil {
			return err
		}
		v, err := a.api.VDI(a.ctx, args[0], snapshot)
		if err != nil {
			return err
		}
		return showOne(a, vdiGrid, v, a.vdiFacts(v))
	})
	a.snapshotFlag(c, &snapshot, "`TAG` or number of a snapshot")
	return c
}

func (a *app) vdiFacts(v api.VDI) facts {
	var f facts
	f.add("Name", v.Name)
	if v.Snapshot {
		f.add("Snapshot", snapshotName(v)+" (number "+strconv.FormatUint(uint64(v.SnapshotID), 10)+")")
		f.add("Taken", a.when(madeAt(v)))
		f.add("Identity", v.Identity)
	}
	f.add("Created", a.when(v.Created))
	f.add("Size", fmt.Sprintf("%s (%d bytes)", human(v.Size), v.Size))
	f.add("Used", known(v, v.Used))
	f.add("Shared", known(v, v.Shared))
	f.add("Copies", strconv.Itoa(v.Copies))
	f.add("Object size", human(v.ObjectSize))
	f.add("VID", v.VID)
	f.add("Parent", v.Parent)
	f.add("State", v.State)
	f.add("Owner", v.Owner)
	if v.Lock != nil {
		f.add("Locked by", fmt.Sprintf("%s, through %s since %s", v.Lock.Holder, v.Lock.Node, a.when(v.Lock.Since)))
	}
	f.add("Open by", strings.Join(v.Openers, ", "))
	for _, k := range slices.Sorted(maps.Keys(v.Attributes)) {
		f.add("Attribute "+k, v.Attributes[k])
	}
	return f
}

func (a *app) vdiDelete() *cobra.Command {
	var snapshot string
	var c *cobra.Command
	c = a.onVDI("delete NAME", "Delete a VDI or a snapshot", `It is refused while somebody has it open or locked.
Snapshots of a deleted VDI stay, and so do clones of a deleted snapshot. Space comes back in the background.`,
		exactly(1), func(args []string) error {
			if err := emptySnapshot(c, snapshot); err != nil {
				return err
			}
			if err := a.api.Delete(a.ctx, args[0], snapshot); err != nil {
				return err
			}
			if snapshot != "" {
				return a.say("snapshot %s of %s is deleted", snapshot, args[0])
			}
			return a.say("%s is deleted", args[0])
		})
	a.snapshotFlag(c, &snapshot, "delete this snapshot, not the VDI: `TAG` or number")
	return c
}

func (a *app) vdiResize() *cobra.Command {
	return a.onVDI("resize NAME SIZE", "Make a VDI larger or smaller", "What is beyond a smaller size is lost at once.\nClients that have it open see a larger size when they connect again.\n\n"+vdiGrid.rawHelp(),
		exactly(2), func(args []string) error {
			size, err := parseSize(args[1])
			if err != nil {
				return err
			}
			v, err := a.api.Resize(a.ctx, args[0], size)
			if err != nil {
				return err
			}
			return done(a, vdiGrid, v, "%s has %s now", v.Name, human(v.Size))
		})
}

var alteredGrid = grid[api.Altered]{
	{raw: "name", value: func(r api.Altered) any { return r.Name }},
	{raw: "from", value: func(r api.Altered) any { return r.From }},
	{raw: "to", value: func(r api.Altered) any { return r.To }},
	{raw: "copied", value: func(r api.Altered) any { return r.Copied }},
	{raw: "pause", value: func(r api.Altered) any { return r.Pause }},
	{raw: "vdis", value: func(r api.Altered) any { return strings.Join(r.VDIs, ",") }},
}

func (a *app) vdiAlterCopy() *cobra.Command {
	var wanted int
	c := a.onVDI("alter-copy NAME", "Change how many copies a VDI has", `All that may share objects with it gets as many: its snapshots,
clones of them, and what it is a clone of; they are listed before anything is done. Everything is copied,
and then all change over at once; what was before is removed in the background. So there must be room for both meanwhile.

Any node may be asked: the one that writes the VDIs concerned does it. Its clients go on; their writes wait for a moment
in the end. Where several nodes write some of them all the time, clients of the others wait for up to a second or two; if
there is too much for that, the command is refused, and says who writes what. Then stop some, or try when less is written.

If it is interrupted, or its node fails, everything is as before, and what was copied is removed in the background; asked
again before that it makes use of it. Space of VDIs and snapshots concerned that are deleted meanwhile comes back afterwards.

`+alteredGrid.rawHelp(), exactly(1), func(args []string) error {
		if wanted < 1 {
			return usagef("say how many copies there shall be, with -c N")
		}
		return a.alterCopies(args[0], wanted)
	})
	c.Flags().IntVarP(&wanted, "copies", "c", 0, "`N`umber of copies")
	return c
}

func (a *app) alterCopies(name string, wanted int) error {
	var p *progress
	defer func() { p.end() }()
	var told error
	r, err := a.api.AlterCopies(a.ctx, name, wanted, func(b api.Altered) {
		if b.From != b.To {
			told = a.say("from %s to %d: %s", copies(b.From), b.To, strings.Join(b.VDIs, ", "))
		}
		p = a.progress("copy", 1, true)
	}, func(now api.Progress) {
		p.total(max(now.Total, 1))
		p.set(now.Done)
	})
	p.end()
	if err = cmp.Or(err, told); err != nil {
		return err
	}
	if r.From == r.To {
		return done(a, alteredGrid, *r, "%s has %s already", name, copies(r.To))
	}
	return done(a, alteredGrid, *r, "%s has %s now; %s copied, writes waited for %d ms", name, copies(r.To), human(r.Copied), int(r.Pause*1000))
}

func (a *app) vdiSnapshot() *cobra.Command {
	var tag string
	var c *cobra.Command
	c = a.onVDI("snapshot NAME", "Take a snapshot of a VDI", "It takes no space, and clients go on.\nWithout a tag it is called by its number.\n\n"+vdiGrid.rawHelp(),
		exactly(1), func(args []string) error {
			if err := emptySnapshot(c, tag); err != nil {
				return err
			}
			v, err := a.api.Snapshot(a.ctx, args[0], tag)
			if err != nil {
				return err
			}
			return done(a, vdiGrid, v, "snapshot %s of %s is taken", snapshotName(v), v.Name)
		})
	c.Flags().StringVarP(&tag, "snapshot", "s", "", "its `TAG`")
	return c
}

func (a *app) vdiClone() *cobra.Command {
	var snapshot string
	c := a.onVDI("clone SRC DST", "Make a new VDI of a snapshot", "It shares the snapshot's space until it is written.\n\n"+vdiGrid.rawHelp(),
		exactly(2), func(args []string) error {
			if snapshot == "" {
				return usagef("say which snapshot of %q to clone, with -s TAG", args[0])
			}
			v, err := a.api.Clone(a.ctx, args[0], snapshot, args[1])
			if err != nil {
				return err
			}
			return done(a, vdiGrid, v, "%s is created of snapshot %s of %s", v.Name, snapshot, args[0])
		})
	a.snapshotFlag(c, &snapshot, "`TAG` or number of the snapshot")
	return c
}

func (a *app) vdiRollback() *cobra.Command {
	var snapshot string
	c := a.onVDI("rollback NAME", "Make a VDI what it was in a snapshot", "What was written since is lost; all snapshots stay.\n\n"+vdiGrid.rawHelp(),
		exactly(1), func(args []string) error {
			if snapshot == "" {
				return usagef("say which snapshot to go back to, with -s TAG")
			}
			v, err := a.api.Rollback(a.ctx, args[0], snapshot)
			if err != nil {
				return err
			}
			return done(a, vdiGrid, v, "%s is as in snapshot %s", v.Name, snapshot)
		})
	a.snapshotFlag(c, &snapshot, "`TAG` or number of the snapshot")
	return c
}
