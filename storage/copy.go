package storage

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"sheepdog/storage/disk"
	"sheepdog/storage/internal/wal"
	"sheepdog/storage/object"
)

// copyChunk is what Copy moves at once, in bytes.
const copyChunk = 1 << 20

// Copy makes dst from the whole content of src, holes staying holes, with version v.
// A missing src fails with ErrNotFound, an existing dst is left alone. Every block is
// verified on the way. dst appears at once and complete or, after a failure or crash,
// not at all; it is durable with the next OpSync. Writes to src meanwhile are in the
// copy or not, block by block.
func (s *Store) Copy(ctx context.Context, dst, src object.Key, sizeShift uint8, v object.Version) error {
	return s.at(ctx, dst.Group, func(to *drive) error {
		from := s.routes.find(src.Group)
		err := from.failed()
		if err == nil {
			err = to.copy(&copying{ctx: ctx, from: from, to: to, src: src, dst: dst, shift: sizeShift, version: v})
		}
		if err != nil && from.moved(src.Group) {
			return errAway
		}
		return err
	})
}

func (d *drive) copy(c *copying) error {
	if there, err := d.has(c.dst); there || err != nil {
		return err
	}
	if err := c.run(); err != nil {
		return err
	}
	d.count.copies.Add(1)
	return nil
}

func (d *drive) has(k object.Key) (bool, error) {
	o, err := d.lock(k)
	if err != nil {
		return false, d.explain(err)
	}
	defer o.mu.Unlock()
	return o.exists, nil
}

type copying struct {
	ctx        context.Context
	from, to   *drive
	src, dst   object.Key
	shift      uint8
	version    object.Version
	generation uint64
	file       disk.File
	pages      []*sumPage
}

func (c *copying) run() error {
	d := c.to
	var sums []uint64
	data := int64(0)
	err := c.from.eachSum(c.ctx, c.src, 0, 0, func(_ uint32, sum uint64) {
		sums = append(sums, sum)
		if sum != 0 {
			data += blockSize
		}
	})
	if err != nil {
		return err
	}
	if len(sums) != int(blocksOf(c.shift)) {
		return errShift
	}
	created := d.creationBytes(c.dst.Group, c.shift)
	taken := data + created
	if !d.space.take(taken) {
		return fmt.Errorf("disk %s has only its reserve left: %w", d, object.ErrNoSpace)
	}
	c.generation = d.nextGeneration()
	if c.file, err = d.makeFile(c.dst, c.shift, c.generation, c.version); err == nil {
		err = c.transfer(sums)
	} else {
		c.remove()
	}
	if err == nil {
		err = c.publish()
	}
	if err != nil {
		d.space.give(taken)
		return d.explain(err)
	}
	d.space.placed(data)
	d.space.log(created, d.log.Segment())
	return nil
}

// transfer fills the new file and makes it durable: the record that makes it an object
// must not be durable before its content is, or a crash would replace content that was
// durable under its old name by nothing.
func (c *copying) transfer(sums []uint64) error {
	err := c.fill(sums)
	if err == nil {
		err = c.file.Sync()
	}
	if err == nil {
		err = c.to.fs.SyncDir(newDir)
	}
	if err != nil {
		c.discard()
		return fmt.Errorf("copy object %s to %s: %w", c.src, c.dst, err)
	}
	return nil
}

// discard gives back the space of a copy that came to nothing.
func (c *copying) discard() {
	_ = c.file.Close()
	c.remove()
}

// remove removes the file, if there is one. If that fails the next checkpoint does it, or the next opening of the disk.
func (c *copying) remove() {
	path := newPath(c.dst, c.generation)
	if err := c.to.fs.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		c.to.listMu.Lock()
		c.to.garbage = append(c.to.garbage, garbage{path: path})
		c.to.listMu.Unlock()
	}
}

func (c *copying) fill(sums []uint64) error {
	c.pages = make([]*sumPage, pagesOf(c.shift))
	for i := range c.pages {
		c.pages[i] = new(sumPage)
	}
	buf := make([]byte, copyChunk)
	for b := uint32(0); b < uint32(len(sums)); {
		if sums[b] == 0 {
			b++
			continue
		}
		n := uint32(1)
		for b+n < uint32(len(sums)) && sums[b+n] != 0 && n < copyChunk/blockSize {
			n++
		}
		if err := c.ctx.Err(); err != nil {
			return err
		}
		if err := c.chunk(b, buf[:n*blockSize]); err != nil {
			return err
		}
		b += n
	}
	table := make([]byte, blockSize)
	for p, page := range c.pages {
		page.encode(table, p, c.generation)
		if _, err := c.file.WriteAt(table, tableOffset(c.shift)+int64(p)*blockSize); err != nil {
			return err
		}
	}
	return nil
}

func (c *copying) chunk(b uint32, buf []byte) error {
	if err := c.from.readBlocks(c.src, c.shift, b, buf); err != nil {
		return err
	}
	if _, err := c.file.WriteAt(buf, int64(b)*blockSize); err != nil {
		return err
	}
	for i := 0; i < len(buf); i += blockSize {
		c.pages[b/sumsPerPage].sums[b%sumsPerPage] = object.Sum(buf[i:][:blockSize])
		b++
	}
	return c.file.StartWriteback(int64(b)*blockSize-int64(len(buf)), int64(len(buf)))
}

// publish records the copy as an object, unless there is one by now.
func (c *copying) publish() error {
	d := c.to
	for {
		o, err := d.lock(c.dst)
		if err != nil {
			c.discard()
			return err
		}
		if o.exists || o.held {
			held := !o.exists
			o.mu.Unlock()
			c.discard()
			if held {
				return errHeld
			}
			return nil
		}
		err = d.create(o, c.shift, c.version, c.generation, wal.FlagComplete)
		if err == nil {
			d.adopt(o, c)
			o.mu.Unlock()
			d.flush()
			return d.failed()
		}
		o.mu.Unlock()
		if !errors.Is(err, wal.ErrFull) {
			c.discard()
			return err
		}
		if err := d.upkeep.wait(c.ctx); err != nil {
			c.discard()
			return err
		}
	}
}

// adopt gives a created object the file and table of the copy.
func (d *drive) adopt(o *obj, c *copying) {
	copy(o.pages, c.pages)
	d.pages.Add(int64(len(c.pages)))
	o.hasFile, o.fresh, o.filed = true, true, c.version
	d.opened(o, c.file)
}

// readBlocks reads whole blocks of an object and waits for them.
func (d *drive) readBlocks(k object.Key, shift uint8, first uint32, dst []byte) error {
	done := make(chan struct{})
	r := object.Request{
		Op: object.OpRead, SizeShift: shift, ID: k.ID, Policy: k.Group.Policy, Partition: k.Group.Partition,
		Off: first * blockSize, Len: uint32(len(dst)), Data: dst,
		Done: func(*object.Request) { close(done) },
	}
	d.submit(&r)
	<-done
	return r.Err
}
