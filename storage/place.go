package storage

import (
	"encoding/binary"
	"math"
	"sync"
	"sync/atomic"

	"github.com/zeebo/xxh3"

	"sheepdog/storage/object"
)

// routes says which drive a group lives on. A group that a disk has something of
// lives there, whatever the hash says: disks may come and grow without anything
// moving. Looking up takes no lock.
type routes struct {
	drives []*drive
	mu     sync.Mutex
	pages  [256]atomic.Pointer[routePage]
}

// routePage has one byte for each partition of a policy: 0, or the drive's index plus one.
type routePage [1 << 16]uint8 // guarded by routes.mu for writing; entries are written once, from 0

func (t *routes) find(g object.Group) *drive {
	if len(t.drives) == 1 {
		return t.drives[0]
	}
	if i := t.get(g); i != 0 {
		return t.drives[i-1]
	}
	return t.drives[t.set(g, rendezvous(g, t.drives))-1]
}

func (t *routes) get(g object.Group) uint8 {
	t.mu.Lock()
	defer t.mu.Unlock()
	if p := t.pages[g.Policy].Load(); p != nil {
		return p[g.Partition]
	}
	return 0
}

// set records that g lives on drive i unless it lives somewhere already, and returns
// the index plus one of where it lives.
func (t *routes) set(g object.Group, i int) uint8 {
	t.mu.Lock()
	defer t.mu.Unlock()
	p := t.pages[g.Policy].Load()
	if p == nil {
		p = new(routePage)
		t.pages[g.Policy].Store(p)
	}
	if p[g.Partition] == 0 {
		p[g.Partition] = uint8(i + 1)
	}
	return p[g.Partition]
}

// rendezvous chooses the drive with the highest weighted score: each drive gets its
// capacity's share of the groups, and a drive that is added takes groups from the
// others only.
func rendezvous(g object.Group, drives []*drive) int {
	best, bestScore := 0, math.Inf(-1)
	for i, d := range drives {
		b := append([]byte(d.id.Disk), byte(g.Policy))
		b = binary.LittleEndian.AppendUint16(b, uint16(g.Partition))
		// Uniform in (0, 1): 53 bits, and never 0.
		u := (float64(xxh3.Hash(b)>>11) + 0.5) / (1 << 53)
		score := float64(d.weight) / -math.Log(u)
		if score > bestScore || score == bestScore && d.id.Disk < drives[best].id.Disk {
			best, bestScore = i, score
		}
	}
	return best
}
