package storage

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"strings"
	"syscall"

	"sheepdog/storage/disk"
	"sheepdog/storage/internal/wal"
	"sheepdog/storage/object"
)

// certain is the file system of a drive. What fails there for want of space has not been done, and may be tried again. That is not so
// of entries of directories that could not be made durable: the system, which finds no place for what it had taken, says so once and
// takes it for written. So of that failure it is not told what it was for, and the disk goes out of service as with any other.
// (Of files, whoever syncs them sees to that.)
type certain struct{ disk.FS }

func (c certain) SyncDir(name string) error {
	err := c.FS.SyncDir(name)
	if noSpace(err) {
		return fmt.Errorf("sync %s/%s: %v", c, name, err)
	}
	return err
}

// noSpace reports whether a file system says that it has no space.
func noSpace(err error) bool { return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) }

// prepareDrive locks and identifies a disk and finds out which groups it has.
func prepareDrive(cfg *Config, fsys disk.FS, logger *slog.Logger) (*drive, error) {
	unlock, err := fsys.Lock()
	if err != nil {
		return nil, fmt.Errorf("lock disk: %w", err)
	}
	d := &drive{cfg: cfg, fs: certain{fsys}, logger: logger, unlock: unlock, stop: make(chan struct{}), counted: make(chan struct{}), groups: make(map[object.Group]bool)}
	for i := range d.shards {
		d.shards[i].objects = make(map[object.Key]*obj)
	}
	d.pool.init(cfg.Workers, d.work)
	d.syncer.init(d)
	d.upkeep.init(d)
	if err := d.prepare(); err != nil {
		_ = unlock.Close()
		return nil, fmt.Errorf("open disk %s: %w", fsys, err)
	}
	return d, nil
}

func (d *drive) prepare() error {
	var err error
	if d.id, d.fresh, err = identify(d.fs, d.cfg.Node, d.cfg.Cluster); err != nil {
		return err
	}
	d.name = d.id.Disk
	d.retired.Store(d.id.Leaving)
	d.filling.Store(d.id.Filling)
	if d.notes, err = readNotes(d.fs); err != nil {
		return err
	}
	if err := d.refuseLost(); err != nil {
		return err
	}
	for _, dir := range []string{objectsDir, newDir} {
		if err := d.fs.MkdirAll(dir); err != nil {
			return fmt.Errorf("make %s: %w", dir, err)
		}
	}
	if err := d.fs.SyncDir("."); err != nil {
		return fmt.Errorf("sync directory: %w", err)
	}
	if err := d.space.init(d.fs, d.cfg.Reserve); err != nil {
		return fmt.Errorf("ask for free space: %w", err)
	}
	d.weight = uint64(max(1, d.space.total))
	names, err := d.fs.ReadDir(objectsDir)
	if err != nil {
		return fmt.Errorf("list %s: %w", objectsDir, err)
	}
	// A killed process may have left directories that a power cut would take away.
	if err := d.fs.SyncDir(objectsDir); err != nil {
		return fmt.Errorf("sync %s: %w", objectsDir, err)
	}
	for _, name := range names {
		if g, ok := parseGroup(name); ok {
			d.groups[g] = true
		}
	}
	return nil
}

// refuseLost keeps a disk that lost one of its directories from being taken for one that
// never had it: objects are made before the log is, and get their places after that.
func (d *drive) refuseLost() error {
	log, err := d.fs.ReadDir(walDir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("list %s: %w", walDir, err)
	}
	groups, lost := d.fs.ReadDir(objectsDir)
	if lost != nil && !errors.Is(lost, fs.ErrNotExist) {
		return fmt.Errorf("list %s: %w", objectsDir, lost)
	}
	if lost != nil && len(log) > 0 {
		return fmt.Errorf("its directory %s is missing but there is a log: restore it, or take the disk out of node.disks: %w", objectsDir, object.ErrInvalid)
	}
	if len(log) == 0 && len(groups) > 0 {
		return fmt.Errorf("it has objects but its directory %s is missing or empty: restore it, or take the disk out of node.disks: %w", walDir, object.ErrInvalid)
	}
	return nil
}

