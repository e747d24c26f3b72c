package sheepdog

import (
	"fmt"
	"sync/atomic"
	"time"

	"sheepdog/frontends/internal/listen"
	"sheepdog/frontends/sheepdog/internal/wire"
	"sheepdog/storage/object"
	"sheepdog/vdi"
)

// attached is a VDI or snapshot whose objects a session uses. Nothing says that a client opens
// it: QEMU asks for the vid on another connection, and after a restart not at all. So
// the first request for an object of it does.
type attached struct {
	header vdi.Header // as it was then
	vol    Volume
	at     time.Time    // since when
	refs   atomic.Int64 // requests that use vol
}

// maxAttached bounds the volumes that a session has attached without using them just now:
// a working VDI, and the ancestors whose objects its map names.
const maxAttached = 64

// use is what an object is wanted for.
type use uint8

const (
	toRead  use = iota // the client names the vid: where it is that of a VDI, it has that open
	toWrite            // likewise
	instead            // another vid was named, whose object this one has: says nothing about what the client has open
)

// attach returns the volume of a vid, for an object to be read or changed, with a reference
// that the op gives back. From any goroutine.
func (s *session) attach(vid object.VID, u use) (*attached, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if a := s.attached[vid]; a != nil && s.knows(a.header, u) {
		a.refs.Add(1)
		return a, nil
	}
	h, err := s.server.cfg.Volumes.HeaderOf(vid)
	if err != nil {
		return nil, err
	}
	if err := s.permit(h, u); err != nil {
		return nil, err
	}
	a := s.attached[vid]
	if a == nil {
		s.dropUnused()
		vol, err := s.server.cfg.Volumes.OpenVID(vid, "sheepdog "+listen.PeerName(s.conn), h.Snapshot)
		if err != nil {
			return nil, err
		}
		a = &attached{header: h, vol: vol, at: time.Now()}
		s.attached[vid] = a
	}
	if u != instead {
		s.show(h)
	}
	a.refs.Add(1)
	return a, nil
}

// handles is how often the session has a working VDI open, not before that time.
func (s *session) handles(name string, since time.Time) (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	count := func(a *attached) {
		if a.header.Name == name && !a.header.Snapshot && !a.at.Before(since) {
			n++
		}
	}
	for _, a := range s.attached {
		count(a)
	}
	for _, a := range s.detached {
		count(a)
	}
	return n
}

// knows reports whether permit would say nothing new of a VDI that is attached. The caller holds mu.
func (s *session) knows(h vdi.Header, u use) bool {
	switch {
	case u == instead || h.Snapshot && u == toRead:
		return true
	case u == toWrite:
		return s.writes == h.Name
	}
	return s.reads != "" || s.writes != ""
}

// permit decides whether a session may use an object: of the family of which it used the first
// one, and change those of one VDI only; or of what its host has opened. So a client that
// makes an oid up harms nobody.
//
// A VDI that is made anew may have the vid of one that was deleted long ago: who has opened that does not get it, as far as is known what
// the host has opened.
func (s *session) permit(h vdi.Header, u use) error {
	open, strange := s.server.locks.has(s.host, h.Name, h.Family)
	if h.Snapshot { // which may be read on behalf of a clone, and stays what it is
		open, strange = open || strange, false
	}
	switch {
	case strange:
		return replaced(h)
	case h.Objects() > vdi.NativeObjects:
		return refuse(wire.SD_RES_INVALID_PARMS, fmt.Sprintf("%q has more objects than the native protocol can name: use another one", h.Name))
	case s.family != 0 && s.family != h.Family && !open:
		return refuse(wire.SD_RES_INVALID_PARMS, fmt.Sprintf("VDI %s, %q, is not open to this client", h.VID, h.Name))
	case u == toWrite && s.writes != "" && s.writes != h.Name && !open:
		return refuse(wire.SD_RES_INVALID_PARMS, fmt.Sprintf("VDI %s, %q, is not open to this client, which writes %q", h.VID, h.Name, s.writes))
	}
	s.family = h.Family
	switch {
	case h.Snapshot || u == instead:
	case u == toWrite:
		s.writes = h.Name
	case s.reads == "":
		s.reads = h.Name
	}
	return nil
}

// replaced is the answer to who has opened a VDI whose name another one has by now. It is not INVALID_PARMS, which
// QEMU takes for success of a flush or a discard.
func replaced(h vdi.Header) error {
	return refuse(wire.SD_RES_NO_VDI, fmt.Sprintf("VDI %s is another one by now: %q was deleted and made anew, open it again", h.VID, h.Name))
}

// show has the session described by what it uses. The caller holds mu.
func (s *session) show(h vdi.Header) {
	if h.Snapshot && s.info.Export != "" {
		return // an ancestor
	}
	s.info.Export, s.info.Size, s.info.ReadOnly = h.Name, h.Size, h.Snapshot
	if h.Snapshot {
		s.info.Export += "@" + tagOf(h)
	}
}

func tagOf(h vdi.Header) string {
	if h.Tag == "" {
		return fmt.Sprint(h.SnapshotID)
	}
	return h.Tag
}

// dropUnused makes room for another volume. The caller holds mu.
func (s *session) dropUnused() {
	for vid, a := range s.attached {
		if len(s.attached) < maxAttached {
			return
		}
		if a.refs.Load() == 0 {
			delete(s.attached, vid)
			s.close(a)
		}
	}
}

// detach forgets what has got another vid.
func (s *session) detach(a *attached) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.attached[a.header.VID] == a {
		delete(s.attached, a.header.VID)
		s.detached = append(s.detached, a)
	}
	// Nobody refers to it anew from here on.
	kept := s.detached[:0]
	for _, d := range s.detached {
		if d.refs.Load() == 0 {
			s.close(d)
			continue
		}
		kept = append(kept, d)
	}
	s.detached = kept
}

func (s *session) close(a *attached) {
	if err := a.vol.Close(); err != nil {
		s.log.Warn("close of volume failed", "vdi", a.header.Name, "err", err)
	}
}

// detachAll closes everything, when no request is in flight.
func (s *session) detachAll() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, a := range s.attached {
		s.close(a)
	}
	for _, a := range s.detached {
		s.close(a)
	}
	s.attached, s.detached = nil, nil
}
