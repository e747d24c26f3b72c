// Package nbd serves volumes over the Network Block Device protocol, as
// NetworkBlockDevice/nbd doc/proto.md specifies it: fixed newstyle, with TLS,
// structured replies, extended headers, metadata contexts and every command that has
// a meaning for a volume. Clauses of the specification are quoted in comments by
// their section's title.
//
// Every VDI is an export under its own name, every snapshot a read-only one as
// NAME@TAG. There is no default export. base:allocation shows what is allocated,
// qemu:dirty-bitmap:TAG what changed since snapshot TAG.
//
// # Promises
//
// Answers come in the order in which requests complete. A write that was answered is
// seen by every session; a flush covers what was answered to any session before it
// was sent, so clients may use many connections (NBD_FLAG_CAN_MULTI_CONN). A request
// whose payload did not arrive in full is never submitted. When a session ends, what
// it had in flight has completed and its volume is closed.
//
// # Memory
//
// Buffers are taken only after a header was checked, and are bounded:
//
//	all of them        Config.MemoryLimit + 32 KiB per session
//	of one session     Config.SessionMemory + 32 KiB
//	of a handshake     64 KiB for an option's data + 64 KiB for the reply at hand
//	requests           Config.SessionRequests per session, about 1 KiB each
//	connections        Config.MaxConnections, two goroutines each, and what the
//	                   kernel buffers for a socket
//
// A session that waits for its client holds no buffer. A client that does not take
// its replies is no longer read from once it has reached its bounds; if other
// sessions wait for memory meanwhile, it is disconnected after Config.StallTimeout.
// Requests of up to 16 KiB of a session with nothing in flight need nothing of the
// common memory, so nobody can starve them.
//
// # Files
//
//	server.go       listening, admission, shutdown, what is known of sessions
//	negotiation.go  handshake: options one by one; exports.go and metacontext.go: their meaning
//	session.go      transmission: the life of a session
//	receive.go      from the socket to requests
//	commands.go     which requests are allowed; errors.go: how failures are answered
//	op.go           from requests to the volume and to replies; status.go: block status
package nbd
