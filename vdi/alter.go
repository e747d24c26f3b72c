package vdi

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"sheepdog/storage/object"
	"sheepdog/vdi/catalog"
)

// Altered tells what AlterCopies has done.
type Altered struct {
	From    int           `json:"from"` // copies
	To      int           `json:"to"`
	Volumes []Info        `json:"volumes"` // VDIs and snapshots concerned, by name and number
	Bytes   int64         `json:"bytes"`   // copied
	Pause   time.Duration `json:"pause"`   // for which writes waited in the end, ns
}

// Family lists a VDI or what is left of it, its snapshots, and all that may share objects with them: by name, the VDI
// before its snapshots, those by number.
func (s *Service) Family(ctx context.Context, name string) ([]Info, error) {
	v, err := s.member(ctx, name)
	if err != nil {
		return nil, explain(err, "look up volume")
	}
	return s.relatives(v), nil
}

func (s *Service) relatives(v catalog.VDI) []Info {
	list := []Info{}
	for _, w := range s.cfg.Catalog.List() {
		if w.Family == v.Family {
			list = append(list, s.describe(w))
		}
	}
	return list
}

// member finds the VDI, or a snapshot if it is deleted.
func (s *Service) member(ctx context.Context, name string) (catalog.VDI, error) {
	v, err := s.find(ctx, name, "")
	if list := s.cfg.Catalog.Snapshots(name); errors.Is(err, catalog.ErrNotFound) && len(list) > 0 {
		return list[len(list)-1], nil
	}
	return v, err
}

// AlterCopies changes how many copies a VDI has, and with it all that may share objects with it: see Family. Its
// objects are copied, while clients of this node go on; then all change over at once, and the former objects are
// removed in the background. Until then everything is as before, also if it fails, ctx ends, or the node does: what was
// copied is removed then, or is made use of if it is asked again before.
//
// This node takes ownership of these VDIs; so it is best done by the node that Writer names. Clients of another node
// that write meanwhile are made to wait in the end, for less than Config.ResendWithin; where the family is too large for that
// it fails with an *Elsewhere. Begun is called before anything is copied, nil is allowed. Besides, it fails with
// ErrBusy, ErrNotFound, ErrInvalid, ErrNoSpace, ErrLocked, ErrCorrupt, ErrUnavailable.
func (s *Service) AlterCopies(ctx context.Context, name string, copies int, begun func(Altered) error, p Progress) (Altered, error) {
	a, err := s.alterCopies(ctx, name, copies, begun, p)
	if err != nil {
		return a, explain(err, "alter the copies of %q to %d", name, copies)
	}
	if a.From != a.To {
		s.tell(ctx, "moved", name)
	}
	return a, nil
}

func (s *Service) alterCopies(ctx context.Context, name string, copies int, begun func(Altered) error, p Progress) (Altered, error) {
	if err := s.catchUp(ctx); err != nil {
		return Altered{}, err
	}
	v, err := s.member(ctx, name)
	if err != nil {
		return Altered{}, err
	}
	policy, err := s.cfg.PolicyOf(ctx, copies)
	if err != nil {
		return Altered{}, err
	}
	a := Altered{From: s.cfg.CopiesOf(v.Policy), To: s.cfg.CopiesOf(policy), Volumes: s.relatives(v)}
	if begun != nil {
		if err := begun(a); err != nil {
			return a, err
		}
	}
	if policy == v.Policy {
		return a, nil
	}
	m := mover{s: s, family: v.Family, from: v.Policy, to: policy, shift: v.SizeShift, progress: p}
	defer m.release()
	// What cannot go on is found before anything is begun.
	if err := m.own(ctx); err != nil && !errors.Is(err, errDisowned) {
		return a, err
	}
	if err := m.measure(ctx); err != nil {
		return a, err
	}
	x, err := s.beginCopy(ctx, v, policy)
	now := s.liveOf(v.Family) // from here on nobody else moves it
	switch {
	case errors.Is(err, catalog.ErrInvalid) && len(now) > 0 && now[0].Policy == policy: // somebody else just did it
		a.From = a.To
		return a, nil
	case err != nil:
		return a, err
	}
	defer s.unreserve(ctx, x.Ref)
	m.x = x
	if len(now) == 0 {
		return a, errAlteredGone
	}
	m.from, a.From = now[0].Policy, s.cfg.CopiesOf(now[0].Policy)
	err = m.move(ctx)
	a.Bytes, a.Pause, a.Volumes = m.copied.Load(), m.pause, s.relatives(v)
	return a, err
}

