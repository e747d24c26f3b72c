package peer

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	_ "unsafe" // for go:linkname

	"sheepdog/cluster/internal/peer/internal/record"
)

// What crypto/tls offers and prefers, with and without instructions for AES. It lets nobody choose.
//
//go:linkname suitesAES crypto/tls.defaultCipherSuitesTLS13
var suitesAES []uint16

//go:linkname suitesNoAES crypto/tls.defaultCipherSuitesTLS13NoAES
var suitesNoAES []uint16

// forceSuite has crypto/tls agree on one cipher suite until the test ends.
func forceSuite(t *testing.T, suite uint16) {
	aes, no := suitesAES, suitesNoAES
	suitesAES, suitesNoAES = []uint16{suite}, []uint16{suite}
	t.Cleanup(func() { suitesAES, suitesNoAES = aes, no })
}

// tapped is a connection that looks for KeyUpdates in what goes over it. No other record is as
// short: all else is a frame or part of the handshake.
type tapped struct {
	net.Conn
	in, out tap
}

type tap struct {
	mu      sync.Mutex
	b       []byte
	updates atomic.Int64
}

func (t *tap) see(p []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.b = append(t.b, p...)
	for len(t.b) >= record.HeaderSize {
		n := record.HeaderSize + int(binary.BigEndian.Uint16(t.b[3:]))
		if len(t.b) < n {
			return
		}
		if n == record.KeyUpdateSize {
			t.updates.Add(1)
		}
		t.b = t.b[n:]
	}
}

func (t *tapped) Read(p []byte) (int, error) {
	n, err := t.Conn.Read(p)
	t.in.see(p[:n])
	return n, err
}

func (t *tapped) Write(p []byte) (int, error) {
	t.out.see(p)
	return t.Conn.Write(p)
}

// wired is two ends of a TCP connection.
func wired(t *testing.T) (dialed, accepted net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	dialed = connect(t, l.Addr().String())
	if accepted, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { accepted.Close() })
	accepted.SetDeadline(time.Now().Add(testTimeout))
	return dialed, accepted
}

func tlsOf(t *testing.T, name string) *tls.Config {
	t.Helper()
	cfg, err := credentials(t, testSecret).tlsConfig(name)
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

// secured is a connection with the link at one end and crypto/tls at the other.
func secured(t *testing.T, dialed bool, limit uint64) (*tlsLink, *tls.Conn, *tapped) {
	t.Helper()
	mine, others := wired(t)
	role := tls.Client
	if dialed {
		role = tls.Server
	} else {
		mine, others = others, mine
	}
	wire := &tapped{Conn: others}
	tc := role(wire, tlsOf(t, "other"))
	over := make(chan error)
	go func() { over <- tc.Handshake() }()
	l, state, err := handshake(mine, tlsOf(t, "self"), dialed, limit)
	if err != nil {
		t.Fatal(err)
	}
	if name, err := certifiedName(state); name != "other" || err != nil {
		t.Fatal(name, err)
	}
	if err := <-over; err != nil {
		t.Fatal(err)
	}
	return l, tc, wire
}

func noise(r *rand.Rand, n int) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(r.Uint32())
	}
	return p
}

// into is a source of one buffer.
type into struct{ p []byte }

func (s *into) buffer() ([]byte, error) { return s.p, nil }
func (s *into) idle()                   {}

