package vdi

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"sheepdog/storage/object"
	"sheepdog/vdi/catalog"
)

// Service has the volumes of a node. Its methods may be called from any goroutine.
type Service struct {
	cfg Config
	log *slog.Logger

	mu       sync.Mutex
	working  map[string]*core        // by name
	snapshot map[object.VID]*core    // by vid
	deleting map[catalog.Ref]bool    // not to be opened any more
	usage    map[catalog.Ref]counted // see usage.go
	closed   bool

	makingMu longLock
	making   map[catalog.Ref]bool // reserved by calls under way

	owned sync.Map // object.VID: the *mapping under which this node owns it, for noticed
	taken sync.Map // catalog.Ref: the generation under which it was taken over in full
	// fenced are snapshots and deleted VDIs, by catalog.Ref: the generation by which nobody uses them as a VDI any more.
	fenced sync.Map

	tasks   sync.WaitGroup // see background
	woken   chan struct{}  // tidying is to be done
	garbage chan struct{}  // the catalog has changed
	gc      collector
	fresh   freshener
}

// NewService makes the volumes' service of a node. It does nothing by itself before Run.
func NewService(cfg Config) (*Service, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	s := &Service{
		cfg: cfg, log: cfg.Logger, working: map[string]*core{}, snapshot: map[object.VID]*core{},
		deleting: map[catalog.Ref]bool{}, making: map[catalog.Ref]bool{}, usage: map[catalog.Ref]counted{},
		woken: make(chan struct{}, 1), garbage: make(chan struct{}, 1),
	}
	cfg.Catalog.OnChange(func() { poke(s.garbage) })
	cfg.Catalog.OnPut(s.noticed)
	return s, nil
}

func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

func (s *Service) wake() { poke(s.woken) }

// tidyEvery is how often volumes are looked at without being asked to.
const tidyEvery = 2 * time.Second

// Run collects garbage and settles maps until ctx ends.
func (s *Service) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	wg.Go(func() { s.collectAll(ctx) })
	wg.Go(func() { s.sweepAll(ctx) })
	wg.Go(func() { s.tidyAll(ctx) })
	wg.Wait()
	return nil
}

func (s *Service) tidyAll(ctx context.Context) {
	t := time.NewTicker(tidyEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.woken:
		case <-t.C:
		}
		s.each(func(c *core) {
			if err := c.tidy(ctx, s.unused(c)); err != nil && ctx.Err() == nil {
				s.log.Warn("map of volume is not settled yet", "vdi", c.name, "error", err)
			}
		})
	}
}

// each does something to all VDIs that are open or have work left. They are kept until then: else one might be forgotten and
// opened anew meanwhile, and two would write its map.
func (s *Service) each(do func(*core)) {
	s.mu.Lock()
	list := make([]*core, 0, len(s.working))
	for _, c := range s.working {
		c.users++
		list = append(list, c)
	}
	s.mu.Unlock()
	for _, c := range list {
		do(c)
		s.release(c)
	}
}

// unused reports whether nobody uses a VDI but the caller, who keeps it.
func (s *Service) unused(c *core) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(c.handles) == 0 && c.users == 1
}

// dropUnused forgets a volume that nobody has open and that needs nothing. The caller
// holds mu.
func (s *Service) dropUnused(c *core) {
	if len(c.handles) > 0 || c.users > 0 || !c.idle() || c.owes() {
		return
	}
	if c.snapshot {
		if vid := c.mapping.Load().vid(); s.snapshot[vid] == c {
			delete(s.snapshot, vid)
		}
		return
	}
	if s.working[c.name] == c {
		delete(s.working, c.name)
	}
	s.owned.CompareAndDelete(c.mapping.Load().vid(), c.mapping.Load())
	if c.changed.Load() {
		delete(s.usage, c.mapping.Load().ref)
		s.endAccount(c.mapping.Load())
	}
}

