package replicas

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"sync/atomic"
	"time"

	"sheepdog/cluster/internal/replica"
	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// Rot that readers or scrubbing have found is replaced by what another replica has. A block
// whose checksum is known needs no order and no lock for that: only the content that the
// checksum is of is taken. Where checksums are rotten themselves, nobody can tell what the
// content was but those who have it: a member is made equal to the primary, like what a check
// finds; the primary takes it from a member as it does when somebody reads, while no change is
// under way.

const (
	healEvery = replica.Time(2 * time.Second)
	// healTries bounds how often it is tried to heal an object that nobody else has sound.
	healTries = 20
)

// healer replaces rot, one pass at a time.
type healer struct {
	at    replica.Time // of the goroutine that ticks
	busy  atomic.Bool
	tries map[object.Key]int // of the pass
}

func (h *healer) tick(r *Replicas) {
	now := r.now()
	if !r.current.Load() || now < h.at+healEvery || h.busy.Load() {
		return
	}
	h.at = now
	rotten := r.cfg.Store.Rotten()
	if len(rotten) == 0 {
		h.tries = nil
		return
	}
	h.busy.Store(true)
	r.works.Go(func() {
		defer h.busy.Store(false)
		h.pass(r, rotten)
	})
}

func (h *healer) pass(r *Replicas, rotten map[object.Key][]uint32) {
	if h.tries == nil {
		h.tries = map[object.Key]int{}
	}
	maps.DeleteFunc(h.tries, func(k object.Key, _ int) bool { _, still := rotten[k]; return !still })
	keys := slices.SortedFunc(maps.Keys(rotten), func(a, b object.Key) int {
		return cmp.Or(compareGroups(a.Group, b.Group), cmp.Compare(a.ID, b.ID))
	})
	for _, k := range keys {
		if r.ctx.Err() != nil || h.tries[k] >= healTries {
			continue
		}
		h.tries[k]++
		healed := 0
		var left []uint32
		for _, b := range rotten[k] {
			if r.healBlock(r.ctx, k, b) {
				healed++
			} else {
				left = append(left, b)
			}
		}
		if len(rotten[k]) == 0 || len(left) > 0 {
			r.healTable(r.ctx, k, left)
		}
		switch {
		case healed > 0:
			r.Count.Fetched.Add(1)
			r.cfg.Logger.Info("corrupt blocks were replaced by those of another replica", "object", k.String(), "blocks", healed)
		case h.tries[k] == healTries:
			r.cfg.Logger.Error("corrupt blocks cannot be replaced: no other replica has their content", "object", k.String(), "blocks", rotten[k])
		}
	}
}

// others are those who have, or may have, a partition beside this node.
func (r *Replicas) others(g object.Group) (list []replica.Peer, epoch state.Epoch) {
	r.mu.RLock()
	v := r.view
	r.mu.RUnlock()
	policy := v.Policy(g.Policy)
	if policy == nil || int(g.Partition) >= len(policy.Partitions) {
		return nil, 0
	}
	w := ViewOf(v, policy, int(g.Partition))
	return slices.DeleteFunc(w.ISR, func(m replica.Peer) bool { return m == r.cfg.Self }), w.Epoch
}

// askedAtMost bounds the nodes that are asked for the content of a block.
const askedAtMost = 32

// perhaps are those who may have content of a partition: others, and then nodes that were
// members, or are to be. What they have is believed by its checksum alone.
func (r *Replicas) perhaps(g object.Group) (list []replica.Peer, epoch state.Epoch) {
	list, epoch = r.others(g)
	r.mu.RLock()
	v := r.view
	r.mu.RUnlock()
	for _, n := range v.Nodes {
		m := replica.Peer{Node: n.ID, Incarnation: n.Incarnation}
		if n.State == state.NodeUp && n.Weight() > 0 && m != r.cfg.Self && !slices.Contains(list, m) {
			list = append(list, m)
		}
	}
	return list[:min(len(list), askedAtMost)], epoch
}

// healBlock replaces a block if anybody has its content.
func (r *Replicas) healBlock(ctx context.Context, k object.Key, block uint32) bool {
	nodes, epoch := r.perhaps(k.Group)
	buf := make([]byte, object.BlockSize)
	for _, m := range nodes {
		src := source{r: r, from: m, route: route{k.Group, epoch, m.Incarnation}, id: k.ID}
		if ctx.Err() != nil { // buf may be a call's that was left
			return false
		}
		if src.blocks(ctx, block*object.BlockSize, buf) == nil && r.cfg.Store.Heal(ctx, k, block, buf) == nil {
			return true
		}
	}
	return false
}

// healTable has an object made anew whose header is rotten, or blocks of it whose checksums
// are: as a member by the primary; as the primary by a member. An object without a header
// is made by the next primary, once this node is none any more.
func (r *Replicas) healTable(ctx context.Context, k object.Key, blocks []uint32) {
	p := r.part(k.Group)
	others, epoch := r.others(k.Group)
	switch {
	case p == nil || len(others) == 0:
	case !p.primary.Load():
		if _, err := r.Check(ctx, others[0], k.Group, epoch, true); err != nil {
			r.cfg.Logger.Info("an object whose table is corrupt is not replaced yet", "object", k.String(), "err", err)
		}
	case len(blocks) == 0:
		p.post(event{kind: evFailed, peer: r.cfg.Self})
	default:
		r.readBlocks(ctx, k, epoch, blocks)
	}
}

// readBlocks reads blocks as clients do: what is corrupt is replaced then.
func (r *Replicas) readBlocks(ctx context.Context, k object.Key, epoch state.Epoch, blocks []uint32) {
	info, err := r.cfg.Store.Stat(ctx, k)
	if err != nil {
		return
	}
	buf := make([]byte, object.BlockSize)
	for _, b := range blocks {
		done := make(chan struct{})
		r.Submit(&Task{
			Group: k.Group, Epoch: epoch, Verb: VerbRead, SizeShift: info.SizeShift, ID: k.ID, Off: b * object.BlockSize, Len: object.BlockSize, Data: buf,
			Done: func(*Task) { close(done) },
		})
		r.kickSoon()
		<-done
	}
}
