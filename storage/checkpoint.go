package storage

import (
	"errors"
	"fmt"
	"io/fs"

	"sheepdog/storage/object"
)

// checkpoint merges what the log holds into object files and retires it.
//
// The order is what makes it safe: the log is durable before a file is touched
// (INV-S4); files and directories are durable before the log is retired, and so is the
// rest of the log by then, since newer records may have taken the place of retired ones
// that were never merged; what was pending is forgotten only after that. A crash at any
// point finds either the records or the files.
type checkpoint struct {
	d       *drive
	first   uint32 // the first segment that stays
	objects []*obj
	names   *changedNames
	buf     []byte // for what is copied; mergeBlocks long
}

// changedNames are what checkpoints have changed in directories and not made durable yet. One that fails leaves them to the
// next, which finds nothing left to change: it must not retire the records of that before they are durable.
type changedNames struct {
	groups map[object.Group]bool
	newDir bool
}

// batchObjects is how many objects are merged between two syncs of the log: enough for
// the syncs of their files to share what the file system does for each.
const batchObjects = 128

// closeObjects is how many objects are merged when the store closes. With more, closing
// would take long, and the log is read again in less time.
const closeObjects = 2048

// errStopping: the store closes.
var errStopping = errors.New("store is closing")

func (d *drive) checkpoint() error {
	if err := d.failed(); err != nil {
		return err
	}
	first := d.upkeep.resume
	d.gives.Store(false)
	if first == 0 {
		var err error
		if first, err = d.log.Rotate(); err != nil {
			return d.explain(err)
		}
		d.oldest.Store(0)
		d.barrier.Store(first)
		// After a failure the next attempt retires the same segments: each rotation takes one.
		d.upkeep.resume = first
	}
	c := &checkpoint{d: d, first: first, names: &d.upkeep.names, buf: make([]byte, mergeBlocks*blockSize)}
	d.listMu.Lock()
	c.objects = append(c.objects, d.logged...)
	d.listMu.Unlock()
	err := c.run()
	if errors.Is(err, errStopping) {
		return nil // what is in the log stays there, for the next start
	}
	if err != nil {
		d.oldest.CompareAndSwap(0, d.now())
		d.gives.Store(true)
		return d.explain(err)
	}
	d.upkeep.resume = 0
	d.space.merged(first)
	d.count.checkpoints.Add(1)
	return nil
}

func (c *checkpoint) run() error {
	d := c.d
	if err := d.syncFiles(); err != nil {
		return err
	}
	if err := d.log.Sync(); err != nil {
		return err
	}
	// Deletes come first: on a full disk they make room for what follows.
	for _, o := range c.objects {
		if err := c.remove(o); err != nil {
			return err
		}
	}
	if err := c.collectGarbage(); err != nil {
		return err
	}
	for todo := c.objects; len(todo) > 0; {
		if len(todo) > closeObjects && d.stopping() {
			return errStopping
		}
		n := min(len(todo), batchObjects)
		if err := c.merge(todo[:n]); err != nil {
			return err
		}
		todo = todo[n:]
	}
	if err := c.syncDirs(); err != nil {
		return err
	}
	if err := d.log.Sync(); err != nil {
		return err
	}
	if err := d.log.Retire(c.first); err != nil {
		return err
	}
	d.retained.Store(c.first)
	c.drop()
	d.log.Recycle(c.first)
	return nil
}

// remove unlinks the file of an object that was deleted, if the delete is durable.
func (c *checkpoint) remove(o *obj) error {
	o.maint.Lock()
	defer o.maint.Unlock()
	o.mu.Lock()
	due := o.stale != 0 && c.d.log.Durable(o.stale) && (!o.exists || o.fresh)
	o.mu.Unlock()
	if !due {
		return nil
	}
	if err := c.d.fs.Remove(objectPath(o.key)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove object %s: %w", o.key, err)
	}
	c.noteGroup(o.key.Group)
	o.mu.Lock()
	o.stale = 0
	o.mu.Unlock()
	return nil
}

// noteGroup has the group's directory synced. It need not exist: the object may never
// have had a file.
func (c *checkpoint) noteGroup(g object.Group) {
	c.d.groupMu.Lock()
	defer c.d.groupMu.Unlock()
	if c.d.groups[g] {
		c.names.groups[g] = true
	}
}

