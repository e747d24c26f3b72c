// Package replica decides how one node takes part in the replication of one partition:
// as its primary, as a member in sync, or as a learner. It is pure: a Partition is told
// events and answers with effects, which the caller carries out, and whose outcome it
// tells as further events. There is no clock, no goroutine and no lock in it.
//
// # Changes
//
// The primary gives a change the next sequence number of the epoch, has it applied
// here and on every other member, and answers when all have applied it. Changes and
// reads of overlapping ranges pass one after the other, in the order they came; so a
// read never shows what a failure could still undo. The commit mark is the highest
// sequence number up to which everything is on all members; it travels with every
// change, and by itself when there is none.
//
// # A new epoch
//
// With a new epoch everything under way is refused, and the gateways send it again,
// under the new epoch. First the primary settles: every member names the objects that
// it has changed and not seen committed, the primary's own content of them is copied to
// all, then it serves. It also waits for those who were primaries before and are up,
// until they have said that they know of the new epoch: with that, and with leases, one
// node at most takes itself for the primary.
//
// Nodes hear of a new epoch one after the other. What is asked of a node under an epoch that it
// does not know yet waits until it does; what is of an earlier one is refused.
//
// Nothing old lands on something newer: before a node answers the survey of an epoch, or
// takes changes in it, all it was applying under earlier epochs is done; and requests of
// gateways are of one epoch, so that none is carried out after the gateway has turned
// elsewhere.
//
// # Catch-up
//
// A learner tells up to which mark it is complete, which objects it has, and which it
// may have changed beyond that. The primary adds what changed here since, and brings
// object by object up to date while new changes to the others already flow. A learner
// to which changes flow is waited for like a member, so that nothing is missing once it
// is one; if it is slow or fails it is dropped and begins anew, which costs a second.
// When nothing is pending the learner makes all of it durable, and the primary
// proposes that it be a member. From then on only a new epoch frees the primary from
// waiting for it.
//
// # Leases
//
// Reads and changes are answered only while the node's lease is valid and the epoch is
// the one they were done in (INV-R5); otherwise they wait, and reads are done again.
//
// # Waiting
//
// Who waits for the lease, for members or for his turn is refused after Options.Patience, and asks again: he may
// have somebody who shall not wait for ever. A change that some have made and others do not answer for is given up then, too,
// with a new epoch: before that nothing else begins, no mark covers it, and it counts as being under way (Op.Open).
package replica
