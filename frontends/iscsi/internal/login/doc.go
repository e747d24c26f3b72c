// Package login decides the login phase of an iSCSI connection (RFC 7143 sections 6 and 13): the
// stages, who is let in by CHAP, and what every key is negotiated to. It is pure: requests in,
// replies out. Reading, writing, time limits and looking for targets are its caller's.
//
//	keys.go     the table of keys and how each is negotiated
//	machine.go  stages
//	chap.go     CHAP, one-way and mutual
package login
