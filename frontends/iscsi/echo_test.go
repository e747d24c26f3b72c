package iscsi

import (
	"encoding/binary"
	"testing"
	"time"

	"sheepdog/frontends/iscsi/internal/pdu"
	"sheepdog/frontends/iscsi/internal/scsi"
)

// serveTwo has two gateways serve the same disks.
func serveTwo(t *testing.T) (h, other *harness) {
	h = serve(t, nil)
	other = serve(t, func(c *Config) { c.Volumes, c.Node = h.store, "n2" })
	other.store = h.store
	h.store.others = append(h.store.others, h.Settle, other.Settle)
	return h, other
}

// hold keeps requests of vm1 back until the returned function is called.
func (h *harness) hold() (release func()) {
	d := h.store.disks["vm1"]
	hold := make(chan struct{})
	d.mu.Lock()
	d.hold = hold
	d.mu.Unlock()
	return func() {
		d.mu.Lock()
		d.hold = nil
		d.mu.Unlock()
		close(hold)
	}
}

// answered has a's answer come while what other gateways have under way is held back: only when
// that has ended it may.
func (h *harness) answered(a *client, release func()) pdu.Header {
	h.t.Helper()
	came := make(chan pdu.Header, 1)
	go func() {
		r, _ := a.recv()
		came <- r
	}()
	select {
	case r := <-came:
		h.t.Errorf("it is answered while another gateway has commands under way: opcode %#x", r.Op())
		release()
		return r
	case <-time.After(100 * time.Millisecond):
	}
	release()
	return <-came
}

// Resets, and the clearing of a task set, abort the commands of all gateways' sessions, and all are told.
func TestResetsReachOtherGateways(t *testing.T) {
	for _, row := range []struct {
		function byte
		sense    [3]byte
	}{{pdu.TaskLUNReset, [3]byte{6, 0x29, 3}}, {pdu.TaskWarmReset, [3]byte{6, 0x29, 3}}, {pdu.TaskClearSet, [3]byte{6, 0x2f, 0}}} {
		h, other := serveTwo(t)
		a, b := h.login("vm1", me), other.login("vm1", me+"2")
		a.ready()
		b.ready()
		release := h.hold()
		b.send(b.command(fRead, 512, rw(0x28, 0, 1)...), nil)
		waitFor(t, func() bool { return h.store.disks["vm1"].held.Load() == 1 })
		a.send(a.request(pdu.OpTask, pdu.FlagFinal|row.function), nil)
		if r := h.answered(a, release); r.Op() != pdu.OpTaskAnswer || r[2] != pdu.TaskComplete {
			t.Fatalf("opcode %#x, response %d", r.Op(), r[2])
		}
		b.send(b.command(pdu.FlagFinal, 0, 0), nil)
		if r := b.finish(); r.sense != row.sense { // and the read has no answer
			t.Errorf("function %d: at the other gateway: %v", row.function, r)
		}
		b.ready()
	}
}

// A cold reset ends the sessions of all gateways.
func TestColdResetReachesOtherGateways(t *testing.T) {
	h, other := serveTwo(t)
	a, b := h.login("vm1", me), other.login("vm1", me+"2")
	a.ready()
	b.ready()
	a.send(a.request(pdu.OpTask, pdu.FlagFinal|pdu.TaskColdReset), nil)
	if r, _ := a.recv(); r[2] != pdu.TaskComplete {
		t.Fatalf("response %d", r[2])
	}
	b.gone()
}

// PREEMPT AND ABORT ends the victim's commands at another gateway; those of others go on.
func TestPreemptAndAbortReachesOtherGateways(t *testing.T) {
	h, other := serveTwo(t)
	a, b, c := h.login("vm1", me), other.login("vm1", me+"2"), other.login("vm1", me+"3")
	for i, x := range []*client{a, b, c} {
		x.ready()
		x.prOut(0, 0, 0, uint64(i+1))
	}
	release := h.hold()
	for _, x := range []*client{b, c} {
		x.send(x.command(fRead, 512, rw(0x28, 0, 1)...), nil)
	}
	waitFor(t, func() bool { return h.store.disks["vm1"].held.Load() == 2 })
	p := make([]byte, 24)
	binary.BigEndian.PutUint64(p, 1)
	binary.BigEndian.PutUint64(p[8:], 2)
	a.send(a.command(fWrite, 24, 0x5f, 5, scsi.ExclusiveAccessRegistrants, 0, 0, 0, 0, 0, 24), p)
	if r := h.answered(a, release); r[3] != 0 {
		t.Fatalf("preempt: status %d", r[3])
	}
	if r := c.finish(); r.status != 0 {
		t.Errorf("a read that is none of the victim's: %v", r)
	}
	b.send(b.command(pdu.FlagFinal, 0, 0), nil)
	if r := b.finish(); r.sense != [3]byte{6, 0x2a, 5} {
		t.Errorf("the victim is told: %v", r)
	}
}

// An event that a gateway has done itself, and those from before it had the unit, mean nothing to it; of those that
// it has missed because there were too many, it takes the worst.
func TestEventsSince(t *testing.T) {
	var r scsi.Reservations
	for range 3 {
		r.Add(scsi.Event{Node: "n1", Kind: scsi.Cleared})
		r.Add(scsi.Event{Node: "n2", Kind: scsi.Aborted})
	}
	if l := r.Since(3, "n1"); len(l) != 2 || l[0].Serial != 4 || l[1].Serial != 6 {
		t.Errorf("after 3: %v", l)
	}
	if l := r.Since(6, "n3"); len(l) != 0 {
		t.Errorf("after all: %v", l)
	}
	for range 6 {
		r.Add(scsi.Event{Node: "n1", Kind: scsi.Cleared})
	}
	if l := r.Since(3, "n2"); len(l) != 8 || l[0].Kind != scsi.Reset {
		t.Errorf("some are forgotten: %v", l)
	}
}

// RESERVE ends with its session: also if that was at a gateway that has died.
func TestReserveOfADeadGateway(t *testing.T) {
	h, other := serveTwo(t)
	a, b := h.login("vm1", me), other.login("vm1", me+"2")
	a.ready()
	b.ready()
	b.send(b.command(pdu.FlagFinal, 0, 0x16), nil)
	if r := b.finish(); r.status != 0 {
		t.Fatalf("reserve: %v", r)
	}
	if r := a.write(0, pattern(512, 1)); r.status != conflict {
		t.Errorf("write against it: %v", r)
	}
	h.store.mu.Lock()
	h.store.dead = map[string]bool{"n2": true}
	h.store.mu.Unlock()
	if r := a.write(0, pattern(512, 1)); r.status != 0 {
		t.Errorf("write when the gateway is dead: %v", r)
	}
	a.send(a.command(pdu.FlagFinal, 0, 0x16), nil)
	if r := a.finish(); r.status != 0 {
		t.Errorf("reserve when the gateway is dead: %v", r)
	}
	if r := b.write(0, pattern(512, 1)); r.status != conflict {
		t.Errorf("the former holder, which lived after all, writes: %v", r)
	}
}
