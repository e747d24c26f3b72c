package disktest

import (
	"io"
	"io/fs"
	"maps"
	"slices"
	"syscall"

	"sheepdog/storage/disk"
)

const (
	pageSize       = 4096
	sectorSize     = 512
	sectorsPerPage = pageSize / sectorSize
)

// page is the content of one page of a file. A frozen page is shared by several
// states of the disk and is never changed again.
type page struct {
	data   [pageSize]byte
	frozen bool
}

var zeroPage = &page{frozen: true}

// inode is a file or a directory.
type inode struct {
	id      uint64
	dir     bool
	links   int // names
	handles int // open

	entries, durableEntries map[string]*inode

	size, durableSize int64
	pages, durable    map[int64]*page // what is not there is a hole
	dirty             map[int64]struct{}
	writes            []write         // not durable, oldest first
	sizes             []int64         // that the file had since it was synced, oldest first
	written, sized    uint64          // how many writes and sizes were before those
	lost              map[int64]*page // pages that a sync that failed has covered
}

// write is a change of content that is not durable: data at off, or holes in place of
// whole pages.
type write struct {
	off   int64
	data  []byte
	holes []int64
}

// writable returns page p for changing.
func (n *inode) writable(p int64) *page {
	pg := n.pages[p]
	switch {
	case pg == nil:
		pg = new(page)
	case pg.frozen:
		pg = &page{data: pg.data}
	}
	n.pages[p] = pg
	n.dirty[p] = struct{}{}
	return pg
}

// store changes the content as far as the pages are there or may be made: budget says
// how many. It returns how many bytes were stored.
func (n *inode) store(b []byte, off, budget int64) (stored int, made int64) {
	for stored < len(b) {
		p, in := (off+int64(stored))/pageSize, int((off+int64(stored))%pageSize)
		k := min(len(b)-stored, pageSize-in)
		if n.pages[p] == nil {
			if made == budget {
				break
			}
			made++
		}
		if k == pageSize && isZero(b[stored:stored+k]) {
			n.pages[p] = zeroPage
			n.dirty[p] = struct{}{}
		} else {
			copy(n.writable(p).data[in:], b[stored:stored+k])
		}
		stored += k
	}
	return stored, made
}

func isZero(b []byte) bool { return string(b) == string(zeroPage.data[:len(b)]) }

// zeros is what writes of zeros share: logs and objects are filled with megabytes of them.
var zeros [1 << 20]byte

// keep returns a copy of b that nobody changes.
func keep(b []byte) []byte {
	if len(b) <= len(zeros) && string(b) == string(zeros[:len(b)]) {
		return zeros[:len(b)]
	}
	return slices.Clone(b)
}

func (n *inode) setSize(size int64) {
	if size != n.size {
		n.size = size
		n.sizes = append(n.sizes, size)
	}
}

// zero makes [off, end) read as zero; whole pages become holes. It returns how many
// pages it freed.
func (n *inode) zero(off, end int64) (freed int64) {
	first, last := (off+pageSize-1)/pageSize, end/pageSize
	if first > last { // within one page
		n.zeroBytes(off, end)
		return 0
	}
	n.zeroBytes(off, first*pageSize)
	n.zeroBytes(last*pageSize, end)
	var holes []int64
	if last-first < int64(len(n.pages)) {
		for p := first; p < last; p++ {
			if n.pages[p] != nil {
				holes = append(holes, p)
			}
		}
	} else {
		for p := range n.pages {
			if p >= first && p < last {
				holes = append(holes, p)
			}
		}
		slices.Sort(holes)
	}
	for _, p := range holes {
		delete(n.pages, p)
		n.dirty[p] = struct{}{}
	}
	if len(holes) > 0 {
		n.writes = append(n.writes, write{holes: holes})
	}
	return int64(len(holes))
}

// zeroBytes zeroes a part of one page, if it is there.
func (n *inode) zeroBytes(off, end int64) {
	if off >= end || n.pages[off/pageSize] == nil {
		return
	}
	data := zeros[:end-off]
	n.store(data, off, 0)
	n.writes = append(n.writes, write{off: off, data: data})
}

// snapshot is what a Sync covers.
type snapshot struct {
	pages map[int64]*page // that are not durable; nil: a hole
	end   uint64          // of the changes, by their numbers
	sizes uint64
	size  int64
}

