package peer

import (
	"errors"
	"net"
)

// socket is a connection's bytes. One goroutine reads and one writes at a time.
type socket interface {
	// read fills the buffer that src offers with what has come; it waits for at least
	// one byte. Before it waits it calls src.idle, once, and asks for the buffer again
	// afterwards, so that a connection that waits need not hold one.
	read(src source) (int, error)
	// write sends some of v. If it may not wait and nothing goes, errWouldBlock.
	write(v [][]byte, wait bool) (int, error)
}

// source is where received bytes go.
type source interface {
	buffer() ([]byte, error)
	idle()
}

var errWouldBlock = errors.New("would block")

// streamSocket is the socket over any net.Conn. That cannot tell whether a call will
// wait, so every read counts as waiting, and writing is left to who may wait.
type streamSocket struct{ net.Conn }

func (s *streamSocket) read(src source) (int, error) {
	src.idle()
	p, err := src.buffer()
	if err != nil {
		return 0, err
	}
	n, err := s.Read(p)
	if n > 0 {
		return n, nil
	}
	return 0, err
}

func (s *streamSocket) write(v [][]byte, wait bool) (sent int, err error) {
	if !wait {
		return 0, errWouldBlock
	}
	for _, p := range v {
		n, err := s.Write(p)
		if sent += n; err != nil {
			return sent, err
		}
	}
	return sent, nil
}

// link moves frames between a conn and the other side.
type link interface {
	// recv is socket.read, decrypted. It gives nothing if what came was for the link alone.
	recv(src source) (int, error)
	// more reports whether more has come than recv gave, so that a batch is not over.
	more() bool
	// send takes bytes off v and may keep them to itself: pending says whether it does,
	// and send of nothing moves those on. Any goroutine may ask pending.
	send(v [][]byte, wait bool) (int, error)
	pending() bool
	// release gives memory back when nobody receives any more.
	release()
}

// plainLink is the link without TLS.
type plainLink struct{ socket }

func (l *plainLink) recv(src source) (int, error)                { return l.read(src) }
func (l *plainLink) more() bool                                  { return false }
func (l *plainLink) send(v [][]byte, wait bool) (n int, e error) { return l.write(v, wait) }
func (l *plainLink) pending() bool                               { return false }
func (l *plainLink) release()                                    {}
