package integration

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"strconv"
	"sync"
	"testing"
	"time"

	"sheepdog/integration/client"
	"sheepdog/integration/rig"
)

// Whatever a stranger sends, he gets the protocol's error or a closed connection; memory stays bounded
// and a session beside him goes on undisturbed.
func TestHostileClients(t *testing.T) {
	s := rig.Start(t, rig.Options{})
	s.Dog("vdi", "create", "vm1", "64M")
	stop, victim := undisturbed(t, s)
	before := s.RSS()

	greet := func(t *testing.T) net.Conn {
		conn := dialRaw(t, s)
		if err := client.Greet(conn); err != nil {
			t.Fatal(err)
		}
		return conn
	}
	t.Run("bad option magic", func(t *testing.T) {
		conn := greet(t)
		conn.Write(bytes.Repeat([]byte("x"), 64))
		closes(t, conn)
	})
	t.Run("unknown client flags", func(t *testing.T) {
		conn := dialRaw(t, s)
		io.ReadFull(conn, make([]byte, 18))
		conn.Write([]byte{0xff, 0xff, 0xff, 0xff})
		closes(t, conn)
	})
	t.Run("option of 4 GiB", func(t *testing.T) {
		for _, option := range []uint32{client.OptExportName, client.OptGo, client.OptInfo, client.OptList, 9, 10, 0x7777} {
			conn := greet(t)
			h := client.Option(option, nil)
			binary.BigEndian.PutUint32(h[12:], 0xffffffff)
			conn.Write(h)
			conn.Write(make([]byte, 4096))
			refusesOrCloses(t, conn)
		}
	})
	t.Run("export name longer than its option", func(t *testing.T) {
		conn := greet(t)
		p := client.GoPayload("vm1")
		binary.BigEndian.PutUint32(p, 0xfffffff0)
		conn.Write(client.Option(client.OptGo, p))
		refusesOrCloses(t, conn)
	})
	t.Run("more information requests than there are", func(t *testing.T) {
		conn := greet(t)
		p := client.GoPayload("vm1")
		binary.BigEndian.PutUint16(p[len(p)-2:], 0xffff)
		conn.Write(client.Option(client.OptGo, p))
		refusesOrCloses(t, conn)
	})
	t.Run("truncated option", func(t *testing.T) {
		conn := greet(t)
		conn.Write(client.Option(client.OptGo, client.GoPayload("vm1"))[:19])
		conn.Close()
	})
	t.Run("unknown option", func(t *testing.T) {
		conn := greet(t)
		conn.Write(client.Option(0x12345, []byte("abc")))
		if _, kind, _, err := client.OptionReply(conn); err != nil || kind != client.RepErrUnsup {
			t.Errorf("reply %#x, %v; want NBD_REP_ERR_UNSUP", kind, err)
		}
		conn.Write(client.Option(client.OptGo, client.GoPayload("nosuch")))
		if _, kind, _, err := client.OptionReply(conn); err != nil || kind != client.RepErrUnknow {
			t.Errorf("reply %#x, %v; want NBD_REP_ERR_UNKNOWN", kind, err)
		}
		conn.Write(client.Option(client.OptAbort, nil))
		closes(t, conn)
	})
	t.Run("options without end", func(t *testing.T) {
		conn := greet(t)
		go func() {
			list := bytes.Repeat(client.Option(client.OptList, nil), 1000)
			for {
				if _, err := conn.Write(list); err != nil {
					return
				}
			}
		}()
		closes(t, conn) // nobody needs thousands of options
	})
	t.Run("random bytes", func(t *testing.T) {
		rnd := rand.New(rand.NewPCG(1, 2))
		for range 200 {
			conn := greet(t)
			conn.Write(client.Option(uint32(rnd.IntN(12)), rig.Random(rnd.Uint64(), rnd.IntN(300))))
			conn.Write(rig.Random(rnd.Uint64(), rnd.IntN(2000)))
			conn.Close()
		}
	})
	t.Run("bad request magic", func(t *testing.T) {
		conn := transmission(t, s)
		conn.Write(rig.Random(3, 28))
		closes(t, conn)
	})
	t.Run("unknown command and flags", func(t *testing.T) {
		conn := transmission(t, s)
		for _, r := range [][]byte{
			client.Request(77, 0, 1, 0, 0),
			client.Request(client.CmdRead, 0x8000, 2, 0, 4096),
			client.Request(client.CmdRead, 0, 3, 64<<20, 1),
			client.Request(client.CmdRead, 0, 4, 1<<63, 0xffffffff),
			client.Request(client.CmdTrim, 0, 5, 1<<63+1<<62, 0xffffffff),
			client.Request(client.CmdRead, 0, 6, 0, 0xffffffff), // far over the largest request
		} {
			conn.Write(r)
			var reply [16]byte
			if _, err := io.ReadFull(conn, reply[:]); err != nil {
				t.Fatal(err)
			}
			if e := client.Errno(binary.BigEndian.Uint32(reply[4:])); e == 0 {
				t.Errorf("request %x was answered with success", r)
			}
		}
	})
	t.Run("write of 4 GiB", func(t *testing.T) {
		conn := transmission(t, s)
		conn.Write(client.Request(client.CmdWrite, 0, 1, 0, 0xffffffff))
		go io.Copy(conn, io.LimitReader(zeros{}, 256<<20))
		refusesOrCloses(t, conn)
	})
	t.Run("slow readers", func(t *testing.T) {
		// 64 clients ask for 64 times 1 MiB each and read nothing: 4 GiB if nobody counted.
		for range 64 {
			conn := transmission(t, s)
			conn.SetWriteDeadline(time.Now().Add(2 * time.Second))
			for i := range 64 {
				if _, err := conn.Write(client.Request(client.CmdRead, 0, uint64(i), uint64(i)<<20, 1<<20)); err != nil {
					break // not read any more: that is one way to bound it
				}
			}
		}
		victim(100)
		if grown := s.RSS() - before; grown > 512<<20 {
			t.Errorf("memory grew by %d MiB for slow readers", grown>>20)
		}
	})
	stop()
	if grown := s.RSS() - before; grown > 600<<20 {
		t.Errorf("memory grew by %d MiB", grown>>20)
	}
	noPanic(t, s)
}

