package admin

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"

	"sheepdog/frontends/admin/api"
)

// call is one request under way.
type call struct {
	s *Server
	w *recorder
	r *http.Request

	uploads bool // it reads content, which its client may go on sending when it is refused
}

// recorder remembers what was answered.
type recorder struct {
	http.ResponseWriter
	status int // 0: nothing yet
}

// WriteHeader implements http.ResponseWriter.
func (r *recorder) WriteHeader(status int) {
	if r.status == 0 {
		r.status = status
	}
	r.ResponseWriter.WriteHeader(status)
}

// Write implements http.ResponseWriter.
func (r *recorder) Write(p []byte) (int, error) {
	if r.status == 0 {
		r.status = http.StatusOK
	}
	return r.ResponseWriter.Write(p)
}

// Unwrap lets http.ResponseController find what is below.
func (r *recorder) Unwrap() http.ResponseWriter { return r.ResponseWriter }

// route makes a handler of an entry of the table.
func (s *Server) route(r *route) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		c := &call{s: s, w: &recorder{ResponseWriter: w}, r: req}
		began := time.Now()
		defer func() { s.metrics.called(r, c.w.status, time.Since(began)) }()
		if err := c.run(r); err != nil {
			c.fail(err)
		}
	})
}

func (c *call) run(r *route) error {
	if err := c.checkQuery(r); err != nil {
		return err
	}
	if node := c.query(paramNode.name); r.perNode && node != "" && !c.s.isSelf(node) {
		return c.forward(node)
	}
	if r.answers != nil {
		v, err := r.answers(c)
		if err != nil {
			return err
		}
		return c.json(r.success(), v)
	}
	return r.serves(c)
}

// fail answers with an error, if nothing was answered yet. A client that has gone, as it seems, may only have said that it
// sends nothing more: without an answer net/http would say that all is well.
func (c *call) fail(err error) {
	if e := errorOf(err); e.Kind == api.KindInternal && c.r.Context().Err() == nil {
		c.s.log.Error("admin call failed", "call", c.r.Method+" "+c.r.URL.Path, "error", err)
	}
	if c.w.status != 0 {
		return
	}
	if c.uploads {
		c.w.Header().Set("Connection", "close")
	}
	writeError(c.w, c.r, err)
	if c.uploads {
		c.drain()
	}
}

func writeError(w http.ResponseWriter, r *http.Request, err error) {
	e := errorOf(err)
	h := w.Header()
	h.Set("Content-Type", api.TypeJSON)
	h.Set("Cache-Control", "no-store")
	switch e.Kind {
	case api.KindUnauthorized:
		h.Set("WWW-Authenticate", `Bearer realm="sheepdog"`)
	case api.KindOverloaded, api.KindUnavailable, api.KindClosed:
		h.Set("Retry-After", "5")
	}
	b, _ := json.Marshal(e) // texts alone: it cannot fail
	h.Set("Content-Length", strconv.Itoa(len(b)+1))
	w.WriteHeader(statusOf(e.Kind))
	if r.Method != http.MethodHead {
		w.Write(append(b, '\n')) // who cannot be told has gone
	}
}

// json answers with a value; nil is an answer without content.
func (c *call) json(status int, v any) error {
	c.w.Header().Set("Cache-Control", "no-store")
	if v == nil {
		c.w.WriteHeader(http.StatusNoContent)
		return nil
	}
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode the answer: %w", err)
	}
	c.w.Header().Set("Content-Type", api.TypeJSON)
	c.w.WriteHeader(status)
	_, err = c.w.Write(append(b, '\n'))
	return err
}

// body reads a JSON body into v. What it does not know it refuses: a setting that is not
// heeded is worse than an error.
func (c *call) body(v any) error {
	d := json.NewDecoder(http.MaxBytesReader(c.w, c.r.Body, maxJSON))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		if tooBig, ok := errors.AsType[*http.MaxBytesError](err); ok {
			return refuse(api.KindInvalid, "the body has more than %d bytes", tooBig.Limit)
		}
		return refuse(api.KindInvalid, "the body is not the JSON that is expected: %v", err)
	}
	if _, err := d.Token(); err != io.EOF {
		return refuse(api.KindInvalid, "there is something after the JSON of the body")
	}
	return nil
}

// name is the VDI that the path names.
func (c *call) name() string { return c.r.PathValue("name") }

// query returns a parameter; "" if it is not there.
func (c *call) query(key string) string { return c.r.URL.Query().Get(key) }

// checkQuery refuses parameters that the call does not have, and repeated ones.
func (c *call) checkQuery(r *route) error {
	if len(c.r.URL.RawQuery) == 0 || r.anyQuery {
		return nil
	}
	for key, values := range c.r.URL.Query() {
		if !r.has(key) {
			return refuse(api.KindInvalid, "%s %s has no parameter %q", r.method, r.path, key)
		}
		if len(values) > 1 {
			return refuse(api.KindInvalid, "the parameter %q is there %d times", key, len(values))
		}
	}
	return nil
}

// number returns a parameter that is a number of bytes or the like, 0 or more.
func (c *call) number(key string, otherwise int64) (int64, error) {
	text := c.query(key)
	if text == "" {
		return otherwise, nil
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil || n < 0 {
		return 0, refuse(api.KindInvalid, "the parameter %q is %.64q, which is not a number from 0 to 2^63-1", key, text)
	}
	return n, nil
}

// flag returns a parameter that is true or false.
func (c *call) flag(key string) (bool, error) {
	switch text := c.query(key); text {
	case "", "false":
		return false, nil
	case "true":
		return true, nil
	default:
		return false, refuse(api.KindInvalid, "the parameter %q is %.64q, which is neither true nor false", key, text)
	}
}
