package peer

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"

	"sheepdog/cluster/internal/peer/internal/record"
)

// handshake secures a connection. crypto/tls proves who is at the other side and agrees on
// keys with it; package record protects all that comes behind, limit records with a key.
func handshake(nc net.Conn, cfg *tls.Config, dialed bool, limit uint64) (*tlsLink, tls.ConnectionState, error) {
	var keys secrets
	defer keys.wipe()
	cfg = cfg.Clone()
	cfg.KeyLogWriter = &keys // the only way to get them
	in := &receiver{Conn: nc, sock: newSocket(nc)}
	role := tls.Server
	if dialed {
		role = tls.Client
	}
	tc := role(in, cfg)
	if err := tc.Handshake(); err != nil {
		return nil, tls.ConnectionState{}, fmt.Errorf("TLS: %w", handshakeReason(err))
	}
	state := tc.ConnectionState()
	mine, others := keys.server, keys.client
	if dialed {
		mine, others = others, mine
	}
	l, err := newTLSLink(in, state.CipherSuite, mine, others, limit)
	return l, state, err
}

// secrets are the first application traffic secrets of a connection: RFC 8446, 7.1. It is
// what crypto/tls logs keys to, and lives as long as the handshake.
type secrets struct {
	client, server []byte
}

// Write implements io.Writer for crypto/tls. It takes a line: a label, the random of the
// client, a secret.
func (s *secrets) Write(line []byte) (int, error) {
	var secret *[]byte
	f := bytes.Fields(line)
	switch {
	case len(f) != 3:
		return len(line), nil
	case string(f[0]) == "CLIENT_TRAFFIC_SECRET_0":
		secret = &s.client
	case string(f[0]) == "SERVER_TRAFFIC_SECRET_0":
		secret = &s.server
	default:
		return len(line), nil
	}
	*secret = make([]byte, hex.DecodedLen(len(f[2])))
	_, err := hex.Decode(*secret, f[2])
	return len(line), err
}

func (s *secrets) wipe() {
	clear(s.client)
	clear(s.server)
}

// tlsLink is the link with TLS, after its handshake.
//
// What is sent is copied to where it is sent from, record by record, and encrypted there
// while it is in the processor's cache: Seal wants the content in one piece, with its type
// behind it. What is received is decrypted to where it is wanted, as long as there is room
// for a whole record and one byte, so that nothing but the end of long data is copied.
type tlsLink struct {
	// The reader's.
	in     *receiver
	opener *record.Opener
	rest   []byte // content of a record that was opened in place; it lies in in
	err    error  // why no further record can be opened

	asked atomic.Bool // the other side wants to see another key
	ask   atomic.Bool // and is to be asked for one

	// Of who sends.
	sealer *record.Sealer
	out    *chunk // out.b[off:n] is to be sent
	off, n int
	vec    [1][]byte
	unsent atomic.Bool // there is some
}

// collected is how much is protected before it is sent, in bytes: many records leave in
// one call.
const collected = 16*record.MaxSize + record.KeyUpdateSize

var collectors = sync.Pool{New: func() any { return &chunk{b: make([]byte, collected)} }}

func newTLSLink(in *receiver, suite uint16, mine, others []byte, limit uint64) (*tlsLink, error) {
	l := &tlsLink{in: in}
	var err error
	if l.sealer, err = record.NewSealer(suite, mine, limit); err != nil {
		return nil, err
	}
	if l.opener, err = record.NewOpener(suite, others, limit); err != nil {
		return nil, err
	}
	return l, nil
}

func (l *tlsLink) recv(src source) (n int, err error) {
	if len(l.rest) == 0 {
		if err = l.err; err == nil {
			err = l.in.await(src)
		}
		if err != nil {
			return 0, err
		}
	}
	p, err := src.buffer()
	if err != nil {
		return 0, err
	}
	for n < len(p) {
		if len(l.rest) == 0 && !l.open(p[n:], &n) {
			break
		}
		k := copy(p[n:], l.rest)
		n, l.rest = n+k, l.rest[k:]
	}
	if n > 0 {
		return n, nil
	}
	return 0, l.err
}

