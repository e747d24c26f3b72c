package iscsi

import (
	"context"
	"crypto/md5"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"testing"
	"time"

	"sheepdog/frontends/iscsi/internal/pdu"
)

const prefix = "iqn.2026-11.test"

// harness is a server on loopback with its store.
type harness struct {
	t     *testing.T
	store *store
	*Server
	addr string
	pong bool // clients answer pings by themselves
}

func serve(t *testing.T, change func(*Config)) *harness {
	t.Helper()
	st := newStore(map[string]int64{"vm1": 8 << 20, "vm2": 4 << 20})
	c := Config{Volumes: st, Prefix: prefix, Node: "n1", LogoutTimeout: 50 * time.Millisecond}
	c.MemoryLimit, c.SessionMemory = 8*MaxTransfer, 2*MaxTransfer
	if change != nil {
		change(&c)
	}
	s, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(context.Background(), l) }()
	h := &harness{t: t, store: st, Server: s, addr: l.Addr().String()}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		if err := s.Shutdown(ctx); err != nil {
			t.Errorf("shutdown: %v", err)
		}
		if err := <-served; err != nil {
			t.Errorf("serve: %v", err)
		}
		if n := st.opens.Load(); n != 0 {
			t.Errorf("%d volumes are still open", n)
		}
		if n := s.Counters().BufferBytes; n != 0 {
			t.Errorf("%d bytes of buffers are still in use", n)
		}
	})
	return h
}

// client is an initiator that does as it is told, right or wrong.
type client struct {
	t        *testing.T
	conn     net.Conn
	cmdSN    uint32
	tag      uint32
	header   bool // digests
	data     bool
	pong     bool
	maxSN    uint32
	answered map[string]string // keys of the login's last replies
}

func (h *harness) dial() *client {
	h.t.Helper()
	conn, err := net.Dial("tcp", h.addr)
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(2 * time.Minute))
	return &client{t: h.t, conn: conn, pong: h.pong, cmdSN: 100, answered: map[string]string{}}
}

func text(pairs ...string) (b []byte) {
	for _, p := range pairs {
		b = append(append(b, p...), 0)
	}
	return b
}

// loginHeader makes a login request.
func (c *client) loginHeader(flags byte, isid byte) pdu.Header {
	var h pdu.Header
	h[0], h[1] = 0x43, flags
	h[8], h[13] = 0x80, isid
	binary.BigEndian.PutUint32(h[24:], c.cmdSN)
	return h
}

// login logs in to a target; extra keys go before the usual ones.
func (h *harness) login(target, initiator string, extra ...string) *client {
	h.t.Helper()
	c := h.dial()
	if s := c.tryLogin(target, initiator, 1, extra...); s != pdu.LoginOK {
		h.t.Fatalf("login: status %#x", uint16(s))
	}
	return c
}

func (c *client) tryLogin(target, initiator string, isid byte, extra ...string) pdu.LoginStatus {
	c.t.Helper()
	keys := append([]string{"InitiatorName=" + initiator}, extra...)
	if target == "" {
		keys = append(keys, "SessionType=Discovery")
	} else {
		keys = append(keys, "TargetName="+prefix+":"+target)
	}
	c.send(c.loginHeader(0x87, isid), text(keys...)) // operational stage to full feature phase
	r, b := c.recv()
	c.note(b)
	if s := loginStatus(r); s != pdu.LoginOK {
		return s
	}
	if r[1] != 0x87 {
		c.t.Fatalf("login goes on with flags %#x", r[1])
	}
	c.header, c.data = c.answered["HeaderDigest"] == "CRC32C", c.answered["DataDigest"] == "CRC32C"
	return pdu.LoginOK
}

func (c *client) note(b []byte) {
	pairs, err := pdu.ParseText(b)
	if err != nil {
		c.t.Fatal(err)
	}
	for _, p := range pairs {
		c.answered[p.Key] = p.Value
	}
}

func loginStatus(h pdu.Header) pdu.LoginStatus {
	return pdu.LoginStatus(binary.BigEndian.Uint16(h[36:]))
}

