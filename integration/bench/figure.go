package main

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// measurement is what one run of one case against one server gave.
type measurement struct {
	value float64       // in the case's unit, more is better
	ops   float64       // operations carried out
	cpu   time.Duration // of the server, user and system
	rss   int64         // resident memory of the server after the run, bytes
}

// series are the rounds of one case against one server.
type series struct {
	Rounds     []float64 `json:"rounds"`
	CPUMicros  []float64 `json:"cpu_us_per_op"`
	ResidentMB []float64 `json:"resident_mib"`
}

func (s *series) add(m measurement) {
	s.Rounds = append(s.Rounds, m.value)
	s.CPUMicros = append(s.CPUMicros, float64(m.cpu.Microseconds())/max(m.ops, 1))
	s.ResidentMB = append(s.ResidentMB, float64(m.rss)/(1<<20))
}

func median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	v = slices.Sorted(slices.Values(v))
	if n := len(v); n%2 == 0 {
		return (v[n/2-1] + v[n/2]) / 2
	}
	return v[len(v)/2]
}

// figure is the outcome of one case.
type figure struct {
	Case         string             `json:"case"`
	Unit         string             `json:"unit"`
	Goal         float64            `json:"goal_ratio,omitempty"`
	GoalAbsolute float64            `json:"goal,omitempty"`
	Servers      map[string]*series `json:"servers"`
}

var kinds = []string{"sheep", "nbdkit", "qemu-nbd"}

func (f figure) ratio(peer string) float64 {
	p, own := f.Servers[peer], f.Servers["sheep"]
	if p == nil || own == nil || median(p.Rounds) == 0 {
		return 0
	}
	return median(own.Rounds) / median(p.Rounds)
}

// verdict holds the figure against its goal.
func (f figure) verdict() string {
	if f.Servers["sheep"] == nil {
		return ""
	}
	switch {
	case f.Goal > 0 && f.ratio("nbdkit") >= f.Goal, f.GoalAbsolute > 0 && median(f.Servers["sheep"].Rounds) >= f.GoalAbsolute:
		return "met"
	case f.Goal > 0 || f.GoalAbsolute > 0:
		return "MISSED"
	}
	return ""
}

func (f figure) goal() string {
	switch {
	case f.Goal > 0:
		return fmt.Sprintf("%.1fx %s", f.Goal, f.verdict())
	case f.GoalAbsolute > 0:
		return fmt.Sprintf("%s %s", short(f.GoalAbsolute), f.verdict())
	}
	return ""
}

func short(v float64) string {
	switch {
	case v >= 100_000:
		return fmt.Sprintf("%.0fk", v/1000)
	case v >= 10_000:
		return fmt.Sprintf("%.1fk", v/1000)
	case v >= 100:
		return fmt.Sprintf("%.0f", v)
	}
	return fmt.Sprintf("%.2f", v)
}

// line is the progress report: every round of every server.
func (f figure) line() string {
	parts := []string{fmt.Sprintf("%-22s", f.Case)}
	for _, k := range kinds {
		if s := f.Servers[k]; s != nil {
			var rounds []string
			for _, v := range s.Rounds {
				rounds = append(rounds, short(v))
			}
			parts = append(parts, k+" "+strings.Join(rounds, " "))
		}
	}
	return strings.Join(parts, "  ")
}

// row is the figure's line of the final table.
func (f figure) row() string {
	cell := func(kind string) (figure, ratio string) {
		s := f.Servers[kind]
		if s == nil {
			return "-", "-"
		}
		return short(median(s.Rounds)), fmt.Sprintf("%.2f", f.ratio(kind))
	}
	own, _ := cell("sheep")
	nbdkit, nbdkitRatio := cell("nbdkit")
	qemu, qemuRatio := cell("qemu-nbd")
	var cpu, rss []string
	for _, k := range kinds {
		if s := f.Servers[k]; s != nil {
			cpu = append(cpu, fmt.Sprintf("%.0f", median(s.CPUMicros)))
			rss = append(rss, fmt.Sprintf("%.0f", median(s.ResidentMB)))
		}
	}
	return fmt.Sprintf("%-22s %-5s %9s %9s %6s %9s %6s %10s  %-14s %s", f.Case, f.Unit, own, nbdkit, nbdkitRatio, qemu, qemuRatio,
		f.goal(), strings.Join(cpu, "/"), strings.Join(rss, "/"))
}
