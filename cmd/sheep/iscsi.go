package main

import (
	"context"
	"crypto/sha256"
	"fmt"
	"math/bits"

	"sheepdog/cluster"
	"sheepdog/cluster/state"
	"sheepdog/frontends/admin"
	"sheepdog/frontends/admin/api"
	"sheepdog/frontends/iscsi"
	"sheepdog/vdi"
	"sheepdog/vdi/catalog"
)

// disks is the volumes as iSCSI sees them.
type disks struct {
	volumes *vdi.Service
	catalog *catalog.Machine
	node    *cluster.Node
	name    string // of the node
}

var _ iscsi.Volumes = (*disks)(nil)

// List implements iscsi.Volumes.
func (d *disks) List(context.Context) ([]iscsi.Disk, error) {
	var list []iscsi.Disk
	for _, v := range d.catalog.List() {
		list = append(list, d.describe(v))
	}
	return list, nil
}

// Find implements iscsi.Volumes.
func (d *disks) Find(name, tag string) (iscsi.Disk, error) {
	v, err := d.catalog.Find(name, tag)
	if err != nil {
		return iscsi.Disk{}, fmt.Errorf("%w: %w", vdi.ErrNotFound, err)
	}
	return d.describe(v), nil
}

// describe gives a disk an identity that it keeps: its vid changes with each snapshot; what
// does not is when it was made, and its name.
func (d *disks) describe(v catalog.VDI) iscsi.Disk {
	x := iscsi.Disk{Name: v.Name, Size: v.Size, ReadOnly: v.Snapshot, Replaced: v.Replaced}
	id := fmt.Sprintf("%s\x00%s\x00%d", d.node.ClusterID(), v.Name, v.Created.UnixNano())
	if v.Snapshot {
		if x.Tag = v.Tag; x.Tag == "" {
			x.Tag = fmt.Sprint(v.SnapshotID)
		}
		id += fmt.Sprintf("\x00%s\x00%d", v.Identity, v.SnapshotID)
	}
	sum := sha256.Sum256([]byte(id))
	copy(x.ID[:], sum[:])
	return x
}

// Open implements iscsi.Volumes.
func (d *disks) Open(ctx context.Context, name, tag, client string) (iscsi.Volume, error) {
	v, err := d.volumes.Open(ctx, name, tag, vdi.OpenOptions{Client: client})
	if err != nil {
		return nil, err
	}
	return v, nil
}

// Changes implements iscsi.Volumes. Who is up is looked at from time to time anyway.
func (d *disks) Changes() uint64 { return d.catalog.Changes() }

// Group implements iscsi.Volumes.
func (d *disks) Group() uint16 {
	if n := d.node.View().NodeByName(d.name); n != nil {
		return uint16(n.ID)
	}
	return 0
}

// Paths implements iscsi.Volumes.
func (d *disks) Paths(name, tag string) []iscsi.Path {
	owner := ""
	if v, err := d.catalog.Find(name, tag); err == nil && v.Owner != nil {
		owner = v.Owner.Name
	}
	var list []iscsi.Path
	for _, n := range d.node.View().Nodes {
		list = append(list, iscsi.Path{Group: uint16(n.ID), Owner: owner == "" || owner == n.Name, Down: n.State != state.NodeUp})
	}
	return list
}

// Lapses implements iscsi.Volumes.
func (d *disks) Lapses() uint64 { return d.node.Lapses() }

// Reservations implements iscsi.Volumes.
func (d *disks) Reservations(name, tag string) (string, uint64, error) {
	return d.volumes.Reservation(name, tag)
}

// SetReservations implements iscsi.Volumes.
func (d *disks) SetReservations(ctx context.Context, name, tag string, revision uint64, text string, fence bool) (uint64, error) {
	return d.volumes.SetReservation(ctx, name, tag, revision, text, fence)
}

// Known implements iscsi.Volumes.
func (d *disks) Known(ctx context.Context) error { return d.volumes.Known(ctx) }

// Life implements iscsi.Volumes.
func (d *disks) Life() uint64 { return d.node.Incarnation() }

// Lives implements iscsi.Volumes.
func (d *disks) Lives(node string, life uint64) bool {
	n := d.node.View().NodeByName(node)
	return n != nil && n.State == state.NodeUp && n.Incarnation == life
}

// Own implements iscsi.Volumes.
func (d *disks) Own(ctx context.Context, name string) error { return d.volumes.Own(ctx, name) }

