package sheepdog

import (
	"slices"
	"sync"
	"time"

	"sheepdog/storage/object"
)

// locks knows which host has opened which VDIs with SD_OP_LOCK_VDI. Nobody is kept away by
// that: it is what lets a connection use several volumes. A client that is killed
// says nothing; so what a host has opened is forgotten when its last connection is gone for a while.
type locks struct {
	mu    sync.Mutex
	hosts map[string]*host
}

type host struct {
	conns int
	gone  time.Time            // since when there is none
	names map[string]int       // how often each is open
	last  map[string]time.Time // when each was opened
	// families are those of which the host was told a vid by each name that it has open: the last maxFamilies.
	families map[string][]uint64
}

const (
	// lockLinger is how long a host may be without connections: clients reconnect every second.
	lockLinger = 10 * time.Second
	// maxHosts and maxOpen bound what is remembered.
	maxHosts = 4096
	maxOpen  = 1024 // of one host
	// maxFamilies bounds what is remembered of a name: its VDI is deleted and made anew while killed clients have it open.
	maxFamilies = 16
)

func (l *locks) connected(name string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.hosts == nil {
		l.hosts = map[string]*host{}
	}
	for n, h := range l.hosts {
		if h.conns == 0 && (time.Since(h.gone) > lockLinger || len(l.hosts) >= maxHosts) {
			delete(l.hosts, n)
		}
	}
	h := l.hosts[name]
	if h == nil {
		h = &host{names: map[string]int{}, last: map[string]time.Time{}, families: map[string][]uint64{}}
		l.hosts[name] = h
	}
	h.conns++
}

func (l *locks) disconnected(name string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	h := l.hosts[name]
	if h.conns--; h.conns == 0 {
		h.gone = time.Now()
	}
}

// take notes that a host, which is connected, has opened a VDI.
func (l *locks) take(name, vdi string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if h := l.hosts[name]; h.names[vdi] > 0 || len(h.names) < maxOpen {
		h.names[vdi]++
		h.last[vdi] = time.Now()
	}
}

// opened is when the host last opened a VDI that it still has open; zero if it has not.
func (l *locks) opened(name, vdi string) time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.hosts[name].last[vdi]
}

// release takes it back; false if there was nothing.
func (l *locks) release(name, vdi string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	h := l.hosts[name]
	if h.names[vdi] == 0 {
		return false
	}
	if h.names[vdi]--; h.names[vdi] == 0 {
		delete(h.names, vdi)
		delete(h.last, vdi)
		delete(h.families, vdi)
	}
	return true
}

// others reports whether a VDI is open to anybody else than one client of a host.
func (l *locks) others(name, vdi string) bool {
	l.mu.Lock()
	own := min(1, l.hosts[name].names[vdi])
	l.mu.Unlock()
	return l.count(vdi) > own
}

// count is how often a VDI is open, by hosts that have connections or may be coming back.
func (l *locks) count(vdi string) (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, h := range l.hosts {
		if h.conns > 0 || time.Since(h.gone) <= lockLinger {
			n += h.names[vdi]
		}
	}
	return n
}

// once is when a host has opened a VDI, if it has once; else zero.
func (l *locks) once(name, vdi string) time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	if h := l.hosts[name]; h.names[vdi] == 1 {
		return h.last[vdi]
	}
	return time.Time{}
}

// any reports whether a host, which is connected, has opened anything.
func (l *locks) any(name string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.hosts[name].names) > 0
}

// told notes that a host is told a vid of that family by that name.
func (l *locks) told(name, vdi string, family uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	h := l.hosts[name]
	if h.names[vdi] == 0 || slices.Contains(h.families[vdi], family) {
		return
	}
	list := append(h.families[vdi], family)
	h.families[vdi] = list[max(0, len(list)-maxFamilies):]
}

// has reports whether the host has a VDI open. strange says that it has one of that name open, but not of that family: what it
// has open was deleted, and another VDI has its name, and maybe its vid.
func (l *locks) has(name, vdi string, family uint64) (open, strange bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	h := l.hosts[name]
	if h.names[vdi] == 0 {
		return false, false
	}
	open = slices.Contains(h.families[vdi], family)
	return open, !open
}

// announcements are what clients have said of a VDI and a snapshot of it, and will come back to.
//
// Rollbacks: QEMU goes back to a snapshot by deleting the VDI
// and then creating it from the snapshot. Were it deleted at once, a client that dies in
// between would leave nothing of the name; so it is replaced in one step, at the second request.
// After a restart in between the second one fails, and the VDI is what it was.
//
// Heirs: who takes a snapshot says so in the header first, under a vid that may have become a snapshot by others (heir). The vid that it names then is
// not one to go back to.
type announcements struct {
	mu   sync.Mutex
	list map[string]announced // by name
}

type announced struct {
	base object.VID
	at   time.Time
}

const (
	// announcedWithin is how long an announcement is good for.
	announcedWithin = time.Minute
	maxAnnounced    = 1024
)

func (r *announcements) announce(name string, base object.VID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.list == nil {
		r.list = map[string]announced{}
	}
	for n, a := range r.list {
		if time.Since(a.at) > announcedWithin || len(r.list) >= maxAnnounced {
			delete(r.list, n)
		}
	}
	r.list[name] = announced{base, time.Now()}
}

func (r *announcements) announced(name string, base object.VID) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	a, ok := r.list[name]
	return ok && a.base == base && time.Since(a.at) <= announcedWithin
}

func (r *announcements) done(name string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.list, name)
}
