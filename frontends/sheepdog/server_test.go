package sheepdog

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/datadriven"

	"sheepdog/frontends/internal/listen"
	"sheepdog/frontends/sheepdog/internal/wire"
	"sheepdog/storage/object"
	"sheepdog/vdi"
	"sheepdog/vdi/vditest"
)

// volumes is a real service over objects in memory.
type volumes struct{ *vdi.Service }

func (v volumes) OpenVID(vid object.VID, client string, quiet bool) (Volume, error) {
	vol, err := v.Service.OpenVID(vid, client, quiet)
	if err != nil {
		return nil, err
	}
	return vol, nil
}

func (volumes) Defaults() (copies int, sizeShift uint8, err error) {
	return 1, object.DefaultSizeShift, nil
}

func (volumes) UsedElsewhere(context.Context, object.VID) bool { return false }

type harness struct {
	t       testing.TB
	server  *Server
	volumes volumes
	address string
}

func serve(t testing.TB, change func(*Config)) *harness {
	t.Helper()
	return serveKeeping(t, 0, change)
}

// serveKeeping is serve with so many vids in quarantine: see vdi.Config.
func serveKeeping(t testing.TB, vids int, change func(*Config)) *harness {
	t.Helper()
	w := vditest.NewWorld(t)
	w.Config = func(c *vdi.Config) {
		c.Now, c.KeepVIDs = func() time.Time { return time.Unix(0x5f5e1000, 0) }, vids
	}
	h := &harness{t: t, volumes: volumes{w.Start()}}
	h.start(change)
	return h
}

// start has a server that knows nothing of clients, as after a restart, or on another node.
func (h *harness) start(change func(*Config)) {
	t := h.t
	t.Helper()
	cfg := Config{Volumes: h.volumes, Limits: listen.Limits{LingerTimeout: time.Second}}
	if change != nil {
		change(&cfg)
	}
	server, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	h.server = server
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	h.address = l.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- server.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := server.Shutdown(ctx); err != nil {
			t.Errorf("shutdown: %v", err)
		}
		if n := server.Counters().BufferBytes; n != 0 {
			t.Errorf("%d bytes are still in use", n)
		}
		for _, i := range h.list() {
			if len(i.Openers) > 0 {
				t.Errorf("%s is still open by %v", i.Name, i.Openers)
			}
		}
	})
}

func (h *harness) list() []vdi.Info {
	list, err := h.volumes.List(context.Background())
	if err != nil {
		h.t.Fatal(err)
	}
	return list
}

func (h *harness) create(name string, size int64) vdi.Info {
	h.t.Helper()
	i, err := h.volumes.Create(context.Background(), vdi.CreateOptions{Name: name, Size: size, ObjectSizeShift: 20})
	if err != nil {
		h.t.Fatal(err)
	}
	return i
}

func (h *harness) dial() net.Conn {
	h.t.Helper()
	conn, err := net.Dial("tcp", h.address)
	if err != nil {
		h.t.Fatal(err)
	}
	conn.SetDeadline(time.Now().Add(30 * time.Second))
	h.t.Cleanup(func() { conn.Close() })
	return conn
}

var le = binary.LittleEndian

// message makes a request of words as op=3 flags=0x9 oid=…, with a payload of n bytes of a value.
func message(t testing.TB, words []string) []byte {
	b := make([]byte, 48)
	var payload []byte
	for _, w := range words {
		key, text, _ := strings.Cut(w, "=")
		if key == "name" || key == "tag" {
			field := make([]byte, 256)
			copy(field, text)
			payload = append(payload, field...)
			continue
		}
		if key == "hex" {
			p, err := hex.DecodeString(text)
			if err != nil {
				t.Fatal(err)
			}
			payload = append(payload, p...)
			continue
		}
		text, times, _ := strings.Cut(text, "*")
		n, err := strconv.ParseUint(text, 0, 64)
		if err != nil {
			t.Fatal(w, err)
		}
		switch key {
		case "proto":
			b[0] = byte(n)
		case "op":
			b[1] = byte(n)
		case "flags":
			le.PutUint16(b[2:], uint16(n))
		case "id":
			le.PutUint32(b[8:], uint32(n))
		case "want":
			le.PutUint32(b[12:], uint32(n))
		case "oid", "size":
			le.PutUint64(b[16:], n)
		case "cow":
			le.PutUint64(b[24:], n)
		case "base":
			le.PutUint32(b[24:], uint32(n))
		case "shift":
			b[31] = byte(n)
		case "snapid":
			le.PutUint32(b[32:], uint32(n))
		case "type":
			le.PutUint32(b[36:], uint32(n))
		case "offset":
			le.PutUint64(b[40:], n)
		case "fill":
			count, err := strconv.Atoi(times)
			if err != nil {
				t.Fatal(w, err)
			}
			for range count {
				payload = append(payload, byte(n))
			}
		default:
			t.Fatalf("unknown word %q", w)
		}
	}
	if b[2]&1 != 0 {
		le.PutUint32(b[12:], uint32(len(payload)))
	}
	return append(b, payload...)
}

