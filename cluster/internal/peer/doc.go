// Package peer is the transport between the nodes of a cluster: who may connect, and
// requests with replies that are pipelined, batched, bounded and, but for a network that
// is trusted, encrypted. It knows nothing of what the requests mean.
//
// # Who may connect
//
// From the cluster's secret every node derives the same CA and issues itself a
// certificate for its name; connections are TLS 1.3 with certificates on both sides.
// crypto/tls makes the handshake and nothing else: records behind it are made and opened
// by internal/record, the same on the wire, with fewer copies. No alert is sent when a
// connection ends: what is lost with it is told by frames that are not whole.
// Then the nodes say hello: version, cluster, name, incarnation and what the connection
// is for. What does not fit is refused with a reason that both sides log. A stranger is
// disconnected and logged once.
//
// # Requests
//
// A Transport has one Peer for every other node. Each Class of a Peer is a connection of
// its own with its own budget of memory at the receiver, so that recovery never stands
// in the way of clients:
//
//	Data    from a gateway to a primary. Its handlers may wait for Commit requests
//	Commit  from a primary to the other replicas. Its handlers wait for no other node
//	Bulk    recovery. Its handlers wait for no other node
//	Control small questions that must not stand behind data, as for a lease. Its handlers wait for nobody
//
// Commit is apart from Data because both would wait for each other otherwise: the memory
// of two nodes full of requests from gateways, each of which needs the other node to
// take a copy before it can be answered and its memory freed.
//
// A Call is one allocation of its owner. Submit queues it, Kick sends all that is queued
// in few system calls, Done says that it is over: replied to, or failed with
// ErrDisconnected, when nobody can know whether it was carried out. The receiver decodes
// all requests that came together, gives each to its Handler and then calls Kick once;
// replies are batched the same way and come in any order.
//
// # Promises
//
// Every Call is done exactly once. A request reaches its Handler at most once, and only
// in full; once a request of a newer connection of the same node and class has reached it,
// none of an older one does. What a request carried is not checked here beyond TLS: the checksums of
// blocks travel in it.
//
// A connection over which nothing came for Config.Silence is given up; both ends send
// something more often than that. A connection that was lost is made again, at once and
// then ever less often; meanwhile calls fail with ErrDisconnected.
//
// # Memory
//
//	received requests      Config.Memory in all, in fixed shares for each class, and
//	                       for each connection 32 KiB beside it
//	replies to be received the sum of the calls under way: Config.WindowBytes for each connection
//	calls that wait        Config.QueueCalls and Config.QueueBytes for each connection, then ErrBusy
//	handshakes             Config.MaxHandshakes, less than 64 KiB each
//	connections            Config.MaxConnections from others; buffers of 256 KiB only
//	                       while much comes or goes at a time
//
// A node that sends slowly, or does not take its replies, fills its own bounds and its
// class's share, and is disconnected after Config.Stall while it holds them.
//
// # Files
//
//	credentials.go  from the secret to keys and certificates
//	hello.go        the first message on each connection; identity.go: who is who
//	frame.go        layout of all further messages; errors.go: failures in them
//	transport.go    listening, admission, connecting, the end; heartbeat.go: what time changes; source.go: from where
//	streams.go      connections for raft
//	peer.go         another node; lane.go: its calls of one class; call.go: a call
//	session.go      requests from another node; request.go: a request
//	conn.go         a connection of frames; output.go, inbox.go: its two directions
//	link*.go        system calls and TLS; internal/record: its records
//	memory.go       buffers and budgets
//	quiet.go        logs that strangers cannot flood
package peer
