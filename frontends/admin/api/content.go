package api

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
)

// Check checks a VDI and its snapshots; with name "" all VDIs and the node's disks. It
// tells progress, which may be nil, how far it is.
func (c *Client) Check(ctx context.Context, name string, repair bool, progress func(Progress)) (*CheckReport, error) {
	q := request{method: http.MethodPost, path: "/cluster/check", query: url.Values{}}
	if name != "" {
		path, err := vdiPath(name, "check")
		if err != nil {
			return nil, err
		}
		q.path = path
	}
	if repair {
		q.query.Set("repair", "true")
	}
	var report *CheckReport
	err := c.events(ctx, q, progress, func(e Event) bool {
		report = e.Report
		return report == nil
	})
	if err == nil && report == nil {
		err = c.cutOff()
	}
	return report, err
}

// AlterCopies changes how many copies a VDI has, and all that may share objects with it. It tells begun, which may be
// nil, what that is, and progress, which may be nil, how far it is.
func (c *Client) AlterCopies(ctx context.Context, name string, copies int, begun func(Altered), progress func(Progress)) (*Altered, error) {
	path, err := vdiPath(name, "copies")
	if err != nil {
		return nil, err
	}
	q := request{method: http.MethodPut, path: path}
	if err := q.json(CopiesRequest{Copies: copies}); err != nil {
		return nil, err
	}
	var altered *Altered
	err = c.events(ctx, q, progress, func(e Event) bool {
		if e.Altering != nil && begun != nil {
			begun(*e.Altering)
		}
		altered = e.Altered
		return altered == nil
	})
	if err == nil && altered == nil {
		err = c.cutOff()
	}
	return altered, err
}

// events calls fn with each event of long work, until that returns false or one tells of an error.
func (c *Client) events(ctx context.Context, q request, progress func(Progress), fn func(Event) bool) error {
	return c.lines(ctx, q, func(line []byte) (bool, error) {
		var e Event
		switch err := json.Unmarshal(line, &e); {
		case err != nil:
			return false, c.badLine(err)
		case e.Error != nil:
			return false, e.Error
		case e.Progress != nil && progress != nil:
			progress(*e.Progress)
		}
		return fn(e), nil
	})
}

// cutOff says that an answer ended before its end.
func (c *Client) cutOff() error {
	return &Error{Kind: KindBroken, Message: fmt.Sprintf("the answer of the sheep at %s was cut off", c.address), Hint: "see whether it is still running, and try again"}
}

// Objects calls fn for the objects that hold bytes of a range of a volume, until it
// returns an error. length < 0: to the end.
func (c *Client) Objects(ctx context.Context, name, snapshot string, off, length int64, fn func(Object) error) error {
	path, err := vdiPath(name, "objects")
	if err != nil {
		return err
	}
	return c.lines(ctx, request{method: http.MethodGet, path: path, query: rangeOf(snapshot, off, length)}, func(line []byte) (bool, error) {
		var o Object
		if err := json.Unmarshal(line, &o); err != nil {
			return false, c.badLine(err)
		}
		if o.Error != nil {
			return false, o.Error
		}
		return true, fn(o)
	})
}

// Diff calls fn for the extents in which to (a tag or number; "": the VDI itself) differs
// from from ("": nothing), until it returns an error.
func (c *Client) Diff(ctx context.Context, name, from, to string, fn func(Extent) error) error {
	path, err := vdiPath(name, "diff")
	if err != nil {
		return err
	}
	return c.lines(ctx, request{method: http.MethodGet, path: path, query: values("from", from, "to", to)}, func(line []byte) (bool, error) {
		var x Extent
		if err := json.Unmarshal(line, &x); err != nil {
			return false, c.badLine(err)
		}
		if x.Error != nil {
			return false, x.Error
		}
		return true, fn(x)
	})
}

func rangeOf(snapshot string, off, length int64) url.Values {
	q := values("snapshot", snapshot)
	if off != 0 {
		q.Set("offset", strconv.FormatInt(off, 10))
	}
	if length >= 0 {
		q.Set("length", strconv.FormatInt(length, 10))
	}
	return q
}