// exchange sends a request and returns the answer's header and data.
func exchange(t testing.TB, conn net.Conn, request []byte) (header, data []byte) {
	t.Helper()
	if _, err := conn.Write(request); err != nil {
		t.Fatal(err)
	}
	header = make([]byte, 48)
	if _, err := io.ReadFull(conn, header); err != nil {
		t.Fatalf("answer to % x: %v", request[:48], err)
	}
	data = make([]byte, le.Uint32(header[12:]))
	if _, err := io.ReadFull(conn, data); err != nil {
		t.Fatal(err)
	}
	return header, data
}

func result(header []byte) uint32 { return le.Uint32(header[16:]) }

// Complete sessions, byte by byte: each line is a request, what comes back is its answer.
func TestTranscripts(t *testing.T) {
	datadriven.Walk(t, "testdata/transcripts", func(t *testing.T, path string) {
		h := serve(t, nil)
		conns := map[string]net.Conn{}
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			if d.Cmd == "dog" { // by other means
				return h.dog(strings.Fields(d.Input))
			}
			if conns[d.Cmd] == nil {
				conns[d.Cmd] = h.dial()
			}
			var out strings.Builder
			for line := range strings.Lines(strings.TrimSpace(d.Input)) {
				header, data := exchange(t, conns[d.Cmd], message(t, strings.Fields(line)))
				fmt.Fprintf(&out, "% x\n", header)
				out.WriteString(runs(data))
			}
			return out.String()
		})
	})
}

// dog does what other clients do.
func (h *harness) dog(words []string) string {
	ctx := context.Background()
	var err error
	switch words[0] {
	case "snapshot":
		_, err = h.volumes.Snapshot(ctx, words[1], words[2])
	case "list":
		var out strings.Builder
		for _, i := range h.list() {
			fmt.Fprintln(&out, i.Name, i.Tag, i.VID, i.Size)
		}
		return out.String()
	}
	if err != nil {
		return err.Error()
	}
	return "done"
}

// runs shows data as runs of equal 16 bytes.
func runs(b []byte) string {
	var out strings.Builder
	for i := 0; i < len(b); {
		line := b[i:min(i+16, len(b))]
		n := 1
		for i+16*(n+1) <= len(b) && string(b[i+16*n:i+16*(n+1)]) == string(line) {
			n++
		}
		fmt.Fprintf(&out, "  % x", line)
		if n > 1 {
			fmt.Fprintf(&out, " *%d", n)
		}
		out.WriteByte('\n')
		i += 16*(n-1) + len(line)
	}
	return out.String()
}

// Every kind of error has its result.
func TestResults(t *testing.T) {
	for _, r := range results {
		err := fmt.Errorf("read: %w", r.kind)
		if resultOf(err, false) != r.object || resultOf(err, true) != r.vdi {
			t.Errorf("%v: %#x, %#x", r.kind, resultOf(err, false), resultOf(err, true))
		}
	}
	if got := resultOf(errors.New("new"), true); got != 3 {
		t.Errorf("an unknown error is %#x", got)
	}
}

