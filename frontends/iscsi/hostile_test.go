package iscsi

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"net"
	"net/netip"
	"testing"
	"time"

	"sheepdog/frontends/iscsi/internal/pdu"
)

// undisturbed has a session that works while a test does its worst.
func (h *harness) undisturbed() (check func()) {
	c := h.login("vm2", "iqn.2026-11.test:bystander")
	c.ready()
	p := pattern(8192, 77)
	if r := c.write(64, p); r.status != 0 {
		h.t.Fatalf("write: %v", r)
	}
	return func() {
		h.t.Helper()
		if !bytes.Equal(c.read(64, 16), p) {
			h.t.Error("the bystander reads something else")
		}
	}
}

// Who sends anything but a login at first is disconnected.
func TestGarbageBeforeLogin(t *testing.T) {
	h := serve(t, func(c *Config) { c.LoginTimeout = 2 * time.Second })
	check := h.undisturbed()
	r := rand.New(rand.NewPCG(1, 2))
	for i := range 200 {
		c := h.dial()
		b := make([]byte, 48+r.IntN(4096))
		for k := range b {
			b[k] = byte(r.Uint32())
		}
		if i%2 == 0 {
			b[0] = 0x43 // a login whose rest is nonsense
		}
		c.conn.Write(b)
		c.conn.(*net.TCPConn).CloseWrite()
		c.gone()
	}
	for op := range 64 {
		if op == pdu.OpLogin {
			continue
		}
		c := h.dial()
		q := c.request(byte(op), pdu.FlagFinal)
		c.send(q, nil)
		c.gone()
	}
	check()
}

// Lengths are refused before memory is taken.
func TestGiantLengths(t *testing.T) {
	h := serve(t, nil)
	check := h.undisturbed()
	for op := range 64 {
		c := h.login("vm1", me)
		q := c.request(byte(op), pdu.FlagFinal)
		q.SetDataSize(0xffffff)
		c.conn.Write(q[:])
		c.gone()
	}
	// An expected length of 4 GiB takes no memory.
	c := h.login("vm1", me)
	c.ready()
	q := c.command(fRead, 0, rw(0x28, 0, 1)...)
	binary.BigEndian.PutUint32(q[20:], 0xffffffff)
	c.send(q, nil)
	if r := c.finish(); r.status != 0 || len(r.data) != 512 {
		t.Errorf("read with a giant expected length: %v", r)
	}
	q = c.command(pdu.FlagWrite|pdu.FlagFinal, 0, rw(0x2a, 0, 1)...)
	binary.BigEndian.PutUint32(q[20:], 0xffffffff)
	c.send(q, pattern(512, 1))
	if r := c.finish(); r.status != 0 {
		t.Errorf("write with a giant expected length: %v", r)
	}
	if used := h.Counters().BufferBytes; used > 1<<20 {
		t.Errorf("%d bytes in use", used)
	}
	check()
}

// Each of these ended the process of another target (see what is known of gotgt).
func TestWhatKilledOthers(t *testing.T) {
	h := serve(t, nil)
	check := h.undisturbed()
	// Login with a TSIH that is not there, and with one that is.
	for _, live := range []bool{false, true} {
		tsih := uint16(4711)
		if live {
			h.login("vm1", me)
			tsih = h.Sessions()[0].TSIH
		}
		c := h.dial()
		q := c.loginHeader(0x87, 9)
		binary.BigEndian.PutUint16(q[14:], tsih)
		c.send(q, text("InitiatorName="+me, "TargetName="+prefix+":vm1"))
		if r, _ := c.recv(); loginStatus(r) != pdu.LoginNoSession {
			t.Errorf("login with TSIH %d: status %#x", tsih, uint16(loginStatus(r)))
		}
		c.gone()
	}
	c := h.login("vm1", me)
	c.ready()
	for _, row := range []struct {
		name   string
		flags  byte
		length int
		cdb    []byte
		status byte
	}{
		{"PREVENT ALLOW MEDIUM REMOVAL", pdu.FlagFinal, 0, []byte{0x1e, 0, 0, 0, 1}, 0},
		{"ORWRITE without data", pdu.FlagFinal, 0, []byte{0x8b, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1}, 2},
		{"UNMAP without W", pdu.FlagFinal, 0, []byte{0x42, 0, 0, 0, 0, 0, 0, 0, 24}, 2},
		{"PERSISTENT RESERVE OUT without W", pdu.FlagFinal, 0, []byte{0x5f, 0, 0, 0, 0, 0, 0, 0, 24}, 2},
		{"INQUIRY with W", fWrite, 512, []byte{0x12, 0, 0, 0, 255}, 0},
		{"MODE SENSE of no bytes", fRead, 0, []byte{0x1a, 0, 0x3f, 0, 0}, 0},
		{"READ CAPACITY(16) without R", pdu.FlagFinal, 0, []byte{0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32}, 0},
	} {
		q := c.command(row.flags, row.length, row.cdb...)
		var data []byte
		if row.flags&pdu.FlagWrite != 0 {
			data = pattern(row.length, 0)
		}
		c.send(q, data)
		if r := c.finish(); r.status != row.status {
			t.Errorf("%s: %v", row.name, r)
		}
	}
	check()
}

