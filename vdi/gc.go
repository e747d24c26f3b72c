package vdi

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"sheepdog/storage/object"
	"sheepdog/vdi/catalog"
)

// collector removes objects that nobody needs any more.
//
// The object (vid, index) is needed while the map of some live VDI or snapshot has vid
// at index. Only its own volume ever enters a vid into a map; all other maps have it by
// copying a map of the family that has it. So once no live map of the family has it at
// index, none will ever again, and what is found unneeded stays so.
//
// One node collects, but two may believe to be that one, each may be behind with the
// catalog, and each may stop anywhere and go on much later. So
//   - a deleted vid is fenced before its map is read: nobody writes it any more;
//   - the maps that were looked at must be live still after they were looked at, by a
//     catalog that is up to date: else another collector may have emptied one of them
//     already, and a copy of it, which names the object, may be unknown here;
//   - what is removed is removed under the generation that its vid had when that was
//     decided: if the vid is used anew meanwhile, the removal is refused.
type collector struct {
	deleted   atomic.Int64
	leftovers atomic.Int64
	sweeping  atomic.Bool
	one       longLock // collects at a time on this node

	unreached map[object.PolicyID]bool // when it collected last; of who holds one
	tried     atomic.Int64             // objects that attempts which failed have got to

	mu                       sync.Mutex
	lastSweep                time.Time
	collectError, sweepError string // of the last time; "" none

	paceMu sync.Mutex
	next   time.Time // before which no object is removed
}

// pace waits so that at most rate objects are removed in a second.
func (g *collector) pace(ctx context.Context, rate int) error {
	g.paceMu.Lock()
	now := time.Now()
	g.next = g.next.Add(time.Second / time.Duration(rate))
	if g.next.Before(now.Add(-paceBurst)) {
		g.next = now.Add(-paceBurst)
	}
	wait := g.next.Sub(now)
	g.paceMu.Unlock()
	if wait <= 0 {
		return ctx.Err()
	}
	return sleep(ctx, wait)
}

// sleep waits; it fails if ctx ends before.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

// paceBurst is how much unused time of pace may be made up for.
const paceBurst = 100 * time.Millisecond

// GC tells about the collection of garbage.
func (s *Service) GC() GCStatus {
	st := GCStatus{Deleted: s.gc.deleted.Load(), Leftovers: s.gc.leftovers.Load(), Sweeping: s.gc.sweeping.Load()}
	for _, v := range s.cfg.Catalog.InState(catalog.Deleted) {
		if !v.MapGone { // also of those that were moved
			st.Pending++
		}
	}
	s.gc.mu.Lock()
	defer s.gc.mu.Unlock()
	st.LastSweep, st.LastError = s.gc.lastSweep, cmp.Or(s.gc.collectError, s.gc.sweepError)
	return st
}

// collectRetry is how long the collector waits after a failure.
const collectRetry = 5 * time.Second

// collectAll collects whenever the catalog has changed.
func (s *Service) collectAll(ctx context.Context) {
	for ctx.Err() == nil {
		err := s.cancelForgotten(ctx)
		formatted, leading := s.cfg.DefaultPolicy() != 0, s.leading()
		if err == nil && leading {
			err = s.collect(ctx)
		}
		s.failed(ctx, &s.gc.collectError, err, "garbage is not collected yet")
		wait := s.cfg.SweepEvery
		if err != nil || !formatted || !leading {
			wait = collectRetry
		}
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-s.garbage:
		case <-t.C:
		}
		t.Stop()
	}
}

// failed notes how the background's work has gone.
func (s *Service) failed(ctx context.Context, noted *string, err error, text string) {
	s.gc.mu.Lock()
	*noted = ""
	if err != nil {
		*noted = err.Error()
	}
	s.gc.mu.Unlock()
	if err != nil && ctx.Err() == nil && !errors.Is(err, object.ErrUnavailable) {
		s.log.Warn(text, "error", err)
	}
}

// tries are attempts at what has nothing to do with each other: one that fails keeps nobody from the next. To find out that a
// policy is not reachable takes long, so nothing more is tried there.
type tries struct {
	unreached map[object.PolicyID]bool
	err       error
}

