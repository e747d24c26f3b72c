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
// checksum is of is taken. An object whose table is rotten is made equal to the primary's,
// like what a check finds.

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
		for _, b := range rotten[k] {
			if r.healBlock(r.ctx, k, b) {
				healed++
			}
		}
		switch {
		case len(rotten[k]) == 0:
			r.healTable(r.ctx, k)
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

// healBlock replaces a block if anybody has its content.
func (r *Replicas) healBlock(ctx context.Context, k object.Key, block uint32) bool {
	others, epoch := r.others(k.Group)
	buf := make([]byte, object.BlockSize)
	for _, m := range others {
		src := source{r: r, from: m, route: route{k.Group, epoch, m.Incarnation}, id: k.ID}
		if src.blocks(ctx, block*object.BlockSize, buf) == nil && r.cfg.Store.Heal(ctx, k, block, buf) == nil {
			return true
		}
	}
	return false
}

// healTable has an object made anew whose header or table is rotten: as a member by the
// primary; as the primary, once it is none any more, by the next one.
func (r *Replicas) healTable(ctx context.Context, k object.Key) {
	p := r.part(k.Group)
	others, epoch := r.others(k.Group)
	if p == nil || len(others) == 0 {
		return
	}
	if p.primary.Load() {
		p.post(event{kind: evFailed, peer: r.cfg.Self})
		return
	}
	if _, err := r.Check(ctx, others[0], k.Group, epoch, true); err != nil {
		r.cfg.Logger.Info("an object whose table is corrupt is not replaced yet", "object", k.String(), "err", err)
	}
}
