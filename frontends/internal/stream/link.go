package stream

import (
	"errors"
	"net"
)

// link moves bytes between a session and its client. One goroutine receives and one
// sends at a time.
type link interface {
	// recv fills the buffers that src offers, in order, with what has come; it waits
	// for at least one byte. Before it waits it calls src.idle, once, and asks for the
	// buffers again afterwards, so that a session that waits need not hold any.
	recv(src receiver) (int, error)
	// trySend sends what goes without waiting; errWouldBlock if nothing does.
	trySend(v [][]byte) (int, error)
	// send sends at least one byte, waiting if need be.
	send(v [][]byte) (int, error)
}

// receiver is where received bytes go.
type receiver interface {
	buffers() (p, q []byte, err error) // q may be empty
	idle()
}

var errWouldBlock = errors.New("would block")

// connLink is the link over any net.Conn: TLS, pipes. A net.Conn cannot tell whether
// a call will wait, so every receive counts as waiting and sending is left to the
// sender goroutine.
type connLink struct {
	conn    net.Conn
	scratch []byte // collects short pieces: each Write is a TLS record
}

const scratchSize = 16 << 10

func (l *connLink) recv(src receiver) (int, error) {
	src.idle()
	p, _, err := src.buffers()
	if err != nil {
		return 0, err
	}
	n, err := l.conn.Read(p)
	if n > 0 {
		return n, nil
	}
	return 0, err
}

func (l *connLink) trySend([][]byte) (int, error) { return 0, errWouldBlock }

func (l *connLink) send(v [][]byte) (sent int, err error) {
	if l.scratch == nil {
		l.scratch = make([]byte, 0, scratchSize)
	}
	flush := func(p []byte) {
		if err == nil && len(p) > 0 {
			var n int
			n, err = l.conn.Write(p)
			sent += n
		}
	}
	for _, p := range v {
		if len(l.scratch)+len(p) > scratchSize {
			flush(l.scratch)
			l.scratch = l.scratch[:0]
		}
		if len(p) > scratchSize {
			flush(p)
			continue
		}
		l.scratch = append(l.scratch, p...)
	}
	flush(l.scratch)
	l.scratch = l.scratch[:0]
	return sent, err
}
