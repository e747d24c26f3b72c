package iscsi

import (
	"encoding/binary"
	"fmt"
	"testing"

	"sheepdog/frontends/iscsi/internal/pdu"
	"sheepdog/frontends/iscsi/internal/scsi"
)

// prOut sends PERSISTENT RESERVE OUT.
func (c *client) prOut(action, kind byte, key, newKey uint64) result {
	c.t.Helper()
	b := make([]byte, 24)
	binary.BigEndian.PutUint64(b, key)
	binary.BigEndian.PutUint64(b[8:], newKey)
	c.send(c.command(fWrite, 24, 0x5f, action, kind, 0, 0, 0, 0, 0, 24), b)
	return c.finish()
}

func (c *client) prIn(action byte) []byte {
	c.t.Helper()
	c.send(c.command(fRead, 512, 0x5e, action, 0, 0, 0, 0, 0, 2, 0), nil)
	r := c.finish()
	if r.status != 0 {
		c.t.Fatalf("PERSISTENT RESERVE IN: %v", r)
	}
	return r.data
}

const conflict = 0x18

// Who may do what, by type of reservation: a registered and an unregistered initiator beside the holder.
func TestReservationTypes(t *testing.T) {
	for _, row := range []struct {
		kind                         byte
		readReg, writeReg            byte
		readUnregistered, writeUnreg byte
	}{
		{scsi.WriteExclusive, 0, conflict, 0, conflict},
		{scsi.ExclusiveAccess, conflict, conflict, conflict, conflict},
		{scsi.WriteExclusiveRegistrants, 0, 0, 0, conflict},
		{scsi.ExclusiveAccessRegistrants, 0, 0, conflict, conflict},
		{scsi.WriteExclusiveAllRegistrants, 0, 0, 0, conflict},
		{scsi.ExclusiveAccessAll, 0, 0, conflict, conflict},
	} {
		t.Run(fmt.Sprint(row.kind), func(t *testing.T) {
			h := serve(t, nil)
			a, b, c := h.login("vm1", me), h.login("vm1", me+"2"), h.login("vm1", me+"3")
			for i, x := range []*client{a, b, c} {
				x.ready()
				if i < 2 {
					if r := x.prOut(0, 0, 0, uint64(i+1)); r.status != 0 {
						t.Fatalf("register: %v", r)
					}
				}
			}
			if r := a.prOut(1, row.kind, 1, 0); r.status != 0 {
				t.Fatalf("reserve: %v", r)
			}
			status := func(x *client, op byte) byte {
				if op == 0x28 {
					x.send(x.command(fRead, 512, rw(0x28, 0, 1)...), nil)
					return x.finish().status
				}
				return x.write(0, make([]byte, 512)).status
			}
			got := []byte{status(a, 0x28), status(a, 0x2a), status(b, 0x28), status(b, 0x2a), status(c, 0x28), status(c, 0x2a)}
			want := []byte{0, 0, row.readReg, row.writeReg, row.readUnregistered, row.writeUnreg}
			if fmt.Sprint(got) != fmt.Sprint(want) {
				t.Errorf("holder, registered, unregistered; read, write: %v, want %v", got, want)
			}
			// What is needed to find out and to get free is allowed to all.
			c.prIn(1)
			c.ready()
			if r := b.prOut(1, scsi.WriteExclusive, 2, 0); r.status != conflict {
				t.Errorf("another type: %v", r)
			}
			if h.store.fences.Load() == 0 {
				t.Error("other gateways may have something under way")
			}
		})
	}
}

