package admin

import (
	"context"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"sheepdog/frontends/admin/api"
)

// metrics are the package's own, and the way to those of others.
type metrics struct {
	s       *Server
	handler http.Handler
	calls   *prometheus.CounterVec
	seconds *prometheus.HistogramVec
	refused prometheus.Counter
}

func newMetrics(s *Server) *metrics {
	m := &metrics{
		s: s,
		calls: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "sheepdog_admin_calls_total", Help: "Calls of the admin API that were answered.",
		}, []string{"method", "path", "status"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "sheepdog_admin_call_seconds", Help: "How long calls of the admin API took.", Buckets: []float64{.001, .005, .02, .1, .5, 2, 10, 60},
		}, []string{"method", "path"}),
		refused: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "sheepdog_admin_refused_total", Help: "Calls of the admin API that were refused for who made them.",
		}),
	}
	reg := prometheus.NewRegistry()
	reg.MustRegister(m.calls, m.seconds, m.refused, m, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	m.handler = promhttp.HandlerFor(reg, promhttp.HandlerOpts{MaxRequestsInFlight: 4, ErrorHandling: promhttp.ContinueOnError})
	return m
}

// called counts a call; status 0 is that of a client who left.
func (m *metrics) called(r *route, status int, d time.Duration) {
	m.calls.WithLabelValues(r.method, r.path, strconv.Itoa(status)).Inc()
	m.seconds.WithLabelValues(r.method, r.path).Observe(d.Seconds())
}

func (c *call) prometheus() error {
	c.s.metrics.handler.ServeHTTP(c.w, c.r)
	return nil
}

// Describe implements prometheus.Collector. What there is depends on the node's state, so
// nothing is said before.
func (m *metrics) Describe(chan<- *prometheus.Desc) {}

// scrapeTimeout bounds how long volumes are counted for a scrape.
const scrapeTimeout = 5 * time.Second

// Collect implements prometheus.Collector.
func (m *metrics) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), scrapeTimeout)
	defer cancel()
	for _, list := range [][]Metric{m.node(), m.cluster(), m.disks(), m.volumes(ctx), m.s.cfg.Metrics()} {
		for _, x := range list {
			ch <- sample(x)
		}
	}
}

func sample(x Metric) prometheus.Metric {
	kind := prometheus.GaugeValue
	if x.Counter {
		kind = prometheus.CounterValue
	}
	keys := slices.Sorted(maps.Keys(x.Labels))
	values := make([]string, len(keys))
	for i, k := range keys {
		values[i] = x.Labels[k]
	}
	desc := prometheus.NewDesc(x.Name, x.Help, keys, nil)
	s, err := prometheus.NewConstMetric(desc, kind, x.Value, values...)
	if err != nil {
		return prometheus.NewInvalidMetric(desc, err)
	}
	return s
}

func gauge(name, help string, v float64) Metric { return Metric{Name: name, Help: help, Value: v} }

