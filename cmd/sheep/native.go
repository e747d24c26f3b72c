package main

import (
	"context"
	"fmt"
	"net"
	"net/url"
	"time"

	"sheepdog/cluster"
	"sheepdog/cluster/state"
	"sheepdog/frontends/admin"
	"sheepdog/frontends/admin/api"
	"sheepdog/frontends/sheepdog"
	"sheepdog/storage/object"
	"sheepdog/vdi"
)

// nativeVolumes is the volumes as the native protocol sees them.
type nativeVolumes struct {
	*vdi.Service
	node *cluster.Node
}

var _ sheepdog.Volumes = (*nativeVolumes)(nil)

// OpenVID implements sheepdog.Volumes.
func (n *nativeVolumes) OpenVID(vid object.VID, client string, quiet bool) (sheepdog.Volume, error) {
	v, err := n.Service.OpenVID(vid, client, quiet)
	if err != nil {
		return nil, err
	}
	return v, nil
}

// comingBack is for how long clients of a node that has started anew may have come back to nobody yet: they try every second.
const comingBack = 30 * time.Second

// UsedElsewhere implements sheepdog.Volumes.
func (n *nativeVolumes) UsedElsewhere(ctx context.Context, vid object.VID) bool {
	if owner, ok := n.Owner(vid); ok {
		m := n.node.View().NodeByName(owner.Name)
		if m != nil && (m.State != state.NodeUp || m.Incarnation != owner.Incarnation && time.Since(m.Since) < comingBack) {
			return true
		}
	}
	return n.node.UsedElsewhere(ctx, vid)
}

// Defaults implements sheepdog.Volumes.
func (n *nativeVolumes) Defaults() (copies int, sizeShift uint8, err error) {
	policy := n.node.DefaultPolicy()
	if policy == 0 {
		return 0, 0, fmt.Errorf("%w: the cluster is not formatted: run \"dog cluster format\"", vdi.ErrUnavailable)
	}
	return n.node.Copies(policy), n.node.DefaultSizeShift(), nil
}

// nativeSessions is the native protocol's clients as the admin API sees them.
type nativeSessions struct{ *sheepdog.Server }

var _ admin.SessionSource = nativeSessions{}

// Sessions implements admin.SessionSource.
func (n nativeSessions) Sessions() []api.Session {
	var list []api.Session
	for _, s := range n.Server.Sessions() {
		list = append(list, api.Session{
			ID: fmt.Sprintf("sheepdog-%d", s.ID), Protocol: "sheepdog", Peer: s.Peer, Listener: s.Listener, Export: s.Export, ReadOnly: s.ReadOnly,
			Started: s.Started, Reads: s.Reads, Writes: s.Writes, Others: s.Others, Errors: s.Errors,
			ReadBytes: s.ReadBytes, WrittenBytes: s.WrittenBytes, InFlight: s.InFlight,
		})
	}
	return list
}

// nativeURI makes the URIs of QEMU's sheepdog driver.
func (d *daemon) nativeURI(a net.Addr) func(name, tag string) string {
	return func(name, tag string) string {
		u := url.URL{Scheme: "sheepdog", Host: d.reachable(a), Path: "/" + name, Fragment: tag}
		if a.Network() == "unix" {
			query := url.Values{"socket": {a.String()}}.Encode()
			return "sheepdog+unix://" + u.EscapedPath() + "?" + query + fragment(u)
		}
		return u.String()
	}
}

func fragment(u url.URL) string {
	if u.Fragment == "" {
		return ""
	}
	return "#" + u.EscapedFragment()
}

func nativeMetrics(c sheepdog.Counters) []admin.Metric {
	var list []admin.Metric
	for op, n := range c.Requests {
		list = append(list, counter("sheepdog_native_requests_total", "Requests of the native protocol by operation.", float64(n), map[string]string{"op": op}))
	}
	for reason, n := range map[string]uint64{"not_allowed": c.NotAllowed, "too_many": c.TooMany, "stalled": c.Evicted} {
		list = append(list, counter("sheepdog_native_connections_closed_total", "Connections of the native protocol that the server closed, by reason.", float64(n), map[string]string{"reason": reason}))
	}
	gauge := func(name, help string, v float64) admin.Metric { return admin.Metric{Name: name, Help: help, Value: v} }
	return append(list,
		counter("sheepdog_native_request_errors_total", "Requests of the native protocol answered with an error.", float64(c.Errors), nil),
		counter("sheepdog_native_read_bytes_total", "Bytes asked for by reads over the native protocol.", float64(c.ReadBytes), nil),
		counter("sheepdog_native_written_bytes_total", "Bytes that came over the native protocol.", float64(c.WrittenBytes), nil),
		counter("sheepdog_native_connections_total", "Connections of the native protocol accepted.", float64(c.Accepted), nil),
		gauge("sheepdog_native_connections", "Connections of the native protocol.", float64(c.Connections)),
		gauge("sheepdog_native_requests_in_flight", "Requests of the native protocol that are not answered yet.", float64(c.InFlight)),
		gauge("sheepdog_native_buffer_bytes", "Memory of requests of the native protocol in flight.", float64(c.BufferBytes)),
		gauge("sheepdog_native_buffer_limit_bytes", "Bound of sheepdog_native_buffer_bytes.", float64(c.MemoryLimit)))
}
