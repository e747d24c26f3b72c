package peer

import (
	"crypto/tls"
	"encoding/binary"
	"errors"
	"net"
	"sync"
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
	// recv is socket.read, decrypted.
	recv(src source) (int, error)
	// more reports whether more has come than recv gave, so that a batch is not over.
	more() bool
	// send takes bytes off v and may keep them to itself: pending says whether it does,
	// and send of nothing moves those on.
	send(v [][]byte, wait bool) (int, error)
	pending() bool
}

// plainLink is the link without TLS.
type plainLink struct{ socket }

func (l *plainLink) recv(src source) (int, error)                { return l.read(src) }
func (l *plainLink) more() bool                                  { return false }
func (l *plainLink) send(v [][]byte, wait bool) (n int, e error) { return l.write(v, wait) }
func (l *plainLink) pending() bool                               { return false }

const (
	// maxPlain is what goes into one TLS record, in bytes.
	maxPlain = 16 << 10
	// maxCipher bytes are collected before they are sent: many records leave in one call.
	maxCipher = 256 << 10
	// recordRoom is more than any record takes: a write of the TLS layer.
	recordRoom = maxPlain + 2048
	// recordHeader is RFC 8446, 5.1: type, version, length.
	recordHeader = 5
)

// tlsLink is the link with TLS. crypto/tls makes a system call for each record of 16 KiB
// in either direction; the tlsSocket below it makes that one for many. Short pieces are
// put together, because each write becomes a record.
type tlsLink struct {
	conn *tls.Conn
	sock *tlsSocket
}

func (l *tlsLink) recv(src source) (int, error) {
	if !l.sock.whole() {
		src.idle() // crypto/tls may wait, with the buffer in its hands
	}
	p, err := src.buffer()
	if err != nil {
		return 0, err
	}
	n, err := l.conn.Read(p)
	if n > 0 {
		return n, nil
	}
	return 0, err
}

func (l *tlsLink) more() bool    { return l.sock.whole() }
func (l *tlsLink) pending() bool { return l.sock.unsent() }

func (l *tlsLink) send(v [][]byte, wait bool) (int, error) {
	if l.pending() {
		if err := l.sock.flush(wait); err != nil {
			return 0, err
		}
	}
	n, err := l.encrypt(v)
	if err == nil && l.pending() {
		if err = l.sock.flush(false); err == errWouldBlock {
			err = nil // the next send finds it pending
		}
	}
	return n, err
}

// encrypt takes pieces until enough is collected.
func (l *tlsLink) encrypt(v [][]byte) (taken int, err error) {
	if len(v) == 0 {
		return 0, nil
	}
	b := newBuffer(maxPlain)
	defer b.free()
	plain := b.b[:0]
	record := func(p []byte) {
		if err == nil && len(p) > 0 {
			_, err = l.conn.Write(p)
		}
	}
	for _, p := range v {
		for len(p) > 0 && err == nil {
			if l.sock.collected() >= maxCipher {
				record(plain)
				return taken, err
			}
			var n int
			if len(plain) == 0 && len(p) >= maxPlain {
				n = maxPlain
				record(p[:n])
			} else {
				n = min(len(p), maxPlain-len(plain))
				if plain = append(plain, p[:n]...); len(plain) == maxPlain {
					record(plain)
					plain = plain[:0]
				}
			}
			p = p[n:]
			taken += n
		}
	}
	record(plain)
	return taken, err
}

// tlsSocket is the net.Conn below crypto/tls. It reads as much as has come and hands it
// on record by record, so that it knows whether there is another one. Once collecting,
// what is written stays here until flush.
type tlsSocket struct {
	net.Conn
	sock socket

	// The reader's.
	in   []byte // in[r:w] was received
	big  *chunk // what in lies in, unless in small
	own  []byte
	r, w int
	left int // of the record at r; 0: a record begins there
	busy bool

	mu         sync.Mutex // the reader writes too: alerts, key updates
	collecting bool
	out        *chunk // its first n bytes, without the first off, are to be sent
	off, n     int
	vec        [1][]byte
}

