package main

import (
	"context"
	"fmt"

	"sheepdog/frontends/nbd"
	"sheepdog/vdi"
	"sheepdog/vdi/catalog"
)

// exports is the volumes as NBD sees them.
type exports struct {
	*vdi.Service
	catalog *catalog.Machine
}

var _ nbd.Volumes = (*exports)(nil)

// List implements nbd.Volumes from the catalog alone: what is used is not asked for.
func (e *exports) List(context.Context) ([]nbd.Export, error) {
	var list []nbd.Export
	for _, v := range e.catalog.List() {
		x := nbd.Export{Name: v.Name, Size: v.Size, ReadOnly: v.Snapshot}
		if v.Snapshot {
			if x.Tag = v.Tag; x.Tag == "" {
				x.Tag = fmt.Sprint(v.SnapshotID)
			}
		}
		list = append(list, x)
	}
	return list, nil
}

// Open implements nbd.Volumes.
func (e *exports) Open(ctx context.Context, name, tag, client string) (nbd.Volume, error) {
	v, err := e.Service.Open(ctx, name, tag, vdi.OpenOptions{Client: client})
	if err != nil {
		return nil, err
	}
	return v, nil
}

// Snapshots implements nbd.Volumes.
func (e *exports) Snapshots(ctx context.Context, name, tag string) ([]string, error) {
	list, err := e.Service.Snapshots(ctx, name, tag)
	tags := make([]string, len(list))
	for i, s := range list {
		tags[i] = s.Tag
	}
	return tags, err
}
