package sheepdog

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"

	"sheepdog/frontends/sheepdog/internal/wire"
	"sheepdog/storage/object"
	"sheepdog/vdi"
)

// Clients that share a VDI, as several tgtd do, flag their requests with SD_FLAG_CMD_TGT. They keep copies
// of the map, and ask whether theirs is an old one: before they take something for a hole by reading a byte of
// the inode, else by the read itself. SD_RES_INODE_INVALIDATED has them read the inode again.
//
// A tgtd has a connection for each of its threads, and they share one copy. Nothing says which belong together;
// but the connection that locked the VDI stays. As long as only one has, what its threads change is
// no news for any of them; else each connection takes what others change for news, which costs the same tgtd
// some reading, and loses nothing.

// sharedVDI is a VDI that clients share.
type sharedVDI struct {
	name    string
	family  uint64
	users   int               // sessions that follow it; guarded by sharedVDIs.mu
	holders map[*session]bool // connections that locked it; guarded by sharedVDIs.mu
	own     tally             // of all who follow it
	// several: more than one connection locked it at a time, or it was locked before this
	// sheep was started.
	several atomic.Bool
	seen    seenMap // by who alone has it locked
}

type sharedVDIs struct {
	mu   sync.Mutex
	list map[string]*sharedVDI // by name
}

// sharing is what a session shares.
type sharing struct {
	of   atomic.Pointer[sharedVDI]
	own  tally
	seen seenMap
}

// tally counts the changes that clients make themselves.
type tally struct {
	done    atomic.Uint64
	pending atomic.Uint64 // requests under way, which may change something or not
}

// seenMap is the version of a map when a client last read the inode.
type seenMap struct {
	mu  sync.Mutex
	was seen
}

func (m *seenMap) set(now seen) {
	m.mu.Lock()
	m.was = now
	m.mu.Unlock()
}

func (m *seenMap) is(now seen) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.was == now
}

// seen is the version of a map, without what the client changed itself.
type seen struct {
	version vdi.MapVersion
	vid     object.VID
	several bool
	working bool
}

// follow returns the shared VDI that h, which a flagged request names, is or was; nil if there is none.
func (s *session) follow(h vdi.Header) *sharedVDI {
	if v := s.sharing.of.Load(); v != nil && v.name == h.Name && v.family == h.Family {
		return v
	}
	all := &s.server.shared
	all.mu.Lock()
	defer all.mu.Unlock()
	v := all.list[h.Name]
	if v == nil || v.family != h.Family {
		if h.Snapshot {
			return nil
		}
		if all.list == nil {
			all.list = map[string]*sharedVDI{}
		}
		v = &sharedVDI{name: h.Name, family: h.Family, holders: map[*session]bool{}}
		v.several.Store(true)
		all.list[h.Name] = v
	}
	all.leave(s)
	v.users++
	s.sharing.of.Store(v)
	return v
}

// leave has the session follow nothing. The caller holds mu.
func (all *sharedVDIs) leave(s *session) {
	v := s.sharing.of.Swap(nil)
	if v == nil {
		return
	}
	delete(v.holders, s)
	if v.users--; v.users == 0 && all.list[v.name] == v {
		delete(all.list, v.name)
	}
}

// share notes that the session locked a VDI to share it.
func (s *session) share(h vdi.Header) {
	all := &s.server.shared
	v := s.follow(h)
	all.mu.Lock()
	defer all.mu.Unlock()
	v.holders[s] = true
	v.several.Store(len(v.holders) > 1 || v.users > 1 && v.several.Load())
}

// unlock notes that the session released it; unshare, that the session ends.
func (s *session) unlock() {
	all := &s.server.shared
	all.mu.Lock()
	defer all.mu.Unlock()
	if v := s.sharing.of.Load(); v != nil {
		delete(v.holders, s)
	}
}

func (s *session) unshare() {
	all := &s.server.shared
	all.mu.Lock()
	defer all.mu.Unlock()
	all.leave(s)
}

// begins counts a flagged request that may change the map, and ends what came of it.
func (o *op) begins() {
	o.shared = o.s.sharing.of.Load()
	o.s.sharing.own.pending.Add(1)
	if o.shared != nil {
		o.shared.own.pending.Add(1)
	}
}

func (o *op) ends(changed bool) {
	o.s.sharing.own.end(changed)
	if o.shared != nil {
		o.shared.own.end(changed)
		o.shared = nil
	}
}