// Many requests on one connection are all answered, each once, whatever the order.
func TestPipelining(t *testing.T) {
	h := serve(t, nil)
	v := h.create("vm", 16<<20)
	conn := h.dial()
	const n = 500
	go func() {
		for i := range n {
			word := func(format string, args ...any) string { return fmt.Sprintf(format, args...) }
			oid := word("oid=%d", uint64(v.VID)<<32|uint64(i%16))
			if i%2 == 0 {
				conn.Write(message(t, []string{"op=1", "flags=5", word("id=%d", i), oid, word("offset=%d", i*512), word("fill=%d*512", i%256)}))
			} else {
				conn.Write(message(t, []string{"op=2", word("id=%d", i), oid, "want=100000"}))
			}
		}
	}()
	seen := map[uint32]bool{}
	for range n {
		header := make([]byte, 48)
		if _, err := io.ReadFull(conn, header); err != nil {
			t.Fatal(err)
		}
		if _, err := io.CopyN(io.Discard, conn, int64(le.Uint32(header[12:]))); err != nil {
			t.Fatal(err)
		}
		id := le.Uint32(header[8:])
		if seen[id] || result(header) != 0 {
			t.Fatalf("answer %x, seen before: %v", header, seen[id])
		}
		seen[id] = true
	}
}

// A client that is gone leaves nothing, whatever it had in flight; a server that stops ends connections
// without answering what it has not begun.
func TestLeavesNothing(t *testing.T) {
	h := serve(t, nil)
	v := h.create("vm", 16<<20)
	// The service's own begin when they come to it, maybe only while the clients are there.
	goroutines := func() (n int, all string) {
		b := make([]byte, 1<<20)
		all = string(b[:runtime.Stack(b, true)])
		for _, stack := range strings.Split(all, "\n\n") {
			if !strings.Contains(stack, "vdi.(*Service).Run") {
				n++
			}
		}
		return n, all
	}
	before, _ := goroutines()
	for i := range 30 {
		conn := h.dial()
		write := message(t, []string{"op=1", "flags=5", fmt.Sprintf("oid=%d", uint64(v.VID)<<32|uint64(i%16)), "fill=7*100000"})
		conn.Write(write[:len(write)-rand.IntN(2)*5000])
		conn.Write(message(t, []string{"op=2", fmt.Sprintf("oid=%d", 1<<63|uint64(v.VID)<<32), "want=4198968"}))
		conn.Close()
	}
	isClean := func() bool {
		c := h.server.Counters()
		n, _ := goroutines()
		return n <= before && c.Accepted == 30 && c.Connections == 0 && c.InFlight == 0 && c.BufferBytes == 0
	}
	for until := time.Now().Add(20 * time.Second); !isClean(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(until) {
			n, all := goroutines()
			t.Fatalf("%d goroutines, %d before; %+v\n%s", n, before, h.server.Counters(), all)
		}
	}
}

func TestAllowList(t *testing.T) {
	h := serve(t, func(c *Config) { c.Allow = []netip.Prefix{netip.MustParsePrefix("127.0.0.2/32")} })
	conn := h.dial()
	if _, err := conn.Read(make([]byte, 1)); err == nil {
		t.Error("a stranger is let in")
	}
	if h.server.Counters().NotAllowed != 1 {
		t.Error("nobody was refused")
	}
}

// A volume of more objects than the protocol can name is refused, with a line in the log that says what to do; a smaller one
// whose map is full is not.
func TestTooLarge(t *testing.T) {
	var log strings.Builder
	var mu sync.Mutex
	h := serve(t, func(c *Config) { c.Logger = slog.New(slog.NewTextHandler(lockedWriter{&mu, &log}, nil)) })
	h.create("most", vdi.NativeObjects<<20)
	h.create("more", vdi.NativeObjects<<20+1)
	conn := h.dial()
	for _, op := range []string{"op=0x12", "op=0x14"} {
		for name, want := range map[string]uint32{"most": 0, "more": 5} {
			if header, _ := exchange(t, conn, message(t, []string{op, "flags=1", "name=" + name, "tag="})); result(header) != want {
				t.Errorf("%s of %q: %#x, want %#x", op, name, result(header), want)
			}
		}
	}
	mu.Lock()
	defer mu.Unlock()
	if text := log.String(); !strings.Contains(text, "use NBD, or larger objects") || !strings.Contains(text, "vdi=more") || strings.Contains(text, "vdi=most") {
		t.Errorf("the log is %q", text)
	}
}

