package storage

import (
	"encoding/binary"
	"math"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/zeebo/xxh3"

	"sheepdog/storage/object"
)

// routes says which drive a group lives on. A group that a disk has something of
// lives there, whatever the hash says: disks may come and grow without anything
// moving. Looking up takes no lock.
type routes struct {
	lineup atomic.Pointer[lineup]
	mu     sync.Mutex // of those who change pages
	pages  [256]atomic.Pointer[routePage]
}

// lineup is the disks that there are. It never changes; another one takes its place.
type lineup struct {
	slots  []*drive // by the numbers that pages have; nil: the disk was taken out
	drives []*drive // those that are there, in the order in which they came
}

// routePage has a number for each partition of a policy: 0, or its drive's slot plus one.
type routePage [1 << 16]atomic.Uint32

// drives are those that there are.
func (t *routes) drives() []*drive {
	if l := t.lineup.Load(); l != nil {
		return l.drives
	}
	return nil
}

// add gives a drive a slot, for groups that are claimed or come.
func (t *routes) add(d *drive) (slot int) {
	next := &lineup{}
	if l := t.lineup.Load(); l != nil {
		next.slots, next.drives = append(next.slots, l.slots...), append(next.drives, l.drives...)
	}
	d.routes = t
	slot = len(next.slots)
	next.slots, next.drives = append(next.slots, d), append(next.drives, d)
	t.lineup.Store(next)
	return slot
}

func (t *routes) find(g object.Group) *drive {
	if d := t.at(g); d != nil {
		return d
	}
	return t.place(g)
}

// at is the drive on which a group lives; nil: it lives nowhere yet.
func (t *routes) at(g object.Group) *drive {
	l := t.lineup.Load()
	if i := t.get(g); i != 0 && int(i) <= len(l.slots) {
		return l.slots[i-1]
	}
	return nil
}

func (t *routes) get(g object.Group) uint32 {
	if p := t.pages[g.Policy].Load(); p != nil {
		return p[g.Partition].Load()
	}
	return 0
}

// place finds a drive for a group that lives nowhere, or on a disk that was taken out.
func (t *routes) place(g object.Group) *drive {
	t.mu.Lock()
	defer t.mu.Unlock()
	l, p := t.lineup.Load(), t.page(g)
	if i := p[g.Partition].Load(); i != 0 && l.slots[i-1] != nil {
		return l.slots[i-1]
	}
	drives := l.drives
	if slices.ContainsFunc(drives, (*drive).leaves) {
		if stay := slices.DeleteFunc(slices.Clone(drives), (*drive).leaves); len(stay) > 0 {
			drives = stay
		}
	}
	d := drives[rendezvous(g, drives)]
	p[g.Partition].Store(uint32(slices.Index(l.slots, d) + 1))
	return d
}

// on lists the groups that live on a drive.
func (t *routes) on(d *drive) (list []object.Group) {
	slot := uint32(slices.Index(t.lineup.Load().slots, d) + 1)
	for policy := range t.pages {
		p := t.pages[policy].Load()
		for i := 0; p != nil && i < len(p); i++ {
			if p[i].Load() == slot {
				list = append(list, object.Group{Policy: object.PolicyID(policy), Partition: object.Partition(i)})
			}
		}
	}
	return list
}

// count counts the groups that live on each drive.
func (t *routes) count() map[*drive]int {
	slots := t.lineup.Load().slots
	count := make(map[*drive]int)
	for policy := range t.pages {
		p := t.pages[policy].Load()
		for i := 0; p != nil && i < len(p); i++ {
			if slot := p[i].Load(); slot != 0 && int(slot) <= len(slots) {
				count[slots[slot-1]]++
			}
		}
	}
	return count
}

// drop takes a drive out of the lineup. What still is said to live there lives nowhere.
func (t *routes) drop(d *drive) {
	l := t.lineup.Load()
	next := &lineup{slots: slices.Clone(l.slots), drives: slices.DeleteFunc(slices.Clone(l.drives), func(o *drive) bool { return o == d })}
	next.slots[slices.Index(l.slots, d)] = nil
	t.lineup.Store(next)
}

// page is a policy's, made when first needed. mu is held.
func (t *routes) page(g object.Group) *routePage {
	p := t.pages[g.Policy].Load()
	if p == nil {
		p = new(routePage)
		t.pages[g.Policy].Store(p)
	}
	return p
}

// claim records that g lives in a slot unless it lives somewhere already, and returns where.
func (t *routes) claim(g object.Group, slot int) (at int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	l, p := t.lineup.Load(), t.page(g)
	if i := p[g.Partition].Load(); i != 0 && l.slots[i-1] != nil {
		return int(i - 1)
	}
	p[g.Partition].Store(uint32(slot + 1))
	return slot
}

// rendezvous chooses the drive with the highest weighted score: each drive gets its
// capacity's share of the groups, and a drive that is added takes groups from the
// others only.
func rendezvous(g object.Group, drives []*drive) int {
	best, bestScore := 0, math.Inf(-1)
	for i, d := range drives {
		b := append([]byte(d.name), byte(g.Policy))
		b = binary.LittleEndian.AppendUint16(b, uint16(g.Partition))
		// Uniform in (0, 1): 53 bits, and never 0.
		u := (float64(xxh3.Hash(b)>>11) + 0.5) / (1 << 53)
		score := float64(d.weight) / -math.Log(u)
		if score > bestScore || score == bestScore && d.name < drives[best].name {
			best, bestScore = i, score
		}
	}
	return best
}
