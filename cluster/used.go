package cluster

import (
	"context"
	"encoding/binary"
	"sync"
	"time"

	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// opUsed: may a client have a volume open through you? Head: vid, uint32. Reply: one byte, 1 if so. Data
const opUsed uint16 = 84

// usedTimeout bounds how long UsedElsewhere asks.
const usedTimeout = time.Second

// Using says who knows whether a client may have a volume open through this node. fn answers at once.
func (n *Node) Using(fn func(vid object.VID) bool) { n.using.Store(&fn) }

// UsedElsewhere reports whether a client may have a volume open through another node: one says so, or is up and does not answer within
// a second. It costs a round trip to each node.
func (n *Node) UsedElsewhere(ctx context.Context, vid object.VID) bool {
	if n.flock == nil {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, usedTimeout)
	defer cancel()
	head := binary.LittleEndian.AppendUint32(nil, uint32(vid))
	var wg sync.WaitGroup
	for _, m := range n.state.View().Nodes {
		if m.State != state.NodeUp || m.Name == n.cfg.Name {
			continue
		}
		wg.Go(func() {
			answer, err := n.flock.ask(ctx, m.Name, opUsed, head)
			if err != nil || len(answer) != 1 || answer[0] != flag(false) {
				cancel() // whatever the others say
			}
		})
	}
	wg.Wait()
	return ctx.Err() != nil
}

// isUsed answers opUsed. Who does not know yet does not say no.
func (f *flock) isUsed(vid object.VID) bool {
	fn := f.n.using.Load()
	return fn == nil || (*fn)(vid)
}
