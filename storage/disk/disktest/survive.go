package disktest

// survival decides what of the volatile state is there after a power cut.
type survival struct {
	seed uint64
	// odds, of 256, that a change survives: 0 loses all, 256 keeps all.
	odds uint64
}

// newSurvival: seed 0 loses everything that was not synced and seed 1 keeps it; the
// others decide for each sector and entry, some of them in favour of one outcome.
func newSurvival(seed uint64) survival {
	switch seed {
	case 0:
		return survival{seed, 0}
	case 1:
		return survival{seed, 256}
	}
	return survival{seed, []uint64{128, 128, 16, 240}[mix(seed)%4]}
}

// mix is the finaliser of splitmix64.
func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

func (s survival) dice(a, b uint64) uint64 { return mix(s.seed ^ mix(a^mix(b))) }

// cut picks how many of n changes in a row took place.
func (s survival) cut(inode, place uint64, n int) int {
	roll := s.dice(inode, place)
	if roll%256 < s.odds {
		// Mostly the newest state, at times one on the way there.
		if s.odds == 256 || roll>>8%4 != 0 {
			return n
		}
		return int(roll >> 16 % uint64(n+1))
	}
	return 0
}

const sizePlace = ^uint64(0) // where a sector number would stand

// Reopen returns the disk as it is found when the power is back: seed decides which
// unsynced sectors and directory entries are there (0: none, 1: all). The power of
// this disk is cut if it was not yet; it stays as it was, so that other outcomes of the
// same crash can be had from it.
func (d *Disk) Reopen(seed uint64) *Disk {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.crashed = true
	c := copier{disk: d.successor(), survive: newSurvival(seed), copies: map[*inode]*inode{}}
	holds := closure(d.pending, func(ch *entryChange) bool {
		e := ch.entries[0]
		return c.survive.dice(e.dir.id, nameHash(e.name))%256 < c.survive.odds
	})
	over := map[*inode]map[string]*inode{}
	for i, ch := range d.pending {
		if !holds[i] {
			continue
		}
		for _, e := range ch.entries {
			if over[e.dir] == nil {
				over[e.dir] = map[string]*inode{}
			}
			over[e.dir][e.name] = e.target
		}
	}
	c.over = over
	c.disk.root = c.survivor(d.root)
	return c.disk
}

// Restart returns the disk as a new process finds it after the old one was killed: all
// is there, and what was not synced is still not safe from a power cut. This disk
// fails all operations from now on.
func (d *Disk) Restart() *Disk {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.crashed = true
	c := copier{disk: d.successor(), copies: map[*inode]*inode{}}
	c.disk.root = c.same(d.root)
	for _, ch := range d.pending {
		cp := &entryChange{synced: append([]bool(nil), ch.synced...)}
		for _, e := range ch.entries {
			cp.entries = append(cp.entries, entry{c.same(e.dir), e.name, c.same(e.target)})
		}
		c.disk.pending = append(c.disk.pending, cp)
	}
	return c.disk
}

// successor is a disk with the settings of d and nothing on it.
func (d *Disk) successor() *Disk {
	return &Disk{name: d.name, lastID: d.lastID, capacity: d.capacity}
}

func nameHash(s string) uint64 {
	h := uint64(14695981039346656037)
	for i := range len(s) {
		h = (h ^ uint64(s[i])) * 1099511628211
	}
	return h
}

// copier makes the inodes of a successor.
type copier struct {
	disk    *Disk
	survive survival
	over    map[*inode]map[string]*inode // entries that differ from the durable ones
	copies  map[*inode]*inode
}

// survivor copies what a power cut left of an inode and all below it.
func (c *copier) survivor(n *inode) *inode {
	if n == nil {
		return nil
	}
	if cp := c.copies[n]; cp != nil {
		return cp
	}
	cp := &inode{id: n.id, dir: n.dir}
	c.copies[n] = cp
	if !n.dir {
		c.content(cp, n)
		return cp
	}
	cp.entries, cp.durableEntries = map[string]*inode{}, map[string]*inode{}
	for name, target := range n.durableEntries {
		if _, changed := c.over[n][name]; !changed {
			c.link(cp, name, c.survivor(target))
		}
	}
	for name, target := range c.over[n] {
		if target != nil {
			c.link(cp, name, c.survivor(target))
		}
	}
	return cp
}

func (c *copier) link(dir *inode, name string, target *inode) {
	target.links++
	dir.entries[name], dir.durableEntries[name] = target, target
}

