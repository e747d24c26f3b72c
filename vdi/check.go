package vdi

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"

	"sheepdog/storage/object"
	"sheepdog/vdi/catalog"
)

const (
	// maxProblems bounds how many problems a CheckReport lists.
	maxProblems = 1000
	// checkWorkers is how many objects are read at a time, checkPiece how much of each.
	checkWorkers = 4
	checkPiece   = 256 << 10
	// maxForeign bounds the objects of others that are remembered as read already.
	maxForeign = 1 << 20
)

// checker carries out one Check.
type checker struct {
	CheckOptions
	s        *Service
	progress Progress
	done     int64
	total    int64
	own      map[object.VID]bool // whose maps are looked at: their objects are read with their own map
	foreign  map[object.ID]bool  // objects of others that were read

	mu     sync.Mutex
	report CheckReport
	failed error
}

// suspect is an object to be read.
type suspect struct {
	v       catalog.VDI
	core    *core
	index   uint32
	entry   uint32
	problem Problem // if there is one
}

// Check looks whether the maps of a VDI and of its snapshots and the objects fit
// together: every object that a map names is there and all of it can be read, each once,
// and no object is there that none names, also in policies that no volume has any more.
func (s *Service) Check(ctx context.Context, name string, o CheckOptions, p Progress) (CheckReport, error) {
	k := checker{
		s: s, CheckOptions: o, report: CheckReport{Name: name, Problems: []Problem{}}, progress: p,
		own: map[object.VID]bool{}, foreign: map[object.ID]bool{},
	}
	var list []catalog.VDI
	if v, err := s.cfg.Catalog.Find(name, ""); err == nil {
		list = append(list, v)
	}
	list = append(list, s.cfg.Catalog.Snapshots(name)...)
	if len(list) == 0 {
		return k.report, fmt.Errorf("check: there is no VDI %q: %w", name, ErrNotFound)
	}
	for _, v := range list {
		k.total += v.Objects()
		k.own[v.VID] = true
	}
	for _, v := range list {
		if err := k.whole(ctx, v); err != nil {
			return k.report, explain(err, "check %q", name)
		}
	}
	if err := k.leftovers(ctx, list); err != nil {
		return k.report, explain(err, "check %q", name)
	}
	return k.report, nil
}

func (k *checker) add(p Problem) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.report.Problems) < maxProblems {
		k.report.Problems = append(k.report.Problems, p)
	} else {
		k.report.More++
	}
	if p.Repaired {
		k.report.Repaired++
	}
}

func (k *checker) fail(err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.failed == nil {
		k.failed = err
	}
}

func (k *checker) err() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.failed
}

func (k *checker) tell(done int64) {
	if k.progress != nil {
		k.progress(min(done, k.total), k.total)
	}
}

// whole is volume, begun anew if the volume is moved meanwhile.
func (k *checker) whole(ctx context.Context, v catalog.VDI) error {
	for {
		before := k.report.Objects
		err := k.volume(ctx, v)
		now, ok := k.s.cfg.Catalog.Get(v.VID)
		if !errors.Is(err, errMoved) || !ok || now.Ref != v.Ref {
			return err
		}
		v, k.report.Objects = now, before
	}
}

// volume looks for the objects that one map names.
func (k *checker) volume(ctx context.Context, v catalog.VDI) error {
	tag := ""
	if v.Snapshot {
		tag = tagOf(v)
	}
	vol, err := k.s.Open(ctx, v.Name, tag, OpenOptions{ReadOnly: true, Client: "check"})
	if errors.Is(err, ErrNotFound) || errors.Is(err, ErrBusy) {
		return nil // deleted meanwhile
	}
	if err != nil {
		return err
	}
	defer vol.Close()
	work := make(chan suspect)
	var wg sync.WaitGroup
	for range checkWorkers {
		wg.Go(func() { k.readers(ctx, work) })
	}
	err = k.entries(ctx, v, vol.core, work)
	close(work)
	wg.Wait()
	k.done += v.Objects()
	k.tell(k.done)
	return errors.Join(err, k.err())
}

// entries sends what a map names to the readers.
func (k *checker) entries(ctx context.Context, v catalog.VDI, c *core, work chan<- suspect) error {
	family := map[object.VID]bool{}
	for _, w := range k.s.cfg.Catalog.Family(v.Family) {
		family[w.VID] = true
	}
	return k.s.walkMap(ctx, v, v.Objects(), func(first uint32, entries []byte) error {
		for i := 0; i < len(entries); i += 4 {
			e := binary.LittleEndian.Uint32(entries[i:])
			owner := object.VID(e & ownerMask)
			if owner == 0 {
				continue
			}
			x := suspect{v: v, core: c, index: first + uint32(i/4), entry: e}
			x.problem = k.problemAt(v, object.DataID(owner, x.index))
			k.report.Objects++
			switch {
			case !family[owner]:
				x.problem.Kind = ProblemUnowned
				x.problem.Text = fmt.Sprintf("the map names VDI %s, which has nothing to do with %q", owner, v.Name)
				k.add(x.problem)
			case owner == v.VID || k.firstOf(x.problem.Object):
				work <- x
			}
			if err := k.err(); err != nil {
				return err
			}
		}
		k.tell(k.done + int64(first) + int64(len(entries)/4))
		return ctx.Err()
	})
}

