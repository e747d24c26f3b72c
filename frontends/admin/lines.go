package admin

import (
	"encoding/json"
	"net/http"
	"time"

	"sheepdog/frontends/admin/api"
)

// lines is an answer of one JSON value a line. The answer begins with the first line, so
// that a call that fails before has an ordinary error.
type lines struct {
	c       *call
	enc     *json.Encoder
	rc      *http.ResponseController
	flushed time.Time
}

// flushEvery is how long lines may wait for more before they are sent.
const flushEvery = 100 * time.Millisecond

func (c *call) lines() *lines {
	return &lines{c: c, enc: json.NewEncoder(c.w), rc: http.NewResponseController(c.w)}
}

func (l *lines) write(v any) error {
	if l.c.w.status == 0 {
		l.c.w.Header().Set("Content-Type", api.TypeEvents)
		l.c.w.Header().Set("Cache-Control", "no-store")
		l.c.w.Header().Set("X-Content-Type-Options", "nosniff")
	}
	now := time.Now()
	if now.Sub(l.flushed) < flushEvery {
		return l.enc.Encode(v)
	}
	l.flushed = now
	if err := l.rc.SetWriteDeadline(now.Add(l.c.s.cfg.StallTimeout)); err != nil {
		return err
	}
	if err := l.enc.Encode(v); err != nil {
		return err
	}
	return l.rc.Flush()
}

// end ends the answer; failure makes the line that tells of an error.
func (l *lines) end(err error, failure func(*api.Error) any) error {
	if err != nil && l.c.w.status == 0 {
		return err
	}
	if err != nil {
		return l.write(failure(errorOf(err)))
	}
	if l.c.w.status == 0 { // no lines at all
		l.c.w.Header().Set("Content-Type", api.TypeEvents)
		l.c.w.WriteHeader(http.StatusOK)
	}
	return l.rc.SetWriteDeadline(time.Time{})
}
