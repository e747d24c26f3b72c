package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"sheepdog/frontends/internal/listen"
	"sheepdog/frontends/nbd/internal/wire"
	"sheepdog/vdi"
)

// undisturbed runs a session that works while a test does its worst.
func (h *harness) undisturbed(export string) (check func()) {
	c := h.open(export, wire.Structured)
	p := random(8192)
	check = func() {
		h.t.Helper()
		c.conn.SetDeadline(time.Now().Add(testTimeout))
		c.expect(0, wire.NBD_CMD_WRITE, 0, 0, 8192, p)
		if !bytes.Equal(c.readData(0, 0, 8192), p) {
			h.t.Error("the other session reads something else")
		}
	}
	check()
	return check
}

func TestHostileHandshakes(t *testing.T) {
	h := serve(t, newStore(map[string]int64{"vm1": mib}), nil)
	check := h.undisturbed("vm1")
	long := func(option, length uint32) []byte {
		b := optionMessage(option, nil)
		binary.BigEndian.PutUint32(b[12:], length)
		return b
	}
	magic := optionMessage(wire.NBD_OPT_LIST, nil)
	magic[3]++
	for _, x := range []struct {
		what string
		send []byte
	}{
		{"bad magic", magic},
		{"export name of 4 GiB", long(wire.NBD_OPT_EXPORT_NAME, 1<<32-1)},
		{"GO of 4 GiB", long(wire.NBD_OPT_GO, 1<<32-1)},
		{"unknown option of 4 GiB", long(777, 1<<32-1)},
		{"HTTP", []byte("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")},
	} {
		c := h.connect()
		c.write(x.send)
		c.expectClosed()
		check()
	}
	// Half of an option, and gone.
	for n := range 20 {
		c := h.connect()
		c.write(optionMessage(wire.NBD_OPT_GO, infoData("vm1"))[:n])
		c.conn.Close()
	}
	h.eventually("connections stay", func() bool { return h.Counters().Connections == 1 })
	check()
}

func TestManyOptionsEnd(t *testing.T) {
	h := serve(t, newStore(nil), nil)
	c := h.connect()
	go func() {
		for range maxOptions + 10 {
			if _, err := c.conn.Write(optionMessage(999, nil)); err != nil {
				return
			}
		}
	}()
	n, err := io.Copy(io.Discard, c.conn)
	if n == 0 || err != nil && !bytes.Contains([]byte(err.Error()), []byte("reset")) {
		t.Errorf("%d bytes, %v", n, err)
	}
}

// A session that dies in the middle of a write leaves nothing behind.
func TestDeathInMidWrite(t *testing.T) {
	for _, n := range []int{4096, 64 << 10, mib, 8 * mib} {
		st := newStore(map[string]int64{"vm1": 16 * mib})
		h := serve(t, st, nil)
		c := h.open("vm1", wire.Structured)
		msg := requestMessage(c.headers, wire.Request{Type: wire.NBD_CMD_WRITE, Length: uint64(n)}, random(n))
		c.write(msg[:len(msg)-1])
		c.conn.Close()
		h.eventually("session stays", func() bool { return h.Counters().Connections == 0 })
		if len(st.disk("vm1").submitted()) != 0 {
			t.Errorf("%d bytes: half a write reached the volume", n)
		}
		if c := h.Counters(); c.BufferBytes != 0 || c.InFlight != 0 {
			t.Errorf("%d bytes: left behind: %+v", n, c)
		}
	}
}

// Death while requests are in flight: they complete, and then all is given back.
func TestDeathWithRequestsInFlight(t *testing.T) {
	st := newStore(map[string]int64{"vm1": 16 * mib})
	d := st.disk("vm1")
	h := serve(t, st, nil)
	c := h.open("vm1", wire.Structured)
	hold := make(chan struct{})
	d.set(func() { d.hold = hold })
	for range 10 {
		c.send(wire.NBD_CMD_READ, 0, 0, mib, nil)
		c.send(wire.NBD_CMD_WRITE, 0, 0, 4096, random(4096))
	}
	h.eventually("requests do not arrive", func() bool { return h.Counters().InFlight == 20 })
	c.conn.Close()
	if h.store.opens.Load() != 1 {
		t.Error("volume was closed under its requests")
	}
	close(hold)
	h.eventually("session stays", func() bool { return h.Counters().Connections == 0 })
	if c := h.Counters(); c.BufferBytes != 0 {
		t.Errorf("%d bytes are left", c.BufferBytes)
	}
}

