package iscsi

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"
	"testing"
	"time"

	"sheepdog/frontends/iscsi/internal/pdu"
	"sheepdog/vdi"
)

const me = "iqn.2026-11.test:me"

var digests = [][]string{nil, {"HeaderDigest=CRC32C,None"}, {"DataDigest=CRC32C"}, {"HeaderDigest=CRC32C", "DataDigest=CRC32C"}}

// Data comes back as it was written, however it is cut into PDUs.
func TestReadWrite(t *testing.T) {
	h := serve(t, nil)
	for _, d := range digests {
		for _, seg := range []int{512, 8192, 262144} {
			t.Run(fmt.Sprint(d, seg), func(t *testing.T) {
				c := h.login("vm1", me, append([]string{fmt.Sprintf("MaxRecvDataSegmentLength=%d", seg), "InitialR2T=No", "MaxBurstLength=131072", "MaxOutstandingR2T=4"}, d...)...)
				defer c.conn.Close()
				c.ready()
				for _, n := range []int{512, 4096, 65536, 1 << 20} {
					want := pattern(n, byte(n>>9))
					c.writeAll(16, want, 70000)
					if got := c.read(16, n/512); !bytes.Equal(got, want) {
						t.Fatalf("%d bytes do not come back", n)
					}
				}
			})
		}
	}
}

// writeAll writes with immediate data, unsolicited data and R2Ts, in segments of at most seg bytes.
func (c *client) writeAll(block int, p []byte, seg int) {
	c.t.Helper()
	seg = seg &^ 3
	first := min(len(p), 65536, seg)
	unsolicited := min(len(p), 65536)
	h := c.command(pdu.FlagWrite, len(p), rw(0x2a, block, len(p)/512)...)
	if first == unsolicited {
		h[1] |= pdu.FlagFinal
	}
	c.send(h, p[:first])
	tag := h.TaskTag()
	for off, sn := first, uint32(0); off < unsolicited; sn++ {
		n := min(seg, unsolicited-off)
		c.send(c.dataOut(tag, pdu.NoTag, sn, off, off+n == unsolicited), p[off:off+n])
		off += n
	}
	for {
		r, b := c.recv()
		if r.Op() == pdu.OpResponse {
			if r[3] != 0 {
				c.t.Fatalf("write: status %#x, sense %x", r[3], b)
			}
			return
		}
		if r.Op() != pdu.OpR2T {
			c.t.Fatalf("opcode %#x in place of an R2T", r.Op())
		}
		off, n := int(r.BufferOffset()), int(binary.BigEndian.Uint32(r[44:]))
		for sn, end := uint32(0), off+n; off < end; sn++ {
			k := min(seg, end-off)
			c.send(c.dataOut(tag, r.TransferTag(), sn, off, off+k == end), p[off:off+k])
			off += k
		}
	}
}

// What is negotiated: each row is what is offered and what must be answered.
func TestNegotiation(t *testing.T) {
	h := serve(t, nil)
	for _, row := range []struct{ key, offered, want string }{
		{"HeaderDigest", "CRC32C", "CRC32C"}, {"HeaderDigest", "None,CRC32C", "None"}, {"HeaderDigest", "MD5", "Reject"},
		{"MaxConnections", "8", "1"}, {"ErrorRecoveryLevel", "2", "0"}, {"InitialR2T", "Yes", "Yes"}, {"InitialR2T", "No", "No"},
		{"ImmediateData", "No", "No"}, {"ImmediateData", "maybe", "Reject"}, {"MaxBurstLength", "16777215", "1048576"},
		{"MaxBurstLength", "0x2000", "8192"}, {"FirstBurstLength", "511", "Reject"}, {"MaxOutstandingR2T", "65535", "16"},
		{"DefaultTime2Wait", "0", "2"}, {"DefaultTime2Retain", "20", "0"}, {"DataPDUInOrder", "No", "Yes"},
		{"DataSequenceInOrder", "No", "Yes"}, {"IFMarker", "Yes", "No"}, {"OFMarkInt", "1~65535", "Irrelevant"},
		{"X-com.example.test", "1", "NotUnderstood"}, {"MaxRecvDataSegmentLength", "1048576", "262144"},
		{"TaskReporting", "FastAbort,RFC3720", "RFC3720"}, {"iSCSIProtocolLevel", "2", "1"},
	} {
		c := h.dial()
		if s := c.tryLogin("vm1", me, 7, row.key+"="+row.offered); s != pdu.LoginOK {
			t.Fatalf("%s=%s: status %#x", row.key, row.offered, uint16(s))
		}
		if got := c.answered[row.key]; got != row.want {
			t.Errorf("%s=%s is answered %q, want %q", row.key, row.offered, got, row.want)
		}
		c.conn.Close()
	}
}

