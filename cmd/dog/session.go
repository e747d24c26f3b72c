package main

import (
	"strconv"

	"github.com/spf13/cobra"

	"sheepdog/frontends/admin/api"
)

var sessionGrid = grid[api.Session]{
	{head: "Protocol", cell: func(s api.Session) string { return s.Protocol }, raw: "protocol", value: func(s api.Session) any { return s.Protocol }},
	{raw: "id", value: func(s api.Session) any { return s.ID }},
	{head: "Peer", cell: func(s api.Session) string { return s.Peer }, raw: "peer", value: func(s api.Session) any { return s.Peer }},
	{head: "Export", cell: func(s api.Session) string { return s.Export }, raw: "export", value: func(s api.Session) any { return s.Export }},
	{head: "Mode", cell: mode, raw: "read_only", value: func(s api.Session) any { return s.ReadOnly }},
	{raw: "tls", value: func(s api.Session) any { return s.TLS }},
	{head: "Reads", right: true, cell: func(s api.Session) string { return strconv.FormatUint(s.Reads, 10) }, raw: "reads", value: func(s api.Session) any { return s.Reads }},
	{head: "Writes", right: true, cell: func(s api.Session) string { return strconv.FormatUint(s.Writes, 10) }, raw: "writes", value: func(s api.Session) any { return s.Writes }},
	{head: "Errors", right: true, cell: func(s api.Session) string { return strconv.FormatUint(s.Errors, 10) }, raw: "errors", value: func(s api.Session) any { return s.Errors }},
	{head: "Read", right: true, cell: func(s api.Session) string { return human(int64(s.ReadBytes)) }, raw: "read_bytes", value: func(s api.Session) any { return s.ReadBytes }},
	{head: "Written", right: true, cell: func(s api.Session) string { return human(int64(s.WrittenBytes)) }, raw: "written_bytes", value: func(s api.Session) any { return s.WrittenBytes }},
	{head: "In flight", right: true, cell: func(s api.Session) string { return strconv.FormatInt(s.InFlight, 10) }, raw: "in_flight", value: func(s api.Session) any { return s.InFlight }},
	{raw: "started", value: func(s api.Session) any { return s.Started }},
	{head: "Detail", cell: func(s api.Session) string { return s.Detail }},
	{raw: "node", value: func(s api.Session) any { return s.Node }},
}

func mode(s api.Session) string {
	text := "rw"
	if s.ReadOnly {
		text = "ro"
	}
	if s.TLS {
		text += ",tls"
	}
	return text
}

var exportGrid = grid[api.Export]{
	{head: "Protocol", cell: func(e api.Export) string { return e.Protocol }, raw: "protocol", value: func(e api.Export) any { return e.Protocol }},
	{head: "VDI", cell: func(e api.Export) string { return e.VDI }, raw: "vdi", value: func(e api.Export) any { return e.VDI }},
	{head: "Snapshot", cell: func(e api.Export) string { return e.Snapshot }, raw: "snapshot", value: func(e api.Export) any { return e.Snapshot }},
	{head: "Size", right: true, cell: func(e api.Export) string { return human(e.Size) }, raw: "size", value: func(e api.Export) any { return e.Size }},
	{raw: "read_only", value: func(e api.Export) any { return e.ReadOnly }},
	{head: "URI", cell: func(e api.Export) string { return e.URI }, raw: "uri", value: func(e api.Export) any { return e.URI }},
}

func (a *app) sessionCommands() *cobra.Command {
	var node string
	var all bool
	list := &cobra.Command{
		Use: "list", Short: "List the clients that are connected to a node, or to all", Long: "List the clients that are connected to a node, or to all.\n\n" + sessionGrid.rawHelp(), Args: exactly(0),
		RunE: func(*cobra.Command, []string) error {
			switch {
			case all && node != "":
				return usagef("--all and --node exclude each other")
			case all:
				list, err := a.api.AllSessions(a.ctx)
				if err != nil {
					return err
				}
				return showList(a, append(grid[api.Session]{nodeColumn(func(s api.Session) string { return s.Node })}, sessionGrid...), list)
			}
			list, err := a.api.Sessions(a.ctx, node)
			if err != nil {
				return err
			}
			return showList(a, sessionGrid, list)
		},
	}
	a.nodeFlag(list, &node)
	list.Flags().BoolVarP(&all, "all", "A", false, "the clients of all nodes")
	return a.group("session", "Show who is connected", list)
}

func (a *app) exportCommands() *cobra.Command {
	list := &cobra.Command{
		Use: "list", Short: "List VDIs and snapshots with the URIs for clients", Long: "List VDIs and snapshots with the URIs to give to clients.\n\n" + exportGrid.rawHelp(), Args: exactly(0),
		RunE: func(*cobra.Command, []string) error {
			all, err := a.api.Exports(a.ctx)
			if err != nil {
				return err
			}
			return showList(a, exportGrid, all)
		},
	}
	return a.group("export", "Show what clients can connect to", list)
}