// WRITE whose expected length exceeds that of its CDB leaves the neighbours alone, and WRITE
// SAME writes.
func TestLengthsThatDiffer(t *testing.T) {
	h := serve(t, nil)
	c := h.login("vm1", me)
	c.ready()
	c.write(0, pattern(1024, 1))
	c.send(c.command(fWrite, 1024, rw(0x2a, 0, 1)...), pattern(1024, 2))
	if r := c.finish(); r.status != 0 || r.over != -512 {
		t.Errorf("longer than the CDB: %v", r)
	}
	got := c.read(0, 2)
	if !bytes.Equal(got[:512], pattern(1024, 2)[:512]) || !bytes.Equal(got[512:], pattern(1024, 1)[512:]) {
		t.Error("the neighbour was overwritten")
	}
	c.send(c.command(fWrite, 512, rw(0x41, 8, 64)...), pattern(512, 5))
	if r := c.finish(); r.status != 0 {
		t.Errorf("WRITE SAME: %v", r)
	}
	if got := c.read(71, 1); !bytes.Equal(got, pattern(512, 5)) {
		t.Error("WRITE SAME wrote nothing")
	}
}

// Data-Out that is more, less, or something else than was asked for.
func TestDataOutAttacks(t *testing.T) {
	h := serve(t, nil)
	check := h.undisturbed()
	c := h.login("vm1", me, "InitialR2T=Yes")
	c.ready()
	begin := func() (tag, transfer uint32) {
		q := c.command(fWrite, 8192, rw(0x2a, 0, 16)...)
		c.send(q, nil)
		r, _ := c.recv()
		return q.TaskTag(), r.TransferTag()
	}
	incorrect := [3]byte{0x0b, 0x0c, 0x0d}
	tag, ttt := begin()
	c.send(c.dataOut(tag, ttt, 0, 0, true), pattern(16384, 0)) // more
	if r := c.finish(); r.status != 2 || r.sense != incorrect {
		t.Errorf("too much data: %v", r)
	}
	tag, ttt = begin()
	c.send(c.dataOut(tag, ttt, 0, 0, true), pattern(4096, 0)) // less
	if r := c.finish(); r.status != 2 || r.sense != incorrect {
		t.Errorf("too little data: %v", r)
	}
	tag, ttt = begin()
	c.send(c.dataOut(tag, ttt, 5, 0, true), pattern(8192, 0)) // wrong DataSN
	if r := c.finish(); r.status != 2 || r.sense != incorrect {
		t.Errorf("wrong DataSN: %v", r)
	}
	tag, ttt = begin()
	c.send(c.dataOut(tag, ttt, 0, 1<<30, true), pattern(8192, 0)) // far away
	if r := c.finish(); r.status != 2 || r.sense != incorrect {
		t.Errorf("data elsewhere: %v", r)
	}
	c.send(c.dataOut(tag, 12345, 0, 0, true), pattern(8192, 0)) // for nobody
	if got := c.read(0, 16); !bytes.Equal(got, make([]byte, 8192)) {
		t.Error("something was written")
	}
	// Unsolicited data that was not agreed on, and immediate data beyond what is expected.
	q := c.command(pdu.FlagWrite, 8192, rw(0x2a, 0, 16)...)
	c.send(q, pattern(512, 0))
	c.send(c.dataOut(q.TaskTag(), pdu.NoTag, 0, 512, true), pattern(7680, 0))
	if r := c.finish(); r.status != 2 || r.sense != [3]byte{0x0b, 0x0c, 0x0c} {
		t.Errorf("unsolicited data: %v", r)
	}
	c.send(c.command(fWrite, 512, rw(0x2a, 0, 1)...), pattern(1024, 0))
	if r := c.finish(); r.status != 2 || r.sense != [3]byte{0x0b, 0x0c, 0x0c} {
		t.Errorf("immediate data beyond the expected length: %v", r)
	}
	// A session that ends in the middle of its data.
	begin()
	c.conn.Close()
	check()
}

