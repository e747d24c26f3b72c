package scsi

import (
	"bytes"
	"encoding/binary"
	"testing"
)

func testUnit() *Unit {
	return &Unit{port: testPort, Blocks: 1 << 20, BlockShift: 9, ID: [8]byte{1, 2, 3, 4, 5, 6, 7, 8}, Group: 1, Groups: []Group{{ID: 1}, {ID: 2, State: ActiveNonOptimized}}}
}

// checkPlan holds what must be true of every plan.
func checkPlan(t *testing.T, u *Unit, cdb []byte) {
	p := Decide(u, testPort, cdb)
	size := int64(0)
	if u != nil {
		size = int64(u.Blocks) << u.BlockShift
	}
	switch {
	case p.Kind == Refuse && (p.Status == StatusGood || p.Sense.Code == Code{}):
		t.Fatalf("%x is refused without a reason: %+v", cdb, p)
	case p.Off < 0 || p.Len < 0 || p.DataOut < 0 || p.Limit < 0:
		t.Fatalf("%x: %+v", cdb, p)
	case p.Kind != Refuse && p.Kind != Answer && u == nil:
		t.Fatalf("%x does something without a unit: %+v", cdb, p)
	case p.Off+p.Len > size:
		t.Fatalf("%x goes beyond the unit: %+v", cdb, p)
	case p.Kind == Read && p.Len > MaxTransfer, p.DataOut > MaxTransfer && p.Kind != SetGroups:
		t.Fatalf("%x is too long: %+v", cdb, p)
	case p.Kind == Answer && int64(len(p.Data)) > p.Limit && p.Limit > 0:
		t.Fatalf("%x answers more than was asked for: %+v", cdb, p)
	case u != nil && u.ReadOnly && changes(p.Kind):
		t.Fatalf("%x changes a unit that is read-only: %+v", cdb, p)
	}
}

func changes(k Kind) bool {
	switch k {
	case Write, WriteVerify, CompareWrite, OrWrite, Fill, Zero, Discard, Unmap:
		return true
	}
	return false
}

func FuzzDecide(f *testing.F) {
	for _, c := range commands {
		b := make([]byte, 16)
		copy(b, c.usage)
		f.Add(b, byte(0))
		b = make([]byte, 16)
		b[0] = c.op
		if c.action != noAction {
			b[1] = byte(c.action)
		}
		f.Add(b, byte(1))
	}
	f.Fuzz(func(t *testing.T, cdb []byte, kind byte) {
		b := make([]byte, 16)
		copy(b, cdb)
		u := testUnit()
		switch kind % 5 {
		case 1:
			u.ReadOnly = true
		case 2:
			u.Protected = true
		case 3:
			u.BlockShift, u.Blocks = 12, 0
		case 4:
			u = nil
		}
		checkPlan(t, u, b)
	})
}

func FuzzParameters(f *testing.F) {
	f.Add([]byte{0, 22, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 0}, byte(1))
	f.Fuzz(func(t *testing.T, b []byte, action byte) {
		u := testUnit()
		list, sense := UnmapRanges(u, b)
		for _, r := range list {
			if sense != (Sense{}) || r.Off < 0 || r.Len <= 0 || r.Off+r.Len > int64(u.Blocks)<<u.BlockShift {
				t.Fatalf("%x: %v %v", b, list, sense)
			}
		}
		Select(u, action&1 != 0, b)
		WantedGroup(u, b)
		cdb := make([]byte, 16)
		cdb[0], cdb[1], cdb[2], cdb[8] = 0x5f, action%8, action>>3&0x0f, 24
		p := Decide(u, testPort, cdb)
		var r Reservations
		for _, n := range []string{"a", "b", "a"} {
			q := make([]byte, 24)
			copy(q, b)
			next, _, o := r.Out(Nexus{Port: n, Group: 1}, &p, q)
			if o.Status != StatusGood && next.Encode() != r.Encode() {
				t.Fatalf("a refused change changes something: %+v, %+v", r, next)
			}
			if next.Holder != nil && len(next.Keys) == 0 {
				t.Fatalf("a reservation without registrants: %+v", next)
			}
			r = next
			for action := range byte(4) {
				r.In(action)
			}
		}
		if again, err := DecodeReservations(r.Encode()); err != nil || again.Encode() != r.Encode() {
			t.Fatalf("%v: %q comes back as %q", err, r.Encode(), again.Encode())
		}
	})
}

