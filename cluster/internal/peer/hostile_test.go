package peer

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// undisturbed is a connection that works while a test does its worst.
func undisturbed(t *testing.T, w *nodes, mode func(*Config)) func() {
	a := w.start("honest", mode)
	return func() {
		t.Helper()
		data := pattern(8192, 1)
		if c := a.do("b", &Call{Op: opEcho, Data: data, Want: len(data)}); c.Err != nil || !bytes.Equal(c.ReplyData, data) {
			t.Errorf("an honest node is disturbed: %v", c.Err)
		}
	}
}

func connect(t *testing.T, addr string) net.Conn {
	t.Helper()
	nc, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	nc.SetDeadline(time.Now().Add(testTimeout))
	return nc
}

// expectClosed reads until the other side closes.
func expectClosed(t *testing.T, what string, nc net.Conn) {
	t.Helper()
	if _, err := io.Copy(io.Discard, nc); errors.Is(err, context.DeadlineExceeded) || err != nil && strings.Contains(err.Error(), "timeout") {
		t.Errorf("%s: connection stays open", what)
	}
}

// Strangers are disconnected, and logged once, however often they come.
func TestStrangers(t *testing.T) {
	modes(t, func(t *testing.T, mode func(*Config)) {
		w := network(t)
		b := w.start("b", func(c *Config) { mode(c); c.HandshakeTimeout = time.Second })
		check := undisturbed(t, w, mode)
		check()
		good := (&hello{version: helloVersion, kind: KindData, from: Identity{Cluster: testCluster, Name: "x"}, to: "b"}).encode()
		long := bytes.Clone(good)
		long[6], long[7] = 0xff, 0xff
		sends := [][]byte{
			[]byte("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"), pattern(1<<16, 5), make([]byte, 1<<16), long,
			{0x16, 3, 1, 0xff, 0xff}, append([]byte{0x16, 3, 1, 0x40, 0}, pattern(1<<14, 1)...),
		}
		if b.tls != nil {
			sends = append(sends, good) // plain where TLS is spoken
		}
		for range 5 {
			for i, p := range sends {
				nc := connect(t, b.addr)
				nc.Write(p)
				if i != 4 {
					nc.(*net.TCPConn).CloseWrite()
				}
				expectClosed(t, fmt.Sprintf("message %d", i), nc)
			}
		}
		check()
		if n := b.log.count(); n != 1 {
			t.Errorf("logged %d times:\n%s", n, b.log)
		}
		eventually(t, "connections stay", func() bool { s := b.Stats(); return s.Incoming == 1 && s.Handshakes == 0 })
	})
}

// Another secret: refused, both sides say that it is the secret, neither floods its log.
func TestWrongSecret(t *testing.T) {
	w := network(t)
	b := w.start("b", nil)
	a := w.start("a", func(c *Config) { c.Credentials = credentials(t, "another secret altogether") })
	for range 20 {
		if err := a.do("b", &Call{Op: opEcho}).Err; !errors.Is(err, ErrDisconnected) || !errors.Is(err, errOtherSecret) {
			t.Fatalf("%v", err)
		}
		if _, err := a.Raft().Dial(context.Background(), "b"); !errors.Is(err, errOtherSecret) {
			t.Fatalf("%v", err)
		}
	}
	eventually(t, "b says nothing", func() bool { return b.log.count() > 0 })
	for _, x := range []*node{a, b} {
		if n := x.log.count(); n != 1 || !strings.Contains(x.log.String(), "another cluster secret") {
			t.Errorf("node %s logged %d times:\n%s", x.cfg.Identity.Name, n, x.log)
		}
	}
	if b.echoes.handled.Load() != 0 {
		t.Error("requests were handled")
	}
}

