package cluster

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"sheepdog/cluster/internal/replica"
	"sheepdog/cluster/internal/replicas"
	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// CheckProgress tells how far CheckReplicas is.
type CheckProgress struct {
	Partitions int `json:"partitions"` // of all policies
	Done       int `json:"done"`
	Objects    int `json:"objects"` // compared
}

// CheckReport is the outcome of CheckReplicas.
type CheckReport struct {
	Partitions int           `json:"partitions"` // compared
	Objects    int           `json:"objects"`
	Degraded   int           `json:"degraded"` // partitions with fewer replicas in sync than copies
	Findings   []CheckResult `json:"findings"` // at most MaxFindings
	More       int           `json:"more,omitempty"`
	// Unchecked are partitions that could not be compared, and why; at most MaxFindings.
	Unchecked []UncheckedPartition `json:"unchecked"`
}

// MaxFindings bounds what a CheckReport names.
const MaxFindings = 10_000

// Clean reports whether everything was compared and nothing is wrong, or not any more.
func (r *CheckReport) Clean() bool {
	for i := range r.Findings {
		if !r.Findings[i].Repaired {
			return false
		}
	}
	return len(r.Unchecked) == 0 && r.More == 0
}

// CheckResult is an object that is not on a node what it is on the partition's primary.
type CheckResult struct {
	Policy    object.PolicyID  `json:"policy"`
	Partition object.Partition `json:"partition"`
	Object    string           `json:"object"`
	Node      string           `json:"node"`
	// Kind is "differs"; "missing" on the node; "extra", missing on the primary; "newer",
	// the primary has the older version; "unreadable". What is extra or newer is not
	// repaired: the primary may be who has lost something.
	Kind     string `json:"kind"`
	Blocks   int    `json:"blocks,omitempty"` // of 4 KiB, that differ
	Reason   string `json:"reason,omitempty"`
	Repaired bool   `json:"repaired,omitempty"`
}

// UncheckedPartition is a partition that could not be compared.
type UncheckedPartition struct {
	Policy    object.PolicyID  `json:"policy"`
	Partition object.Partition `json:"partition"`
	Reason    string           `json:"reason"`
}

const (
	checksAtATime = 8
	// checkPatience is how long a check waits for a partition's primary.
	checkPatience = 30 * time.Second
)

// CheckReplicas compares all replicas in sync by their tables of checksums, while clients
// go on, and with repair makes them equal to their primaries. The content of blocks is
// compared with the tables by scrubbing, not here. progress may be nil; it is called by
// one goroutine at a time, for each partition. A partition that cannot be compared is in
// the report; the error is that of ctx, or ErrUnavailable before the cluster is formatted.
func (n *Node) CheckReplicas(ctx context.Context, repair bool, progress func(CheckProgress)) (CheckReport, error) {
	c := &checking{n: n, repair: repair, progress: progress, report: CheckReport{Findings: []CheckResult{}, Unchecked: []UncheckedPartition{}}}
	v := n.state.View()
	if !v.Formatted() {
		return c.report, errUnformatted
	}
	if n.flock == nil {
		return c.alone(ctx)
	}
	for _, p := range v.Policies {
		c.state.Partitions += len(p.Partitions)
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(checksAtATime)
	for _, p := range v.Policies {
		for i := range p.Partitions {
			g.Go(func() error { return c.partition(ctx, object.Group{Policy: p.ID, Partition: object.Partition(i)}) })
		}
	}
	err := g.Wait()
	return c.report, err
}

// checking is a CheckReplicas under way.
type checking struct {
	n        *Node
	repair   bool
	progress func(CheckProgress)

	mu     sync.Mutex
	state  CheckProgress
	report CheckReport
}

// alone is a check where there are no other replicas.
func (c *checking) alone(ctx context.Context) (CheckReport, error) {
	v := c.n.state.View()
	for _, p := range v.Policies {
		c.report.Partitions += len(p.Partitions)
		if err := c.n.List(ctx, p.ID, func(object.Info) error { c.report.Objects++; return nil }); err != nil {
			return c.report, err
		}
	}
	return c.report, nil
}

// partition has the primary check a partition; who that is may change.
func (c *checking) partition(ctx context.Context, g object.Group) error {
	for begun := time.Now(); ; {
		k, copies, err := c.attempt(ctx, g)
		if err == nil {
			c.done(g, k, copies)
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if time.Since(begun) > checkPatience || !errors.Is(err, replica.ErrRetry) {
			c.failed(g, err)
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func (c *checking) attempt(ctx context.Context, g object.Group) (k *replicas.Checked, copies int, err error) {
	v, r := c.n.state.View(), c.n.flock.replicas()
	policy := v.Policy(g.Policy)
	if r == nil || policy == nil || int(g.Partition) >= len(policy.Partitions) {
		return nil, 0, replica.ErrRetry
	}
	p := &policy.Partitions[g.Partition]
	primary := v.Node(p.Primary())
	if p.Undecided() || primary == nil || primary.State != state.NodeUp {
		return nil, 0, fmt.Errorf("%w: nobody serves the partition now", replica.ErrRetry)
	}
	k, err = r.Check(ctx, replica.Peer{Node: primary.ID, Incarnation: primary.Incarnation}, g, p.Epoch, c.repair)
	return k, policy.Copies, err
}

func (c *checking) done(g object.Group, k *replicas.Checked, copies int) {
	v := c.n.state.View()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.report.Partitions++
	c.report.Objects += k.Objects
	c.report.More += k.More
	if k.Replicas < copies {
		c.report.Degraded++
	}
	for _, f := range k.Findings {
		if len(c.report.Findings) >= MaxFindings {
			c.report.More++
			continue
		}
		c.report.Findings = append(c.report.Findings, CheckResult{
			Policy: g.Policy, Partition: g.Partition, Object: f.Object.String(), Node: nameOf(v, f.Node),
			Kind: f.Kind, Blocks: f.Blocks, Reason: f.Reason, Repaired: f.Repaired,
		})
	}
	c.tell(k.Objects)
}

func (c *checking) failed(g object.Group, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.report.Unchecked) < MaxFindings {
		c.report.Unchecked = append(c.report.Unchecked, UncheckedPartition{g.Policy, g.Partition, err.Error()})
	}
	c.tell(0)
}

func (c *checking) tell(objects int) {
	c.state.Done++
	c.state.Objects += objects
	if c.progress != nil {
		c.progress(c.state)
	}
}
