package replicas

import (
	"sync"

	"sheepdog/cluster/internal/peer"
	"sheepdog/cluster/internal/replica"
	"sheepdog/storage/object"
)

// outMarks collects the marks for other nodes, so that one message has many.
type outMarks struct {
	mu    sync.Mutex
	nodes map[replica.Peer]*nodeMarks
}

// nodeMarks are those for one node.
type nodeMarks struct {
	waiting map[object.Group]committed
	call    peer.Call
	busy    bool
}

func (o *outMarks) add(to replica.Peer, c committed) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.nodes == nil {
		o.nodes = map[replica.Peer]*nodeMarks{}
	}
	n := o.nodes[to]
	if n == nil {
		n = &nodeMarks{waiting: map[object.Group]committed{}}
		o.nodes[to] = n
	}
	n.waiting[c.group] = c
}

// send sends what is waiting, but for nodes that have not taken what was sent before.
// What a node does not get it is told with the next change.
func (o *outMarks) send(r *Replicas) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for to, n := range o.nodes {
		switch {
		case n.busy:
		case len(n.waiting) == 0:
			delete(o.nodes, to)
		default:
			data := n.call.Data[:0]
			for _, c := range n.waiting {
				data = appendVersion(c.route.append(data), c.mark)
			}
			clear(n.waiting)
			n.busy = true
			n.call = peer.Call{Class: peer.Commit, Op: opCommitted, Data: data, Deadline: r.deadline(), Done: func(*peer.Call) {
				go o.sent(n) // the lock may be held by who submits
			}}
			r.call(to, &n.call)
		}
	}
}

func (o *outMarks) sent(n *nodeMarks) {
	o.mu.Lock()
	n.busy = false
	o.mu.Unlock()
}