func TestDiscovery(t *testing.T) {
	h := serve(t, func(c *Config) { c.Portals = func() []string { return []string{"10.0.0.2:3260,2"} } })
	h.store.snapshot("vm1", "daily")
	c := h.login("", me)
	c.send(c.request(pdu.OpText, pdu.FlagFinal), text("SendTargets=All"))
	_, b := c.recv()
	for _, want := range []string{prefix + ":vm1\x00", prefix + ":vm2\x00", prefix + ":vm1.daily\x00", "TargetAddress=" + h.addr + ",1\x00", "TargetAddress=10.0.0.2:3260,2\x00"} {
		if !strings.Contains(string(b), want) {
			t.Errorf("no %q in %q", want, b)
		}
	}
	c.send(c.command(pdu.FlagFinal, 0, 0), nil) // "SCSI commands are not for discovery sessions"
	if r, _ := c.recv(); r.Op() != pdu.OpReject {
		t.Errorf("a command in a discovery session is answered with %#x", r.Op())
	}
	// A long list comes in pieces.
	c = h.login("", me, "MaxRecvDataSegmentLength=512")
	var all []byte
	q := c.request(pdu.OpText, pdu.FlagFinal)
	data := text("SendTargets=All")
	for range 20 {
		c.send(q, data)
		r, b := c.recv()
		if len(b) > 512 {
			t.Fatalf("%d bytes", len(b))
		}
		if all = append(all, b...); r.Final() {
			break
		}
		q, data = c.request(pdu.OpText, pdu.FlagFinal), nil
		binary.BigEndian.PutUint32(q[20:], r.TransferTag())
	}
	if !bytes.HasSuffix(all, []byte{0}) || bytes.Count(all, []byte("TargetName=")) != 3 {
		t.Errorf("%q", all)
	}
}

func TestSnapshotIsReadOnly(t *testing.T) {
	h := serve(t, nil)
	h.store.snapshot("vm1", "daily")
	c := h.login("vm1.daily", me)
	c.ready()
	if r := c.write(0, pattern(512, 1)); r.status != 2 || r.sense != [3]byte{7, 0x27, 0} {
		t.Errorf("write to a snapshot: %v", r)
	}
	c.read(0, 8)
}

// NOP-Out with a place in the order of commands works, as libiscsi and QEMU send it, and so
// does an immediate one.
func TestPing(t *testing.T) {
	h := serve(t, nil)
	c := h.login("vm1", me)
	c.ready()
	for _, op := range []byte{pdu.OpNOPOut, pdu.OpNOPOut | 0x40} {
		for _, n := range []int{0, 5, 4096} {
			q := c.request(op, pdu.FlagFinal)
			c.send(q, pattern(n, 3))
			r, b := c.recv()
			if r.Op() != pdu.OpNOPIn || r.TaskTag() != q.TaskTag() || !bytes.Equal(b, pattern(n, 3)) {
				t.Errorf("ping with %d bytes: opcode %#x, %d bytes", n, r.Op(), len(b))
			}
		}
	}
	c.read(0, 1)
}

// An initiator that says nothing is asked whether it is there; who answers stays.
func TestSilence(t *testing.T) {
	h := serve(t, func(c *Config) { c.PingEvery = 20 * time.Millisecond })
	c := h.login("vm1", me)
	for range 5 {
		r, _ := c.recv()
		if r.Op() != pdu.OpNOPIn || r.TransferTag() == pdu.NoTag {
			t.Fatalf("opcode %#x", r.Op())
		}
		q := c.request(pdu.OpNOPOut|0x40, pdu.FlagFinal)
		binary.BigEndian.PutUint32(q[16:], pdu.NoTag)
		binary.BigEndian.PutUint32(q[20:], r.TransferTag())
		c.send(q, nil)
	}
	c.ready2()
	c.gone() // it does not answer any more
}

// ready2 is ready among pings.
func (c *client) ready2() {
	q := c.command(pdu.FlagFinal, 0, 0)
	c.send(q, nil)
	for {
		if r, _ := c.recv(); r.Op() == pdu.OpResponse {
			return
		}
	}
}