// What fits in the hello is refused with its reason, on both sides.
func TestRefusals(t *testing.T) {
	modes(t, func(t *testing.T, mode func(*Config)) {
		w := network(t)
		b := w.start("b", func(c *Config) {
			mode(c)
			c.Admit = func(from Identity, kind Kind) error {
				if from.Name == "removed" {
					return errors.New("node was removed from the cluster")
				}
				return nil
			}
		})
		refused := func(name, cluster, to, want string) {
			t.Helper()
			a := w.start(name, func(c *Config) { mode(c); c.Identity.Cluster = cluster })
			before := b.log.count()
			for range 3 {
				var no *RefusedError
				if err := a.do(to, &Call{Op: opEcho}).Err; !errors.As(err, &no) || !strings.Contains(err.Error(), want) {
					t.Fatalf("%v", err)
				}
			}
			if a.log.count() != 1 || !strings.Contains(a.log.String(), want) {
				t.Errorf("%s logs:\n%s", name, a.log)
			}
			if to == "b" {
				eventually(t, "b says nothing", func() bool { return b.log.count() > before })
			}
			a.Close()
		}
		refused("foreign", "c2", "b", "belongs to cluster c1")
		refused("removed", testCluster, "b", "was removed")
		w.mu.Lock()
		w.at["moved"] = w.at["b"]
		w.mu.Unlock()
		refused("mistaken", testCluster, "moved", "other node")
	})
}

// A node cannot take another one's name, and versions are told apart.
func TestHelloIsHeldAgainstCertificate(t *testing.T) {
	w := network(t)
	b := w.start("b", nil)
	say := func(h hello) hello {
		cfg, err := credentials(t, testSecret).tlsConfig("x")
		if err != nil {
			t.Fatal(err)
		}
		nc := tls.Client(connect(t, b.addr), cfg)
		nc.Write(h.encode())
		answer, err := readHello(nc)
		if err != nil {
			t.Fatal(err)
		}
		return answer
	}
	h := hello{version: helloVersion, kind: KindData, from: Identity{Cluster: testCluster, Name: "x"}, to: "b"}
	if a := say(h); a.verdict != accepted || a.from.Name != "b" || a.nonce == (nonce{}) {
		t.Errorf("%+v", a)
	}
	h.from.Name = "y"
	if a := say(h); a.verdict != otherNode || !strings.Contains(a.text, `"x" says that it is node "y"`) {
		t.Errorf("%+v", a)
	}
	h.from.Name, h.version = "x", 9
	if a := say(h); a.verdict != otherVersion || !strings.Contains(a.text, "version 9") {
		t.Errorf("%+v", a)
	}
	h.version, h.kind = helloVersion, 77
	if a := say(h); a.verdict != otherVersion {
		t.Errorf("%+v", a)
	}
}

// Connections that say nothing end in time, and do not keep others out.
func TestSlowloris(t *testing.T) {
	modes(t, func(t *testing.T, mode func(*Config)) {
		w := network(t)
		b := w.start("b", func(c *Config) { mode(c); c.HandshakeTimeout = 300 * time.Millisecond; c.MaxHandshakes = 40 })
		check := undisturbed(t, w, mode)
		check()
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		var all []net.Conn
		for i := range 100 {
			nc := connect(t, b.addr)
			nc.Write((&hello{version: helloVersion}).encode()[:i%20])
			all = append(all, nc)
		}
		eventually(t, "the bound is not reached", func() bool { return b.Stats().Refused >= 60 })
		if s := b.Stats(); s.Handshakes > 20 { // half of them for one address
			t.Errorf("%d handshakes at a time", s.Handshakes)
		}
		runtime.ReadMemStats(&after)
		if n := int64(after.HeapInuse) - int64(before.HeapInuse); n > 16<<20 {
			t.Errorf("handshakes take %d bytes", n)
		}
		check()
		start, late := time.Now(), lateness(t)
		for _, nc := range all {
			expectClosed(t, "slow handshake", nc)
		}
		if d := time.Since(start); d > 5*time.Second+10*late() {
			t.Errorf("they last %v", d)
		}
		eventually(t, "handshakes stay", func() bool { return b.Stats().Handshakes == 0 })
		check()
	})
}

// wire is a hostile node that is through the hello.
type wire struct {
	net.Conn
	seed  uint64
	count uint64
}

func (w *nodes) hostile(t *testing.T, b *node) *wire {
	t.Helper()
	nc := connect(t, b.addr)
	_, seed, err := greet(nc, Identity{Cluster: testCluster, Name: "evil"}, KindData, "b")
	if err != nil {
		t.Fatal(err)
	}
	return &wire{Conn: nc, seed: seed}
}

