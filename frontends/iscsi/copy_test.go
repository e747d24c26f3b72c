package iscsi

import (
	"bytes"
	"encoding/binary"
	"testing"

	"sheepdog/frontends/iscsi/internal/pdu"
)

// naa asks a unit for its designator.
func (c *client) naa(lun byte) []byte {
	c.t.Helper()
	c.send(to(c.command(fRead, 255, 0x12, 1, 0x83, 0, 255, 0), lun), nil)
	r := c.finish()
	if r.status != 0 || len(r.data) < 16 || r.data[5] != 3 || r.data[7] != 8 {
		c.t.Fatalf("identification: %v % x", r, r.data)
	}
	return r.data[8:16]
}

// segment is one of a copy, of blocks of 512 bytes.
type segment512 struct {
	from, to uint16
	blocks   uint16
	at, dest uint64
}

// copyList makes the parameters of EXTENDED COPY.
func copyList(list, usage byte, targets [][]byte, segments ...segment512) []byte {
	b := make([]byte, 16)
	b[0], b[1] = list, usage<<3
	binary.BigEndian.PutUint16(b[2:], uint16(32*len(targets)))
	binary.BigEndian.PutUint32(b[8:], uint32(28*len(segments)))
	for _, t := range targets {
		d := make([]byte, 32)
		d[0], d[4], d[5], d[7] = 0xe4, 1, 3, 8
		copy(d[8:], t)
		b = append(b, d...)
	}
	for _, s := range segments {
		d := make([]byte, 28)
		d[0], d[3] = 0x02, 0x18
		binary.BigEndian.PutUint16(d[4:], s.from)
		binary.BigEndian.PutUint16(d[6:], s.to)
		binary.BigEndian.PutUint16(d[10:], s.blocks)
		binary.BigEndian.PutUint64(d[12:], s.at)
		binary.BigEndian.PutUint64(d[20:], s.dest)
		b = append(b, d...)
	}
	return b
}

func (c *client) copy(p []byte) result {
	c.t.Helper()
	cdb := make([]byte, 16)
	cdb[0] = 0x83
	binary.BigEndian.PutUint32(cdb[10:], uint32(len(p)))
	c.send(c.command(fWrite, len(p), cdb...), p)
	return c.finish()
}

func (c *client) copyStatus(list byte) result {
	c.t.Helper()
	cdb := make([]byte, 16)
	cdb[0], cdb[2], cdb[13] = 0x84, list, 12
	c.send(c.command(fRead, 12, cdb...), nil)
	return c.finish()
}

var (
	copyUnreachable = [3]byte{0x0a, 0x0d, 0x02}
	copyFailed      = [3]byte{0x0a, 0x0d, 0x01}
)

// A copy between two units of an initiator, in a group or in two sessions: content, holes, and result.
func TestCopyBetweenUnits(t *testing.T) {
	h, r := serveRules(t, nil)
	r.set(group(t), nil)
	const mib = 1 << 20
	data := pattern(2*mib+8192, 3)
	for _, apart := range []bool{false, true} {
		var c *client
		var targets [][]byte
		if apart {
			c = h.login("vm1", me)
			other := h.login("vm2", me)
			other.ready()
			targets = [][]byte{c.naa(0), other.naa(0)}
		} else {
			c = h.login("disks", me)
			targets = [][]byte{c.naa(0), c.naa(5)}
		}
		c.ready()
		one, two := h.store.disks["vm1"], h.store.disks["vm2"]
		one.mu.Lock()
		two.mu.Lock()
		clear(one.data)
		copy(one.data[mib:], data)
		for i := range one.hole {
			one.hole[i] = i < mib/4096 || i >= (mib+len(data))/4096
		}
		copy(two.data, pattern(len(two.data), 9))
		for i := range two.hole {
			two.hole[i] = false
		}
		one.mu.Unlock()
		two.mu.Unlock()
		// Three MiB from the middle of the hole before the data to the middle of the second unit.
		res := c.copy(copyList(7, 0, targets, segment512{from: 0, to: 1, blocks: 6144, at: 1024, dest: 2000}))
		if res.status != 0 {
			t.Fatalf("apart %v: %v", apart, res)
		}
		one.mu.Lock()
		two.mu.Lock()
		if !bytes.Equal(two.data[2000*512:][:3*mib], one.data[mib/2:][:3*mib]) {
			t.Errorf("apart %v: the content is another one", apart)
		}
		if !two.hole[(2000*512+4095)/4096] {
			t.Errorf("apart %v: a hole was filled", apart)
		}
		if !bytes.Equal(two.data[:2000*512], pattern(len(two.data), 9)[:2000*512]) {
			t.Errorf("apart %v: more was written", apart)
		}
		one.mu.Unlock()
		two.mu.Unlock()
		st := c.copyStatus(7)
		if st.status != 0 || st.data[4] != 1 || st.data[6] != 1 || binary.BigEndian.Uint32(st.data[8:]) != 3*mib {
			t.Errorf("copy status: %v % x", st, st.data)
		}
		if st = c.copyStatus(7); st.sense != [3]byte{5, 0x24, 0} {
			t.Errorf("a result that was told: %v", st)
		}
		c.conn.Close()
	}
	if n := h.store.opens.Load(); n > 4 {
		t.Errorf("%d volumes are open", n)
	}
}

