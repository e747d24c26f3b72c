package storage

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"sheepdog/storage/object"
)

// mover brings groups from one disk of the node to another, in the background: its share to a disk that came
// when others had something, and all that is on a disk that is to be taken out to those that stay.
//
// A group is copied while it is at work, and what changed meanwhile again, until little is left. Then its changes are
// held back until that is copied too, and durable notes are made: where it lived it has left, which is the moment when the
// copy begins to count; and the copy is no longer one that has not ended. Before the first byte of a copy is written there is a
// note that it does not count. So of the two places one counts after a crash at any moment, and what the other
// one has is removed. Many groups share each note. Those of which a disk has nothing need none.
type mover struct {
	s      *Store
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	wake   chan struct{}

	batch sync.Mutex // held while groups are being moved
	pause atomic.Int32
	limit int // groups that are moved at a time
	retry time.Duration

	mu    sync.Mutex // guards the notes of disks; held while groups change their place
	going map[object.Group]bool

	own    int64 // reads of the mover itself
	seen   int64 // requests as of the last look
	looked time.Time
	busy   time.Time // when there were some last
	debt   time.Duration
}

// moves is what a disk says of groups that come and go.
type moves struct {
	come, gone atomic.Int64 // groups still to
	bytes      atomic.Int64 // copied to the disk since the start
	blocked    atomic.Pointer[string]
}

const (
	maxMoveGroups = 1024      // that are moved together
	maxMoveBytes  = 256 << 20 // after so many no more groups are begun
	maxMovePasses = 10        // that follow what changes, before fewer groups are moved at a time
	// Changes are held back when no more is left to be copied than so many objects and bytes.
	maxHeldObjects = 16
	maxHeldBytes   = 2 << 20

	moveRetry    = 5 * time.Second // after a failure, or when there is no space
	maxMoveRetry = 5 * time.Minute // after more and more failures
	// moveBusy is how long after the last request the mover still holds itself back.
	moveBusy = time.Second
	moveLook = 50 * time.Millisecond
)

func newMover(s *Store) *mover {
	m := &mover{s: s, wake: make(chan struct{}, 1), limit: maxMoveGroups, going: make(map[object.Group]bool)}
	m.ctx, m.cancel = context.WithCancel(context.Background())
	return m
}

func (m *mover) start() {
	if m.s.cfg.MoveRate >= 0 {
		m.wg.Go(m.run)
	}
}

func (m *mover) close() {
	m.cancel()
	m.wg.Wait()
}

// stop lets nothing be moved until the function that it returns is called.
func (m *mover) stop() (resume func()) {
	m.pause.Add(1)
	m.batch.Lock()
	m.pause.Add(-1)
	return func() { m.batch.Unlock(); notify(m.wake) }
}

func (m *mover) run() {
	for {
		again := m.round()
		var retry <-chan time.Time
		if again > 0 {
			retry = time.After(again)
		}
		select {
		case <-m.ctx.Done():
			return
		case <-m.wake:
		case <-retry:
		}
	}
}

// round moves what there is to move. It returns when to try again; 0: when woken.
func (m *mover) round() (again time.Duration) {
	for m.ctx.Err() == nil {
		if again, done := m.step(); done {
			return again
		}
	}
	return 0
}

// step moves some groups. done: there are none that can be moved now.
func (m *mover) step() (again time.Duration, done bool) {
	m.batch.Lock()
	defer m.batch.Unlock()
	p := m.plan()
	if p.next == nil {
		settled := m.settle()
		if settled && p.noted {
			return 0, false
		}
		if !settled || p.blocked {
			return moveRetry, true
		}
		return 0, true
	}
	err := m.move(p.next)
	switch {
	case err == nil:
		m.retry = moveRetry
	case errors.Is(err, errHot), errors.Is(err, context.Canceled): // the latter: somebody changes the disks, see stop
	default:
		m.s.cfg.Logger.Warn("partitions could not be moved to another disk now", "from", p.next.from.String(), "to", p.next.to.String(), "error", err)
		text := err.Error()
		p.next.from.moves.blocked.Store(&text)
		m.retry = min(2*max(m.retry, moveRetry), maxMoveRetry)
		return m.retry, true
	}
	return 0, false
}

// task is a number of groups that go from one disk to another.
type task struct {
	from, to *drive
	groups   []object.Group
}

