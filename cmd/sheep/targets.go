package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	"sheepdog/frontends/admin"
	"sheepdog/frontends/admin/api"
	"sheepdog/frontends/iscsi"
	"sheepdog/frontends/iscsi/access"
	"sheepdog/vdi"
	"sheepdog/vdi/catalog"
)

// Keys of the catalog's records.
const (
	targetKey = "iscsi.target/" // and the name of the VDI or group: an access.Target
	portalKey = "iscsi.portal/" // and the name of the gateway: ADDRESS:PORT
)

// targets keeps what operators say of iSCSI targets in the catalog, where all gateways find it.
type targets struct {
	catalog *catalog.Machine
	volumes *vdi.Service
}

var _ iscsi.Targets = (*targets)(nil)

func (d *daemon) targets() *targets { return &targets{d.catalog, d.volumes} }

// Target implements iscsi.Targets. What cannot be read lets nobody in.
func (t *targets) Target(name string) (access.Target, bool) {
	r := t.catalog.Record(targetKey + name)
	if r.Revision == 0 {
		return access.Target{}, false
	}
	return decodeTarget(r), true
}

func decodeTarget(r catalog.Record) access.Target {
	x, err := access.Decode(r.Text)
	if err != nil {
		return access.Target{Name: strings.TrimPrefix(r.Key, targetKey)}.DenyAll()
	}
	return x
}

// Groups implements iscsi.Targets.
func (t *targets) Groups() (list []access.Target) {
	for _, r := range t.catalog.Records(targetKey) {
		if x := decodeTarget(r); x.Group {
			list = append(list, x)
		}
	}
	return list
}

// targetAttempts bounds how often a change begins anew because somebody else was quicker.
const targetAttempts = 20

// change has fn make of what is said of a target what shall be; there is something if found.
func (t *targets) change(ctx context.Context, name string, fn func(x access.Target, found bool) (access.Target, error)) (access.Target, error) {
	var err error
	for range targetAttempts {
		r := t.catalog.Record(targetKey + name)
		x := access.Target{Name: name}
		if r.Revision != 0 {
			if x, err = access.Decode(r.Text); err != nil {
				return x, fmt.Errorf("%w: %w", vdi.ErrCorrupt, err)
			}
		}
		if x, err = fn(x, r.Revision != 0); err != nil {
			return x, targetError(err)
		}
		text := x.Encode()
		if text == r.Text {
			return x, nil
		}
		if err = t.volumes.SetRecord(ctx, r.Key, r.Revision, text); !errors.Is(err, vdi.ErrStale) {
			return x, err
		}
	}
	return access.Target{}, err
}

// targetError gives refusals of package access their kinds.
func targetError(err error) error {
	for _, k := range []struct {
		err  error
		kind api.Kind
	}{{access.ErrInvalid, api.KindInvalid}, {access.ErrNotFound, api.KindNotFound}, {access.ErrExists, api.KindExists}} {
		if errors.Is(err, k.err) {
			return &api.Error{Kind: k.kind, Message: err.Error()}
		}
	}
	return err
}

// targetOps is what the admin API does with targets.
type targetOps struct {
	*targets
	server *iscsi.Server // nil: this node serves no initiators
	prefix string
	find   *catalog.Machine
}

var _ admin.Targets = (*targetOps)(nil)

// describe gives a target in the API's words.
func (t *targetOps) describe(x access.Target, luns []access.LUN, name string) api.Target {
	a := api.Target{Name: name, IQN: t.prefix + ":" + name, Group: x.Group, LUNs: []api.LUN{}, Initiators: x.Initiators, Networks: x.Networks, Chap: []api.ChapEntry{}}
	for _, l := range luns {
		v, err := t.find.Find(l.VDI, l.Tag)
		a.LUNs = append(a.LUNs, api.LUN{LUN: l.Number, VDI: l.VDI, Snapshot: l.Tag, Size: v.Size, Missing: err != nil})
	}
	for _, c := range x.Chap {
		a.Chap = append(a.Chap, api.ChapEntry(c))
	}
	return a
}

