package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"sheepdog/cluster/state"
	"sheepdog/frontends/admin"
	"sheepdog/frontends/admin/api"
	"sheepdog/storage"
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

// watchDisks tells the cluster when disks have failed, or are to be taken out: they count no more
// where data is placed.
func (d *daemon) watchDisks(ctx context.Context) {
	t := time.NewTicker(disksEvery)
	defer t.Stop()
	told := idleOf(d.weights()) // the cluster hears of those at the start
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		now := idleOf(d.weights())
		if now == told {
			continue
		}
		if err := d.tellDisks(ctx); err != nil {
			d.log.Debug("the cluster could not be told that a disk gets no more data", "err", err) // soon again
			continue
		}
		d.log.Info("disks that have failed, or are to be taken out, get no more data", "disks", now)
		told = now
	}
}

// tellDisks tells the cluster which disks the store has, as it is now.
func (d *daemon) tellDisks(ctx context.Context) error {
	d.disksMu.Lock()
	defer d.disksMu.Unlock()
	return d.node.SetDisks(ctx, d.weights())
}

// idleOf names the disks that count for nothing.
func idleOf(disks []state.Disk) string {
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
	p.disksMu.Lock()
	defer p.disksMu.Unlock()
	s, err := plug(fsys, func(s storage.DiskStatus) error {
		if err := p.node.SetDisks(ctx, append(p.weights(), weigh(s))); err != nil {
			return fmt.Errorf("the cluster was not told: %w", operation(err))
		}
		return nil
	})
	if err != nil {
		return api.Disk{}, err
	}
	return describeDisk(s), nil
}

// Unplug implements admin.Plugs. The disk works until this node has what is on it on another disk or, where
// there is no space for that, other nodes have it; nothing that only this node has is put at risk.
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
	if err := p.store.Retire(disk.ID); err != nil {
		return disk, err
	}
	if err := p.empty(ctx, disk); err != nil {
		return disk, err
	}
	// The cluster first: a node that starts without a disk that the cluster does not know to be empty may have lost something.
	p.disksMu.Lock()
	defer p.disksMu.Unlock()
	others := slices.DeleteFunc(p.weights(), func(s state.Disk) bool { return s.ID == disk.ID })
	if err := p.node.SetDisks(ctx, others, disk.ID); err != nil {
		return disk, fmt.Errorf("disk %s has nothing any more, but the cluster does not know that yet: try again before it is taken out: %w", disk.Path, operation(err))
	}
	if err := p.store.Unplug(disk.ID); err != nil {
		p.log.Warn("a disk that was taken out could not be closed properly", "disk", disk.Path, "err", err)
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
	// emptiedTimeout bounds how long who takes out a disk waits for that: it goes on without him.
	emptiedTimeout = 40 * time.Second
	emptiedEvery   = 100 * time.Millisecond
)

// empty waits until nothing lives on a disk any more. What cannot go to the node's other disks has to come from other nodes.
func (p plugs) empty(ctx context.Context, disk api.Disk) error {
	ctx, cancel := context.WithTimeout(ctx, emptiedTimeout)
	defer cancel()
	for released := false; ; {
		held, err := p.store.Held(disk.ID)
		if err != nil {
			return err
		}
		n := p.node.Exist(held)
		if n == 0 {
			return nil
		}
		now, err := p.diskNamed(disk.ID)
		if err != nil {
			return err
		}
		if why := cmp.Or(now.Moves.Waiting, now.Reason); why != "" && !released {
			if only := p.node.OnlyHere(held); only > 0 {
				return &api.Error{
					Kind: api.KindBusy, Message: fmt.Sprintf("take out disk %s: this node alone has %d of the partitions on it, and they cannot go to its other disks: %s", disk.Path, only, why),
					Hint: `make space, or add a disk with "dog node md plug", or wait until other nodes have them, see "dog node recovery"; then try again`,
				}
			}
			if err := p.store.Release(disk.ID); err != nil {
				return err
			}
			released = true
			p.log.Warn("what is on a disk that is taken out has to come from other nodes", "disk", disk.Path, "partitions", n, "reason", why)
		}
		select {
		case <-ctx.Done():
			return &api.Error{
				Kind: api.KindBusy, Message: fmt.Sprintf("take out disk %s: %d partitions are still on it", disk.Path, n),
				Hint: `they leave it in the background, and nothing more comes to it: see "dog node md info", and try again`,
			}
		case <-time.After(emptiedEvery):
		}
	}
}
