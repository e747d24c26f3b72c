package main

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"sheepdog/frontends/admin/api"
)

var targetGrid = grid[api.Target]{
	{head: "Target", cell: func(t api.Target) string { return t.Name }, raw: "name", value: func(t api.Target) any { return t.Name }},
	{head: "IQN", cell: func(t api.Target) string { return t.IQN }, raw: "iqn", value: func(t api.Target) any { return t.IQN }},
	{raw: "group", value: func(t api.Target) any { return t.Group }},
	{head: "LUNs", cell: lunsOf, raw: "luns", value: func(t api.Target) any { return lunsOf(t) }},
	{head: "Initiators", cell: func(t api.Target) string { return listed(t.Initiators) }, raw: "initiators", value: func(t api.Target) any { return listed(t.Initiators) }},
	{head: "Networks", cell: func(t api.Target) string { return listed(t.Networks) }, raw: "networks", value: func(t api.Target) any { return listed(t.Networks) }},
	{head: "CHAP", cell: chapOf, raw: "chap", value: func(t api.Target) any { return chapOf(t) }},
}

func lunsOf(t api.Target) string {
	var list []string
	for _, l := range t.LUNs {
		s := strconv.Itoa(l.LUN) + "=" + l.VDI
		if l.Snapshot != "" {
			s += "@" + l.Snapshot
		}
		if l.Missing {
			s += " (missing)"
		}
		list = append(list, s)
	}
	return strings.Join(list, ", ")
}

func listed(list *[]string) string {
	switch {
	case list == nil:
		return "all"
	case len(*list) == 0:
		return "none"
	}
	return strings.Join(*list, ", ")
}

func chapOf(t api.Target) string {
	var list []string
	for _, c := range t.Chap {
		s := c.Credential
		if c.Initiator != "" {
			s = c.Initiator + ": " + s
		}
		if c.Mutual != "" {
			s += " and " + c.Mutual
		}
		list = append(list, s)
	}
	return strings.Join(list, ", ")
}

func targetFacts(t api.Target) facts {
	var f facts
	f.add("Target", t.Name)
	f.add("IQN", t.IQN)
	for _, l := range t.LUNs {
		what := l.VDI
		if l.Snapshot != "" {
			what += "@" + l.Snapshot
		}
		if l.Missing {
			what += ", which is missing"
		} else {
			what += ", " + human(l.Size)
		}
		f.add("LUN "+strconv.Itoa(l.LUN), what)
	}
	f.add("Initiators", listed(t.Initiators))
	f.add("Networks", listed(t.Networks))
	f.add("CHAP", chapOf(t))
	return f
}

// lunRequest reads VDI or VDI@TAG.
func lunRequest(arg string) api.LUNRequest {
	name, tag, _ := strings.Cut(arg, "@")
	return api.LUNRequest{VDI: name, Snapshot: tag}
}

func (a *app) iscsiCommands() *cobra.Command {
	return a.group("iscsi", "Targets, who may log in to them, and who is", a.iscsiTargetCommands(), a.iscsiACLCommands(), a.iscsiSessionCommands())
}

