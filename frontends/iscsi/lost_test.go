package iscsi

import (
	"encoding/binary"
	"fmt"
	"testing"
	"time"

	"sheepdog/frontends/iscsi/internal/pdu"
	"sheepdog/frontends/iscsi/internal/scsi"
	"sheepdog/storage/object"
	"sheepdog/vdi"
)

// lose has the disk's next flush fail because of what may be lost.
func (d *disk) lose() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.once = map[vdi.Op]error{vdi.OpFlush: fmt.Errorf("flush: %w: %w", vdi.ErrIO, object.ErrLost)}
}

func (c *client) syncCache() result {
	c.t.Helper()
	c.send(c.command(0x80, 0, 0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0), nil)
	return c.finish()
}

// That writes may be lost is said once, and not by a sense key that initiators try again after: the second SYNCHRONIZE CACHE
// would say that all is well.
func TestFlushSaysThatWritesAreLost(t *testing.T) {
	h := serve(t, nil)
	c := h.login("vm1", me)
	c.ready()
	h.store.disks["vm1"].lose()
	if r := c.syncCache(); r.status != 2 || r.sense[0] != scsi.KeyHardware {
		t.Errorf("flush after a loss: %v", r)
	}
	if r := c.syncCache(); r.status != 0 {
		t.Errorf("the flush after it: %v", r)
	}
}

// A read with FUA makes durable what it answers, and may be the first who hears that writes are lost. It is answered; who
// flushes is told.
func TestDurableReadLeavesLossToFlush(t *testing.T) {
	h := serve(t, nil)
	c := h.login("vm1", me)
	c.ready()
	h.store.disks["vm1"].lose()
	fua := rw(0x28, 0, 1)
	fua[1] = 0x08
	c.send(c.command(fRead, 512, fua...), nil)
	if r := c.finish(); r.status != 0 || len(r.data) != 512 {
		t.Errorf("read with FUA: %v", r)
	}
	if r := c.syncCache(); r.status != 2 || r.sense[0] != scsi.KeyHardware {
		t.Errorf("flush after it: %v, want to hear of the loss", r)
	}
	if r := c.syncCache(); r.status != 0 {
		t.Errorf("the flush after that: %v", r)
	}
}

// A flush that is aborted, as initiators do when it takes too long, tells nobody that writes may be lost: the next one does.
func TestAbortedFlushTellsNobody(t *testing.T) {
	h := serve(t, nil)
	d := h.store.disks["vm1"]
	c := h.login("vm1", me)
	c.ready()
	hold := make(chan struct{})
	d.mu.Lock()
	d.hold = hold
	d.mu.Unlock()
	d.lose()
	flush := c.command(0x80, 0, 0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0)
	c.send(flush, nil)
	for d.held.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	q := c.request(pdu.OpTask|0x40, pdu.FlagFinal|pdu.TaskAbort)
	binary.BigEndian.PutUint32(q[20:], flush.TaskTag())
	c.send(q, nil)
	for aborted := false; !aborted; time.Sleep(time.Millisecond) {
		h.clients.Each(func(s *session) {
			s.mu.Lock()
			defer s.mu.Unlock()
			aborted = s.tasks[flush.TaskTag()] != nil && s.tasks[flush.TaskTag()].aborted
		})
	}
	d.mu.Lock()
	d.hold = nil
	d.mu.Unlock()
	close(hold)
	if r, _ := c.recv(); r.Op() != pdu.OpTaskAnswer {
		t.Fatalf("opcode %#x in place of the answer to the abort", r.Op())
	}
	c.ready()
	if n := d.heard.Load(); n != 0 {
		t.Errorf("what was aborted was heard %d times", n)
	}
	d.lose()
	if r := c.syncCache(); r.status != 2 {
		t.Errorf("flush: %v", r)
	}
	c.ready()
	c.ready() // it comes when the answer is known to be sent
	if n := d.heard.Load(); n != 1 {
		t.Errorf("what was answered was heard %d times", n)
	}
}