// content gives a file what survived of it. Each sector has had a row of contents
// since it was synced, and holds one of them.
func (c *copier) content(cp, n *inode) {
	cp.pages, cp.durable, cp.dirty = clonePages(n.durable), nil, map[int64]struct{}{}
	cp.size = n.durableSize
	if k := len(n.sizes); k > 0 {
		if cut := c.survive.cut(n.id, sizePlace, k); cut > 0 {
			cp.size = n.sizes[cut-1]
		}
	}
	left := map[int64]int{} // changes of the sector that take place
	for i := range n.writes {
		n.writes[i].sectors(func(s int64) { left[s]++ })
	}
	for s, count := range left {
		left[s] = c.survive.cut(n.id, uint64(s), count)
	}
	holes := map[int64]int{} // per page: sectors that a hole left
	for i := range n.writes {
		w := &n.writes[i]
		w.sectors(func(s int64) {
			if left[s]--; left[s] < 0 {
				return
			}
			cp.apply(w, s, holes)
		})
	}
	for p, sectors := range holes {
		if sectors == 1<<sectorsPerPage-1 {
			delete(cp.pages, p)
		}
	}
	cp.trim()
	cp.durable, cp.durableSize = clonePages(cp.pages), cp.size
	clear(cp.dirty)
	for _, pg := range cp.pages {
		if !pg.frozen {
			pg.frozen = true
		}
	}
	c.disk.used += int64(len(cp.pages))
}

// apply carries out the part of a write that lies in sector s.
func (n *inode) apply(w *write, s int64, holes map[int64]int) {
	p := s / sectorsPerPage
	bit := 1 << (s % sectorsPerPage)
	if w.holes != nil {
		if n.pages[p] != nil {
			in := s % sectorsPerPage * sectorSize
			clear(n.writable(p).data[in : in+sectorSize])
		}
		holes[p] |= bit
		return
	}
	holes[p] &^= bit
	from, to := max(s*sectorSize, w.off), min((s+1)*sectorSize, w.off+int64(len(w.data)))
	copy(n.writable(p).data[from%pageSize:], w.data[from-w.off:to-w.off])
}

// trim clears what lies behind the end of the file: a lost size hides it, and it may
// not come back when the file grows again.
func (n *inode) trim() {
	for p, pg := range n.pages {
		switch {
		case p*pageSize >= n.size:
			delete(n.pages, p)
		case (p+1)*pageSize > n.size && !isZero(pg.data[n.size-p*pageSize:]):
			clear(n.writable(p).data[n.size-p*pageSize:])
		}
	}
}

// sectors calls fn for every sector that the write touches.
func (w *write) sectors(fn func(s int64)) {
	for _, p := range w.holes {
		for s := range int64(sectorsPerPage) {
			fn(p*sectorsPerPage + s)
		}
	}
	if len(w.data) > 0 {
		for s := w.off / sectorSize; s <= (w.off+int64(len(w.data))-1)/sectorSize; s++ {
			fn(s)
		}
	}
}

// same copies an inode and all below it with everything that is not durable.
func (c *copier) same(n *inode) *inode {
	if n == nil {
		return nil
	}
	if cp := c.copies[n]; cp != nil {
		return cp
	}
	cp := &inode{id: n.id, dir: n.dir, links: n.links, size: n.size, durableSize: n.durableSize}
	c.copies[n] = cp
	if n.dir {
		cp.entries, cp.durableEntries = map[string]*inode{}, map[string]*inode{}
		for name, target := range n.entries {
			cp.entries[name] = c.same(target)
		}
		for name, target := range n.durableEntries {
			cp.durableEntries[name] = c.same(target)
		}
		return cp
	}
	for _, pg := range n.pages {
		if !pg.frozen {
			pg.frozen = true
		}
	}
	cp.pages, cp.durable = clonePages(n.pages), clonePages(n.durable)
	cp.dirty = map[int64]struct{}{}
	for p := range n.dirty {
		cp.dirty[p] = struct{}{}
	}
	cp.writes = append([]write(nil), n.writes...)
	cp.sizes = append([]int64(nil), n.sizes...)
	if n.links > 0 {
		c.disk.used += int64(len(cp.pages))
	} else {
		cp.pages = map[int64]*page{}
	}
	return cp
}

func clonePages(pages map[int64]*page) map[int64]*page {
	cp := make(map[int64]*page, len(pages))
	for p, pg := range pages {
		cp[p] = pg
	}
	return cp
}