func (t *tries) try(ctx context.Context, policy object.PolicyID, do func() error) {
	if t.unreached[policy] || ctx.Err() != nil {
		t.err = cmp.Or(t.err, ctx.Err())
		return
	}
	err := do()
	if err == nil {
		return
	}
	passing := errors.Is(err, object.ErrUnavailable)
	if passing && !errors.Is(err, errChanged) && !errors.Is(err, errRemoving) {
		t.unreached[policy] = true
	}
	if t.err == nil || !passing && errors.Is(t.err, object.ErrUnavailable) { // that will not pass by itself
		t.err = err
	}
}

// collect frees what deleted VDIs and snapshots leave. It may be given up anywhere and
// begun anew: objects go first, then maps, then the vids. What is in policies that were not reachable
// the last time comes after all else.
func (s *Service) collect(ctx context.Context) error {
	if err := s.gc.one.LockWithin(ctx); err != nil {
		return err
	}
	defer s.gc.one.Unlock()
	t := tries{unreached: map[object.PolicyID]bool{}}
	for _, late := range []bool{false, true} {
		s.collectIn(ctx, &t, func(p object.PolicyID) bool { return s.gc.unreached[p] == late })
	}
	s.gc.unreached = t.unreached
	return t.err
}

// collectIn is collect in some policies.
func (s *Service) collectIn(ctx context.Context, t *tries, in func(object.PolicyID) bool) {
	for _, v := range s.cfg.Catalog.InState(catalog.Deleted) {
		if v.Move && in(v.Policy) {
			t.try(ctx, v.Policy, func() error {
				return explain(s.removeCopy(ctx, v), "remove what %q had in policy %d", v.Name, v.Policy)
			})
		}
	}
	families := map[uint64]bool{} // that were collected, or are being moved
	for _, v := range slices.Concat(s.cfg.Catalog.InState(catalog.Reserved), s.cfg.Catalog.InState(catalog.Deleted)) {
		families[v.Family] = families[v.Family] || v.Move
	}
	for _, v := range s.cfg.Catalog.InState(catalog.Deleted) {
		if !v.MapGone && !families[v.Family] && in(v.Policy) {
			families[v.Family] = true
			t.try(ctx, v.Policy, func() error {
				return explain(s.collectOften(ctx, v.Family), "collect the garbage of %q", v.Name)
			})
		}
	}
}

// collectAttempts bounds how often collecting a family begins anew because its volumes changed.
const collectAttempts = 5

func (s *Service) collectOften(ctx context.Context, family uint64) (err error) {
	for range collectAttempts {
		if err = s.collectFamily(ctx, family); !errors.Is(err, errChanged) {
			break
		}
	}
	return err
}

// errChanged says that what was looked at is not what there is any more.
var errChanged = fmt.Errorf("volumes were deleted or moved meanwhile: %w", object.ErrUnavailable)

// forgotten is after how long a reservation of another node, which may be gone, is given up.
const forgotten = 24 * time.Hour

// cancelForgotten gives up what this node reserved in calls that are over, and what others
// forgot. Who nevertheless still makes a map there is refused in the end.
func (s *Service) cancelForgotten(ctx context.Context) error {
	me := s.self()
	s.makingMu.Lock()
	defer s.makingMu.Unlock()
	for _, v := range s.cfg.Catalog.InState(catalog.Reserved) {
		mine := v.By != nil && v.By.Name == me.Name
		if s.making[v.Ref] || !mine && (!s.leading() || s.now().Sub(v.Created) < forgotten && s.mayBeUp(v.By)) {
			continue
		}
		if _, err := s.propose(ctx, catalog.Command{Cancel: &catalog.Cancel{Ref: v.Ref}}); err != nil {
			return explain(err, "give up reserved VDI %s", v.VID)
		}
	}
	return nil
}

// member is a map of a family, read piece by piece.
type member struct {
	catalog.VDI
	entries []byte
	empty   bool // the piece has no map object
}

func (m *member) owner(i int) object.VID {
	if m.empty {
		return 0
	}
	return object.VID(binary.LittleEndian.Uint32(m.entries[4*i:]) & ownerMask)
}

