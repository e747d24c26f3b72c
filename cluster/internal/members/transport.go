package members

import (
	"net"
	"time"

	"github.com/hashicorp/memberlist"
)

// bindAttempts is how often a port is looked for that is free for TCP and UDP.
const bindAttempts = 10

// transport is memberlist's own, but for connections that come from the node's own
// address. So others know who calls on machines with many addresses.
type transport struct {
	*memberlist.NetTransport
	from net.IP
}

func listen(ip net.IP, port int, c memberlist.NetTransportConfig) (t transport, err error) {
	attempts := 1
	if port == 0 {
		attempts = bindAttempts
	}
	c.BindAddrs, c.BindPort = []string{ip.String()}, port
	for range attempts {
		var n *memberlist.NetTransport
		if n, err = memberlist.NewNetTransport(&c); err == nil {
			return transport{n, ip}, nil
		}
	}
	return t, err
}

// DialTimeout implements memberlist.Transport.
func (t transport) DialTimeout(addr string, timeout time.Duration) (net.Conn, error) {
	d := net.Dialer{Timeout: timeout, LocalAddr: &net.TCPAddr{IP: t.from}}
	return d.Dial("tcp", addr)
}

// DialAddressTimeout implements memberlist.NodeAwareTransport.
func (t transport) DialAddressTimeout(a memberlist.Address, timeout time.Duration) (net.Conn, error) {
	return t.DialTimeout(a.Addr, timeout)
}