type lockedWriter struct {
	mu *sync.Mutex
	to io.Writer
}

func (w lockedWriter) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.to.Write(p)
}

// What a host has opened is forgotten when it has had no connection for a while, not at once: clients reconnect. Who is killed
// leaves nothing behind.
func TestLocksAreForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var l locks
		l.connected("h")
		l.take("h", "vm")
		l.take("h", "vm") // a second client of the same machine, as during a migration
		l.told("h", "vm", 1)
		has := func() bool { open, _ := l.has("h", "vm", 1); return open }
		if !l.release("h", "vm") || !has() {
			t.Error("one of two who have it open released it, and it is released")
		}
		l.disconnected("h")
		time.Sleep(lockLinger - time.Second)
		l.connected("h")
		if !has() {
			t.Error("it is forgotten before a client could reconnect")
		}
		l.disconnected("h")
		time.Sleep(lockLinger + time.Second)
		l.connected("other")
		if len(l.hosts) != 1 || l.hosts["other"] == nil {
			t.Error("a killed client's lock is still there")
		}
	})
}

// A session that opens and closes many snapshots keeps few of them open.
func TestAttachedIsBounded(t *testing.T) {
	h := serve(t, nil)
	h.create("vm", 4<<20)
	conn := h.dial()
	for i := range maxAttached + 20 {
		i, err := h.volumes.Snapshot(context.Background(), "vm", fmt.Sprintf("s%d", i))
		if err != nil {
			t.Fatal(err)
		}
		header, _ := exchange(t, conn, message(t, []string{"op=2", fmt.Sprintf("oid=%d", uint64(i.VID)<<32), "want=512"}))
		if result(header) != 0 {
			t.Fatalf("% x", header)
		}
	}
	h.server.clients.Each(func(c *session) {
		c.mu.Lock()
		defer c.mu.Unlock()
		if n := len(c.attached); n > maxAttached {
			t.Errorf("%d volumes are attached", n)
		}
	})
}

// Any bytes on a connection: the server neither falls nor keeps anything of it.
func FuzzSession(f *testing.F) {
	f.Add(message(f, []string{"op=1", "flags=1", "oid=0x70dbec00000000", "fill=1*512"}))
	f.Add(message(f, []string{"op=0x11", "flags=1", "name=x", "size=100000"}))
	f.Add(message(f, []string{"op=2", "oid=0x8070dbec00000000", "want=5000"}))
	f.Add(message(f, []string{"op=3", "flags=1", "oid=0x8070dbec00000000", "fill=0*4", "offset=4664"}))
	f.Fuzz(func(t *testing.T, b []byte) {
		h := serve(t, nil)
		h.create("vm", 4<<20)
		conn := h.dial().(*net.TCPConn)
		conn.SetDeadline(time.Now().Add(5 * time.Second))
		go func() {
			conn.Write(b)
			conn.CloseWrite()
		}()
		io.Copy(io.Discard, conn)
		conn.Close()
	})
}

// "qemu-img snapshot -d" with a map of one entry: that it is no discard is told by which connection came first, also where many
// are taken at once.
func TestClearedEntryKeepsData(t *testing.T) {
	h := serve(t, nil)
	v := h.create("vm", 1<<20)
	data, inode := fmt.Sprintf("oid=%d", uint64(v.VID)<<32), fmt.Sprintf("oid=%d", 1<<63|uint64(v.VID)<<32)
	once := func(words ...string) (header, data []byte) {
		conn := h.dial()
		defer conn.Close()
		return exchange(t, conn, message(t, words))
	}
	once("op=1", "flags=9", data, "fill=7*512")
	for i := range 100 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		var early []net.Conn // they come before the server looks
		for range 2 {
			conn, err := net.Dial("tcp", l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			early = append(early, conn)
		}
		ctx, cancel := context.WithCancel(context.Background())
		go h.server.Serve(ctx, l)
		exchange(t, early[1], message(t, []string{"op=0x12", "flags=1", "name=vm", "tag="})) // the first one is for data, and not used yet
		once("op=3", "flags=9", inode, "offset=4664", "fill=0*4")
		if _, got := once("op=2", data, "want=1"); got[0] != 7 {
			t.Fatalf("after %d times the data is gone", i)
		}
		once("op=0x13", "flags=1", "name=vm")
		for _, conn := range early {
			conn.Close()
		}
		cancel()
	}
}

