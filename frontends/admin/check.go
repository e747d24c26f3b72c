package admin

import (
	"context"
	"errors"
	"fmt"
	"time"

	"sheepdog/frontends/admin/api"
	"sheepdog/storage/object"
	"sheepdog/vdi"
)

// progressEvery is how often progress is told.
const progressEvery = 200 * time.Millisecond

// progress returns what tells clients of progress. If they are gone, the work's context
// ends by itself.
func (l *lines) progress(what string) vdi.Progress { return progressTo(l.event, what) }

func progressTo(tell func(api.Event) error, what string) vdi.Progress {
	var last time.Time
	return func(done, total int64) {
		if now := time.Now(); now.Sub(last) >= progressEvery {
			last = now
			tell(api.Event{Progress: &api.Progress{Done: done, Total: total, What: what}})
		}
	}
}

func (l *lines) event(e api.Event) error { return l.write(e) }

// events does long work whose answer is events. The context ends when the client goes or the server stops; do returns
// the last event.
func (c *call) events(do func(context.Context, *lines) (api.Event, error)) error {
	ctx, release, err := c.s.transfer(c.r.Context())
	if err != nil {
		return err
	}
	defer release()
	l := c.lines()
	last, err := do(ctx, l)
	if err == nil {
		err = l.event(last)
	}
	return l.end(cause(ctx, err), func(e *api.Error) any { return api.Event{Error: e} })
}

func (c *call) check() error {
	repair, err := c.flag("repair")
	if err != nil {
		return err
	}
	return c.events(func(ctx context.Context, l *lines) (api.Event, error) {
		report := &api.CheckReport{Problems: []api.Problem{}}
		_, err := c.checkOne(ctx, l, report, c.name(), vdi.CheckOptions{Repair: repair})
		return api.Event{Report: report}, err
	})
}

// cause prefers why a context ended to the fact that it did.
func cause(ctx context.Context, err error) error {
	if why := context.Cause(ctx); err != nil && why != nil && !errors.Is(why, context.Canceled) {
		return why
	}
	return err
}

// maxProblems bounds the problems of a report.
const maxProblems = 1000

func add(r *api.CheckReport, p api.Problem) {
	if len(r.Problems) < maxProblems {
		r.Problems = append(r.Problems, p)
		return
	}
	r.More++
}

// checkOne returns the policies that the next check need not wait for.
func (c *call) checkOne(ctx context.Context, l *lines, sum *api.CheckReport, name string, o vdi.CheckOptions) ([]object.PolicyID, error) {
	r, err := c.s.cfg.Volumes.Check(ctx, name, o, l.progress(name))
	if err != nil {
		return o.PassOver, err
	}
	sum.VDIs++
	sum.Objects += r.Objects
	sum.Repaired += r.Repaired
	sum.More += r.More
	for _, p := range r.Problems {
		add(sum, api.Problem{
			VDI: name, Tag: p.Tag, SnapshotID: p.Snapshot, Kind: p.Kind, Object: p.Object.String(), Off: p.Off, Len: p.Len, Text: p.Text, Repaired: p.Repaired,
		})
	}
	for _, u := range r.Unsearched {
		o.PassOver = append(o.PassOver, u.Policy)
		add(sum, api.Problem{Kind: api.ProblemUnsearched, Text: fmt.Sprintf(
			"where volumes with %d copies are kept was not searched for leftovers: %s: check again when it is reachable", u.Copies, u.Reason)})
	}
	return o.PassOver, nil
}

// checkAll checks every VDI, and what the disks of all nodes say of themselves.
func (c *call) checkAll() error {
	repair, err := c.flag("repair")
	if err != nil {
		return err
	}
	content := c.query("content") != "false"
	return c.events(func(ctx context.Context, l *lines) (api.Event, error) {
		if err := c.s.cfg.Cluster.Ready(); err != nil {
			return api.Event{}, fmt.Errorf("check the cluster: %w", err)
		}
		report := &api.CheckReport{Problems: []api.Problem{}}
		err := c.checkEverything(ctx, l, report, repair, content)
		return api.Event{Report: report}, err
	})
}

// checkEverything begins with what repairs content, so that what is found later is not the
// same once more.
func (c *call) checkEverything(ctx context.Context, l *lines, r *api.CheckReport, repair, content bool) error {
	if content {
		if err := c.scrubAll(ctx, l, r, repair); err != nil {
			return err
		}
	}
	replicas, err := c.s.cfg.Cluster.CheckReplicas(ctx, repair, l.progress("replicas"))
	if err != nil {
		return err
	}
	r.Repaired += replicas.Repaired
	r.More += replicas.More
	for _, p := range replicas.Problems {
		add(r, p)
	}
	for _, d := range c.s.everyDisk(ctx) {
		checkDisk(r, d)
	}
	return c.checkVolumes(ctx, l, r, repair)
}

func checkDisk(r *api.CheckReport, d api.Disk) {
	if d.State != api.DiskOK {
		add(r, api.Problem{Kind: api.ProblemDisk, Node: d.Node, Text: fmt.Sprintf("disk %s of node %s is %s: %s", d.Path, d.Node, d.State, d.Reason)})
	}
	for _, o := range d.Corrupt {
		add(r, api.Problem{
			Kind: vdi.ProblemCorrupt, Object: o.Object, Node: d.Node,
			Text: fmt.Sprintf("%d of its blocks on disk %s of node %s do not match their checksums: \"dog cluster check --repair\" takes them from another replica if there is one; else restore the data from a backup, or write over it", len(o.Blocks), d.Path, d.Node),
		})
	}
}

func (c *call) checkVolumes(ctx context.Context, l *lines, r *api.CheckReport, repair bool) error {
	list, err := c.s.cfg.Volumes.List(ctx)
	if err != nil {
		return err
	}
	last, o := "", vdi.CheckOptions{Repair: repair}
	for _, v := range list {
		if v.Name == last {
			continue // Check takes a VDI with its snapshots
		}
		last = v.Name
		// What was deleted meanwhile needs no check.
		if o.PassOver, err = c.checkOne(ctx, l, r, v.Name, o); err != nil && !errors.Is(err, vdi.ErrNotFound) {
			return err
		}
	}
	return nil
}
