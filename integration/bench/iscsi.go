package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// iscsiCase is one kind of work over iSCSI. Goals are ratios to tgtd's figure, or IOPS.
type iscsiCase struct {
	name string
	job
	goal     float64
	absolute float64
}

var iscsiCases = []iscsiCase{
	{name: "4k rand read d1", job: job{random: true, block: 4 << 10, depth: 1}, goal: 1},
	{name: "4k rand read d32", job: job{random: true, block: 4 << 10, depth: 32}, goal: 1.3},
	{name: "4k rand write d1", job: job{write: true, random: true, block: 4 << 10, depth: 1}, goal: 1},
	{name: "4k rand write d32", job: job{write: true, random: true, block: 4 << 10, depth: 32}, goal: 1.3},
	{name: "64k seq read d4", job: job{block: 64 << 10, depth: 4}, goal: 1},
	{name: "64k seq write d4", job: job{write: true, block: 64 << 10, depth: 4}, goal: 1},
	{name: "1M seq read d4", job: job{block: 1 << 20, depth: 4}, goal: 1},
	{name: "1M seq write d4", job: job{write: true, block: 1 << 20, depth: 4}, goal: 1},
}

// slowCases run on a store whose operations take 1 ms, alone: what counts is how many are under way.
var slowCases = []iscsiCase{
	{name: "1ms store, read d32", job: job{random: true, block: 4 << 10, depth: 32}, absolute: 18_000},
	{name: "1ms store, write d32", job: job{write: true, random: true, block: 4 << 10, depth: 32}, absolute: 18_000},
}

// iscsiTarget is a target under measurement.
type iscsiTarget struct {
	server
	iqn string
	lun byte
}

const benchIQN = "iqn.2026-11.io.sheepdog"

func startTarget(ctx context.Context, kind string, o options, base string, delay time.Duration) (*iscsiTarget, error) {
	t := &iscsiTarget{server: server{kind: kind, dir: filepath.Join(base, kind), network: "tcp", delay: delay, bin: o.bin, size: int64(o.sizeMiB) << 20}}
	err := os.MkdirAll(t.dir, 0o755)
	if err == nil {
		t.address, err = freeAddress()
	}
	if err == nil && kind == "tgtd" {
		err = t.startTgtd(ctx)
	} else if err == nil {
		err = t.startSheep(ctx)
	}
	if err == nil {
		err = t.prefill(ctx)
	}
	if err != nil {
		t.stop()
		return nil, fmt.Errorf("%w\n%s", err, t.log.String())
	}
	return t, nil
}

func (t *iscsiTarget) startSheep(ctx context.Context) (err error) {
	if t.admin, err = freeAddress(); err != nil {
		return err
	}
	data := filepath.Join(t.dir, "disk")
	if err := os.Mkdir(data, 0o755); err != nil {
		return err
	}
	config := fmt.Sprintf("node: {name: bench, address: %s}\nlisten:\n  native: none\n  nbd: none\n  admin: %q\n  iscsi: %q\n", host, t.admin, t.address)
	if t.delay > 0 {
		config += fmt.Sprintf("debug:\n  store_delay: %v\n", t.delay)
	}
	path := filepath.Join(t.dir, "sheep.yaml")
	if err := os.WriteFile(path, []byte(config), 0o644); err != nil {
		return err
	}
	if err := t.launch(ctx, filepath.Join(t.bin, "sheep"), "--standalone", "--data", data, "--config", path); err != nil {
		return err
	}
	t.iqn = benchIQN + ":vm1"
	return t.dog(ctx, "vdi", "create", "vm1", fmt.Sprint(t.size))
}

// startTgtd serves a sparse file as tgt does by itself: through the page cache, with its 16 threads.
func (t *iscsiTarget) startTgtd(ctx context.Context) error {
	file := filepath.Join(t.dir, "volume")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		return err
	}
	if err := os.Truncate(file, t.size); err != nil {
		return err
	}
	control := fmt.Sprint(os.Getpid() % 32000) // a number of its own among tgtds
	socket := filepath.Join(os.TempDir(), "bench-tgt-"+control)
	env := append(os.Environ(), "TGT_IPC_SOCKET="+socket)
	t.cmd = exec.Command("tgtd", "-f", "-C", control, "--iscsi", "portal="+t.address)
	t.cmd.Env, t.cmd.Stdout, t.cmd.Stderr = env, &t.log, &t.log
	t.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := t.cmd.Start(); err != nil {
		t.cmd = nil
		return err
	}
	defer os.Remove(socket)
	defer os.Remove(socket + "." + control)
	defer os.Remove(socket + "." + control + ".lock")
	t.iqn, t.lun = "iqn.2026-11.tgt:vm1", 1
	for _, args := range [][]string{
		{"--op", "new", "--mode", "target", "--tid", "1", "-T", t.iqn},
		{"--op", "new", "--mode", "logicalunit", "--tid", "1", "--lun", "1", "--backing-store", file},
		{"--op", "bind", "--mode", "target", "--tid", "1", "-I", "ALL"},
	} {
		for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
			cmd := exec.CommandContext(ctx, "tgtadm", append([]string{"-C", control, "--lld", "iscsi"}, args...)...)
			cmd.Env = env
			out, err := cmd.CombinedOutput()
			if err == nil {
				break
			}
			if time.Now().After(deadline) {
				return fmt.Errorf("tgtadm %s: %w: %s", strings.Join(args, " "), err, out)
			}
		}
	}
	return nil
}

