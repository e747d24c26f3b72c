package sheepdog

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"sheepdog/frontends/internal/listen/listentest"
	"sheepdog/frontends/sheepdog/internal/wire"
	"sheepdog/storage/object"
	"sheepdog/vdi"
)

// stubborn volumes do with requests what a test wants.
type stubborn struct {
	volumes
	mu     sync.Mutex
	submit func(*vdi.Request) bool // takes a request, if it wants
}

func (s *stubborn) set(submit func(*vdi.Request) bool) {
	s.mu.Lock()
	s.submit = submit
	s.mu.Unlock()
}

func (s *stubborn) OpenVID(vid object.VID, client string, quiet bool) (Volume, error) {
	v, err := s.volumes.OpenVID(vid, client, quiet)
	return &stubbornVolume{v, s}, err
}

type stubbornVolume struct {
	Volume
	s *stubborn
}

func (v *stubbornVolume) Submit(r *vdi.Request) {
	v.s.mu.Lock()
	submit := v.s.submit
	v.s.mu.Unlock()
	if submit == nil || !submit(r) {
		v.Volume.Submit(r)
	}
}

// serveStubborn serves volumes that a test interferes with, and hears of the ends of sessions.
func serveStubborn(t *testing.T, change func(*Config)) (*harness, *stubborn, *listentest.Ends) {
	s, ends := new(stubborn), new(listentest.Ends)
	h := serve(t, func(c *Config) {
		s.volumes = c.Volumes.(volumes)
		c.Volumes, c.Logger = s, ends.Logger()
		if change != nil {
			change(c)
		}
	})
	return h, s, ends
}

func (h *harness) write(v vdi.Info, n int) []byte {
	return message(h.t, []string{"op=1", "flags=5", "id=7", fmt.Sprintf("oid=%d", uint64(v.VID)<<32), fmt.Sprintf("fill=7*%d", n)})
}

func (h *harness) inFlight(n int64) {
	h.t.Helper()
	for until := time.Now().Add(time.Minute); h.server.Counters().InFlight != n; time.Sleep(time.Millisecond) {
		if time.Now().After(until) {
			h.t.Fatalf("%d requests in flight instead of %d", h.server.Counters().InFlight, n)
		}
	}
}

// However a session ends, it is told once, with the reason, and as loudly as it deserves.
func TestEndsOfSessions(t *testing.T) {
	const short = "INFO connection ended within a request: unexpected EOF"
	for _, x := range []struct {
		what string
		do   func(h *harness, v vdi.Info, conn net.Conn)
		want string
	}{
		{"left", func(h *harness, v vdi.Info, conn net.Conn) { exchange(h.t, conn, h.write(v, 512)) }, "DEBUG client disconnected"},
		{"said nothing", func(*harness, vdi.Info, net.Conn) {}, "DEBUG client disconnected"},
		{"left within a header", func(h *harness, v vdi.Info, conn net.Conn) { conn.Write(h.write(v, 512)[:40]) }, short},
		{"left within a payload", func(h *harness, v vdi.Info, conn net.Conn) { conn.Write(h.write(v, 512)[:400]) }, short},
		{"left within a long payload", func(h *harness, v vdi.Info, conn net.Conn) { conn.Write(h.write(v, 1<<20)[:1<<19]) }, short},
		{"left within nonsense", func(h *harness, _ vdi.Info, conn net.Conn) {
			conn.Write(message(h.t, []string{"op=0x99", "flags=1", "fill=7*100000"})[:50000])
		}, short},
		{"was reset", func(h *harness, v vdi.Info, conn net.Conn) {
			exchange(h.t, conn, h.write(v, 512))
			conn.(*net.TCPConn).SetLinger(0)
		}, "INFO connection reset by peer"},
		{"server stops", func(h *harness, v vdi.Info, conn net.Conn) {
			exchange(h.t, conn, h.write(v, 512))
			if err := h.server.Shutdown(context.Background()); err != nil {
				h.t.Error(err)
			}
		}, "DEBUG server is shutting down"},
	} {
		t.Run(x.what, func(t *testing.T) {
			h, _, ends := serveStubborn(t, nil)
			conn := h.dial()
			x.do(h, h.create("vm", 16<<20), conn)
			conn.Close()
			if got := ends.Await(t, 1); !slices.Equal(got, []string{x.want}) {
				t.Errorf("it is told: %q, not %q", got, x.want)
			}
		})
	}
}

