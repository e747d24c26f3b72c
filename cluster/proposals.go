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

	mu     sync.Mutex
	urgent []state.ChangeISR // clients wait for them
	added  []state.ChangeISR // members that are in sync: nobody waits for them
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
	// additionsAtATime bounds one of additions, of which one is under way at a time: they can
	// wait, and clients shall not notice them.
	additionsAtATime = 128
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
	if c.Add == 0 {
		p.urgent = append(p.urgent, c)
	} else {
		p.added = append(p.added, c)
	}
	signal(p.wake)
}

// run proposes what is added, until ctx ends.
func (p *proposals) run(ctx context.Context) {
	slots, adding := make(chan struct{}, batchesAtATime), make(chan struct{}, 1)
	var batches sync.WaitGroup
	defer batches.Wait()
	begin := func(slots chan struct{}, changes []state.ChangeISR) {
		batches.Go(func() {
			p.propose(ctx, changes)
			<-slots
			signal(p.wake) // more may wait for the slot
		})
	}
	for {
		select {
		case <-ctx.Done():
			return
		case <-p.wake:
		}
		if !p.gather(ctx) {
			return
		}
		if changes := p.take(&p.urgent, slots, changesAtATime); len(changes) > 0 {
			begin(slots, changes)
		}
		if changes := p.take(&p.added, adding, additionsAtATime); len(changes) > 0 {
			begin(adding, changes)
		}
	}
}

// gather waits for company, unless something urgent is there. It reports false if ctx has
// ended.
func (p *proposals) gather(ctx context.Context) bool {
	t := time.NewTimer(proposalsGather)
	defer t.Stop()
	for {
		p.mu.Lock()
		ready := len(p.urgent) > 0 || len(p.added) >= additionsAtATime
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

// take takes what waits in a list, as much as goes into one command, with a slot; nothing if
// none is free.
func (p *proposals) take(list *[]state.ChangeISR, slots chan struct{}, most int) []state.ChangeISR {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := min(len(*list), most)
	if n == 0 {
		return nil
	}
	select {
	case slots <- struct{}{}:
	default:
		return nil
	}
	changes := (*list)[:n:n]
	if *list = (*list)[n:]; len(*list) == 0 {
		*list = nil
	} else {
		signal(p.wake)
	}
	return changes
}

func (p *proposals) propose(ctx context.Context, changes []state.ChangeISR) {
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
