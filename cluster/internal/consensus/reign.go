package consensus

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/hashicorp/raft"
)

// Reign is a time during which this node leads: one term of the raft.
type Reign struct {
	Term  uint64
	Since time.Time // when this node knew, which is not before it was elected
}

// Reign returns the present one; false if this node does not lead.
func (l *Log) Reign() (Reign, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.reign, l.leading
}

// CatchUp waits until the machines of this node have applied all that was committed before
// the call. A leader's machines may lag when it is elected. It fails on a node that does not lead.
func (l *Log) CatchUp(ctx context.Context) error {
	f := l.raft.Barrier(enqueueTimeout)
	if _, err := l.await(ctx, f.Error); err != nil {
		return fmt.Errorf("catch up with the log: %w", l.leaderError(err))
	}
	return nil
}

// QuorumContact returns the latest time at which this node certainly led in a reign, that
// is, at which nobody had been elected after it: when a message left that a quorum of the
// voters has answered. The zero time stands for never. It is the base of leases (INV-R5):
// what it says stays true if this process is stopped for any time. (raft's VerifyLeader
// counts servers without a vote, too, and so proves nothing.)
func (l *Log) QuorumContact(r Reign) time.Time {
	now := time.Now()
	var times []time.Time
	for _, s := range l.raft.GetConfiguration().Configuration().Servers {
		if s.Suffrage != raft.Voter {
			continue
		}
		at := time.Time{}
		if string(s.ID) == l.cfg.Node {
			at = now
		} else if l.net != nil {
			if c, ok := l.net.contact(s.ID, r.Term); ok {
				at = c.sent
			}
		}
		times = append(times, at)
	}
	if len(times) == 0 {
		return time.Time{}
	}
	slices.SortFunc(times, func(a, b time.Time) int { return b.Compare(a) })
	return times[quorum(len(times))-1]
}

// LeaderLease is how long ago the QuorumContact of a leader may be: then it goes on, and
// may not know that there is another one.
func (l *Log) LeaderLease() time.Duration { return l.cfg.leaderLease() }