// collectGarbage removes files of objects that were deleted before any checkpoint.
func (c *checkpoint) collectGarbage() error {
	d := c.d
	d.listMu.Lock()
	all := d.garbage
	d.garbage = nil
	d.listMu.Unlock()
	var left []garbage
	var failure error
	for _, g := range all {
		if failure != nil || !d.log.Durable(g.deleted) {
			left = append(left, g)
			continue
		}
		if err := d.fs.Remove(g.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			failure = fmt.Errorf("remove object: %w", err)
			left = append(left, g)
			continue
		}
		c.names.newDir = true
	}
	d.listMu.Lock()
	d.garbage = append(d.garbage, left...)
	d.listMu.Unlock()
	return failure
}

// item is one object in a batch.
type item struct {
	o         *obj
	skip      bool
	file      *handle // acquired
	blocks    []pendingBlock
	version   object.Version
	uncertain bool
}

type pendingBlock struct {
	block uint32
	entry entry
}

// merge brings a batch of objects up to date on disk. While it runs the objects are
// neither deleted nor copied over (maint); reads and writes go on.
func (c *checkpoint) merge(batch []*obj) error {
	items := make([]item, 0, len(batch))
	defer func() { release(items) }()
	for _, o := range batch {
		o.maint.Lock()
		items = append(items, item{o: o})
		if err := c.gather(&items[len(items)-1]); err != nil {
			return err
		}
	}
	// Versions that go into headers must not be ahead of the log.
	if err := c.d.log.Sync(); err != nil {
		return err
	}
	for i := range items {
		if err := c.apply(&items[i]); err != nil {
			return err
		}
	}
	// The writing of all has begun: now wait for each.
	err := inParallel(len(items), func(i int) error {
		it := &items[i]
		if it.file == nil {
			return nil
		}
		if err := it.file.Sync(); err != nil {
			return c.d.fail(fmt.Errorf("sync object %s: %w", it.o.key, err))
		}
		it.o.mu.Lock()
		it.o.loose = false
		it.o.mu.Unlock()
		return nil
	})
	if err != nil {
		return err
	}
	return c.place(items)
}

// release ends the work on a batch.
func release(items []item) {
	for _, it := range items {
		it.o.mu.Lock()
		it.o.merging = false
		it.o.mu.Unlock()
		if it.file != nil {
			it.file.release()
		}
		it.o.maint.Unlock()
	}
}

// gather waits for the object's direct writes in flight, whose marks are about to be
// retired, and notes what is to be merged.
func (c *checkpoint) gather(it *item) error {
	d, o := c.d, it.o
	o.mu.Lock()
	o.drain()
	defer d.thaw(o)
	if o.dead || !o.exists {
		it.skip = true
		return nil
	}
	if err := d.load(o); err != nil {
		it.skip = true
		if errors.Is(err, object.ErrCorrupt) {
			d.explain(err)
			return nil
		}
		return err
	}
	if o.createPos != 0 && o.hasFile && !o.fresh {
		// Placed by a checkpoint that did not end, of an earlier process perhaps: the move may not be durable yet.
		c.names.groups[o.key.Group], c.names.newDir = true, true
	}
	it.version, it.uncertain = o.version, o.uncertain
	o.merging = true
	var err error
	o.over.each(func(b uint32, e entry) {
		if e.pos.Segment() < c.first && err == nil {
			it.blocks = append(it.blocks, pendingBlock{b, e})
			err = d.ensurePages(o, b, b+1)
		}
	})
	covered := o.createPos == 0 || o.createPos.Segment() >= c.first
	placed := o.hasFile && !o.fresh
	it.skip = err == nil && len(it.blocks) == 0 && o.dirtyPages == 0 && !o.loose && (covered || placed) && (o.filed == o.version || !placed)
	return err
}

// drain waits for the object's direct writes in flight; none begins meanwhile. Both locks are held.
func (o *obj) drain() {
	for len(o.spans) > 0 {
		o.frozen, o.drained = true, make(chan struct{})
		drained := o.drained
		o.mu.Unlock()
		<-drained
		o.mu.Lock()
		o.frozen = false
	}
}