// open opens the next record, if it is here: to p, so that n grows, or to rest.
func (l *tlsLink) open(p []byte, n *int) bool {
	if l.err != nil {
		return false
	}
	b, err := l.in.take()
	if err != nil || b == nil {
		l.err = err
		return false
	}
	dst := p
	if len(p) < record.Room(len(b)) {
		dst = b[record.HeaderSize:]
	}
	k, asked, err := l.opener.Open(dst, b)
	if err != nil {
		l.err = violation(err)
		return false
	}
	if asked {
		l.asked.Store(true)
	}
	if l.opener.Overdue() {
		l.ask.Store(true)
	}
	if len(p) < record.Room(len(b)) {
		l.rest = dst[:k]
	} else {
		*n += k
	}
	return true
}

func (l *tlsLink) more() bool {
	n, err := l.in.whole()
	return len(l.rest) > 0 || n > 0 || err != nil
}

func (l *tlsLink) pending() bool { return l.unsent.Load() }

func (l *tlsLink) send(v [][]byte, wait bool) (taken int, err error) {
	if l.pending() {
		if err := l.flush(wait); err != nil {
			return 0, err
		}
	}
	if taken, err = l.protect(v); err != nil || taken == 0 {
		return taken, err
	}
	if err = l.flush(false); err == errWouldBlock {
		err = nil // the next send finds it pending
	}
	return taken, err
}

// protect makes records of pieces until enough is collected. There is nothing pending.
func (l *tlsLink) protect(v [][]byte) (taken int, err error) {
	var p []byte
	next := func() bool { // there is something left, in p
		for len(p) == 0 && len(v) > 0 {
			p, v = v[0], v[1:]
		}
		return len(p) > 0
	}
	if !next() {
		return 0, nil
	}
	l.out = collectors.Get().(*chunk)
	l.off, l.n = 0, 0
	for next() && len(l.out.b)-l.n >= record.KeyUpdateSize+record.MaxSize {
		if l.sealer.Due() || l.asked.Load() || l.ask.Load() {
			l.asked.Store(false)
			n, err := l.sealer.KeyUpdate(l.out.b[l.n:], l.ask.Swap(false))
			if err != nil {
				return 0, err
			}
			l.n += n
		}
		content := l.out.b[l.n+record.HeaderSize:][:record.MaxContent]
		k := 0
		for k < len(content) && next() {
			n := copy(content[k:], p)
			k, p = k+n, p[n:]
		}
		l.n += l.sealer.Seal(l.out.b[l.n:], k)
		taken += k
	}
	l.unsent.Store(true)
	return taken, nil
}

// flush sends what was collected; errWouldBlock if it did not get all off and may not wait.
func (l *tlsLink) flush(wait bool) error {
	for l.off < l.n {
		l.vec[0] = l.out.b[l.off:l.n]
		n, err := l.in.sock.write(l.vec[:], wait)
		l.vec[0] = nil
		if err != nil {
			return err
		}
		l.off += n
	}
	collectors.Put(l.out)
	l.out = nil
	l.unsent.Store(false)
	return nil
}

func (l *tlsLink) release() {
	l.rest = nil
	l.in.release()
}

// tlsConn is a tlsLink as a net.Conn: for the hello, and for raft. What Close would still
// say of the end of TLS is of no use to anybody, and could wait.
type tlsConn struct {
	net.Conn
	link *tlsLink

	reading sync.Mutex
	into    []byte

	writing sync.Mutex
	failed  error
	vec     [1][]byte
}

// Read implements net.Conn.
func (c *tlsConn) Read(p []byte) (n int, err error) {
	c.reading.Lock()
	defer c.reading.Unlock()
	c.into = p
	for n == 0 && err == nil && len(p) > 0 {
		n, err = c.link.recv(c)
	}
	c.into = nil
	return n, err
}

// buffer implements source.
func (c *tlsConn) buffer() ([]byte, error) { return c.into, nil }

// idle implements source.
func (c *tlsConn) idle() {}

