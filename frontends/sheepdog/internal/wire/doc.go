// Package wire is the pure codec of the native Sheepdog protocol: headers of requests and
// responses, object ids, and the inode object that clients see. It knows no sockets and
// decides nothing. All integers are little-endian; constants have the protocol's names.
//
// Decoders take any bytes: what they return is what was said, not what is allowed.
package wire
