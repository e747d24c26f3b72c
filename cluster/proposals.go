package cluster

import (
	"context"
	"sync"
	"time"

	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// proposals brings changes of partitions to the log, many in one command. A node's return
// changes every partition that it holds, and each command is an epoch, a sync of the log on
// every voter, and a round of the leader: what is wanted at the same time goes together.
type proposals struct {
	f    *flock
	wake chan struct{}

	mu      sync.Mutex
	waiting []state.ChangeISR
	urgent  bool // clients wait for one that waits
	// pending are those that wait or are under way, so that one that is repeated is not
	// proposed twice.
	pending map[proposal]bool
}

type proposal struct {
	group       object.Group
	epoch       state.Epoch
	add, remove state.NodeID
	renew       bool
}

const (
	// proposalsGather is how long an addition waits for company; nobody waits for it.
	proposalsGather = 20 * time.Millisecond
	// changesAtATime bounds a command. All that it changes settles at the same time, and
	// clients wait meanwhile.
	changesAtATime = 512
	// batchesAtATime bounds the commands that wait for the log, so that one that finds no
	// leader does not keep those up that come after it.
	batchesAtATime = 4
	// changesPending bounds the changes that wait or are under way. What is beyond is
	// forgotten, and asked for again.
	changesPending = state.MaxPartitions
	// batchTimeout bounds how long one command is tried.
	batchTimeout = 5 * time.Second
)

func (p *proposals) init(f *flock) {
	p.f, p.pending, p.wake = f, map[proposal]bool{}, make(chan struct{}, 1)
}

func proposalOf(c *state.ChangeISR) proposal {
	return proposal{object.Group{Policy: c.Policy, Partition: c.Partition}, c.Epoch, c.Add, c.Remove, c.Renew}
}

// add begins to propose a change, unless it is being proposed.
func (p *proposals) add(c state.ChangeISR) {
	key := proposalOf(&c)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.pending[key] || len(p.pending) >= changesPending {
		return
	}
	p.pending[key] = true
	p.waiting = append(p.waiting, c)
	p.urgent = p.urgent || c.Add == 0
	signal(p.wake)
}

// run proposes what is added, until ctx ends.
func (p *proposals) run(ctx context.Context) {
	slots := make(chan struct{}, batchesAtATime)
	var batches sync.WaitGroup
	defer batches.Wait()
	for {
		select {
		case <-ctx.Done():
			return
		case <-p.wake:
		}
		if !p.gather(ctx) {
			return
		}
		select {
		case <-ctx.Done():
			return
		case slots <- struct{}{}:
		}
		changes := p.take()
		batches.Go(func() {
			defer func() { <-slots }()
			p.propose(ctx, changes)
		})
	}
}

// gather waits for company, unless something urgent is there. It reports false if ctx has
// ended.
func (p *proposals) gather(ctx context.Context) bool {
	t := time.NewTimer(proposalsGather)
	defer t.Stop()
	for {
		p.mu.Lock()
		ready := p.urgent || len(p.waiting) >= changesAtATime
		p.mu.Unlock()
		if ready {
			return true
		}
		select {
		case <-ctx.Done():
			return false
		case <-t.C:
			return true
		case <-p.wake:
		}
	}
}

// take takes what waits, as much as goes into one command.
func (p *proposals) take() []state.ChangeISR {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := min(len(p.waiting), changesAtATime)
	changes := p.waiting[:n:n]
	if p.waiting = p.waiting[n:]; len(p.waiting) == 0 {
		p.waiting, p.urgent = nil, false
	} else {
		signal(p.wake)
	}
	return changes
}

func (p *proposals) propose(ctx context.Context, changes []state.ChangeISR) {
	if len(changes) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, batchTimeout)
	defer cancel()
	res, err := p.f.n.command(ctx, state.Command{ChangeISRs: &state.ChangeISRs{Changes: changes}})
	p.f.log.Debug("changes of partitions' replicas", "wanted", len(changes), "made", res.Partitions, "epoch", res.Epoch, "err", err)
	p.mu.Lock()
	defer p.mu.Unlock()
	for i := range changes {
		delete(p.pending, proposalOf(&changes[i]))
	}
}
