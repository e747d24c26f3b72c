package peer

import (
	"errors"
	"fmt"

	"sheepdog/cluster/state"
)

// Identity is who a node says it is. Its name is proven by its certificate, unless the
// Transport is insecure; with the same secret anybody can be any node.
type Identity struct {
	Cluster     string // the cluster's id; "" for a node that belongs to none yet
	Name        string
	Node        state.NodeID // 0 if the cluster has not given it a number yet
	Incarnation uint64       // counts the starts of the node; 0 if not known yet
}

// maxName bounds a node's name and a cluster's id, in bytes.
const maxName = 255

func (id Identity) validate() error {
	switch {
	case id.Name == "":
		return errors.New("the node has no name")
	case len(id.Name) > maxName:
		return fmt.Errorf("name of node is longer than %d bytes", maxName)
	case len(id.Cluster) > maxName:
		return fmt.Errorf("id of cluster is longer than %d bytes", maxName)
	}
	return nil
}

// Class is what requests are for: each has connections and memory of its own. See the
// package's comment.
type Class uint8

// Classes. Their numbers travel.
const (
	Data Class = iota
	Commit
	Bulk
	Control
	classes
)

// String gives the class's name in logs.
func (c Class) String() string {
	if c < classes {
		return [classes]string{"data", "commit", "bulk", "control"}[c]
	}
	return fmt.Sprintf("class %d", uint8(c))
}

// Kind is what a connection is for.
type Kind uint8

// Kinds of connections. Their numbers travel.
const (
	KindRaft    Kind = 1
	KindData    Kind = 2
	KindCommit  Kind = 3
	KindBulk    Kind = 4
	KindControl Kind = 5
)

func (c Class) kind() Kind { return KindData + Kind(c) }

// class returns the class of a kind that carries requests.
func (k Kind) class() (Class, bool) { return Class(k - KindData), k >= KindData && k <= KindControl }

// String gives the kind's name in logs.
func (k Kind) String() string {
	if c, ok := k.class(); ok {
		return c.String()
	}
	if k == KindRaft {
		return "raft"
	}
	return fmt.Sprintf("kind %d", uint8(k))
}
