package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"sheepdog/frontends/admin/api"
)

// app is one call of the program.
type app struct {
	world
	ctx context.Context
	api *api.Client // set before a command runs

	address   string
	output    string
	raw       bool
	tokenFile string
	tls       bool
	caFile    string
	certFile  string
	keyFile   string
	timeout   time.Duration
}

// Formats of output.
const (
	formatTable = "table"
	formatJSON  = "json"
	formatYAML  = "yaml"
	formatRaw   = "raw" // chosen by -r
)

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:   a.program(),
		Short: "The command line of Sheepdog, the distributed block store",
		Long: `The command line of Sheepdog, the distributed block store.

It talks to the admin API of one sheep, by default on this machine. Sizes are like
512M, 10G or 1.5T, in powers of 1024, or a number of bytes. Exit status: 0 done,
1 failed, 2 wrong usage.

Environment: DOG_ADDRESS (the sheep, as -a), DOG_TOKEN (the token itself).`,
		SilenceErrors: true, SilenceUsage: true, DisableAutoGenTag: true,
		Args: noSuchCommand, RunE: a.missingCommand, PersistentPreRunE: a.prepare,
	}
	root.SetIn(a.in)
	root.SetOut(a.out)
	root.SetErr(a.err)
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usagef("%v", err) })
	a.globalFlags(root.PersistentFlags())
	root.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{formatTable, formatJSON, formatYAML}, cobra.ShellCompDirectiveNoFileComp))
	root.AddCommand(a.clusterCommands(), a.nodeCommands(), a.vdiCommands(), a.sessionCommands(), a.exportCommands(), a.iscsiCommands(), a.versionCommand(), manCommand(), outputTopic())
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd()
	for _, c := range root.Commands() {
		if c.Name() == "completion" { // it would print help and call that success
			c.Args, c.RunE = noSuchCommand, a.missingCommand
			c.PersistentPreRunE = func(*cobra.Command, []string) error { return nil }
		}
	}
	return root
}

func (a *app) globalFlags(f *pflag.FlagSet) {
	address := a.getenv("DOG_ADDRESS")
	if address == "" {
		address = "127.0.0.1:" + api.DefaultPort
	}
	f.StringVarP(&a.address, "address", "a", address, "admin address of the sheep, `HOST[:PORT]`")
	f.Lookup("address").DefValue = "127.0.0.1:" + api.DefaultPort
	f.StringVarP(&a.output, "output", "o", formatTable, "what the output looks like: `FORMAT` is table, json or yaml")
	f.BoolVarP(&a.raw, "raw", "r", false, "rows of columns separated by spaces, for scripts")
	f.StringVar(&a.tokenFile, "token", "", "`FILE` with the token that the sheep asks for")
	f.BoolVar(&a.tls, "tls", false, "speak TLS")
	f.StringVar(&a.caFile, "tls-ca", "", "`FILE` with the certificate authority to trust (implies --tls)")
	f.StringVar(&a.certFile, "tls-cert", "", "`FILE` with the client's certificate (implies --tls)")
	f.StringVar(&a.keyFile, "tls-key", "", "`FILE` with the client's key")
	f.DurationVar(&a.timeout, "timeout", 0, "how long to wait for an answer, if no content is moved; 0: as long as it takes")
}

// prepare checks the global flags and makes the client.
func (a *app) prepare(cmd *cobra.Command, _ []string) error {
	if !slices.Contains([]string{formatTable, formatJSON, formatYAML}, a.output) {
		return usagef("there is no output format %q: table, json and yaml are known", a.output)
	}
	if a.raw && cmd.Flags().Changed("output") {
		return usagef("-r and -o exclude each other")
	}
	if a.raw {
		a.output = formatRaw
	}
	if a.timeout < 0 {
		return usagef("a timeout of %v makes no sense", a.timeout)
	}
	return a.connect()
}

