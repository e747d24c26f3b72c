// Command bench measures sheep's NBD server beside nbdkit's file plugin and qemu-nbd: the same work on the same disk in the
// same run, in alternating rounds, judged by the ratio of medians. Absolute figures of a shared machine say little; the
// ratios hold. It prints a table and, on request, JSON. With -cluster it measures three nodes with three copies, with
// -native the native protocol, beside figures that others had at the same work, or with -peer beside another cluster in the same rounds;
// with -iscsi the iSCSI target beside tgtd, by an initiator of its own.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"
)

type options struct {
	bin, disk, jsonPath, transport string
	only                           *regexp.Regexp
	servers                        []string
	rounds                         int
	runtime                        time.Duration
	sizeMiB                        int
	recoverMiB                     int   // of the cluster
	peer                           *peer // that the native protocol is measured beside, or nil
}

func main() {
	var o options
	only, servers, seconds, peer, peerPIDs := "", "", 0, "", ""
	flag.StringVar(&o.bin, "bin", "bin", "directory of sheep and dog")
	flag.StringVar(&o.disk, "disk", "/var/tmp", "directory on the disk to measure on")
	flag.StringVar(&o.jsonPath, "json", "", "also write the figures to this file")
	flag.StringVar(&o.transport, "transport", "tcp", "tcp or unix")
	flag.StringVar(&only, "only", "", "only the cases whose name matches this expression")
	flag.StringVar(&servers, "servers", "sheep,nbdkit,qemu-nbd", "the servers to measure")
	flag.IntVar(&o.rounds, "rounds", 3, "rounds; the figure is the median")
	flag.IntVar(&seconds, "seconds", 3, "duration of one measurement")
	flag.IntVar(&o.sizeMiB, "size", 1024, "size of the volume in MiB")
	cluster := flag.Bool("cluster", false, "measure a cluster of three nodes with three copies instead")
	native := flag.Bool("native", false, "measure the native protocol instead, against one node and three")
	flag.StringVar(&peer, "peer", "", "with -native: HOST:PORT of another cluster, which is measured beside ours by turns, on a volume made there; -only chooses which of ours")
	flag.StringVar(&peerPIDs, "peer-pids", "", "with -peer: the processes of its nodes, if they are here, as 1,2,3")
	iscsi := flag.Bool("iscsi", false, "measure iSCSI beside tgtd instead")
	flag.IntVar(&o.recoverMiB, "recover", 2048, "with -cluster: data to be recovered after the loss of a node, in MiB; 0: none")
	flag.Parse()
	o.servers = strings.Split(servers, ",")
	o.runtime = time.Duration(seconds) * time.Second
	var err error
	if o.peer, err = parsePeer(peer, peerPIDs); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(2)
	}
	if o.only, err = regexp.Compile(only); err != nil || flag.NArg() > 0 || o.rounds < 1 || seconds < 1 || (o.transport != "tcp" && o.transport != "unix") {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	measure := run
	switch {
	case *cluster:
		measure = runCluster
	case *native:
		measure = runNative
	case *iscsi:
		measure = runISCSI
	}
	if err := measure(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o options) error {
	work, err := os.MkdirTemp(o.disk, "sheepdog-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	if err := warm(work, o); err != nil {
		return err
	}
	fmt.Printf("%d rounds of %v, volume of %d MiB over %s, on %s\n", o.rounds, o.runtime, o.sizeMiB, o.transport, work)
	var figures []figure
	for _, g := range groups {
		if !g.wanted(o.only) {
			continue
		}
		found, err := g.measure(ctx, o, filepath.Join(work, g.name))
		if err != nil {
			return fmt.Errorf("%s: %w", g.name, err)
		}
		figures = append(figures, found...)
	}
	printTable(figures)
	if o.jsonPath == "" {
		return nil
	}
	b, err := json.MarshalIndent(figures, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(o.jsonPath, append(b, '\n'), 0o644)
}

// warm writes and removes a file as large as what the servers will write: a virtual machine gets its memory from its
// host at the first touch, which takes several times as long as using it again, and the first server would pay for all.
func warm(dir string, o options) error {
	path := filepath.Join(dir, "warm")
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer os.Remove(path)
	defer f.Close()
	p := make([]byte, 1<<20)
	for range 2 * o.sizeMiB * (len(o.servers) + 1) {
		if _, err := f.Write(p); err != nil {
			return err
		}
	}
	return nil
}

// group is a set of cases that run against the same servers.
type group struct {
	name  string
	delay time.Duration // of every operation of the store
	peers []string
	cases []workload
}

func (g group) wanted(only *regexp.Regexp) bool {
	for _, c := range g.cases {
		if only.MatchString(c.name) {
			return true
		}
	}
	return false
}

func (g group) measure(ctx context.Context, o options, dir string) (found []figure, err error) {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	var servers []*server
	defer func() {
		for _, s := range servers {
			s.stop()
		}
	}()
	for _, kind := range append([]string{"sheep"}, g.peers...) {
		if !slices.Contains(o.servers, kind) {
			continue
		}
		s, err := startServer(ctx, kind, o, dir, g.delay)
		if err != nil {
			return nil, fmt.Errorf("start %s: %w", kind, err)
		}
		servers = append(servers, s)
	}
	for _, c := range g.cases {
		if !o.only.MatchString(c.name) {
			continue
		}
		fig := figure{Case: c.name, Unit: c.unit, Goal: c.goal, GoalAbsolute: c.goalAbsolute}
		if err := fig.alternate(ctx, o, servers, func(i int) (measurement, error) { return servers[i].measure(ctx, c, o) }); err != nil {
			return nil, err
		}
		fmt.Println(fig.line())
		found = append(found, fig)
	}
	return found, nil
}

// alternate has measure called for each of the servers, by its place in the list, in rounds.
func (f *figure) alternate(ctx context.Context, o options, servers []*server, measure func(i int) (measurement, error)) error {
	f.Servers = map[string]*series{}
	for _, s := range servers {
		f.Servers[s.kind] = &series{}
	}
	for round := range o.rounds {
		for i := range servers {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			at := (round + i) % len(servers) // nobody is always first
			settle(func() time.Duration { return cpuOf(servers) })
			m, err := measure(at)
			if err != nil {
				return fmt.Errorf("%s, %s: %w", f.Case, servers[at].kind, err)
			}
			f.Servers[servers[at].kind].add(m)
		}
	}
	return nil
}

// settle lets what the last measurement left behind come to rest: dirty pages, checkpoints. cpu is what all who may still be at work have used.
func settle(cpu func() time.Duration) {
	syscall.Sync()
	for range 40 {
		before := cpu()
		time.Sleep(50 * time.Millisecond)
		if cpu()-before <= 10*time.Millisecond {
			return
		}
	}
}

func cpuOf(servers []*server) (total time.Duration) {
	for _, s := range servers {
		total += s.cpu()
	}
	return total
}

func printTable(figures []figure) {
	if len(figures) == 0 {
		fmt.Println("no case matches")
		return
	}
	fmt.Printf("\n%-22s %-5s %26s %26s %10s  %-14s %s\n", "", "", "nbdkit", "qemu-nbd", "", "server CPU, µs", "resident, MiB")
	fmt.Printf("%-22s %-5s %9s %9s %6s %9s %6s %10s  %-14s %s\n", "work", "unit", "sheep", "figure", "ratio", "figure", "ratio", "goal", "per operation", "")
	fmt.Println(strings.Repeat("-", 118))
	for _, f := range figures {
		fmt.Println(f.row())
	}
	fmt.Println("\nratio: sheep's figure to the peer's, more is better; CPU and memory in the order sheep/nbdkit/qemu-nbd")
}
