// Package state is the replicated state machine of the cluster: who is in it, with
// which disks, which redundancy policies there are, and for every partition which
// nodes hold it.
//
// It is pure: time, ids and placement come inside commands (INV-C1), so that every
// node that applies the same commands has the same state, byte for byte. Commands may
// be applied twice by a caller that never saw the first answer; those that would do
// harm are refused the second time or answer as the first did (INV-C2).
//
// The machine has a single writer. What it made is read through View, an immutable
// picture that may be kept and used by any goroutine.
//
// # A partition's life
//
// A new partition has nothing in it, so its targets are in sync at once. From then on
// a node that shall hold the partition begins as a learner, and is put in sync only by
// a command that the primary proposes. Members that are no targets any more leave when
// all targets are in sync. A node that goes down leaves every in-sync set, except those
// in which it is the last member (INV-R3). Each change of a partition gives it the epoch
// of the command that made it.
//
// # Members that start anew
//
// A member that comes back as another incarnation has all that was flushed while it was
// in sync, for a flush makes every member durable; what was acknowledged and not flushed
// it may have lost with its power. What becomes of it depends on the others:
//
//   - Another member is known to live. It has everything, and goes on; who came back
//     leaves, and is a learner as soon as it is up. It learns what was changed since its
//     mark, while clients go on: settling with it instead would keep them waiting for the
//     same work, since what it has lost it cannot name.
//   - None is known to live, as when the power fails for all and some are back: the
//     partition is undecided. The others stay in sync, who came back is Waiting. Nodes
//     ignore an undecided partition: they stay at the epoch that they know. In that epoch
//     nothing more can be acknowledged, because who waits was in sync with it and does
//     not answer in it any more; nor can a flush that needs it end. So those that wait
//     keep all that was flushed, however many commands pass, until one of three things
//     ends the doubt. Another member proves to be alive (Confirm, or it comes up again in
//     the same incarnation): the first case. All others are down: their leases are over,
//     and one of those that wait takes the partition. All others have started anew, too:
//     all are alike, and the first that is up takes it.
//
// Whoever takes it is alone in sync at first, the others learn from it: incrementally,
// from marks, and changes wait for them as MinInSync says. Nothing that was flushed is
// lost. What was not may be, on one and not on the other; therefore Restarted tells
// flushes to fail once, and learners not to trust their marks from before: what such a
// mark covers may be missing on the new primary.
//
// Without those that wait, the last to announce itself would be the only member, and a
// machine that never comes back after a power cut would take with it what others have.
// That it takes a word of the leader to let a member go on alone costs nothing as long
// as the leader hears the members, which is when a single node restarts.
//
// It is not sound to take one that waits because the leader has not heard of another
// member: that may hear, acknowledge and not be heard. Only its being down, which its
// lease cannot outlast, says that it does not.
package state
