package main

import (
	"context"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"sheepdog/integration/driver"
)

// nativeSide is one of those that are measured by turns over the native protocol: a flock of ours, or a cluster that
// somebody else has started.
type nativeSide struct {
	address, volume string
	cpu             func() time.Duration // of all its nodes
	rss             func() int64         // of the largest, bytes
}

// peer is a cluster that runs already and is measured beside ours: an older one, say. It is reached at -peer; -peer-pids are the
// processes of its nodes, if they are on this machine.
type peer struct {
	address string
	pids    []int
}

// parsePeer takes the two options; without an address there is none.
func parsePeer(address, pids string) (*peer, error) {
	if address == "" {
		return nil, nil
	}
	p := &peer{address: address}
	for _, field := range strings.FieldsFunc(pids, func(r rune) bool { return r == ',' }) {
		pid, err := strconv.Atoi(field)
		if err != nil {
			return nil, fmt.Errorf("-peer-pids: %w", err)
		}
		p.pids = append(p.pids, pid)
	}
	return p, nil
}

// fill makes a volume there, which is written as one of ours is by server.prefill: all of it, and then as much at random places.
func (p *peer) fill(ctx context.Context, volume string, size uint64) (nativeSide, error) {
	side := nativeSide{address: p.address, volume: volume, cpu: p.cpu, rss: p.rss}
	if err := driver.Create(p.address, volume, size, 0, 0); err != nil {
		return side, fmt.Errorf("create %s: %w", volume, err)
	}
	d, err := driver.Open(p.address, volume, "", driver.FlagDirect)
	if err != nil {
		return side, fmt.Errorf("open %s: %w", volume, err)
	}
	piece := make([]byte, 1<<20)
	for i := range piece {
		piece[i] = byte(i*i>>8 + i) // neither zeros nor the same in all sectors
	}
	for at := uint64(0); at < size && err == nil; at += uint64(len(piece)) {
		if err = ctx.Err(); err == nil {
			err = d.Write(piece[:min(uint64(len(piece)), size-at)], at)
		}
	}
	if closing := d.Close(); err == nil {
		err = closing
	}
	if err != nil {
		return side, fmt.Errorf("fill %s: %w", volume, err)
	}
	use := nativeLoad{write: true, random: true, block: 64 << 10, depth: 16, most: size / (64 << 10)}
	_, _, err = use.run(ctx, side.address, side.volume, math.MaxInt64)
	return side, err
}

// remove deletes the volume.
func (p *peer) remove(volume string) error { return driver.Delete(p.address, volume, "") }

func (p *peer) cpu() (total time.Duration) {
	for _, pid := range p.pids {
		total += cpuOfProcess(pid)
	}
	return total
}

func (p *peer) rss() (most int64) {
	for _, pid := range p.pids {
		most = max(most, rssOfProcess(pid))
	}
	return most
}
