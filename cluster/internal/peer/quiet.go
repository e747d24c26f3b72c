package peer

import (
	"log/slog"
	"net"
	"sync"
	"time"
)

const (
	// quietFor is how long nothing more is logged of what one address does in one way.
	quietFor = time.Minute
	// quietKeys bounds the addresses and ways that are remembered. While there are more,
	// further ones are only counted.
	quietKeys = 1024
)

// quiet logs what others can cause as often as they like: once a minute for each address
// and message, with the number of those left out.
type quiet struct {
	log *slog.Logger

	mu   sync.Mutex
	seen map[quietKey]*muted
	rest int64 // left out because too many are remembered
}

type quietKey struct{ host, msg string }

type muted struct {
	until   time.Time
	skipped int64
}

// hostOf is an address without its port.
func hostOf(a net.Addr) string {
	if a == nil {
		return ""
	}
	if host, _, err := net.SplitHostPort(a.String()); err == nil {
		return host
	}
	return a.String()
}

// warn logs a message about what the address, or the node, called who did.
func (q *quiet) warn(who, msg string, args ...any) {
	skipped, ok := q.admit(quietKey{who, msg}, time.Now())
	if !ok {
		return
	}
	if skipped > 0 {
		args = append(args, "not_logged", skipped)
	}
	q.log.Warn(msg, args...)
}

func (q *quiet) admit(k quietKey, now time.Time) (skipped int64, ok bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.seen == nil {
		q.seen = map[quietKey]*muted{}
	}
	m := q.seen[k]
	if m == nil {
		if len(q.seen) >= quietKeys {
			q.forget(now)
		}
		if len(q.seen) >= quietKeys {
			q.rest++
			return 0, false
		}
		q.seen[k] = &muted{until: now.Add(quietFor)}
		skipped, q.rest = q.rest, 0
		return skipped, true
	}
	if now.Before(m.until) {
		m.skipped++
		return 0, false
	}
	skipped, m.skipped, m.until = m.skipped, 0, now.Add(quietFor)
	return skipped, true
}

// forget drops what is over, its count included.
func (q *quiet) forget(now time.Time) {
	for k, m := range q.seen {
		if now.After(m.until) {
			q.rest += m.skipped
			delete(q.seen, k)
		}
	}
}