// What a copy may not do: reach units that the initiator does not have, write what is reserved or
// read-only, go beyond an end.
func TestCopyRefused(t *testing.T) {
	h, _ := serveRules(t, nil)
	c := h.login("vm1", me)
	c.ready()
	thief := h.login("vm2", "iqn.2026-11.test:other")
	thief.ready()
	mine, theirs := c.naa(0), thief.naa(0)
	before := append([]byte(nil), h.store.disks["vm2"].data...)
	for what, x := range map[string]struct {
		list []byte
		want [3]byte
	}{
		"another initiator's unit":  {copyList(1, 2, [][]byte{mine, theirs}, segment512{to: 1, blocks: 8}), copyUnreachable},
		"a unit that is not there":  {copyList(1, 2, [][]byte{mine, make([]byte, 8)}, segment512{to: 1, blocks: 8}), copyUnreachable},
		"no such descriptor":        {copyList(1, 2, [][]byte{mine}, segment512{to: 1, blocks: 8}), copyUnreachable},
		"beyond the end":            {copyList(1, 2, [][]byte{mine}, segment512{blocks: 8, dest: 8<<11 - 7}), [3]byte{0x0a, 0, 0}},
		"an address that overflows": {copyList(1, 2, [][]byte{mine}, segment512{blocks: 8, at: 1<<64 - 4}), [3]byte{0x0a, 0, 0}},
		"a list cut short":          {copyList(1, 2, [][]byte{mine}, segment512{blocks: 8})[:60], [3]byte{5, 0x1a, 0}},
	} {
		if r := c.copy(x.list); r.sense != x.want {
			t.Errorf("%s: %v, want %x", what, r, x.want)
		}
	}
	if !bytes.Equal(before, h.store.disks["vm2"].data) {
		t.Error("something was written nevertheless")
	}
	// A unit of one's own that another initiator has reserved for itself.
	own := h.login("vm2", me)
	own.ready()
	thief.send(thief.command(pdu.FlagFinal, 0, 0x16), nil) // RESERVE(6)
	if r := thief.finish(); r.status != 0 {
		t.Fatal(r)
	}
	list := copyList(1, 0, [][]byte{mine, theirs}, segment512{to: 1, blocks: 8})
	if r := c.copy(list); r.sense != copyFailed {
		t.Errorf("a reserved unit: %v", r)
	}
	if st := c.copyStatus(1); st.status != 0 || st.data[4] != 2 {
		t.Errorf("status of a copy that failed: %v % x", st, st.data)
	}
	thief.send(thief.command(pdu.FlagFinal, 0, 0x17), nil)
	thief.finish()
	if r := c.copy(list); r.status != 0 {
		t.Errorf("after the release: %v", r)
	}
}
