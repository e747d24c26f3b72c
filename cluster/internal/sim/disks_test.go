package sim

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"syscall"
	"time"

	"sheepdog/cluster/state"
	"sheepdog/storage"
	"sheepdog/storage/disk"
	"sheepdog/storage/disk/disktest"
	"sheepdog/storage/object"
)

// Disks of a node: some nodes have several, which fail while they are at work, or are taken out. What was there gets another place on
// the node, with nothing, and is learned anew. A disk that has failed is replaced by an empty one, or left out, when its node starts
// the next time. As with rot, a disk goes only where others in sync are well, and until the node is in sync no more
// with what was there nothing happens that would take those.

// newDisk makes an empty disk with an id of its own that the seed decides: where partitions live follows from that.
func (n *node) newDisk() *disktest.Disk {
	n.made++
	d := disktest.New(fmt.Sprint(n.name, "-", n.made))
	b, err := json.Marshal(map[string]any{"format": 1, "node": n.name, "cluster": "sim", "disk": d.String()})
	f, failed := d.OpenFile("sheep.json", disk.Create)
	if err == nil && failed == nil {
		_, failed = f.WriteAt(b, 0)
	}
	if err := errors.Join(err, failed, f.Sync(), f.Close(), d.SyncDir(".")); err != nil {
		n.w.fail("%s: new disk: %v", n.name, err)
	}
	return d
}

// equip gives a node its disks.
func (n *node) equip() {
	count := 1
	if n.w.faults[faultDisk] > 0 {
		count += n.w.rng.IntN(3)
	}
	for range count {
		n.disks = append(n.disks, n.newDisk())
	}
}

// replace takes out what has failed, before a node starts. Others are put in for some of that, and if the node had none for its partitions.
func (n *node) replace() {
	had := len(n.disks)
	n.disks = slices.DeleteFunc(n.disks, func(d *disktest.Disk) bool { return n.bad[d.String()] })
	clear(n.bad)
	for range had - len(n.disks) {
		if n.w.chance(0.5) {
			n.disks = append(n.disks, n.newDisk())
		}
	}
	if !n.equipped() {
		n.disks = append(n.disks, n.newDisk())
	}
}

// equipped reports whether a disk of the node works and is not to be taken out.
func (n *node) equipped() bool {
	return slices.ContainsFunc(n.disks, func(d *disktest.Disk) bool { return !n.bad[d.String()] && !n.leaving[d.String()] })
}

// exchange starts a node anew that has no disk for its partitions, when nobody counts on it any more: it gets one.
func (n *node) exchange() {
	w := n.w
	if w.ended || n.gateway || !n.running() || n.equipped() {
		return
	}
	for _, p := range w.oracle.View().Policies[0].Partitions {
		if slices.Contains(p.ISR, n.id) || slices.Contains(p.Waiting, n.id) {
			w.after(second/2, n.exchange)
			return
		}
	}
	n.kill(false)
	w.after(w.between(100*ms, second), n.revive)
}

// disks is what the node says of its disks, as cmd/sheep does.
func (l *life) disks() (list []state.Disk) {
	for _, d := range l.store.Status().Disks {
		w := uint64(1 << 20)
		if d.State == storage.StateFailed || d.Retired {
			w = 0
		}
		list = append(list, state.Disk{ID: d.ID, Weight: w})
	}
	return list
}

// held says what the node has if it lacks a disk, as package cluster does when it starts.
func (l *life) held(a *state.Announce) {
	m := l.known().NodeByName(l.n.name)
	if m == nil || !m.Lacks(a.Disks) {
		return
	}
	a.Partial = true
	groups, err := l.store.Groups(context.Background())
	if err != nil {
		l.n.w.fail("%s: %v", l.n.name, err)
	}
	for g := range l.store.Marks() {
		if !slices.Contains(groups, g) {
			groups = append(groups, g)
		}
	}
	slices.SortFunc(groups, func(a, b object.Group) int { return cmp.Compare(a.Partition, b.Partition) })
	a.Held = groups
}

// watchDisks tells the cluster of disks that count no more, and takes out those that are to be.
func (l *life) watchDisks() {
	w := l.n.w
	if l.over || l.store == nil {
		return
	}
	w.after(w.between(second/2, 2*second), l.watchDisks)
	if l.n.hung {
		return
	}
	var idle []string
	weightless := func(list []state.Disk) []string {
		var ids []string
		for _, d := range list {
			if d.Weight == 0 {
				ids = append(ids, d.ID)
			}
		}
		return ids
	}
	if m := l.known().Node(l.n.id); m != nil && m.Incarnation == l.inc {
		idle = weightless(m.Disks)
	}
	if now := weightless(l.disks()); !slices.Equal(now, idle) {
		l.setDisks(l.disks(), nil, func() {})
	}
	for _, d := range l.store.Status().Disks {
		if d.Retired {
			l.unplug(d.ID)
		}
	}
}

func (l *life) setDisks(disks []state.Disk, emptied []string, then func()) {
	c := state.Command{SetDisks: &state.SetDisks{Node: l.n.id, Incarnation: l.inc, Disks: disks, Emptied: emptied}}
	l.tell(func(g *reign) {
		g.command(c, func(_ state.Result, err error) {
			if err == nil {
				g.l.n.w.control(g.l.n, l.n, then)
				if g.l == l {
					then()
				}
			}
		})
	})
}

