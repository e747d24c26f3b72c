package storage

import (
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"sync/atomic"

	"sheepdog/storage/object"
)

// errAway: the group of the object lives on another disk. errHeld: it is about to. Whoever meets them looks again
// for where the group lives.
var (
	errAway = errors.New("partition lives on another disk")
	errHeld = errors.New("partition goes to another disk")
)

// handover brings groups from the disk on which they live to another one. While they are copied it takes
// note of what changes; then it holds changes back, for as long as it takes to copy the last of them, and
// ends with the groups living there, or as before. Requests need no lock for that but the one of their object: who
// finds an object in memory finds there that it is held, or gone; who does not find it asks under the lock
// of the objects' map whether the group still lives here.
type handover struct {
	d      *drive
	groups atomic.Pointer[map[object.Group]bool] // another one takes its place when some are left out
	held   atomic.Bool
	done   chan struct{} // closed when it has ended

	mu      sync.Mutex
	touched map[object.Key]bool // changed since the last call of changes; nil: it has ended
	parked  requests            // wait for the end
}

// away reports whether a group does not live on this disk.
func (d *drive) away(g object.Group) bool { return d.routes != nil && d.routes.at(g) != d }

// beginHandover has every change of an object of the groups noted from now on. One goes on at a time.
func (d *drive) beginHandover(groups []object.Group) *handover {
	h := &handover{d: d, done: make(chan struct{}), touched: make(map[object.Key]bool)}
	set := setOf(groups)
	h.groups.Store(&set)
	d.handover.Store(h)
	for _, o := range h.objects(set) {
		o.mu.Lock()
		o.watch = h
		o.mu.Unlock()
	}
	return h
}

func (h *handover) has(g object.Group) bool { return (*h.groups.Load())[g] }

// list are the groups.
func (h *handover) list() []object.Group { return slices.Collect(maps.Keys(*h.groups.Load())) }

// leaveOut lets groups stay where they are.
func (h *handover) leaveOut(groups map[object.Group]bool) {
	set := maps.Clone(*h.groups.Load())
	maps.DeleteFunc(set, func(g object.Group, _ bool) bool { return groups[g] })
	h.groups.Store(&set)
	h.free(groups)
}

// free has the objects of groups be as all others are.
func (h *handover) free(groups map[object.Group]bool) {
	for _, o := range h.objects(groups) {
		o.mu.Lock()
		o.held, o.watch = false, nil
		o.mu.Unlock()
	}
}

// objects are those of groups that are in memory. Those that come there later know of the handover.
func (h *handover) objects(groups map[object.Group]bool) []*obj {
	var list []*obj
	for i := range h.d.shards {
		s := &h.d.shards[i]
		s.mu.RLock()
		for k, o := range s.objects {
			if groups[k.Group] {
				list = append(list, o)
			}
		}
		s.mu.RUnlock()
	}
	return list
}

// touch notes that an object has changed; false: nobody wants to know any more.
func (h *handover) touch(k object.Key) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.touched == nil {
		return false
	}
	h.touched[k] = true
	return true
}

// changes returns the objects that have changed since it was called last.
func (h *handover) changes() map[object.Key]bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	t := h.touched
	h.touched = make(map[object.Key]bool)
	return t
}

// hold returns when nothing of the groups changes any more. Reads go on. No checkpoint of the disk goes on.
func (h *handover) hold() {
	h.held.Store(true)
	list := h.objects(*h.groups.Load())
	for _, o := range list {
		o.mu.Lock()
		o.held = true
		o.mu.Unlock()
	}
	for _, o := range list {
		o.maint.Lock()
		o.mu.Lock()
		o.drain()
		h.d.thaw(o)
		o.maint.Unlock()
	}
}

// depart has the groups, which are held, live on another disk. Nothing of them is left in memory here; it
// returns the files that they had in newDir.
func (h *handover) depart(to *drive) (fresh []string) {
	groups := *h.groups.Load()
	for g := range groups {
		h.d.routes.move(g, h.d, to)
	}
	for _, o := range h.objects(groups) {
		o.maint.Lock()
		o.mu.Lock()
		if o.hasFile && o.fresh {
			fresh = append(fresh, o.path())
		}
		if !o.dead {
			h.d.expel(o)
		}
		h.d.thaw(o)
		o.maint.Unlock()
	}
	return fresh
}

// expel forgets an object whose group lives elsewhere. Both locks are held.
func (d *drive) expel(o *obj) {
	d.closeFile(o)
	d.dropPages(o)
	o.pages = nil
	o.forget()
	o.stale, o.held, o.watch, o.dead = 0, false, nil, true
	s := d.shard(o.key)
	s.mu.Lock()
	delete(s.objects, o.key)
	s.mu.Unlock()
	d.resident.Add(-1)
}

// finish lets requests go on, wherever their groups live now.
func (h *handover) finish() {
	if !h.d.handover.CompareAndSwap(h, nil) {
		return // it has ended
	}
	h.free(*h.groups.Load())
	h.mu.Lock()
	q := h.parked.take()
	h.touched = nil
	h.mu.Unlock()
	close(h.done)
	for r := q.pop(); r != nil; r = q.pop() {
		h.d.pass(r)
	}
}

// park keeps a request for a group that is held until the handover has ended.
func (d *drive) park(r *object.Request) {
	if h := d.handover.Load(); h != nil && h.park(r) {
		return
	}
	d.pass(r)
}

func (h *handover) park(r *object.Request) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.touched == nil || !h.has(r.Key().Group) {
		return false
	}
	h.parked.push(r)
	return true
}

// pass gives a request to the disk on which its group lives now. A worker takes it: who passes it on may be within
// a submission.
func (d *drive) pass(r *object.Request) {
	d.routes.find(r.Key().Group).pool.submit(r)
}

// refuse completes a request with an error of this disk, unless the disk is not concerned any more.
func (d *drive) refuse(r *object.Request, err error) {
	if d.moved(r.Key().Group) {
		d.pass(r)
		return
	}
	r.Complete(err)
}

// moved reports whether a group lives on another disk than this one.
func (d *drive) moved(g object.Group) bool {
	if d.routes == nil {
		return false
	}
	at := d.routes.at(g)
	return at != nil && at != d
}

// awaitHandover waits until a group that is held, or has gone, lives somewhere for good.
func (d *drive) awaitHandover(ctx context.Context, g object.Group) error {
	if h := d.handover.Load(); h != nil && h.has(g) {
		select {
		case <-h.done:
		case <-ctx.Done():
		}
	}
	return ctx.Err()
}