func (x *wire) frame(h header, content []byte) []byte {
	var b [headerSize]byte
	if h.id == 0 {
		x.count++
		h.id = x.count << slotBits
	}
	h.encode(&b, x.seed)
	return append(b[:], content...)
}

// A node connects, gives up, and connects anew, and the handshake of the first connection ends last: the second one stays,
// and nothing that comes over the first one is carried out.
func TestLateHandshakeIsLate(t *testing.T) {
	w := network(t)
	come, goOn := make(chan struct{}), make(chan struct{})
	var hellos atomic.Int64
	b := w.start("b", func(c *Config) {
		insecure(c)
		c.Admit = func(Identity, Kind) error {
			if hellos.Add(1) == 1 {
				close(come)
				<-goOn
			}
			return nil
		}
	})
	letGo := sync.OnceFunc(func() { close(goOn) })
	t.Cleanup(letGo)
	from := Identity{Cluster: testCluster, Name: "evil"}
	early := connect(t, b.addr)
	greeted := make(chan *wire, 1)
	go func() {
		_, seed, err := greet(early, from, KindData, "b")
		if err != nil {
			t.Error(err)
		}
		greeted <- &wire{Conn: early, seed: seed}
	}()
	<-come
	second := w.hostile(t, b)
	ask := func(x *wire, name byte) {
		if _, err := x.Write(x.frame(header{typ: frameRequest, op: opHold, head: 1}, []byte{name})); err != nil {
			t.Log(err)
		}
	}
	ask(second, 2)
	eventually(t, "the second connection is not served", func() bool { return b.echoes.count() == 1 })
	letGo()
	first := <-greeted
	ask(first, 1)
	expectClosed(t, "the first connection", first)
	ask(second, 2)
	eventually(t, "the second connection has ended", func() bool { return b.echoes.count() == 2 })
	b.echoes.mu.Lock()
	for _, r := range b.echoes.held {
		if r.Head[0] != 2 {
			t.Error("a request of the first connection was carried out")
		}
	}
	b.echoes.mu.Unlock()
	b.echoes.let()
}

// After the hello: what breaks the rules ends the connection and reaches no handler.
func TestHostileFrames(t *testing.T) {
	w := network(t)
	b := w.start("b", insecure)
	check := undisturbed(t, w, insecure)
	check()
	echo := header{typ: frameRequest, op: opEcho, head: 4, want: 16}
	recorded := func() []byte {
		x := w.hostile(t, b)
		return x.frame(echo, []byte("head"))
	}()
	for _, c := range []struct {
		what    string
		handled int64
		send    func(x *wire) []byte
	}{
		{"garbage", 0, func(x *wire) []byte { return pattern(1000, 3) }},
		{"message of another connection", 0, func(x *wire) []byte { return recorded }},
		{"message again", 1, func(x *wire) []byte { return bytes.Repeat(x.frame(echo, []byte("head")), 2) }},
		{"earlier number", 1, func(x *wire) []byte {
			h := echo
			h.id = 9 << slotBits
			p := x.frame(h, []byte("head"))
			h.id = 8<<slotBits | 5
			return append(p, x.frame(h, []byte("head"))...)
		}},
		{"long head", 0, func(x *wire) []byte {
			return x.frame(header{typ: frameRequest, head: MaxHead + 1}, nil)
		}},
		{"long data", 0, func(x *wire) []byte { return x.frame(header{typ: frameRequest, data: MaxData + 1}, nil) }},
		{"4 GiB of data", 0, func(x *wire) []byte { return x.frame(header{typ: frameRequest, data: 1<<32 - 1}, nil) }},
		{"4 GiB wanted", 0, func(x *wire) []byte { return x.frame(header{typ: frameRequest, want: 1<<32 - 1}, nil) }},
		{"reply", 0, func(x *wire) []byte { return x.frame(header{typ: frameReply}, nil) }},
		{"unknown type", 0, func(x *wire) []byte { return x.frame(header{typ: 99}, nil) }},
		{"ping with content", 0, func(x *wire) []byte { return x.frame(header{typ: framePing, data: 10}, nil) }},
	} {
		before := b.echoes.handled.Load()
		x := w.hostile(t, b)
		x.Write(c.send(x))
		expectClosed(t, c.what, x)
		eventually(t, c.what+": connection stays", func() bool { return b.Stats().Incoming == 1 })
		if n := b.echoes.handled.Load() - before; n != c.handled {
			t.Errorf("%s: %d requests were handled", c.what, n)
		}
		check()
	}
	if n := b.log.count(); n != 1 {
		t.Errorf("logged %d times:\n%s", n, b.log)
	}
}