// Writer tells through which other node that is up the VDIs of a family are written: the one that alters their copies without
// making anybody wait. It is "" if this node owns some of them, or nobody any.
func (s *Service) Writer(ctx context.Context, name string) (node string, err error) {
	if err := s.catchUp(ctx); err != nil {
		return "", explain(err, "look up who writes %q", name)
	}
	v, err := s.member(ctx, name)
	if err != nil {
		return "", explain(err, "look up volume")
	}
	for _, w := range s.liveOf(v.Family) {
		switch {
		case w.Snapshot || w.Owner == nil:
		case w.Owner.Name == s.cfg.Node:
			return "", nil
		case s.mayBeUp(w.Owner) && (node == "" || w.Ref == v.Ref): // of several, the one that writes what is asked for
			node = w.Owner.Name
		}
	}
	return node, nil
}

// Elsewhere is an ErrBusy: VDIs are written through other nodes all the time.
type Elsewhere struct {
	Node string // one of them
	text string
}

func (e *Elsewhere) Error() string { return e.text + ": " + ErrBusy.Error() }

// Unwrap makes it an ErrBusy.
func (e *Elsewhere) Unwrap() error { return ErrBusy }

var errAlteredGone = fmt.Errorf("it was deleted meanwhile: %w", ErrNotFound)

// mover moves a family to another policy.
type mover struct {
	s        *Service
	family   uint64
	from, to object.PolicyID
	shift    uint8
	x        catalog.VDI // under which the copies are made
	progress Progress

	total   int64            // bytes, about
	objects int              // likewise
	members []catalog.Member // of the family, as looked at by own
	vids    map[object.VID]bool
	cores   []*core // of its VDIs, by vid
	alone   bool    // nobody else changes a VDI as a whole
	locked  []*core // whose admin is held
	looked  time.Time
	lost    int           // how often in a row a VDI was another node's
	looking time.Duration // that the last look at all objects took
	hold    time.Duration // for how long others are kept from the VDIs, 0: only as who writes does
	kept    []*core       // released in the end
	copied  atomic.Int64
	pause   time.Duration

	mu     sync.Mutex
	differ []object.ID // to be looked at again
}

func (m *mover) release() {
	for _, c := range m.kept {
		c.tracker.Store(nil)
		m.s.release(c)
	}
}

// ownTries bounds how often own begins anew because a VDI was taken, or made, while it waited for another one.
const ownTries = 8

// own makes this node the owner of all VDIs of the family at once, and notes what the family is then: no VDI is in it that is
// not in cores, and if none has another generation in the end, nobody else has written any of them since. It fails with
// errDisowned if others take them all the time.
func (m *mover) own(ctx context.Context) error {
	m.cores = nil
	for range ownTries {
		for _, v := range m.s.liveOf(m.family) {
			if v.Snapshot {
				continue
			}
			if err := m.ownOne(ctx, v); err != nil {
				return err
			}
		}
		if m.look() {
			return nil
		}
	}
	return errDisowned
}

// look notes what the family is. It reports whether this node owns all its VDIs: clones may have been made, and
// others may have taken VDIs, while it waited for one; and what the catalog says to be this node's may still be on its way to it.
func (m *mover) look() (all bool) {
	m.members, m.vids, all = nil, map[object.VID]bool{}, true
	for _, v := range m.s.cfg.Catalog.Family(m.family) {
		if v.Move {
			continue
		}
		m.members = append(m.members, catalog.Member{Ref: v.Ref, Generation: v.Generation})
		m.vids[v.VID] = true
		all = all && (v.State != catalog.Live || v.Snapshot || m.owns(v))
	}
	return all
}