// PREEMPT AND ABORT: what the victim has under way has ended when it is answered, and the victim is told.
func TestPreemptAndAbort(t *testing.T) {
	h := serve(t, nil)
	a, b := h.login("vm1", me), h.login("vm1", me+"2")
	a.ready()
	b.ready()
	a.prOut(0, 0, 0, 1)
	b.prOut(0, 0, 0, 2)
	b.prOut(1, scsi.WriteExclusiveRegistrants, 2, 0)
	d := h.store.disks["vm1"]
	hold := make(chan struct{})
	d.mu.Lock()
	d.hold = hold
	d.mu.Unlock()
	b.send(b.command(fWrite, 512, rw(0x2a, 0, 1)...), pattern(512, 1))
	waitFor(t, func() bool { return d.held.Load() == 1 })
	p := make([]byte, 24)
	binary.BigEndian.PutUint64(p, 1)
	binary.BigEndian.PutUint64(p[8:], 2)
	a.send(a.command(fWrite, 24, 0x5f, 5, scsi.WriteExclusiveRegistrants, 0, 0, 0, 0, 0, 24), p)
	waitFor(t, func() bool { return h.store.fences.Load() > 1 })
	d.mu.Lock()
	d.hold = nil
	d.mu.Unlock()
	close(hold)
	if r := a.finish(); r.status != 0 {
		t.Fatalf("preempt: %v", r)
	}
	b.send(b.command(fWrite, 512, rw(0x2a, 0, 1)...), pattern(512, 1))
	if r := b.finish(); r.status != 2 || r.sense != [3]byte{6, 0x2a, 5} {
		t.Errorf("the victim is told: %v", r)
	}
	if r := b.write(0, pattern(512, 1)); r.status != conflict {
		t.Errorf("the victim writes: %v", r)
	}
	if k := a.prIn(0); len(k) != 16 || k[15] != 1 {
		t.Errorf("keys: %x", k)
	}
}

// What another gateway changed in between is not lost, and is told.
func TestReservationsOfOtherGateways(t *testing.T) {
	h := serve(t, nil)
	a := h.login("vm1", me)
	a.ready()
	elsewhere := scsi.Nexus{Port: "iqn.2026-11.test:far,i,0x1", Group: 2}
	h.store.mu.Lock()
	h.store.before = func() { // another gateway is quicker
		d := h.store.disks["vm1"]
		r, _ := scsi.DecodeReservations(d.text)
		r.Keys = append(r.Keys, scsi.Registration{Nexus: elsewhere, Key: 99})
		d.text, d.revision = r.Encode(), d.revision+1
		h.store.changes.Add(1)
	}
	h.store.mu.Unlock()
	if r := a.prOut(0, 0, 0, 1); r.status != 0 {
		t.Fatalf("register: %v", r)
	}
	if k := a.prIn(0); len(k) != 24 {
		t.Errorf("keys: %x", k)
	}
	// The other one preempts us.
	h.store.mu.Lock()
	d := h.store.disks["vm1"]
	r, _ := scsi.DecodeReservations(d.text)
	r.Keys = r.Keys[:0]
	r.Keys = append(r.Keys, scsi.Registration{Nexus: elsewhere, Key: 99})
	r.Holder = &scsi.Holder{Nexus: elsewhere, Type: scsi.WriteExclusive}
	d.text, d.revision = r.Encode(), d.revision+1
	h.store.changes.Add(1)
	h.store.mu.Unlock()
	a.send(a.command(pdu.FlagFinal, 0, 0), nil)
	if r := a.finish(); r.sense != [3]byte{6, 0x2a, 5} {
		t.Errorf("a registration that is gone: %v", r)
	}
	if r := a.write(0, pattern(512, 0)); r.status != conflict {
		t.Errorf("write against a reservation of another gateway's: %v", r)
	}
}

// CHAP lets in who knows the secrets, and nobody else.
func TestChap(t *testing.T) {
	h := serve(t, func(c *Config) {
		c.Chap = Chap{User: "joe", Secret: "correct horse battery", OurUser: "target", OurSecret: "staple staple staple"}
	})
	if s := h.dial().tryLogin("vm1", me, 1); s != pdu.LoginAuthentication {
		t.Errorf("login without CHAP: status %#x", uint16(s))
	}
	c := h.dial()
	c.send(c.loginHeader(0x81, 1), text("InitiatorName="+me, "TargetName="+prefix+":vm1", "AuthMethod=None"))
	if r, _ := c.recv(); loginStatus(r) != pdu.LoginAuthentication {
		t.Errorf("AuthMethod=None: status %#x", uint16(loginStatus(r)))
	}
	for _, row := range []struct {
		user, secret string
		want         pdu.LoginStatus
	}{{"joe", "correct horse battery", pdu.LoginOK}, {"joe", "wrong horse battery", pdu.LoginAuthentication}, {"jim", "correct horse battery", pdu.LoginAuthentication}} {
		if got := h.dial().chap(row.user, row.secret); got != row.want {
			t.Errorf("%s with %q: status %#x", row.user, row.secret, uint16(got))
		}
	}
	if n := h.Counters().BadLogins; n != 4 {
		t.Errorf("%d refused logins are counted", n)
	}
}