// snapshot begins a sync: the pages of now are not changed any more, others take their places.
func (n *inode) snapshot() snapshot {
	c := snapshot{pages: make(map[int64]*page, len(n.dirty)), end: n.written + uint64(len(n.writes)), sizes: n.sized + uint64(len(n.sizes)), size: n.size}
	for p := range n.dirty {
		pg := n.pages[p]
		if pg != nil && !pg.frozen {
			pg.frozen = true
		}
		c.pages[p] = pg
	}
	return c
}

// sync makes content and size durable, unless a sync that began later has.
func (n *inode) sync(c snapshot) {
	if c.end < n.written || c.sizes < n.sized {
		return
	}
	for p, pg := range c.pages {
		switch lost, known := n.lost[p]; {
		case known && lost == pg:
		case pg != nil:
			n.durable[p] = pg
		default:
			delete(n.durable, p)
		}
	}
	n.durableSize = c.size
	n.clean(c)
}

// lose ends a sync that has failed: those that are under way do not make up for it either.
func (n *inode) lose(c snapshot) {
	if n.lost == nil {
		n.lost = map[int64]*page{}
	}
	for p, pg := range c.pages {
		if n.durable[p] != pg {
			n.lost[p] = pg
		}
	}
	n.clean(c)
}

// clean takes what a sync covers for clean.
func (n *inode) clean(c snapshot) {
	for p, pg := range c.pages {
		if n.pages[p] == pg {
			delete(n.dirty, p)
		}
	}
	if k := c.end - min(c.end, n.written); k > 0 {
		n.writes = append([]write(nil), n.writes[k:]...)
		n.written += k
	}
	if k := c.sizes - min(c.sizes, n.sized); k > 0 {
		n.sizes = append([]int64(nil), n.sizes[k:]...)
		n.sized += k
	}
}

// handle is an open file.
type handle struct {
	disk   *Disk
	inode  *inode
	name   string
	closed bool // guarded by disk.mu
}

// enter begins an operation; on success disk.mu is held.
func (h *handle) enter(kind Kind, off, n int64) (last bool, err error) {
	if off < 0 || n < 0 || off > maxOffset-n {
		return false, pathError(kind.String(), h.name, fs.ErrInvalid)
	}
	last, err = h.disk.enter(Op{Kind: kind, Name: h.name, Off: off, Len: n})
	if err == nil && h.closed {
		h.disk.mu.Unlock()
		err = fs.ErrClosed
	}
	if err != nil {
		return false, pathError(kind.String(), h.name, err)
	}
	return last, nil
}

func (h *handle) ReadAt(p []byte, off int64) (int, error) {
	if _, err := h.enter(OpRead, off, int64(len(p))); err != nil {
		return 0, err
	}
	defer h.disk.mu.Unlock()
	n := h.inode.read(p, off)
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// ReadNowait finds everything in memory, unless a Hook says ErrWouldBlock.
func (h *handle) ReadNowait(p []byte, off int64) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if _, err := h.enter(OpReadNowait, off, int64(len(p))); err != nil {
		return 0, err
	}
	defer h.disk.mu.Unlock()
	n := h.inode.read(p, off)
	if n == 0 {
		return 0, io.EOF
	}
	return n, nil
}

func (n *inode) read(b []byte, off int64) int {
	b = b[:min(int64(len(b)), max(n.size-off, 0))]
	for done := 0; done < len(b); {
		at := off + int64(done)
		in := int(at % pageSize)
		k := min(len(b)-done, pageSize-in)
		if pg := n.pages[at/pageSize]; pg != nil {
			copy(b[done:done+k], pg.data[in:])
		} else {
			clear(b[done : done+k])
		}
		done += k
	}
	return len(b)
}

func (h *handle) WriteAt(b []byte, off int64) (int, error) {
	last, err := h.enter(OpWrite, off, int64(len(b)))
	if err != nil {
		return 0, err
	}
	n, d := h.inode, h.disk
	stored, made := n.store(b, off, max(d.capacity-d.used, 0))
	d.used += made
	if stored > 0 {
		n.writes = append(n.writes, write{off: off, data: keep(b[:stored])})
		n.setSize(max(n.size, off+int64(stored)))
	}
	if stored < len(b) {
		err = pathError("write", h.name, syscall.ENOSPC)
	}
	if err := d.leave(last, err); err != nil {
		return stored, err
	}
	return stored, nil
}

