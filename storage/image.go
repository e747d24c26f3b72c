package storage

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"

	"sheepdog/storage/disk"
	"sheepdog/storage/object"
)

// copier makes groups of one disk anew on another one, as files in their places that do not count yet: a note
// says so. An object may be copied as often as it changes; only blocks whose checksums differ are.
// Checksums go with their blocks, and each is verified on the way. A block that is rotten stays so: its
// checksum goes alone. What a copier does is durable after sync.
type copier struct {
	ctx      context.Context
	from, to *drive
	pace     func(bytes int64) error // nil: as fast as it goes
	buf      []byte

	files   []disk.File     // not synced
	written int64           // bytes in them
	dirs    map[string]bool // entries are not durable
	made    map[object.Group]bool
	newDir  bool // entries of objectsDir are not durable
	moved   int64
	objects map[object.Key]bool
}

const (
	// syncFilesEvery and syncBytesEvery bound what is written before it is synced: less at a time delays others less.
	syncFilesEvery = 64
	syncBytesEvery = 8 << 20
	// objectCost is what an object counts for at least, in bytes: its files cost something too.
	objectCost = 32 << 10
)

// errShort: the disk that a group was to go to has not enough space.
var errShort = fmt.Errorf("disk is nearly full: %w", object.ErrNoSpace)

func newCopier(ctx context.Context, from, to *drive) *copier {
	return &copier{ctx: ctx, from: from, to: to, buf: make([]byte, copyChunk), dirs: map[string]bool{}, made: map[object.Group]bool{}, objects: map[object.Key]bool{}}
}

// group copies all objects of a group.
func (c *copier) group(g object.Group) error {
	ids, err := c.from.ids(g)
	if err != nil {
		return err
	}
	for _, id := range ids {
		if err := c.object(object.Key{Group: g, ID: id}); err != nil {
			return err
		}
	}
	return nil
}

// object makes the copy of an object what the object is now. If that changes meanwhile the copy may be anything.
func (c *copier) object(k object.Key) error {
	if err := c.ctx.Err(); err != nil {
		return err
	}
	h, sums, err := c.look(k)
	switch {
	case errors.Is(err, object.ErrNotFound):
		return c.to.explain(c.erase(k))
	case errors.Is(err, object.ErrCorrupt):
		return c.to.explain(c.ruin(k))
	case err != nil:
		return err
	}
	m, err := c.open(k, h)
	if err != nil {
		return c.to.explain(err)
	}
	c.files = append(c.files, m.file)
	c.objects[k] = true
	switch err := c.fill(m, sums); {
	case errors.Is(err, object.ErrNotFound), errors.Is(err, errShift): // deleted, and perhaps made anew: it has changed
		// The copy has content where its table says that there is none, which would be believed after a crash.
		return c.to.explain(c.erase(k))
	case err != nil:
		return err
	}
	if len(c.files) >= syncFilesEvery || c.written >= syncBytesEvery {
		return c.syncFiles()
	}
	return nil
}

// look returns the header and checksums that an object would have in a file of its own.
func (c *copier) look(k object.Key) (header, []uint64, error) {
	d := c.from
	o, err := d.lock(k)
	if err != nil {
		return header{}, nil, d.explain(err)
	}
	h := header{key: k, shift: o.shift, version: o.version, uncertain: o.uncertain}
	exists := o.exists
	o.mu.Unlock()
	if !exists {
		return h, nil, object.ErrNotFound
	}
	sums := make([]uint64, 0, blocksOf(h.shift))
	err = d.eachSum(c.ctx, k, 0, 0, func(_ uint32, sum uint64) { sums = append(sums, sum) })
	if err == nil && len(sums) != int(blocksOf(h.shift)) {
		err = object.ErrNotFound // another one has its name: it is looked at again
	}
	return h, sums, err
}

// erase removes the copy of an object that there is no more.
func (c *copier) erase(k object.Key) error {
	delete(c.objects, k)
	err := c.to.fs.Remove(objectPath(k))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	c.dirs[groupDir(k.Group)] = true
	return err
}

// ruin makes an object of which nothing can be read one of which nothing can be read.
func (c *copier) ruin(k object.Key) error {
	f, err := c.file(k)
	if err != nil {
		return err
	}
	c.files = append(c.files, f)
	c.objects[k] = true
	return f.Truncate(0)
}

// file opens the file of a copy; it need not be there.
func (c *copier) file(k object.Key) (disk.File, error) {
	f, err := c.to.fs.OpenFile(objectPath(k), 0)
	if !errors.Is(err, fs.ErrNotExist) {
		return f, err
	}
	if g := k.Group; !c.made[g] {
		if err := c.to.fs.MkdirAll(groupDir(g)); err != nil {
			return nil, err
		}
		c.made[g], c.newDir = true, true
		c.to.groupMu.Lock()
		c.to.groups[g] = true
		c.to.groupMu.Unlock()
	}
	c.dirs[groupDir(k.Group)] = true
	return c.to.fs.OpenFile(objectPath(k), disk.Create)
}

// image is the copy of an object.
type image struct {
	file  disk.File
	head  header
	pages []*sumPage
	fresh bool
}

// open opens the copy of an object, or makes an empty one.
func (c *copier) open(k object.Key, h header) (*image, error) {
	f, err := c.file(k)
	if err != nil {
		return nil, err
	}
	m := &image{file: f, head: h, pages: make([]*sumPage, pagesOf(h.shift))}
	var old header
	err = readHeader(f, k, &old)
	switch {
	case err == nil && old.shift == h.shift:
		m.head.generation = old.generation
		err = m.read()
	case err == nil, errors.Is(err, errHeader):
		m.fresh = true
		m.head.generation = c.to.nextGeneration()
		for i := range m.pages {
			m.pages[i] = new(sumPage)
		}
		if err = f.Truncate(0); err == nil {
			err = writeEmpty(f, &m.head)
		}
	}
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("copy object %s: %w", k, err)
	}
	return m, nil
}