// prefill writes the whole volume, and then half as much at random places.
func (t *iscsiTarget) prefill(ctx context.Context) error {
	i, err := connect(t.address, t.iqn, t.lun)
	if err != nil {
		return err
	}
	defer i.conn.Close()
	if _, _, err := i.run(ctx, job{write: true, block: 1 << 20, depth: 4, size: t.size}, 0); err != nil || t.delay > 0 {
		return err
	}
	_, _, err = i.run(ctx, job{write: true, random: true, block: 64 << 10, depth: 16, size: t.size}, 2*time.Second)
	return err
}

func (t *iscsiTarget) measure(ctx context.Context, c iscsiCase, o options) (measurement, error) {
	i, err := connect(t.address, t.iqn, t.lun)
	if err != nil {
		return measurement{}, err
	}
	defer i.conn.Close()
	j, before := c.job, t.cpu()
	j.size = t.size
	ops, took, err := i.run(ctx, j, o.runtime)
	if err != nil {
		return measurement{}, err
	}
	return measurement{value: float64(ops) / took.Seconds(), ops: float64(ops), cpu: t.cpu() - before, rss: t.rss()}, nil
}

// runISCSI measures the iSCSI target beside tgtd, in alternating rounds.
func runISCSI(ctx context.Context, o options) error {
	work, err := os.MkdirTemp(o.disk, "sheepdog-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	if err := warm(work, o); err != nil {
		return err
	}
	fmt.Printf("%d rounds of %v, volume of %d MiB over iSCSI, on %s\n\n%-22s %9s %9s %6s %12s  %s\n", o.rounds, o.runtime, o.sizeMiB, work,
		"IOPS", "sheep", "tgtd", "ratio", "goal", "CPU a command, µs")
	var figures []figure
	for _, set := range []struct {
		delay time.Duration
		kinds []string
		cases []iscsiCase
	}{{0, []string{"sheep", "tgtd"}, iscsiCases}, {time.Millisecond, []string{"sheep"}, slowCases}} {
		found, err := measureISCSI(ctx, o, filepath.Join(work, set.delay.String()), set.delay, set.kinds, set.cases)
		if err != nil {
			return err
		}
		figures = append(figures, found...)
	}
	if o.jsonPath == "" {
		return nil
	}
	b, err := json.MarshalIndent(figures, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(o.jsonPath, append(b, '\n'), 0o644)
}

func measureISCSI(ctx context.Context, o options, dir string, delay time.Duration, kinds []string, cases []iscsiCase) (found []figure, err error) {
	var wanted []iscsiCase
	for _, c := range cases {
		if o.only.MatchString(c.name) {
			wanted = append(wanted, c)
		}
	}
	if len(wanted) == 0 {
		return nil, nil
	}
	var targets []*iscsiTarget
	var servers []*server
	defer func() {
		for _, t := range targets {
			t.stop()
		}
	}()
	for _, kind := range kinds {
		t, err := startTarget(ctx, kind, o, dir, delay)
		if err != nil {
			return nil, fmt.Errorf("start %s: %w", kind, err)
		}
		targets, servers = append(targets, t), append(servers, &t.server)
	}
	for _, c := range wanted {
		fig := figure{Case: c.name, Unit: "IOPS", Goal: c.goal, GoalAbsolute: c.absolute}
		if err := fig.alternate(ctx, o, servers, func(i int) (measurement, error) { return targets[i].measure(ctx, c, o) }); err != nil {
			return nil, err
		}
		fmt.Println(fig.iscsiRow())
		found = append(found, fig)
	}
	return found, nil
}

// iscsiRow is the figure's line of the table.
func (f figure) iscsiRow() string {
	own := f.Servers["sheep"]
	peer, ratio, cpu := "-", "-", fmt.Sprintf("%.0f", median(own.CPUMicros))
	good := median(own.Rounds) >= f.GoalAbsolute
	goal := short(f.GoalAbsolute)
	if s := f.Servers["tgtd"]; s != nil {
		peer, ratio, cpu = short(median(s.Rounds)), fmt.Sprintf("%.2f", f.ratio("tgtd")), cpu+fmt.Sprintf("/%.0f", median(s.CPUMicros))
		good, goal = f.ratio("tgtd") >= f.Goal, fmt.Sprintf("%.1fx", f.Goal)
	}
	verdict := "MISSED"
	if good {
		verdict = "met"
	}
	return fmt.Sprintf("%-22s %9s %9s %6s %12s  %s", f.Case, short(median(own.Rounds)), peer, ratio, goal+" "+verdict, cpu)
}
