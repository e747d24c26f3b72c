// Package members knows which nodes are there, by gossip (hashicorp/serf), and finds
// them: by multicast (hashicorp/mdns), or at addresses that it is given. It is the only
// package that knows these libraries.
//
// Gossip suspects, it never decides: what must be agreed goes through package consensus.
// So its view may differ from node to node for a moment, and errors in both directions are
// to be expected: a node that is there may be said to have failed.
//
// # What a node tells
//
// Each member carries an Info: its id, zone, cluster, incarnation, roles and ports.
// List returns what is known now, with the states
//
//	alive     answers
//	suspect   has not answered somebody; that one has told the others
//	failed    has answered nobody for some time
//	left      has said good-bye
//
// Changed tells that there is something new. A killed process is suspect within about a
// second, and failed within two or three, more in a cluster of hundreds.
//
// # Finding each other
//
// As long as there is nobody else, and now and then later, a node looks around: it asks
// by multicast for _sheepdog._tcp, and tries the addresses of Config.Join and Config.Known
// that belong to no member. So two halves that lost each other come together again, and
// so do islands of nodes that were started at the same time. Serf itself tries failed
// members again.
//
// An announcement carries a fingerprint of the secret; nodes of another secret are not tried.
// Multicast leaves a machine by a network interface: it does not work between nodes on
// 127.0.0.0/8, which need Config.Join.
//
// # Who is refused
//
// With a Key all gossip is AES-GCM, and who has another key is not understood. Nodes of
// another cluster id are refused, and so is a node whose name belongs to another living
// one. A whole group is refused if one of its living members is: clusters never merge, not even
// through a node that is in none. Both sides log it, once for each peer, with the reason.
package members