// Commands out of the window are ignored; one that leaves others out ends the session.
func TestCommandNumbers(t *testing.T) {
	h := serve(t, nil)
	check := h.undisturbed()
	c := h.login("vm1", me)
	c.ready()
	for _, sn := range []uint32{c.maxSN + 1, c.cmdSN - 1, c.cmdSN + 1<<31, c.maxSN + 1000} {
		q := c.command(pdu.FlagFinal, 0, 0)
		c.cmdSN--
		binary.BigEndian.PutUint32(q[24:], sn)
		c.send(q, nil)
	}
	c.read(0, 1) // is answered, and nothing before it
	q := c.command(pdu.FlagFinal, 0, 0)
	binary.BigEndian.PutUint32(q[24:], c.cmdSN+3)
	c.send(q, nil)
	c.gone()
	// The same tag twice.
	c = h.login("vm1", me)
	c.ready()
	w := c.command(fWrite, 8192, rw(0x2a, 0, 16)...)
	c.send(w, nil)
	c.recv() // R2T
	x := c.command(pdu.FlagFinal, 0, 0)
	copy(x[16:20], w[16:20])
	c.send(x, nil)
	c.gone()
	check()
}

// More immediate commands than there may be are rejected.
func TestImmediateFlood(t *testing.T) {
	h := serve(t, nil)
	c := h.login("vm1", me)
	c.ready()
	rejects := 0
	for range 2 * maxImmediate {
		q := c.command(fWrite, 8192, rw(0x2a, 0, 16)...)
		c.cmdSN--
		q[0] |= 0x40
		c.send(q, nil)
		if r, _ := c.recv(); r.Op() == pdu.OpReject && r[2] == pdu.RejectTooMany {
			rejects++
		}
	}
	if rejects != maxImmediate {
		t.Errorf("%d rejects", rejects)
	}
	c.read(0, 1)
}

// Wrong digests: of a header they end the session, of data the command.
func TestWrongDigests(t *testing.T) {
	h := serve(t, nil)
	check := h.undisturbed()
	c := h.login("vm1", me, "HeaderDigest=CRC32C")
	c.ready()
	q := c.command(pdu.FlagFinal, 0, 0)
	c.conn.Write(append(q[:], 1, 2, 3, 4))
	c.gone()

	for _, n := range []int{4096, 200 << 10} { // in one piece, and received to where it belongs
		c = h.login("vm1", me, "DataDigest=CRC32C", "InitialR2T=Yes", "MaxBurstLength=1048576")
		c.ready()
		q = c.command(fWrite, n, rw(0x2a, 0, n/512)...)
		c.send(q, nil)
		r2t, _ := c.recv()
		d := c.dataOut(q.TaskTag(), r2t.TransferTag(), 0, 0, true)
		d.SetDataSize(n)
		c.conn.Write(append(append(d[:], pattern(n, 1)...), 9, 9, 9, 9))
		if r, _ := c.recv(); r.Op() != pdu.OpReject || r[2] != pdu.RejectDataDigest {
			t.Fatalf("opcode %#x", r.Op())
		}
		if r := c.finish(); r.status != 2 || r.sense != [3]byte{0x0b, 0x47, 5} {
			t.Errorf("damaged data: %v", r)
		}
		if !bytes.Equal(c.read(0, n/512), make([]byte, n)) {
			t.Error("damaged data was written")
		}
		c.conn.Close()
	}
	check()
}