// opened is the core of a VDI in cores, or nil.
func (m *mover) opened(v catalog.VDI) *core {
	if i := slices.IndexFunc(m.cores, func(c *core) bool { return c.name == v.Name }); i >= 0 {
		return m.cores[i]
	}
	return nil
}

// owns reports whether this node owns a VDI under the generation that it has in v, and whoever did before knows that.
func (m *mover) owns(v catalog.VDI) bool {
	c := m.opened(v)
	if c == nil {
		return false
	}
	now := c.mapping.Load()
	return now.ref == v.Ref && now.under == v.Generation && now.generation.Load() != 0
}

// ownOne takes ownership of a VDI, and adds it to cores if it is not there, unless it was just deleted.
func (m *mover) ownOne(ctx context.Context, v catalog.VDI) error {
	c := m.opened(v)
	if c == nil {
		var err error
		if c, err = m.open(ctx, v); c == nil || err != nil {
			return err
		}
	}
	var err error
	if m.alone {
		err = c.ownLocked(ctx, max(m.hold, time.Duration(c.tenure.Load())))
	} else {
		err = c.own(ctx)
	}
	if errors.Is(err, ErrNotFound) {
		m.drop(ctx, c)
		return nil
	}
	return err
}

// open adds a VDI to cores; nil: it was just deleted.
func (m *mover) open(ctx context.Context, v catalog.VDI) (*core, error) {
	c, err := m.s.acquire(ctx, v.Name, "")
	if errors.Is(err, catalog.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	m.kept = append(m.kept, c)
	if c.family != m.family {
		return nil, nil // another one of the name was made
	}
	if m.alone {
		if err := c.admin.LockWithin(ctx); err != nil {
			return nil, err
		}
		m.locked = append(m.locked, c)
	}
	m.cores = append(m.cores, c)
	return c, nil
}

// drop takes what was deleted out of cores.
func (m *mover) drop(ctx context.Context, c *core) {
	m.cores = slices.DeleteFunc(m.cores, func(d *core) bool { return d == c })
	if i := slices.Index(m.locked, c); i >= 0 {
		m.locked = slices.Delete(m.locked, i, i+1)
		c.letGo(ctx)
		c.admin.Unlock()
	}
}

// unlock lets others change the VDIs as a whole, and write them through other nodes.
func (m *mover) unlock(ctx context.Context) {
	for _, c := range m.locked {
		c.letGo(ctx)
		c.admin.Unlock()
	}
	m.locked = nil
}

const (
	// lookEvery is how often it is looked whether this node still owns the VDIs.
	lookEvery = 200 * time.Millisecond
	// maxLost is how often in a row it may not, before somebody is said to write through another one.
	maxLost = 8
	// maxHeld is how many objects a family may have for others to be kept from it while all are compared: that takes about
	// a second.
	maxHeld = 8192
	// heldAttempts bounds how often others are kept from a family.
	heldAttempts = 3
)

// keep takes the VDIs back that another node has taken since the last time: somebody wrote there now and then, or took a
// snapshot. Who writes there all the time has them again the next time, and is let go on until all is copied.
func (m *mover) keep(ctx context.Context) error {
	if m.lost == maxLost || time.Since(m.looked) < lookEvery {
		return nil
	}
	m.looked = time.Now()
	busy := m.stillOwned()
	if busy == nil {
		m.lost = 0
		return nil
	}
	if m.lost++; m.lost == maxLost {
		if m.objects <= maxHeld {
			return nil
		}
		return busy
	}
	for _, c := range m.cores {
		if err := c.own(ctx); err != nil && !errors.Is(err, ErrNotFound) {
			return err
		}
	}
	return nil
}

// stillOwned fails with an *Elsewhere if other nodes have taken some of the VDIs: clients write there.
func (m *mover) stillOwned() error {
	var list []string
	var node string
	for _, v := range m.s.liveOf(m.family) {
		if !v.Snapshot && v.Owner != nil && v.Owner.Name != m.s.cfg.Node {
			list = append(list, fmt.Sprintf("%q is written through node %q", v.Name, v.Owner.Name))
			node = cmp.Or(node, v.Owner.Name)
		}
	}
	if node == "" {
		return nil
	}
	return &Elsewhere{node, strings.Join(list, ", ") + ": stop who writes there, or use all VDIs concerned through one node"}
}

// measure finds out how much there is, and whether there is certainly no room for it.
func (m *mover) measure(ctx context.Context) error {
	err := m.s.cfg.Objects.List(ctx, m.from, func(i object.Info) error {
		if m.vids[i.Key.ID.VID()] {
			m.total += int64(i.Allocated)
			m.objects++
		}
		return ctx.Err()
	})
	if err != nil || m.s.cfg.Room == nil {
		return err
	}
	return m.s.cfg.Room(ctx, m.to, m.total)
}

const (
	// moveAttempts bounds how often what has been copied is compared anew because the family was changed: snapshots
	// were taken, or deleted, or another node has written. In the second half of them this node takes none meanwhile.
	moveAttempts = 16
	// quickRounds is how often what was written meanwhile is copied again before writes are held back for longer.
	quickRounds = 8
	// quickRound is how long such a round may take to be the one before the last, with which writes are held back. If they do
	// not get shorter it is doubled with each, up to longRound; they are shorter when nobody writes.
	quickRound = 100 * time.Millisecond
	longRound  = 3 * time.Second
)

func (m *mover) move(ctx context.Context) error {
	if err := m.fence(ctx); err != nil {
		return err
	}
	if err := m.round(ctx, true); err != nil {
		return err
	}
	held, contested := 0, false
	for n := 1; ; n++ {
		// Who is kept from writing waits for one more look at all objects, and must not have waited for too long for what
		// it has under way to be sent again.
		if m.hold = 0; contested && held < heldAttempts && m.looking <= m.s.cfg.ResendWithin/2 {
			m.hold, held = adminHold, held+1
		}
		m.alone = m.hold > 0 || n > moveAttempts/2
		err := m.follow(ctx)
		m.unlock(context.WithoutCancel(ctx))
		contested = errors.Is(err, errDisowned) || m.stillOwned() != nil
		switch {
		case err == nil || !isStale(err) && !errors.Is(err, catalog.ErrBusy):
			return err
		case n == moveAttempts:
			return cmp.Or(m.stillOwned(), err)
		}
	}
}

// fence returns when nobody goes by that the family has been in this policy before, and nothing that an earlier copy had
// under way comes later.
func (m *mover) fence(ctx context.Context) error {
	if err := m.s.known(ctx); err != nil {
		return err
	}
	list := []catalog.VDI{m.x}
	for _, v := range m.s.liveOf(m.family) {
		if v.Snapshot { // of the others, the owner has
			list = append(list, v)
		}
	}
	var mu sync.Mutex
	var failed error
	var wg sync.WaitGroup
	turn := make(chan struct{}, moveWorkers)
	for _, v := range list {
		turn <- struct{}{}
		wg.Go(func() {
			defer func() { <-turn }()
			if err := m.s.fence(ctx, v); err != nil && !(v.Snapshot && errors.Is(err, object.ErrStale)) { // or it is deleted by now
				mu.Lock()
				failed = err
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return failed
}

// follow makes the copy equal while the VDIs are written, and moves the family. It fails as stale if the family is
// not what it was when it began.
func (m *mover) follow(ctx context.Context) error {
	if x, ok := m.s.cfg.Catalog.Get(m.x.VID); !ok || x.Ref != m.x.Ref || x.State != catalog.Reserved {
		return fmt.Errorf("the copy was given up by another node: %w", ErrUnavailable)
	}
	if err := m.s.catchUp(ctx); err != nil {
		return err
	}
	if err := m.own(ctx); err != nil {
		return err
	}
	if len(m.s.liveOf(m.family)) == 0 { // what is deleted could be moved as well, but nobody would have more copies of it
		return errAlteredGone
	}
	owned := time.Now()
	for _, c := range m.cores {
		c.tracker.Store(newTracker((c.size.Load() + c.objectSize() - 1) >> c.shift))
	}
	if err := m.round(ctx, false); err != nil {
		return err
	}
	if err := m.sweep(ctx); err != nil {
		return err
	}
	m.looking = time.Since(owned)
	if !m.ownsAll() {
		return errDisowned
	}
	allowed := quickRound
	if m.hold > 0 { // the sooner it is over the better, for others wait anyway
		allowed = max(allowed, m.s.cfg.ResendWithin/4)
	}
	for n := 1; allowed <= longRound; n++ {
		began := time.Now()
		if err := m.again(ctx, false); err != nil {
			return err
		}
		if time.Since(began) <= allowed {
			return m.change(ctx)
		}
		if !m.ownsAll() || m.hold > 0 && time.Since(owned) > m.s.cfg.ResendWithin/2 {
			return errDisowned // or others have waited for long enough
		}
		if n > quickRounds {
			allowed *= 2
		}
	}
	return fmt.Errorf("it is written faster than it can be copied: try when it is written less: %w", ErrUnavailable)
}

// change moves the family, with nobody writing it.
func (m *mover) change(ctx context.Context) error {
	for _, c := range m.cores[len(m.locked):] {
		if err := c.admin.LockWithin(ctx); err != nil {
			return err
		}
		m.locked = append(m.locked, c)
	}
	// From here on it goes to its end: writes wait.
	ctx = context.WithoutCancel(ctx)
	began := time.Now()
	defer func() { m.pause = time.Since(began) }()
	for _, c := range m.cores {
		c.gate.pause()
		defer c.gate.resume()
	}
	if !m.ownsAll() {
		return errDisowned
	}
	before := make([]*mapping, len(m.cores))
	for i, c := range m.cores {
		before[i] = c.mapping.Load()
	}
	if err := m.again(ctx, true); err != nil {
		if m.changed(ctx) {
			return errDisowned // somebody else writes
		}
		return err
	}
	_, err := m.s.propose(ctx, catalog.Command{Moved: &catalog.Moved{Ref: m.x.Ref, By: m.s.self(), From: m.from, Members: m.members}})
	if err != nil {
		for i, c := range m.cores {
			c.doubt(before[i]) // it may be applied nevertheless
		}
		return m.outcome(ctx, err)
	}
	m.adopt(ctx, before)
	return nil
}

// outcome finds out whether a move was refused or only seems to have failed. When the copy is given up, it is not
// moved later; and not if who writes next does so under another generation.
func (m *mover) outcome(ctx context.Context, err error) error {
	if errors.Is(err, catalog.ErrStale) || errors.Is(err, catalog.ErrBusy) {
		return err
	}
	m.s.unreserve(ctx, m.x.Ref)
	x, ok := m.s.cfg.Catalog.Get(m.x.VID)
	switch {
	case slices.ContainsFunc(m.s.liveOf(m.family), func(v catalog.VDI) bool { return v.Policy == m.to }):
		return nil // it was carried out
	case ok && x.Ref == m.x.Ref && x.State == catalog.Reserved:
		for _, c := range m.cores {
			c.mu.Lock()
			c.unsure = true
			c.mu.Unlock()
		}
	}
	return err
}

// changed reports whether the family is not what it was any more.
func (m *mover) changed(ctx context.Context) bool {
	if m.s.catchUp(ctx) != nil {
		return false
	}
	left := len(m.members)
	for _, v := range m.s.cfg.Catalog.Family(m.family) {
		if !v.Move && !slices.Contains(m.members, catalog.Member{Ref: v.Ref, Generation: v.Generation}) {
			return true
		} else if !v.Move {
			left--
		}
	}
	return left != 0
}

// ownsAll reports whether this node still owns all VDIs as own has left them.
func (m *mover) ownsAll() bool {
	return !slices.ContainsFunc(m.cores, func(c *core) bool {
		now := c.mapping.Load()
		return now.generation.Load() == 0 || now.policy != m.from || !slices.Contains(m.members, catalog.Member{Ref: now.ref, Generation: now.under})
	})
}

// adopt goes on with the VDIs in their new policy, when nobody answers anything out of the former one any more. What
// cannot be told to others now, is by whoever writes next.
func (m *mover) adopt(ctx context.Context, before []*mapping) {
	var wg sync.WaitGroup
	for i, c := range m.cores {
		wg.Go(func() {
			v, ok := m.s.cfg.Catalog.Get(before[i].vid())
			if !ok || v.Ref != before[i].ref || v.Policy != m.to {
				c.doubt(before[i])
				return
			}
			if err := m.s.fence(ctx, v); err != nil {
				c.doubt(before[i])
				m.s.log.Info("moved volume may be read elsewhere as it was before, until it is written", "vdi", c.name, "error", err)
				return
			}
			m.s.taken.Store(v.Ref, v.Generation)
			c.adopt(&mapping{table: before[i].table, ref: v.Ref, policy: v.Policy, moves: v.Moves, under: v.Generation}, v, true)
		})
	}
	wg.Wait()
}

// moveWorkers is how many objects are copied at a time, movePiece how much of each.
const (
	moveWorkers = 8
	movePiece   = 256 << 10
)

// each calls do, which is bring or the like, with all that source names, several at a time. With exact, what does not
// become equal is an error.
func (m *mover) each(ctx context.Context, exact bool, do func(context.Context, object.ID, []byte) (equal bool, err error), source func(visit func(object.ID, int64) error) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	type item struct {
		id    object.ID
		bytes int64
	}
	work := make(chan item, moveWorkers)
	var done atomic.Int64
	var wg sync.WaitGroup
	for range moveWorkers {
		wg.Go(func() {
			buf := make([]byte, movePiece)
			for w := range work {
				if ctx.Err() != nil {
					continue
				}
				equal, err := do(ctx, w.id, buf)
				if err == nil && !equal {
					err = m.unequal(w.id, exact)
				}
				if err != nil {
					cancel(err)
				}
				done.Add(w.bytes)
			}
		})
	}
	err := source(func(id object.ID, bytes int64) error {
		select {
		case work <- item{id, bytes}:
		case <-ctx.Done():
		}
		if m.progress != nil && bytes > 0 {
			m.progress(min(done.Load(), m.total), m.total)
		}
		return context.Cause(ctx)
	})
	close(work)
	wg.Wait()
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return err
}

// unequal notes an object that is written while it is copied: it is looked at again. In the end that is an error.
func (m *mover) unequal(id object.ID, exact bool) error {
	if exact {
		return fmt.Errorf("object %s and its copy do not become equal: %w", id, ErrIO)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.differ = append(m.differ, id)
	return nil
}

// round looks at all objects of the family.
func (m *mover) round(ctx context.Context, first bool) error {
	err := m.each(ctx, false, m.bring, func(visit func(object.ID, int64) error) error {
		return m.s.cfg.Objects.List(ctx, m.from, func(i object.Info) error {
			if !m.vids[i.Key.ID.VID()] {
				return ctx.Err()
			}
			if !first {
				return visit(i.Key.ID, 0)
			}
			if err := m.keep(ctx); err != nil {
				return err
			}
			return visit(i.Key.ID, int64(i.Allocated))
		})
	})
	if err != nil {
		return err
	}
	return m.s.sync(ctx, m.to, m.x.VID)
}

// sweep removes copies of what is not there any more.
func (m *mover) sweep(ctx context.Context) error {
	return m.each(ctx, false, m.removeGone, func(visit func(object.ID, int64) error) error {
		return m.s.cfg.Objects.List(ctx, m.to, func(i object.Info) error {
			if !m.vids[i.Key.ID.VID()] {
				return ctx.Err()
			}
			return visit(i.Key.ID, 0)
		})
	})
}

func (m *mover) removeGone(ctx context.Context, id object.ID, buf []byte) (bool, error) {
	if _, err := m.s.cfg.Objects.Stat(ctx, m.from, id); !isMissing(err) {
		return true, err
	}
	return m.bring(ctx, id, buf)
}

// again looks at what was changed since the last time.
func (m *mover) again(ctx context.Context, exact bool) error {
	m.mu.Lock()
	list := m.differ
	m.differ = nil
	m.mu.Unlock()
	for _, c := range m.cores {
		list = append(list, c.tracker.Load().take(c.mapping.Load().vid())...)
	}
	if len(list) == 0 {
		return nil
	}
	err := m.each(ctx, exact, m.bring, func(visit func(object.ID, int64) error) error {
		for _, id := range list {
			if err := visit(id, 0); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return m.s.sync(ctx, m.to, m.x.VID)
}

// bringTries bounds how often an object is compared that changes meanwhile: then it will be looked at again. It is one more than what
// is needed where nobody writes any more, but what no map names may still be removed.
const bringTries = 3

// bring makes an object's copy what the object is, and reports whether their checksums say so. What is not there
// has no copy.
func (m *mover) bring(ctx context.Context, id object.ID, buf []byte) (equal bool, err error) {
	for range bringTries {
		a, err := m.s.cfg.Objects.Sums(ctx, m.from, id)
		gone := isMissing(err)
		if err != nil && !gone {
			return false, err
		}
		b, err := m.s.cfg.Objects.Sums(ctx, m.to, id)
		missing := isMissing(err)
		switch {
		case err != nil && !missing:
			return false, err
		case gone && missing:
			return true, nil
		case gone:
			err = m.s.cfg.Objects.Delete(ctx, object.DeleteRequest{Policy: m.to, ID: id, Volume: m.x.VID, Generation: m.x.Generation})
		case !missing && slices.Equal(a, b):
			return true, nil
		default:
			err = m.copyBlocks(ctx, id, a, b, buf)
		}
		if err != nil && !isMissing(err) { // it was removed meanwhile
			return false, err
		}
	}
	return false, nil
}

// copyBlocks copies those blocks of an object whose checksums differ from the copy's, which may be missing.
func (m *mover) copyBlocks(ctx context.Context, id object.ID, a, b []uint64, buf []byte) error {
	if b == nil {
		b = make([]uint64, len(a))
		if !slices.ContainsFunc(a, func(sum uint64) bool { return sum != 0 }) {
			return m.makeEmpty(ctx, id, buf[:object.BlockSize])
		}
	}
	for i := 0; i < len(a); {
		if i >= len(b) || a[i] == b[i] {
			i++
			continue
		}
		n := 1
		for i+n < min(len(a), len(b)) && a[i+n] != b[i+n] && (a[i+n] == 0) == (a[i] == 0) && (a[i] == 0 || (n+1)*object.BlockSize <= len(buf)) {
			n++
		}
		off, length := uint32(i)*object.BlockSize, uint32(n)*object.BlockSize
		var err error
		if a[i] == 0 {
			err = m.put(ctx, object.Request{Op: object.OpDiscard, ID: id, Off: off, Len: length})
		} else {
			err = m.copyRange(ctx, id, off, buf[:length])
		}
		if err != nil {
			return err
		}
		i += n
	}
	return nil
}

func (m *mover) copyRange(ctx context.Context, id object.ID, off uint32, buf []byte) error {
	r := object.Request{Op: object.OpRead, ID: id, Policy: m.from, SizeShift: m.shiftOf(id), Off: off, Len: uint32(len(buf)), Data: buf}
	if err := m.s.do(ctx, &r); err != nil {
		return err
	}
	m.copied.Add(int64(len(buf)))
	return m.put(ctx, object.Request{Op: object.OpWrite, ID: id, Off: off, Len: uint32(len(buf)), Data: buf})
}

// makeEmpty makes a copy without content: that it is there tells something.
func (m *mover) makeEmpty(ctx context.Context, id object.ID, block []byte) error {
	clear(block)
	if err := m.put(ctx, object.Request{Op: object.OpWrite, ID: id, Len: object.BlockSize, Data: block}); err != nil {
		return err
	}
	return m.put(ctx, object.Request{Op: object.OpDiscard, ID: id, Len: object.BlockSize})
}

// put changes a copy.
func (m *mover) put(ctx context.Context, r object.Request) error {
	r.Policy, r.SizeShift, r.Volume, r.Generation = m.to, m.shiftOf(r.ID), m.x.VID, m.x.Generation
	return m.s.do(ctx, &r)
}

func (m *mover) shiftOf(id object.ID) uint8 {
	if kind, _ := id.Kind(); kind == object.KindMap {
		return mapShift
	}
	return m.shift
}