// A client that has opened a VDI and written nothing is told of a snapshot that others took also when that is deleted, and its vid
// is nobody's any more: so it goes on with what the VDI is now.
func TestToldOfDeletedSnapshot(t *testing.T) {
	h := serve(t, nil)
	v := h.create("vm", 4<<20)
	ctx := context.Background()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	once := func(words ...string) (header, data []byte) {
		conn := h.dial()
		defer conn.Close()
		return exchange(t, conn, message(t, words))
	}
	data, inode := func(vid uint32) string { return fmt.Sprintf("oid=%d", uint64(vid)<<32) }, func(vid uint32) string { return fmt.Sprintf("oid=%d", 1<<63|uint64(vid)<<32) }
	open := func() (net.Conn, uint32) {
		conn := h.dial()
		header, _ := once("op=0x12", "flags=1", "name=vm", "tag=")
		return conn, le.Uint32(header[24:])
	}
	requests := func(vid uint32) [][]string {
		return [][]string{
			{"op=1", "flags=5", data(vid), "fill=7*512"},
			{"op=3", "flags=5", data(vid), "fill=7*512"},
			{"op=3", "flags=5", inode(vid), "offset=4664", "fill=0*4"},
			{"op=5", data(vid)},
		}
	}
	conn, vid := open()
	if vid != uint32(v.VID) {
		t.Fatalf("opened %x", vid)
	}
	_, err := h.volumes.Snapshot(ctx, "vm", "s")
	must(err)
	must(h.volumes.Delete(ctx, "vm", "s"))
	must(h.volumes.Collect(ctx))
	if _, err := h.volumes.HeaderOf(v.VID); !errors.Is(err, vdi.ErrNotFound) {
		t.Fatalf("the vid is not free: %v", err)
	}
	if _, err := h.volumes.FamilyOf(v.VID); err != nil {
		t.Fatal(err)
	}
	for _, request := range requests(vid) {
		if header, _ := exchange(t, conn, message(t, request)); result(header) != uint32(wire.SD_RES_READONLY) {
			t.Errorf("%q: %#x, want READONLY", request, result(header))
		}
	}
	if header, _ := exchange(t, conn, message(t, []string{"op=0x16", inode(vid)})); result(header) != 0 {
		t.Errorf("flush: %#x", result(header))
	}
	header, _ := once("op=0x14", "flags=1", "name=vm", "tag=")
	now := le.Uint32(header[24:])
	if header, _ := exchange(t, conn, message(t, []string{"op=1", "flags=5", data(now), "fill=7*512"})); now == vid || result(header) != 0 {
		t.Fatalf("write for %x: %#x", now, result(header))
	}
	if _, got := exchange(t, conn, message(t, []string{"op=2", data(now), "want=1"})); got[0] != 7 {
		t.Errorf("read: %v", got)
	}
}