// A client that takes no answers is no longer read from, and costs little.
func TestSlowReader(t *testing.T) {
	h := serve(t, func(c *Config) { c.StallTimeout = 200 * time.Millisecond; c.LingerTimeout = 100 * time.Millisecond })
	check := h.undisturbed()
	c := h.login("vm1", me)
	c.conn.(*net.TCPConn).SetReadBuffer(4096)
	go func() {
		for range 100000 {
			q := c.command(fRead, 1<<20, rw(0x28, 0, 2048)...)
			if _, err := c.conn.Write(q[:]); err != nil {
				return
			}
		}
	}()
	for range 20 {
		time.Sleep(10 * time.Millisecond)
		if used := h.Counters().BufferBytes; used > h.cfg.SessionMemory+1<<20 {
			t.Errorf("%d bytes in use", used)
		}
	}
	check()
	c.conn.Close()
}

// Connections that say nothing are many and cost nothing else, up to the limit.
func TestHalfOpen(t *testing.T) {
	const limit = 300
	h := serve(t, func(c *Config) { c.MaxConnections = limit; c.LoginTimeout = time.Hour })
	check := h.undisturbed()
	var open []net.Conn
	for range limit + 50 {
		conn, err := net.Dial("tcp", h.addr)
		if err != nil {
			t.Fatal(err)
		}
		open = append(open, conn)
	}
	waitFor(t, func() bool { return h.Counters().TooMany >= 50 })
	check()
	for _, c := range open {
		c.Close()
	}
	waitFor(t, func() bool { return h.Counters().Connections == 1 }) // the bystander
	c := h.login("vm1", me)
	c.ready()
}

// Who does not log in is cut off after a while; who has logged in is not.
func TestNoLogin(t *testing.T) {
	h := serve(t, func(c *Config) { c.LoginTimeout = 5 * time.Second })
	check := h.undisturbed()
	var silent []*client
	for range 20 {
		silent = append(silent, h.dial())
	}
	for _, c := range silent {
		c.gone()
	}
	waitFor(t, func() bool { return h.Counters().Connections == 1 }) // the bystander
	check()
}

// Logins one after another leave nothing behind.
func TestManyLogins(t *testing.T) {
	h := serve(t, nil)
	for range 1000 {
		c := h.login("vm1", me)
		c.conn.Close()
	}
	waitFor(t, func() bool { return h.Counters().Connections == 0 && h.store.opens.Load() == 0 })
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.units) != 0 || len(h.handles) != 0 {
		t.Errorf("%d units and %d handles are left", len(h.units), len(h.handles))
	}
}

func TestAllow(t *testing.T) {
	h := serve(t, func(c *Config) { c.Allow = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")} })
	h.dial().gone()
	h = serve(t, func(c *Config) { c.Initiators = []string{"iqn.2026-11.test:other"} })
	if s := h.dial().tryLogin("vm1", me, 1); s != pdu.LoginForbidden {
		t.Errorf("an initiator that is not listed: status %#x", uint16(s))
	}
	if s := h.dial().tryLogin("vm9", "iqn.2026-11.test:other", 1); s != pdu.LoginNotFound {
		t.Errorf("a target that is not there: status %#x", uint16(s))
	}
}

// Random PDUs after a login never do harm.
func TestRandomPDUs(t *testing.T) {
	h := serve(t, nil)
	check := h.undisturbed()
	r := rand.New(rand.NewPCG(3, 4))
	for i := range 150 {
		c := h.login("vm1", me, digests[i%len(digests)]...)
		for range 30 {
			q := c.request(byte(r.UintN(64)), byte(r.Uint32()))
			if r.UintN(3) > 0 {
				q[0] = byte([]int{1, 2, 5, 0x41, 4, 0}[r.UintN(6)])
			}
			for range r.UintN(6) {
				q[8+r.UintN(40)] = byte(r.Uint32())
			}
			if r.UintN(2) == 0 {
				binary.BigEndian.PutUint32(q[24:], c.cmdSN-1)
			}
			c.send(q, pattern(int(r.UintN(2000)), byte(i)))
		}
		c.conn.Close()
	}
	check()
}
