package iscsi

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"sheepdog/frontends/iscsi/internal/scsi"
	"sheepdog/vdi"
)

// unit is a logical unit as all sessions of this gateway see it.
type unit struct {
	server    *Server
	name, tag string
	target    string // its own, for people
	sessions  int    // that have it; guarded by Server.mu

	state atomic.Pointer[scsi.Unit]
	seen  atomic.Uint64 // Volumes.Changes that state and reserved are as of
	valid atomic.Bool   // they are as of anything

	mu       sync.Mutex
	members  map[*session]*attentions
	modes    scsi.Modes
	told     []scsi.Group // as the initiators know them
	paths    paths
	size     int64
	replaced uint64
	id       [8]byte
	revision uint64
	text     string
	reserved atomic.Pointer[scsi.Reservations]
	asking   map[string]int     // texts that changes through this gateway are about to store: who asked tells
	serial   uint64             // of the last event that was dealt with
	ending   map[*echo]struct{} // what is under way here because of other gateways' events
}

// maxAttentions bounds what an initiator is told: of more, what was first is the most.
const maxAttentions = 8

// attentions are unit attentions that an initiator was not told yet.
type attentions struct {
	pending atomic.Int32
	list    []scsi.Code // guarded by unit.mu
}

func newUnit(s *Server, d Disk) *unit {
	u := &unit{server: s, name: d.Name, tag: d.Tag, target: s.targetName(d.Name, d.Tag), members: map[*session]*attentions{},
		ending: map[*echo]struct{}{}, asking: map[string]int{}, size: d.Size, replaced: d.Replaced, id: d.ID}
	u.reserved.Store(new(scsi.Reservations))
	u.rebuild(d)
	u.told = u.view().Groups
	return u
}

// view is the unit's state now.
func (u *unit) view() *scsi.Unit { return u.state.Load() }

// rebuild makes the state anew. The caller holds mu, or is alone.
func (u *unit) rebuild(d Disk) {
	c := &u.server.cfg
	u.state.Store(&scsi.Unit{
		Blocks: uint64(d.Size) >> c.BlockShift, BlockShift: c.BlockShift, SmallPhysical: c.SmallPhysical, ReadOnly: d.ReadOnly, ID: d.ID, Group: u.server.group(),
		Groups: u.paths.show(groupsOf(c.Volumes.Paths(u.name, u.tag)), time.Now(), c.SettlePaths), Protected: u.modes.Protected, Descriptor: u.modes.Descriptor,
	})
}

// join makes a session one of the unit's, which is told that it is new.
func (u *unit) join(s *session, l *lun) {
	u.mu.Lock()
	l.news = new(attentions)
	u.members[s] = l.news
	u.tell(s, scsi.PowerOn)
	u.mu.Unlock()
}

// part ends what ends with a session.
func (u *unit) part(s *session) {
	u.mu.Lock()
	delete(u.members, s)
	u.mu.Unlock()
	u.forget(s)
}

// tell adds an attention. The caller holds mu.
func (u *unit) tell(s *session, c scsi.Code) {
	a := u.members[s]
	if a == nil || len(a.list) == maxAttentions {
		return
	}
	for _, have := range a.list {
		if have == c {
			return
		}
	}
	a.list = append(a.list, c)
	a.pending.Store(int32(len(a.list)))
}

// notify is tell for who does not hold mu.
func (u *unit) notify(s *session, c scsi.Code) {
	u.mu.Lock()
	u.tell(s, c)
	u.mu.Unlock()
}

// untell takes an attention back, if the session was not told yet.
func (u *unit) untell(l *lun, c scsi.Code) {
	u.mu.Lock()
	l.news.list = slices.DeleteFunc(l.news.list, func(have scsi.Code) bool { return have == c })
	l.news.pending.Store(int32(len(l.news.list)))
	u.mu.Unlock()
}

// tellOthers tells all but one session.
func (u *unit) tellOthers(but *session, c scsi.Code) {
	u.mu.Lock()
	for s := range u.members {
		if s != but {
			u.tell(s, c)
		}
	}
	u.mu.Unlock()
}

