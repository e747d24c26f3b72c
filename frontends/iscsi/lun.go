package iscsi

import (
	"context"
	"errors"
	"slices"
	"sync/atomic"

	"sheepdog/frontends/iscsi/access"
	"sheepdog/frontends/iscsi/internal/scsi"
	"sheepdog/vdi"
)

// lun is a logical unit as one session has it.
type lun struct {
	number uint16
	unit   *unit
	vol    Volume
	news   *attentions

	tasks   int  // that use it; guarded by session.mu
	retired bool // it is the session's no more; guarded by session.mu
	touched bool // the reader's: its volume may hold requests back

	lost atomic.Bool // a read was told that writes may be lost, which the next flush is to say
}

// lunNumber reads a LUN of the peripheral device or the flat space addressing method (SAM-5
// section 4.7.7), of one level.
func lunNumber(field uint64) (uint16, bool) {
	const peripheral, flat = 0, 1
	if field<<16 != 0 {
		return 0, false
	}
	switch number := uint16(field>>48) & 0x3fff; field >> 62 {
	case peripheral:
		return number, number <= access.MaxLUN // above are bus identifiers
	case flat:
		return number, true
	}
	return 0, false
}

// find gives the session's unit under a LUN, nil if there is none. The caller holds mu.
func (s *session) find(field uint64) *lun {
	number, ok := lunNumber(field)
	if !ok {
		return nil
	}
	for _, l := range s.luns {
		if l.number == number {
			return l
		}
	}
	return nil
}

// units are the session's logical units now.
func (s *session) units() []*lun {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.luns)
}

// setLUNs makes list, which is by number, the session's units. The caller holds mu, or is alone.
func (s *session) setLUNs(list []*lun) {
	s.luns = list
	p := &scsi.Port{Target: s.params.Target}
	for _, l := range list {
		p.LUNs = append(p.LUNs, l.number)
	}
	s.port.Store(p)
}

// kick has all volumes carry out what they hold back. The reader's.
func (s *session) kick() {
	for i, l := range s.touched {
		l.touched = false
		l.vol.Kick()
		s.touched[i] = nil
	}
	s.touched = s.touched[:0]
}

// touch notes that the unit's volume may hold a request back. The reader's.
func (s *session) touch(l *lun) {
	if !l.touched {
		l.touched = true
		s.touched = append(s.touched, l)
	}
}

// place is what a login gets to.
type place struct {
	target string // iSCSI name, as we spell it
	group  string // name of the group; "" for a VDI's or a snapshot's own target
	rules  access.Target
	disks  []numbered
}

type numbered struct {
	number uint16
	disk   Disk
}

// groupOf finds a group with the disks that it has now.
func (s *Server) groupOf(name string) (place, bool) {
	t, ok := s.cfg.Targets.Target(name)
	if !ok || !t.Group {
		return place{}, false
	}
	p := place{target: s.targetName(name, ""), group: name, rules: t}
	for _, l := range t.LUNs {
		if d, err := s.cfg.Volumes.Find(l.VDI, l.Tag); err == nil { // else it is deleted
			p.disks = append(p.disks, numbered{uint16(l.Number), d})
		}
	}
	return p, true
}

// own is the place of a VDI or snapshot itself. What is said of a VDI counts for its snapshots.
func (s *Server) own(d Disk) place {
	rules, _ := s.cfg.Targets.Target(d.Name)
	return place{target: s.targetName(d.Name, d.Tag), rules: rules, disks: []numbered{{0, d}}}
}

// open opens a disk for a session of an initiator.
func (s *Server) open(ctx context.Context, d Disk, client string) (Volume, error) {
	return s.cfg.Volumes.Open(ctx, d.Name, d.Tag, client)
}

