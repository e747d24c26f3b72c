package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"net"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"sheepdog/frontends/internal/listen"
	"sheepdog/frontends/nbd/internal/wire"
)

// testTimeout bounds every wait of a test.
const testTimeout = 2 * time.Minute

// harness is a server on a unix socket, and what has to be gone when the test ends.
type harness struct {
	*Server
	t     testing.TB
	store *store
	addr  net.Addr
}

func serve(t testing.TB, st *store, change func(*Config)) *harness {
	t.Helper()
	before := runtime.NumGoroutine()
	cfg := Config{Volumes: st, HandshakeTimeout: testTimeout, Limits: listen.Limits{LingerTimeout: time.Second}}
	if change != nil {
		change(&cfg)
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	h := &harness{Server: s, t: t, store: st, addr: l.Addr()}
	served := make(chan error, 1)
	go func() { served <- s.Serve(context.Background(), l) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
		defer cancel()
		if err := s.Shutdown(ctx); err != nil {
			t.Errorf("shutdown: %v", err)
		}
		if err := <-served; err != nil {
			t.Errorf("serve: %v", err)
		}
		h.nothingLeft(before)
	})
	return h
}

// nothingLeft checks that a server that was shut down holds nothing.
func (h *harness) nothingLeft(goroutines int) {
	h.t.Helper()
	if n := h.store.opens.Load(); n != 0 {
		h.t.Errorf("%d volumes are still open", n)
	}
	c := h.Counters()
	if c.Connections != 0 || c.Sessions != 0 || c.InFlight != 0 || c.BufferBytes != 0 {
		h.t.Errorf("something is left: %+v", c)
	}
	h.eventually("goroutines are left", func() bool { return runtime.NumGoroutine() <= goroutines })
}

// eventually waits for what happens soon, but not in step with the test.
func (h *harness) eventually(what string, ok func() bool) {
	h.t.Helper()
	for end := time.Now().Add(testTimeout); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			buf := make([]byte, 1<<20)
			h.t.Fatalf("%s\n%s", what, buf[:runtime.Stack(buf, true)])
		}
	}
}

// client speaks NBD as slowly and as wrongly as a test wants.
type client struct {
	t       testing.TB
	conn    net.Conn
	headers wire.Headers
	size    uint64
	flags   uint16
	cookie  uint64
}

// dial connects.
func (h *harness) dial() *client {
	h.t.Helper()
	conn, err := net.Dial(h.addr.Network(), h.addr.String())
	if err != nil {
		h.t.Fatal(err)
	}
	return newClient(h.t, conn)
}

// connect dials and exchanges flags.
func (h *harness) connect() *client {
	h.t.Helper()
	c := h.dial()
	c.greet(wire.NBD_FLAG_C_FIXED_NEWSTYLE | wire.NBD_FLAG_C_NO_ZEROES)
	return c
}

func newClient(t testing.TB, conn net.Conn) *client {
	conn.SetDeadline(time.Now().Add(testTimeout))
	t.Cleanup(func() { conn.Close() })
	return &client{t: t, conn: conn}
}

// open connects, negotiates the headers and chooses an export, and checks that it works.
func (h *harness) open(export string, headers wire.Headers) *client {
	h.t.Helper()
	c := h.connect()
	c.negotiate(headers)
	c.goExport(export)
	return c
}

func (c *client) greet(flags uint32) {
	c.t.Helper()
	b := c.read(wire.GreetingSize)
	if want := wire.AppendGreeting(nil, wire.NBD_FLAG_FIXED_NEWSTYLE|wire.NBD_FLAG_NO_ZEROES); !bytes.Equal(b, want) {
		c.t.Fatalf("greeting is %x", b)
	}
	c.write(binary.BigEndian.AppendUint32(nil, flags))
}

func (c *client) negotiate(h wire.Headers) {
	c.t.Helper()
	switch h {
	case wire.Structured:
		c.expectAck(wire.NBD_OPT_STRUCTURED_REPLY, nil)
	case wire.Extended:
		c.expectAck(wire.NBD_OPT_EXTENDED_HEADERS, nil)
	}
	c.headers = h
}

func (c *client) goExport(export string, infos ...uint16) []optionReply {
	c.t.Helper()
	replies := c.option(wire.NBD_OPT_GO, infoData(export, infos...))
	last := replies[len(replies)-1]
	if last.rep != wire.NBD_REP_ACK {
		c.t.Fatalf("NBD_OPT_GO %q: %#x %s", export, last.rep, last.data)
	}
	for _, r := range replies {
		if r.rep == wire.NBD_REP_INFO && binary.BigEndian.Uint16(r.data) == wire.NBD_INFO_EXPORT {
			c.size, c.flags = binary.BigEndian.Uint64(r.data[2:]), binary.BigEndian.Uint16(r.data[10:])
		}
	}
	return replies
}