// attention takes the first attention of a session.
func (u *unit) attention(l *lun) (scsi.Code, bool) {
	u.refresh()
	a := l.news
	if a.pending.Load() == 0 {
		return scsi.Code{}, false
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if len(a.list) == 0 {
		return scsi.Code{}, false
	}
	c := a.list[0]
	a.list = append(a.list[:0], a.list[1:]...)
	a.pending.Store(int32(len(a.list)))
	return c, true
}

// refresh takes in what the catalog says, if it has changed.
func (u *unit) refresh() {
	now := u.server.cfg.Volumes.Changes()
	if u.valid.Load() && u.seen.Load() == now {
		return
	}
	u.update(now)
}

// update looks at the catalog, and tells the sessions what has changed.
func (u *unit) update(now uint64) {
	for _, e := range u.takeIn(now) {
		e.run()
	}
}

// takeIn is update, but for what other gateways have done that ends commands here.
func (u *unit) takeIn(now uint64) (echoes []*echo) {
	v := u.server.cfg.Volumes
	u.mu.Lock()
	defer u.mu.Unlock()
	d, err := v.Find(u.name, u.tag)
	if err != nil || d.ID != u.id {
		for s := range u.members {
			if s.group == "" { // a group goes on without it: see relist
				s.End(errGone)
			}
		}
		return nil
	}
	text, revision, err := v.Reservations(u.name, u.tag)
	if err == nil && revision != u.revision {
		echoes = u.adopt(text, revision)
	}
	if d.Replaced != u.replaced {
		u.replaced = d.Replaced
		for s := range u.members {
			u.tell(s, scsi.MediumChanged)
		}
	}
	if d.Size != u.size {
		u.size = d.Size
		for s := range u.members {
			u.tell(s, scsi.CapacityChanged)
		}
		u.reopen()
	}
	u.rebuild(d)
	u.seen.Store(now)
	u.valid.Store(true)
	return echoes
}

// paths are states of target port groups as initiators are shown them. Who owns a volume changes with each
// write while initiators write through two gateways in turn; they would only hear of what is not so any more, and a
// unit attention takes a command's place each time. So which one is optimized is shown when it has stayed so for a while.
type paths struct {
	shown, next []scsi.Group
	since       time.Time // next is so
}

// show takes in what is so now and gives what is shown.
func (p *paths) show(now []scsi.Group, at time.Time, settle time.Duration) []scsi.Group {
	if !sameGroups(p.next, now) {
		p.next, p.since = now, at
	}
	if !sameReach(p.shown, now) || at.Sub(p.since) >= settle {
		p.shown = now
	}
	return p.shown
}

// sameReach reports whether the same groups can be reached, whichever is the better one.
func sameReach(a, b []scsi.Group) bool {
	reach := func(g scsi.Group) scsi.Group {
		if g.State == scsi.ActiveNonOptimized {
			g.State = scsi.ActiveOptimized
		}
		return g
	}
	return slices.EqualFunc(a, b, func(x, y scsi.Group) bool { return reach(x) == reach(y) })
}

// settled shows what is so now at once: an initiator has asked for it.
func (u *unit) settled() {
	u.mu.Lock()
	u.paths = paths{}
	u.mu.Unlock()
	u.valid.Store(false)
	u.refresh()
}

// tellPaths tells of states of target port groups that have changed since they were last told
// of. Upkeep calls it.
func (u *unit) tellPaths() {
	u.mu.Lock()
	defer u.mu.Unlock()
	now := u.view().Groups
	if u.told != nil && !sameGroups(u.told, now) {
		for s := range u.members {
			u.tell(s, scsi.AccessStateChanged)
		}
	}
	u.told = now
}

func sameGroups(a, b []scsi.Group) bool { return slices.Equal(a, b) }

// reopen has the volume's layer take notice of a size that another gateway has changed.
func (u *unit) reopen() {
	v, err := u.server.cfg.Volumes.Open(context.Background(), u.name, u.tag, "iscsi: new size")
	if err == nil {
		err = v.Close()
	}
	if err != nil {
		u.server.log.Warn("new size of volume cannot be taken over", "target", u.target, "err", err)
	}
}

// adopt takes in reservations that somebody changed through another gateway, and tells the
// initiators here whom that concerns. The caller holds mu.
func (u *unit) adopt(text string, revision uint64) (echoes []*echo) {
	next, err := scsi.DecodeReservations(text)
	if err != nil {
		u.server.log.Error("reservations of a volume cannot be read", "target", u.target, "err", err)
		return nil
	}
	if u.revision != 0 || u.valid.Load() { // else it was before this gateway had the unit
		echoes = u.echoes(&next)
	}
	u.serial = next.Serial()
	before := u.reserved.Load()
	for s := range u.members {
		if c, ok := next.News(before, s.nexus); ok && u.asking[text] == 0 {
			u.tell(s, c)
		}
	}
	u.revision, u.text = revision, text
	u.reserved.Store(&next)
	return echoes
}

// conflicts reports whether reservations keep a nexus from a command.
func (u *unit) conflicts(n scsi.Nexus, p *scsi.Plan) bool {
	u.refresh()
	r := u.reserved.Load()
	if r.Legacy == nil {
		return r.Conflicts(n, p)
	}
	live := u.live(*r)
	return live.Conflicts(n, p)
}

// live is r without a reservation of the old kind whose session has ended, perhaps with its
// gateway: it ends with its session, also before the catalog says so.
func (u *unit) live(r scsi.Reservations) scsi.Reservations {
	l := r.Legacy
	if l == nil {
		return r
	}
	if l.Node != u.server.cfg.Node {
		if !u.server.cfg.Volumes.Lives(l.Node, l.Life) {
			r.Legacy = nil
		}
		return r
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	for s := range u.members {
		if s.nexus == r.Legacy.Nexus {
			return r
		}
	}
	r.Legacy = nil
	return r
}

// changeAttempts bounds how often a change of reservations begins anew because another
// gateway was quicker.
const changeAttempts = 20

// change carries out a change of the reservations. fn says what it is; ok false for none. still, unless nil, is asked at
// each attempt, when what there is was read: if it fails, nothing is changed. When change returns, all gateways go by it.
func (u *unit) change(ctx context.Context, still func() error, fn func(r scsi.Reservations) (next scsi.Reservations, fence, ok bool)) error {
	v := u.server.cfg.Volumes
	var err error
	for range changeAttempts {
		u.refresh() // what others have done is told before it is built upon
		var text string
		var revision uint64
		if text, revision, err = v.Reservations(u.name, u.tag); err != nil {
			return err
		}
		var r scsi.Reservations
		if r, err = scsi.DecodeReservations(text); err != nil {
			return fmt.Errorf("%w: %w", vdi.ErrCorrupt, err)
		}
		if still != nil {
			if err := still(); err != nil {
				return err
			}
		}
		next, fence, ok := fn(r)
		if !ok {
			return nil
		}
		if err = u.store(ctx, revision, &next, fence); err == nil && !fence {
			return v.Known(ctx) // who gave something up has somebody else take it through another gateway
		}
		if err == nil {
			return nil
		}
		if !errors.Is(err, vdi.ErrStale) {
			return err
		}
	}
	return err
}

// store stores what a change comes to. Who asked for it tells the initiators here.
func (u *unit) store(ctx context.Context, revision uint64, next *scsi.Reservations, fence bool) error {
	text := next.Encode()
	u.mu.Lock()
	u.asking[text]++
	u.mu.Unlock()
	now, err := u.server.cfg.Volumes.SetReservations(ctx, u.name, u.tag, revision, text, fence)
	var echoes []*echo
	u.mu.Lock()
	if u.asking[text]--; u.asking[text] == 0 {
		delete(u.asking, text)
	}
	if err == nil && now > u.revision {
		echoes = u.echoes(next)
		u.revision, u.text, u.serial = now, text, next.Serial()
		u.reserved.Store(next)
	}
	u.mu.Unlock()
	for _, e := range echoes {
		e.run()
	}
	return err
}

// forget gives up what a nexus has reserved the old way.
func (u *unit) forget(s *session) {
	if l := u.reserved.Load().Legacy; l == nil || l.Nexus != s.nexus {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), u.server.cfg.LingerTimeout)
	defer cancel()
	err := u.change(ctx, nil, func(r scsi.Reservations) (scsi.Reservations, bool, bool) {
		next, ok := r.Forget(s.nexus)
		return next, false, ok
	})
	if err != nil {
		u.server.log.Warn("reservation of an initiator that has left stays", "target", u.target, "initiator", s.nexus.Port, "err", err)
	}
}

// selectModes carries out MODE SELECT. The other initiators are told.
func (u *unit) selectModes(by *session, ten bool, b []byte) error {
	u.mu.Lock()
	now := *u.view()
	m, sense := scsi.Select(&now, ten, b)
	if sense != (scsi.Sense{}) {
		u.mu.Unlock()
		return told(sense)
	}
	changed := m != u.modes
	u.modes = m
	now.Protected, now.Descriptor = m.Protected, m.Descriptor
	u.state.Store(&now)
	u.mu.Unlock()
	if changed {
		u.tellOthers(by, scsi.ModeChanged)
	}
	return nil
}