func (a *app) iscsiTargetCommands() *cobra.Command {
	list := &cobra.Command{
		Use: "list", Short: "List all targets", Long: "List all targets: every VDI and snapshot is one by itself, and groups have several.\n\n" + targetGrid.rawHelp(), Args: exactly(0),
		RunE: func(*cobra.Command, []string) error {
			all, err := a.api.Targets(a.ctx)
			if err != nil {
				return err
			}
			return showList(a, targetGrid, all)
		},
	}
	show := &cobra.Command{
		Use: "show TARGET", Short: "Show a target, and who may log in to it", Args: exactly(1),
		RunE: func(_ *cobra.Command, args []string) error {
			t, err := a.api.Target(a.ctx, args[0])
			if err != nil {
				return err
			}
			return showOne(a, targetGrid, t, targetFacts(t))
		},
	}
	create := &cobra.Command{
		Use: "create GROUP [VDI[@TAG]...]", Short: "Make a target of several VDIs", Args: cobra.MinimumNArgs(1),
		Long: "Make a target of several VDIs and snapshots. They are LUN 0, 1, 2, and so on; each stays a target of\nits own, too: who may log in there is not asked here.\n\n" + targetGrid.rawHelp(),
		RunE: func(_ *cobra.Command, args []string) error {
			q := api.GroupRequest{Name: args[0]}
			for _, arg := range args[1:] {
				q.LUNs = append(q.LUNs, lunRequest(arg))
			}
			t, err := a.api.CreateGroup(a.ctx, q)
			if err != nil {
				return err
			}
			return done(a, targetGrid, t, "target %s has %d units", t.IQN, len(t.LUNs))
		},
	}
	remove := &cobra.Command{
		Use: "delete GROUP", Short: "Remove a target of several VDIs; those stay", Args: exactly(1),
		RunE: func(_ *cobra.Command, args []string) error {
			if err := a.api.DeleteGroup(a.ctx, args[0]); err != nil {
				return err
			}
			return a.say("group %s is removed: its sessions are being ended", args[0])
		},
	}
	var number int
	add := &cobra.Command{
		Use: "add GROUP VDI[@TAG]", Short: "Make a VDI or snapshot a unit of a group", Args: exactly(2),
		Long: "Make a VDI or snapshot a unit of a group. Initiators that are logged in are told, and look for it.\n\n" + targetGrid.rawHelp(),
		RunE: func(cmd *cobra.Command, args []string) error {
			q := lunRequest(args[1])
			if cmd.Flags().Changed("lun") {
				q.LUN = &number
			}
			t, err := a.api.AddLUN(a.ctx, args[0], q)
			if err != nil {
				return err
			}
			for _, l := range t.LUNs {
				if l.VDI == q.VDI && l.Snapshot == q.Snapshot {
					number = l.LUN
				}
			}
			return done(a, targetGrid, t, "%s is LUN %d of %s", args[1], number, t.IQN)
		},
	}
	add.Flags().IntVarP(&number, "lun", "l", 0, "its number, 0 to 255; without it, the lowest that is free")
	take := &cobra.Command{
		Use: "remove GROUP LUN", Short: "Take a unit out of a group; the others keep their numbers", Args: exactly(2),
		RunE: func(_ *cobra.Command, args []string) error {
			n, err := strconv.Atoi(args[1])
			if err != nil {
				return usagef("%q is no number of a unit", args[1])
			}
			t, err := a.api.RemoveLUN(a.ctx, args[0], n)
			if err != nil {
				return err
			}
			return done(a, targetGrid, t, "%s has no LUN %d any more", t.IQN, n)
		},
	}
	return a.group("target", "Targets and their units", list, show, create, remove, add, take)
}

