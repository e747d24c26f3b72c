package replicas

import (
	"slices"
	"sync"

	"sheepdog/cluster/internal/peer"
	"sheepdog/cluster/internal/replica"
	"sheepdog/storage/object"
)

// outMarks collects the marks for other nodes, so that one message has many.
type outMarks struct {
	mu    sync.Mutex
	nodes []*nodeMarks
}

// nodeMarks are those for one node, in the order in which partitions had something to say.
type nodeMarks struct {
	to      replica.Peer
	waiting []committed
	places  map[object.Group]int // in waiting
	call    peer.Call
	busy    bool
}

func (o *outMarks) add(to replica.Peer, c committed) {
	o.mu.Lock()
	defer o.mu.Unlock()
	i := slices.IndexFunc(o.nodes, func(n *nodeMarks) bool { return n.to == to })
	if i < 0 {
		i = len(o.nodes)
		o.nodes = append(o.nodes, &nodeMarks{to: to, places: map[object.Group]int{}})
	}
	n := o.nodes[i]
	if at, ok := n.places[c.group]; ok {
		n.waiting[at] = c
		return
	}
	n.places[c.group] = len(n.waiting)
	n.waiting = append(n.waiting, c)
}

// send sends what is waiting, but for nodes that have not taken what was sent before.
// What a node does not get it is told with the next change.
func (o *outMarks) send(r *Replicas) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.nodes = slices.DeleteFunc(o.nodes, func(n *nodeMarks) bool { return !n.busy && len(n.waiting) == 0 })
	for _, n := range o.nodes {
		if !n.busy {
			data := n.call.Data[:0]
			for _, c := range n.waiting {
				data = appendVersion(c.route.append(data), c.mark)
			}
			n.waiting = n.waiting[:0]
			clear(n.places)
			n.busy = true
			n.call = peer.Call{Class: peer.Commit, Op: opCommitted, Data: data, Deadline: r.deadline(), Done: func(*peer.Call) {
				go o.sent(n) // the lock may be held by who submits
			}}
			r.call(n.to, &n.call)
		}
	}
}

func (o *outMarks) sent(n *nodeMarks) {
	o.mu.Lock()
	n.busy = false
	o.mu.Unlock()
}
