package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"sheepdog/frontends/admin"
	"sheepdog/frontends/admin/api"
	"sheepdog/storage/disk"
	"sheepdog/storage/object"
)

// scrub reads all that this node has, and with repair heals what is corrupt of it and this
// node is the primary of; the comparison of replicas does the rest.
func (d *daemon) scrub(ctx context.Context, repair bool) error {
	if d.store == nil {
		return nil
	}
	err := d.store.Scrub(ctx)
	if !repair || err != nil && !errors.Is(err, object.ErrCorrupt) {
		return err
	}
	for _, s := range d.store.Status().Disks {
		for _, c := range s.Corrupt {
			if err := d.node.Heal(ctx, c.Key, c.Blocks); err != nil {
				d.log.Warn("corrupt content stays as it is", "err", err)
			}
		}
	}
	return nil
}

// plugs adds disks while the daemon runs.
type plugs struct{ *daemon }

var _ admin.Plugs = plugs{}

// Plug implements admin.Plugs.
func (p plugs) Plug(ctx context.Context, path string) (api.Disk, error) {
	switch {
	case p.store == nil:
		return api.Disk{}, &api.Error{Kind: api.KindInvalid, Message: "this node is a gateway: it was started without disks", Hint: "put the disk into node.disks and start it anew"}
	case !filepath.IsAbs(path):
		return api.Disk{}, &api.Error{Kind: api.KindInvalid, Message: fmt.Sprintf("add disk %s: it is no absolute path", path)}
	}
	fsys, err := disk.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return api.Disk{}, &api.Error{Kind: api.KindNotFound, Message: fmt.Sprintf("add disk: %v", err), Hint: "mount or make the directory on the node first"}
	}
	if err != nil {
		return api.Disk{}, err
	}
	s, err := p.store.Plug(fsys)
	if err != nil {
		return api.Disk{}, err
	}
	d := describeDisk(s)
	if err := p.node.SetDisks(ctx, p.weights()); err != nil {
		return d, fmt.Errorf("disk %s is in use, but the cluster does not know of it yet and gives the node no more data: add it to node.disks, which tells it at the next start: %w", path, operation(err))
	}
	return d, nil
}

// Unplug implements admin.Plugs: what a disk holds is other nodes' to make anew, and the node
// must not count as one that has it meanwhile, so it is done by draining the node.
func (p plugs) Unplug(_ context.Context, name string) (api.Disk, error) {
	if p.store != nil {
		for _, s := range p.store.Status().Disks {
			if s.ID == name || s.Dir == name {
				return api.Disk{}, &api.Error{
					Kind: api.KindUnsupported, Message: fmt.Sprintf("disk %s cannot be taken out while the node runs", s.Dir),
					Hint: fmt.Sprintf(`"dog node drain %s --wait", stop the node, take the disk out of node.disks, start the node, "dog node undrain %[1]s"`, p.conf.Node.Name),
				}
			}
		}
	}
	return api.Disk{}, &api.Error{Kind: api.KindNotFound, Message: fmt.Sprintf("there is no disk %s", name), Hint: `"dog node md info" shows the disks`}
}