// A client that sends requests and never reads is stopped by its own bounds; the
// bounds hold; nobody else notices.
func TestSlowReader(t *testing.T) {
	for _, x := range []struct {
		what   string
		typ    uint16
		n      uint64
		expect func(c Counters) bool
	}{
		{"long reads", wire.NBD_CMD_READ, mib, nil},
		{"short reads", wire.NBD_CMD_READ, 4096, nil},
		{"refused", 99, 4096, nil},
		{"flushes", wire.NBD_CMD_FLUSH, 0, nil},
	} {
		t.Run(x.what, func(t *testing.T) {
			st := newStore(map[string]int64{"vm1": 2 * mib, "other": mib})
			copy(st.disk("vm1").data, random(2*mib))
			h := serve(t, st, func(c *Config) { c.SessionMemory = 2 * MaxPayload; c.LingerTimeout = 10 * time.Millisecond })
			check := h.undisturbed("other")
			c := h.open("vm1", wire.Structured)
			c.conn.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
			msg := bytes.Repeat(requestMessage(c.headers, wire.Request{Type: x.typ, Length: x.n}, nil), 1000)
			sent := 0
			for sent < 64<<20 {
				n, err := c.conn.Write(msg)
				sent += n
				if err != nil {
					break
				}
			}
			if sent >= 64<<20 {
				t.Error("the server reads on and on")
			}
			s := h.Sessions()[1]
			if s.BufferBytes > 2*MaxPayload || s.InFlight > 1024 {
				t.Errorf("bounds do not hold: %+v", s)
			}
			check()
			c.conn.Close()
			h.eventually("session stays", func() bool { return len(h.Sessions()) == 1 })
			check()
		})
	}
}

// When stalled clients hold all memory and another needs some, they are ended, and
// short requests go on all the time.
func TestStalledClientsAreEvicted(t *testing.T) {
	st := newStore(map[string]int64{"vm1": MaxPayload, "other": MaxPayload})
	copy(st.disk("vm1").data, random(MaxPayload))
	h := serve(t, st, func(c *Config) {
		c.MemoryLimit, c.SessionMemory = 8*MaxPayload, 2*MaxPayload
		c.StallTimeout = 200 * time.Millisecond
		c.LingerTimeout = 10 * time.Millisecond
	})
	check := h.undisturbed("other")
	for range 3 { // readers: each holds two payloads
		c := h.open("vm1", wire.Structured)
		for range 3 {
			c.send(wire.NBD_CMD_READ, 0, 0, MaxPayload, nil)
		}
	}
	h.eventually("memory is not taken", func() bool { return h.Counters().BufferBytes >= 6*MaxPayload })
	check()
	c := h.open("other", wire.Structured)
	c.expect(0, wire.NBD_CMD_WRITE, 0, 0, MaxPayload, make([]byte, MaxPayload))
	if n := h.Counters().Evicted; n == 0 {
		t.Error("nobody was evicted")
	}
	if got := h.Counters().BufferBytes; got > 8*MaxPayload {
		t.Errorf("%d bytes in use", got)
	}
	check()
	c.disconnect()
}

// The same for clients that announce payloads and do not send them.
func TestUnfinishedWritesAreEvicted(t *testing.T) {
	st := newStore(map[string]int64{"vm1": MaxPayload})
	h := serve(t, st, func(c *Config) {
		c.MemoryLimit, c.SessionMemory, c.StallTimeout = 8*MaxPayload, 2*MaxPayload, 200*time.Millisecond
	})
	check := h.undisturbed("vm1")
	for range 6 {
		h.open("vm1", wire.Structured).send(wire.NBD_CMD_WRITE, 0, 0, MaxPayload, make([]byte, 10))
	}
	h.eventually("memory is not taken", func() bool { return h.Counters().BufferBytes >= 6*MaxPayload })
	check()
	c := h.open("vm1", wire.Structured)
	c.expect(0, wire.NBD_CMD_WRITE, 0, 0, MaxPayload, make([]byte, MaxPayload))
	c.disconnect()
	check()
}

func TestIdleConnections(t *testing.T) {
	st := newStore(map[string]int64{"vm1": mib})
	h := serve(t, st, nil)
	check := h.undisturbed("vm1")
	var before, after runtime.MemStats
	runtime.GC()
	runtime.GC() // pools are emptied by the second
	runtime.ReadMemStats(&before)
	const count = 1000
	for i := range count {
		c := h.connect()
		if i%2 == 0 {
			c.negotiate(wire.Structured)
			c.goExport("vm1")
			c.readData(0, 0, 4096)
		}
	}
	h.eventually("not all are served", func() bool { return h.Counters().Sessions == count/2+1 })
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&after)
	each := (int64(after.HeapInuse+after.StackInuse) - int64(before.HeapInuse+before.StackInuse)) / count
	t.Logf("%d bytes per idle connection, the client's side included", each)
	if each > 48<<10 {
		t.Errorf("%d bytes per idle connection", each)
	}
	if n := h.Counters().BufferBytes; n != 0 {
		t.Errorf("idle sessions hold %d bytes of buffers", n)
	}
	check()
}

