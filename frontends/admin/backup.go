package admin

import (
	"errors"
	"io"

	"sheepdog/frontends/admin/api"
	"sheepdog/vdi"
)

// diff lists extents that differ.
func (c *call) diff() error {
	ctx, release, err := c.s.transfer(c.r.Context())
	if err != nil {
		return err
	}
	defer release()
	l := c.lines()
	var failed error
	err = c.s.cfg.Volumes.Diff(ctx, c.name(), c.query("from"), c.query("to"), func(e vdi.Extent) bool {
		failed = l.write(api.Extent{Off: e.Off, Len: e.Len, Zero: e.Zero})
		return failed == nil
	})
	return l.end(cause(ctx, errors.Join(failed, err)), func(e *api.Error) any { return api.Extent{Error: e} })
}

// backup answers with a backup of a snapshot.
func (c *call) backup() error {
	ctx, release, err := c.s.transfer(c.r.Context())
	if err != nil {
		return err
	}
	defer release()
	d := c.download(api.TypeBytes)
	return d.end(cause(ctx, c.s.cfg.Volumes.Backup(ctx, c.name(), c.query("from"), c.query("snapshot"), d, nil)))
}

// restore reads a backup into a VDI.
func (c *call) restore() (any, error) {
	ctx, release, err := c.s.transfer(c.r.Context())
	if err != nil {
		return nil, err
	}
	defer release()
	body := c.upload()
	defer body.end()
	broken := &brokenReader{r: until(ctx, body)}
	v, err := c.s.cfg.Volumes.Restore(ctx, c.name(), broken, nil)
	if err != nil && broken.err != nil {
		return nil, c.uploadError(ctx, "restore", broken.err)
	}
	return described(v, cause(ctx, err))
}

// brokenReader remembers why reading failed.
type brokenReader struct {
	r   io.Reader
	err error
}

// Read implements io.Reader.
func (b *brokenReader) Read(p []byte) (int, error) {
	n, err := b.r.Read(p)
	if err != nil && err != io.EOF {
		b.err = err
	}
	return n, err
}