// thaw lets waiting requests go on and unlocks the object.
func (d *drive) thaw(o *obj) {
	waiters := o.waiters.take()
	o.mu.Unlock()
	d.pool.submitAll(waiters)
}

// apply writes one object's pending blocks, table and header.
func (c *checkpoint) apply(it *item) error {
	d, o := c.d, it.o
	if it.skip {
		return nil
	}
	o.mu.Lock()
	err := d.ensureFile(o)
	if err == nil {
		it.file = o.file.acquire()
		o.loose = true
	}
	o.mu.Unlock()
	if err != nil {
		return err
	}
	m := merger{c: c, o: o, file: it.file, buf: c.buf}
	if err := m.run(it.blocks); err != nil {
		return err
	}
	if err := c.writeTable(it, it.file); err != nil {
		return err
	}
	return it.file.StartWriteback(0, headerOffset(o.shift)+overheadBytes(o.shift))
}

// writeTable writes the header and the dirty pages of the table. A page is encoded
// under the object's lock and so a true picture of one moment.
func (c *checkpoint) writeTable(it *item, h *handle) error {
	o := it.o
	buf := c.buf[:blockSize]
	for p := range o.pages {
		o.mu.Lock()
		page := o.pages[p]
		dirty := page != nil && page.dirty
		if dirty {
			page.encode(buf, p, o.generation)
			o.pageClean(page)
		}
		o.mu.Unlock()
		if !dirty {
			continue
		}
		if _, err := h.WriteAt(buf, tableOffset(o.shift)+int64(p)*blockSize); err != nil {
			o.mu.Lock()
			o.pageDirty(page)
			o.mu.Unlock()
			return fmt.Errorf("write checksums of object %s: %w", o.key, err)
		}
	}
	hd := header{key: o.key, shift: o.shift, generation: o.generation, version: it.version, uncertain: it.uncertain}
	if _, err := h.WriteAt(hd.encode(), headerOffset(o.shift)); err != nil {
		return fmt.Errorf("write header of object %s: %w", o.key, err)
	}
	o.mu.Lock()
	o.filed = it.version // less than o.version if somebody has written meanwhile: then the next checkpoint has to come back
	o.mu.Unlock()
	return nil
}

// place moves the files of new objects to where they stay. Their directories are
// durable before: a name in a directory that is lost would be lost with it. Replacing
// the file of an earlier incarnation is right only because its delete record is older
// than the create record, and both are durable by now.
func (c *checkpoint) place(items []item) error {
	if err := c.makeGroups(items); err != nil {
		return err
	}
	for _, it := range items {
		if it.file == nil || !it.o.fresh {
			continue
		}
		if err := c.move(it.o); err != nil {
			return err
		}
	}
	return nil
}

func (c *checkpoint) move(o *obj) error {
	if err := c.d.fs.Rename(newPath(o.key, o.generation), objectPath(o.key)); err != nil {
		return fmt.Errorf("place object %s: %w", o.key, err)
	}
	c.names.groups[o.key.Group], c.names.newDir = true, true
	o.mu.Lock()
	o.fresh, o.stale = false, 0
	o.mu.Unlock()
	return nil
}

// makeGroups makes the directories that are missing, durably.
func (c *checkpoint) makeGroups(items []item) error {
	var needed []object.Group
	for _, it := range items {
		if it.file != nil && it.o.fresh {
			needed = append(needed, it.o.key.Group)
		}
	}
	return c.d.makeGroups(needed)
}

// makeGroups makes the directories of groups that have none, durably.
func (d *drive) makeGroups(groups []object.Group) error {
	var made []object.Group
	for _, g := range groups {
		d.groupMu.Lock()
		known := d.groups[g]
		d.groupMu.Unlock()
		if known {
			continue
		}
		if err := d.fs.MkdirAll(groupDir(g)); err != nil {
			return fmt.Errorf("make group %s: %w", g, err)
		}
		made = append(made, g)
	}
	if len(made) == 0 {
		return nil
	}
	if err := d.fs.SyncDir(objectsDir); err != nil {
		return d.fail(fmt.Errorf("sync directory %s: %w", objectsDir, err))
	}
	d.groupMu.Lock()
	for _, g := range made {
		d.groups[g] = true
	}
	d.groupMu.Unlock()
	return nil
}