// A command that is aborted has ended when that is answered, and is not answered itself.
func TestAbortTask(t *testing.T) {
	h := serve(t, nil)
	c := h.login("vm1", me)
	c.ready()
	d := h.store.disks["vm1"]
	hold := make(chan struct{})
	d.mu.Lock()
	d.hold = hold
	d.mu.Unlock()
	w := c.command(fWrite, 512, rw(0x2a, 4, 1)...)
	c.send(w, pattern(512, 9))
	waitFor(t, func() bool { return d.held.Load() == 1 })
	q := c.request(pdu.OpTask|0x40, pdu.FlagFinal|pdu.TaskAbort)
	binary.BigEndian.PutUint32(q[20:], w.TaskTag())
	c.send(q, nil)
	c.conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
	if r, _, err := c.try(); err == nil {
		t.Fatalf("answered with %#x while the write is under way", r.Op())
	}
	c.conn.SetReadDeadline(time.Now().Add(2 * time.Minute))
	d.mu.Lock()
	d.hold = nil
	d.mu.Unlock()
	close(hold)
	r, _ := c.recv()
	if r.Op() != pdu.OpTaskAnswer || r[2] != pdu.TaskComplete {
		t.Fatalf("opcode %#x, response %d", r.Op(), r[2])
	}
	// One that waits for its data is gone at once, and its data is thrown away.
	w = c.command(fWrite, 1<<20, rw(0x2a, 100, 2048)...)
	c.send(w, pattern(512, 9))
	r2t, _ := c.recv()
	if r2t.Op() != pdu.OpR2T {
		t.Fatalf("opcode %#x", r2t.Op())
	}
	binary.BigEndian.PutUint32(q[16:], 7777)
	binary.BigEndian.PutUint32(q[20:], w.TaskTag())
	c.send(q, nil)
	if r, _ := c.recv(); r.Op() != pdu.OpTaskAnswer || r[2] != pdu.TaskComplete {
		t.Fatalf("opcode %#x, response %d", r.Op(), r[2])
	}
	c.send(c.dataOut(w.TaskTag(), r2t.TransferTag(), 0, 512, false), pattern(4096, 1))
	if !bytes.Equal(c.read(100, 8), make([]byte, 4096)) {
		t.Error("data of an aborted write is there")
	}
	binary.BigEndian.PutUint32(q[20:], 999999)
	c.send(q, nil)
	if r, _ := c.recv(); r[2] != pdu.TaskUnknown {
		t.Errorf("abort of nothing: response %d", r[2])
	}
}

func waitFor(t *testing.T, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("it does not happen")
		}
	}
}

// A reset aborts the commands of all sessions, and all are told.
func TestReset(t *testing.T) {
	h := serve(t, nil)
	a, b := h.login("vm1", me), h.login("vm1", me+"2")
	a.ready()
	b.ready()
	w := b.command(fWrite, 65536*2, rw(0x2a, 0, 256)...)
	b.send(w, nil)
	b.recv() // R2T
	q := a.request(pdu.OpTask, pdu.FlagFinal|pdu.TaskLUNReset)
	a.send(q, nil)
	if r, _ := a.recv(); r.Op() != pdu.OpTaskAnswer || r[2] != pdu.TaskComplete {
		t.Fatalf("opcode %#x, response %d", r.Op(), r[2])
	}
	for _, c := range []*client{a, b} {
		c.send(c.command(pdu.FlagFinal, 0, 0), nil)
		if r := c.finish(); r.sense != [3]byte{6, 0x29, 3} {
			t.Errorf("after a reset: %v", r)
		}
	}
}

// A new session of the same initiator port takes the place of the old one.
func TestReinstatement(t *testing.T) {
	h := serve(t, nil)
	a := h.login("vm1", me)
	b := h.login("vm1", me)
	a.gone()
	b.ready()
	if n := len(h.Sessions()); n != 1 {
		t.Errorf("%d sessions", n)
	}
}

func TestLogout(t *testing.T) {
	h := serve(t, nil)
	c := h.login("vm1", me)
	c.ready()
	c.send(c.request(pdu.OpLogout, pdu.FlagFinal), nil)
	if r, _ := c.recv(); r.Op() != pdu.OpLogoutDone || r[2] != 0 {
		t.Errorf("opcode %#x, response %d", r.Op(), r[2])
	}
	c.gone()
	waitFor(t, func() bool { return h.store.opens.Load() == 0 })
}