// noteOwners adds the vids in the piece to used.
func (m *member) noteOwners(used map[object.VID]bool) {
	last := object.VID(0)
	for i := range len(m.entries) / 4 {
		if o := m.owner(i); o != last { // mostly they come in runs
			used[o], last = true, o
		}
	}
}

// family splits the maps of a family into the live ones and those to be collected. held
// are the deleted vids that were collected as far as others do not need their objects.
func (s *Service) family(id uint64) (live, dead []*member, held []catalog.Ref) {
	for _, v := range s.cfg.Catalog.Family(id) {
		switch {
		case v.Move: // its objects are others'
		case v.State == catalog.Live:
			live = append(live, &member{VDI: v})
		case v.State == catalog.Deleted && v.MapGone:
			held = append(held, v.Ref)
		case v.State == catalog.Deleted:
			dead = append(dead, &member{VDI: v})
		}
	}
	return live, dead, held
}

// collectMemory bounds what the pieces of maps that are looked at together take, in bytes.
const collectMemory = 16 << 20

func (s *Service) collectFamily(ctx context.Context, id uint64) error {
	generations := map[object.VID]uint64{}
	for _, v := range s.cfg.Catalog.Family(id) {
		if v.Snapshot || v.State != catalog.Live { // others have their objects to themselves
			generations[v.VID] = v.Generation
		}
	}
	live, dead, held := s.family(id)
	since := s.lostIn(policyOf(live, dead))
	for _, d := range dead {
		if err := s.fence(ctx, d.VDI); err != nil {
			return err
		}
	}
	piece := walkPiece // a power of two: no piece crosses the end of a map object
	for piece > object.BlockSize && piece*(len(live)+len(dead)) > collectMemory {
		piece /= 2
	}
	pages := pagesOf(live, dead)
	used := map[object.VID]bool{}
	for number := uint32(0); number < pages; number += uint32(piece / object.BlockSize) {
		if number%pagesPerObject == 0 {
			exists, err := s.anyMap(ctx, number/pagesPerObject, live, dead)
			if err != nil {
				return err
			}
			if !exists {
				number += pagesPerObject - uint32(piece/object.BlockSize)
				continue
			}
		}
		if err := s.collectPiece(ctx, number, piece, live, dead, since, generations, used); err != nil {
			return err
		}
	}
	return s.collected(ctx, live, dead, held, since, used)
}

// pagesOf is how many pages the longest of the maps has.
func pagesOf(lists ...[]*member) (pages uint32) {
	for _, list := range lists {
		for _, m := range list {
			pages = max(pages, uint32((m.MaxObjects()+pageEntries-1)/pageEntries))
		}
	}
	return pages
}

// anyMap reports whether some member has the map object.
func (s *Service) anyMap(ctx context.Context, n uint32, lists ...[]*member) (bool, error) {
	for _, list := range lists {
		for _, m := range list {
			_, err := s.cfg.Objects.Stat(ctx, m.Policy, object.NewID(object.KindMap, m.VID, n))
			if isMissing(err) {
				if moved := s.unmoved(ctx, placeOf(m.VDI)); moved != nil {
					return false, moved
				}
			}
			if err == nil || !isMissing(err) {
				return true, err
			}
		}
	}
	return false, nil
}

// collectPiece removes the objects that only dead maps have in their piece from page
// number on, and notes the vids that live ones use.
func (s *Service) collectPiece(ctx context.Context, number uint32, piece int, live, dead []*member, since uint64, generations map[object.VID]uint64, used map[object.VID]bool) error {
	for _, list := range [][]*member{live, dead} {
		for _, m := range list {
			if m.entries == nil {
				m.entries = make([]byte, piece)
			}
			err := s.readMap(ctx, m.VDI, number, m.entries)
			if m.empty = err != nil; m.empty && !isMissing(err) {
				return err
			}
		}
	}
	for _, m := range live {
		m.noteOwners(used)
	}
	d := doomed{policy: policyOf(live, dead), since: since}
	for _, m := range dead {
		for i := range piece / 4 {
			// Objects of a vid that is not in the family any more are gone; if it is used anew they are another's.
			o := m.owner(i)
			if g, known := generations[o]; known && !anyOwner(live, i, o) {
				d.add(object.DataID(o, number*pageEntries+uint32(i)), g)
			}
		}
	}
	for _, m := range live {
		d.looked(m.VDI)
	}
	return s.removeObjects(ctx, &d)
}