func (c *checkpoint) syncDirs() error {
	var dirs []string
	for g := range c.names.groups {
		dirs = append(dirs, groupDir(g))
	}
	err := inParallel(len(dirs), func(i int) error { return c.syncDir(dirs[i]) })
	if err == nil && c.names.newDir { // last: the new name is durable before the old one goes
		err = c.syncDir(newDir)
	}
	if err == nil {
		clear(c.names.groups)
		c.names.newDir = false
	}
	return err
}

// syncDir makes the entries of a directory durable. One that is not there went to another disk with its group, and has none.
func (c *checkpoint) syncDir(dir string) error {
	if err := c.d.fs.SyncDir(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return c.d.fail(fmt.Errorf("sync directory %s: %w", dir, err))
	}
	return nil
}

// drop forgets what was retired.
func (c *checkpoint) drop() {
	d := c.d
	d.listMu.Lock()
	all := d.logged[:len(d.logged):len(d.logged)] // it stays meanwhile: there are those who look for what the log has
	d.listMu.Unlock()
	var kept []*obj
	for _, o := range all {
		o.mu.Lock()
		if o.logged = o.retire(c.first); o.logged {
			kept = append(kept, o)
		}
		o.mu.Unlock()
	}
	d.listMu.Lock()
	d.logged = append(kept, d.logged[len(all):]...) // with what has come behind it, some of all perhaps
	d.listMu.Unlock()
	if len(kept) > 0 {
		d.oldest.CompareAndSwap(0, d.now())
	}
}

// retire forgets what segments before first said about the object; left says whether
// the log has more about it.
func (o *obj) retire(first uint32) (left bool) {
	o.over.drop(first)
	if o.createPos.Segment() < first {
		o.createPos, o.complete = 0, false
	}
	if o.exists && !o.fresh {
		o.stale = 0
	}
	for i, pos := range o.marks {
		if pos.Segment() < first {
			o.marks[i] = 0
		} else {
			left = true
		}
	}
	return left || o.createPos != 0 || o.over.count > 0 || o.stale != 0 || o.dirtyPages > 0
}

// merger writes pending blocks of one object into its file.
type merger struct {
	c    *checkpoint
	o    *obj
	file *handle
	buf  []byte
}

// mergeBlocks bounds one write of the merger.
const mergeBlocks = 256

func (m *merger) run(blocks []pendingBlock) error {
	for len(blocks) > 0 {
		n := 1
		hole := blocks[0].entry.hole()
		for n < len(blocks) && n < mergeBlocks && blocks[n].block == blocks[0].block+uint32(n) && blocks[n].entry.hole() == hole {
			n++
		}
		var err error
		if hole {
			err = m.punch(blocks[:n])
		} else {
			err = m.write(blocks[:n])
		}
		if err != nil {
			return err
		}
		m.note(blocks[:n])
		blocks = blocks[n:]
	}
	return nil
}

func (m *merger) punch(blocks []pendingBlock) error {
	if err := m.file.PunchHole(int64(blocks[0].block)*blockSize, int64(len(blocks))*blockSize); err != nil {
		return fmt.Errorf("punch hole in object %s: %w", m.o.key, err)
	}
	return nil
}

// write copies content from the log. A payload that became rotten there is copied
// as it is: its checksum tells every reader.
func (m *merger) write(blocks []pendingBlock) error {
	for i, b := range blocks {
		part := m.buf[i*blockSize:][:blockSize]
		if b.entry.zero() {
			clear(part)
			continue
		}
		if err := m.c.d.log.ReadAt(part, b.entry.pos, false); err != nil {
			return fmt.Errorf("read log for object %s: %w", m.o.key, err)
		}
	}
	if _, err := m.file.WriteAt(m.buf[:len(blocks)*blockSize], int64(blocks[0].block)*blockSize); err != nil {
		return fmt.Errorf("write object %s: %w", m.o.key, err)
	}
	return nil
}

// note enters the checksums. The blocks stay pending: nobody believes the table yet.
func (m *merger) note(blocks []pendingBlock) {
	m.o.mu.Lock()
	for _, b := range blocks {
		m.o.setFileSum(b.block, b.entry.sum)
	}
	m.o.mu.Unlock()
}
