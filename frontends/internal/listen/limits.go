package listen

import (
	"cmp"
	"fmt"
	"net/netip"
	"time"
)

// Limits bound what the clients of a server take; its Config has them. Zero values stand for the defaults.
type Limits struct {
	// Allow lists who may connect over TCP; empty: everybody. Who may open a unix socket is
	// the file system's matter.
	Allow []netip.Prefix
	// MaxConnections bounds connections, handshakes included. Default 4096.
	MaxConnections int
	// MemoryLimit bounds the buffers of all sessions together, beside 32 KiB that each
	// always may have. At least 8 of the longest payloads; default 384 MiB. In bytes.
	MemoryLimit int64
	// SessionMemory bounds the buffers of one session. At least 2 of the longest payloads; default 96 MiB. In bytes.
	SessionMemory int64
	// StallTimeout is how long a client may leave replies unread, or a payload unfinished,
	// while other sessions wait for memory. Default 30 s.
	StallTimeout time.Duration
	// LingerTimeout is how long replies are still sent to a client that has left. Default 10 s.
	LingerTimeout time.Duration
}

// Validate sets the defaults, and refuses what a server cannot work with whose longest payload has so many bytes.
func (l *Limits) Validate(longest int64) error {
	l.MaxConnections = cmp.Or(l.MaxConnections, 4096)
	l.MemoryLimit = cmp.Or(l.MemoryLimit, 384<<20)
	l.SessionMemory = cmp.Or(l.SessionMemory, 96<<20)
	l.StallTimeout = cmp.Or(l.StallTimeout, 30*time.Second)
	l.LingerTimeout = cmp.Or(l.LingerTimeout, 10*time.Second)
	switch {
	case l.MaxConnections < 1:
		return fmt.Errorf("at most %d connections: must be at least 1", l.MaxConnections)
	case l.MemoryLimit < 8*longest:
		return fmt.Errorf("memory limit of %d bytes: must be at least %d", l.MemoryLimit, 8*longest)
	case l.SessionMemory < 2*longest:
		return fmt.Errorf("memory limit of %d bytes per session: must be at least %d", l.SessionMemory, 2*longest)
	}
	return nil
}
