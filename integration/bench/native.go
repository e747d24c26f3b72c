package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"sheepdog/integration/driver"
)

// nativeCase is work over the native protocol, as QEMU's driver sends it with cache=none: every write is durable when it is
// answered. The original's figures are of one node with one copy and of three with three; see original.go.
type nativeCase struct {
	name, unit string
	load       nativeLoad
	one, three float64 // the original's
	goals      [2]float64
}

var nativeCases = []nativeCase{
	{"4k-randread-qd1", "IOPS", nativeLoad{random: true, block: 4 << 10, depth: 1}, 7100, 5500, [2]float64{}},
	{"4k-randread-qd32", "IOPS", nativeLoad{random: true, block: 4 << 10, depth: 32}, 23000, 17600, [2]float64{3, 2}},
	{"4k-randwrite-qd1", "IOPS", nativeLoad{write: true, random: true, block: 4 << 10, depth: 1}, 2300, 1100, [2]float64{}},
	{"4k-randwrite-qd32", "IOPS", nativeLoad{write: true, random: true, block: 4 << 10, depth: 32}, 5800, 2200, [2]float64{3, 5}},
	{"64k-read-qd1", "MB/s", nativeLoad{block: 64 << 10, depth: 1}, 326, 269, [2]float64{}},
	{"64k-read-qd32", "MB/s", nativeLoad{block: 64 << 10, depth: 32}, 506, 479, [2]float64{}},
	{"64k-write-qd1", "MB/s", nativeLoad{write: true, block: 64 << 10, depth: 1}, 119, 71, [2]float64{0, 3}},
	{"64k-write-qd32", "MB/s", nativeLoad{write: true, block: 64 << 10, depth: 32}, 172, 85, [2]float64{0, 3}},
	{"1m-read-qd1", "MB/s", nativeLoad{block: 1 << 20, depth: 1}, 998, 852, [2]float64{}},
	{"1m-read-qd32", "MB/s", nativeLoad{block: 1 << 20, depth: 32}, 1456, 1106, [2]float64{}},
	{"1m-write-qd1", "MB/s", nativeLoad{write: true, block: 1 << 20, depth: 1}, 298, 194, [2]float64{0, 3}},
	{"1m-write-qd32", "MB/s", nativeLoad{write: true, block: 1 << 20, depth: 32}, 562, 255, [2]float64{0, 3}},
}

