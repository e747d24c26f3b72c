package storage

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"sheepdog/storage/object"
)

// Store keeps objects on one or more disks. All methods may be called concurrently;
// none may be called after Close but Submit, which then fails requests with ErrClosed.
type Store struct {
	cfg    Config
	routes routes
	closed atomic.Bool
	idMu   sync.Mutex
	plugMu sync.Mutex // one change of the disks at a time
	mover  *mover

	marksMu   sync.Mutex            // of the files with marks
	abandoned map[object.Group]bool // since marks were kept last; guarded by marksMu
}

// maxDisks bounds the disks of a node.
const maxDisks = 255

// Open opens all disks and replays their logs. It fails if a disk cannot be
// identified, belongs to another node or cluster, or is in use, since then the objects
// on it would seem to be lost; and if no disk can be put into service. A disk that
// fails later on, its log included, is out of service while the others go on.
func Open(cfg Config) (*Store, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	if len(cfg.Disks) > maxDisks {
		return nil, fmt.Errorf("open store: %d disks, at most %d: %w", len(cfg.Disks), maxDisks, object.ErrInvalid)
	}
	s := &Store{cfg: cfg}
	s.mover = newMover(s)
	if err := s.open(); err != nil {
		for _, d := range s.routes.drives() {
			_ = d.abandon()
		}
		return nil, fmt.Errorf("open store: %w", err)
	}
	for _, d := range s.routes.drives() {
		if d.failed() == nil {
			d.start()
		}
	}
	s.mover.start()
	return s, nil
}

func (s *Store) open() error {
	ids := make(map[string]*drive)
	for _, fsys := range s.cfg.Disks {
		d, err := prepareDrive(&s.cfg, fsys, s.cfg.Logger)
		if err != nil {
			return err
		}
		s.routes.add(d)
		if other := ids[d.name]; other != nil {
			return refuse("disks %s and %s have the same identity: one is a copy of the other", other, d)
		}
		ids[d.name] = d
	}
	if err := s.sameCluster(); err != nil {
		return err
	}
	if err := s.welcomeFresh(); err != nil {
		return err
	}
	s.believeNotes(ids)
	var failure error
	working := 0
	drives := s.routes.drives()
	for _, i := range stayingFirst(drives) {
		d := drives[i]
		claim := func(g object.Group) error { return s.claim(g, i) }
		if d.retired.Load() { // what another disk has of its groups is newer: see Abandon
			claim = func(g object.Group) error { s.routes.claim(g, i); return nil }
		}
		for g := range d.groups {
			if d.notes.has(g) {
				continue
			}
			if err := claim(g); err != nil {
				return err
			}
		}
		var twice error
		err := d.recover(func(g object.Group) { twice = cmp.Or(twice, claim(g)) })
		if twice != nil {
			return twice
		}
		if err != nil {
			d.fail(err)
			failure = errors.Join(failure, fmt.Errorf("disk %s: %w", d, err))
			continue
		}
		working++
	}
	if working == 0 {
		return failure
	}
	s.tidy(ids)
	s.mergeFull()
	for _, d := range drives {
		if d.retired.Load() {
			s.cfg.Logger.Warn("a disk is among the node's disks that was to be taken out: what is on it gets another place, and nothing more comes; \"dog node md unplug\" takes it out", "disk", d.String(), "id", d.name)
		}
	}
	s.noteDisks()
	return nil
}

// mergeFull does a checkpoint of disks that have no more than the reserve beside what their logs may take. After that it
// is known what they take, and no write is refused that would not have been before the restart.
func (s *Store) mergeFull() {
	for _, d := range s.routes.drives() {
		if d.failed() != nil || !d.space.short() {
			continue
		}
		if err := d.checkpoint(); err != nil && d.failed() == nil {
			d.logger.Warn("what the log has cannot be merged yet", "disk", d.String(), "error", err)
		}
	}
}

// welcomeFresh has disks that are new among others take their share.
func (s *Store) welcomeFresh() error {
	drives := s.routes.drives()
	if !slices.ContainsFunc(drives, func(d *drive) bool { return !d.fresh }) {
		return nil
	}
	for _, d := range drives {
		if !d.fresh {
			continue
		}
		id := *d.id
		id.Filling = true
		if err := d.become(id); err != nil {
			return err
		}
		d.filling.Store(true)
	}
	return nil
}

// stayingFirst returns the numbers of disks, those that are to be taken out at the end.
func stayingFirst(drives []*drive) []int {
	list := make([]int, len(drives))
	for i := range list {
		list[i] = i
	}
	leaves := func(i int) int {
		if drives[i].retired.Load() {
			return 1
		}
		return 0
	}
	slices.SortStableFunc(list, func(a, b int) int { return leaves(a) - leaves(b) })
	return list
}

// claim records where a group lives. Two disks have the same group if one of them was
// away while the store went on without it: then its content is old, and which of the
// two it was only the operator knows.
func (s *Store) claim(g object.Group, i int) error {
	if at := s.routes.claim(g, i); at != i {
		slots := s.routes.lineup.Load().slots
		return fmt.Errorf("disks %s and %s both have objects of group %s: what one of them holds is old, for it was left out while the other took its place: take that one out of node.disks, start the node, and bring it back with \"dog node md plug --empty\": %w",
			slots[at], slots[i], g, object.ErrInvalid)
	}
	return nil
}

