package stream

import (
	"log/slog"
	"sync/atomic"
	"time"
)

// Quiet passes on at most one message a second, and says how many it left out.
type Quiet struct {
	last    atomic.Int64 // by Ticks; 0: never
	skipped atomic.Int64
}

// Warn logs a warning, or counts it. From any goroutine.
func (q *Quiet) Warn(log *slog.Logger, msg string, args ...any) {
	now, last := Ticks(time.Now()), q.last.Load()
	if last != 0 && now-last < int64(time.Second) || !q.last.CompareAndSwap(last, now) {
		q.skipped.Add(1)
		return
	}
	log.Warn(msg, append(args, "not_logged", q.skipped.Swap(0))...)
}