// A server that stops waits for what is under way only so long.
func TestOverdueRequestsAreTold(t *testing.T) {
	h, s, ends := serveStubborn(t, nil)
	v := h.create("vm", 16<<20)
	conn := h.dial()
	held := make(chan *vdi.Request, 1)
	s.set(func(r *vdi.Request) bool { held <- r; return true })
	conn.Write(h.write(v, 512))
	r := <-held
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	over := make(chan error, 1)
	go func() { over <- h.server.Shutdown(ctx) }()
	if _, err := conn.Read(make([]byte, 1)); err == nil {
		t.Error("an answer came from nowhere")
	}
	r.Done(r)
	if err := <-over; err == nil {
		t.Error("the server has stopped in time")
	}
	if got := ends.Await(t, 1); !slices.Equal(got, []string{"INFO server is shutting down, and what was in flight took too long"}) {
		t.Errorf("it is told: %q", got)
	}
}

// A session that keeps memory from others is ended once, and told once, as a warning.
func TestStalledSessionIsTold(t *testing.T) {
	h, _, ends := serveStubborn(t, func(c *Config) {
		c.MemoryLimit, c.SessionMemory, c.StallTimeout = 8*MaxPayload, 2*MaxPayload, 200*time.Millisecond
	})
	v := h.create("vm", 64<<20)
	var stalled []net.Conn
	for range 6 { // each announces a payload that it does not send
		conn := h.dial()
		header := h.write(v, 0)
		binary.LittleEndian.PutUint32(header[12:], MaxPayload)
		conn.Write(append(header, 1))
		stalled = append(stalled, conn)
	}
	for until := time.Now().Add(time.Minute); h.server.Counters().BufferBytes < 6*MaxPayload; time.Sleep(time.Millisecond) {
		if time.Now().After(until) {
			t.Fatal("memory is not taken")
		}
	}
	conn := h.dial()
	header, _ := exchange(t, conn, message(t, []string{"op=2", fmt.Sprintf("oid=%d", uint64(v.VID)<<32), fmt.Sprintf("want=%d", MaxPayload)}))
	if result(header) != 5 { // longer than the object; but it had to wait for the memory
		t.Errorf("result %#x", result(header))
	}
	conn.Close()
	for _, c := range stalled {
		c.Close()
	}
	warned := 0
	for _, line := range ends.Await(t, 7) {
		if strings.HasPrefix(line, "WARN client does not read its replies, or finish a payload, while others wait for memory: it holds ") {
			warned++
		}
	}
	if evicted := h.server.Counters().Evicted; warned == 0 || uint64(warned) != evicted {
		t.Errorf("%d sessions were evicted, %d told: %q", evicted, warned, ends.All())
	}
}

