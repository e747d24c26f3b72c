package admin

import (
	"fmt"
	"log/slog"
	"math/bits"
	"net/http"
	"net/http/pprof"
	"net/url"
	"runtime"
	"slices"
	"strings"

	"sheepdog/frontends/admin/api"
	"sheepdog/storage/object"
	"sheepdog/vdi"
)

func (c *call) version() (any, error) {
	return api.ServerVersion{Version: c.s.cfg.Version, API: api.Version, Go: runtime.Version()}, nil
}

func (c *call) cluster() (any, error) {
	i := c.s.cfg.Cluster.Info()
	i.Policies = orEmpty(i.Policies)
	return i, nil
}

// orEmpty makes lists that have nothing in them [] in JSON, not null.
func orEmpty[T any](list []T) []T {
	if list == nil {
		return []T{}
	}
	return list
}

func (c *call) format() (any, error) {
	var q api.FormatRequest
	if err := c.body(&q); err != nil {
		return nil, err
	}
	shift, err := shiftOf(q.ObjectSize)
	if err != nil {
		return nil, err
	}
	if q.Copies < 0 {
		return nil, refuse(api.KindInvalid, "%d copies make no sense", q.Copies)
	}
	err = c.s.cfg.Cluster.Format(c.r.Context(), FormatOptions{Name: q.Name, Copies: q.Copies, ObjectSizeShift: shift})
	if err != nil {
		return nil, err
	}
	c.s.log.Info("cluster was formatted over the admin API", "peer", c.r.RemoteAddr)
	return c.cluster()
}

// shiftOf gives the size of objects as a power of two; 0 for 0, the default.
func shiftOf(size int64) (uint8, error) {
	if size == 0 {
		return 0, nil
	}
	shift := bits.TrailingZeros64(uint64(size))
	if size < 0 || size != 1<<shift || shift < object.MinSizeShift || shift > object.MaxSizeShift {
		return 0, refuse(api.KindInvalid, "objects of %d bytes are not possible", size).withHint("take a power of two from 1 MiB to 2 GiB")
	}
	return uint8(shift), nil
}

func (c *call) nodes() (any, error) { return orEmpty(c.s.cfg.Cluster.Nodes()), nil }

func (c *call) disks() (any, error) { return c.s.disks(), nil }

func (s *Server) disks() []api.Disk {
	list := orEmpty(s.cfg.Disks())
	weights := map[string]uint64{}
	for _, d := range s.cfg.Cluster.Disks() {
		weights[d.ID] = d.Weight
	}
	for i := range list {
		list[i].Node, list[i].Weight = s.cfg.Node, weights[list[i].ID]
		list[i].Corrupt = orEmpty(list[i].Corrupt)
		if list[i].Errors == nil {
			list[i].Errors = map[string]uint64{}
		}
	}
	return list
}

func (c *call) node() (any, error) {
	s := c.s
	n := api.NodeStatus{
		Name: s.cfg.Node, Version: s.cfg.Version, Started: s.started.UTC(), Disks: s.disks(), GC: gcOf(s.cfg.Volumes.GC()),
		Sessions: len(s.sessions()), Transfers: len(s.transfers), Ready: true,
	}
	if err := s.cfg.Cluster.Ready(); err != nil {
		n.Ready, n.Reason = false, err.Error()
	}
	for _, m := range s.cfg.Cluster.Nodes() {
		if m.Self {
			n.ID = m.ID
		}
	}
	for _, d := range n.Disks {
		n.TotalBytes += d.TotalBytes
		n.UsedBytes += d.UsedBytes
		n.FreeBytes += d.FreeBytes
	}
	if s.cfg.Level != nil {
		n.LogLevel = strings.ToLower(s.cfg.Level.Level().String())
	}
	return n, nil
}

func gcOf(g vdi.GCStatus) api.GC {
	a := api.GC{Pending: g.Pending, Deleted: g.Deleted, Sweeping: g.Sweeping, Leftovers: g.Leftovers, LastError: g.LastError}
	if !g.LastSweep.IsZero() {
		t := g.LastSweep.UTC()
		a.LastSweep = &t
	}
	return a
}

