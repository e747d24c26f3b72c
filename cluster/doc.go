// Package cluster is one node's part in the cluster: it knows who is there and who
// holds which partition, decides together with the others what all must agree on, and
// brings every object request to where the object is.
//
//	state                what is agreed on: nodes, policies, partitions (pure)
//	internal/placement   who shall hold which partition (pure)
//	internal/consensus   one ordered, durable log of commands for all state machines
//
//	internal/members     who is there, by gossip
//	internal/steward     what the leader decides about nodes and placement (pure)
//	internal/peer        connections between nodes
//	internal/replica     one node's part in one partition (pure); internal/replicas carries it out
//	internal/gateway     how requests find their primary, and flushes (pure)
//	internal/gates       carries that out
//
// A node with a Network is one of many: flock.go. Without one it is alone, with one voter and
// itself as every primary, and its requests go straight to its store: objects.go.
//
// # Versions after a restart
//
// A version is (epoch, sequence number). Each start of a node is a new incarnation and
// gives the partitions it leads a new epoch by a command, so sequence numbers begin
// again at 1 and versions still only grow, without looking at a single object.
//
// # Fewer nodes than copies
//
// A policy may ask for more copies than there are nodes with disks. As many replicas are
// placed as there are nodes; Info reports the partitions as degraded. MinInSync of the
// policy starts at 1 and rises for good once the cluster can keep more (see
// state.Policy), so such a cluster works from its first node on.
//
// # Fencing
//
// For each volume the node remembers the highest generation it has seen, in writes or
// through SetGeneration, and refuses writes of older ones (INV-V1). The memory is lost
// with the process, and so is every request that could be older: requests reach a
// primary only from gateways that have learned the primary's new incarnation first.
package cluster
