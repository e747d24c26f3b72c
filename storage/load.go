package storage

import (
	"errors"
	"fmt"
	"io"
	"io/fs"

	"sheepdog/storage/disk"
	"sheepdog/storage/object"
)

// load finds out what the disk has of an object. Its lock is held.
func (d *drive) load(o *obj) error {
	if !o.loaded || o.rebuild {
		o.waiting.Store(true)
		defer o.waiting.Store(false)
	}
	if !o.loaded {
		if err := d.find(o); err != nil {
			return err
		}
		o.loaded = true
		if o.exists && o.pages == nil {
			o.pages = make([]*sumPage, pagesOf(o.shift))
		}
	}
	if o.broken {
		return &object.CorruptError{Key: o.key, Disk: d.String()}
	}
	if o.rebuild {
		return d.rebuildSums(o)
	}
	return nil
}

// find looks for the object's file. What the log said about the object is in o already.
func (d *drive) find(o *obj) error {
	if o.exists && o.createPos != 0 {
		return d.findCreated(o)
	}
	f, h, err := d.openObject(o.key, objectPath(o.key))
	switch {
	case errors.Is(err, fs.ErrNotExist) && !o.exists:
		return nil
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, errHeader):
		// The log has records of it, so it was there, or it is there and rotten.
		o.exists, o.broken = true, true
		return nil
	case err != nil:
		return err
	}
	if o.exists && o.shift != h.shift {
		f.Close()
		o.broken = true
		return nil
	}
	o.exists, o.hasFile, o.shift, o.generation = true, true, h.shift, h.generation
	o.uncertain = o.uncertain || h.uncertain
	o.filed = h.version
	o.raise(h.version)
	d.opened(o, f)
	return nil
}

// findCreated looks for the file of an object whose Create record is in the log: it
// may be in newDir, in its place already, or not made yet.
func (d *drive) findCreated(o *obj) error {
	f, _, err := d.openObject(o.key, newPath(o.key, o.generation))
	o.fresh = true
	if errors.Is(err, fs.ErrNotExist) {
		var h header
		if f, h, err = d.openObject(o.key, objectPath(o.key)); err == nil && h.generation != o.generation {
			f.Close() // an older incarnation, deleted by a record that the log holds
			err = fs.ErrNotExist
		}
		o.fresh = errors.Is(err, fs.ErrNotExist)
		if errors.Is(err, errHeader) && o.stale != 0 {
			// It may be of an older incarnation, too. If the log has no Delete record there is none: then it has rotted, for a file
			// is durable before it gets its place.
			var own bool
			if own, err = d.ownTable(o); err == nil && own {
				err = errHeader
			} else if err == nil {
				o.fresh, err = true, fs.ErrNotExist
			}
		}
	} else if errors.Is(err, errHeader) && !o.complete {
		// The header did not reach the disk before the crash: the data may have.
		var raw disk.File
		if raw, err = d.fs.OpenFile(newPath(o.key, o.generation), 0); err == nil {
			f = raw
		}
	}
	switch {
	case errors.Is(err, fs.ErrNotExist) && o.complete, errors.Is(err, errHeader):
		o.broken = true
		return nil
	case errors.Is(err, fs.ErrNotExist):
		o.rebuild = false
		return nil
	case err != nil:
		return err
	}
	o.hasFile = true
	d.opened(o, f)
	return nil
}

// ownTable reports whether the file in the object's place, whose header is rotten, is of this incarnation of it: sectors of the table
// are bound to theirs.
func (d *drive) ownTable(o *obj) (bool, error) {
	f, err := d.fs.OpenFile(objectPath(o.key), 0)
	if err != nil {
		return false, err
	}
	defer f.Close()
	b := make([]byte, blockSize)
	if err := readFull(f, b, tableOffset(o.shift)); err != nil {
		return false, fmt.Errorf("read checksums of object %s: %w", o.key, err)
	}
	for sector := range sectorsPerPage {
		if sectorIntact(b[sector*object.SectorSize:], sector, o.generation) {
			return true, nil
		}
	}
	return false, nil
}

// errHeader: the file's header cannot be believed.
var errHeader = errors.New("object header is damaged")

func (d *drive) openObject(k object.Key, path string) (disk.File, header, error) {
	var h header
	f, err := d.fs.OpenFile(path, 0)
	if err != nil {
		return nil, h, err
	}
	if err := readHeader(f, k, &h); err != nil {
		f.Close()
		return nil, h, err
	}
	return f, h, nil
}

// readHeader finds the header by the file's size: data, a header block and a table
// that is smaller than the data.
func readHeader(f disk.File, k object.Key, h *header) error {
	size, err := f.Size()
	if err != nil {
		return err
	}
	shift := uint8(object.MinSizeShift)
	for shift < object.MaxSizeShift && tableOffset(shift+1) < size {
		shift++
	}
	var b [headerBytes]byte
	if _, err := f.ReadAt(b[:], headerOffset(shift)); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if !h.decode(b[:], k) || h.shift != shift {
		return errHeader
	}
	return nil
}

