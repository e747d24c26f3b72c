// Package stream moves requests and replies between a session and its client: what the
// sessions of all frontends need, whatever protocol they speak.
//
// One goroutine, the reader, decodes all requests that are in the receive buffer,
// submits each to its volume, and then kicks the volume once. Replies are sent by
// whoever owns the output (see output.go): the reader while it works through a batch,
// so that requests that complete at once cost no hand-over, else the sender goroutine.
//
// # Memory
//
// A session counts what it holds against a limit of its own and a Budget that all
// sessions of a server share. Beside both, each may always have one small chunk for
// requests and one for replies, so that small requests of a session with nothing in
// flight need nothing of the common memory: nobody can starve them. A session that
// waits for its client holds no buffer.
//
// # Files
//
//	stream.go    a session's half of a connection: life, counting, waiting
//	input.go     from the socket to requests
//	output.go    from replies to the socket
//	memory.go    buffers and budgets
//	notices.go   what is said once, until it is heard
//	link*.go     system calls
package stream
