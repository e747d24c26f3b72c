// Package placement computes who shall hold which partition. It is pure: the same input
// gives the same result on the same kind of processor, and the result travels as data,
// so nobody has to compute it twice.
//
// It is weighted rendezvous hashing with bounded load, and sticky. Every node has a score
// for every partition; a slot goes to the best node that is not full and whose zone has
// not enough replicas of the partition already. What is placed well enough stays:
//
//	full      a node takes new replicas up to its share, rounded up
//	too full  5 % over its share (or the share rounded up): it sheds the worst scores
//	too empty 5 % under its share (or the share rounded down): it takes its best scores
//	          from nodes that are over theirs
//
// so that a node that joins moves its own share and one that leaves what it held.
//
// A node's share is its weight's part of all replicas, as far as zones and the rule of
// one replica per node allow: what a heavy zone cannot hold is spread over the others.
package placement