func newTLSSocket(nc net.Conn) *tlsSocket { return &tlsSocket{Conn: nc, sock: newSocket(nc)} }

// Read implements net.Conn for crypto/tls: never beyond the end of a record.
func (s *tlsSocket) Read(p []byte) (int, error) {
	need := 1
	if s.left == 0 {
		need = recordHeader
	}
	for s.w-s.r < need {
		n, err := s.sock.read(s)
		if err != nil {
			return 0, err
		}
		s.w += n
		s.busy = s.w == len(s.in) // there may be more
	}
	if s.left == 0 {
		s.left = recordHeader + int(binary.BigEndian.Uint16(s.in[s.r+3:]))
	}
	n := copy(p, s.in[s.r:min(s.w, s.r+s.left)])
	s.r += n
	s.left -= n
	return n, nil
}

// buffer implements source. It is called with less than a record's header at hand.
func (s *tlsSocket) buffer() ([]byte, error) {
	rest := s.in[s.r:s.w]
	switch {
	case s.busy && s.big == nil:
		s.big = bigChunks.Get().(*chunk)
		s.in = s.big.b
	case s.in == nil:
		if s.own == nil {
			s.own = make([]byte, smallChunk)
		}
		s.in = s.own
	}
	s.w = copy(s.in, rest)
	s.r = 0
	return s.in[s.w:], nil
}

// idle implements source.
func (s *tlsSocket) idle() {
	s.busy = false
	if s.big == nil || s.w-s.r > 0 {
		return
	}
	s.release()
}

// release gives the big buffer back. The reader is done with it.
func (s *tlsSocket) release() {
	if s.big != nil {
		bigChunks.Put(s.big)
	}
	s.big, s.in, s.r, s.w = nil, nil, 0, 0
}

// whole reports whether a whole record has come that was not read.
func (s *tlsSocket) whole() bool {
	have := s.w - s.r
	return s.left == 0 && have >= recordHeader && have >= recordHeader+int(binary.BigEndian.Uint16(s.in[s.r+3:]))
}

// collect makes writes stay here until flush.
func (s *tlsSocket) collect() {
	s.mu.Lock()
	s.collecting = true
	s.mu.Unlock()
}

var errCollected = errors.New("more is written than may be collected")

// Write implements net.Conn for crypto/tls.
func (s *tlsSocket) Write(p []byte) (int, error) {
	s.mu.Lock()
	if !s.collecting {
		s.mu.Unlock()
		return s.Conn.Write(p)
	}
	defer s.mu.Unlock()
	if s.out == nil {
		s.out = cipherChunks.Get().(*chunk)
	}
	if len(p) > len(s.out.b)-s.n {
		return 0, errCollected // a peer that makes us write while we read
	}
	s.n += copy(s.out.b[s.n:], p)
	return len(p), nil
}

var cipherChunks = sync.Pool{New: func() any { return &chunk{b: make([]byte, maxCipher+4*recordRoom)} }}

func (s *tlsSocket) collected() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.n
}

func (s *tlsSocket) unsent() bool { return s.collected() > 0 }

// flush sends what was collected; errWouldBlock if it did not get all off and may not wait.
func (s *tlsSocket) flush(wait bool) error {
	for {
		s.mu.Lock()
		if s.n == 0 {
			s.mu.Unlock()
			return nil
		}
		// What lies in the chunk stays where it is while it is being sent: Write only
		// adds behind it, and only one goroutine flushes.
		s.vec[0] = s.out.b[s.off:s.n]
		s.mu.Unlock()
		n, err := s.sock.write(s.vec[:], wait)
		s.vec[0] = nil
		if err != nil {
			return err
		}
		s.mu.Lock()
		if s.off += n; s.off == s.n {
			cipherChunks.Put(s.out)
			s.out, s.off, s.n = nil, 0, 0
		}
		s.mu.Unlock()
	}
}
