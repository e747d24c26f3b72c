// Package record protects and opens the records of a TLS 1.3 connection whose handshake
// is over: RFC 8446, sections 5 (the record protocol), 7.2 and 7.3 (its keys) and 4.6.3
// (their change). What it makes is the same on the wire as what any TLS 1.3 makes.
//
// It is there because crypto/tls moves each byte twice beside each pass of the cipher.
// Here a Sealer works in the memory that is sent, and an Opener writes where the caller
// wants the content.
//
// The package has no socket, no clock and no randomness: it is told what came and says
// what that means. It makes no handshake, and of what may come after one it knows what
// RFC 8446 lets come to a side that offers no session to be resumed and no client
// authentication afterwards: application data, alerts and KeyUpdate. All else is refused.
//
// # Promises
//
// No content comes from a record that is not the next one that the other side has sealed.
// A Sealer's key protects at most MaxRecords records. Memory does not depend on what comes.
//
// A Sealer and an Opener are used by one goroutine at a time, each.
package record
