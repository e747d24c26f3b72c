// Package consensus keeps named state machines in step through one ordered, durable
// log (hashicorp/raft), and is the only package that knows that library.
//
// # Proposals
//
// Propose appends a command for a machine, on whatever node it is called, waits until it
// was applied on this node and returns the machine's answer. It goes to the leader
// through a Forwarder and is repeated as often as lost messages and changes of the leader
// ask for; it is applied once (INV-C2). A window of answered requests, the same on all
// nodes and part of snapshots, recognises repetitions. Each entry says how far the log
// was when its command was first proposed: if the window does not reach back that far,
// the entry is refused by all nodes alike. Raft tells followers what is committed with its next
// message only; so that nobody waits for a timer, the leader appends an empty entry behind
// commands (nudge), one for all that were committed meanwhile.
//
// # Servers
//
// Bootstrap makes a raft of one. Another node is admitted by the leader (Admit), makes an
// empty log (Prepare), opens it and gets everything from the leader; Ready says when. The
// leader gives votes and takes them away, one change at a time, by the pure function
// plan: see there for the rules, and for why only one of two nodes has a vote. A node
// that has lost its state is removed before it may join again: it has forgotten
// what it voted for. On a clean stop the lead is handed over.
//
// Nodes are known to raft by their names only. Where they are, and that they are who
// they say, is the business of Transport.
//
// QuorumContact is the base of leases (INV-R5): before it, nobody else was elected.
//
// # Files
//
// In DIR/raft:
//
//	log/        segments of raft-wal, preallocated
//	snapshots/  of all machines together, the newest two
//	stable      term, vote and the list of segments, overwritten in place
//	last        how far the log was written, likewise: see mark
//	began       how far it was when the node was started, until the cluster has taken note: see Began
//
// The directory is made under another name and renamed when complete: where it exists,
// all of it must. Term and vote are in a file that never needs new space, because raft
// gives up when it cannot store them, and a node has to start on a full disk. Every entry
// carries a checksum; a damaged log is refused at the start, before any of it is applied.
//
// # Without a transport
//
// There is one voter, which leads some milliseconds after its start; nothing listens.
package consensus