func (t *tally) end(changed bool) {
	if changed {
		t.done.Add(1)
	}
	t.pending.Add(^uint64(0))
}

// mayBeStale reports whether a flagged read of an object of that vid is to be looked at: it is not
// one of the VDI's own, which are always as they are now.
func (s *session) mayBeStale(vid object.VID) bool {
	h, err := s.server.cfg.Volumes.HeaderOf(vid)
	if err == nil && !h.Snapshot {
		s.follow(h)
		return false
	}
	return len(s.sharedBy(vid)) > 0
}

// sharedBy are the shared VDIs on behalf of which an object of an ancestor may be read: one, once the session
// has said which it uses.
func (s *session) sharedBy(vid object.VID) []*sharedVDI {
	if v := s.sharing.of.Load(); v != nil {
		return []*sharedVDI{v}
	}
	family, err := s.server.cfg.Volumes.FamilyOf(vid)
	if err != nil {
		return nil
	}
	all := &s.server.shared
	all.mu.Lock()
	defer all.mu.Unlock()
	var list []*sharedVDI
	for _, v := range all.list {
		if v.family == family {
			list = append(list, v)
		}
	}
	return list
}

// readShared reads an ancestor's object, if the VDI's map still names it.
func (s *session) readShared(ctx context.Context, o *op) {
	id := object.ID(o.obj.OID)
	for _, v := range s.sharedBy(id.VID()) {
		old, err := s.namesOther(ctx, v, id)
		if err == nil && old {
			err = refuse(wire.SD_RES_INODE_INVALIDATED, "the map names another object")
		}
		if err != nil {
			o.finish(err)
			return
		}
	}
	if vol := s.read(o); vol != nil {
		vol.Kick()
	}
}

func (s *session) namesOther(ctx context.Context, v *sharedVDI, id object.ID) (bool, error) {
	h, err := s.server.cfg.Volumes.FindHeader(v.name, "", 0)
	if errors.Is(err, vdi.ErrNotFound) || err == nil && h.Family != v.family {
		return false, nil // there is nothing to be old
	}
	if err != nil {
		return false, err
	}
	a, err := s.attach(h.VID, toRead)
	if err != nil {
		return false, err
	}
	defer a.refs.Add(-1)
	owner, err := a.vol.Entry(ctx, h.VID, id.Index())
	if errors.Is(err, vdi.ErrReadOnly) {
		return true, nil // it has got another vid just now
	}
	return owner != id.VID(), err
}

// readSharedInode reads an inode, or a part of its header to learn whether the map is an old one.
func (s *session) readSharedInode(ctx context.Context, o *op) {
	vid := object.ID(o.obj.OID).VID()
	h, err := s.server.cfg.Volumes.HeaderOf(vid)
	if err != nil {
		o.finish(err)
		return
	}
	whole := o.obj.Offset == 0 && len(o.data) >= wire.InodeHeaderSize+4*int(h.Objects())
	now, seen, err := s.look(ctx, h, whole)
	switch {
	case err != nil:
		o.finish(err)
		return
	case whole:
		seen.set(now) // before the map is read: what changes meanwhile is news
	case len(o.data) < wire.InodeHeaderSize && !seen.is(now):
		o.finish(refuse(wire.SD_RES_INODE_INVALIDATED, "the map has changed"))
		return
	}
	if s.fillHeader(o, h) {
		o.finish(nil)
		return
	}
	s.readMap(ctx, o)
}

// look tells what a client that reads the inode now sees, and where that is noted. What others changed
// is all changes but its own, some of which may be under way: whole says that the map is to be read, then
// it is not more than what is certain, else not less. So nothing of others is ever taken for its own.
func (s *session) look(ctx context.Context, h vdi.Header, whole bool) (seen, *seenMap, error) {
	now, where := seen{vid: h.VID}, &s.sharing.seen
	v := s.sharing.of.Load()
	if h.Snapshot || v == nil {
		return now, where, nil
	}
	a, err := s.attach(h.VID, toRead)
	if err != nil {
		return now, where, err
	}
	defer a.refs.Add(-1)
	now.several, now.working = v.several.Load(), true
	own := &s.sharing.own
	if !now.several {
		where, own = &v.seen, &v.own
	}
	count := own.done.Load()
	now.version, err = a.vol.MapVersion(ctx)
	if whole {
		count = own.pending.Load() // before those that are done: each is counted
		count += own.done.Load()
	}
	if now.version.Generation != 0 {
		now.version.Changes -= count
	}
	return now, where, err
}