// send sends a PDU with the digests that were agreed on.
func (c *client) send(h pdu.Header, data []byte) {
	c.t.Helper()
	h.SetDataSize(len(data))
	b := append([]byte(nil), h[:]...)
	if c.header {
		d := pdu.Digest(h[:])
		b = append(b, d[:]...)
	}
	if len(data) > 0 {
		p := append([]byte(nil), data...)
		for len(p)%4 != 0 {
			p = append(p, 0)
		}
		b = append(b, p...)
		if c.data {
			d := pdu.Digest(p)
			b = append(b, d[:]...)
		}
	}
	if _, err := c.conn.Write(b); err != nil {
		c.t.Logf("send: %v", err)
	}
}

// try receives a PDU, or says why there is none.
func (c *client) try() (h pdu.Header, data []byte, err error) {
	if _, err := io.ReadFull(c.conn, h[:]); err != nil {
		return h, nil, err
	}
	var d [4]byte
	if c.header {
		if _, err := io.ReadFull(c.conn, d[:]); err != nil {
			return h, nil, err
		}
		if d != pdu.Digest(h[:]) {
			return h, nil, errors.New("wrong header digest")
		}
	}
	n := h.DataSize()
	data = make([]byte, pdu.Padded(n))
	if _, err := io.ReadFull(c.conn, data); err != nil {
		return h, nil, err
	}
	if c.data && n > 0 {
		if _, err := io.ReadFull(c.conn, d[:]); err != nil {
			return h, nil, err
		}
		if d != pdu.Digest(data) {
			return h, nil, errors.New("wrong data digest")
		}
	}
	c.maxSN = binary.BigEndian.Uint32(h[32:])
	return h, data[:n], nil
}

func (c *client) recv() (pdu.Header, []byte) {
	c.t.Helper()
	for {
		h, b, err := c.try()
		if err != nil {
			c.t.Fatalf("receive: %v", err)
		}
		if !c.pong || h.Op() != pdu.OpNOPIn {
			return h, b
		}
		c.answerPing(h)
	}
}

func (c *client) answerPing(h pdu.Header) {
	var q pdu.Header
	q[0], q[1] = pdu.OpNOPOut|0x40, pdu.FlagFinal
	binary.BigEndian.PutUint32(q[16:], pdu.NoTag)
	copy(q[20:24], h[20:24])
	binary.BigEndian.PutUint32(q[24:], c.cmdSN)
	c.send(q, nil)
}

// gone fails unless the server closes the connection.
func (c *client) gone() {
	c.t.Helper()
	for {
		if _, _, err := c.try(); err != nil {
			if e, ok := err.(net.Error); ok && e.Timeout() {
				c.t.Fatal("the connection is still open")
			}
			return
		}
	}
}

// request makes the header of a request with the next numbers.
func (c *client) request(op, flags byte) pdu.Header {
	var h pdu.Header
	c.tag++
	h[0], h[1] = op, flags
	binary.BigEndian.PutUint32(h[16:], c.tag)
	binary.BigEndian.PutUint32(h[20:], pdu.NoTag)
	binary.BigEndian.PutUint32(h[24:], c.cmdSN)
	if op&0x40 == 0 {
		c.cmdSN++
	}
	return h
}

// command makes a SCSI command.
func (c *client) command(flags byte, length int, cdb ...byte) pdu.Header {
	h := c.request(pdu.OpCommand, flags)
	binary.BigEndian.PutUint32(h[20:], uint32(length))
	copy(h[32:], cdb)
	return h
}

const (
	fRead  = pdu.FlagFinal | pdu.FlagRead
	fWrite = pdu.FlagFinal | pdu.FlagWrite
)

// result is what a command came to.
type result struct {
	status byte
	data   []byte
	sense  [3]byte // key, code, qualifier
	over   int     // residual, negative for underflow
}

func (r result) String() string {
	return fmt.Sprintf("status %#x sense %x residual %d, %d bytes", r.status, r.sense, r.over, len(r.data))
}