// plannedMoves is what the mover is about to do.
type plannedMoves struct {
	next    *task // nil: nothing now
	blocked bool  // some have to wait for space
	noted   bool  // some have to wait until notes are settled
}

// plan finds out which groups are to be moved, and chooses some.
func (m *mover) plan() (p plannedMoves) {
	drives := m.s.routes.drives()
	var stay, room []*drive
	leaving := make(map[*drive]bool) // looked at once: it may change
	for _, d := range drives {
		if leaving[d] = d.leaves(); leaving[d] {
			continue
		}
		stay = append(stay, d)
		if !d.space.nearlyFull() {
			room = append(room, d)
		}
	}
	come, gone := make(map[*drive]int64), make(map[*drive]int64)
	reason := make(map[*drive]string)
	noted := m.noted()
	for _, from := range drives {
		switch {
		case from.failed() != nil, from.given.Load():
			continue
		case leaving[from] && len(room) == 0:
			gone[from] = int64(len(m.s.routes.on(from)))
			reason[from], p.blocked = "no other disk of the node has space", true
			continue
		}
		byTarget := make(map[*drive][]object.Group)
		for _, g := range m.s.routes.on(from) {
			to := target(g, from, leaving[from], stay, room)
			if to == nil {
				continue
			}
			gone[from]++
			come[to]++
			switch {
			case noted[g]:
				p.noted = true
			case !slices.Contains(room, to):
				reason[to], p.blocked = "the disk is nearly full", true
			default:
				byTarget[to] = append(byTarget[to], g)
			}
		}
		for _, to := range drives { // in an order of its own: a map has none
			if p.next == nil && len(byTarget[to]) > 0 {
				p.next = &task{from, to, byTarget[to]}
			}
		}
	}
	for _, d := range drives {
		d.moves.gone.Store(gone[d])
		d.moves.come.Store(come[d])
		text := reason[d]
		d.moves.blocked.Store(&text)
		if d.filling.Load() && come[d] == 0 && d.failed() == nil {
			m.filled(d)
		}
	}
	return p
}

// target is the disk that a group shall go to; nil: it stays where it is.
func target(g object.Group, from *drive, leaves bool, stay, room []*drive) *drive {
	if leaves {
		return room[rendezvous(g, room)]
	}
	if to := stay[rendezvous(g, stay)]; to != from && to.filling.Load() {
		return to
	}
	return nil
}

// noted are the groups in the notes of any disk: they stay until those are settled.
func (m *mover) noted() map[object.Group]bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	all := make(map[object.Group]bool)
	for _, d := range m.s.routes.drives() {
		if d.failed() != nil {
			continue // what it says matters at the next start, if it can be read then
		}
		for _, groups := range []map[object.Group]string{d.notes.arriving, d.notes.arrived, d.notes.left} {
			for g := range groups {
				all[g] = true
			}
		}
	}
	return all
}

// filled notes that a disk has its share.
func (m *mover) filled(d *drive) {
	m.s.idMu.Lock()
	defer m.s.idMu.Unlock()
	id := *d.id
	id.Filling = false
	if err := d.become(id); err != nil {
		d.explain(err)
		return
	}
	d.filling.Store(false)
	d.logger.Info("disk has its share of the node's partitions", "disk", d.String())
}

// errUnsettled: notes cannot be forgotten yet.
var errUnsettled = fmt.Errorf("the log still has something of them: %w", object.ErrInvalid)

// errHot: what is moved changes faster than it is copied.
var errHot = errors.New("partitions change faster than they are copied")

// move moves some groups of a task.
func (m *mover) move(t *task) error {
	for _, d := range []*drive{t.from, t.to} { // else some would be twice
		select {
		case <-d.counted:
		case <-m.ctx.Done():
			return m.ctx.Err()
		}
	}
	if err := m.moveEmpty(t); err != nil || len(t.groups) == 0 {
		return err
	}
	t.groups = t.groups[:min(len(t.groups), m.limit)]
	err := m.announce(t)
	if err == nil {
		if err = m.copy(t); err != nil && m.ctx.Err() == nil {
			m.undo(t)
		}
	}
	m.mu.Lock()
	clear(m.going)
	if err == nil {
		err = m.forgetNotes(t.from)
	}
	m.mu.Unlock()
	if errors.Is(err, errHot) {
		m.limit = max(1, len(t.groups)/2)
	} else if err == nil {
		m.limit = min(maxMoveGroups, 2*m.limit)
	}
	return err
}