// Messages that end too early are never handled, whatever their length.
func TestTruncatedFrames(t *testing.T) {
	w := network(t)
	b := w.start("b", insecure)
	for _, n := range []int{0, 100, inPlaceMax, inPlaceMax + 1, 1 << 20} {
		x := w.hostile(t, b)
		p := x.frame(header{typ: frameRequest, op: opEcho, head: 10, data: uint32(n)}, pattern(10+n, 1))
		x.Write(p[:len(p)-1])
		x.Close()
	}
	for n := range headerSize {
		x := w.hostile(t, b)
		x.Write(x.frame(header{typ: frameRequest, op: opEcho}, nil)[:n])
		x.Close()
	}
	eventually(t, "connections stay", func() bool { return b.Stats().Incoming == 0 })
	if b.echoes.handled.Load() != 0 || b.Stats().Memory != [classes]int64{} {
		t.Errorf("%d requests were handled, %v bytes held", b.echoes.handled.Load(), b.Stats().Memory)
	}
}

// Who sends a message too slowly, or does not take replies, is disconnected and held to
// its bounds meanwhile.
func TestStalledNodes(t *testing.T) {
	w := network(t)
	quick := func(c *Config) {
		insecure(c)
		c.Stall, c.Heartbeat, c.Silence = 400*time.Millisecond, 20*time.Millisecond, 5*time.Second
		c.Memory = minMemory
	}
	b := w.start("b", quick)
	check := undisturbed(t, w, quick)
	x := w.hostile(t, b)
	x.Write(x.frame(header{typ: frameRequest, op: opEcho, data: 1 << 20}, nil))
	go func() {
		for { // a byte at a time
			if _, err := x.Write([]byte{0}); err != nil {
				return
			}
			time.Sleep(5 * time.Millisecond)
		}
	}()
	expectClosed(t, "slow message", x)
	check()

	y := w.hostile(t, b)
	go func() {
		for {
			if _, err := y.Write(y.frame(header{typ: frameRequest, op: opRead, want: 1 << 20}, nil)); err != nil {
				return
			}
		}
	}()
	eventually(t, "nothing is held", func() bool { return b.Stats().Memory[Data] > 0 })
	for range 20 {
		if n := b.Stats().Memory[Data]; n > minMemory/8+1<<20 {
			t.Errorf("%d bytes are held for one connection", n)
		}
		time.Sleep(time.Millisecond)
	}
	check()
	var left Stats
	defer func() {
		if t.Failed() {
			t.Logf("in the end: %+v", left)
		}
	}()
	eventually(t, "it stays connected", func() bool { left = b.Stats(); return left.Incoming == 1 && left.Memory[Data] == 0 })
	check()
}

