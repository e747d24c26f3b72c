// Package sheepdog serves volumes over the native Sheepdog protocol, to QEMU's sheepdog driver
// (QEMU 0.13 to 6.0) and to tgt's sheepdog backing store.
//
// Its clients name volumes by vid, keep a copy of the map, and say which object of which
// vid they read, write or make. The map itself lives once, in package vdi: a client's write is a
// write of its volume, which makes the object and its entry as any other write does; what the
// client then writes into the map is compared with what may be there, and nothing more.
// "Native clients" in vdi/DESIGN.md says why, and what differs for whom.
//
// # Promises
//
// A write without SD_FLAG_CMD_CACHE is durable when it is answered; SD_OP_FLUSH_VDI makes
// durable what was answered on any connection. A write for a vid that has become a snapshot
// is refused with SD_RES_READONLY: it is in the snapshot or in none. Answers come in the
// order in which requests complete. A request whose payload did not arrive in full is never
// carried out. When the node stops, what was not begun is not answered: the connection ends, and
// clients send it again to who comes next. Otherwise the server ends the connection only of a client that keeps
// memory from others; a volume that is deleted, replaced or owned elsewhere is an answer. Each end is logged with its reason.
//
// A session uses objects of one family and changes those of one VDI, which is the first it
// names, and of VDIs that its host has opened. Anything else, entries of others in its map, places beyond
// an object, headers with another name, gets SD_RES_INVALID_PARMS and changes nothing; and the
// connection lives on. The protocol has no authentication: Config.Allow and the rights of the
// unix socket are all there is.
//
// Who has opened a VDI that is deleted, and made anew by others, does not reach the new one: what it writes gets SD_RES_NO_VDI, what it reads
// SD_RES_NO_OBJ, behind a restart and at other nodes too, for the new one has another vid. A vid is used again
// when 1024 of VDIs and snapshots of the same name, or catalog.KeepVIDs (4096) of any, were given up after it, or all 2^24 are taken; even then the
// server that the client opened it through, unless it was started anew, answers SD_RES_NO_VDI.
//
// # Clients as they are
//
// "qemu-img snapshot -d" clears the map of the VDI before it deletes the snapshot: that is not carried out,
// and told from a discard even where the map has one entry (clearEntry). QEMU goes back to a snapshot by
// deleting the VDI first (rollbacks). Where others took a snapshot and QEMU has written nothing since, it takes
// one of its own under the vid of before (heir).
//
// QEMU reads the map when it opens a VDI and never again: the process that a machine is migrated to read zeros, or what an ancestor has,
// where the one that it came from wrote meanwhile. Who reads the map of a VDI that others may have open, through whatever node and protocol, is therefore
// given one that has it ask for everything (readEntries). It does not see holes then: "qemu-img map" and "info" take all for data.
// Who opens a VDI first, and others only then, still goes by what there was; as is usual, a VDI is for one machine at a time.
//
// What no server can help, seen with QEMU 5.0 and 6.0: after it had to reconnect its driver crashes, hangs, aborts, or ends a read before the data
// is there (it goes on with a coroutine that has ended): 6.0 dies more often than not, of the original's server too; what is stored is right, and a server that comes back quickly
// does not help. "qemu-img create -b" may abort when it is done, or where the base is no snapshot (it frees the base's name twice). "delvm", or "savevm" with a
// tag that there is, has a running machine read zeros until QEMU is started anew or goes to a snapshot: it clears its own copy of
// the map; delete with dog instead. "loadvm" of a disk with format=raw hangs, for it never ends a drained section of that layer: format=sheepdog does not.
// "qemu-img create -b" wants sheepdog: or sheepdog://, and "-F sheepdog" if any; "-o preallocation=full", as "resize --preallocation=full", fails an assertion.
// "qemu-img compare" with something that has holes elsewhere than between objects may tell of a mismatch where there is none: a hole that it asks about from within is told to be
// longer than it is. Of 6.0 alone: "loadvm" in the monitor leaves the machine paused until "cont".
//
// tgt cuts a port off behind four digits, and answers a read that begins in data and ends in a hole with what its
// buffer had before. It reconnects every second, for as long as it takes.
//
// # Memory
//
// Buffers are taken only after a header was checked, and are bounded:
//
//	all of them        Config.MemoryLimit + 32 KiB per session
//	of one session     Config.SessionMemory + 32 KiB
//	one payload        MaxPayload
//	a part of a map    4 MiB, and 256 KiB, for each of maxSlow operations that run at a time in a session
//	requests           Config.SessionRequests per session, about 1 KiB each
//	connections        Config.MaxConnections, two goroutines each, and what the
//	                   kernel buffers for a socket
//	volumes            maxAttached per session
//	what hosts opened  maxHosts and maxOpen, beside what is connected
//
// A session that waits for its client holds no buffer. A client that does not take
// its responses is no longer read from once it has reached its bounds; if other
// sessions wait for memory meanwhile, it is disconnected after Config.StallTimeout.
//
// # Files
//
//	server.go      listening, admission, shutdown
//	session.go     from the socket to requests; op.go: a request in flight
//	operations.go  the protocol as a table
//	attach.go      which volumes a session may use
//	objects.go     data objects and states of machines; inode.go: inodes
//	shared.go      clients that share a VDI
//	vdis.go        operations on VDIs; locks.go: who has opened what, rollbacks
//	errors.go      how failures are answered; stats.go: counting
package sheepdog