// moveEmpty moves the groups of which a disk has nothing: after a crash they live nowhere. The others are left in the task.
func (m *mover) moveEmpty(t *task) error {
	var empty, rest []object.Group
	traces := t.from.traces()
	for _, g := range t.groups {
		if traces[g] {
			rest = append(rest, g)
		} else {
			empty = append(empty, g)
		}
	}
	t.groups = rest
	if len(empty) == 0 {
		return nil
	}
	t.from.upkeep.checkpointMu.Lock()
	defer t.from.upkeep.checkpointMu.Unlock()
	return m.s.withMarks(t.from, t.to, empty, func() error {
		m.mu.Lock()
		defer m.mu.Unlock()
		h := t.from.beginHandover(empty)
		defer h.finish()
		h.hold()
		h.leaveOut(t.from.traces()) // something came to them: the next time
		h.depart(t.to)
		return nil
	})
}

// traces are the groups of which a disk has something, if only a directory or a record of what was deleted.
func (d *drive) traces() map[object.Group]bool { return setOf(d.allGroups()) }

// announce notes that what the target is going to have does not count.
func (m *mover) announce(t *task) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, g := range t.groups {
		t.to.notes.arriving[g] = t.from.name
		m.going[g] = true
	}
	return t.to.explain(t.to.notes.write(t.to.fs))
}

// copy copies groups until it has enough, and what changes meanwhile, and then has them live there.
func (m *mover) copy(t *task) error {
	ctx, cancel := context.WithCancel(m.ctx)
	defer cancel()
	c := newCopier(ctx, t.from, t.to)
	defer c.close()
	c.pace = m.pacer(ctx, t)
	h := t.from.beginHandover(t.groups)
	defer h.finish()
	for i, g := range t.groups {
		if err := c.group(g); err != nil {
			return err
		}
		if c.moved >= maxMoveBytes {
			h.leaveOut(setOf(t.groups[i+1:]))
			break
		}
	}
	if err := m.follow(c, h); err != nil {
		return err
	}
	c.pace = nil
	fresh, err := m.change(t, c, h)
	if err != nil {
		return err
	}
	m.clean(t.from, h.list(), fresh)
	return nil
}

func setOf(groups []object.Group) map[object.Group]bool {
	set := make(map[object.Group]bool, len(groups))
	for _, g := range groups {
		set[g] = true
	}
	return set
}

// follow copies what has changed, until that is little.
func (m *mover) follow(c *copier, h *handover) error {
	for pass := 0; ; pass++ {
		if pass > 1 {
			c.pace = nil // else it might never end
		}
		before, changes := c.moved, h.changes()
		for k := range changes {
			if err := c.object(k); err != nil {
				return err
			}
		}
		if err := c.sync(); err != nil {
			return err
		}
		switch {
		case len(changes) <= maxHeldObjects && c.moved-before <= maxHeldBytes:
			return nil
		case pass >= maxMovePasses && len(h.list()) > 1:
			return errHot
		case pass >= 2*maxMovePasses: // one group: the worst that can be is a wait
			return nil
		}
	}
}

// change has the groups live on their new disk. It returns the files that the old one has of them in newDir.
func (m *mover) change(t *task, c *copier, h *handover) (fresh []string, err error) {
	groups := h.list()
	t.from.upkeep.checkpointMu.Lock()
	defer t.from.upkeep.checkpointMu.Unlock()
	err = m.s.withMarks(t.from, t.to, groups, func() error {
		m.mu.Lock()
		defer m.mu.Unlock()
		if err := m.stage(t, groups); err != nil {
			return err
		}
		began := time.Now()
		h.hold()
		defer h.finish()
		for k := range h.changes() {
			if err := c.object(k); err != nil {
				return err
			}
		}
		if err := c.sync(); err != nil {
			return err
		}
		if err := m.commit(t, groups); err != nil {
			return err
		}
		for k := range c.objects {
			t.to.takeRot(t.from, k)
		}
		t.from.count.objects.Add(-int64(len(c.objects)))
		t.to.count.objects.Add(int64(len(c.objects)))
		fresh = h.depart(t.to)
		h.finish()
		m.s.cfg.Logger.Info("partitions went to another disk", "from", t.from.String(), "to", t.to.String(), "partitions", len(groups), "objects", len(c.objects), "bytes", c.moved, "held", time.Since(began))
		return nil
	})
	return fresh, err
}