// TestConnects: connections come and go, and a thousand stay idle; others are not disturbed and nothing leaks.
func TestConnects(t *testing.T) {
	s := rig.Start(t, rig.Options{})
	s.Dog("vdi", "create", "vm1", "64M")
	connects := 20_000 // and 100 000 in `make soak`
	if soaking() {
		connects = 100_000
	}
	idle := make([]*client.Conn, 0, 1000)
	for range cap(idle) {
		c, err := client.Dial("tcp", s.NBD(), "vm1")
		if err != nil {
			t.Fatalf("connection %d: %v", len(idle), err)
		}
		defer c.Close()
		idle = append(idle, c)
	}
	rss := s.RSS()
	t.Logf("resident with 1000 idle sessions: %d MiB", rss>>20)
	if rss > 512<<20 {
		t.Errorf("1000 idle sessions: %d MiB resident", rss>>20)
	}
	stop, _ := undisturbed(t, s)
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for i := range connects / 4 {
				conn, err := net.Dial("unix", s.Unix)
				if err != nil {
					t.Errorf("worker %d, connect %d: %v", w, i, err)
					return
				}
				if i%2 == 0 {
					client.Greet(conn)
				}
				if i%4 == 0 {
					conn.Write(client.Option(client.OptGo, client.GoPayload("vm1")))
					client.OptionReply(conn)
				}
				conn.Close()
			}
		})
	}
	wg.Wait()
	stop()
	for i, c := range idle {
		if err := c.Read(make([]byte, 512), uint64(i)*512); err != nil {
			t.Fatalf("idle session %d: %v", i, err)
		}
	}
	if grown := s.RSS() - rss; grown > 128<<20 {
		t.Errorf("memory grew by %d MiB over %d connects", grown>>20, connects)
	}
	noPanic(t, s)
}

// A session that dies in the middle of a write leaves nothing of it behind.
func TestSessionDiesMidWrite(t *testing.T) {
	s := rig.Start(t, rig.Options{})
	s.Dog("vdi", "create", "vm1", "64M")
	c := s.Dial("vm1")
	old := rig.Random(1, 1<<20)
	if err := c.Write(old, 0, 0); err != nil {
		t.Fatal(err)
	}
	for _, part := range []int{1, 4095, 4096, 70_000, 1<<20 - 1} {
		conn := transmission(t, s)
		conn.Write(client.Request(client.CmdWrite, 0, 1, 0, 1<<20))
		conn.Write(bytes.Repeat([]byte{0xee}, part))
		conn.Close()
	}
	got := make([]byte, len(old))
	deadline := time.Now().Add(10 * time.Second * patience())
	for sessions(t, s) > 1 && time.Now().Before(deadline) { // the server has noticed
		time.Sleep(10 * time.Millisecond)
	}
	if err := c.Read(got, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, old) {
		t.Error("half a write is on the volume")
	}
}

