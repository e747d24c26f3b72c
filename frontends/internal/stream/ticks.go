package stream

import "time"

var began = time.Now()

// Ticks is a time, as from time.Now, in nanoseconds on a clock that nobody sets; it is not 0 for the present. A client must not count as stalled, or
// never count as that, because the time of day is set.
func Ticks(t time.Time) int64 { return int64(t.Sub(began)) + 1 }