// recover replays the log and starts the disk's goroutines. found is told of every
// group the log has something of. A disk whose log cannot be replayed is out of
// service, with the others going on.
func (d *drive) recover(found func(object.Group)) error {
	var err error
	limit := d.cfg.logLimit(d.space.total)
	if limit < d.cfg.LogLimit {
		d.logger.Info("the log gets less of a small disk than storage.log_limit says", "disk", d.String(), "log", limit, "log_limit", d.cfg.LogLimit, "total", d.space.total)
	}
	size, most := segments(limit)
	d.log, err = wal.Open(wal.Options{
		FS: d.fs, Dir: walDir, SegmentBytes: size, MaxSegments: most, Rotated: d.upkeep.rotated,
		Take: d.space.takeRare, Give: d.space.give,
	})
	if err != nil {
		return err
	}
	if err := d.fs.SyncDir("."); err != nil {
		return fmt.Errorf("sync directory: %w", err)
	}
	if err := d.log.Replay(func(rec *wal.Record, pos wal.Pos) error {
		if d.notes.has(rec.Key.Group) { // it lives elsewhere, or is part of a copy
			return nil
		}
		found(rec.Key.Group)
		d.replay(rec, pos)
		return nil
	}); err != nil {
		return err
	}
	d.promiseReplayed()
	err = d.log.Start()
	if errors.Is(err, wal.ErrNoRoom) {
		_, free, _ := d.space.usage()
		return fmt.Errorf("disk is too small or too full: %d bytes are free, and %d of them are the reserve: free some, or set storage.log_limit or storage.reserve to less: %w", free, d.space.reserve, err)
	}
	if err != nil {
		return err
	}
	return d.clearNew()
}

// promiseReplayed accounts for what the log had when it was opened. What of it has its place in a file
// already shows when that is opened, so this is what it takes at most, until the next checkpoint.
func (d *drive) promiseReplayed() {
	sizes := make(map[uint32]int64)
	for _, o := range d.logged {
		if !o.exists || o.broken {
			continue
		}
		if o.createPos != 0 {
			sizes[o.createPos.Segment()] += d.creationBytes(o.key.Group, o.shift)
		}
		o.over.each(func(_ uint32, e entry) {
			if !e.hole() {
				sizes[e.pos.Segment()] += blockSize
			}
		})
	}
	for segment, n := range sizes {
		d.space.replayed(n, segment)
	}
}

// replay applies one record to what is in memory. Object files are not looked at:
// that happens when an object is first used.
func (d *drive) replay(rec *wal.Record, pos wal.Pos) {
	s := d.shard(rec.Key)
	o := s.objects[rec.Key] // nobody else is there yet
	if o == nil {
		o = d.addObject(s, rec.Key)
	}
	d.noteLogged(o)
	switch rec.Type {
	case wal.Delete:
		o.forget()
		o.loaded, o.stale = true, pos
		return
	case wal.Create:
		o.forget()
		o.exists, o.loaded = true, false
		o.shift, o.generation, o.version = rec.SizeShift, rec.Generation, rec.Version
		o.createPos, o.complete = pos, rec.Flags&wal.FlagComplete != 0
		o.rebuild = !o.complete
		// What an interrupted direct write left may be in the page cache only.
		d.noteDirty(o)
		return
	}
	if !o.exists {
		o.exists, o.shift = true, rec.SizeShift
	}
	if rec.SizeShift != o.shift {
		o.broken = true
		return
	}
	o.raise(rec.Version)
	switch rec.Type {
	case wal.Direct:
		d.replayMark(o, rec.Block, pos)
	case wal.Write:
		for i, sum := range rec.Sums {
			o.over.set(rec.Block+uint32(i), entry{pos: pos + wal.Pos(i)*blockSize, sum: sum}, o.blocks())
		}
	case wal.Hole, wal.Zero:
		e := entry{pos: pos}
		if rec.Type == wal.Zero {
			e = entry{pos: pos | zeroFlag, sum: zeroSum}
		}
		for i := range rec.Count {
			o.over.set(rec.Block+i, e, o.blocks())
		}
	}
}

