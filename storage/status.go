package storage

import (
	"sync/atomic"
	"time"
)

// State is a disk's state of service.
type State string

// States of a disk.
const (
	StateOK     State = "ok"
	StateFull   State = "full"   // writes that need new space are refused
	StateFailed State = "failed" // out of service
)

// Status describes all disks, in the order of Config.Disks.
type Status struct {
	Disks []DiskStatus `json:"disks"`
}

// DiskStatus describes one disk.
type DiskStatus struct {
	Dir   string `json:"dir"`
	ID    string `json:"id"`
	State State  `json:"state"`
	Error string `json:"error,omitempty"` // why it is out of service
	// Retired: it is to be taken out, and gets nothing more: see Store.Retire.
	Retired bool `json:"retired,omitempty"`

	// Filling: it came when others had something, and takes its share of that.
	Filling bool `json:"filling,omitempty"`
	// Partitions live on the disk; PartitionsToCome and PartitionsToGo are still to be moved to or from it, as of when that was
	// looked at last, MoveBlocked says what they wait for if they do, and MovedBytes were copied to the disk since the start.
	Partitions       int    `json:"partitions"`
	PartitionsToCome int64  `json:"partitions_to_come,omitempty"`
	PartitionsToGo   int64  `json:"partitions_to_go,omitempty"`
	MoveBlocked      string `json:"move_blocked,omitempty"`
	MovedBytes       int64  `json:"moved_bytes,omitempty"`

	TotalBytes uint64 `json:"total_bytes"`
	FreeBytes  uint64 `json:"free_bytes"` // less what is promised to pending writes
	UsedBytes  uint64 `json:"used_bytes"`
	Objects    int64  `json:"objects"` // of what the log had at the start, files are counted as they were then

	LogBytes      int64 `json:"log_bytes"` // what a restart would replay
	LogLimitBytes int64 `json:"log_limit_bytes"`
	Checkpoints   int64 `json:"checkpoints"`
	Stalls        int64 `json:"stalls"` // requests that had to wait for the checkpoint

	ScrubProgress float64   `json:"scrub_progress"` // 0 to 1; 0 when none is going on
	ScrubBytes    int64     `json:"scrub_bytes"`    // verified since the start
	ScrubEnd      time.Time `json:"scrub_end"`      // of the last complete pass; zero: none yet

	Corrupt       []Corrupt `json:"corrupt,omitempty"` // found and not overwritten since; bounded
	CorruptEvents uint64    `json:"corrupt_events"`
	IOErrors      int64     `json:"io_errors"`

	Reads   int64 `json:"reads"`
	Writes  int64 `json:"writes"`  // through the log
	Directs int64 `json:"directs"` // writes straight into object files
	Zeroes  int64 `json:"zeroes"`
	Deletes int64 `json:"deletes"`
	Copies  int64 `json:"copies"`
	Syncs   int64 `json:"syncs"`
}

// counters are kept apart from each other's cache lines only where that was worth it: nowhere yet.
type counters struct {
	reads, writes, directs, zeroes, deletes, copies, syncs atomic.Int64
	objects, checkpoints, stalls, ioErrors                 atomic.Int64
}

// Status describes the disks as they are now.
func (s *Store) Status() Status {
	var st Status
	count := s.routes.count()
	for _, d := range s.routes.drives() {
		one := d.status()
		one.Partitions = count[d]
		st.Disks = append(st.Disks, one)
	}
	return st
}

// Objects is about how many objects all disks hold: the sum of what Status says of them. It takes no time.
func (s *Store) Objects() (n int64) {
	for _, d := range s.routes.drives() {
		n += d.count.objects.Load()
	}
	return max(0, n)
}

func (d *drive) status() DiskStatus {
	total, free, full := d.space.usage()
	c := &d.count
	st := DiskStatus{
		Dir: d.String(), ID: d.name, State: StateOK, Retired: d.retired.Load(), Filling: d.filling.Load(),
		PartitionsToCome: d.moves.come.Load(), PartitionsToGo: d.moves.gone.Load(), MovedBytes: d.moves.bytes.Load(),
		TotalBytes: uint64(total), FreeBytes: uint64(free), UsedBytes: uint64(max(0, total-free)), Objects: c.objects.Load(),
		Checkpoints: c.checkpoints.Load(), Stalls: c.stalls.Load(), IOErrors: c.ioErrors.Load(),
		ScrubBytes: d.scrubber.bytes.Load(), Corrupt: d.rot.list(),
		Reads: c.reads.Load(), Writes: c.writes.Load(), Directs: c.directs.Load(), Zeroes: c.zeroes.Load(),
		Deletes: c.deletes.Load(), Copies: c.copies.Load(), Syncs: c.syncs.Load(),
	}
	if reason := d.moves.blocked.Load(); reason != nil {
		st.MoveBlocked = *reason
	}
	d.rot.mu.Lock()
	st.CorruptEvents = d.rot.events
	d.rot.mu.Unlock()
	if full {
		st.State = StateFull
	}
	if err := d.failed(); err != nil {
		st.State, st.Error = StateFailed, err.Error()
	}
	if d.log != nil {
		st.LogBytes, st.LogLimitBytes = d.log.Bytes()
	}
	if n := d.scrubber.total.Load(); n > 0 {
		st.ScrubProgress = float64(d.scrubber.done.Load()) / float64(n)
	}
	if ns := d.scrubber.end.Load(); ns != 0 {
		st.ScrubEnd = time.Unix(0, ns)
	}
	return st
}
