//go:build !linux

package stream

import "net"

// newLink returns the link for conn.
func newLink(conn net.Conn) link { return &connLink{conn: conn} }
