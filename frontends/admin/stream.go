package admin

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strings"
	"time"

	"sheepdog/frontends/admin/api"
)

// stallReader reads a body; a client that sends nothing for the stall timeout fails it.
type stallReader struct {
	r     io.Reader
	rc    *http.ResponseController
	limit time.Duration
	set   time.Time
}

func (c *call) upload() *stallReader {
	rc := http.NewResponseController(c.w)
	c.uploads = true
	if err := rc.EnableFullDuplex(); err != nil && !errors.Is(err, http.ErrNotSupported) { // HTTP/2 is so always
		c.s.log.Debug("an upload's answer waits for its end", "error", err)
	}
	return &stallReader{r: c.r.Body, rc: rc, limit: c.s.cfg.StallTimeout}
}

// refusedTimeout is how long a client that was refused may go on sending.
const refusedTimeout = 5 * time.Second

// drain takes what a client still sends after an upload was refused, until it has read
// the answer. If the connection were closed on it, it would find that in place of the
// reason.
func (c *call) drain() {
	rc := http.NewResponseController(c.w)
	if err := errors.Join(rc.Flush(), rc.SetReadDeadline(time.Now().Add(refusedTimeout))); err != nil {
		return
	}
	io.Copy(io.Discard, c.r.Body)
	rc.SetReadDeadline(time.Time{})
}

// Read implements io.Reader.
func (s *stallReader) Read(p []byte) (int, error) {
	if now := time.Now(); now.Sub(s.set) > time.Second {
		s.set = now
		if err := s.rc.SetReadDeadline(now.Add(s.limit)); err != nil {
			return 0, err
		}
	}
	return s.r.Read(p)
}

// end lifts the deadline.
func (s *stallReader) end() { s.rc.SetReadDeadline(time.Time{}) }

// download is an answer of content. It begins with the first byte, so that a call that
// fails before has an ordinary error. One that fails later has the error in a trailer, for
// clients that know them, else the connection is cut.
type download struct {
	c        *call
	kind     string
	trailers bool
	began    bool
	rc       *http.ResponseController
	set      time.Time
}

func (c *call) download(kind string) *download {
	d := &download{c: c, kind: kind, rc: http.NewResponseController(c.w)}
	for _, te := range c.r.Header.Values("TE") {
		d.trailers = d.trailers || strings.Contains(strings.ToLower(te), "trailers")
	}
	return d
}

func (d *download) begin() {
	if d.began {
		return
	}
	d.began = true
	h := d.c.w.Header()
	h.Set("Content-Type", d.kind)
	h.Set("Cache-Control", "no-store")
	if d.trailers {
		h.Set("Trailer", api.ErrorTrailer)
	}
	d.c.w.WriteHeader(http.StatusOK)
}

// Write implements io.Writer.
func (d *download) Write(p []byte) (int, error) {
	d.begin()
	if now := time.Now(); now.Sub(d.set) > time.Second {
		d.set = now
		if err := d.rc.SetWriteDeadline(now.Add(d.c.s.cfg.StallTimeout)); err != nil {
			return 0, err
		}
	}
	return d.c.w.Write(p)
}

// end ends the answer as err says.
func (d *download) end(err error) error {
	if err != nil && !d.began {
		return err
	}
	d.begin()
	if err == nil {
		return d.rc.SetWriteDeadline(time.Time{})
	}
	if d.c.r.Context().Err() != nil {
		panic(http.ErrAbortHandler) // nobody is there any more, or who is shall not take it for the whole
	}
	d.c.s.log.Warn("download failed after its beginning", "call", d.c.r.URL.Path, "error", err)
	if !d.trailers {
		panic(http.ErrAbortHandler) // what net/http offers to cut a connection
	}
	b, jsonErr := json.Marshal(errorOf(err))
	if jsonErr != nil {
		return jsonErr
	}
	d.c.w.Header().Set(api.ErrorTrailer, string(b))
	return nil
}

// zeros is what a raw download has of holes.
var zeros [64 << 10]byte

// rawSink writes content as it is read.
type rawSink struct{ w io.Writer }

func (s rawSink) Data(_ int64, p []byte) error {
	_, err := s.w.Write(p)
	return err
}

func (s rawSink) Zero(_, n int64) error {
	for n > 0 {
		k, err := s.w.Write(zeros[:min(n, int64(len(zeros)))])
		if err != nil {
			return err
		}
		n -= int64(k)
	}
	return nil
}

// clientName is how the volume's openers show this call.
func (c *call) clientName(what string) string { return what + " from " + c.r.RemoteAddr }