// doomed are objects that no live map names.
type doomed struct {
	policy object.PolicyID
	since  uint64 // of Config.Lost, before maps were looked at
	list   []object.DeleteRequest
	live   map[place]bool // the maps that were looked at
}

// doom begins a list for who looks at maps now.
func (s *Service) doom(policy object.PolicyID) doomed {
	return doomed{policy: policy, since: s.lostIn(policy)}
}

func (s *Service) lostIn(policy object.PolicyID) uint64 {
	if s.cfg.Lost == nil {
		return 0
	}
	return s.cfg.Lost(policy)
}

// syncSince is syncAll that also covers what was read and removed since lostIn was asked: it fails with errChanged if a power cut
// may have undone some of that before the sync began.
func (s *Service) syncSince(ctx context.Context, policy object.PolicyID, since uint64) error {
	if err := s.syncAll(ctx, policy); err != nil {
		return err
	}
	if s.lostIn(policy) != since {
		return fmt.Errorf("what was read may be lost: %w", errChanged)
	}
	return nil
}

// add notes an object whose vid has that generation.
func (d *doomed) add(id object.ID, generation uint64) {
	d.list = append(d.list, object.DeleteRequest{Policy: d.policy, ID: id, Volume: id.VID(), Generation: generation})
}

func (d *doomed) looked(list ...catalog.VDI) {
	for _, v := range list {
		if d.live == nil {
			d.live = map[place]bool{}
		}
		d.live[placeOf(v)] = true
	}
}

func policyOf(lists ...[]*member) object.PolicyID {
	for _, list := range lists {
		for _, m := range list {
			return m.Policy // a family has one
		}
	}
	return 0
}

// removeObjects removes objects that no stored map has. What was read from the maps is
// made durable before: else a power cut could bring back an entry whose object is gone.
// It fails with errChanged if some map that was looked at may have been emptied by then.
//
// When an object cannot be removed, the next attempt begins behind it: its partition may wait for a node that comes back to a
// full disk, and that one for the space that the others have.
func (s *Service) removeObjects(ctx context.Context, d *doomed) error {
	if len(d.list) == 0 {
		return nil
	}
	if err := s.syncSince(ctx, d.policy, d.since); err != nil {
		return err
	}
	if err := s.areLive(ctx, maps.Keys(d.live)); err != nil {
		return err
	}
	first := int(s.gc.tried.Load() % int64(len(d.list)))
	for i := range d.list {
		if err := s.removeObject(ctx, d.list[(first+i)%len(d.list)]); err != nil {
			s.gc.tried.Add(int64(i) + 1)
			return err
		}
	}
	return nil
}

// areLive fails with errChanged unless all of these are VDIs or snapshots still, and where they were.
func (s *Service) areLive(ctx context.Context, list iter.Seq[place]) error {
	if err := s.catchUp(ctx); err != nil {
		return err
	}
	for p := range list {
		if v, ok := s.cfg.Catalog.Get(p.ref.VID); !ok || placeOf(v) != p || v.State != catalog.Live {
			return errChanged
		}
	}
	return nil
}

func (s *Service) stillLive(ctx context.Context, list []*member) error {
	return s.areLive(ctx, func(yield func(place) bool) {
		for _, m := range list {
			if !yield(placeOf(m.VDI)) {
				return
			}
		}
	})
}

func anyOwner(list []*member, i int, o object.VID) bool {
	for _, m := range list {
		if m.owner(i) == o {
			return true
		}
	}
	return false
}