func (a *app) connect() error {
	o := api.Options{Program: "dog/" + version, Timeout: a.timeout, Token: a.getenv("DOG_TOKEN")}
	if a.tokenFile != "" {
		b, err := os.ReadFile(a.tokenFile)
		if err != nil {
			return fmt.Errorf("read the token: %w", err)
		}
		o.Token = string(b)
	}
	o.Token = strings.TrimSpace(o.Token)
	var err error
	if o.TLS, err = a.tlsConfig(); err != nil {
		return err
	}
	a.api, err = api.New(a.address, o)
	if api.KindOf(err) == api.KindInvalid {
		return usagef("%v", err)
	}
	return err
}

func (a *app) tlsConfig() (*tls.Config, error) {
	if (a.certFile == "") != (a.keyFile == "") {
		return nil, usagef("--tls-cert and --tls-key belong together")
	}
	if !a.tls && a.caFile == "" && a.certFile == "" {
		return nil, nil
	}
	c := &tls.Config{}
	if a.caFile != "" {
		b, err := os.ReadFile(a.caFile)
		if err != nil {
			return nil, fmt.Errorf("read the certificate authority: %w", err)
		}
		c.RootCAs = x509.NewCertPool()
		if !c.RootCAs.AppendCertsFromPEM(b) {
			return nil, fmt.Errorf("read the certificate authority: there is no certificate in %s", a.caFile)
		}
	}
	if a.certFile != "" {
		pair, err := tls.LoadX509KeyPair(a.certFile, a.keyFile)
		if err != nil {
			return nil, fmt.Errorf("read the client's certificate: %w", err)
		}
		c.Certificates = []tls.Certificate{pair}
	}
	return c, nil
}

// group makes a command that is nothing but a name for others.
func (a *app) group(use, short string, commands ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{Use: use, Short: short, Args: noSuchCommand, RunE: a.missingCommand}
	c.AddCommand(commands...)
	return c
}

func (a *app) missingCommand(cmd *cobra.Command, _ []string) error {
	cmd.SetOut(a.err)
	if err := cmd.Help(); err != nil {
		return err
	}
	fmt.Fprintln(a.err)
	return usagef("say which command of %q", cmd.CommandPath())
}

// noSuchCommand is the rule for arguments of groups.
func noSuchCommand(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	text := fmt.Sprintf("%q has no command %q", cmd.CommandPath(), args[0])
	cmd.SuggestionsMinimumDistance = 2
	if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
		text += fmt.Sprintf("; did you mean %s?", strings.Join(near, " or "))
	}
	return usagef("%s", text)
}

// between is the rule for commands that take least to most arguments.
func between(least, most int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		switch n := len(args); {
		case n < least:
			return usagef("something is missing: the usage is %q", cmd.UseLine())
		case n > most:
			return usagef("%q is too much: the usage is %q", args[most], cmd.UseLine())
		}
		for i, arg := range args[:least] {
			if arg == "" {
				return usagef("argument %d is empty: the usage is %q", i+1, cmd.UseLine())
			}
		}
		return nil
	}
}

func exactly(n int) cobra.PositionalArgs { return between(n, n) }

// completionTimeout bounds how long a shell's completion waits for the sheep.
const completionTimeout = 2 * time.Second

// vdiNames completes the first argument with the names of VDIs.
func (a *app) vdiNames(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveDefault
	}
	var names []string
	for _, v := range a.complete(cmd) {
		if !v.Snapshot {
			names = append(names, v.Name)
		}
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

// snapshotNames completes a flag with the snapshots of the VDI that is named.
func (a *app) snapshotNames(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	var names []string
	for _, v := range a.complete(cmd) {
		if v.Snapshot && len(args) > 0 && v.Name == args[0] {
			names = append(names, snapshotName(v))
		}
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

func (a *app) complete(cmd *cobra.Command) []api.VDI {
	if a.prepare(cmd, nil) != nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(a.ctx, completionTimeout)
	defer cancel()
	list, err := a.api.VDIs(ctx, "")
	if err != nil {
		return nil // there is nobody to tell
	}
	return list
}