func TestConnectDisconnect(t *testing.T) {
	count := 100_000
	if testing.Short() || raceEnabled {
		count = 2_000
	}
	st := newStore(map[string]int64{"vm1": mib})
	h := serve(t, st, nil)
	check := h.undisturbed("vm1")
	var clients sync.WaitGroup
	for k := range 4 {
		clients.Go(func() {
			for i := range count / 4 {
				conn, err := net.Dial("unix", h.addr.String())
				for errors.Is(err, syscall.EAGAIN) { // the backlog is full
					runtime.Gosched()
					conn, err = net.Dial("unix", h.addr.String())
				}
				if err != nil {
					t.Error(err)
					return
				}
				switch (i + k) % 4 {
				case 1:
					conn.Write([]byte{0, 0, 0, 1})
				case 2:
					conn.Write(append([]byte{0, 0, 0, 1}, optionMessage(wire.NBD_OPT_GO, infoData("vm1"))...))
				case 3:
					conn.Write(append([]byte{0, 0, 0, 3}, optionMessage(wire.NBD_OPT_EXPORT_NAME, []byte("vm1"))...))
				}
				conn.Close()
			}
		})
	}
	clients.Wait()
	h.eventually("connections stay", func() bool { return h.Counters().Connections == 1 })
	check()
}

func TestConnectionLimit(t *testing.T) {
	h := serve(t, newStore(map[string]int64{"vm1": mib}), func(c *Config) { c.MaxConnections = 2 })
	a, b := h.open("vm1", wire.Simple), h.connect()
	h.dial().expectClosed()
	if c := h.Counters(); c.TooMany != 1 || c.Connections != 2 {
		t.Errorf("counters: %+v", c)
	}
	b.conn.Close()
	h.eventually("connection stays", func() bool { return h.Counters().Connections == 1 })
	h.open("vm1", wire.Simple).disconnect()
	a.disconnect()
}

func TestAllowList(t *testing.T) {
	s, err := New(Config{Volumes: newStore(map[string]int64{"vm1": mib}), Limits: listen.Limits{Allow: []netip.Prefix{netip.MustParsePrefix("127.0.0.2/32"), netip.MustParsePrefix("10.0.0.0/8")}}})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var served sync.WaitGroup
	served.Go(func() { s.Serve(context.Background(), l) })
	defer func() {
		s.Shutdown(context.Background())
		served.Wait()
	}()
	for _, x := range []struct {
		from    string
		allowed bool
	}{{"127.0.0.1", false}, {"127.0.0.2", true}, {"127.0.0.3", false}} {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(x.from)}}
		conn, err := d.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		c := newClient(t, conn)
		if !x.allowed {
			c.expectClosed()
			continue
		}
		c.greet(wire.NBD_FLAG_C_FIXED_NEWSTYLE)
		c.goExport("vm1")
		c.disconnect()
	}
	if n := s.Counters().NotAllowed; n != 2 {
		t.Errorf("%d refused, want 2", n)
	}
}

func TestConfig(t *testing.T) {
	st := newStore(nil)
	for _, c := range []Config{
		{}, {Volumes: st, TLSRequired: true}, {Volumes: st, Limits: listen.Limits{MaxConnections: -1}}, {Volumes: st, Limits: listen.Limits{MemoryLimit: 1}}, {Volumes: st, Limits: listen.Limits{SessionMemory: 1}}, {Volumes: st, SessionRequests: -1},
	} {
		if _, err := New(c); err == nil {
			t.Errorf("accepted: %+v", c)
		}
	}
}

// All reads together never hold more than the limits, and the arena's chunks are
// given back however requests complete.
func TestMemoryBound(t *testing.T) {
	st := newStore(map[string]int64{"vm1": MaxPayload})
	copy(st.disk("vm1").data, random(MaxPayload))
	d := st.disk("vm1")
	d.delay = func(r *vdi.Request) { time.Sleep(time.Duration(r.Off%300) * time.Microsecond) }
	const limit = 8 * MaxPayload
	h := serve(t, st, func(c *Config) { c.MemoryLimit, c.SessionMemory = limit, 2*MaxPayload })
	var clients sync.WaitGroup
	for k := range 8 {
		c := h.open("vm1", allHeaders[k%3])
		clients.Go(func() {
			sizes, rounds := []int{512, 4096, 60_000, 200_000, mib, 4 * mib}, 60
			if k == 0 {
				sizes, rounds = []int{MaxPayload}, 8
			}
			for i := range rounds {
				n := sizes[i%len(sizes)]
				off := uint64((i * 7919) % (MaxPayload - n + 1))
				if !bytes.Equal(c.readData(0, off, n), d.data[off:off+uint64(n)]) {
					t.Error("read differs")
				}
				if used := h.Counters().BufferBytes; used > limit {
					t.Errorf("%d bytes in use", used)
				}
			}
			c.disconnect()
		})
	}
	clients.Wait()
}
