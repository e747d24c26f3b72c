package admin

import (
	"strconv"

	"sheepdog/frontends/admin/api"
	"sheepdog/storage/object"
	"sheepdog/vdi"
)

// describe gives a volume in the API's words.
func describe(i vdi.Info) api.VDI {
	v := api.VDI{
		Name: i.Name, Snapshot: i.Snapshot, Tag: i.Tag, SnapshotID: i.SnapshotID, VID: i.VID.String(), Size: i.Size, ObjectSize: i.ObjectSize,
		Policy: int(i.Policy), Copies: i.Copies, Created: i.Created.UTC(), Identity: i.Identity, State: i.State,
		Used: i.Used, Shared: i.Shared, Exact: i.Exact, Known: i.Known,
		Owner: i.Owner, Generation: i.Generation, Openers: i.Openers, Attributes: i.Attributes,
	}
	if i.Parent != 0 {
		v.Parent = i.Parent.String()
	}
	if i.Snapped != nil {
		t := i.Snapped.UTC()
		v.Snapped = &t
	}
	if i.Lock != nil {
		l := lockOf(*i.Lock)
		v.Lock = &l
	}
	return v
}

func lockOf(l vdi.LockInfo) api.Lock {
	return api.Lock{Name: l.Name, Holder: l.Holder, Node: l.Node, Since: l.Since.UTC()}
}

// snapshotName is how a snapshot is called: by its tag, or by its number; "" for a VDI.
func snapshotName(i vdi.Info) string {
	switch {
	case !i.Snapshot:
		return ""
	case i.Tag != "":
		return i.Tag
	}
	return strconv.FormatUint(uint64(i.SnapshotID), 10)
}

func described(i vdi.Info, err error) (any, error) {
	if err != nil {
		return nil, err
	}
	return describe(i), nil
}

func (c *call) list() (any, error) {
	all, err := c.s.cfg.Volumes.List(c.r.Context())
	if err != nil {
		return nil, err
	}
	name := c.query("name")
	list := []api.VDI{}
	for _, i := range all {
		if name == "" || i.Name == name {
			list = append(list, describe(i))
		}
	}
	if name != "" && len(list) == 0 {
		return nil, refuse(api.KindNotFound, "there is no VDI %.300q", name)
	}
	return list, nil
}

func (c *call) create() (any, error) {
	var q api.CreateRequest
	if err := c.body(&q); err != nil {
		return nil, err
	}
	shift, err := shiftOf(q.ObjectSize)
	if err != nil {
		return nil, err
	}
	return described(c.s.cfg.Volumes.Create(c.r.Context(), vdi.CreateOptions{
		Name: q.Name, Size: q.Size, ObjectSizeShift: shift, Copies: q.Copies, Preallocate: q.Preallocate,
	}))
}

func (c *call) info() (any, error) {
	return described(c.s.cfg.Volumes.Info(c.r.Context(), c.name(), c.query("snapshot")))
}

func (c *call) remove() (any, error) {
	if c.r.URL.Query().Has("snapshot") && c.query("snapshot") == "" {
		// A script whose variable is empty means a snapshot, not the VDI.
		return nil, refuse(api.KindInvalid, "the parameter \"snapshot\" is empty")
	}
	return nil, c.s.cfg.Volumes.Delete(c.r.Context(), c.name(), c.query("snapshot"))
}

func (c *call) resize() (any, error) {
	var q api.ResizeRequest
	if err := c.body(&q); err != nil {
		return nil, err
	}
	return described(c.s.cfg.Volumes.Resize(c.r.Context(), c.name(), q.Size))
}

func (c *call) snapshot() (any, error) {
	var q api.SnapshotRequest
	if err := c.body(&q); err != nil {
		return nil, err
	}
	return described(c.s.cfg.Volumes.Snapshot(c.r.Context(), c.name(), q.Tag))
}

func (c *call) clone() (any, error) {
	var q api.CloneRequest
	if err := c.body(&q); err != nil {
		return nil, err
	}
	if q.Snapshot == "" {
		return nil, refuse(api.KindInvalid, "a clone is made of a snapshot, and none is named").withHint(`take one with "dog vdi snapshot" and name it`)
	}
	return described(c.s.cfg.Volumes.Clone(c.r.Context(), c.name(), q.Snapshot, q.Name))
}

