// Package pdu encodes and decodes the protocol data units of iSCSI (RFC 7143 section 11): their
// basic header segments, digests and text keys. It is pure: bytes in, values out, and no byte
// from outside makes it panic.
package pdu
