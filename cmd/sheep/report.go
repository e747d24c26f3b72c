package main

import (
	"fmt"
	"net"
	"net/url"
	"strings"

	"sheepdog/cluster"
	"sheepdog/frontends/admin"
	"sheepdog/frontends/admin/api"
	"sheepdog/frontends/nbd"
	"sheepdog/storage"
)

// disks describes this node's disks for the admin API.
func (d *daemon) disks() []api.Disk {
	if d.store == nil {
		return nil
	}
	var list []api.Disk
	for _, s := range d.store.Status().Disks {
		list = append(list, describeDisk(s))
	}
	return list
}

func describeDisk(s storage.DiskStatus) api.Disk {
	a := api.Disk{
		ID: s.ID, Path: s.Dir, State: string(s.State), Reason: s.Error,
		TotalBytes: int64(s.TotalBytes), UsedBytes: int64(s.UsedBytes), FreeBytes: int64(s.FreeBytes),
		Objects: s.Objects, LogBytes: s.LogBytes, LogLimit: s.LogLimitBytes,
		Partitions: s.Partitions, Moves: api.Moves{ToCome: s.PartitionsToCome, ToGo: s.PartitionsToGo, Bytes: s.MovedBytes, Waiting: s.MoveBlocked},
		Scrub:  api.Scrub{Running: s.ScrubProgress > 0, Done: s.ScrubProgress},
		Errors: map[string]uint64{"corrupt": s.CorruptEvents, "io": uint64(s.IOErrors)},
	}
	if !s.ScrubEnd.IsZero() {
		end := s.ScrubEnd.UTC()
		a.Scrub.LastEnd = &end
	}
	for _, c := range s.Corrupt {
		a.Corrupt = append(a.Corrupt, api.CorruptObject{Object: c.Key.ID.String(), Blocks: c.Blocks})
	}
	return a
}

// nbdSessions is NBD's clients as the admin API sees them.
type nbdSessions struct{ *nbd.Server }

var _ admin.SessionSource = nbdSessions{}

// Sessions implements admin.SessionSource.
func (n nbdSessions) Sessions() []api.Session {
	var list []api.Session
	for _, s := range n.Server.Sessions() {
		r := s.Requests
		detail := s.Headers + " replies"
		if len(s.Contexts) > 0 {
			detail += ", " + strings.Join(s.Contexts, " ")
		}
		list = append(list, api.Session{
			ID: fmt.Sprintf("nbd-%d", s.ID), Protocol: "nbd", Peer: s.Peer, Listener: s.Listener, Export: s.Export,
			ReadOnly: s.ReadOnly, TLS: s.TLS, Identity: s.Certificate, Started: s.Started,
			Reads: r.Read, Writes: r.Write, Others: r.Flush + r.Trim + r.Cache + r.WriteZeroes + r.BlockStatus + r.Unknown,
			Errors: s.Errors, ReadBytes: s.ReadBytes, WrittenBytes: s.WrittenBytes, InFlight: s.InFlight, Detail: detail,
		})
	}
	return list
}

// exports lists where volumes are offered.
func (d *daemon) exports() []admin.ExportPoint {
	scheme := "nbd"
	if d.conf.NBD.TLS.Enabled() {
		scheme = "nbds"
	}
	var list []admin.ExportPoint
	for _, l := range d.nbdListeners {
		list = append(list, admin.ExportPoint{Protocol: "nbd", URI: d.uriOf(scheme, l.Addr())})
	}
	for _, l := range d.nativeListeners {
		list = append(list, admin.ExportPoint{Protocol: "sheepdog", URI: d.nativeURI(l.Addr())})
	}
	if d.iscsiListen != nil {
		host := d.reachable(d.iscsiListen.Addr())
		list = append(list, admin.ExportPoint{Protocol: "iscsi", URI: func(name, tag string) string {
			target := d.conf.ISCSI.Prefix + ":" + name
			if tag != "" {
				target += "." + tag
			}
			return "iscsi://" + host + "/" + target + "/0"
		}})
	}
	return list
}

// uriOf makes the URIs of https://github.com/NetworkBlockDevice/nbd/blob/master/doc/uri.md.
func (d *daemon) uriOf(scheme string, a net.Addr) func(name, tag string) string {
	u := url.URL{Scheme: scheme, Host: d.reachable(a)}
	if a.Network() == "unix" {
		u = url.URL{Scheme: scheme + "+unix", RawQuery: url.Values{"socket": {a.String()}}.Encode()}
	}
	return func(name, tag string) string {
		v := u
		if v.Path = "/" + name; tag != "" {
			v.Path += "@" + tag
		}
		s := v.String()
		if v.Host == "" { // net/url leaves out an empty host with its slashes
			s = strings.Replace(s, ":/", ":///", 1)
			s = strings.Replace(s, ":////", ":///", 1)
		}
		return s
	}
}

