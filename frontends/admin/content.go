package admin

import (
	"context"
	"errors"
	"fmt"
	"io"

	"sheepdog/frontends/admin/api"
	"sheepdog/vdi"
)

// read answers with bytes of a volume.
func (c *call) read() error {
	ctx, release, err := c.s.transfer(c.r.Context())
	if err != nil {
		return err
	}
	defer release()
	vol, err := c.s.cfg.Volumes.Open(ctx, c.name(), c.query("snapshot"), vdi.OpenOptions{ReadOnly: true, Client: c.clientName("read")})
	if err != nil {
		return err
	}
	defer vol.Close()
	off, n, err := c.byteRange(vol.Size())
	if err != nil {
		return err
	}
	d := c.download(api.TypeBytes)
	return d.end(cause(ctx, copyOut(ctx, vol, off, n, rawSink{d})))
}

// write stores bytes in a volume.
func (c *call) write() (any, error) {
	off, err := c.number("offset", 0)
	if err != nil {
		return nil, err
	}
	ctx, release, err := c.s.transfer(c.r.Context())
	if err != nil {
		return nil, err
	}
	defer release()
	vol, err := c.openForWriting(ctx, "write")
	if err != nil {
		return nil, err
	}
	defer vol.Close()
	room := vol.Size() - off
	if room < 0 || c.r.ContentLength > room {
		return nil, beyond(c.name(), vol.Size(), off, c.r.ContentLength)
	}
	body := c.upload()
	defer body.end()
	f := &inflow{flow: flow{vol: vol}}
	broken := &brokenReader{r: until(ctx, body)}
	_, err = f.copyIn(io.LimitReader(broken, room), off, -1)
	if err == nil {
		err = broken.err // which may be io.ErrUnexpectedEOF: no end of the content
	}
	if err == nil {
		err = atEnd(body, c.name(), vol.Size())
	}
	if err = errors.Join(err, f.finish(ctx)); err != nil {
		return nil, c.uploadError(ctx, "write", err)
	}
	return api.Written{Bytes: f.bytes}, nil
}

func (c *call) openForWriting(ctx context.Context, what string) (*vdi.Volume, error) {
	vol, err := c.s.cfg.Volumes.Open(ctx, c.name(), "", vdi.OpenOptions{Client: c.clientName(what)})
	if err == nil && vol.ReadOnly() {
		err = errors.Join(fmt.Errorf("%s %q: %w", what, c.name(), vdi.ErrReadOnly), vol.Close())
	}
	return vol, err
}

func beyond(name string, size, off, n int64) error {
	const hint = `"dog vdi resize" makes the VDI larger`
	if n < 0 {
		return refuse(api.KindInvalid, "offset %d is beyond the end: %q has %d bytes", off, name, size).withHint(hint)
	}
	return refuse(api.KindInvalid, "%d bytes at %d go beyond the end: %q has %d bytes", n, off, name, size).withHint(hint)
}

// atEnd fails if there is more in a body than has room.
func atEnd(body io.Reader, name string, size int64) error {
	var b [1]byte
	switch n, err := io.ReadFull(body, b[:]); {
	case n > 0:
		return refuse(api.KindInvalid, "there is more than fits: %q ends at %d bytes; what fits was written", name, size).
			withHint(`"dog vdi resize" makes the VDI larger`)
	case err != io.EOF:
		return err
	}
	return nil
}

// untilReader fails when a context has ended.
type untilReader struct {
	ctx context.Context
	r   io.Reader
}

func until(ctx context.Context, r io.Reader) io.Reader { return untilReader{ctx, r} }

// Read implements io.Reader.
func (u untilReader) Read(p []byte) (int, error) {
	if u.ctx.Err() != nil {
		return 0, context.Cause(u.ctx)
	}
	return u.r.Read(p)
}

// uploadError says what broke an upload: the volume, or the client.
func (c *call) uploadError(ctx context.Context, what string, err error) error {
	err = fmt.Errorf("%s %q: %w", what, c.name(), cause(ctx, err))
	if errorOf(err).Kind == api.KindInternal { // of no kind of ours: it is the connection's
		return refuse(api.KindInvalid, "%v: the upload broke off", err)
	}
	return err
}

// export answers with a stream of extents.
func (c *call) export() error {
	ctx, release, err := c.s.transfer(c.r.Context())
	if err != nil {
		return err
	}
	defer release()
	vol, err := c.s.cfg.Volumes.Open(ctx, c.name(), c.query("snapshot"), vdi.OpenOptions{ReadOnly: true, Client: c.clientName("export")})
	if err != nil {
		return err
	}
	defer vol.Close()
	d := c.download(api.TypeExtents)
	w, err := api.NewExtentWriter(d, vol.Size())
	if err != nil {
		return err
	}
	if err = copyOut(ctx, vol, 0, vol.Size(), w); err == nil {
		return d.end(w.Close(vol.Size()))
	}
	err = cause(ctx, err)
	c.s.log.Warn("export failed", "vdi", c.name(), "error", err)
	return d.end(w.Fail(errorOf(err))) // the stream says it by itself
}

// load writes a stream of extents into a VDI.
func (c *call) load() (any, error) {
	create, err := c.flag("create")
	if err != nil {
		return nil, err
	}
	ctx, release, err := c.s.transfer(c.r.Context())
	if err != nil {
		return nil, err
	}
	defer release()
	if create {
		// Said before the first byte is read, it reaches the client before it sends any.
		if _, err := c.s.cfg.Volumes.Info(ctx, c.name(), ""); err == nil {
			return nil, refuse(api.KindExists, "create VDI %q: there is a VDI %[1]q already", c.name())
		}
	}
	body := c.upload()
	defer body.end()
	in, err := api.NewExtentReader(until(ctx, body))
	if err != nil {
		return nil, c.uploadError(ctx, "import", err)
	}
	i := &importer{c: c, in: in}
	if create {
		if err := i.create(ctx); err != nil {
			return nil, err
		}
	}
	if err := i.run(ctx); err != nil {
		return nil, errors.Join(c.uploadError(ctx, "import", err), i.undo(context.WithoutCancel(ctx)))
	}
	v, err := c.s.cfg.Volumes.Info(ctx, c.name(), "")
	if err != nil {
		return nil, err
	}
	info := describe(v)
	return api.Written{Bytes: i.bytes, Zeros: i.zeros, VDI: &info}, nil
}