func number(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

func (m *metrics) node() []Metric {
	c := m.s.cfg.Cluster.Info()
	list := []Metric{
		{Name: "sheepdog_build_info", Help: "The version that runs.", Labels: map[string]string{"version": m.s.cfg.Version}, Value: 1},
		gauge("sheepdog_ready", "Whether the node serves volumes.", number(m.s.cfg.Cluster.Ready() == nil)),
		gauge("sheepdog_cluster_epoch", "Version of the cluster map.", float64(c.Epoch)),
		gauge("sheepdog_leader", "Whether the node leads the cluster.", number(c.Leader)),
		gauge("sheepdog_transfers", "Transfers of volume content over the admin API.", float64(len(m.s.transfers))),
	}
	for _, st := range []string{api.StatusOK, api.StatusDegraded, api.StatusUnavailable, api.StatusUnformatted} {
		list = append(list, Metric{Name: "sheepdog_cluster_status", Help: "1 for what the cluster's status is.", Labels: map[string]string{"status": st}, Value: number(c.Status == st)})
	}
	for _, p := range c.Policies {
		for state, n := range map[string]int{"all": p.Partitions, "degraded": p.Degraded, "unavailable": p.Unavailable, "recovering": p.Recovering} {
			list = append(list, Metric{Name: "sheepdog_partitions", Help: "Partitions by policy and state.",
				Labels: map[string]string{"policy": strconv.Itoa(p.ID), "state": state}, Value: float64(n)})
		}
	}
	sessions := map[string]int{}
	for _, x := range m.s.sessions() {
		sessions[x.Protocol]++
	}
	for protocol, n := range sessions {
		list = append(list, Metric{Name: "sheepdog_sessions", Help: "Clients by protocol.", Labels: map[string]string{"protocol": protocol}, Value: float64(n)})
	}
	return list
}

// cluster has what every node tells of the cluster, in the same words.
func (m *metrics) cluster() []Metric {
	r := m.s.cfg.Cluster.Recovery()
	list := []Metric{
		gauge("sheepdog_recovery_enabled", "Whether data is moved when nodes come, go for long, or change weight.", number(r.Enabled)),
		gauge("sheepdog_recovery_partitions_moving", "Partitions that are held by others than shall hold them.", float64(r.Moving)),
	}
	missing, leaving, learning := 0, 0, 0
	for _, n := range r.Nodes {
		missing, leaving, learning = missing+n.Missing, leaving+n.Leaving, learning+n.Learning
	}
	for state, n := range map[string]int{"missing": missing, "leaving": leaving, "learning": learning} {
		list = append(list, Metric{Name: "sheepdog_recovery_replicas", Help: "Replicas that are not where they shall be: missing (learning are those of them at work), or leaving when others are in sync.",
			Labels: map[string]string{"state": state}, Value: float64(n)})
	}
	for _, n := range m.s.cfg.Cluster.Nodes() {
		labels := map[string]string{"node": n.Name}
		add := func(name, help string, v float64) {
			list = append(list, Metric{Name: "sheepdog_node_" + name, Help: help, Labels: labels, Value: v})
		}
		add("up", "Whether the node is up, as the cluster has agreed.", number(n.State == api.NodeUp))
		add("draining", "Whether the node shall hold nothing by somebody's wish.", number(n.Drain))
		add("replicas", "Partitions that the node is in sync with.", float64(n.Replicas))
		add("primaries", "Partitions that the node is the primary of.", float64(n.Primaries))
		add("targets", "Partitions that the node shall hold.", float64(n.Targets))
		add("weight", "The node's share of the data.", float64(n.Weight)*float64(n.Percent)/100)
	}
	return list
}

func (m *metrics) disks() []Metric {
	var list []Metric
	for _, d := range m.s.disks() {
		labels := map[string]string{"disk": d.Path}
		add := func(name, help string, v float64) {
			list = append(list, Metric{Name: "sheepdog_disk_" + name, Help: help, Labels: labels, Value: v})
		}
		add("size_bytes", "Size of the disk.", float64(d.TotalBytes))
		add("used_bytes", "Used by all that is on the disk, also by others.", float64(d.UsedBytes))
		add("free_bytes", "Free on the disk.", float64(d.FreeBytes))
		add("objects", "Objects on the disk.", float64(d.Objects))
		add("log_bytes", "Log that is not merged into object files.", float64(d.LogBytes))
		add("scrub_done_ratio", "How far the running scrub is.", d.Scrub.Done)
		add("corrupt_objects", "Objects known to have blocks that do not match their checksums.", float64(len(d.Corrupt)))
		for _, st := range []string{api.DiskOK, api.DiskFull, api.DiskReadOnly, api.DiskFailed} {
			list = append(list, Metric{Name: "sheepdog_disk_state", Help: "1 for what the disk's state is.",
				Labels: map[string]string{"disk": d.Path, "state": st}, Value: number(d.State == st)})
		}
		for kind, n := range d.Errors {
			list = append(list, Metric{Name: "sheepdog_disk_errors_total", Help: "Errors of the disk by kind.", Counter: true,
				Labels: map[string]string{"disk": d.Path, "kind": kind}, Value: float64(n)})
		}
	}
	return list
}

func (m *metrics) volumes(ctx context.Context) []Metric {
	gc := m.s.cfg.Volumes.GC()
	list := []Metric{
		gauge("sheepdog_gc_pending", "Deleted VDIs and snapshots whose space is not free yet.", float64(gc.Pending)),
		{Name: "sheepdog_gc_deleted_objects_total", Help: "Objects that were removed.", Counter: true, Value: float64(gc.Deleted)},
		{Name: "sheepdog_gc_leftover_objects_total", Help: "Objects found that no volume named.", Counter: true, Value: float64(gc.Leftovers)},
	}
	all, err := m.s.cfg.Volumes.List(ctx)
	if err != nil {
		return list // the rest of the scrape is still worth having
	}
	var vdis, snapshots, size int64
	for _, v := range all {
		if v.Snapshot {
			snapshots++
			continue
		}
		vdis++
		size += v.Size
	}
	return append(list,
		gauge("sheepdog_vdis", "VDIs, snapshots not counted.", float64(vdis)),
		gauge("sheepdog_snapshots", "Snapshots of all VDIs.", float64(snapshots)),
		gauge("sheepdog_vdis_size_bytes", "Sizes of all VDIs together.", float64(size)))
}