// crypto/tls understands the link and the link it, in either role, with every suite, while keys
// change by themselves and because they are asked to.
func TestLinkWithCryptoTLS(t *testing.T) {
	for _, suite := range []uint16{tls.TLS_AES_128_GCM_SHA256, tls.TLS_AES_256_GCM_SHA384, tls.TLS_CHACHA20_POLY1305_SHA256} {
		for _, dialed := range []bool{true, false} {
			t.Run(tls.CipherSuiteName(suite)+map[bool]string{true: "/client", false: "/server"}[dialed], func(t *testing.T) {
				forceSuite(t, suite)
				l, tc, wire := secured(t, dialed, 7)
				if got := tc.ConnectionState().CipherSuite; got != suite {
					t.Fatalf("suite %s", tls.CipherSuiteName(got))
				}
				r := rand.New(rand.NewPCG(uint64(suite), 1))
				there, back := noise(r, 3<<20), noise(r, 3<<20)
				var all sync.WaitGroup
				all.Go(func() { // crypto/tls takes and gives
					got := make([]byte, len(there))
					if _, err := io.ReadFull(tc, got); err != nil || !bytes.Equal(got, there) {
						t.Errorf("there: %v", err)
					}
				})
				all.Go(func() {
					r := rand.New(rand.NewPCG(2, 2))
					for p := back; len(p) > 0; {
						n := min(len(p), 32+r.IntN(50000)>>r.IntN(10))
						if len(p)-n < 32 { // else it looks like a KeyUpdate
							n = len(p)
						}
						if _, err := tc.Write(p[:n]); err != nil {
							t.Errorf("back: %v", err)
							return
						}
						p = p[n:]
					}
				})
				// The link sends pieces of all lengths, and receives as much as it has sent.
				sent, received := 0, 0
				for sent < len(there) || received < len(back) || l.pending() {
					var v [][]byte
					rest := there[sent:]
					for range 1 + r.IntN(20) {
						n := min(len(rest), r.IntN(300000)>>r.IntN(18))
						v, rest = append(v, rest[:n]), rest[n:]
					}
					n, err := l.send(v, true)
					if err != nil {
						t.Fatalf("send: %v", err)
					}
					for sent += n; received < sent; {
						const fence = 20
						p := bytes.Repeat([]byte{0xa5}, 1+r.IntN(300000)>>r.IntN(18)+fence)
						n, err := l.recv(&into{p[:len(p)-fence]})
						if err != nil || n > len(back)-received || !bytes.Equal(p[:n], back[received:][:n]) {
							t.Fatalf("recv: %d bytes, %v", n, err)
						}
						if !bytes.Equal(p[len(p)-fence:], bytes.Repeat([]byte{0xa5}, fence)) {
							t.Fatal("written behind the buffer")
						}
						received += n
					}
				}
				all.Wait()
				// There are 192 full records at least in each direction.
				if in, out := wire.in.updates.Load(), wire.out.updates.Load(); in < 192/7 || out < 10 {
					t.Errorf("%d updates there, %d back", in, out)
				}
				if len(l.rest) > 0 || l.pending() { // answers to what was asked about keys may still be there
					t.Error("something is left")
				}
			})
		}
	}
}

// holding is a connection that holds back all that is written behind the first piece.
type holding struct {
	net.Conn
	writes int
	held   []byte
}

func (h *holding) Write(p []byte) (int, error) {
	if h.writes++; h.writes == 1 {
		return h.Conn.Write(p)
	}
	h.held = append(h.held, p...)
	return len(p), nil
}

// What comes in the same read as the end of the handshake is not lost. Only a client can be
// that quick: it ends the handshake.
func TestNothingIsLostBehindHandshake(t *testing.T) {
	others, mine := wired(t)
	said := pattern(5000, 1)
	go func() {
		h := &holding{Conn: others}
		tc := tls.Client(h, tlsOf(t, "other"))
		if err := tc.Handshake(); err != nil {
			t.Error(err)
		}
		tc.Write(said[:1000])
		tc.Write(said[1000:])
		others.Write(h.held)
	}()
	l, _, err := handshake(mine, tlsOf(t, "self"), false, record.MaxRecords)
	if err != nil {
		t.Fatal(err)
	}
	if l.in.w == l.in.r {
		t.Error("nothing was received ahead: the test shows nothing")
	}
	got := make([]byte, len(said))
	if _, err := io.ReadFull(&tlsConn{Conn: mine, link: l}, got); err != nil || !bytes.Equal(got, said) {
		t.Errorf("%v", err)
	}
}

