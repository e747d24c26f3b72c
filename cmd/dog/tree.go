package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"sheepdog/frontends/admin/api"
)

// branch is a VDI or snapshot with what began as it.
type branch struct {
	VDI      api.VDI   `json:"vdi"`
	Children []*branch `json:"children"`
}

// grow makes trees of a list. What comes of something deleted is a root.
func grow(list []api.VDI) []*branch {
	all := map[string]*branch{}
	for _, v := range list {
		all[v.VID] = &branch{VDI: v, Children: []*branch{}}
	}
	roots := []*branch{}
	for _, v := range list {
		b := all[v.VID]
		if parent := all[v.Parent]; parent != nil && parent != b {
			parent.Children = append(parent.Children, b)
		} else {
			roots = append(roots, b)
		}
	}
	for _, b := range all {
		sortBranches(b.Children)
	}
	sortBranches(roots)
	return roots
}

func sortBranches(list []*branch) {
	slices.SortFunc(list, func(a, b *branch) int {
		if c := madeAt(a.VDI).Compare(madeAt(b.VDI)); c != 0 {
			return c
		}
		return strings.Compare(a.VDI.VID, b.VDI.VID)
	})
}

func label(v api.VDI) string {
	if v.Snapshot {
		return v.Name + "@" + snapshotName(v)
	}
	return v.Name
}

func (a *app) vdiTree() *cobra.Command {
	return a.onVDI("tree [NAME]", "Show which VDIs and snapshots come of which", "Snapshots are shown as NAME@TAG. With NAME, only trees that have it.\n\nColumns with -r: depth, label, vid, parent, time.",
		between(0, 1), func(args []string) error {
			roots, err := a.trees(args)
			if err != nil {
				return err
			}
			switch a.output {
			case formatJSON, formatYAML:
				return a.encode(roots)
			case formatRaw:
				var b strings.Builder
				rawTree(&b, roots, 0)
				return a.write(b.String())
			}
			rows := [][]string{}
			for _, r := range roots {
				rows = a.treeRows(rows, r, "", "")
			}
			return a.write(layOut(rows, []bool{false, false, false}))
		})
}

func (a *app) trees(args []string) ([]*branch, error) {
	list, err := a.api.VDIs(a.ctx, "")
	if err != nil || len(args) == 0 {
		return grow(list), err
	}
	roots := slices.DeleteFunc(grow(list), func(b *branch) bool { return !b.has(args[0]) })
	if len(roots) == 0 {
		return nil, hint(`"dog vdi list" shows what there is`, "there is no VDI %q", args[0])
	}
	return roots, nil
}

func (b *branch) has(name string) bool {
	return b.VDI.Name == name || slices.ContainsFunc(b.Children, func(c *branch) bool { return c.has(name) })
}

func rawTree(b *strings.Builder, list []*branch, depth int) {
	for _, x := range list {
		v := x.VDI
		fmt.Fprintf(b, "%d %s %s %s %s\n", depth, rawText(label(v)), v.VID, rawText(v.Parent), rawCell(madeAt(v)))
		rawTree(b, x.Children, depth+1)
	}
}

func (a *app) treeRows(rows [][]string, b *branch, before, below string) [][]string {
	rows = append(rows, []string{before + printable(label(b.VDI)), human(b.VDI.Size), a.when(madeAt(b.VDI))})
	for i, c := range b.Children {
		if i == len(b.Children)-1 {
			rows = a.treeRows(rows, c, below+"└── ", below+"    ")
		} else {
			rows = a.treeRows(rows, c, below+"├── ", below+"│   ")
		}
	}
	return rows
}

func (a *app) vdiGraph() *cobra.Command {
	return a.onVDI("graph [NAME]", "Write the trees in the language of Graphviz", "For example: dog vdi graph | dot -Tsvg -o vdis.svg. It has this one format.",
		between(0, 1), func(args []string) error {
			if a.output != formatTable {
				return usagef(`"vdi graph" has one format; take "vdi tree" for others`)
			}
			roots, err := a.trees(args)
			if err != nil {
				return err
			}
			var b strings.Builder
			b.WriteString("digraph vdis {\n  node [shape=box, fontname=\"sans-serif\"];\n")
			for _, r := range roots {
				a.dot(&b, r)
			}
			b.WriteString("}\n")
			return a.write(b.String())
		})
}

func (a *app) dot(b *strings.Builder, x *branch) {
	v := x.VDI
	style := "style=\"filled,bold\", fillcolor=\"#d5ecdf\""
	if v.Snapshot {
		style = "style=rounded"
	}
	fmt.Fprintf(b, "  \"%s\" [label=\"%s\\n%s, %s\", %s];\n", v.VID, dotText(label(v)), human(v.Size), a.when(madeAt(v)), style)
	for _, c := range x.Children {
		fmt.Fprintf(b, "  \"%s\" -> \"%s\";\n", v.VID, c.VDI.VID)
		a.dot(b, c)
	}
}

func dotText(s string) string {
	return strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(printable(s))
}