// unplug takes a disk out when nothing lives on it any more, and the cluster knows that.
func (l *life) unplug(id string) {
	held, err := l.store.Held(id)
	if err != nil {
		return
	}
	parts := len(l.known().Policies[0].Partitions)
	if held = slices.DeleteFunc(held, func(g object.Group) bool { return int(g.Partition) >= parts }); len(held) > 0 {
		if l.n.w.chance(0.5) && l.n.mayLose() {
			_ = l.store.Release(id)
		}
		return
	}
	rest := slices.DeleteFunc(l.disks(), func(d state.Disk) bool { return d.ID == id })
	l.setDisks(rest, []string{id}, func() {
		if held, err := l.store.Held(id); l.over || err != nil || len(held) > 0 {
			return
		}
		if err := l.store.Unplug(id); err == nil {
			l.n.w.logf("%s: disk %s is taken out", l.n.name, id)
			l.n.w.happened("disk taken out")
			l.n.disks = slices.DeleteFunc(l.n.disks, func(d *disktest.Disk) bool { return d.String() == id })
		}
	})
}

// mayLose reports whether others that are well have all that a node is in sync with.
func (n *node) mayLose() bool {
	v := n.w.oracle.View()
	if n.w.recovering() || n.w.ailing() {
		return false
	}
	for _, p := range v.Policies[0].Partitions {
		if slices.Contains(p.Waiting, n.id) {
			return false
		}
		if slices.Contains(p.ISR, n.id) && !slices.ContainsFunc(p.ISR, func(id nodeID) bool {
			o := n.w.nodes[id-1]
			return id != n.id && o.running() && !o.crashing && !o.apart && !o.mute && v.Node(id).Incarnation == o.life.inc && v.Node(id).State == up
		}) {
			return false
		}
	}
	return !slices.ContainsFunc(n.w.nodes, func(o *node) bool { return o.crashing || !o.running() || o.apart || o.mute }) && len(n.w.cut) == 0
}

// ailing reports whether a node is still in sync with what was on a disk of it that has failed.
func (w *world) ailing() bool {
	v := w.oracle.View()
	for _, n := range w.nodes {
		if len(n.bad) == 0 || n.illInc != v.Node(n.id).Incarnation {
			continue
		}
		known := n.life != nil && n.life.store != nil
		if known {
			for _, d := range n.life.store.Status().Disks {
				known = known && (d.State == storage.StateFailed || !n.bad[d.ID])
			}
		}
		for i, p := range v.Policies[0].Partitions {
			g := object.Group{Policy: policy, Partition: object.Partition(i)}
			if (slices.Contains(p.ISR, n.id) || slices.Contains(p.Waiting, n.id)) && (!known || n.life.store.Failed(g)) {
				return true
			}
		}
	}
	return false
}

// loseDisk has a disk of a node fail, or be taken out.
func (w *world) loseDisk(n *node) {
	if n.gateway || !n.running() || n.crashing || !n.mayLose() {
		return
	}
	d := n.disks[w.rng.IntN(len(n.disks))]
	name := d.String()
	if n.bad[name] {
		return
	}
	if w.chance(0.3) {
		n.leaving[name] = true // maybe also if it fails
		switch err := n.life.store.Retire(name); {
		case errors.Is(err, object.ErrInvalid): // the last one
			delete(n.leaving, name)
		case err == nil:
			w.logf("%s: disk %s is to be taken out", n.name, name)
			w.happened("disk to be taken out")
			n.life.unplug(name)
		}
		return
	}
	n.bad[name], n.illInc = true, n.life.inc
	w.logf("%s: disk %s fails", n.name, name)
	w.happened("disk failed")
	var count atomic.Int64
	from, reads := int64(w.rng.IntN(20)), w.chance(0.5)
	d.Hook(func(op disktest.Op) error {
		if (op.Kind.Changes() || reads) && count.Add(1) > from {
			return syscall.EIO
		}
		return nil
	})
}

// left notes that a partition has left its disk.
func (l *life) left(g object.Group, gone bool) {
	if gone {
		l.n.w.note(func() {
			l.n.w.happened("partition left its disk")
			delete(l.leaves, g)
		})
	}
}

// renewed counts epochs that begin anew so that a partition can leave its disk: those in which it does not must not follow each other soon.
func (l *life) renewed(g object.Group, at time.Duration) {
	last, ok := l.leaves[g]
	if l.leaves[g] = at; ok && at-last < 1900*ms {
		l.n.w.fail("%s: epochs of %s begin anew within %v for a disk that it cannot leave", l.n.name, g, at-last)
	}
}

// checkLeaves looks at what has been decided for those who want to leave a disk.
func (w *world) checkLeaves(c *state.Command, before *state.View) {
	if c.ChangeISRs == nil || len(before.Policies) == 0 {
		return
	}
	for _, ch := range c.ChangeISRs.Changes {
		p := before.Policies[0].Partitions[ch.Partition]
		if l := w.nodes[max(ch.Remove, 1)-1].life; l != nil && ch.Remove != 0 && ch.Epoch == p.Epoch && slices.Contains(p.Learners, ch.Remove) {
			g := object.Group{Policy: policy, Partition: ch.Partition}
			if l.asked[g] == ch.Epoch {
				l.renewed(g, w.now())
			}
		}
	}
}