func (c *call) logLevel() (any, error) {
	if c.s.cfg.Level == nil {
		return nil, fmt.Errorf("this daemon's log has a fixed level: %w", vdi.ErrUnsupported)
	}
	return api.LogLevel{Level: strings.ToLower(c.s.cfg.Level.Level().String())}, nil
}

var logLevels = map[string]slog.Level{"debug": slog.LevelDebug, "info": slog.LevelInfo, "warn": slog.LevelWarn, "error": slog.LevelError}

func (c *call) setLogLevel() (any, error) {
	var q api.LogLevel
	if err := c.body(&q); err != nil {
		return nil, err
	}
	level, ok := logLevels[q.Level]
	if !ok {
		return nil, refuse(api.KindInvalid, "there is no log level %.64q", q.Level).withHint("take debug, info, warn or error")
	}
	if c.s.cfg.Level != nil {
		c.s.cfg.Level.Set(level)
		c.s.log.Log(c.r.Context(), max(level, slog.LevelInfo), "log level was set over the admin API", "level", q.Level, "peer", c.r.RemoteAddr)
	}
	return c.logLevel()
}

func (c *call) sessions() (any, error) {
	all, err := c.flag("all")
	switch {
	case err != nil:
		return nil, err
	case all:
		return c.allSessions()
	}
	return c.s.sessions(), nil
}

func (s *Server) sessions() []api.Session {
	list := []api.Session{}
	for _, src := range s.cfg.Sessions {
		list = append(list, src.Sessions()...)
	}
	for i := range list {
		list[i].Node = s.cfg.Node
	}
	slices.SortStableFunc(list, func(a, b api.Session) int { return a.Started.Compare(b.Started) })
	return list
}

func (c *call) exports() (any, error) {
	volumes, err := c.s.cfg.Volumes.List(c.r.Context())
	if err != nil {
		return nil, err
	}
	list := []api.Export{}
	for _, v := range volumes {
		for _, p := range c.s.cfg.Exports() {
			tag := snapshotName(v)
			list = append(list, api.Export{
				Protocol: p.Protocol, URI: p.URI(v.Name, tag), VDI: v.Name, Snapshot: tag, Size: v.Size, ReadOnly: v.Snapshot,
			})
		}
	}
	return list, nil
}

func (c *call) description() error {
	c.w.Header().Set("Content-Type", api.TypeJSON)
	_, err := c.w.Write(c.s.openapi)
	return err
}

func (c *call) healthz() error { return c.text(http.StatusOK, "ok") }

func (c *call) readyz() error {
	if err := c.s.cfg.Cluster.Ready(); err != nil {
		return c.text(http.StatusServiceUnavailable, err.Error())
	}
	return c.text(http.StatusOK, "ok")
}

func (c *call) text(status int, s string) error {
	c.w.Header().Set("Content-Type", typeText)
	c.w.Header().Set("Cache-Control", "no-store")
	c.w.WriteHeader(status)
	_, err := fmt.Fprintln(c.w, s)
	return err
}

// profile serves the runtime's profiles. Those that take a time are bound by the client's
// patience.
func (c *call) profile() error {
	switch c.r.PathValue("profile") {
	case "cmdline":
		pprof.Cmdline(c.w, c.r)
	case "profile":
		pprof.Profile(c.w, c.r)
	case "symbol":
		pprof.Symbol(c.w, c.r)
	case "trace":
		pprof.Trace(c.w, c.r)
	default:
		pprof.Index(c.w, c.r)
	}
	return nil
}

// NBDExports is an ExportPoint for NBD at a HOST:PORT.
func NBDExports(address string) ExportPoint {
	return ExportPoint{Protocol: "nbd", URI: func(name, tag string) string {
		if tag != "" {
			name += "@" + tag
		}
		return (&url.URL{Scheme: "nbd", Host: address, Path: "/" + name}).String()
	}}
}