// Before it stops, the server asks initiators to log out.
func TestShutdownAsks(t *testing.T) {
	h := serve(t, nil)
	c := h.login("vm1", me)
	c.ready()
	done := make(chan struct{})
	go func() {
		h.Shutdown(t.Context())
		close(done)
	}()
	r, _ := c.recv()
	if r.Op() != pdu.OpAsync || r[36] != pdu.AsyncLogout {
		t.Errorf("opcode %#x, event %d", r.Op(), r[36])
	}
	c.gone()
	<-done
}

// How failures of the volume are told.
func TestFailures(t *testing.T) {
	h := serve(t, nil)
	c := h.login("vm1", me)
	c.ready()
	d := h.store.disks["vm1"]
	for _, row := range []struct {
		err    error
		status byte
		sense  [3]byte
	}{
		{vdi.ErrNoSpace, 2, [3]byte{7, 0x27, 7}}, {vdi.ErrCorrupt, 2, [3]byte{3, 0x11, 0}}, {vdi.ErrIO, 2, [3]byte{4, 0x44, 0}},
		{vdi.ErrUnavailable, 2, [3]byte{2, 4, 1}}, {vdi.ErrBusy, 8, [3]byte{}}, {vdi.ErrStale, 8, [3]byte{}}, {vdi.ErrClosed, 8, [3]byte{}},
		{vdi.ErrReadOnly, 2, [3]byte{7, 0x27, 0}}, {vdi.ErrLocked, 2, [3]byte{7, 0x27, 0}},
	} {
		d.mu.Lock()
		d.fail[vdi.OpWrite] = fmt.Errorf("test: %w", row.err)
		d.mu.Unlock()
		if r := c.write(0, pattern(512, 0)); r.status != row.status || r.sense != row.sense {
			t.Errorf("%v: %v", row.err, r)
		}
	}
}

// A size and paths that change behind a session's back are told once, and are then as they are.
func TestChangesAreTold(t *testing.T) {
	h := serve(t, func(c *Config) { c.PingEvery, c.SettlePaths = 4*time.Second, 500*time.Millisecond }) // upkeep looks every second
	h.pong = true
	c := h.login("vm1", me)
	c.ready()
	capacity := func() uint32 {
		c.send(c.command(fRead, 8, 0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0), nil)
		r := c.finish()
		if r.status != 0 {
			t.Fatal(r)
		}
		return binary.BigEndian.Uint32(r.data) + 1
	}
	before := capacity()
	h.store.mu.Lock()
	d := h.store.disks["vm1"]
	d.mu.Lock()
	d.Disk.Size *= 2
	d.data, d.hole = append(d.data, make([]byte, len(d.data))...), append(d.hole, make([]bool, len(d.hole))...)
	d.mu.Unlock()
	h.store.changes.Add(1)
	h.store.mu.Unlock()
	// At the next command, not some time later.
	c.send(c.command(pdu.FlagFinal, 0, 0), nil)
	if r := c.finish(); r.sense != [3]byte{6, 0x2a, 9} {
		t.Errorf("after a resize: %v, want CAPACITY DATA HAS CHANGED", r)
	}
	if now := capacity(); now != 2*before {
		t.Errorf("capacity %d, want %d", now, 2*before)
	}
	if r := c.write(int(before), pattern(4096, 1)); r.status != 0 {
		t.Errorf("write to what was added: %v", r)
	}
	// A rollback.
	h.store.mu.Lock()
	d.Disk.Replaced++
	h.store.changes.Add(1)
	h.store.mu.Unlock()
	c.send(c.command(fRead, 512, rw(0x28, 0, 1)...), nil)
	if r := c.finish(); r.sense != [3]byte{6, 0x28, 0} {
		t.Errorf("after a rollback: %v, want MEDIUM MAY HAVE CHANGED", r)
	}
	h.store.mu.Lock()
	h.store.paths = []Path{{Group: 1}, {Group: 2, Owner: true}}
	h.store.changes.Add(1)
	h.store.mu.Unlock()
	c.until(0, [3]byte{6, 0x2a, 6})
	c.send(c.command(fRead, 128, 0xa3, 0x0a, 0, 0, 0, 0, 0, 0, 0, 128, 0, 0), nil)
	if r := c.finish(); r.status != 0 || len(r.data) != 28 || r.data[4]&15 != 1 || r.data[16]&15 != 0 {
		t.Errorf("target port groups: %v % x", r, r.data)
	}
}
