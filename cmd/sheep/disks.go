package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"sheepdog/cluster/state"
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

// disksEvery is how often it is looked whether a disk has failed.
const disksEvery = 2 * time.Second

// watchDisks tells the cluster when disks have failed: they count no more where data is placed.
func (d *daemon) watchDisks(ctx context.Context) {
	t := time.NewTicker(disksEvery)
	defer t.Stop()
	told := failedOf(d.weights()) // the cluster hears of those at the start
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		w := d.weights()
		now := failedOf(w)
		if now == told {
			continue
		}
		if err := d.node.SetDisks(ctx, w); err != nil {
			d.log.Debug("the cluster could not be told that a disk has failed", "err", err) // soon again
			continue
		}
		d.log.Info("disks that have failed get no more data", "disks", now)
		told = now
	}
}

// failedOf names the disks that count for nothing.
func failedOf(disks []state.Disk) string {
	var ids []string
	for _, s := range disks {
		if s.Weight == 0 {
			ids = append(ids, s.ID)
		}
	}
	return strings.Join(ids, " ")
}

// plugs adds disks while the daemon runs.
type plugs struct{ *daemon }

var _ admin.Plugs = plugs{}

// Plug implements admin.Plugs.
func (p plugs) Plug(ctx context.Context, path string, empty bool) (api.Disk, error) {
	switch {
	case p.store == nil:
		return api.Disk{}, &api.Error{Kind: api.KindInvalid, Message: "this node is a gateway: it was started without disks", Hint: "put the disk into node.disks and start it anew"}
	case !filepath.IsAbs(path):
		return api.Disk{}, &api.Error{Kind: api.KindInvalid, Message: fmt.Sprintf("add disk %s: it is no absolute path", path)}
	case empty && p.node.Absent()[p.conf.Node.Name] > 0:
		return api.Disk{}, &api.Error{
			Kind: api.KindBusy, Message: fmt.Sprintf("empty disk %s: %d partitions are only on a disk of this node that is missing, which this one may be", path, p.node.Absent()[p.conf.Node.Name]),
			Hint: `put it into node.disks and start the node anew; if what it holds is not wanted, "dog node give-up" says so`,
		}
	}
	fsys, err := disk.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return api.Disk{}, &api.Error{Kind: api.KindNotFound, Message: fmt.Sprintf("add disk: %v", err), Hint: "mount or make the directory on the node first"}
	}
	if err != nil {
		return api.Disk{}, err
	}
	plug := p.store.Plug
	if empty {
		plug = p.store.Reuse
	}
	s, err := plug(fsys)
	if err != nil {
		return api.Disk{}, err
	}
	d := describeDisk(s)
	if err := p.node.SetDisks(ctx, p.weights()); err != nil {
		return d, fmt.Errorf("disk %s is in use, but the cluster does not know of it yet and gives the node no more data: add it to node.disks, which tells it at the next start: %w", path, operation(err))
	}
	return d, nil
}

// Unplug implements admin.Plugs. The disk works until other nodes have what it has, or this
// one has it on another disk; nothing that only this node has is put at risk.
func (p plugs) Unplug(ctx context.Context, name string) (api.Disk, error) {
	disk, err := p.diskNamed(name)
	if err != nil {
		return disk, err
	}
	if rel, err := filepath.Rel(disk.Path, p.conf.Node.StateDir); err == nil && !strings.HasPrefix(rel, "..") {
		return disk, &api.Error{
			Kind: api.KindBusy, Message: fmt.Sprintf("take out disk %s: node.state_dir, %s, is on it", disk.Path, p.conf.Node.StateDir),
			Hint: "stop the node, move that directory, set node.state_dir to its new place, and start the node again",
		}
	}
	held, err := p.store.Held(disk.ID)
	if err != nil {
		return disk, err
	}
	if n := p.node.OnlyHere(held); n > 0 {
		return disk, &api.Error{
			Kind: api.KindBusy, Message: fmt.Sprintf("take out disk %s: this node alone has %d of the partitions on it", disk.Path, n),
			Hint: `wait until others have them, see "dog node recovery", or drain the node, stop it, take the disk out of node.disks, and start it again`,
		}
	}
	if err := p.store.Retire(disk.ID, true); err != nil {
		return disk, err
	}
	if err := p.emptied(ctx, disk.ID); err != nil {
		return disk, errors.Join(&api.Error{Kind: api.KindBusy, Message: fmt.Sprintf("take out disk %s: the node still counts as one that has what is on it: %v", disk.Path, err), Hint: "try again"},
			p.store.Retire(disk.ID, false))
	}
	if err := p.store.Unplug(disk.ID); err != nil {
		p.log.Warn("a disk that was taken out could not be closed properly", "disk", disk.Path, "err", err)
	}
	if err := p.node.SetDisks(ctx, p.weights()); err != nil {
		return disk, fmt.Errorf("disk %s is out, but the cluster does not know that yet: take it out of node.disks, which tells it at the next start: %w", disk.Path, operation(err))
	}
	return disk, nil
}

func (p plugs) diskNamed(name string) (api.Disk, error) {
	for _, d := range p.disks() {
		if d.ID == name || d.Path == name {
			return d, nil
		}
	}
	return api.Disk{}, &api.Error{Kind: api.KindNotFound, Message: fmt.Sprintf("there is no disk %s", name), Hint: `"dog node md info" shows the disks`}
}

const (
	// emptiedTimeout bounds how long a disk waits for others to have what is on it.
	emptiedTimeout = 40 * time.Second
	emptiedEvery   = 100 * time.Millisecond
)

// emptied waits until this node counts as having nothing of what lives on a disk.
func (p plugs) emptied(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, emptiedTimeout)
	defer cancel()
	for {
		held, err := p.store.Held(id)
		if err != nil {
			return err
		}
		n := p.node.Holding(held)
		if n == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%d partitions: %w", n, ctx.Err())
		case <-time.After(emptiedEvery):
		}
	}
}
