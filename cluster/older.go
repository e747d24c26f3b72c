package cluster

import (
	"context"
	"encoding/binary"
	"errors"
	"sync"
	"time"

	"sheepdog/cluster/internal/peer"
	"sheepdog/cluster/state"
)

// What a node has may be older than what it once had: the image of its machine comes from a backup, or somebody has put an
// old directory in its place. Nothing on it tells: it is complete, and was in sync. So the others remember how much of the
// log it has had, which it says itself, once a minute and when it stops; and it says when it starts with how much it was
// found. What is older than that by a minute or two is not noticed.

// opWitness asks a node how much of the log it has. Reply's head: its number, incarnation, and the index of the newest entry that
// it has applied. Bulk
const opWitness uint16 = 85

const (
	// witnessEvery is how often the leader asks. Each time leaves an entry in the log, so that there is something newer
	// also when nothing else happens.
	witnessEvery = time.Minute
	witnessHead  = 2 + 8 + 8
)

var errOlder = errors.New("what this node has is an older copy of what it once had")

func isOlder(v *state.View, name string) bool {
	n := v.NodeByName(name)
	return n != nil && n.Older
}

func (f *flock) appendWitness(b []byte) []byte {
	b = binary.LittleEndian.AppendUint16(b, uint16(f.n.self.Load()))
	b = binary.LittleEndian.AppendUint64(b, f.n.inc.Load())
	return binary.LittleEndian.AppendUint64(b, f.applied())
}

// witness has the cluster remember how much of the log the nodes that are up have. What a node has applied is on its disk.
func (f *flock) witness(ctx context.Context) {
	c := &state.Witness{}
	add := func(head []byte) {
		if len(head) == witnessHead {
			life := state.Life{Node: state.NodeID(binary.LittleEndian.Uint16(head)), Incarnation: binary.LittleEndian.Uint64(head[2:])}
			c.Nodes = append(c.Nodes, state.Witnessed{Life: life, Log: binary.LittleEndian.Uint64(head[10:])})
		}
	}
	var mu sync.Mutex
	var calls sync.WaitGroup
	for _, m := range f.n.state.View().Nodes {
		switch {
		case m.State != state.NodeUp:
		case m.Name == f.n.cfg.Name:
			mu.Lock()
			add(f.appendWitness(nil))
			mu.Unlock()
		default:
			calls.Go(func() {
				q := &peer.Call{Class: peer.Bulk, Op: opWitness, Deadline: time.Now().Add(fenceTimeout)}
				if f.await(ctx, m.Name, q) == nil {
					mu.Lock()
					defer mu.Unlock()
					add(q.ReplyHead)
				}
			})
		}
	}
	calls.Wait()
	if len(c.Nodes) == 0 {
		return
	}
	if _, err := f.n.command(ctx, state.Command{Witness: c}); err != nil && ctx.Err() == nil {
		f.log.Debug("how much of the log the nodes have is not noted", "err", err)
	}
}

// awaitNewer waits while this node's copy is older than what it alone once had, until that is given up; see
// GiveUp. It stays in the raft meanwhile: the others may need it to decide anything.
func (f *flock) awaitNewer(ctx context.Context) (waited bool, err error) {
	for told := false; ; {
		applied := f.n.follower.changed()
		if !isOlder(f.n.state.View(), f.n.cfg.Name) {
			return waited, nil
		}
		if !told {
			told, waited = true, true
			f.log.Error("what this node has is an older copy of what it once had, as from a backup, and no other node has all that is missing in it: "+
				"stop it and start it with the newest that there is; or, on another node, give up what is missing with \"dog node give-up\"",
				"node", f.n.cfg.Name, "partitions", f.n.Absent()[f.n.cfg.Name])
		}
		select {
		case <-ctx.Done():
			return true, ctx.Err()
		case <-applied:
		}
	}
}