// A server that breaks the rules: calls fail once, nothing crashes.
func TestHostileServer(t *testing.T) {
	for _, x := range []struct {
		what  string
		reply func(s *wire, h header) []byte
	}{
		{"garbage", func(s *wire, h header) []byte { return pattern(100, 9) }},
		{"reply to nothing", func(s *wire, h header) []byte { return s.frame(header{typ: frameReply, id: h.id + 1}, nil) }},
		{"wild slot", func(s *wire, h header) []byte { return s.frame(header{typ: frameReply, id: h.id | 0xffff}, nil) }},
		{"more than wanted", func(s *wire, h header) []byte {
			return s.frame(header{typ: frameReply, id: h.id, data: 101}, make([]byte, 101))
		}},
		{"reply twice", func(s *wire, h header) []byte {
			return bytes.Repeat(s.frame(header{typ: frameReply, id: h.id}, nil), 2)
		}},
		{"request", func(s *wire, h header) []byte { return s.frame(header{typ: frameRequest}, nil) }},
		{"cut reply", func(s *wire, h header) []byte {
			return s.frame(header{typ: frameReply, id: h.id, data: 100}, make([]byte, 99))
		}},
	} {
		w := network(t)
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		w.at["b"] = l.Addr().String()
		go func() {
			for {
				nc, err := l.Accept()
				if err != nil {
					return
				}
				_, seed, err := receive(nc, Identity{Cluster: testCluster, Name: "b"}, "", func(*hello) *RefusedError { return nil })
				s := &wire{Conn: nc, seed: seed}
				for err == nil {
					var b [headerSize]byte
					if _, err = io.ReadFull(nc, b[:]); err != nil {
						break
					}
					var h header
					if h, err = decodeHeader(b[:], seed); err == nil && h.typ == frameRequest {
						nc.Write(x.reply(s, h))
						break
					}
				}
				nc.Close()
			}
		}()
		a := w.start("a", insecure)
		var done atomic.Int64
		var all sync.WaitGroup
		for range 3 {
			all.Add(1)
			a.Peer("b").Submit(&Call{Op: opEcho, Want: 100, Done: func(c *Call) {
				done.Add(1)
				if c.Err != nil && !errors.Is(c.Err, ErrDisconnected) {
					t.Errorf("%s: %v", x.what, c.Err)
				}
				all.Done()
			}})
		}
		a.Peer("b").Kick()
		all.Wait()
		l.Close()
		a.Close()
		if done.Load() != 3 {
			t.Errorf("%s: %d calls are done", x.what, done.Load())
		}
	}
}

// cable is a relay between two nodes that can be cut in either direction without
// anybody being told.
type cable struct {
	addr string
	cut  [2]atomic.Bool
}

func lay(t *testing.T, to string) *cable {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	c := &cable{addr: l.Addr().String()}
	go func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", to)
			if err != nil {
				in.Close()
				continue
			}
			t.Cleanup(func() { in.Close(); out.Close() })
			for i, way := range [2][2]net.Conn{{in, out}, {out, in}} {
				go func() {
					b := make([]byte, 64<<10)
					for {
						n, err := way[0].Read(b)
						for c.cut[i].Load() {
							time.Sleep(10 * time.Millisecond)
						}
						if err != nil {
							way[1].Close()
							return
						}
						way[1].Write(b[:n])
					}
				}()
			}
		}
	}()
	return c
}

// A cable that is cut, one way or both, is noticed within two seconds with the defaults,
// on both sides; idle or at work.
func TestCutCable(t *testing.T) {
	for _, ways := range [][2]bool{{true, true}, {true, false}, {false, true}} {
		for _, busy := range []bool{false, true} {
			t.Run(fmt.Sprintf("%v, busy %v", ways, busy), func(t *testing.T) {
				t.Parallel()
				w := network(t)
				b := w.start("b", nil)
				c := lay(t, b.addr)
				w.mu.Lock()
				w.at["b"] = c.addr
				w.mu.Unlock()
				a := w.start("a", nil)
				if c := a.do("b", &Call{Op: opEcho}); c.Err != nil {
					t.Fatal(c.Err)
				}
				for i, cut := range ways {
					c.cut[i].Store(cut)
				}
				start, late := time.Now(), lateness(t)
				lost := make(chan struct{})
				go func() {
					for e := range a.events {
						if !e.Up {
							close(lost)
							return
						}
					}
				}()
				if busy {
					call := &Call{Op: opEcho, Data: make([]byte, 1<<20), Want: 1 << 20}
					if a.do("b", call); !errors.Is(call.Err, ErrDisconnected) {
						t.Errorf("%v", call.Err)
					}
				}
				<-lost
				if d, late := time.Since(start), late(); d > 2*time.Second+300*time.Millisecond+4*late || !busy && d < time.Second-4*late {
					t.Errorf("noticed after %v", d)
				}
				eventually(t, "the other side does not notice", func() bool {
					b.mu.Lock()
					defer b.mu.Unlock()
					return len(b.conns) == 0 // a tries to come back: handshakes do not count
				})
				if d := time.Since(start); d > 2*time.Second+500*time.Millisecond+4*late() {
					t.Errorf("the other side noticed after %v", d)
				}
			})
		}
	}
}