// firstOf reports whether an object that is another's shall be read: not if it is read
// with its owner's map, or was before.
func (k *checker) firstOf(id object.ID) bool {
	if k.own[id.VID()] || k.foreign[id] {
		return false
	}
	if len(k.foreign) < maxForeign {
		k.foreign[id] = true
	}
	return true
}

func (k *checker) problemAt(v catalog.VDI, id object.ID) Problem {
	p := Problem{Object: id, Off: int64(id.Index()) << v.SizeShift, Len: 1 << v.SizeShift}
	if v.Snapshot {
		p.Tag, p.Snapshot = v.Tag, v.SnapshotID
	}
	return p
}

func (k *checker) readers(ctx context.Context, work <-chan suspect) {
	buf := make([]byte, checkPiece)
	for x := range work {
		if k.err() != nil {
			continue
		}
		if err := k.look(ctx, x, buf); err != nil {
			k.fail(err)
		}
	}
}

// look reads an object.
func (k *checker) look(ctx context.Context, x suspect, buf []byte) error {
	_, err := k.s.statOf(ctx, &x.v, x.problem.Object) // where it is kept by now
	if err == nil {
		err = k.readAll(ctx, x, buf)
	}
	if isMissing(err) && errors.Is(k.s.unmoved(ctx, placeOf(x.v)), errMoved) {
		return k.look(ctx, x, buf)
	}
	switch {
	case err == nil:
		return nil
	case isMissing(err):
		_, now, err := x.core.lookUp(ctx, x.index)
		if err != nil || x.entry&unsettled != 0 || now&ownerMask != x.entry&ownerMask {
			return err // never flushed, or replaced meanwhile
		}
		x.problem.Kind = ProblemMissing
		x.problem.Text = fmt.Sprintf("object %s is missing: reads fail; restore the data from a backup, or write over it", x.problem.Object)
	case errors.Is(err, object.ErrCorrupt):
		x.problem.Kind = ProblemCorrupt
		x.problem.Text = fmt.Sprintf("object %s cannot be read (%v): restore the data from a backup, or write over it", x.problem.Object, err)
	default:
		return err
	}
	k.add(x.problem)
	return nil
}

func (k *checker) readAll(ctx context.Context, x suspect, buf []byte) error {
	id := x.problem.Object
	extents, err := k.s.cfg.Objects.Extents(ctx, x.v.Policy, id, 0, 1<<x.v.SizeShift)
	if err != nil {
		return err
	}
	for _, e := range extents {
		for off, end := e.Off, e.Off+e.Len; off < end && !e.Hole; {
			n := min(uint32(len(buf)), end-off)
			err := k.s.do(ctx, &object.Request{
				Op: object.OpRead, ID: id, Policy: x.v.Policy, SizeShift: x.v.SizeShift, Off: off, Len: n, Data: buf[:n],
			})
			if err != nil {
				return err
			}
			off += n
		}
	}
	return nil
}

// leftovers looks for objects of these VDIs that no map names.
func (k *checker) leftovers(ctx context.Context, list []catalog.VDI) error {
	mine := map[object.VID]catalog.VDI{}
	for _, v := range list {
		mine[v.VID] = v
	}
	for _, policy := range k.s.policies() {
		if slices.Contains(k.PassOver, policy) {
			continue
		}
		err := k.leftoversIn(ctx, policy, mine)
		if ctx.Err() == nil && errors.Is(err, object.ErrUnavailable) {
			// It need not have anything of these volumes, so the rest is looked at.
			k.report.Unsearched = append(k.report.Unsearched, Unsearched{policy, k.s.cfg.CopiesOf(policy), err.Error()})
			continue
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// leftoversIn is leftovers in one policy. In another one than the volume's an object is one too, whatever its kind.
func (k *checker) leftoversIn(ctx context.Context, policy object.PolicyID, mine map[object.VID]catalog.VDI) error {
	var ids []object.ID
	err := k.s.cfg.Objects.List(ctx, policy, func(i object.Info) error {
		id := i.Key.ID
		if v, ok := mine[id.VID()]; ok {
			if kind, known := id.Kind(); known && (kind == object.KindData || policy != v.Policy) {
				ids = append(ids, id)
			}
		}
		return ctx.Err()
	})
	if err != nil {
		return err
	}
	for _, id := range ids {
		left, err := k.s.leftover(ctx, policy, id, k.Repair)
		if errors.Is(err, errMoved) {
			continue // what was left is removed now
		}
		if err != nil {
			return err
		}
		if left {
			p := k.problemAt(mine[id.VID()], id)
			p.Kind, p.Repaired = ProblemLeftover, k.Repair
			p.Text = fmt.Sprintf("no map named object %s: a write left it that a crash or a snapshot cut off; it was removed", id)
			if !k.Repair {
				p.Text = fmt.Sprintf("no map names object %s: a write left it that a crash or a snapshot cut off; it only takes space, until the next sweep or a check with --repair removes it", id)
			}
			if v := mine[id.VID()]; policy != v.Policy {
				p.Text = fmt.Sprintf("object %s is also where the volume was kept, or was to be, with %d copies: it only takes space, until the next sweep or a check with --repair removes it", id, k.s.cfg.CopiesOf(policy))
			}
			k.add(p)
		}
	}
	return nil
}