// How a connection may end, and what is said of it.
func TestEndsOfTLS(t *testing.T) {
	long := []byte{23, 3, 3, 0x41, 1}
	for _, c := range []struct {
		name string
		end  func(l *tlsLink, tc *tls.Conn, sealed []byte)
		want error
		bad  bool // it breaks the rules
	}{
		{"close_notify", func(l *tlsLink, tc *tls.Conn, _ []byte) { tc.CloseWrite() }, io.EOF, false},
		{"end without it", func(l *tlsLink, tc *tls.Conn, _ []byte) { tc.NetConn().Close() }, io.EOF, false},
		{"end within a record", func(l *tlsLink, tc *tls.Conn, p []byte) { tc.NetConn().Write(p[:50]); tc.NetConn().Close() }, io.ErrUnexpectedEOF, false},
		{"end within a header", func(l *tlsLink, tc *tls.Conn, p []byte) { tc.NetConn().Write(p[:3]); tc.NetConn().Close() }, io.ErrUnexpectedEOF, false},
		{"garbage", func(l *tlsLink, tc *tls.Conn, p []byte) { tc.NetConn().Write(pattern(1000, 3)) }, tls.AlertError(10), true},
		{"forged record", func(l *tlsLink, tc *tls.Conn, p []byte) { tc.NetConn().Write(p) }, tls.AlertError(20), true},
		{"long record, of which only the header comes", func(l *tlsLink, tc *tls.Conn, p []byte) { tc.NetConn().Write(long) }, tls.AlertError(22), true},
		{"alert that is not protected", func(l *tlsLink, tc *tls.Conn, p []byte) { tc.NetConn().Write([]byte{21, 3, 3, 0, 2, 2, 40}) }, tls.AlertError(10), true},
		{"alert of the other side", func(l *tlsLink, tc *tls.Conn, p []byte) {
			l.in.Conn.Write(p) // what crypto/tls takes for a forgery
			tc.Read(make([]byte, 1))
		}, tls.AlertError(20), false},
	} {
		t.Run(c.name, func(t *testing.T) {
			l, tc, _ := secured(t, true, record.MaxRecords)
			defer tc.NetConn().Close()
			s, err := record.NewSealer(tls.TLS_AES_128_GCM_SHA256, make([]byte, 32), record.MaxRecords)
			if err != nil {
				t.Fatal(err)
			}
			p := make([]byte, record.MaxSize)
			p = p[:s.Seal(p, 100)]
			tc.Write([]byte("last words"))
			go c.end(l, tc, p)
			got := make([]byte, 100)
			for n := 0; n < 10; {
				k, err := l.recv(&into{got[n:]})
				if n += k; err != nil {
					t.Fatalf("what came before is lost: %v", err)
				}
			}
			for range 2 { // it stays like that
				n, err := l.recv(&into{got})
				if n != 0 || !errors.Is(err, c.want) || errors.Is(err, errProtocol) != c.bad {
					t.Errorf("%d bytes, %v", n, err)
				}
			}
		})
	}
}

// Connections work on while both sides change their keys all the time, one because it has to,
// the other because it is asked to.
func TestKeysChangeUnderLoad(t *testing.T) {
	for _, counts := range [][2]uint64{{6, record.MaxRecords}, {record.MaxRecords, 6}, {5, 9}} {
		w := network(t)
		var wire atomic.Pointer[tapped]
		a := w.start("a", func(c *Config) {
			c.keyRecords = counts[0]
			c.Dial = func(ctx context.Context, address string) (net.Conn, error) {
				nc, err := DialFrom(nil)(ctx, address)
				if err == nil {
					x := &tapped{Conn: nc}
					wire.Store(x)
					nc = x
				}
				return nc, err
			}
		})
		w.start("b", func(c *Config) { c.keyRecords = counts[1] })
		var users sync.WaitGroup
		for g := range 4 {
			users.Go(func() {
				r := rand.New(rand.NewPCG(5, uint64(g)))
				for i := range 60 {
					data := pattern(r.IntN(400000)>>r.IntN(12), byte(i))
					c := a.do("b", &Call{Op: opEcho, Head: data[:min(len(data), 20)], Data: data, Want: len(data)})
					if c.Err != nil || !bytes.Equal(c.ReplyData, data) {
						t.Errorf("%v", c.Err)
						return
					}
					c.Release()
				}
			})
		}
		users.Wait()
		x := wire.Load()
		if in, out := x.in.updates.Load(), x.out.updates.Load(); in < 20 || out < 20 {
			t.Errorf("keys of %d records: %d updates there, %d back", counts, out, in)
		}
		a.Close()
	}
}