// finish receives until a command has ended.
func (c *client) finish() result {
	c.t.Helper()
	var r result
	for {
		h, b := c.recv()
		switch h.Op() {
		case pdu.OpDataIn:
			if off := int(h.BufferOffset()); off != len(r.data) {
				c.t.Fatalf("data at %d, want %d", off, len(r.data))
			}
			r.data = append(r.data, b...)
			if h[1]&pdu.FlagStatus == 0 {
				continue
			}
		case pdu.OpResponse:
			if len(b) >= 2+14 && b[2]&0x7f == 0x70 {
				r.sense = [3]byte{b[2+2], b[2+12], b[2+13]}
			}
		default:
			c.t.Fatalf("opcode %#x in place of a response", h.Op())
		}
		r.status = h[3]
		n := int(binary.BigEndian.Uint32(h[44:]))
		if h[1]&4 != 0 {
			r.over = n
		} else if h[1]&2 != 0 {
			r.over = -n
		}
		return r
	}
}

// ready takes the unit attentions that are there.
func (c *client) ready() {
	c.t.Helper()
	for range 10 {
		c.send(c.command(pdu.FlagFinal, 0, 0), nil)
		if c.finish().status == 0 {
			return
		}
	}
	c.t.Fatal("the unit does not become ready")
}

func rw(op byte, block, count int) []byte {
	b := make([]byte, 10)
	b[0] = op
	binary.BigEndian.PutUint32(b[2:], uint32(block))
	binary.BigEndian.PutUint16(b[7:], uint16(count))
	return b
}

func (c *client) read(block, count int) []byte {
	c.t.Helper()
	c.send(c.command(fRead, count*512, rw(0x28, block, count)...), nil)
	r := c.finish()
	if r.status != 0 || len(r.data) != count*512 {
		c.t.Fatalf("read: %v", r)
	}
	return r.data
}

// write writes with immediate data only.
func (c *client) write(block int, p []byte) result {
	c.t.Helper()
	c.send(c.command(fWrite, len(p), rw(0x2a, block, len(p)/512)...), p)
	return c.finish()
}

// dataOut makes a Data-Out.
func (c *client) dataOut(tag, transfer, sn uint32, off int, final bool) pdu.Header {
	var h pdu.Header
	h[0] = pdu.OpDataOut
	if final {
		h[1] = pdu.FlagFinal
	}
	binary.BigEndian.PutUint32(h[16:], tag)
	binary.BigEndian.PutUint32(h[20:], transfer)
	binary.BigEndian.PutUint32(h[36:], sn)
	binary.BigEndian.PutUint32(h[40:], uint32(off))
	return h
}

func pattern(n int, seed byte) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(i*7) ^ byte(i>>8) ^ seed
	}
	return p
}

// chap logs in with CHAP, both ways, and checks the target's proof.
func (c *client) chap(user, secret string) pdu.LoginStatus {
	c.t.Helper()
	c.send(c.loginHeader(0x81, 1), text("InitiatorName="+me, "TargetName="+prefix+":vm1", "AuthMethod=CHAP,None"))
	_, b := c.recv()
	c.note(b)
	c.send(c.loginHeader(0x01, 1), text("CHAP_A=5"))
	_, b = c.recv()
	c.note(b)
	challenge, err := hex.DecodeString(strings.TrimPrefix(c.answered["CHAP_C"], "0x"))
	if err != nil {
		c.t.Fatal(err)
	}
	id, err := strconv.Atoi(c.answered["CHAP_I"])
	if err != nil {
		c.t.Fatal(err)
	}
	proof := md5.Sum(append(append([]byte{byte(id)}, secret...), challenge...))
	c.send(c.loginHeader(0x81, 1), text("CHAP_N="+user, "CHAP_R=0x"+hex.EncodeToString(proof[:]), "CHAP_I=7", "CHAP_C=0x0102030405060708"))
	r, b := c.recv()
	if s := loginStatus(r); s != pdu.LoginOK {
		return s
	}
	c.note(b)
	ours := md5.Sum(append([]byte{7}, "staple staple staple\x01\x02\x03\x04\x05\x06\x07\x08"...))
	if got := c.answered["CHAP_R"]; c.answered["CHAP_N"] != "target" || got != "0x"+hex.EncodeToString(ours[:]) {
		c.t.Errorf("the target's proof is %q by %q", got, c.answered["CHAP_N"])
	}
	c.send(c.loginHeader(0x87, 1), nil)
	r, _ = c.recv()
	return loginStatus(r)
}