// collected removes the maps of the dead, and frees the vids whose objects no live map
// uses. Each step is durable before the next: what is freed has nothing left.
func (s *Service) collected(ctx context.Context, live, dead []*member, held []catalog.Ref, since uint64, used map[object.VID]bool) error {
	if len(dead) == 0 {
		return nil
	}
	policy := dead[0].Policy
	if err := s.syncSince(ctx, policy, since); err != nil {
		return err
	}
	if err := s.stillLive(ctx, live); err != nil {
		return err // used may lack what a copy uses
	}
	var gone, free []catalog.Ref
	for _, d := range dead {
		if err := s.removeVMState(ctx, d.VDI); err != nil {
			return err
		}
		for n := range uint32(maxMapObjects) {
			r := object.DeleteRequest{Policy: d.Policy, ID: object.NewID(object.KindMap, d.VID, n), Volume: d.VID, Generation: d.Generation}
			if err := s.cfg.Objects.Delete(ctx, r); err != nil {
				return err
			}
		}
		if used[d.VID] {
			gone = append(gone, d.Ref)
		} else {
			free = append(free, d.Ref)
		}
	}
	if err := s.syncSince(ctx, policy, since); err != nil {
		return err
	}
	for _, r := range held {
		if !used[r.VID] {
			free = append(free, r)
		}
	}
	for list := range slices.Chunk(gone, collectBatch) {
		if _, err := s.propose(ctx, catalog.Command{MapGone: &catalog.MapGone{Refs: list}}); err != nil {
			return err
		}
	}
	return s.freeVIDs(ctx, free, 0)
}

// collectBatch is how many vids a command is about: while it is applied, nobody looks into the catalog. What is found to be
// used by nobody never is again, so it may be told in parts.
const collectBatch = 256

// freeVIDs frees deleted vids that have nothing left; the generation is that of a removal. Nobody flushes them
// any more: so they are here, or the node would remember for ever who holds what it removed. That what it removed since
// it looked is durable, the caller knows; what is lost otherwise was wanted by nobody.
func (s *Service) freeVIDs(ctx context.Context, list []catalog.Ref, removal uint64) error {
	for part := range slices.Chunk(list, collectBatch) {
		if err := s.syncEach(part); err != nil {
			return err
		}
		if _, err := s.propose(ctx, catalog.Command{Collected: &catalog.Collected{Refs: part, Keep: max(s.cfg.KeepVIDs, 0), Generation: removal}}); err != nil {
			return err
		}
	}
	return nil
}

// syncEach makes durable what this node has completed for each of these vids, but for what is lost.
func (s *Service) syncEach(list []catalog.Ref) (err error) {
	requests := make([]object.Request, len(list))
	var wg sync.WaitGroup
	wg.Add(len(list))
	for i, r := range list {
		v, _ := s.cfg.Catalog.Get(r.VID)
		requests[i] = object.Request{Op: object.OpSync, Policy: v.Policy, Volume: r.VID, Done: func(*object.Request) { wg.Done() }}
		s.cfg.Objects.Submit(&requests[i])
	}
	s.cfg.Objects.Kick()
	wg.Wait()
	for i := range requests {
		if e := requests[i].Err; !errors.Is(e, object.ErrLost) {
			err = cmp.Or(err, e)
		}
	}
	return err
}

// liveOf returns the VDIs and snapshots of a family.
func (s *Service) liveOf(family uint64) []catalog.VDI {
	return slices.DeleteFunc(s.cfg.Catalog.Family(family), func(v catalog.VDI) bool { return v.State != catalog.Live })
}

// referenced reports whether some of these maps has owner at index.
func (s *Service) referenced(ctx context.Context, live []catalog.VDI, owner object.VID, index uint32) (bool, error) {
	var b [4]byte
	for _, v := range live {
		err := s.doAt(ctx, entryRead(v, index, b[:]), placeOf(v))
		if err != nil && !isMissing(err) {
			return false, err
		}
		if err == nil && object.VID(binary.LittleEndian.Uint32(b[:])&ownerMask) == owner {
			return true, nil
		}
	}
	return false, nil
}

// Collect frees now what Run frees in the background: for tests and for who waits.
func (s *Service) Collect(ctx context.Context) error {
	var err error
	s.each(func(c *core) {
		if err == nil {
			err = explain(c.tidy(ctx, true), "settle the map of %s", c.title())
		}
	})
	if err != nil {
		return err
	}
	if err := s.cancelForgotten(ctx); err != nil {
		return err
	}
	return explain(s.collect(ctx), "collect garbage")
}