// Sync covers what was written before it began. If the hook fails it, what it covered is as with Linux: lost if the power goes, though
// it is still read, and no later Sync makes up for that.
func (h *handle) Sync() error {
	h.disk.mu.Lock()
	covered := h.inode.snapshot()
	h.disk.mu.Unlock()
	last, err := h.enter(OpSync, 0, 0)
	if err != nil {
		h.disk.mu.Lock()
		if !h.disk.crashed && !h.closed {
			h.inode.lose(covered)
		}
		h.disk.mu.Unlock()
		return err
	}
	if !last {
		h.inode.sync(covered)
	}
	return h.disk.leave(last, nil)
}

func (h *handle) PunchHole(off, n int64) error {
	last, err := h.enter(OpPunch, off, n)
	if err != nil {
		return err
	}
	if n == 0 { // as fallocate has it
		return h.disk.leave(last, pathError("punch", h.name, syscall.EINVAL))
	}
	h.disk.used -= h.inode.zero(off, off+n)
	return h.disk.leave(last, nil)
}

func (h *handle) Allocate(off, n int64) error {
	last, err := h.enter(OpAllocate, off, n)
	if err != nil {
		return err
	}
	if n == 0 {
		return h.disk.leave(last, pathError("allocate", h.name, syscall.EINVAL))
	}
	return h.disk.leave(last, h.disk.allocate(h, off, off+n))
}

func (d *Disk) allocate(h *handle, off, end int64) error {
	var need []int64
	for p := off / pageSize; p <= (end-1)/pageSize; p++ {
		if h.inode.pages[p] == nil {
			if d.used+int64(len(need)) >= d.capacity {
				return pathError("allocate", h.name, syscall.ENOSPC)
			}
			need = append(need, p)
		}
	}
	for _, p := range need {
		h.inode.pages[p] = zeroPage
		h.inode.dirty[p] = struct{}{}
	}
	d.used += int64(len(need))
	h.inode.setSize(max(h.inode.size, end))
	return nil
}

func (h *handle) Truncate(size int64) error {
	last, err := h.enter(OpTruncate, size, 0)
	if err != nil {
		return err
	}
	n := h.inode
	if size < n.size {
		h.disk.used -= n.zero(size, (n.size+pageSize-1)/pageSize*pageSize)
	}
	n.setSize(size)
	return h.disk.leave(last, nil)
}

func (h *handle) Size() (int64, error) {
	if _, err := h.enter(OpSize, 0, 0); err != nil {
		return 0, err
	}
	defer h.disk.mu.Unlock()
	return h.inode.size, nil
}

func (h *handle) NextData(off int64) (start, end int64, err error) {
	if _, err := h.enter(OpNextData, off, 0); err != nil {
		return 0, 0, err
	}
	defer h.disk.mu.Unlock()
	n := h.inode
	if off >= n.size {
		return 0, 0, io.EOF
	}
	p := off / pageSize
	if n.pages[p] == nil {
		if p = n.pageAfter(p); p < 0 || p*pageSize >= n.size {
			return 0, 0, io.EOF
		}
	}
	start = max(off, p*pageSize)
	for n.pages[p] != nil {
		p++
	}
	return start, min(p*pageSize, n.size), nil
}

// pageAfter returns the first page behind p, or -1.
func (n *inode) pageAfter(p int64) int64 {
	next := int64(-1)
	for q := range maps.Keys(n.pages) {
		if q > p && (next < 0 || q < next) {
			next = q
		}
	}
	return next
}

func (h *handle) StartWriteback(off, n int64) error {
	if _, err := h.enter(OpWriteback, off, n); err != nil {
		return err
	}
	h.disk.mu.Unlock()
	return nil
}

// Close works after a crash too: a process gets rid of its files in any case.
func (h *handle) Close() error {
	h.disk.mu.Lock()
	defer h.disk.mu.Unlock()
	if h.closed {
		return pathError("close", h.name, fs.ErrClosed)
	}
	h.closed = true
	h.inode.handles--
	if !h.disk.crashed {
		h.disk.reap(h.inode)
	}
	return nil
}

var _ disk.File = (*handle)(nil)