// Sessions come and go while the VDI that they use is followed by others, grows, is dropped and opened anew: each request is
// answered, if only with the news that its vid is a snapshot by then, or gone, and no connection is lost.
func TestSessionsOutliveWhatVolumesGoThrough(t *testing.T) {
	h, _, ends := serveStubborn(t, nil)
	h.create("vm", 16<<20)
	const clients, times = 4, 25
	done := make(chan struct{})
	var changes, work sync.WaitGroup
	changes.Go(func() {
		for n := 1; ; n++ {
			select {
			case <-done:
				return
			default:
			}
			if _, err := h.volumes.Snapshot(t.Context(), "vm", fmt.Sprint("s", n)); err != nil {
				t.Errorf("snapshot: %v", err)
				return
			}
			if _, err := h.volumes.Resize(t.Context(), "vm", int64(16+n)<<20); err != nil {
				t.Errorf("resize: %v", err)
				return
			}
			if err := h.volumes.Delete(t.Context(), "vm", fmt.Sprint("s", n)); err != nil && !errors.Is(err, vdi.ErrBusy) {
				t.Errorf("delete: %v", err)
				return
			}
		}
	})
	for range clients {
		work.Go(func() {
			for range times {
				conn, err := net.Dial("tcp", h.address)
				if err != nil {
					t.Error(err)
					return
				}
				conn.SetDeadline(time.Now().Add(time.Minute))
				answer := func(words ...string) (header []byte) {
					conn.Write(message(t, words))
					header = make([]byte, 48)
					if _, err := io.ReadFull(conn, header); err != nil {
						t.Errorf("%q is not answered: %v", words, err)
						return header
					}
					if _, err := io.CopyN(io.Discard, conn, int64(binary.LittleEndian.Uint32(header[12:]))); err != nil {
						t.Error(err)
					}
					return header
				}
				vid := uint64(binary.LittleEndian.Uint32(answer("op=0x14", "flags=1", "name=vm", "tag=")[24:]))
				oid := fmt.Sprintf("oid=%d", vid<<32)
				for _, request := range [][]string{{"op=1", "flags=5", oid, "fill=7*512"}, {"op=2", oid, "want=512"}, {"op=0x16", fmt.Sprintf("oid=%d", 1<<63|vid<<32)}} {
					if r := result(answer(request...)); ours(wire.Result(r)) {
						t.Errorf("%q: result %#x", request, r)
					}
				}
				conn.Close()
			}
		})
	}
	work.Wait()
	close(done)
	changes.Wait()
	for _, end := range ends.Await(t, clients*times) {
		if end != "DEBUG client disconnected" {
			t.Error(end)
		}
	}
}

// What is closed while the server goes on is answered: the connection is there for others.
func TestClosedIsAnswered(t *testing.T) {
	h, s, ends := serveStubborn(t, nil)
	v := h.create("vm", 16<<20)
	conn := h.dial()
	s.set(func(r *vdi.Request) bool {
		r.Err = fmt.Errorf("a volume that is none any more: %w", vdi.ErrClosed)
		r.Done(r)
		return true
	})
	if header, _ := exchange(t, conn, h.write(v, 512)); result(header) != 0x11 {
		t.Errorf("result %#x", result(header))
	}
	s.set(nil)
	if header, _ := exchange(t, conn, h.write(v, 512)); result(header) != 0 {
		t.Errorf("then: result %#x", result(header))
	}
	if got := ends.All(); len(got) > 0 {
		t.Errorf("a session has ended: %q", got)
	}
}

// A server that stops answers what it has carried out, though other requests of the session fail for
// that reason: those it does not answer.
func TestClosedIsNotAnsweredByWhoStops(t *testing.T) {
	h, s, ends := serveStubborn(t, nil)
	v := h.create("vm", 16<<20)
	conn := h.dial()
	held := make(chan *vdi.Request, 2)
	s.set(func(r *vdi.Request) bool { held <- r; return true })
	first, second := h.write(v, 512), h.write(v, 512)
	binary.LittleEndian.PutUint32(second[8:], 8)
	conn.Write(append(first, second...))
	lost, done := <-held, <-held
	over := make(chan error, 1)
	go func() { over <- h.server.Shutdown(context.Background()) }()
	<-h.server.clients.Context().Done()
	h.inFlight(2)
	h.server.clients.Each(func(c *session) { <-c.stream.Stopped() })
	lost.Err = vdi.ErrClosed
	lost.Done(lost)
	done.Done(done)
	answers, err := io.ReadAll(conn)
	if err != nil {
		t.Error(err)
	}
	if err := <-over; err != nil {
		t.Error(err)
	}
	if len(answers) != 48 || binary.LittleEndian.Uint32(answers[8:]) != 8 || result(answers) != 0 {
		t.Errorf("the answers: %x", answers)
	}
	if got := ends.Await(t, 1); !slices.Equal(got, []string{"DEBUG server is shutting down"}) {
		t.Errorf("it is told: %q", got)
	}
}