// endAccount has the node forget who holds what this one has changed of a VDI and not flushed, if that was deleted: nobody flushes it any more.
func (s *Service) endAccount(m *mapping) {
	if v, ok := s.cfg.Catalog.Get(m.vid()); ok && v.State == catalog.Live {
		return
	}
	s.cfg.Objects.Submit(&object.Request{Op: object.OpSync, Policy: m.policy, Volume: m.vid(), Done: func(*object.Request) {}})
	s.cfg.Objects.Kick()
}

// closeTimeout bounds what Close does for all volumes together.
const closeTimeout = 30 * time.Second

// Close flushes and closes every volume. Run has returned, and no request is in flight.
func (s *Service) Close() error {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.tasks.Wait()
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	var errs []error
	s.each(func(c *core) {
		if err := c.tidy(ctx, true); err != nil {
			errs = append(errs, explain(err, "close volume %s", c.title()))
		}
	})
	return errors.Join(errs...)
}

// propose has the catalog carry out a command.
func (s *Service) propose(ctx context.Context, c catalog.Command) (catalog.Result, error) {
	b, err := s.cfg.Log.Propose(ctx, Machine, c.Encode())
	if err != nil {
		return catalog.Result{}, err
	}
	return catalog.DecodeResult(b)
}

func (s *Service) self() catalog.Node {
	return catalog.Node{Name: s.cfg.Node, Incarnation: s.cfg.Incarnation()}
}

func (s *Service) now() time.Time { return s.cfg.Now().UTC().Truncate(time.Millisecond) }

func newIdentity() string {
	var b [16]byte
	rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// Open opens the VDI name (tag "") or a snapshot of it, by its tag or its number, which
// is read-only. It fails with ErrNotFound, ErrBusy while it is being deleted, ErrClosed.
func (s *Service) Open(ctx context.Context, name, tag string, o OpenOptions) (*Volume, error) {
	c, err := s.acquire(ctx, name, tag)
	if err != nil {
		return nil, explain(err, "open volume")
	}
	v := &Volume{core: c, size: c.size.Load(), readOnly: o.ReadOnly || c.snapshot, client: o.Client, vid: c.mapping.Load().vid()}
	v.told.Store(c.told.Load())
	s.mu.Lock()
	c.handles[v] = struct{}{}
	c.users--
	s.mu.Unlock()
	return v, nil
}

// acquire returns a volume's core, to be given back by release.
func (s *Service) acquire(ctx context.Context, name, tag string) (*core, error) {
	if _, err := s.find(ctx, name, tag); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	v, err := s.cfg.Catalog.Find(name, tag)
	switch {
	case err != nil:
		return nil, err
	case s.closed:
		return nil, fmt.Errorf("the node is stopping: %w", ErrClosed)
	case s.deleting[v.Ref]:
		return nil, fmt.Errorf("%q is being deleted: %w", name, ErrBusy)
	}
	c := s.working[name]
	if tag != "" {
		c = s.snapshot[v.VID]
	}
	if c == nil || c.family != v.Family || c.snapshot && c.mapping.Load().ref != v.Ref { // a former one may be open still
		c = newCore(s, v)
		if v.Snapshot {
			s.snapshot[v.VID] = c
		} else {
			s.working[name] = c
		}
	}
	if !c.snapshot {
		c.renewSize() // its owner may have changed it
	}
	c.users++
	return c, nil
}

// background calls fn, on a goroutine that Close waits for, with c kept.
func (s *Service) background(c *core, fn func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	c.users++
	s.tasks.Go(func() {
		defer s.release(c)
		fn()
	})
}

func (s *Service) release(c *core) {
	s.mu.Lock()
	c.users--
	s.dropUnused(c)
	s.mu.Unlock()
}

// maxOpeners bounds who is listed in messages and Info.
const maxOpeners = 8

// openers lists who has a volume open. The caller holds mu.
func (c *core) openers() []string {
	var list []string
	for v := range c.handles {
		list = append(list, v.client)
	}
	slices.Sort(list)
	return list[:min(len(list), maxOpeners)]
}