// Read returns content of a volume; length < 0: to the end. The caller closes it. An error
// of the server's comes out of the reader's Read.
func (c *Client) Read(ctx context.Context, name, snapshot string, off, length int64) (io.ReadCloser, error) {
	return c.download(ctx, name, "data", rangeOf(snapshot, off, length))
}

// Write stores r, to its end, at an offset of a VDI. What it says was written is durable.
// length is that of r, or < 0 if not known.
func (c *Client) Write(ctx context.Context, name string, off int64, r io.Reader, length int64) (w Written, err error) {
	return w, c.uploadTo(ctx, name, "data", rangeOf("", off, -1), TypeBytes, r, length, &w)
}

// Export returns the stream of extents of a volume, for an ExtentReader. The caller closes
// it.
func (c *Client) Export(ctx context.Context, name, snapshot string) (io.ReadCloser, error) {
	return c.download(ctx, name, "extents", values("snapshot", snapshot))
}

// ImportOptions say what Import does beside importing.
type ImportOptions struct {
	Create     bool // make the VDI; it is deleted again if the import fails
	ObjectSize int64
	Copies     int
}

// Import writes a stream of extents, as an ExtentWriter makes it, into a VDI. What it says
// was written is durable.
func (c *Client) Import(ctx context.Context, name string, o ImportOptions, r io.Reader) (w Written, err error) {
	q := url.Values{}
	if o.Create {
		q.Set("create", "true")
	}
	if o.ObjectSize != 0 {
		q.Set("object_size", strconv.FormatInt(o.ObjectSize, 10))
	}
	if o.Copies != 0 {
		q.Set("copies", strconv.Itoa(o.Copies))
	}
	return w, c.uploadTo(ctx, name, "extents", q, TypeExtents, r, -1, &w)
}

// Backup returns a backup of a snapshot, or with from what of it differs from that
// snapshot. The caller closes it.
func (c *Client) Backup(ctx context.Context, name, snapshot, from string) (io.ReadCloser, error) {
	return c.download(ctx, name, "backup", values("snapshot", snapshot, "from", from))
}

// Restore reads a backup into a VDI.
func (c *Client) Restore(ctx context.Context, name string, r io.Reader) (v VDI, err error) {
	return v, c.uploadTo(ctx, name, "restore", nil, TypeBytes, r, -1, &v)
}

func (c *Client) uploadTo(ctx context.Context, name, what string, query url.Values, kind string, r io.Reader, length int64, v any) error {
	path, err := vdiPath(name, what)
	if err != nil {
		return err
	}
	body := &gate{r: r} // the transport may go on reading after an early answer
	defer body.close()
	resp, err := c.send(ctx, request{method: http.MethodPut, path: path, query: query, kind: kind, body: body, length: length, upload: true})
	if err != nil {
		if failed := body.failure(); failed != nil {
			return failed // the source broke, not the connection
		}
		return err
	}
	return c.answer(ctx, resp, v)
}

func (c *Client) download(ctx context.Context, name, what string, query url.Values) (io.ReadCloser, error) {
	path, err := vdiPath(name, what)
	if err != nil {
		return nil, err
	}
	resp, err := c.send(ctx, request{method: http.MethodGet, path: path, query: query, trailers: true})
	if err != nil {
		return nil, err
	}
	return &downloadBody{c: c, ctx: ctx, resp: resp}, nil
}

// downloadBody looks for the error in the trailer.
type downloadBody struct {
	c    *Client
	ctx  context.Context
	resp *http.Response
}

// Read implements io.Reader.
func (d *downloadBody) Read(p []byte) (int, error) {
	n, err := d.resp.Body.Read(p)
	switch {
	case err == io.EOF:
		if text := d.resp.Trailer.Get(ErrorTrailer); text != "" {
			e := new(Error)
			if json.Unmarshal([]byte(text), e) != nil || e.Kind == "" {
				return n, d.c.cutOff()
			}
			return n, e
		}
	case err != nil:
		err = d.c.explain(d.ctx, err)
	}
	return n, err
}

// Close implements io.Closer.
func (d *downloadBody) Close() error { return d.resp.Body.Close() }