func (m *image) read() error {
	b := make([]byte, blockSize)
	for p := range m.pages {
		if _, err := m.file.ReadAt(b, tableOffset(m.head.shift)+int64(p)*blockSize); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		m.pages[p] = new(sumPage)
		m.pages[p].decode(b, p, m.head.generation) // what is damaged differs, and is copied
	}
	return nil
}

func (m *image) sum(b uint32) uint64 { return m.pages[b/sumsPerPage].sums[b%sumsPerPage] }

func (m *image) setSum(b uint32, sum uint64) {
	p := m.pages[b/sumsPerPage]
	p.sums[b%sumsPerPage], p.dirty = sum, true
}

// fill copies what differs, and gives the copy the table and the header of the object.
func (c *copier) fill(m *image, sums []uint64) error {
	need := int64(0)
	if m.fresh {
		need = overheadBytes(m.head.shift)
	}
	for b, sum := range sums {
		if sum != 0 && m.sum(uint32(b)) == 0 {
			need += blockSize
		}
	}
	if c.to.space.nearlyFull() || !c.to.space.takeRare(need) {
		return errShort
	}
	defer c.to.space.give(need) // it is in the file by then
	if err := c.wait(objectCost); err != nil {
		return err
	}
	for b := uint32(0); b < uint32(len(sums)); {
		n, err := c.run(m, sums, b)
		if err != nil {
			return err
		}
		b += n
	}
	return c.to.explain(c.finish(m))
}

// run copies the blocks from b on that can be copied at once, and returns how many it has done with.
func (c *copier) run(m *image, sums []uint64, b uint32) (n uint32, err error) {
	if sums[b] == m.sum(b) {
		return 1, nil
	}
	hole := sums[b] == 0
	for b+n < uint32(len(sums)) && sums[b+n] != m.sum(b+n) && (sums[b+n] == 0) == hole && (hole || n < copyChunk/blockSize) {
		n++
	}
	off, size := int64(b)*blockSize, int64(n)*blockSize
	if hole {
		for i := range n {
			m.setSum(b+i, 0)
		}
		return n, c.to.explain(m.file.PunchHole(off, size))
	}
	if err := c.wait(size); err != nil {
		return 0, err
	}
	buf := c.buf[:size]
	err = c.from.readBlocks(m.head.key, m.head.shift, b, buf)
	if errors.Is(err, object.ErrCorrupt) {
		return n, c.rotten(m, sums, b, n)
	}
	if err != nil {
		return 0, err
	}
	return n, c.put(m, b, buf)
}

// put stores content, with the checksums of what it is: it was verified when it was read.
func (c *copier) put(m *image, b uint32, data []byte) error {
	for i := 0; i < len(data); i += blockSize {
		m.setSum(b+uint32(i/blockSize), object.Sum(data[i:][:blockSize]))
	}
	c.written += int64(len(data))
	c.moved += int64(len(data))
	c.to.moves.bytes.Add(int64(len(data)))
	_, err := m.file.WriteAt(data, int64(b)*blockSize)
	return c.to.explain(err)
}

// rotten is run for blocks some of which are corrupt: those get their checksums, and no content.
func (c *copier) rotten(m *image, sums []uint64, b, n uint32) error {
	for ; n > 0; n-- {
		err := c.from.readBlocks(m.head.key, m.head.shift, b, c.buf[:blockSize])
		switch {
		case err == nil:
			err = c.put(m, b, c.buf[:blockSize])
		case errors.Is(err, object.ErrCorrupt):
			m.setSum(b, sums[b])
			err = c.to.explain(m.file.PunchHole(int64(b)*blockSize, blockSize))
		}
		if err != nil {
			return err
		}
		b++
	}
	return nil
}

// finish writes the table and the header.
func (c *copier) finish(m *image) error {
	b := make([]byte, blockSize)
	for p, page := range m.pages {
		if !page.dirty {
			continue
		}
		page.encode(b, p, m.head.generation)
		if _, err := m.file.WriteAt(b, tableOffset(m.head.shift)+int64(p)*blockSize); err != nil {
			return err
		}
	}
	if _, err := m.file.WriteAt(m.head.encode(), headerOffset(m.head.shift)); err != nil {
		return err
	}
	return m.file.StartWriteback(0, headerOffset(m.head.shift)+overheadBytes(m.head.shift))
}

func (c *copier) wait(bytes int64) error {
	if c.pace != nil {
		return c.pace(bytes)
	}
	return c.ctx.Err()
}

// syncFiles makes the content of copies durable, and closes them.
func (c *copier) syncFiles() error {
	err := inParallel(len(c.files), func(i int) error { return c.files[i].Sync() })
	c.close()
	if err != nil {
		return c.to.fail(fmt.Errorf("sync copies of objects: %w", err))
	}
	return nil
}

func (c *copier) close() {
	for _, f := range c.files {
		_ = f.Close()
	}
	c.files, c.written = c.files[:0], 0
}

// sync makes all that was copied durable.
func (c *copier) sync() error {
	if err := c.syncFiles(); err != nil {
		return err
	}
	var dirs []string
	for dir := range c.dirs {
		dirs = append(dirs, dir)
	}
	err := inParallel(len(dirs), func(i int) error { return c.to.fs.SyncDir(dirs[i]) })
	if err == nil && c.newDir {
		err = c.to.fs.SyncDir(objectsDir)
	}
	if err != nil {
		return c.to.fail(fmt.Errorf("sync copies of objects: %w", err))
	}
	clear(c.dirs)
	c.newDir = false
	return nil
}
