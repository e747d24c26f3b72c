package admin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"sheepdog/frontends/admin/api"
	"sheepdog/vdi"
)

// importer writes a stream of extents into a VDI. If it made the VDI itself and the stream
// does not say how large it is, it makes the VDI grow with it.
type importer struct {
	c    *call
	in   *api.ExtentReader
	grow bool
	made *vdi.Info // the VDI that it made; nil: it was there

	flow         *inflow
	bytes, zeros int64
}

// growBytes is the least by which a VDI grows; it also doubles, so that resizing is rare.
const growBytes = 256 << 20

func (i *importer) create(ctx context.Context) error {
	size, err := i.c.number("object_size", 0)
	if err != nil {
		return err
	}
	shift, err := shiftOf(size)
	if err != nil {
		return err
	}
	copies, err := i.c.number("copies", 0)
	if err != nil {
		return err
	}
	if copies > 1<<16 {
		return refuse(api.KindInvalid, "%d copies are too many", copies)
	}
	i.grow = i.in.Size() == api.UnknownSize
	made, err := i.c.s.cfg.Volumes.Create(ctx, vdi.CreateOptions{
		Name: i.c.name(), Size: max(i.in.Size(), 0), ObjectSizeShift: shift, Copies: int(copies),
	})
	i.made = &made
	return err
}

// still fails if the VDI of that name is not the one that was made any more: somebody may have deleted that through another
// node, and made another one.
func (i *importer) still(ctx context.Context) error {
	if i.made == nil {
		return nil
	}
	list, err := i.c.s.cfg.Volumes.List(ctx)
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(list, func(v vdi.Info) bool {
		return !v.Snapshot && v.Name == i.made.Name && v.Created.Equal(i.made.Created)
	}) {
		return fmt.Errorf("%q was deleted meanwhile: %w", i.made.Name, vdi.ErrNotFound)
	}
	return nil
}

// undo deletes the VDI that was made: half a volume is of use to nobody.
func (i *importer) undo(ctx context.Context) error {
	if i.made == nil {
		return nil
	}
	err := i.still(ctx)
	if err == nil {
		err = i.c.s.cfg.Volumes.Delete(ctx, i.made.Name, "")
	}
	if errors.Is(err, vdi.ErrNotFound) {
		return nil // somebody else has done that
	}
	return err
}

func (i *importer) run(ctx context.Context) error {
	if err := i.open(ctx); err != nil {
		return err
	}
	err := i.extents(ctx)
	if err == nil {
		err = i.flow.finish(ctx)
	}
	if err = errors.Join(err, i.close()); err != nil {
		return err
	}
	if i.grow {
		_, err = i.c.s.cfg.Volumes.Resize(ctx, i.c.name(), i.in.Size())
	}
	return err
}

func (i *importer) open(ctx context.Context) error {
	vol, err := i.c.openForWriting(ctx, "import")
	if err != nil {
		return err
	}
	i.flow = &inflow{flow: flow{vol: vol}}
	if err := i.still(ctx); err != nil { // asked when it is open: it is not deleted through this node any more
		return errors.Join(err, vol.Close())
	}
	if !i.grow && i.in.Size() > vol.Size() {
		return errors.Join(beyond(i.c.name(), vol.Size(), 0, i.in.Size()), vol.Close())
	}
	return nil
}

// close gives the volume up, once nothing is in flight.
func (i *importer) close() error {
	err := i.flow.drain()
	i.bytes += i.flow.bytes
	i.zeros += i.flow.zeros
	return errors.Join(err, i.flow.vol.Close())
}

func (i *importer) extents(ctx context.Context) error {
	for {
		x, err := i.in.Next()
		if err == io.EOF {
			return nil
		}
		if err == nil {
			err = i.makeRoom(ctx, x)
		}
		if err != nil {
			return err
		}
		if x.Zero {
			err = i.flow.zero(x.Off, x.Len)
		} else {
			_, err = i.flow.copyIn(i.in, x.Off, x.Len)
		}
		if err != nil {
			return err
		}
	}
}

// makeRoom sees to it that an extent is inside the volume.
func (i *importer) makeRoom(ctx context.Context, x api.Extent) error {
	size := i.flow.vol.Size()
	switch {
	case x.Off+x.Len <= size:
		return nil
	case !i.grow:
		return beyond(i.c.name(), size, x.Off, x.Len)
	}
	// Who has the volume open hears of what may be lost of what was written through that; who opens it later need not.
	if err := errors.Join(i.flow.finish(ctx), i.close()); err != nil {
		return err
	}
	larger := min(max(x.Off+x.Len, 2*size, growBytes), max(x.Off+x.Len, vdi.MaxSize))
	if _, err := i.c.s.cfg.Volumes.Resize(ctx, i.c.name(), larger); err != nil {
		return err
	}
	return i.open(ctx) // a larger size is seen by who opens the VDI again
}
