//go:build !linux

package peer

import "net"

// newSocket returns the socket of a connection.
func newSocket(nc net.Conn) socket { return &streamSocket{nc} }