// Who has opened a VDI that is deleted, and made anew, does not get the new one for it, whatever it asks for: not where the new one has the vid of before,
// because so many were given up meanwhile, and not at a server that does not know what it had opened, as long as the vid is another one. Who opens the new one gets it.
func TestMadeAnewIsNotWhatWasOpened(t *testing.T) {
	for _, x := range []struct {
		what    string
		keep    int
		restart bool
	}{{"the vid of before", -1, false}, {"another vid", 0, false}, {"another vid, at another server", 0, true}} {
		t.Run(x.what, func(t *testing.T) {
			h := serveKeeping(t, x.keep, nil)
			v := h.create("vm", 4<<20)
			lock := message(t, []string{"op=0x12", "flags=1", "name=vm", "tag="})
			conn, other := h.dial(), h.dial()
			exchange(t, other, lock)
			if err := errors.Join(h.volumes.Delete(t.Context(), "vm", ""), h.volumes.Collect(t.Context())); err != nil {
				t.Fatal(err)
			}
			now := h.create("vm", 4<<20)
			if (now.VID == v.VID) != (x.keep < 0) {
				t.Fatalf("it has vid %s, which was %s: nothing is seen of what this is about", now.VID, v.VID)
			}
			if x.restart {
				h.start(nil)
				conn, other = h.dial(), h.dial()
			}
			for _, request := range requestsFor(t, v.VID) {
				want := wire.SD_RES_NO_VDI
				if x.keep == 0 && request[0] == "op=2" {
					want = wire.SD_RES_NO_OBJ
				}
				if header, _ := exchange(t, conn, message(t, request)); result(header) != uint32(want) {
					t.Errorf("%.60q: %#x, want %#x", request, result(header), want)
				}
			}
			if i := h.list(); i[0].Size != 4<<20 || i[0].Used != 0 {
				t.Errorf("the new VDI has %d bytes, %d used", i[0].Size, i[0].Used)
			}
			base := fmt.Sprintf("base=%d", v.VID)
			for _, request := range [][]string{{"op=0x11", "flags=1", "name=vm", "snapid=1", base}, {"op=0x17", "flags=1", "name=vm", base}} {
				if x.keep < 0 {
					break
				}
				if header, _ := exchange(t, other, message(t, request)); result(header) != uint32(wire.SD_RES_NO_BASE_VDI) {
					t.Errorf("%q: %#x, want NO_BASE_VDI", request, result(header))
				}
			}
			if got := search(t, other, min(v.VID, now.VID), "vm"); !slices.Equal(got, []object.VID{now.VID}) {
				t.Errorf("who searches for the name finds %v, not %s", got, now.VID)
			}
			exchange(t, other, lock)
			for _, request := range requestsFor(t, now.VID) {
				if header, _ := exchange(t, conn, message(t, request)); result(header) != 0 {
					t.Errorf("%.60q of who has opened it: %#x", request, result(header))
				}
			}
		})
	}
}

// search finds the vids of a name as QEMU does: by the headers of all that is in use from the first vid on. None of them may fail.
func search(t *testing.T, conn net.Conn, first object.VID, name string) (list []object.VID) {
	_, bitmap := exchange(t, conn, message(t, []string{"op=0x15", fmt.Sprintf("want=%d", wire.BitmapSize)}))
	for vid := first; bitmap[vid/8]>>(vid%8)&1 != 0; vid++ {
		header, inode := exchange(t, conn, message(t, []string{"op=2", fmt.Sprintf("oid=%d", 1<<63|uint64(vid)<<32), fmt.Sprintf("want=%d", wire.InodeHeaderSize)}))
		if result(header) != 0 {
			t.Fatalf("header of %s: %#x", vid, result(header))
		}
		if in := wire.ParseInodeHeader(inode); in.Name == name {
			list = append(list, vid)
		}
	}
	return list
}

// requestsFor are requests of all kinds for objects of a VDI.
func requestsFor(t *testing.T, vid object.VID) [][]string {
	data, inode := fmt.Sprintf("oid=%d", uint64(vid)<<32), fmt.Sprintf("oid=%d", 1<<63|uint64(vid)<<32)
	header := make([]byte, wire.InodeHeaderSize)
	in := wire.InodeHeader{Name: "vm", Size: 9 << 20, BlockSizeShift: 20, VID: uint32(vid)}
	in.Put(header)
	return [][]string{
		{"op=1", "flags=5", data, "fill=7*512"},
		{"op=3", "flags=5", data, "fill=7*512"},
		{"op=3", "flags=5", inode, "offset=4664", "fill=0*4"},
		{"op=3", "flags=5", inode, "hex=" + hex.EncodeToString(header)},
		{"op=5", data},
		{"op=2", data, "want=512"},
		{"op=0x16", inode},
	}
}