// attach makes the session one of the disk's. The caller holds the server's mu.
func (s *Server) attach(n *session, at numbered, v Volume) *lun {
	key := unitKey(at.disk)
	u := s.units[key]
	if u == nil || u.id != at.disk.ID { // else another one of that name, which is deleted
		u = newUnit(s, at.disk)
		s.units[key] = u
	}
	u.sessions++
	l := &lun{number: at.number, unit: u, vol: v}
	u.join(n, l)
	return l
}

func unitKey(d Disk) string { return d.Name + "\x00" + d.Tag }

// detach undoes attach and closes the volume. Nothing uses it any more.
func (n *session) detach(l *lun) {
	l.unit.part(n)
	if err := l.vol.Close(); err != nil {
		n.log.Warn("close of volume failed", "err", err)
	}
	n.server.mu.Lock()
	n.server.dropUnit(l.unit)
	n.server.mu.Unlock()
}

// relist takes over which units the session's group has now, and tells the initiator if that
// has changed. There is one at a time, on a goroutine of upkeep's.
func (s *session) relist() {
	defer s.relisting.Store(false)
	now := s.server.cfg.Volumes.Changes()
	p, ok := s.server.groupOf(s.group)
	if !ok {
		s.End(errGone)
		return
	}
	have := s.units()
	same := func(l *lun, at numbered) bool { return l.number == at.number && l.unit.id == at.disk.ID }
	var fresh []*lun
	next, changed, whole := []*lun{}, false, true
	for _, l := range have {
		if slices.ContainsFunc(p.disks, func(at numbered) bool { return same(l, at) }) {
			next = append(next, l)
		} else {
			changed = true
		}
	}
	for _, at := range p.disks {
		if slices.ContainsFunc(have, func(l *lun) bool { return same(l, at) }) {
			continue
		}
		l, err := s.more(at)
		if err != nil {
			whole = false
			if !errors.Is(err, vdi.ErrNotFound) {
				s.server.loginLog.Warn(s.log, "unit of a group cannot be opened, will be tried again", "vdi", at.disk.Name, "lun", at.number, "err", err)
			}
			continue
		}
		next, fresh, changed = append(next, l), append(fresh, l), true
	}
	if whole {
		s.listed.Store(now)
	}
	if !changed {
		return
	}
	slices.SortFunc(next, func(a, b *lun) int { return int(a.number) - int(b.number) })
	drop := fresh
	s.mu.Lock()
	if !s.parted { // else the session has ended meanwhile, and given up what it had
		drop = nil
		s.setLUNs(next)
		for _, l := range have {
			if slices.Contains(next, l) {
				continue
			}
			if l.retired = true; l.tasks == 0 { // else the last of them gives it up
				drop = append(drop, l)
			}
		}
	}
	s.mu.Unlock()
	for _, l := range drop {
		s.detach(l)
	}
	for _, l := range next {
		l.unit.notify(s, scsi.LUNsChanged)
	}
}

// more opens a unit that the session has not had.
func (s *session) more(at numbered) (*lun, error) {
	ctx, cancel := context.WithTimeout(s.server.clients.Context(), s.server.cfg.LoginTimeout)
	defer cancel()
	v, err := s.server.open(ctx, at.disk, s.client)
	if err != nil {
		return nil, err
	}
	s.server.mu.Lock()
	defer s.server.mu.Unlock()
	return s.server.attach(s, at, v), nil
}

// part gives up all units. The session has no tasks any more.
func (s *session) part() {
	s.mu.Lock()
	list := s.luns
	s.parted, s.luns = true, nil
	s.mu.Unlock()
	for _, l := range list {
		s.detach(l)
	}
}

// hold makes a unit a task's, and release undoes that; the last of a retired one gives it up. The caller holds mu.
func (s *session) hold(t *task, l *lun) {
	t.at = l
	if l != nil {
		l.tasks++
	}
}

func (s *session) release(l *lun) {
	if l == nil {
		return
	}
	if l.tasks--; l.tasks == 0 && l.retired {
		s.background.Go(func() { s.detach(l) })
	}
}