// opened gives the object its open file.
func (d *drive) opened(o *obj, f disk.File) {
	o.file = newHandle(f)
	d.open.Add(1)
	d.sweep()
}

// closeFile closes the object's file, once its last user is done with it.
func (d *drive) closeFile(o *obj) {
	if o.file != nil {
		o.file.release()
		o.file = nil
		d.open.Add(-1)
	}
}

// ensureOpen opens the file of an object that has one. Its lock is held.
func (d *drive) ensureOpen(o *obj) error {
	if o.file != nil || !o.hasFile {
		return nil
	}
	f, err := d.fs.OpenFile(o.path(), 0)
	if err != nil {
		return fmt.Errorf("open object %s: %w", o.key, err)
	}
	d.opened(o, f)
	return nil
}

// ensurePages brings the table entries of [first, end) into memory, and opens the
// file. The object's lock is held for writing.
func (d *drive) ensurePages(o *obj, first, end uint32) error {
	if err := d.ensureOpen(o); err != nil {
		return err
	}
	for p := first / sumsPerPage; p <= (end-1)/sumsPerPage; p++ {
		if o.pages[p] != nil {
			continue
		}
		page := new(sumPage)
		if o.hasFile {
			if err := d.readPage(o, page, int(p)); err != nil {
				return err
			}
		}
		o.pages[p] = page
		d.pages.Add(1)
	}
	return nil
}

func (d *drive) readPage(o *obj, page *sumPage, p int) error {
	o.waiting.Store(true)
	defer o.waiting.Store(false)
	b := make([]byte, blockSize)
	if _, err := o.file.ReadAt(b, tableOffset(o.shift)+int64(p)*blockSize); err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("read checksums of object %s: %w", o.key, err)
	}
	if !page.decode(b, p, o.generation) {
		d.logger.Error("checksum table of object is damaged", "object", o.key.String(), "disk", d.String(), "page", p)
	}
	return nil
}

// ensureFile makes the file of an object that has none yet: header and a table of
// holes, in newDir. The object's lock is held for writing.
func (d *drive) ensureFile(o *obj) error {
	if o.hasFile {
		return d.ensureOpen(o)
	}
	f, err := d.makeFile(o.key, o.shift, o.generation, o.version)
	if err != nil {
		return err
	}
	o.hasFile, o.fresh, o.filed = true, true, o.version
	d.opened(o, f)
	return nil
}

func (d *drive) makeFile(k object.Key, shift uint8, generation uint64, v object.Version) (disk.File, error) {
	path := newPath(k, generation)
	// A file of that name is what an earlier attempt, which found no space, could not remove: it has nothing that is not written again.
	f, err := d.fs.OpenFile(path, disk.Create)
	if err != nil {
		return nil, fmt.Errorf("create object %s: %w", k, err)
	}
	d.newDirty.Store(true)
	h := header{key: k, shift: shift, generation: generation, version: v}
	if err := writeEmpty(f, &h); err != nil {
		_ = f.Close()
		_ = d.fs.Remove(path) // else the next attempt takes it, or it goes with the object
		return nil, fmt.Errorf("create object %s: %w", k, err)
	}
	return f, nil
}

// writeEmpty writes the header block and the whole table. The table of a large
// object is written in pieces, so that its memory is bounded.
func writeEmpty(f disk.File, h *header) error {
	const chunkPages = 64
	pages := pagesOf(h.shift)
	b := make([]byte, (1+min(pages, chunkPages))*blockSize)
	copy(b, h.encode())
	var empty sumPage
	off, fill := headerOffset(h.shift), blockSize
	for p := 0; p < pages; {
		for p < pages && fill < len(b) {
			empty.encode(b[fill:], p, h.generation)
			fill += blockSize
			p++
		}
		if _, err := f.WriteAt(b[:fill], off); err != nil {
			return err
		}
		off += int64(fill)
		fill = 0
	}
	return nil
}

// rebuildSums makes the checksums of distrusted regions from the content: after a
// crash, direct writes have reached the file in part. What is pending stays as the
// log has it. Pages of trusted regions are read as they are. The content may be in the
// page cache only, and after a sync that failed the system takes it for written: so
// what the table does not know is written anew, for the next sync to find.
func (d *drive) rebuildSums(o *obj) error {
	if !o.hasFile {
		o.rebuild, o.distrust = false, nil
		return nil
	}
	if err := d.ensureOpen(o); err != nil {
		return err
	}
	if o.distrust == nil {
		// All of it, header and table too: make sure that they are there and well formed.
		h := header{key: o.key, shift: o.shift, generation: o.generation, version: o.version}
		if err := writeEmpty(o.file, &h); err != nil {
			return err
		}
	}
	buf := make([]byte, regionBlocks/4*blockSize)
	for region := range regionsOf(o.shift) {
		if o.distrust != nil && !o.distrust[region] {
			continue
		}
		first := uint32(region) * regionBlocks
		end := min(first+regionBlocks, o.blocks())
		if err := d.ensurePages(o, first, end); err != nil {
			return err
		}
		if err := d.rehash(o, first, end, buf, true); err != nil {
			return err
		}
	}
	o.rebuild, o.distrust, o.uncertain = false, nil, true
	d.logger.Debug("checksums rebuilt after a crash", "object", o.key.String(), "disk", d.String())
	return nil
}

