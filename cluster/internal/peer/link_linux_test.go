package peer

import (
	"net"
	"testing"

	"golang.org/x/sys/unix"
)

// Connections within the machine are not paced, whatever the system's congestion control does.
func TestUnpaced(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	nc, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	s, ok := newSocket(nc).(*rawSocket)
	if !ok {
		t.Fatal("a TCP connection is no raw socket")
	}
	var name string
	if cerr := s.raw.Control(func(fd uintptr) { name, err = unix.GetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION) }); cerr != nil || err != nil {
		t.Fatal(cerr, err)
	}
	if name != "reno" {
		t.Errorf("congestion control is %q", name)
	}
}