// sessions counts the sessions that dog shows.
func sessions(t *testing.T, s *rig.Sheep) int {
	t.Helper()
	var list []map[string]any
	s.DogJSON(&list, "session", "list")
	return len(list)
}

// zeros is an endless source of zeros.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func dialRaw(t *testing.T, s *rig.Sheep) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", s.NBD())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(20 * time.Second * patience()))
	return conn
}

// transmission opens vm1 and returns the bare connection behind the handshake.
func transmission(t *testing.T, s *rig.Sheep) net.Conn {
	t.Helper()
	conn := dialRaw(t, s)
	if err := client.Greet(conn); err != nil {
		t.Fatal(err)
	}
	conn.Write(client.Option(client.OptGo, client.GoPayload("vm1")))
	for {
		_, kind, payload, err := client.OptionReply(conn)
		switch {
		case err != nil:
			t.Fatal(err)
		case kind == client.RepAck:
			return conn
		case kind&(1<<31) != 0:
			t.Fatalf("GO: %#x %s", kind, payload)
		}
	}
}

// closes expects the server to end the connection.
func closes(t *testing.T, conn net.Conn) {
	t.Helper()
	_, err := io.Copy(io.Discard, conn)
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		t.Error("the server keeps the connection")
	}
}

// refusesOrCloses expects an error reply to an option or a request, or the connection's end.
func refusesOrCloses(t *testing.T, conn net.Conn) {
	t.Helper()
	var b [20]byte
	n, err := io.ReadFull(conn, b[:16])
	var timeout net.Error
	switch {
	case errors.As(err, &timeout) && timeout.Timeout():
		t.Error("neither an answer nor an end")
	case err != nil:
	case binary.BigEndian.Uint64(b[:]) == client.OptReplyMagic && b[12]&0x80 == 0:
		t.Errorf("answered with %x", b[:n])
	case binary.BigEndian.Uint32(b[:]) == client.SimpleReply && binary.BigEndian.Uint32(b[4:]) == 0:
		t.Errorf("answered with success")
	}
}

// undisturbed runs a session that writes and reads all the time. stop ends it and fails the test if it
// saw an error or a request that took over two seconds (times patience); some waits until so many more requests passed.
func undisturbed(t *testing.T, s *rig.Sheep) (stop func(), some func(n int)) {
	t.Helper()
	c := s.Dial("vm1")
	end, ended, tick := make(chan struct{}), make(chan struct{}), make(chan struct{}, 1<<20)
	go func() {
		defer close(ended)
		p, got := make([]byte, 4096), make([]byte, 4096)
		for i := uint64(0); ; i++ {
			select {
			case <-end:
				return
			default:
			}
			began := time.Now()
			content(p, i, i+1)
			off := (i % 1000) * 4096
			err := c.Write(p, off, 0)
			if err == nil {
				err = c.Read(got, off)
			}
			if err == nil && !bytes.Equal(p, got) {
				err = errors.New("read something else than was written")
			}
			if took := time.Since(began); err != nil || took > 2*time.Second*patience() {
				t.Errorf("the session beside: request %s: %v after %v", strconv.FormatUint(i, 10), err, took)
				return
			}
			select {
			case tick <- struct{}{}:
			default:
			}
			time.Sleep(leisure())
		}
	}()
	some = func(n int) {
		for range n {
			select {
			case <-tick:
			case <-ended:
				return
			}
		}
	}
	return func() { close(end); <-ended }, some
}

func noPanic(t *testing.T, s *rig.Sheep) {
	t.Helper()
	if !s.Running() {
		t.Error("the daemon is gone")
	}
	if bytes.Contains([]byte(s.Log()), []byte("panic")) || bytes.Contains([]byte(s.Log()), []byte("goroutine ")) {
		t.Error("the daemon panicked")
	}
}