// stage prepares the notes on both disks, so that little is to be waited for when changes are held back. mu is held.
func (m *mover) stage(t *task, groups []object.Group) error {
	for _, g := range groups {
		if m.s.routes.at(g) != t.from {
			return fmt.Errorf("partition %s has another disk now", g)
		}
	}
	after, left := t.to.notes, t.from.notes
	after.arriving, after.arrived, left.left = maps.Clone(after.arriving), maps.Clone(after.arrived), maps.Clone(left.left)
	for _, g := range t.groups {
		delete(after.arriving, g)
	}
	for _, g := range groups {
		after.arrived[g] = t.from.name
		left.left[g] = t.to.name
	}
	if err := t.to.explain(after.stage(t.to.fs)); err != nil {
		return err
	}
	return t.from.explain(left.stage(t.from.fs))
}

// commit makes the notes that stage has prepared. The first is what decides: if the second one cannot be made the first
// is taken back. A disk that has no space for a note, as where the file is new and the directory must grow for its name, has not made it,
// and goes on; of one that fails otherwise nobody knows whether the note is durable: nothing more must change there. mu is held.
func (m *mover) commit(t *task, groups []object.Group) error {
	if err := commitNotes(t.from.fs); err != nil {
		return t.from.explain(err)
	}
	if err := commitNotes(t.to.fs); err != nil {
		err = t.to.explain(err)
		if back := t.from.notes.write(t.from.fs); back != nil {
			err = errors.Join(err, t.from.fail(back)) // it still says that they have left: nothing more must change here
		}
		return err
	}
	for _, g := range t.groups {
		delete(t.to.notes.arriving, g)
	}
	for _, g := range groups {
		t.to.notes.arrived[g] = t.from.name
		t.from.notes.left[g] = t.to.name
	}
	return nil
}

// undo removes copies that came to nothing.
func (m *mover) undo(t *task) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if t.to.failed() != nil || t.from.failed() != nil { // the copies may count after a restart: see commit
		return
	}
	if err := t.to.explain(t.to.uncopy(t.groups)); err != nil {
		t.to.logger.Warn("unfinished copies of partitions could not be removed", "disk", t.to.String(), "error", err)
	}
}

// uncopy removes what a disk has of groups whose copies do not count, and the notes of that.
func (d *drive) uncopy(groups []object.Group) error {
	if err := d.removeGroups(groups); err != nil {
		return err
	}
	return d.renote(func(n *notes) {
		for _, g := range groups {
			delete(n.arriving, g)
		}
	})
}