func (a *app) iscsiACLCommands() *cobra.Command {
	rule := func(use, short, long string, allow bool) *cobra.Command {
		var all, kick bool
		c := &cobra.Command{
			Use: use, Short: short, Long: long + "\n\n" + targetGrid.rawHelp(), Args: cobra.MinimumNArgs(1),
			RunE: func(_ *cobra.Command, args []string) error {
				q := api.AccessRequest{AllowAll: all && allow, DenyAll: all && !allow}
				if all == (len(args) > 1) {
					return usagef("say who: names and networks, or --all")
				}
				if allow {
					q.Allow = args[1:]
				} else {
					q.Deny = args[1:]
				}
				t, err := a.api.SetAccess(a.ctx, args[0], q)
				if err != nil {
					return err
				}
				more := ""
				if kick {
					n, err := a.api.Logout(a.ctx, api.LogoutRequest{Target: args[0], Forbidden: true})
					if err != nil {
						return err
					}
					more = fmt.Sprintf("; %d sessions are being ended", n.Sessions)
				}
				return done(a, targetGrid, t, "%s: initiators: %s; networks: %s%s", t.Name, listed(t.Initiators), listed(t.Networks), more)
			},
		}
		c.Flags().BoolVar(&all, "all", false, "all, as far as the gateways' configuration lets them; CHAP stays")
		if !allow {
			c.Flags().Lookup("all").Usage = "let nobody in"
		}
		c.Flags().BoolVar(&kick, "kick", false, "end the sessions of those who may not log in any more")
		return c
	}
	allow := rule("allow TARGET INITIATOR|NETWORK...", "Let initiators, or a network, log in to a target",
		"Let initiators (iSCSI names) and networks (as 10.0.0.0/8, or an address) log in to a target; with the\nfirst name, all other initiators, with the first network, all other networks, are not let in any more. It counts on all gateways for logins\nfrom now on. What is said of a VDI counts for its snapshots.", true)
	deny := rule("deny TARGET INITIATOR|NETWORK...", "Take that back",
		"Take initiators and networks out of who may log in to a target. When the last one is out, nobody may.", false)
	var who, mutual string
	var none bool
	chap := &cobra.Command{
		Use: "chap TARGET [CREDENTIAL]", Short: "Have initiators prove who they are", Args: between(1, 2),
		Long: "Have initiators of a target prove who they are by CHAP. A credential is a file in the directory\niscsi.secrets of each gateway: secrets are neither typed here nor kept in the cluster.\n\n" + targetGrid.rawHelp(),
		RunE: func(_ *cobra.Command, args []string) (err error) {
			var t api.Target
			switch {
			case none == (len(args) == 2) || none && mutual != "":
				return usagef("name a credential, or say --none")
			case none:
				t, err = a.api.RemoveChap(a.ctx, args[0], who)
			default:
				t, err = a.api.SetChap(a.ctx, args[0], api.ChapEntry{Initiator: who, Credential: args[1], Mutual: mutual})
			}
			if err != nil {
				return err
			}
			text := chapOf(t)
			if text == "" {
				text = "what the gateways' configuration asks for"
			}
			return done(a, targetGrid, t, "%s: CHAP: %s", t.Name, text)
		},
	}
	chap.Flags().StringVarP(&who, "initiator", "i", "", "for this initiator (`IQN`) alone")
	chap.Flags().StringVarP(&mutual, "mutual", "m", "", "`CREDENTIAL` by which the target proves itself to initiators that ask")
	chap.Flags().BoolVar(&none, "none", false, "none any more but what the gateways' configuration asks for")
	return a.group("acl", "Who may log in to what", allow, deny, chap)
}

func (a *app) iscsiSessionCommands() *cobra.Command {
	list := &cobra.Command{
		Use: "list", Short: "List the initiators that are logged in to any gateway", Long: "List the initiators that are logged in to any gateway.\n\n" + initiatorGrid.rawHelp(), Args: exactly(0),
		RunE: func(*cobra.Command, []string) error {
			all, err := a.api.AllSessions(a.ctx)
			if err != nil {
				return err
			}
			var mine []api.Session
			for _, s := range all {
				if s.Protocol == "iscsi" {
					mine = append(mine, s)
				}
			}
			return showList(a, initiatorGrid, mine)
		},
	}
	logout := &cobra.Command{
		Use: "logout TARGET [INITIATOR]", Short: "End the sessions of a target on all gateways", Args: between(1, 2),
		Long: "Ask the initiators of a target, or one of them, to log out, and end the sessions of those that do\nnot. They may log in again: see \"dog iscsi acl\".",
		RunE: func(_ *cobra.Command, args []string) error {
			q := api.LogoutRequest{Target: args[0]}
			if len(args) > 1 {
				q.Initiator = args[1]
			}
			n, err := a.api.Logout(a.ctx, q)
			if err != nil {
				return err
			}
			if a.output != formatTable {
				return a.encode(n)
			}
			return a.say("%d sessions are being ended", n.Sessions)
		},
	}
	return a.group("session", "Who is logged in", list, logout)
}

var initiatorGrid = append(grid[api.Session]{
	nodeColumn(func(s api.Session) string { return s.Node }),
	{head: "Initiator", cell: func(s api.Session) string { return s.Identity }, raw: "initiator", value: func(s api.Session) any { return s.Identity }},
}, sessionGrid[1:]...)