func (c *client) read(n int) []byte {
	c.t.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(c.conn, b); err != nil {
		c.t.Fatalf("read of %d bytes: %v", n, err)
	}
	return b
}

func (c *client) write(b []byte) {
	c.t.Helper()
	if _, err := c.conn.Write(b); err != nil {
		c.t.Fatalf("write: %v", err)
	}
}

// expectClosed checks that the server closed the connection.
func (c *client) expectClosed() {
	c.t.Helper()
	b := make([]byte, 1)
	if n, err := c.conn.Read(b); n != 0 || err == nil {
		c.t.Fatalf("connection is open: read %x, %v", b[:n], err)
	} else if ne, ok := err.(net.Error); ok && ne.Timeout() {
		c.t.Fatal("connection is open: nothing came")
	}
}

type optionReply struct {
	option, rep uint32
	data        []byte
}

func optionMessage(option uint32, data []byte) []byte {
	b := binary.BigEndian.AppendUint64(nil, wire.IHAVEOPT)
	b = binary.BigEndian.AppendUint32(b, option)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

// option sends an option and returns the replies; the last is an error or an ack.
func (c *client) option(option uint32, data []byte) []optionReply {
	c.t.Helper()
	c.write(optionMessage(option, data))
	return c.optionReplies(option)
}

func (c *client) optionReplies(option uint32) (list []optionReply) {
	c.t.Helper()
	for {
		b := c.read(20)
		r := optionReply{option: binary.BigEndian.Uint32(b[8:]), rep: binary.BigEndian.Uint32(b[12:])}
		r.data = c.read(int(binary.BigEndian.Uint32(b[16:])))
		if binary.BigEndian.Uint64(b) != wire.NBD_REP_MAGIC || r.option != option {
			c.t.Fatalf("reply to option %d: %x", option, b)
		}
		list = append(list, r)
		if r.rep == wire.NBD_REP_ACK || r.rep&(1<<31) != 0 {
			return list
		}
	}
}

func (c *client) expectAck(option uint32, data []byte) []optionReply {
	c.t.Helper()
	return c.expectOption(option, data, wire.NBD_REP_ACK)
}

// expectOption checks how the answer to an option ends.
func (c *client) expectOption(option uint32, data []byte, rep uint32) []optionReply {
	c.t.Helper()
	list := c.option(option, data)
	if last := list[len(list)-1]; last.rep != rep {
		c.t.Fatalf("option %d: reply %#x %q, want %#x", option, last.rep, last.data, rep)
	}
	return list
}

func infoData(export string, infos ...uint16) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(export)))
	b = append(b, export...)
	b = binary.BigEndian.AppendUint16(b, uint16(len(infos)))
	for _, i := range infos {
		b = binary.BigEndian.AppendUint16(b, i)
	}
	return b
}

func metaData(export string, queries ...string) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(export)))
	b = append(b, export...)
	b = binary.BigEndian.AppendUint32(b, uint32(len(queries)))
	for _, q := range queries {
		b = binary.BigEndian.AppendUint32(b, uint32(len(q)))
		b = append(b, q...)
	}
	return b
}

// requestMessage encodes a request with its payload.
func requestMessage(h wire.Headers, r wire.Request, payload []byte) []byte {
	magic := wire.NBD_REQUEST_MAGIC
	if h == wire.Extended {
		magic = wire.NBD_EXTENDED_REQUEST_MAGIC
	}
	b := binary.BigEndian.AppendUint32(nil, magic)
	b = binary.BigEndian.AppendUint16(b, r.Flags)
	b = binary.BigEndian.AppendUint16(b, r.Type)
	b = binary.BigEndian.AppendUint64(b, r.Cookie)
	b = binary.BigEndian.AppendUint64(b, r.Offset)
	if h == wire.Extended {
		b = binary.BigEndian.AppendUint64(b, r.Length)
	} else {
		b = binary.BigEndian.AppendUint32(b, uint32(r.Length))
	}
	return append(b, payload...)
}

// send sends a request and returns its cookie.
func (c *client) send(typ, flags uint16, offset, length uint64, payload []byte) uint64 {
	c.t.Helper()
	c.cookie++
	if c.headers == wire.Extended && payload != nil {
		flags |= wire.NBD_CMD_FLAG_PAYLOAD_LEN
	}
	c.write(requestMessage(c.headers, wire.Request{Flags: flags, Type: typ, Cookie: c.cookie, Offset: offset, Length: length}, payload))
	return c.cookie
}

// chunk is a simple reply or a reply chunk.
type message struct {
	simple  bool
	flags   uint16
	typ     uint16
	cookie  uint64
	offset  uint64
	payload []byte
	errno   wire.Errno
	text    string
}