// rehash sets the checksums of [first, end) from the file's content. A block of zeros
// that was a hole, or lies in one, is a hole. With again, content that differs from what the checksums were of is written to the file anew,
// and so are zeros that become holes: on the disk there may be something else.
func (d *drive) rehash(o *obj, first, end uint32, buf []byte, again bool) error {
	var sums []uint64
	for b := first; b < end; {
		start, stop, err := o.file.NextData(int64(b) * blockSize)
		if errors.Is(err, io.EOF) || err == nil && start >= int64(end)*blockSize {
			for ; b < end; b++ {
				o.setFileSum(b, 0)
			}
			return nil
		}
		if err != nil {
			return fmt.Errorf("map object %s: %w", o.key, err)
		}
		for ; b < uint32(start/blockSize); b++ {
			o.setFileSum(b, 0)
		}
		last := min(end, uint32((stop+blockSize-1)/blockSize))
		for b < last {
			n := min(last-b, uint32(len(buf)/blockSize))
			if err := readFull(o.file, buf[:n*blockSize], int64(b)*blockSize); err != nil {
				return fmt.Errorf("read object %s: %w", o.key, err)
			}
			sums = object.AppendSums(sums[:0], buf[:n*blockSize])
			if again {
				if err := o.writeAgain(b, buf, sums); err != nil {
					return err
				}
			}
			for _, sum := range sums {
				if old, _ := o.fileSum(b); old == 0 && sum == zeroSum {
					sum = 0
				}
				o.setFileSum(b, sum)
				b++
			}
		}
	}
	return nil
}

// writeAgain writes content to the file, of blocks from first on, as far as the table does not have their checksums, sums.
func (o *obj) writeAgain(first uint32, content []byte, sums []uint64) error {
	known := func(i int) bool {
		sum, _ := o.fileSum(first + uint32(i))
		return sum == sums[i]
	}
	for i := 0; i < len(sums); i++ {
		from := i
		for i < len(sums) && !known(i) {
			i++
		}
		if i == from {
			continue
		}
		if _, err := o.file.WriteAt(content[from*blockSize:i*blockSize], (int64(first)+int64(from))*blockSize); err != nil {
			return fmt.Errorf("write object %s: %w", o.key, err)
		}
	}
	return nil
}

// readFull reads len(p) bytes at off; what lies past the end of the file is zero.
func readFull(f disk.File, p []byte, off int64) error {
	n, err := f.ReadAt(p, off)
	if errors.Is(err, io.EOF) {
		clear(p[n:])
		return nil
	}
	return err
}

// sweepShards and sweepObjects bound the work of one sweep: the next opening goes on with
// the next shards, and a map begins at a random place each time.
const (
	sweepShards  = 8
	sweepObjects = 32
)

// sweep evicts files and objects that were not used lately until the cache is within
// its bounds again or nothing can go. It skips what it cannot lock at once.
func (d *drive) sweep() {
	if !d.overfull() {
		return
	}
	for range sweepShards {
		s := &d.shards[d.sweepAt.Add(1)%shardCount]
		s.mu.Lock()
		left := sweepObjects
		for _, o := range s.objects {
			if left--; left < 0 {
				break
			}
			if o.used.Swap(false) || !o.mu.TryLock() {
				continue
			}
			d.evict(s, o)
			o.mu.Unlock()
		}
		s.mu.Unlock()
		if !d.overfull() {
			return
		}
	}
}

func (d *drive) overfull() bool {
	limit := int64(d.cfg.OpenObjects)
	d.listMu.Lock()
	logged := int64(len(d.logged))
	d.listMu.Unlock()
	return d.open.Load() > limit || d.resident.Load() > 2*limit+logged || d.pages.Load() > max(4*limit, 2048)
}

// evict drops what memory holds of an object beyond what is not on disk. Both locks are held.
func (d *drive) evict(s *shard, o *obj) {
	if !o.loaded || o.rebuild || o.dirtyData || o.dirtyPages > 0 || len(o.spans) > 0 || o.frozen || o.merging || o.waiters.head != nil {
		return
	}
	d.closeFile(o)
	if o.logged || o.stale != 0 {
		if o.hasFile {
			d.dropPages(o)
		}
		return
	}
	d.dropPages(o)
	o.dead = true
	delete(s.objects, o.key)
	d.resident.Add(-1)
}

func (d *drive) dropPages(o *obj) {
	for i, p := range o.pages {
		if p != nil {
			o.pageClean(p)
			o.pages[i] = nil
			d.pages.Add(-1)
		}
	}
}