// removeGroups removes the directories of groups, durably.
func (d *drive) removeGroups(groups []object.Group) error {
	for _, g := range groups {
		if err := removeAll(d.fs, groupDir(g), false); err != nil {
			return err
		}
		if err := d.fs.Remove(groupDir(g)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		d.groupMu.Lock()
		delete(d.groups, g)
		d.groupMu.Unlock()
	}
	return d.fs.SyncDir(objectsDir)
}

// clean removes the files of groups that have left a disk. The records of them that its log has are forgotten with the next
// checkpoint, and then their notes are.
func (m *mover) clean(d *drive, groups []object.Group, fresh []string) {
	err := d.removeGroups(groups)
	for _, path := range fresh {
		if err == nil {
			err = d.fs.Remove(path)
		}
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
	}
	if err != nil {
		d.logger.Warn("what a partition has left behind on a disk could not be removed: the next start does", "disk", d.String(), "error", d.explain(err))
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, g := range groups {
		d.notes.until[g] = d.log.Segment()
	}
}

// settle has the notes of all disks forgotten. It reports whether none are left, but on disks that are out of service.
// Nothing is being moved.
func (m *mover) settle() bool {
	done := true
	for _, d := range m.s.routes.drives() {
		m.mu.Lock()
		if len(d.notes.arrived) > 0 && d.failed() == nil { // that it has left the other disk is durable: see commit
			if err := d.explain(d.renote(func(n *notes) { clear(n.arrived) })); err != nil {
				done = false
			}
		}
		m.mu.Unlock()
	}
	for _, d := range m.s.routes.drives() {
		m.mu.Lock()
		none := len(d.notes.arriving)+len(d.notes.left) == 0
		m.mu.Unlock()
		if none || d.failed() != nil {
			continue
		}
		if err := m.settleDisk(d); err != nil {
			d.logger.Warn("what moved partitions have left behind could not be removed now", "disk", d.String(), "error", err)
			done = false
		}
	}
	return done
}

func (m *mover) settleDisk(d *drive) error {
	m.mu.Lock()
	var copies, left []object.Group
	for g, id := range d.notes.arriving {
		if from := m.withID(id); from == nil || from.failed() == nil { // else it may count after a restart: see commit
			copies = append(copies, g)
		}
	}
	for g := range d.notes.left {
		if d.notes.until[g] == 0 {
			left = append(left, g)
		}
	}
	err := error(nil)
	if len(copies) > 0 {
		err = d.uncopy(copies)
	}
	m.mu.Unlock()
	if len(left) > 0 {
		m.clean(d, left, nil)
	}
	for range 2 { // a log that is full cannot be retired up to its end
		if err == nil {
			d.upkeep.checkpointMu.Lock()
			err = d.checkpoint()
			d.upkeep.checkpointMu.Unlock()
		}
		m.mu.Lock()
		if err == nil {
			err = m.forgetNotes(d)
		}
		settled := true
		for g := range d.notes.left {
			settled = settled && m.stranded(d, g)
		}
		m.mu.Unlock()
		if err != nil || settled {
			return d.explain(err)
		}
	}
	return errUnsettled
}

// withID is the disk with an id; nil: there is none.
func (m *mover) withID(id string) *drive {
	for _, d := range m.s.routes.drives() {
		if d.name == id {
			return d
		}
	}
	return nil
}

// owes reports whether a disk that works has something left of groups that went to d.
func (m *mover) owes(d *drive) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, o := range m.s.routes.drives() {
		for _, id := range o.notes.left {
			if o != d && o.failed() == nil && id == d.name {
				return true
			}
		}
	}
	return false
}

// forgetNotes forgets the groups that have left a disk and of which its log has nothing any more. The disks that they went to
// forget where they came from before: else what they have would not count. mu is held.
func (m *mover) forgetNotes(d *drive) error {
	var past []object.Group
	for g, segment := range d.notes.until {
		if segment < d.retained.Load() {
			past = append(past, g)
		}
	}
	for _, to := range m.s.routes.drives() {
		came := slices.DeleteFunc(slices.Clone(past), func(g object.Group) bool { return to.notes.arrived[g] != d.name })
		if len(came) == 0 || to.failed() != nil {
			continue
		}
		err := to.renote(func(n *notes) {
			for _, g := range came {
				delete(n.arrived, g)
			}
		})
		if err != nil {
			return to.explain(err)
		}
	}
	past = slices.DeleteFunc(past, func(g object.Group) bool { return m.stranded(d, g) })
	if len(past) == 0 {
		return nil
	}
	return d.explain(d.renote(func(n *notes) {
		for _, g := range past {
			n.forget(g)
		}
	}))
}

// stranded reports whether a group that has left a disk is on one that has failed since: should that be readable again, it is
// still the one that counts.
func (m *mover) stranded(d *drive, g object.Group) bool {
	at := m.s.routes.at(g)
	return at != nil && at.failed() != nil && at.name == d.notes.left[g]
}

// pacer returns what the copying of a task waits with, so that clients are not delayed.
func (m *mover) pacer(ctx context.Context, t *task) func(int64) error {
	return func(bytes int64) error {
		m.own++
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case m.pause.Load() > 0:
			return context.Canceled
		case t.from.failed() != nil:
			return t.from.failed()
		case t.to.failed() != nil:
			return t.to.failed()
		case m.s.cfg.MoveRate == 0 || !m.clients():
			m.debt = 0
			return nil
		}
		m.debt += time.Duration(float64(bytes) / float64(m.s.cfg.MoveRate) * float64(time.Second))
		if m.debt < 2*time.Millisecond {
			return nil
		}
		timer := time.NewTimer(m.debt)
		defer timer.Stop()
		m.debt = 0
		select {
		case <-timer.C:
		case <-ctx.Done():
		}
		return ctx.Err()
	}
}

// clients reports whether others than the mover are at work.
func (m *mover) clients() bool {
	now := time.Now()
	if now.Sub(m.looked) >= moveLook {
		n := int64(0)
		for _, d := range m.s.routes.drives() {
			c := &d.count
			n += c.reads.Load() + c.writes.Load() + c.directs.Load() + c.zeroes.Load()
		}
		if n-m.seen > m.own {
			m.busy = now
		}
		m.seen, m.own, m.looked = n, 0, now
	}
	return now.Sub(m.busy) < moveBusy
}