// A clone reads from its ancestors, whatever of their name is open: here they are of a VDI that was deleted, and made anew.
func TestCloneOfDeletedIsRead(t *testing.T) {
	h := serve(t, nil)
	v := h.create("vm", 4<<20)
	conn := h.dial()
	data := fmt.Sprintf("oid=%d", uint64(v.VID)<<32)
	exchange(t, conn, message(t, []string{"op=1", "flags=5", data, "fill=7*512"}))
	conn.Close()
	_, err := h.volumes.Snapshot(t.Context(), "vm", "s")
	if err == nil {
		_, err = h.volumes.Clone(t.Context(), "vm", "s", "clone")
	}
	for deadline := time.Now().Add(10 * time.Second); err == nil && time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		if busy := h.volumes.Delete(t.Context(), "vm", ""); busy == nil {
			break
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	h.create("vm", 4<<20)
	for _, name := range []string{"vm", "clone"} {
		exchange(t, h.dial(), message(t, []string{"op=0x12", "flags=1", "name=" + name, "tag="}))
	}
	if header, got := exchange(t, h.dial(), message(t, []string{"op=2", data, "want=1"})); result(header) != 0 || got[0] != 7 {
		t.Errorf("%#x, %v", result(header), got)
	}
}

// An object that a deleted snapshot left to others is read by way of one of them. That does not make it what the client has open, so
// all else is what the client's map means; and who is known to have a VDI open reads what that has now.
func TestReadInsteadIsNotOpened(t *testing.T) {
	h := serve(t, nil)
	one := h.create("vm", 4<<20).VID
	h.put(one, 0, 1)
	h.put(one, 1, 1)
	h.snapshot("vm", "one")
	two := h.working("vm")
	h.put(two, 1, 2)
	h.snapshot("vm", "two")
	h.must(h.volumes.Delete(t.Context(), "vm", "one"))
	for n := range 8 { // of which some vid is below the others
		name := fmt.Sprintf("%dclone", n)
		_, err := h.volumes.Clone(t.Context(), "vm", "two", name)
		h.must(err)
		h.put(h.working(name), 1, 9)
	}
	now := h.working("vm")
	h.put(now, 2, 3)
	reader, owner := h.dial(), h.dial()
	for _, x := range []struct {
		conn  net.Conn
		vid   object.VID
		index int
		want  byte
	}{{reader, one, 0, 1}, {reader, two, 1, 2}, {reader, one, 0, 1}, {reader, two, 1, 2}, {owner, now, 2, 3}, {owner, one, 0, 1}, {owner, two, 1, 2}} {
		if got := h.read(x.conn, x.vid, x.index); got != x.want {
			t.Errorf("object %d of %s: %d, want %d", x.index, x.vid, got, x.want)
		}
	}
	h.put(now, 0, 5)
	if got := h.read(owner, one, 0); got != 5 {
		t.Errorf("who has the VDI open reads %d, want what others have written since", got)
	}
}

// overtaken is volumes in which something happens when a holder was found.
type overtaken struct {
	volumes
	then atomic.Pointer[func(object.VID)]
}

func (o *overtaken) Holder(ctx context.Context, vid object.VID, index uint32) (object.VID, error) {
	holder, err := o.volumes.Holder(ctx, vid, index)
	if then := o.then.Load(); err == nil && then != nil {
		(*then)(holder)
	}
	return holder, err
}

// The VDI by way of which an object of a deleted snapshot is read gets an object of its own meanwhile: that is not what was asked for.
func TestReadInsteadIsOvertaken(t *testing.T) {
	var o *overtaken
	h := serve(t, func(c *Config) {
		o = &overtaken{volumes: c.Volumes.(volumes)}
		c.Volumes = o
	})
	vid := h.create("vm", 4<<20).VID
	h.put(vid, 0, 1)
	h.snapshot("vm", "s")
	for _, name := range []string{"a", "b"} {
		_, err := h.volumes.Clone(t.Context(), "vm", "s", name)
		h.must(err)
	}
	err := h.volumes.Delete(t.Context(), "vm", "")
	for deadline := time.Now().Add(10 * time.Second); errors.Is(err, vdi.ErrBusy) && time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		err = h.volumes.Delete(t.Context(), "vm", "") // the server closes what put has closed
	}
	h.must(err)
	h.must(h.volumes.Delete(t.Context(), "vm", "s"))
	var times atomic.Int32
	then := func(holder object.VID) {
		if times.Add(1) == 1 {
			h.put(holder, 0, 9)
		}
	}
	o.then.Store(&then)
	if got := h.read(h.dial(), vid, 0); got != 1 || times.Load() != 2 {
		t.Errorf("read %d after %d looks, want 1 after 2", got, times.Load())
	}
}

