// Command sheep is the Sheepdog daemon: it reads the configuration, builds every layer
// from the disks up to the frontends, runs them, and takes them down again in the
// opposite order. It decides nothing itself.
//
//	main.go       command line, signals, exit status
//	daemon.go     building, running, stopping
//	listen.go     sockets
//	security.go   certificates and tokens
//	volumes.go    what NBD needs of the volumes; native.go: what the native protocol does;
//	              iscsi.go: what iSCSI needs, shows and counts
//	cluster.go    what the admin API needs of the cluster
//	report.go     what the admin API shows of disks and sessions; metrics
//	notify.go     systemd
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/spf13/pflag"

	"sheepdog/conf"
)

// version is set by the linker.
var version = "unknown"

// Exit statuses.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2 // command line or configuration
)

const usage = `Usage: sheep [--config FILE] [flags]
       sheep --standalone --data DIR [flags]

The Sheepdog daemon. It serves volumes until SIGINT or SIGTERM, then lets clients finish
what they have asked for; a second signal ends it at once.

Flags:
`

// options are what the command line says beside the keys of the configuration.
type options struct {
	config      string
	standalone  bool
	data        string
	printConfig bool
	checkConfig bool
	version     bool
}

func main() {
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
}

func run(args []string, stdout, stderr io.Writer) int {
	o, set, err := parse(args, stdout)
	switch {
	case errors.Is(err, pflag.ErrHelp):
		return exitOK
	case err != nil:
		fmt.Fprintf(stderr, "sheep: %v\nRun sheep --help for how to use it.\n", err)
		return exitUsage
	case o.version:
		fmt.Fprintln(stdout, "sheep", version)
		return exitOK
	case o.printConfig:
		fmt.Fprint(stdout, conf.Sample)
		return exitOK
	}
	c, err := conf.Load(o.config, set, o.overrides())
	if err != nil {
		fmt.Fprintf(stderr, "sheep: %s\n", strings.ReplaceAll(err.Error(), "\n", "\nsheep: "))
		return exitUsage
	}
	if o.checkConfig {
		fmt.Fprintln(stdout, "configuration is fine")
		return exitOK
	}
	level := new(slog.LevelVar)
	log := newLogger(c.Log, level, stderr)
	if err := untilSignal(func(ctx context.Context) error { return serve(ctx, c, o, log, level) }, log); err != nil {
		log.Error("sheep failed", "error", err)
		return exitFailed
	}
	log.Info("sheep has stopped")
	return exitOK
}

func parse(args []string, stdout io.Writer) (o options, set *pflag.FlagSet, err error) {
	set = pflag.NewFlagSet("sheep", pflag.ContinueOnError)
	set.SortFlags = false
	set.StringVarP(&o.config, "config", "c", "", "configuration file")
	set.BoolVar(&o.standalone, "standalone", false, "a cluster of one with one copy of everything, formatted when new")
	set.StringVar(&o.data, "data", "", "with --standalone: directory that holds everything, made if missing")
	conf.AddFlags(set)
	set.BoolVar(&o.printConfig, "print-config", false, "print a configuration file with every key, its default and what it means")
	set.BoolVar(&o.checkConfig, "check-config", false, "check the configuration and end")
	set.BoolVar(&o.version, "version", false, "print the version")
	set.Usage = func() { fmt.Fprint(stdout, usage, set.FlagUsages()) }
	if err := set.Parse(args); err != nil {
		return o, set, err
	}
	switch {
	case set.NArg() > 0:
		err = fmt.Errorf("there is nothing to do with %q", set.Arg(0))
	case o.standalone && o.data == "":
		err = errors.New("--standalone needs --data DIR")
	case !o.standalone && o.data != "":
		err = errors.New("--data goes with --standalone; otherwise say --disk DIR")
	case o.standalone && set.Changed("disk"):
		err = errors.New("--standalone keeps everything in --data: leave out --disk")
	}
	return o, set, err
}

// overrides are the keys that a standalone sheep sets for itself.
func (o *options) overrides() map[string]any {
	if !o.standalone {
		return nil
	}
	return map[string]any{"listen.peer": "none", "node.disks": []string{o.data}, "node.state_dir": filepath.Join(o.data, "node")}
}

// untilSignal runs fn with a context that ends with the first SIGINT or SIGTERM. The
// second one ends the process at once: what was not flushed is as after a crash.
func untilSignal(fn func(context.Context) error, log *slog.Logger) error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	defer signal.Stop(signals)
	go func() {
		select {
		case s := <-signals:
			log.Info("stopping: clients may finish what they have asked for", "signal", s.String())
			cancel()
		case <-ctx.Done():
		}
		<-signals // while stopping for whatever reason, another signal means at once
		log.Warn("stopped at once")
		os.Exit(exitFailed)
	}()
	return fn(ctx)
}

func newLogger(c conf.Log, level *slog.LevelVar, w io.Writer) *slog.Logger {
	// conf allows only names that slog knows.
	if err := level.UnmarshalText([]byte(c.Level)); err != nil {
		level.Set(slog.LevelInfo)
	}
	o := &slog.HandlerOptions{Level: level}
	if c.Format == "json" {
		return slog.New(slog.NewJSONHandler(w, o))
	}
	return slog.New(slog.NewTextHandler(w, o))
}