func (c *call) rollback() (any, error) {
	var q api.RollbackRequest
	if err := c.body(&q); err != nil {
		return nil, err
	}
	if q.Snapshot == "" {
		return nil, refuse(api.KindInvalid, "no snapshot is named to roll back to")
	}
	return described(c.s.cfg.Volumes.Rollback(c.r.Context(), c.name(), q.Snapshot))
}

func (c *call) attributes() (any, error) {
	return c.s.cfg.Volumes.ListAttr(c.r.Context(), c.name())
}

const attributeHint = `"dog vdi list" shows which VDIs there are, "dog vdi getattr NAME" their attributes`

func (c *call) attribute() (any, error) {
	value, err := c.s.cfg.Volumes.GetAttr(c.r.Context(), c.name(), c.r.PathValue("key"))
	if err != nil {
		return nil, hinted(err, api.KindNotFound, attributeHint)
	}
	return api.Attribute{Value: value}, nil
}

func (c *call) setAttribute() (any, error) {
	var q api.Attribute
	if err := c.body(&q); err != nil {
		return nil, err
	}
	return nil, c.s.cfg.Volumes.SetAttr(c.r.Context(), c.name(), c.r.PathValue("key"), q.Value)
}

func (c *call) removeAttribute() (any, error) {
	return nil, hinted(c.s.cfg.Volumes.DelAttr(c.r.Context(), c.name(), c.r.PathValue("key")), api.KindNotFound, attributeHint)
}

func (c *call) locks() (any, error) {
	all, err := c.s.cfg.Volumes.Locks(c.r.Context())
	if err != nil {
		return nil, err
	}
	list := make([]api.Lock, len(all))
	for i, l := range all {
		list[i] = lockOf(l)
	}
	return list, nil
}

func (c *call) lock() (any, error) {
	var q api.LockRequest
	if err := c.body(&q); err != nil {
		return nil, err
	}
	if q.Holder == "" {
		return nil, refuse(api.KindInvalid, "a lock needs the name of its holder")
	}
	return nil, c.s.cfg.Volumes.Lock(c.r.Context(), c.name(), q.Holder)
}

func (c *call) unlock() (any, error) {
	return nil, hinted(c.s.cfg.Volumes.Unlock(c.r.Context(), c.name(), c.query("holder")), api.KindNotFound,
		`"dog vdi lock list" shows which VDIs are locked`)
}

// objects lists the objects of a volume that hold bytes of a range.
func (c *call) objects() error {
	v, err := c.s.cfg.Volumes.Info(c.r.Context(), c.name(), c.query("snapshot"))
	if err != nil {
		return err
	}
	off, n, err := c.byteRange(v.Size)
	if err != nil {
		return err
	}
	first, end := uint64(off/v.ObjectSize), uint64((off+n+v.ObjectSize-1)/v.ObjectSize)
	lines := c.lines()
	var failed error
	err = c.s.cfg.Volumes.Objects(c.r.Context(), c.name(), c.query("snapshot"), func(o vdi.ObjectInfo) bool {
		index := uint64(o.Index)
		if index < first || n == 0 {
			return n != 0
		}
		if index >= end {
			return false
		}
		failed = c.object(lines, v.ObjectSize, o)
		return failed == nil
	})
	if failed != nil {
		err = failed
	}
	return lines.end(err, func(e *api.Error) any { return api.Object{Error: e} })
}

func (c *call) object(lines *lines, objectSize int64, o vdi.ObjectInfo) error {
	at, err := c.s.cfg.Cluster.Locate(o.Policy, o.ID)
	if err != nil {
		return err
	}
	line := api.Object{
		Index: o.Index, Off: int64(o.Index) * objectSize, Object: o.ID.String(), Owner: object.VID(o.Owner).String(),
		Allocated: o.Allocated, Missing: o.Missing, Partition: at.Partition, Nodes: orEmpty(at.Nodes),
	}
	if len(at.Nodes) > 0 {
		line.Primary = at.Nodes[0]
	}
	return lines.write(line)
}

// byteRange reads the parameters of a range and fits them into a size.
func (c *call) byteRange(size int64) (off, n int64, err error) {
	if off, err = c.number("offset", 0); err != nil {
		return 0, 0, err
	}
	if off > size {
		return 0, 0, refuse(api.KindInvalid, "offset %d is beyond the end: %q has %d bytes", off, c.name(), size)
	}
	if n, err = c.number("length", size-off); err != nil {
		return 0, 0, err
	}
	if n > size-off {
		return 0, 0, refuse(api.KindInvalid, "%d bytes at %d go beyond the end: %q has %d bytes", n, off, c.name(), size)
	}
	return off, n, nil
}
