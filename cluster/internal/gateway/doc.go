// Package gateway decides how a node brings requests to the primaries of partitions, and
// what it takes to flush a volume. It is pure: told events, it answers with effects.
//
// # Requests
//
// A request is sent to the primary of its partition's epoch, and again when that has
// refused it, was lost, or there is a new epoch. A change may therefore be carried out
// twice. That harms nobody, because two changes of one range are never under way at
// once here, and because one gateway at a time may write a volume: nothing newer can lie
// beneath the second time. Requests that cannot be carried out end with
// object.ErrUnavailable after the time-out.
//
// # Flush
//
// With the answer to a change comes who holds it. Of one that fails and may have been made all the same, because an attempt had no
// answer that tells, all nodes that have a part in its partition count as holders: somebody may have read it. A flush has all holders of what was
// answered before it make it durable, and ends when each has done so or has no part any
// more; so does one that comes while another one is under way, also if it adds nothing to
// it. A node that has left the in-sync set is made durable before it comes back. If
// the last member of a partition has restarted meanwhile, it may have lost what was not
// durable; then the flush fails with object.ErrLost, once. The next one covers what else
// it was to make durable.
package gateway