// List implements admin.Targets.
func (t *targetOps) List() []api.Target {
	var list []api.Target
	groups := map[string]bool{}
	for _, g := range t.Groups() {
		groups[g.Name] = true
		list = append(list, t.describe(g, g.LUNs, g.Name))
	}
	for _, v := range t.find.List() {
		x, _ := t.Target(v.Name)
		name, tag := v.Name, ""
		if v.Snapshot {
			if tag = v.Tag; tag == "" {
				tag = fmt.Sprint(v.SnapshotID)
			}
			name += "." + tag
		}
		if groups[strings.ToLower(name)] {
			continue // the group has the name: the VDI is no target
		}
		if x.Group { // so is the VDI's: its snapshots are targets that nothing is said of
			x = access.Target{}
		}
		list = append(list, t.describe(x, []access.LUN{{VDI: v.Name, Tag: tag}}, name))
	}
	slices.SortStableFunc(list, func(a, b api.Target) int { return strings.Compare(a.Name, b.Name) })
	return list
}

// one describes what a change has made.
func (t *targetOps) one(x access.Target, err error) (api.Target, error) {
	if err != nil {
		return api.Target{}, err
	}
	if x.Group {
		return t.describe(x, x.LUNs, x.Name), nil
	}
	return t.describe(x, []access.LUN{{VDI: x.Name}}, x.Name), nil
}

var errNoGroup = &api.Error{Kind: api.KindNotFound, Message: "there is no such group", Hint: `"dog iscsi target create" makes one`}

// CreateGroup implements admin.Targets.
func (t *targetOps) CreateGroup(ctx context.Context, q api.GroupRequest) (api.Target, error) {
	if err := access.CheckGroup(q.Name); err != nil {
		return api.Target{}, targetError(err)
	}
	for _, v := range t.find.List() {
		if strings.EqualFold(v.Name, q.Name) {
			return api.Target{}, &api.Error{Kind: api.KindExists, Message: fmt.Sprintf("there is a VDI %q, and so a target of that name", v.Name), Hint: "call the group something else"}
		}
	}
	return t.one(t.change(ctx, q.Name, func(x access.Target, found bool) (access.Target, error) {
		if found {
			return x, fmt.Errorf("there is a target %q already: %w", q.Name, access.ErrExists)
		}
		x.Group = true
		for _, l := range q.LUNs {
			var err error
			if x, err = t.add(x, l); err != nil {
				return x, err
			}
		}
		return x, nil
	}))
}

// add is access.Target.Add for a VDI or snapshot that is there.
func (t *targetOps) add(x access.Target, q api.LUNRequest) (access.Target, error) {
	if _, err := t.find.Find(q.VDI, q.Snapshot); err != nil {
		return x, fmt.Errorf("%w: %w", vdi.ErrNotFound, err)
	}
	number := -1
	if q.LUN != nil {
		if number = *q.LUN; number < 0 {
			return x, fmt.Errorf("%d is no number of a unit: %w", number, access.ErrInvalid)
		}
	}
	x, _, err := x.Add(number, q.VDI, q.Snapshot)
	return x, err
}

// DeleteGroup implements admin.Targets.
func (t *targetOps) DeleteGroup(ctx context.Context, name string) error {
	_, err := t.change(ctx, name, func(x access.Target, found bool) (access.Target, error) {
		if !x.Group {
			return x, errNoGroup
		}
		return access.Target{}, nil
	})
	return err
}

// AddLUN implements admin.Targets.
func (t *targetOps) AddLUN(ctx context.Context, name string, q api.LUNRequest) (api.Target, error) {
	return t.one(t.change(ctx, name, func(x access.Target, found bool) (access.Target, error) {
		if !x.Group {
			return x, errNoGroup
		}
		return t.add(x, q)
	}))
}

// RemoveLUN implements admin.Targets.
func (t *targetOps) RemoveLUN(ctx context.Context, name string, lun int) (api.Target, error) {
	return t.one(t.change(ctx, name, func(x access.Target, found bool) (access.Target, error) {
		if !x.Group {
			return x, errNoGroup
		}
		return x.Remove(lun)
	}))
}

