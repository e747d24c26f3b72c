// Package replicas is one node's part in all partitions: it carries out what package
// replica decides, with the store and the connections to other nodes.
//
// # Events
//
// Each partition has a mailbox. What happens to it (a request, a message, the end of a
// write) is an event; who posts one into an idle mailbox handles it and what comes
// meanwhile. So a request that needs nobody else is answered by the goroutine that
// submitted it, and no lock is held while effects are carried out. Who submits a request kicks
// afterwards, but if somebody else handles it that may have been too early: what is handled late is
// kicked once more (see Replicas.kickSoon), or it would wait for the next tick.
//
// # Changes and repairs
//
// A change goes to members as it came, with the xxh3 of its data, which the receiver
// checks. A member that sent it to the primary, as a gateway, has the data still: see kept. A repair is pulled: the primary says which object, the other side asks for its
// checksums, and takes the blocks that differ. The primary holds the object meanwhile, so
// what is pulled belongs together.
//
// An object that is brought to a learner gets the version that it has at the primary,
// also if its content was equal before: what has changed since a mark is found by versions.
//
// # What is in the store at the start
//
// A partition of which the store has objects is looked through when it is first used:
// what has a version above the mark that was kept is in doubt.
package replicas