// Write implements net.Conn. After an error, a timeout too, nobody knows what the other side
// has got, and nothing further is written.
func (c *tlsConn) Write(p []byte) (sent int, err error) {
	c.writing.Lock()
	defer c.writing.Unlock()
	for c.failed == nil && (sent < len(p) || c.link.pending()) {
		var n int
		c.vec[0] = p[sent:]
		n, c.failed = c.link.send(c.vec[:], true)
		sent += n
	}
	c.vec[0] = nil
	return sent, c.failed
}

// receiver is where a connection's records come in. It reads as much as has come, and
// hands on record by record, so that it knows whether there is another one. During the
// handshake it is the net.Conn below crypto/tls, which so never has anything of what comes
// behind the handshake.
type receiver struct {
	net.Conn
	sock socket

	in   []byte // in[r:w] was received
	big  *chunk // what in lies in, unless in own
	own  []byte
	r, w int
	left int    // during the handshake: of the record at r; 0: a record begins there
	busy bool   // more may have come
	src  source // of who waits
}

// Read implements net.Conn for the handshake: never beyond the end of a record.
func (r *receiver) Read(p []byte) (int, error) {
	need := 1
	if r.left == 0 {
		need = record.HeaderSize
	}
	for r.w-r.r < need {
		if err := r.receive(); err != nil {
			return 0, err
		}
	}
	if r.left == 0 {
		r.left = record.HeaderSize + int(binary.BigEndian.Uint16(r.in[r.r+3:]))
	}
	n := copy(p, r.in[r.r:min(r.w, r.r+r.left)])
	r.r += n
	r.left -= n
	return n, nil
}

// receive receives something.
func (r *receiver) receive() error {
	n, err := r.sock.read(r)
	if err != nil {
		return err
	}
	r.w += n
	r.busy = r.w == len(r.in)
	return nil
}

// whole returns the length of the record at r, 0 if not all of it is here. It is an error
// if no such record may come.
func (r *receiver) whole() (int, error) {
	have := r.w - r.r
	if have < record.HeaderSize {
		return 0, nil
	}
	n, err := record.Size(r.in[r.r:])
	if err != nil || have < n {
		return 0, violation(err)
	}
	return n, nil
}

// violation tells what breaks the rules from what the other side says.
func violation(err error) error {
	if errors.Is(err, record.ErrRefused) {
		return fmt.Errorf("%w: %w", errProtocol, err)
	}
	return err
}

// await waits for a whole record.
func (r *receiver) await(src source) error {
	r.src = src
	defer func() { r.src = nil }()
	for {
		n, err := r.whole()
		if n > 0 || err != nil {
			return err
		}
		if err := r.receive(); err == io.EOF && r.w > r.r {
			return io.ErrUnexpectedEOF
		} else if err != nil {
			return err
		}
	}
}

// take takes a record, if a whole one is here. It stays valid until the next await.
func (r *receiver) take() ([]byte, error) {
	n, err := r.whole()
	if n == 0 {
		return nil, err
	}
	b := r.in[r.r : r.r+n : r.r+n]
	r.r += n
	return b, nil
}

// buffer implements source. It is called with less than a record at hand, which is less
// than smallChunk.
func (r *receiver) buffer() ([]byte, error) {
	rest := r.in[r.r:r.w]
	switch {
	case r.busy && r.big == nil:
		r.big = bigChunks.Get().(*chunk)
		r.in = r.big.b
	case r.in == nil:
		if r.own == nil {
			r.own = make([]byte, smallChunk)
		}
		r.in = r.own
	}
	r.w = copy(r.in, rest)
	r.r = 0
	return r.in[r.w:], nil
}

// idle implements source.
func (r *receiver) idle() {
	r.busy = false
	if r.src != nil {
		r.src.idle()
	}
	if r.big != nil && r.r == r.w {
		r.release()
	}
}

// release gives the big buffer back.
func (r *receiver) release() {
	if r.big != nil {
		bigChunks.Put(r.big)
	}
	r.big, r.in, r.r, r.w = nil, nil, 0, 0
}