func (d *drive) replayMark(o *obj, region uint32, pos wal.Pos) {
	if int(region) >= regionsOf(o.shift) {
		o.broken = true
		return
	}
	if o.marks == nil {
		o.marks = make([]wal.Pos, regionsOf(o.shift))
	}
	o.marks[region] = pos
	if o.createPos == 0 || o.complete {
		if o.distrust == nil {
			o.distrust = make([]bool, regionsOf(o.shift))
		}
		o.distrust[region] = true
	}
	o.rebuild = true
	d.noteDirty(o)
}

// clearNew removes the files of objects whose creation was lost, and makes the
// entries of the others durable.
func (d *drive) clearNew() error {
	live := make(map[string]bool)
	for _, o := range d.logged {
		if o.exists && o.createPos != 0 {
			live[newName(o.key, o.generation)] = true
		}
	}
	names, err := d.fs.ReadDir(newDir)
	if err != nil {
		return fmt.Errorf("list %s: %w", newDir, err)
	}
	for _, name := range names {
		if live[name] {
			continue
		}
		if err := d.fs.Remove(newDir + "/" + name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove %s/%s: %w", newDir, name, err)
		}
	}
	if err := d.fs.SyncDir(newDir); err != nil {
		return fmt.Errorf("sync %s: %w", newDir, err)
	}
	return nil
}

// start begins the disk's background work.
func (d *drive) start() {
	d.started = true
	d.gives.Store(true) // what was replayed may
	d.wg.Go(d.syncer.run)
	d.wg.Go(d.upkeep.run)
	d.wg.Go(d.upkeep.prepareSegments)
	d.wg.Go(d.census)
	if d.cfg.ScrubRate > 0 {
		d.wg.Go(d.scrubLoop)
	}
	d.listMu.Lock()
	left := len(d.logged)
	d.listMu.Unlock()
	if left > 0 {
		d.oldest.CompareAndSwap(0, d.now())
	}
}

// close stops the disk: what is queued is carried out, a last checkpoint leaves
// an empty log, unless that takes long. The caller sees to it that nothing new is submitted.
func (d *drive) close() error {
	if !d.started {
		return d.abandon()
	}
	close(d.stop)
	d.kick()
	d.upkeep.close()
	d.pool.close()
	d.syncer.close()
	d.wg.Wait()
	// The syncer may have sent marked writes on, and those ask for a sync in turn.
	d.pool.close()
	d.syncer.drain()
	var err error
	if d.failed() == nil {
		d.upkeep.checkpointMu.Lock()
		err = d.checkpoint()
		d.upkeep.checkpointMu.Unlock()
		if d.failed() == nil {
			err = errors.Join(err, d.syncAll(true))
		}
	}
	return errors.Join(err, d.abandon())
}

// abandon closes the files and frees the directory.
func (d *drive) abandon() error {
	for i := range d.shards {
		for _, o := range d.shards[i].objects {
			d.closeFile(o)
		}
	}
	var err error
	if d.log != nil {
		err = d.log.Close()
	}
	return errors.Join(err, d.unlock.Close())
}

// closing is why a disk that is being closed takes nothing more: it was taken out, or the store is
// shutting down, which is another matter to those above.
func (d *drive) closing() error {
	if err := d.failed(); err != nil {
		return err
	}
	return object.ErrClosed
}

func (d *drive) stopping() bool {
	select {
	case <-d.stop:
		return true
	default:
		return false
	}
}

// census counts the objects that have files, in the background: only Status wants to know.
func (d *drive) census() {
	defer close(d.counted)
	names, err := d.fs.ReadDir(objectsDir)
	if err != nil {
		return // whoever needs the directory meets the error too
	}
	for _, name := range names {
		select {
		case <-d.stop:
			return
		default:
		}
		if _, ok := parseGroup(name); !ok || strings.Contains(name, "/") {
			continue
		}
		files, err := d.fs.ReadDir(objectsDir + "/" + name)
		if err != nil {
			continue
		}
		d.count.objects.Add(int64(len(files)))
	}
}