// What breaks the rules of TLS ends the connection, says why once, and disturbs nobody.
func TestHostileRecords(t *testing.T) {
	w := network(t)
	b := w.start("b", nil)
	check := undisturbed(t, w, nil)
	check()
	for _, c := range []struct {
		what string
		send func(l *tlsLink, nc net.Conn)
	}{
		{"garbage", func(l *tlsLink, nc net.Conn) { nc.Write(pattern(100000, 3)) }},
		{"long record", func(l *tlsLink, nc net.Conn) { nc.Write([]byte{23, 3, 3, 0xff, 0xff}) }},
		{"flipped bit", func(l *tlsLink, nc net.Conn) {
			p := make([]byte, record.MaxSize)
			n := l.sealer.Seal(p, 1000)
			p[500] ^= 1
			nc.Write(p[:n])
		}},
		{"record again", func(l *tlsLink, nc net.Conn) {
			p := make([]byte, record.MaxSize)
			n := l.sealer.Seal(p, 1) // a part of a header, which is waited for
			nc.Write(slices.Concat(p[:n], p[:n]))
		}},
		{"KeyUpdates for ever", func(l *tlsLink, nc net.Conn) {
			for p := make([]byte, record.KeyUpdateSize); ; {
				n, err := l.sealer.KeyUpdate(p, true)
				if err != nil {
					t.Error(err)
				}
				if _, err := nc.Write(p[:n]); err != nil {
					return
				}
			}
		}},
	} {
		nc := connect(t, b.addr)
		l, _, err := handshake(nc, tlsOf(t, "evil"), true, record.MaxRecords)
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := greet(&tlsConn{Conn: nc, link: l}, Identity{Cluster: testCluster, Name: "evil"}, KindData, "b"); err != nil {
			t.Fatal(err)
		}
		c.send(l, nc)
		expectClosed(t, c.what, nc)
		eventually(t, c.what+": connection stays", func() bool { return b.Stats().Incoming == 1 })
		check()
	}
	if n := b.log.count(); n != 1 || !strings.Contains(b.log.String(), errProtocol.Error()) {
		t.Errorf("logged %d times:\n%s", n, b.log)
	}
}

// script is a socket that gives what it has in pieces of given lengths, and takes everything.
type script struct {
	b     []byte
	sizes []byte
	i     int
	taken []byte
}

func (s *script) size() int {
	if len(s.sizes) == 0 {
		return 1 << 20
	}
	s.i++
	n := int(s.sizes[s.i%len(s.sizes)])
	return 1 + n*n
}

func (s *script) read(src source) (int, error) {
	src.idle()
	p, err := src.buffer()
	if err != nil || len(p) == 0 {
		return 0, errors.Join(err, io.ErrShortBuffer)
	}
	if len(s.b) == 0 {
		return 0, io.EOF
	}
	n := copy(p, s.b[:min(len(s.b), s.size())])
	s.b = s.b[n:]
	return n, nil
}

func (s *script) write(v [][]byte, wait bool) (n int, err error) {
	for _, p := range v {
		p = p[:min(len(p), s.size())]
		s.taken = append(s.taken, p...)
		n += len(p)
	}
	return n, nil
}

// FuzzLink: whatever pieces bytes are sent, carried and received in, they come through, and what
// comes behind them does no harm.
func FuzzLink(f *testing.F) {
	f.Add([]byte{3, 200, 1}, []byte{23, 3, 3, 0, 17}, uint16(3))
	f.Add([]byte{0}, []byte("GET /"), uint16(0))
	f.Add([]byte{255, 7}, []byte{}, uint16(50))
	f.Fuzz(func(t *testing.T, sizes, behind []byte, limit uint16) {
		secret := make([]byte, 32)
		link := func(s *script) *tlsLink {
			l, err := newTLSLink(&receiver{sock: s}, tls.TLS_AES_128_GCM_SHA256, secret, secret, 2+uint64(limit))
			if err != nil {
				t.Fatal(err)
			}
			return l
		}
		wire := &script{sizes: sizes}
		out := link(wire)
		pieces := script{sizes: sizes}
		said := pattern(100000, byte(len(sizes)))
		for p := said; len(p) > 0 || out.pending(); {
			k := min(len(p), pieces.size())
			n, err := out.send([][]byte{p[:k/2], nil, p[k/2 : k]}, true)
			if err != nil {
				t.Fatal(err)
			}
			p = p[n:]
		}
		in := link(&script{b: append(wire.taken, behind...), sizes: sizes})
		var got []byte
		for len(got) < len(said) {
			p := make([]byte, pieces.size())
			n, err := in.recv(&into{p})
			if got = append(got, p[:n]...); err != nil {
				t.Fatalf("after %d bytes: %v", len(got), err)
			}
		}
		if !bytes.Equal(got, said) {
			t.Fatal("something else came")
		}
		for i := 0; ; i++ {
			n, err := in.recv(&into{make([]byte, 100)})
			if n > 0 || i > 1 {
				t.Fatalf("%d bytes of nothing", n)
			}
			if err != nil {
				break
			}
		}
		in.release()
	})
}