// The pages of vital product data that there are, are those that are listed, and have right lengths.
func TestPages(t *testing.T) {
	u := testUnit()
	var codes []byte
	for _, p := range pages {
		codes = append(codes, p.code)
		cdb := make([]byte, 16)
		cdb[0], cdb[1], cdb[2], cdb[3], cdb[4] = 0x12, 1, p.code, 1, 0
		d := Decide(u, testPort, cdb)
		if d.Kind != Answer || len(d.Data) < 4 || d.Data[1] != p.code || int(binary.BigEndian.Uint16(d.Data[2:])) != len(d.Data)-4 {
			t.Errorf("page %#x: %+v", p.code, d)
		}
	}
	if !bytes.Equal(codes, pageCodes) {
		t.Errorf("there are %x, listed are %x", codes, pageCodes)
	}
	a, b := testUnit(), testUnit()
	b.Group = 2
	if !bytes.Equal(pageIdentification(a)[:12], pageIdentification(b)[:12]) {
		t.Error("another gateway has another identity")
	}
}

// Every command in the table is found by what it says of itself.
func TestCommandsAreFound(t *testing.T) {
	for _, c := range commands {
		b := make([]byte, 16)
		b[0] = c.op
		if c.action != noAction {
			b[1] = byte(c.action)
		}
		if got, _ := find(b); got != c {
			t.Errorf("%s is not found", c.Name)
		}
		if n := len(c.usage); c.usage[0] != c.op || n != 6 && n != 10 && n != 12 && n != 16 || n != map[byte]int{0: 6, 1: 10, 2: 10, 4: 16, 5: 12}[c.op>>5] {
			t.Errorf("%s: usage %x", c.Name, c.usage)
		}
	}
}

func TestSense(t *testing.T) {
	s := Sense{Code: Miscompare, Info: 0x1234, HasInfo: true}
	if got := s.Encode(false); !bytes.Equal(got, []byte{0xf0, 0, 0x0e, 0, 0, 0x12, 0x34, 10, 0, 0, 0, 0, 0x1d, 0, 0, 0, 0, 0}) {
		t.Errorf("fixed: %x", got)
	}
	if got := s.Encode(true); !bytes.Equal(got, []byte{0x72, 0x0e, 0x1d, 0, 0, 0, 0, 12, 0, 10, 0x80, 0, 0, 0, 0, 0, 0, 0, 0x12, 0x34}) {
		t.Errorf("descriptors: %x", got)
	}
}

var testPort = &Port{Target: "iqn.test:vm1", LUNs: []uint16{0}}

// Whatever parameters come, a copy that is understood stays within its units.
func FuzzCopy(f *testing.F) {
	list := make([]byte, copyHeader+targetDescSize+segmentSize)
	list[3], list[11] = targetDescSize, segmentSize
	d := list[copyHeader:]
	d[0], d[4], d[5], d[7] = codeIdentity, codeBinary, typeNAA, 8
	s := list[copyHeader+targetDescSize:]
	s[0], s[3], s[11] = codeBlocks, segmentSize-4, 8
	f.Add(list)
	f.Fuzz(func(t *testing.T, b []byte) {
		c, sense := DecodeCopy(b)
		if sense != (Sense{}) {
			return
		}
		if len(c.Segments) > maxCopySegments {
			t.Fatalf("%d segments", len(c.Segments))
		}
		u := testUnit()
		size := int64(u.Blocks) << u.BlockShift
		for _, s := range c.Segments {
			src, dst, ok := s.Ranges(u, u)
			if ok && (src.Off < 0 || src.Len < 0 || src.Off+src.Len > size || dst.Off < 0 || dst.Off+dst.Len > size || src.Len != dst.Len) {
				t.Fatalf("%+v goes beyond the unit: %+v, %+v", s, src, dst)
			}
		}
	})
}
