package main

import (
	"fmt"
	"os"
	"runtime"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"

	"sheepdog/frontends/admin/api"
)

type versions struct {
	Version string `json:"version"`
	API     int    `json:"api"`
	Go      string `json:"go"`
}

var versionGrid = grid[versions]{
	{raw: "version", value: func(v versions) any { return v.Version }},
	{raw: "api", value: func(v versions) any { return v.API }},
	{raw: "go", value: func(v versions) any { return v.Go }},
}

func (a *app) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Show the version of this program", Long: "Show the version of this program; that of the sheep is in \"node info\".\n\n" + versionGrid.rawHelp(),
		Args: exactly(0),
		RunE: func(*cobra.Command, []string) error {
			v := versions{Version: version, API: api.Version, Go: runtime.Version()}
			return done(a, versionGrid, v, "%s %s (%s)", a.program(), v.Version, v.Go)
		},
	}
}

func manCommand() *cobra.Command {
	return &cobra.Command{
		Use: "man DIR", Short: "Write the man pages into a directory", Hidden: true, Args: exactly(1),
		PersistentPreRunE: func(*cobra.Command, []string) error { return nil },
		RunE: func(c *cobra.Command, args []string) error {
			if err := os.MkdirAll(args[0], 0o755); err != nil {
				return fmt.Errorf("write man pages: %w", err)
			}
			root := c.Root()
			root.Use = "dog"
			epoch := time.Unix(0, 0).UTC() // the same pages from the same source
			h := &doc.GenManHeader{Section: "1", Source: "Sheepdog", Manual: "Sheepdog", Date: &epoch}
			if err := doc.GenManTree(root, h, args[0]); err != nil {
				return fmt.Errorf("write man pages: %w", err)
			}
			return nil
		},
	}
}

// outputTopic is a page of help that is no command.
func outputTopic() *cobra.Command {
	return &cobra.Command{
		Use: "output", Short: "What output is made of, for scripts",
		Long: `What output is made of, for scripts.

Tables (-o table, the default) are for people: their layout and units may change.

JSON (-o json) and YAML (-o yaml) are the admin API's own objects: lists are arrays,
single things objects. Fields keep their names and meaning; new ones may come, so ignore
what you do not know. Sizes and offsets are bytes, times RFC 3339 in UTC, ids of VDIs
and objects hexadecimal strings. GET /api/v1/openapi.json of a sheep describes them all.
Commands that change something show what it is like then; those that delete show nothing.

Raw rows (-r) are columns separated by one space, one row a line, without heads. The
help of each command lists its columns; new ones may come at the end. Sizes are bytes,
times seconds since 1970, yes and no are 1 and 0. In texts, space, tab and backslash have
a backslash before them, a line feed is \n, other characters that cannot be printed are
\u{HEX}; an empty text is -, and the text "-" is \-.

Content ("vdi read", "vdi export", "vdi backup", "vdi getattr" with a key) is as it is in
every format but JSON and YAML, which "vdi getattr" heeds.

Errors go to the standard error: "dog: what failed and why", then what to do next.`,
	}
}