func (d *daemon) makeISCSI() (err error) {
	if d.iscsiListen == nil {
		return nil
	}
	c := d.conf.ISCSI
	n := iscsi.Config{
		Volumes: &disks{d.volumes, d.catalog, d.node, d.conf.Node.Name}, Logger: d.log, Prefix: c.Prefix, Node: d.conf.Node.Name,
		Portals: d.portals, Targets: d.targets(), Secrets: chapSecrets(c.Secrets), Initiators: c.Initiators, BlockShift: uint8(bits.Len(uint(c.BlockSize)) - 1), SmallPhysical: c.PhysicalBlock < 4096,
		Chap: iscsi.Chap{User: c.Chap.User, OurUser: c.Chap.MutualUser},
	}
	n.MaxConnections, n.MemoryLimit, n.SessionMemory = c.MaxConnections, c.Memory, c.SessionMemory
	if n.Chap.Secret, err = readChapSecret("iscsi.chap.secret_file", c.Chap.SecretFile); err != nil {
		return err
	}
	if n.Chap.OurSecret, err = readChapSecret("iscsi.chap.mutual_secret_file", c.Chap.MutualSecretFile); err != nil {
		return err
	}
	if n.Chap.Secret != "" && n.Chap.Secret == n.Chap.OurSecret {
		return fmt.Errorf("iscsi.chap.mutual_secret_file: the secret must be another one than that of iscsi.chap.secret_file")
	}
	if n.Allow, err = prefixes("iscsi.allow", c.Allow); err != nil {
		return err
	}
	if d.iscsi, err = iscsi.New(n); err == nil {
		d.node.OnKnown(d.iscsi.Settle)
	}
	return err
}

// iscsiSessions is iSCSI's initiators as the admin API sees them.
type iscsiSessions struct{ *iscsi.Server }

var _ admin.SessionSource = iscsiSessions{}

// Sessions implements admin.SessionSource.
func (n iscsiSessions) Sessions() []api.Session {
	if n.Server == nil {
		return nil
	}
	var list []api.Session
	for _, s := range n.Server.Sessions() {
		r := s.Requests
		export := s.Target
		if export == "" {
			export = "discovery"
		}
		identity := s.Initiator
		if s.User != "" {
			identity += " as " + s.User
		}
		list = append(list, api.Session{
			ID: fmt.Sprintf("iscsi-%d", s.ID), Protocol: "iscsi", Peer: s.Peer, Listener: s.Listener, Export: export,
			ReadOnly: s.ReadOnly, Identity: identity, Started: s.Started,
			Reads: r.Read, Writes: r.Write, Others: r.Flush + r.Other + r.Management + r.Text,
			Errors: s.Errors, ReadBytes: s.ReadBytes, WrittenBytes: s.WrittenBytes, InFlight: s.InFlight,
			Detail: fmt.Sprintf("ISID %s, digests: %s", s.ISID, s.Digests),
		})
	}
	return list
}

func iscsiMetrics(s *iscsi.Server) []admin.Metric {
	if s == nil {
		return nil
	}
	c := s.Counters()
	var list []admin.Metric
	r := c.Requests
	for command, n := range map[string]uint64{
		"read": r.Read, "write": r.Write, "flush": r.Flush, "other": r.Other, "management": r.Management, "text": r.Text,
	} {
		list = append(list, counter("sheepdog_iscsi_requests_total", "iSCSI requests by kind.", float64(n), map[string]string{"command": command}))
	}
	for reason, n := range map[string]uint64{
		"not_allowed": c.NotAllowed, "too_many": c.TooMany, "login": c.Failed - c.BadLogins, "denied": c.BadLogins, "stalled": c.Evicted,
	} {
		list = append(list, counter("sheepdog_iscsi_connections_closed_total", "iSCSI connections that the server closed, by reason.", float64(n), map[string]string{"reason": reason}))
	}
	gauge := func(name, help string, v float64) admin.Metric { return admin.Metric{Name: name, Help: help, Value: v} }
	return append(list,
		counter("sheepdog_iscsi_request_errors_total", "SCSI commands answered with another status than GOOD.", float64(c.Errors), nil),
		counter("sheepdog_iscsi_rejects_total", "iSCSI PDUs that were rejected.", float64(c.Rejects), nil),
		counter("sheepdog_iscsi_read_bytes_total", "Bytes asked for by iSCSI reads.", float64(c.ReadBytes), nil),
		counter("sheepdog_iscsi_written_bytes_total", "Bytes asked for by iSCSI writes.", float64(c.WrittenBytes), nil),
		counter("sheepdog_iscsi_connections_total", "iSCSI connections accepted.", float64(c.Accepted), nil),
		gauge("sheepdog_iscsi_connections", "iSCSI connections, logins included.", float64(c.Connections)),
		gauge("sheepdog_iscsi_sessions", "iSCSI sessions.", float64(c.Sessions)),
		gauge("sheepdog_iscsi_requests_in_flight", "iSCSI requests that are not answered yet.", float64(c.InFlight)),
		gauge("sheepdog_iscsi_buffer_bytes", "Memory of iSCSI requests in flight.", float64(c.BufferBytes)),
		gauge("sheepdog_iscsi_buffer_limit_bytes", "Bound of sheepdog_iscsi_buffer_bytes.", float64(c.MemoryLimit)))
}