// noteDisks writes onto every disk which others there are, and complains about those
// that were there the last time.
func (s *Store) noteDisks() {
	var ids []string
	for _, d := range s.routes.drives() {
		ids = append(ids, d.name)
	}
	slices.Sort(ids)
	missing := make(map[string]bool)
	for _, d := range s.routes.drives() {
		if d.failed() != nil || slices.Equal(d.id.Disks, ids) {
			continue
		}
		for _, id := range d.id.Disks {
			if !slices.Contains(ids, id) {
				missing[id] = true
			}
		}
		d.id.Disks = ids
		if err := writeIdentity(d.fs, d.id); err != nil {
			d.logger.Warn("the list of disks is not up to date", "disk", d.String(), "error", err)
		}
	}
	for id := range missing {
		s.cfg.Logger.Warn("a disk is missing that this node had: what it holds cannot be read, and new data takes its place elsewhere; to have it back, stop now and put it into node.disks again", "id", id)
	}
}

func (s *Store) sameCluster() error {
	cluster := ""
	for _, d := range s.routes.drives() {
		if d.id.Cluster == "" {
			continue
		}
		if cluster != "" && cluster != d.id.Cluster {
			return refuse("disks belong to different clusters, %s and %s", cluster, d.id.Cluster)
		}
		cluster = d.id.Cluster
	}
	return nil
}

// Cluster is the id of the cluster that the disks belong to; "" before SetIdentity.
func (s *Store) Cluster() string {
	s.idMu.Lock()
	defer s.idMu.Unlock()
	for _, d := range s.routes.drives() {
		if d.id.Cluster != "" {
			return d.id.Cluster
		}
	}
	return ""
}

// SetIdentity durably makes the disks part of a cluster and node. It fails with
// ErrInvalid if they belong to others.
func (s *Store) SetIdentity(cluster, node string) error {
	s.idMu.Lock()
	defer s.idMu.Unlock()
	for _, d := range s.routes.drives() {
		id := *d.id
		changed, err := id.adopt(d.fs, node, cluster)
		if err == nil && changed {
			err = d.become(id)
		}
		if err != nil {
			return fmt.Errorf("set identity: %w", err)
		}
	}
	return nil
}

// Close carries out what was submitted, syncs, and leaves every disk with an empty log.
func (s *Store) Close() error {
	if s.closed.Swap(true) {
		return nil
	}
	s.mover.close()
	s.plugMu.Lock() // a disk that is being added is there, or never will be
	defer s.plugMu.Unlock()
	var err error
	for _, d := range s.routes.drives() {
		if e := d.close(); e != nil {
			err = errors.Join(err, fmt.Errorf("close disk %s: %w", d, e))
		}
	}
	return err
}

// Submit starts an operation. It never waits for a disk: reads of what is in memory
// complete at once, writes with the next Kick, FUA and OpSync when durable, and what
// must wait does so on a bounded pool of goroutines. OpSync covers all disks, whatever
// its key. See object.Request for who owns what until when.
func (s *Store) Submit(r *object.Request) {
	if s.closed.Load() {
		r.Complete(object.ErrClosed)
		return
	}
	if r.Op == object.OpSync {
		s.sync(r)
		return
	}
	if err := check(r); err != nil || r.Len == 0 {
		r.Complete(err)
		return
	}
	s.routes.find(object.Group{Policy: r.Policy, Partition: r.Partition}).submit(r)
}

// Kick writes what was held back since the last one.
func (s *Store) Kick() {
	for _, d := range s.routes.drives() {
		d.kick()
	}
}

// check refuses requests that are not well formed.
func check(r *object.Request) error {
	switch {
	case r.SizeShift < object.MinSizeShift || r.SizeShift > object.MaxSizeShift:
		return fmt.Errorf("object size shift of %d: %w", r.SizeShift, object.ErrInvalid)
	case uint64(r.Off)+uint64(r.Len) > 1<<r.SizeShift:
		return fmt.Errorf("range %d+%d is past the object's end: %w", r.Off, r.Len, object.ErrInvalid)
	case r.Op > object.OpSync:
		return fmt.Errorf("operation %d: %w", r.Op, object.ErrInvalid)
	case r.Op <= object.OpWrite && len(r.Data) != int(r.Len):
		return fmt.Errorf("%d bytes of data for a length of %d: %w", len(r.Data), r.Len, object.ErrInvalid)
	}
	return nil
}

// sync spreads an OpSync over the disks.
func (s *Store) sync(r *object.Request) {
	drives := s.routes.drives()
	if r.Flags&object.FlagWorking != 0 {
		drives = slices.DeleteFunc(slices.Clone(drives), func(d *drive) bool { return d.failed() != nil })
	}
	if len(drives) == 0 {
		r.Complete(nil)
		return
	}
	if len(drives) == 1 {
		drives[0].sync(r)
		return
	}
	f := &fan{r: r, parts: make([]object.Request, len(drives))}
	f.left.Store(int32(len(drives)))
	for i, d := range drives {
		f.parts[i] = object.Request{Op: object.OpSync, Done: f.done}
		d.sync(&f.parts[i])
	}
}

// fan gathers the outcomes of one sync on several disks.
type fan struct {
	r     *object.Request
	parts []object.Request
	left  atomic.Int32
	err   atomic.Pointer[error]
}

func (f *fan) done(part *object.Request) {
	if part.Err != nil {
		f.err.CompareAndSwap(nil, &part.Err)
	}
	if f.left.Add(-1) > 0 {
		return
	}
	if p := f.err.Load(); p != nil {
		f.r.Complete(*p)
		return
	}
	f.r.Complete(nil)
}

// Checkpoint empties the logs of all disks into object files. It is done by itself
// when due; tests and tools may want it at once.
func (s *Store) Checkpoint(ctx context.Context) error {
	for _, d := range s.routes.drives() {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := d.failed(); err != nil {
			return err
		}
		d.kick()
		d.upkeep.checkpointMu.Lock()
		err := d.checkpoint()
		d.upkeep.checkpointMu.Unlock()
		if err != nil {
			return err
		}
		d.upkeep.wake()
	}
	return nil
}