// runNative measures the native protocol: one node with one copy, then three with three, then the long writes on three that
// do not encrypt what they say to each other.
func runNative(ctx context.Context, o options) error {
	if o.peer != nil {
		if err := warm(o.disk, o); err != nil {
			return err
		}
	}
	var all []clusterFigure
	for _, on := range []nativeFlock{{nodes: 1, name: "-1n"}, {nodes: flockNodes, name: "-3n"}, {nodes: flockNodes, name: "-3n-plain", plain: true}} {
		figures, err := on.measure(ctx, o)
		if err != nil {
			return fmt.Errorf("%d nodes: %w", on.nodes, err)
		}
		all = append(all, figures...)
	}
	printCluster(all)
	if o.peer != nil {
		fmt.Printf("original: here the cluster at %s, in the same rounds; CPU of ours / of that\n", o.peer.address)
	}
	if o.jsonPath == "" {
		return nil
	}
	b, err := json.MarshalIndent(all, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(o.jsonPath, append(b, '\n'), 0o644)
}

// nativeFlock is what the native protocol is measured on.
type nativeFlock struct {
	nodes int
	name  string // behind the cases'
	plain bool
}

func (on nativeFlock) figure(c nativeCase) clusterFigure {
	f := clusterFigure{Case: c.name + on.name, Unit: c.unit, Original: c.three, Goal: c.goals[1]}
	if on.nodes == 1 {
		f.Original, f.Goal = c.one, c.goals[0]
	}
	return f
}

func (on nativeFlock) measure(ctx context.Context, o options) (figures []clusterFigure, err error) {
	cases := slices.DeleteFunc(slices.Clone(nativeCases), func(c nativeCase) bool {
		long := c.load.write && c.load.block > 4<<10
		return on.plain && !long || !o.only.MatchString(c.name+on.name)
	})
	if len(cases) == 0 {
		return nil, nil
	}
	work, err := os.MkdirTemp(o.disk, "sheepdog-bench-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(work)
	fmt.Printf("%d nodes, as many copies, %d rounds of %v, volume of %d MiB over the native protocol, on %s\n", on.nodes, o.rounds, o.runtime, o.sizeMiB, work)
	f, err := startFlock(ctx, o, work, on.nodes, on.plain)
	if err != nil {
		return nil, err
	}
	defer f.stop()
	v := f.volume("vm1", int64(o.sizeMiB)<<20)
	v.dir = filepath.Join(f.dir, "volume") // its parent has the image
	if err := os.Mkdir(v.dir, 0o755); err != nil {
		return nil, err
	}
	if err := f.dog("vdi", "create", v.export, fmt.Sprint(v.size)); err != nil {
		return nil, err
	}
	if err := v.prefill(ctx, o); err != nil {
		return nil, err
	}
	sides := []nativeSide{{address: net.JoinHostPort(f.host(0), "7000"), volume: v.export, cpu: f.cpu, rss: f.rss}}
	if o.peer != nil {
		name := fmt.Sprintf("bench-%d%s", os.Getpid(), on.name) // names of deleted volumes may take a while to be free
		other, err := o.peer.fill(ctx, name, uint64(v.size))
		if err != nil {
			return nil, fmt.Errorf("the cluster at %s: %w", o.peer.address, err)
		}
		defer func() { err = errors.Join(err, o.peer.remove(name)) }()
		sides = append(sides, other)
	}
	for _, c := range cases {
		fig := on.figure(c)
		results := []*series{&fig.Sheep}
		if len(sides) > 1 {
			fig.Peer = &series{}
			results = append(results, fig.Peer)
		}
		for round := range o.rounds {
			for i := range sides {
				at := (round + i) % len(sides) // nobody is always first
				m, err := c.measure(ctx, o, sides, at)
				if err != nil {
					return figures, fmt.Errorf("%s, %s: %w\n%s", fig.Case, sides[at].address, err, f.logs[0].String())
				}
				results[at].add(m)
			}
		}
		fmt.Printf("%-24s %s\n", fig.Case, strings.Join(shorts(fig.Sheep.Rounds), " "))
		if fig.Peer != nil {
			fig.Original = median(fig.Peer.Rounds)
			fmt.Printf("%24s %s; ratio %.2f, CPU %.0f / %.0f µs/op\n", sides[1].address, strings.Join(shorts(fig.Peer.Rounds), " "), median(fig.Sheep.Rounds)/fig.Original,
				median(fig.Sheep.CPUMicros), median(fig.Peer.CPUMicros))
		}
		figures = append(figures, fig)
	}
	return figures, nil
}

// measure has one of the sides work, when all of them are at rest.
func (c nativeCase) measure(ctx context.Context, o options, sides []nativeSide, at int) (measurement, error) {
	settle(func() (total time.Duration) {
		for _, s := range sides {
			total += s.cpu()
		}
		return total
	})
	side := sides[at]
	before := side.cpu()
	done, took, err := c.load.run(ctx, side.address, side.volume, o.runtime)
	if err != nil {
		return measurement{}, err
	}
	value := done / took.Seconds()
	if c.unit == "MB/s" {
		value *= float64(c.load.block) / 1e6
	}
	return measurement{value: value, ops: done, cpu: side.cpu() - before, rss: side.rss()}, nil
}

// nativeLoad is requests of one size for data objects, so many in flight on one connection. As in fua, all answers that have
// come are taken, and as many requests go out in one call.
type nativeLoad struct {
	write, random bool
	block, depth  int
	most          uint64 // requests, 0: as many as the time allows
}

// run works on a volume that is full of data, and returns how many requests were answered, and the time.
func (l nativeLoad) run(ctx context.Context, address, volume string, limit time.Duration) (done float64, took time.Duration, err error) {
	d, err := driver.Open(address, volume, "", driver.FlagDirect)
	if err != nil {
		return 0, 0, err
	}
	defer d.Close()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		return 0, 0, err
	}
	defer conn.Close()
	w := nativeWorker{nativeLoad: l, disk: d, conn: conn, replies: bufio.NewReaderSize(conn, 1<<20), data: make([]byte, l.block), places: rand.New(rand.NewPCG(1, uint64(time.Now().UnixNano())))}
	for i := range w.data {
		w.data[i] = byte(w.places.Uint32())
	}
	began, flying := time.Now(), l.depth
	if err := w.send(flying); err != nil {
		return 0, 0, err
	}
	for flying > 0 {
		n, err := w.take()
		if err != nil {
			return 0, 0, err
		}
		done += float64(n)
		flying -= n
		if time.Since(began) < limit && ctx.Err() == nil && (l.most == 0 || w.count < l.most) {
			if err := w.send(n); err != nil {
				return 0, 0, err
			}
			flying += n
		}
	}
	return done, time.Since(began), nil
}

type nativeWorker struct {
	nativeLoad
	disk    *driver.Disk
	conn    net.Conn
	replies *bufio.Reader
	data    []byte
	places  *rand.Rand
	count   uint64
	out     []byte
}

func (w *nativeWorker) send(n int) error {
	w.out = w.out[:0]
	blocks := w.disk.Size() / uint64(w.block)
	for range n {
		at := w.count % blocks * uint64(w.block)
		if w.random {
			at = w.places.Uint64N(blocks) * uint64(w.block)
		}
		w.count++
		object := uint64(w.disk.ObjectSize())
		r := driver.Request{Op: driver.OpRead, Flags: driver.FlagDirect, Want: uint32(w.block), Copies: w.disk.Copies(),
			OID: uint64(w.disk.Entry(int(at/object)))<<32 | at/object, Offset: at % object}
		if w.write {
			binary.LittleEndian.PutUint64(w.data, w.count) // nothing is written twice
			r.Op, r.Flags, r.Payload = driver.OpWrite, driver.FlagDirect|driver.FlagWrite, w.data
		}
		w.out = r.Append(w.out, uint32(w.count))
	}
	_, err := w.conn.Write(w.out)
	return err
}

// take waits for an answer, and takes all that have come; each must be good.
func (w *nativeWorker) take() (n int, err error) {
	const header = 48
	for n == 0 || w.replies.Buffered() >= header {
		h, err := w.replies.Peek(header)
		if err != nil {
			return n, err
		}
		if result := binary.LittleEndian.Uint32(h[16:]); result != 0 {
			return n, driver.Result(result)
		}
		size := int(binary.LittleEndian.Uint32(h[12:]))
		if !w.write && size != w.block {
			return n, errors.New("an answer of another length")
		}
		w.replies.Discard(header)
		if size > 0 {
			if _, err := io.ReadFull(w.replies, w.data[:size]); err != nil {
				return n, err
			}
		}
		n++
	}
	return n, nil
}