// rule changes what is said of a group, or of a VDI that is there or was.
func (t *targetOps) rule(ctx context.Context, name string, fn func(access.Target) (access.Target, error)) (api.Target, error) {
	return t.one(t.change(ctx, name, func(x access.Target, found bool) (access.Target, error) {
		if !found {
			if _, err := t.find.Find(name, ""); err != nil {
				return x, fmt.Errorf("%w: %w", vdi.ErrNotFound, err)
			}
		}
		return fn(x)
	}))
}

// SetAccess implements admin.Targets.
func (t *targetOps) SetAccess(ctx context.Context, name string, q api.AccessRequest) (api.Target, error) {
	return t.rule(ctx, name, func(x access.Target) (access.Target, error) {
		if q.AllowAll && q.DenyAll {
			return x, fmt.Errorf("all cannot be allowed and denied: %w", access.ErrInvalid)
		}
		if q.AllowAll {
			x = x.AllowAll()
		}
		if q.DenyAll {
			x = x.DenyAll()
		}
		x, err := x.Allow(q.Allow)
		if err != nil {
			return x, err
		}
		return x.Deny(q.Deny)
	})
}

// SetChap implements admin.Targets.
func (t *targetOps) SetChap(ctx context.Context, name string, q api.ChapEntry) (api.Target, error) {
	return t.rule(ctx, name, func(x access.Target) (access.Target, error) { return x.WithChap(access.Chap(q)) })
}

// RemoveChap implements admin.Targets.
func (t *targetOps) RemoveChap(ctx context.Context, name, initiator string) (api.Target, error) {
	return t.rule(ctx, name, func(x access.Target) (access.Target, error) { return x.WithoutChap(initiator) })
}

// Version implements admin.Targets.
func (t *targetOps) Version() uint64 { return t.find.Version() }

// Await implements admin.Targets. A node is behind by the time of a message; who is asked is up.
func (t *targetOps) Await(ctx context.Context, version uint64) error {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for t.find.Version() < version {
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: this node does not hear of changes: %w", vdi.ErrUnavailable, ctx.Err())
		case <-tick.C:
		}
	}
	return nil
}

// Logout implements admin.Targets.
func (t *targetOps) Logout(q api.LogoutRequest) int {
	if t.server == nil {
		return 0
	}
	return t.server.Logout(func(i iscsi.SessionInfo) bool {
		if !strings.EqualFold(i.Place, q.Target) || q.Initiator != "" && !strings.EqualFold(i.Initiator, q.Initiator) {
			return false
		}
		x, _ := t.Target(q.Target)
		host, _, _ := net.SplitHostPort(i.Peer)
		return !q.Forbidden || !x.Admits(i.Initiator, addrOf(host))
	})
}

// portals are those of other gateways, and what the configuration adds.
func (d *daemon) portals() []string {
	var list []string
	for _, n := range d.node.View().Nodes {
		if n.Name == d.conf.Node.Name {
			continue
		}
		if r := d.catalog.Record(portalKey + n.Name); r.Revision != 0 {
			list = append(list, fmt.Sprintf("%s,%d", r.Text, n.ID))
		}
	}
	for _, p := range d.conf.ISCSI.Portals {
		if !slices.Contains(list, p) {
			list = append(list, p)
		}
	}
	return list
}

// publishEvery is how often it is looked whether the other gateways know this one's portal.
const publishEvery = time.Second

// publishPortal lets the other gateways know by what address initiators reach this one, if any. It
// returns when they do, or when ctx ends.
func (d *daemon) publishPortal(ctx context.Context) {
	text := ""
	if d.iscsiListen != nil {
		text = d.reachable(d.iscsiListen.Addr())
	}
	for {
		r := d.catalog.Record(portalKey + d.conf.Node.Name)
		switch {
		case d.node.Ready() != nil:
		case r.Text == text:
			return
		default:
			err := d.volumes.SetRecord(ctx, r.Key, r.Revision, text)
			if err == nil {
				return
			}
			d.log.Debug("portal is not known to other gateways yet", "err", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(publishEvery):
		}
	}
}