// receiveChunk reads one reply message; length is that of the data of a simple read reply.
func (c *client) receiveChunk(length int) message {
	c.t.Helper()
	b := c.read(4)
	switch magic := binary.BigEndian.Uint32(b); {
	case magic == wire.NBD_SIMPLE_REPLY_MAGIC && c.headers != wire.Extended:
		b = c.read(12)
		r := message{simple: true, flags: wire.NBD_REPLY_FLAG_DONE, errno: wire.Errno(binary.BigEndian.Uint32(b)), cookie: binary.BigEndian.Uint64(b[4:])}
		if r.errno == 0 && length > 0 {
			r.payload = c.read(length)
		}
		return r
	case magic == wire.NBD_STRUCTURED_REPLY_MAGIC && c.headers == wire.Structured:
		b = c.read(16)
		return c.finishChunk(b, 0, uint64(binary.BigEndian.Uint32(b[12:])))
	case magic == wire.NBD_EXTENDED_REPLY_MAGIC && c.headers == wire.Extended:
		b = c.read(28)
		return c.finishChunk(b, binary.BigEndian.Uint64(b[12:]), binary.BigEndian.Uint64(b[20:]))
	default:
		c.t.Fatalf("reply with magic %#x under %s headers", magic, c.headers)
		return message{}
	}
}

func (c *client) finishChunk(b []byte, offset, length uint64) message {
	c.t.Helper()
	r := message{flags: binary.BigEndian.Uint16(b), typ: binary.BigEndian.Uint16(b[2:]), cookie: binary.BigEndian.Uint64(b[4:]), offset: offset}
	r.payload = c.read(int(length))
	if r.typ&(1<<15) != 0 {
		r.errno = wire.Errno(binary.BigEndian.Uint32(r.payload))
		r.text = string(r.payload[6:])
		if n := int(binary.BigEndian.Uint16(r.payload[4:])); n != len(r.text) {
			c.t.Fatalf("error message of %d bytes says that it has %d", len(r.text), n)
		}
	}
	return r
}

// reply reads all of the reply to a request.
func (c *client) reply(cookie uint64, length int) (list []message) {
	c.t.Helper()
	for {
		r := c.receiveChunk(length)
		if r.cookie != cookie {
			c.t.Fatalf("reply to %d, want %d", r.cookie, cookie)
		}
		list = append(list, r)
		if r.flags&wire.NBD_REPLY_FLAG_DONE != 0 {
			return list
		}
	}
}

// do sends a request and returns the error of its reply.
func (c *client) do(typ, flags uint16, offset, length uint64, payload []byte) wire.Errno {
	c.t.Helper()
	list := c.reply(c.send(typ, flags, offset, length, payload), 0)
	return list[len(list)-1].errno
}

func (c *client) expect(errno wire.Errno, typ, flags uint16, offset, length uint64, payload []byte) {
	c.t.Helper()
	if got := c.do(typ, flags, offset, length, payload); got != errno {
		c.t.Errorf("%s flags %#x at %d+%d under %s headers: error %d, want %d", commandName(typ), flags, offset, length, c.headers, got, errno)
	}
}

func commandName(typ uint16) string {
	if int(typ) < len(commands) {
		return commands[typ].name
	}
	return "unknown"
}

// readData reads n bytes at offset, whatever the form of the reply.
func (c *client) readData(flags uint16, offset uint64, n int) []byte {
	c.t.Helper()
	return c.assemble(offset, n, c.reply(c.send(wire.NBD_CMD_READ, flags, offset, uint64(n), nil), n))
}

// assemble puts a read reply together and checks that it covers the request once.
func (c *client) assemble(offset uint64, n int, list []message) []byte {
	c.t.Helper()
	data, covered := make([]byte, n), 0
	for _, r := range list {
		if r.errno != 0 {
			c.t.Fatalf("read at %d+%d: error %d %s", offset, n, r.errno, r.text)
		}
		switch {
		case r.simple:
			return r.payload
		case r.typ == wire.NBD_REPLY_TYPE_OFFSET_DATA:
			covered += copy(data[binary.BigEndian.Uint64(r.payload)-offset:], r.payload[8:])
		case r.typ == wire.NBD_REPLY_TYPE_OFFSET_HOLE:
			covered += int(binary.BigEndian.Uint32(r.payload[8:]))
		}
		if c.headers == wire.Extended && r.offset != offset {
			c.t.Fatalf("reply at %d to a read at %d", r.offset, offset)
		}
	}
	if covered != n {
		c.t.Fatalf("read of %d bytes: reply covers %d", n, covered)
	}
	return data
}

// disconnect says goodbye and waits for the server to close.
func (c *client) disconnect() {
	c.t.Helper()
	c.send(wire.NBD_CMD_DISC, 0, 0, 0, nil)
	c.expectClosed()
}