func (h *harness) must(err error) {
	h.t.Helper()
	if err != nil {
		h.t.Fatal(err)
	}
}

func (h *harness) snapshot(name, tag string) {
	h.t.Helper()
	_, err := h.volumes.Snapshot(h.t.Context(), name, tag)
	h.must(err)
}

func (h *harness) working(name string) object.VID {
	h.t.Helper()
	header, err := h.volumes.FindHeader(name, "", 0)
	h.must(err)
	return header.VID
}

// put makes an object, with a sector of a value, on a connection of its own; read tells the first byte of one.
func (h *harness) put(vid object.VID, index int, value byte) {
	h.t.Helper()
	conn := h.dial()
	defer conn.Close()
	words := []string{"op=1", "flags=5", fmt.Sprintf("oid=%d", object.DataID(vid, uint32(index))), fmt.Sprintf("fill=%d*512", value)}
	if header, _ := exchange(h.t, conn, message(h.t, words)); result(header) != 0 {
		h.t.Fatalf("write to object %d of %s: %#x", index, vid, result(header))
	}
}

func (h *harness) read(conn net.Conn, vid object.VID, index int) byte {
	h.t.Helper()
	header, got := exchange(h.t, conn, message(h.t, []string{"op=2", fmt.Sprintf("oid=%d", object.DataID(vid, uint32(index))), "want=1"}))
	if result(header) != 0 || len(got) != 1 {
		h.t.Fatalf("read of object %d of %s: %#x, %d bytes", index, vid, result(header), len(got))
	}
	return got[0]
}

// What is remembered of a name whose VDI comes and goes is bounded.
func TestFamiliesAreBounded(t *testing.T) {
	var l locks
	l.connected("h")
	l.take("h", "vm")
	for family := range uint64(100) {
		l.told("h", "vm", family)
	}
	if n := len(l.hosts["h"].families["vm"]); n != maxFamilies {
		t.Errorf("%d families are remembered", n)
	}
	if open, _ := l.has("h", "vm", 99); !open {
		t.Error("the last one is not")
	}
	l.told("h", "closed", 1)
	if len(l.hosts["h"].families) != 1 {
		t.Error("what is not open is remembered")
	}
	if open, strange := l.has("h", "closed", 1); open || strange {
		t.Error("what is not open is known")
	}
}

// A client that writes to a snapshot has the VDI deleted first, which names the snapshot, and then made of it. If that snapshot is gone, the VDI
// stays: it cannot be made again.
func TestDeletionOfOtherBaseIsRefused(t *testing.T) {
	h := serve(t, nil)
	conn := h.dial()
	h.create("vm", 4<<20)
	one, err := h.volumes.Snapshot(t.Context(), "vm", "one")
	if err != nil {
		t.Fatal(err)
	}
	of := func(vid object.VID) uint32 {
		header, _ := exchange(t, conn, message(t, []string{"op=0x17", "flags=1", fmt.Sprintf("base=%d", vid), "name=vm"}))
		return result(header)
	}
	is := func(what string, vid object.VID, want wire.Result, there bool) {
		t.Helper()
		if got := of(vid); got != uint32(want) {
			t.Errorf("%s: %#x, want %#x", what, got, want)
		}
		if _, err := h.volumes.FindHeader("vm", "", 0); (err == nil) != there {
			t.Errorf("%s: the VDI is then: %v", what, err)
		}
	}
	is("a snapshot", one.VID, wire.SD_RES_SUCCESS, true)
	if err := h.volumes.Delete(t.Context(), "vm", "one"); err != nil {
		t.Fatal(err)
	}
	is("a deleted snapshot", one.VID, wire.SD_RES_NO_BASE_VDI, true)
	if err := h.volumes.Collect(t.Context()); err != nil {
		t.Fatal(err)
	}
	is("one of which nothing is left", one.VID, wire.SD_RES_NO_BASE_VDI, true)
	other := h.create("other", 4<<20)
	is("another VDI", other.VID, wire.SD_RES_NO_BASE_VDI, true)
	now, err := h.volumes.FindHeader("vm", "", 0)
	if err != nil {
		t.Fatal(err)
	}
	is("the VDI itself", now.VID, wire.SD_RES_SUCCESS, false)
}
