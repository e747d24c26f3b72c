package storage

import (
	"context"
	"errors"
	"sync"
	"time"

	"sheepdog/storage/object"
)

// upkeep decides when a checkpoint is due, prepares log segments, and holds the
// requests that wait for room in the log.
type upkeep struct {
	d       *drive
	trigger chan struct{}
	prepare chan struct{}

	checkpointMu sync.Mutex // one checkpoint at a time; guards resume and names
	resume       uint32     // first segment to stay of a checkpoint that failed; 0: none did
	names        changedNames

	mu      sync.Mutex
	closed  bool
	stalled requests
	room    chan struct{} // closed when there may be room again
	blocked time.Time     // when a checkpoint failed for lack of space last
	gave    time.Time     // when one was begun last because somebody wanted the space that deletes give back

	full     bool      // as it was told last; of round alone
	fullTold time.Time // when it was told that the disk is full
}

const (
	upkeepTick = 250 * time.Millisecond
	// retryAfter is the pause between attempts of a checkpoint that finds no space.
	retryAfter = time.Second
)

func (u *upkeep) init(d *drive) {
	u.d = d
	u.trigger, u.prepare = make(chan struct{}, 1), make(chan struct{}, 1)
	u.room = make(chan struct{})
	u.names.groups = make(map[object.Group]bool)
}

func notify(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

func (u *upkeep) wake() { notify(u.trigger) }

// rotated is called by the log, under its locks.
func (u *upkeep) rotated() {
	notify(u.prepare)
	notify(u.trigger)
}

// stall keeps a request until there is room in the log. It is bounded by what the
// layers above have in flight.
func (u *upkeep) stall(r *object.Request) {
	u.mu.Lock()
	if u.closed {
		u.mu.Unlock()
		u.d.refuse(r, u.d.closing())
		return
	}
	u.stalled.push(r)
	u.mu.Unlock()
	u.d.count.stalls.Add(1)
	notify(u.prepare)
	u.wake()
}

// wait is stall for a caller that can block.
func (u *upkeep) wait(ctx context.Context) error {
	u.mu.Lock()
	room := u.room
	u.mu.Unlock()
	notify(u.prepare)
	u.wake()
	select {
	case <-room:
		return u.d.failed()
	case <-ctx.Done():
		return ctx.Err()
	case <-u.d.stop:
		return u.d.closing()
	}
}

// crowded reports whether so many objects have tables to be written that no more
// direct writes may begin: the files of those objects cannot be closed.
func (u *upkeep) crowded() bool { return u.d.unmerged.Load() >= int64(u.d.cfg.OpenObjects) }

// run is the goroutine that checkpoints.
func (u *upkeep) run() {
	tick := time.NewTicker(upkeepTick)
	defer tick.Stop()
	for {
		select {
		case <-u.d.stop:
			return
		case <-u.trigger:
		case <-tick.C:
		}
		u.round()
	}
}

func (u *upkeep) round() {
	d := u.d
	u.tellFull()
	var err error
	if d.failed() == nil && u.due() {
		u.checkpointMu.Lock()
		err = d.checkpoint()
		u.checkpointMu.Unlock()
	}
	if d.failed() != nil {
		u.release(d.failed())
		return
	}
	if errors.Is(err, object.ErrNoSpace) {
		u.mu.Lock()
		u.blocked = time.Now()
		u.mu.Unlock()
	}
	switch {
	case d.log.Room() > 0 && !u.crowded():
		u.release(nil)
	case errors.Is(err, object.ErrNoSpace):
		u.release(err)
	}
}

// fullPause keeps a disk on the edge from filling the log.
const fullPause = time.Minute

// tellFull logs when the disk becomes full, and when it has space again.
func (u *upkeep) tellFull() {
	_, free, full := u.d.space.usage()
	switch {
	case full == u.full || full && time.Since(u.fullTold) < fullPause:
		return
	case full:
		u.fullTold = time.Now()
		u.d.logger.Warn("disk is full: writes that need space are refused, until volumes or snapshots are deleted or space is added", "disk", u.d.String(), "free", free, "reserve", u.d.space.reserve)
	default:
		u.d.logger.Info("disk has space again", "disk", u.d.String(), "free", free)
	}
	u.full = full
}

// release lets the stalled requests go on, or fail.
func (u *upkeep) release(err error) {
	u.mu.Lock()
	q := u.stalled.take()
	close(u.room)
	u.room = make(chan struct{})
	u.mu.Unlock()
	if err == nil {
		u.d.pool.submitAll(q)
		return
	}
	for r := q.pop(); r != nil; r = q.pop() {
		u.d.refuse(r, err)
	}
}

// close refuses the stalled requests, and those to come.
func (u *upkeep) close() {
	u.mu.Lock()
	u.closed = true
	u.mu.Unlock()
	u.release(u.d.closing())
}

func (u *upkeep) due() bool {
	d := u.d
	u.mu.Lock()
	waiting := u.stalled.head != nil
	blocked := time.Since(u.blocked) < retryAfter
	u.mu.Unlock()
	if blocked {
		return false
	}
	d.listMu.Lock()
	objects, trash := len(d.logged), len(d.garbage)
	d.listMu.Unlock()
	used, limit := d.log.Bytes()
	if used >= limit/2 || waiting && d.log.Room() <= 0 {
		return true
	}
	if objects+trash == 0 {
		return false
	}
	oldest := d.oldest.Load()
	_, _, full := d.space.usage()
	return full || u.wanted() || d.unmerged.Load() >= int64(d.cfg.OpenObjects)/2 ||
		d.cfg.Checkpoint > 0 && oldest != 0 && d.now()-oldest > int64(d.cfg.Checkpoint)
}

// wanted reports whether a checkpoint is due for those who take none of the last space: somebody was refused here, or stays
// away because the disk is nearly full and would not be.
func (u *upkeep) wanted() bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	if time.Since(u.gave) < retryAfter || !u.d.space.wanted.Swap(false) && !(u.d.gives.Load() && u.d.space.told()) {
		return false
	}
	u.gave = time.Now()
	return true
}

// prepareSegments is the goroutine that keeps free segments ready.
func (u *upkeep) prepareSegments() {
	for {
		for u.d.failed() == nil && u.d.log.NeedSegment() {
			made, err := u.d.log.Prepare()
			if err != nil {
				u.d.explain(err)
				break
			}
			u.wake() // who waits goes on, or a checkpoint makes room
			if !made {
				break
			}
		}
		if err := u.d.log.StartWriteback(); err != nil && u.d.failed() == nil {
			u.d.explain(err)
		}
		select {
		case <-u.d.stop:
			return
		case <-u.prepare:
		}
	}
}