// reachable is an address that others can use: a listener on all of them has no own.
func (d *daemon) reachable(a net.Addr) string {
	t, ok := a.(*net.TCPAddr)
	if !ok || !t.IP.IsUnspecified() {
		return a.String()
	}
	return net.JoinHostPort(d.conf.Node.Address, fmt.Sprint(t.Port))
}

// metrics are those of the protocols and of the store; the admin frontend has its own.
func (d *daemon) metrics() []admin.Metric {
	list := append(nbdMetrics(d.nbd.Counters()), nativeMetrics(d.native.Counters())...)
	list = append(list, iscsiMetrics(d.iscsi)...)
	list = append(list, recoveryMetrics(d.node.RecoveryCounters())...)
	if d.store == nil {
		return list
	}
	for _, s := range d.store.Status().Disks {
		for op, n := range map[string]int64{"read": s.Reads, "write": s.Writes, "direct": s.Directs, "zero": s.Zeroes, "delete": s.Deletes, "copy": s.Copies, "sync": s.Syncs} {
			list = append(list, counter("sheepdog_store_operations_total", "Operations of the store by disk and kind; direct are writes past the log.",
				float64(n), map[string]string{"disk": s.Dir, "op": op}))
		}
		labels := map[string]string{"disk": s.Dir}
		list = append(list,
			counter("sheepdog_store_checkpoints_total", "Merges of the log into objects.", float64(s.Checkpoints), labels),
			counter("sheepdog_store_stalls_total", "Requests that had to wait for a checkpoint.", float64(s.Stalls), labels),
			counter("sheepdog_store_scrubbed_bytes_total", "Bytes verified by scrubbing.", float64(s.ScrubBytes), labels))
	}
	return list
}

func recoveryMetrics(c cluster.RecoveryCounters) []admin.Metric {
	return []admin.Metric{
		counter("sheepdog_recovery_compared_objects_total", "Objects of this node that were held against their primary's.", float64(c.Compared), nil),
		counter("sheepdog_recovery_taken_bytes_total", "Content that was not equal and that this node took from others.", float64(c.TakenBytes), nil),
		counter("sheepdog_recovery_moved_bytes_total", "What went over the network for that: content, and checksums in both directions.", float64(c.MovedBytes), nil),
		counter("sheepdog_recovery_healed_objects_total", "Objects with corrupt blocks that were replaced from other nodes.", float64(c.Healed), nil),
		counter("sheepdog_recovery_purged_objects_total", "Objects that were removed because other nodes hold them.", float64(c.Purged), nil),
	}
}

func nbdMetrics(c nbd.Counters) []admin.Metric {
	var list []admin.Metric
	r := c.Requests
	for command, n := range map[string]uint64{
		"read": r.Read, "write": r.Write, "flush": r.Flush, "trim": r.Trim, "cache": r.Cache,
		"write_zeroes": r.WriteZeroes, "block_status": r.BlockStatus, "unknown": r.Unknown,
	} {
		list = append(list, counter("sheepdog_nbd_requests_total", "NBD requests by command.", float64(n), map[string]string{"command": command}))
	}
	for reason, n := range map[string]uint64{"not_allowed": c.NotAllowed, "too_many": c.TooMany, "handshake": c.Failed, "stalled": c.Evicted} {
		list = append(list, counter("sheepdog_nbd_connections_closed_total", "NBD connections that the server closed, by reason.", float64(n), map[string]string{"reason": reason}))
	}
	gauge := func(name, help string, v float64) admin.Metric { return admin.Metric{Name: name, Help: help, Value: v} }
	return append(list,
		counter("sheepdog_nbd_request_errors_total", "NBD requests answered with an error.", float64(c.Errors), nil),
		counter("sheepdog_nbd_read_bytes_total", "Bytes asked for by NBD reads.", float64(c.ReadBytes), nil),
		counter("sheepdog_nbd_written_bytes_total", "Bytes asked for by NBD writes.", float64(c.WrittenBytes), nil),
		counter("sheepdog_nbd_connections_total", "NBD connections accepted.", float64(c.Accepted), nil),
		gauge("sheepdog_nbd_connections", "NBD connections, handshakes included.", float64(c.Connections)),
		gauge("sheepdog_nbd_requests_in_flight", "NBD requests that are not answered yet.", float64(c.InFlight)),
		gauge("sheepdog_nbd_buffer_bytes", "Memory of NBD requests in flight.", float64(c.BufferBytes)),
		gauge("sheepdog_nbd_buffer_limit_bytes", "Bound of sheepdog_nbd_buffer_bytes.", float64(c.MemoryLimit)))
}

func counter(name, help string, v float64, labels map[string]string) admin.Metric {
	return admin.Metric{Name: name, Help: help, Counter: true, Labels: labels, Value: v}
}
