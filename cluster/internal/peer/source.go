package peer

import (
	"context"
	"errors"
	"net"
	"syscall"
)

// DialFrom returns a Config.Dial that connects from an address of this machine, so that
// the others, their allow lists and firewalls see the address that they know the node by.
// A nil address, one of another family than the destination's, or one that the machine
// does not have any more leaves the choice to the system.
func DialFrom(ip net.IP) func(ctx context.Context, address string) (net.Conn, error) {
	anywhere := &net.Dialer{KeepAlive: -1} // heartbeats are quicker
	if ip == nil || ip.IsUnspecified() {
		return func(ctx context.Context, address string) (net.Conn, error) {
			return anywhere.DialContext(ctx, "tcp", address)
		}
	}
	from := &net.Dialer{KeepAlive: -1, LocalAddr: &net.TCPAddr{IP: ip}}
	return func(ctx context.Context, address string) (net.Conn, error) {
		host, _, _ := net.SplitHostPort(address)
		to := net.ParseIP(host)
		if to == nil || (to.To4() == nil) != (ip.To4() == nil) {
			return anywhere.DialContext(ctx, "tcp", address)
		}
		nc, err := from.DialContext(ctx, "tcp", address)
		if errors.Is(err, syscall.EADDRNOTAVAIL) {
			return anywhere.DialContext(ctx, "tcp", address)
		}
		return nc, err
	}
}
