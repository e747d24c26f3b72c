package cluster

import (
	"fmt"
	"slices"
	"time"

	"sheepdog/cluster/internal/replicas"
	"sheepdog/cluster/state"
)

// RecoveryStatus tells how far one node, as a primary, has brought another one in sync.
// Each node knows it of itself as the source; ask all for the whole.
type RecoveryStatus struct {
	Source string `json:"source"` // who brings
	Node   string `json:"node"`   // to whom
	// Partitions are those that Node learns from Source. Objects are to be looked at yet;
	// most of them may turn out to be equal. While Listing, not all of them are known.
	Partitions int  `json:"partitions"`
	Objects    int  `json:"objects"`
	Listing    bool `json:"listing,omitempty"`

	DoneObjects    uint64        `json:"done_objects"`
	DoneBytes      uint64        `json:"done_bytes"`       // that were not equal
	LeftBytes      uint64        `json:"left_bytes"`       // estimated from those, for all that Node shall hold of Source
	BytesPerSecond float64       `json:"bytes_per_second"` // lately
	Since          time.Duration `json:"since"`            // that Source brings something
	// ETA is when it will be done, if it goes on like this; nil: nobody knows.
	ETA *time.Duration `json:"eta,omitempty"`
	// Waits says what it waits for; "": for nothing.
	Waits string `json:"waits,omitempty"`
}

// Recovery tells what this node brings to others, as the primary of partitions that they
// learn; empty if that is nothing. It takes no time.
func (n *Node) Recovery() []RecoveryStatus {
	list := []RecoveryStatus{}
	if n.flock == nil || n.flock.replicas() == nil {
		return list
	}
	v, self := n.state.View(), state.NodeID(n.self.Load())
	var held density
	if n.cfg.Store != nil {
		held = density{objects: float64(n.cfg.Store.Objects()), partitions: float64(Held(v, self))}
	}
	for _, w := range n.flock.replicas().Recovery() {
		s := RecoveryStatus{
			Source: n.cfg.Name, Node: nameOf(v, w.Node), Partitions: w.Partitions, Objects: w.Objects, Listing: w.Unlisted > 0,
			DoneObjects: w.Done, DoneBytes: w.DoneBytes, BytesPerSecond: w.Rate, Since: w.Since,
		}
		missing := max(w.Partitions, missing(v, self, w.Node))
		s.LeftBytes = leftBytes(w, missing, held)
		switch {
		case w.NoSpace:
			s.Waits = "the node has no space for some of it: add disks or nodes, or delete volumes or snapshots"
		case w.Failure != nil:
			s.Waits = fmt.Sprintf("what was tried last has failed, and is tried again: %v", w.Failure)
		}
		switch {
		case s.Waits != "":
		case w.InSync > 0 && w.Since >= etaAfter: // partitions are about equal
			eta := time.Duration(float64(w.Since) * float64(missing) / float64(w.InSync)).Round(time.Second)
			s.ETA = &eta
		case !s.Listing && w.Rate > 0 && w.Done > 0:
			eta := time.Duration(float64(s.LeftBytes) / w.Rate * float64(time.Second)).Round(time.Second)
			s.ETA = &eta
		}
		list = append(list, s)
	}
	return list
}

// etaAfter is after how long the partitions that are in sync say how long the others take.
const etaAfter = time.Second

// density is how many objects there are in how many partitions.
type density struct{ objects, partitions float64 }

// of is how many there are then in so many partitions.
func (d density) of(partitions float64) float64 {
	if d.partitions == 0 {
		return 0
	}
	return partitions * d.objects / d.partitions
}

// leftBytes estimates what a node is still to be brought that misses so many partitions of this one, which holds so much
// of all. Those that are listed are known. The others may have as many objects to be looked at as those that were
// completed, but no more than all that is held says: the first few say little, and all of many have more than most.
func leftBytes(w replicas.Recovering, missing int, held density) uint64 {
	if w.Done == 0 {
		return 0
	}
	objects := float64(w.Objects)
	if unlisted := float64(missing - (w.Partitions - w.Unlisted)); w.InSync > 0 && unlisted > 0 {
		done := density{objects: float64(w.Done), partitions: float64(w.InSync)}
		objects += min(done.of(unlisted), held.of(unlisted))
	}
	return uint64(float64(w.DoneBytes) / float64(w.Done) * objects)
}

// missing counts the partitions of a primary that another node shall hold and is not in sync with.
func missing(v *state.View, primary, node state.NodeID) (count int) {
	for _, p := range v.Policies {
		for i := range p.Partitions {
			q := &p.Partitions[i]
			if q.ISR[0] == primary && slices.Contains(q.Targets, node) && !slices.Contains(q.ISR, node) {
				count++
			}
		}
	}
	return count
}

// RecoveryCounters count what this node has done since its start to make replicas equal.
type RecoveryCounters struct {
	Compared   uint64 // objects that were held against the primary's
	TakenBytes uint64 // content that was not equal, and was taken
	MovedBytes uint64 // that went over the network for it: content and checksums, either way
	Healed     uint64 // rotten objects that were replaced from others
	Purged     uint64 // objects that were removed because other nodes hold them
}

// RecoveryCounters returns them. It takes no time.
func (n *Node) RecoveryCounters() (c RecoveryCounters) {
	if n.flock == nil || n.flock.replicas() == nil {
		return c
	}
	r := &n.flock.replicas().Count
	return RecoveryCounters{
		Compared: r.Repaired.Load(), TakenBytes: r.RepairedBytes.Load(), MovedBytes: r.MovedBytes.Load(), Healed: r.Fetched.Load(), Purged: r.Purged.Load(),
	}
}

func nameOf(v *state.View, id state.NodeID) string {
	if m := v.Node(id); m != nil {
		return m.Name
	}
	return "?"
}
