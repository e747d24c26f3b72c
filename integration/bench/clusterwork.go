package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"sheepdog/integration/client"
)

// clusterFigure is the outcome of one case on the cluster.
type clusterFigure struct {
	Case     string  `json:"case"`
	Unit     string  `json:"unit"`
	Sheep    series  `json:"sheep"`
	Peer     *series `json:"peer,omitempty"` // another cluster, in the same rounds
	Original float64 `json:"original,omitempty"`
	Vitastor float64 `json:"vitastor,omitempty"`
	Disk     float64 `json:"disk,omitempty"`       // a raw file, here
	DiskOf   float64 `json:"disk_there,omitempty"` // and where the original was measured
	Goal     float64 `json:"goal_ratio,omitempty"` // to the original
}

// recoveryFigure is how a lost node was made good.
type recoveryFigure struct {
	MiB          int     `json:"mib"`
	IdleMBs      float64 `json:"idle_mb_s"`
	BusyMBs      float64 `json:"busy_mb_s"`
	ClientBefore float64 `json:"client_iops_before"`
	ClientDuring float64 `json:"client_iops_during"`
	P99BeforeMs  float64 `json:"p99_before_ms"`
	P99DuringMs  float64 `json:"p99_during_ms"`
}

// runCluster measures a cluster of three nodes with three copies.
func runCluster(ctx context.Context, o options) error {
	figures, rec, err := measureCluster(ctx, o, clusterCases, false)
	if err != nil {
		return err
	}
	plain, _, err := measureCluster(ctx, o, plainCases(), true)
	if err != nil {
		return err
	}
	figures = append(figures, plain...)
	printCluster(figures)
	if rec != nil {
		rec.print()
	}
	if o.jsonPath == "" {
		return nil
	}
	b, err := json.MarshalIndent(map[string]any{"figures": figures, "recovery": rec}, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(o.jsonPath, append(b, '\n'), 0o644)
}

// plainCases are the long writes once more, for nodes that do not encrypt: the original cannot.
func plainCases() (cases []clusterCase) {
	for _, c := range clusterCases {
		if strings.Contains(c.name, "k-write-") || strings.Contains(c.name, "m-write-") {
			c.name += "-plain"
			c.disk = 0
			cases = append(cases, c)
		}
	}
	return cases
}

// measureCluster measures those of the cases that are wanted on a new cluster, and recovery unless it is plain.
func measureCluster(ctx context.Context, o options, cases []clusterCase, plain bool) (figures []clusterFigure, rec *recoveryFigure, err error) {
	cases = slices.DeleteFunc(slices.Clone(cases), func(c clusterCase) bool { return !o.only.MatchString(c.name) })
	recovers := !plain && o.only.MatchString("recovery") && o.recoverMiB > 0
	if len(cases) == 0 && !recovers {
		return nil, nil, nil
	}
	work, err := os.MkdirTemp(o.disk, "sheepdog-bench-")
	if err != nil {
		return nil, nil, err
	}
	defer os.RemoveAll(work)
	how := "what nodes say to each other is encrypted"
	if plain {
		how = "nothing is encrypted"
	}
	fmt.Printf("%d nodes, %d copies, %s, %d rounds of %v, volume of %d MiB over NBD through one node, on %s\n", flockNodes, flockNodes, how, o.rounds, o.runtime, o.sizeMiB, work)
	f, err := startFlock(ctx, o, work, flockNodes, plain)
	if err != nil {
		return nil, nil, err
	}
	defer f.stop()
	if len(cases) > 0 {
		if figures, err = f.requests(ctx, o, cases); err != nil {
			return nil, nil, err
		}
	}
	if recovers {
		rec, err = f.recovery(ctx, o)
	}
	return figures, rec, err
}

// requests measures cases on one volume that is full of data.
func (f *flock) requests(ctx context.Context, o options, cases []clusterCase) (figures []clusterFigure, err error) {
	v := f.volume("vm1", int64(o.sizeMiB)<<20)
	if err := f.dog("vdi", "create", v.export, fmt.Sprint(v.size)); err != nil {
		return nil, err
	}
	v.dir = filepath.Join(f.dir, "volume") // its parent has the image
	if err := os.Mkdir(v.dir, 0o755); err != nil {
		return nil, err
	}
	if err := v.prefill(ctx, o); err != nil {
		return nil, err
	}
	for _, c := range cases {
		fig := clusterFigure{Case: c.name, Unit: c.unit, Original: c.original, Vitastor: c.vitastor, DiskOf: c.disk, Goal: c.goal}
		if c.disk > 0 {
			var err error
			if fig.Disk, err = f.raw(ctx, c.name, o); err != nil {
				return figures, err
			}
		}
		for range o.rounds {
			f.settle()
			before := f.cpu()
			value, ops, err := c.run(ctx, v, o)
			if err != nil {
				return figures, fmt.Errorf("%s: %w", c.name, err)
			}
			fig.Sheep.add(measurement{value: value, ops: ops, cpu: f.cpu() - before, rss: f.rss()})
		}
		fmt.Printf("%-22s %s\n", fig.Case, strings.Join(shorts(fig.Sheep.Rounds), " "))
		figures = append(figures, fig)
	}
	return figures, f.dog("vdi", "delete", v.export)
}

// rawBytes is the size of the file that raw writes.
const rawBytes = "512M"

// raw is what a raw file on the same disk makes of writes like those of a case, each through to the disk.
func (f *flock) raw(ctx context.Context, name string, o options) (float64, error) {
	f.settle()
	parts := strings.Split(name, "-") // as 4k-randwrite-fua-qd32
	depth, err := strconv.Atoi(strings.TrimPrefix(parts[len(parts)-1], "qd"))
	if err != nil {
		return 0, err
	}
	file := filepath.Join(f.dir, "raw")
	if _, err := exec.CommandContext(ctx, "fio", "--name=lay", "--filename="+file, "--rw=write", "--bs=1m", "--size="+rawBytes, "--end_fsync=1").Output(); err != nil {
		return 0, fmt.Errorf("fio: %w: %s", err, stderrOf(err))
	}
	defer os.Remove(file)
	value, _, err := fioJob(ctx, f.dir, o, parts[1], parts[0], depth, "--ioengine=libaio", "--direct=1", "--sync=1", "--filename="+file, "--size="+rawBytes)
	return value, err
}

func shorts(values []float64) (list []string) {
	for _, v := range values {
		list = append(list, short(v))
	}
	return list
}

func printCluster(figures []clusterFigure) {
	if len(figures) == 0 {
		return
	}
	fmt.Printf("\n%-22s %-5s %9s %9s %6s %12s %9s %6s %9s %8s %12s %14s\n", "work", "unit", "sheep", "original", "ratio", "goal", "Vitastor", "ratio", "raw disk", "by disks", "CPU, µs/op", "largest, MiB")
	fmt.Println(strings.Repeat("-", 131))
	for _, x := range figures {
		own := median(x.Sheep.Rounds)
		cell := func(other float64) (figure, ratio string) {
			if other == 0 {
				return "-", "-"
			}
			return short(other), fmt.Sprintf("%.2f", own/other)
		}
		original, originalRatio := cell(x.Original)
		vitastor, vitastorRatio := cell(x.Vitastor)
		disk, byDisks := cell(x.Disk)
		if x.Disk > 0 { // as if the original had had this disk
			byDisks = fmt.Sprintf("%.2f", own/x.Disk*x.DiskOf/x.Original)
		}
		cpu := fmt.Sprintf("%.0f", median(x.Sheep.CPUMicros))
		if x.Peer != nil {
			cpu += fmt.Sprintf(" / %.0f", median(x.Peer.CPUMicros))
		}
		goal := ""
		if x.Goal > 0 {
			goal = fmt.Sprintf("%.0fx %s", x.Goal, verdict(own >= x.Goal*x.Original))
		}
		fmt.Printf("%-22s %-5s %9s %9s %6s %12s %9s %6s %9s %8s %12s %14.0f\n", x.Case, x.Unit, short(own), original, originalRatio, goal, vitastor, vitastorRatio, disk, byDisks,
			cpu, median(x.Sheep.ResidentMB))
	}
	fmt.Println("\nCPU of all nodes together for one operation; see original.go for where the others' figures come from")
	fmt.Println("plain: without a secret, nothing between nodes is encrypted, as in the original; all others: TLS")
	fmt.Println("raw disk: a file here, each write through to the disk; by disks: the ratio to the original, each held against a raw file where it was measured")
}

func verdict(met bool) string {
	if met {
		return "met"
	}
	return "MISSED"
}

// recovery loses a node with all it has, twice, and measures how quickly another one in its place holds
// everything: first while nobody else is there, then with a client at work.
func (f *flock) recovery(ctx context.Context, o options) (*recoveryFigure, error) {
	r := &recoveryFigure{MiB: o.recoverMiB}
	v := f.volume("vm2", int64(o.recoverMiB)<<20)
	if err := f.dog("vdi", "create", v.export, fmt.Sprint(v.size)); err != nil {
		return nil, err
	}
	whole := o
	whole.sizeMiB = o.recoverMiB
	v.dir = filepath.Join(f.dir, "recovery", "volume")
	if err := os.MkdirAll(v.dir, 0o755); err != nil {
		return nil, err
	}
	source, _, err := image(whole, filepath.Dir(v.dir), "full")
	if err != nil {
		return nil, err
	}
	if _, _, err := timed(ctx, v.size, "nbdcopy", "--flush", source, v.uri()); err != nil {
		return nil, err
	}
	if err := os.Remove(source); err != nil {
		return nil, err
	}
	f.settle()
	took, err := f.replace(ctx, flockNodes-1)
	if err != nil {
		return nil, err
	}
	r.IdleMBs = float64(v.size) / 1e6 / took.Seconds()
	f.settle()

	alone, cancel := context.WithTimeout(ctx, max(5*time.Second, o.runtime))
	before, err := hammer(alone, v)
	cancel()
	if err != nil {
		return nil, err
	}
	meanwhile, cancel := context.WithCancel(ctx)
	defer cancel()
	type outcome struct {
		work
		error
	}
	done := make(chan outcome, 1)
	// Only what happens while content is moved counts: the node is dead and removed by then.
	took, err = f.replaceWith(ctx, flockNodes-1, func() {
		go func() {
			w, err := hammer(meanwhile, v)
			done <- outcome{w, err}
		}()
	})
	cancel()
	if err != nil {
		return nil, err
	}
	during := <-done
	if during.error != nil {
		return nil, during.error
	}
	r.BusyMBs = float64(v.size) / 1e6 / took.Seconds()
	r.ClientBefore, r.P99BeforeMs = before.iops, before.p99.Seconds()*1000
	r.ClientDuring, r.P99DuringMs = during.iops, during.p99.Seconds()*1000
	return r, nil
}

func (f *flock) replace(ctx context.Context, i int) (time.Duration, error) {
	return f.replaceWith(ctx, i, func() {})
}

// replaceWith loses node i, and returns how long it took until another one in its place held everything, from when
// it began to be brought there.
func (f *flock) replaceWith(ctx context.Context, i int, begun func()) (time.Duration, error) {
	name := fmt.Sprint("n", i+1)
	f.kill(i)
	if err := f.until(ctx, "the dead node is removed", func() bool { return f.dog("node", "remove", name) == nil }); err != nil {
		return 0, err
	}
	if err := os.RemoveAll(f.disk(i)); err != nil {
		return 0, err
	}
	f.settle()
	if err := f.launch(i); err != nil {
		return 0, err
	}
	learning := func() bool {
		var r recovery
		return f.ask(&r, "node", "recovery") == nil && slices.ContainsFunc(r.Nodes, func(n struct {
			Node     string
			Learning int
		}) bool {
			return n.Learning > 0
		})
	}
	if err := f.until(ctx, "the new node begins to learn", learning); err != nil {
		return 0, err
	}
	began := time.Now()
	begun()
	err := f.whole(ctx)
	return time.Since(began), err
}

func (r *recoveryFigure) print() {
	share := r.ClientDuring / max(r.ClientBefore, 1)
	fmt.Printf("\nrecovery of %d MiB after the loss of a node\n", r.MiB)
	fmt.Printf("  nobody else at work    %6.0f MB/s    original %d MB/s    goal %d MB/s %s\n", r.IdleMBs, originalRecovery, goalRecovery, verdict(r.IdleMBs >= goalRecovery))
	fmt.Printf("  with a client at work  %6.0f MB/s\n", r.BusyMBs)
	fmt.Printf("  the client (4k FUA writes, depth 1): %s IOPS before, %s meanwhile: keeps %.0f %%    original %.0f %%    goal %.0f %% %s\n", short(r.ClientBefore), short(r.ClientDuring),
		100*share, 100*originalShare, 100*goalShare, verdict(share >= goalShare))
	fmt.Printf("  its p99: %.1f ms before, %.1f ms meanwhile    original %d ms\n", r.P99BeforeMs, r.P99DuringMs, originalP99)
}

// work is what a client got done.
type work struct {
	iops float64
	p99  time.Duration
}

// hammer writes 4 KiB blocks at random places, each durable before the next, until ctx ends.
func hammer(ctx context.Context, v *server) (work, error) {
	conn, err := client.Dial(v.network, v.address, v.export)
	if err != nil {
		return work{}, err
	}
	defer conn.Close()
	random := rand.New(rand.NewPCG(1, uint64(time.Now().UnixNano())))
	block := make([]byte, 4096)
	var took []time.Duration
	began := time.Now()
	for ctx.Err() == nil {
		at := time.Now()
		if err := conn.Write(block, random.Uint64N(conn.Size/4096)*4096, client.FlagFUA); err != nil {
			return work{}, fmt.Errorf("the client's write: %w", err)
		}
		took = append(took, time.Since(at))
	}
	if len(took) == 0 {
		return work{}, errors.New("the client got nothing done")
	}
	w := work{iops: float64(len(took)) / time.Since(began).Seconds()}
	slices.Sort(took)
	w.p99 = took[len(took)*99/100]
	return w, nil
}
