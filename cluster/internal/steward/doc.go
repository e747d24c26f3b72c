// Package steward decides what the leader proposes: who is up and who is down, and who
// shall hold what. It is pure: told facts and the time, it answers with commands for
// package state. There is no clock, no goroutine and no lock in it. All it remembers is
// forgotten when the node leads no more, for another leader decides then.
//
// # Down
//
// A node whose machine refused the connection after it was last heard of, and whose own
// connection has ended, is down at once: its process serves nothing any more. One that
// stops says so itself, by a command. Any other is down when
// it has been silent for longer than its lease, the leader's own and a margin, counted
// from the leader's election if it has not been heard since (INV-R5). The leader itself
// is never down. All that are down at the same time are declared so by one command, those
// known to be dead first and then by the length of their silence: where all members of a
// partition go down, the one named last stays the last member, and it is the one that was
// heard of last. A leader that has just started itself declares nobody down before it is
// up, for a while: then the whole cluster may be starting, and the more members of a
// partition are there to take it the better.
//
// Where two nodes do not reach each other one of them is declared down, once it has given up
// its lease: see links.go.
//
// # Starting
//
// Nodes that start are announced together if several do so at about the same time, or if
// others are missing that might: after a power cut the state machine decides better the
// more it knows (see package state), and each command is a new epoch for all that the
// nodes hold. One that starts while everybody else is there does not wait. The same is
// true of nodes that are ready to be up.
//
// # Placement
//
// Targets are computed anew when nodes with disks come, go for good, are drained or
// weighed anew. A node that is down keeps its place until it is out: after out_after, as
// watched by one leader. A leader that has just begun does not know how long a node has
// really been missing: the whole cluster may have been switched off. No node is put out
// while less than half of the weight is up: then the others would be filled for a fault
// that is none of the nodes'. When nodes join, the steward waits until no more do. One
// policy is placed at a time, and only if its targets differ.
package steward
