package main

import (
	"context"
	"errors"

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
